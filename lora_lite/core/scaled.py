"""Blocks in which adapters have other scales."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

from ..errors import ConfigError, TargetError
from .row_block import block_of_rows
from .state import AdapterState, check_unmerged, not_attached, session_of
from .validate import is_number


@contextmanager
def scaled(model: nn.Module, c: float | int | Sequence[float | int], name: str | None = None) -> Iterator[None]:
    """Within the block, the coefficient of one adapter (or of all) is c; afterwards what it was, on error too.

    A backward may come after the block: what gradient checkpointing runs again then, it runs at the c of the forward
    (not where a compiled module stands inside of an eager checkpoint: call backward inside the block there). Where that
    can't be known, with several threads or a checkpoint inside of a reentrant one, it raises ConfigError.

    c       a number, or one for each row of the batch: a sweep of c is one forward. `rows` says what holds of rows

    Raises:
        ConfigError: unless c is finite; in a call with another number of rows.
        TargetError: for an unknown name, or an adapter that is merged; where rows can't be told apart.
    """
    each = tuple(map(finite_scale, c)) if isinstance(c, Sequence) and not isinstance(c, str) else None
    one = finite_scale(c) if each is None else 0.0
    root, session = session_of(model)
    states = [state for state in session.adapters.values() if name in (None, state.name)]
    if name is not None and not states:
        raise TargetError(not_attached(name, model))
    if any(state.merged for state in states):
        check_unmerged(session, "change the scale")
    if name is not None:
        check_in_use(states)
    with ExitStack() as undo:
        if each is not None:
            if not each:
                raise ConfigError("no scales: wanted one for each row of the batch")
            batch = undo.enter_context(block_of_rows(root, session, len(each)))
        for state in states:
            if each is None:
                if state.row_scales is not None:  # the inner block counts
                    undo.callback(state.set_rows, *state.set_rows(state.batch, state.on, None))
                before: tuple[Any, ...] = state.set_scale(one)
                undo.callback(state.set_scale, *before)
            else:
                undo.callback(state.set_rows, *state.set_rows(batch, state.on, each))
        yield


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Within the block, the model is its base, bit for bit."""
    return scaled(model, 0.0)


def check_in_use(states: Iterable[AdapterState]) -> None:
    """TargetError for an adapter that is unloaded, and so does nothing."""
    if unloaded := [state.name for state in states if state.unloaded]:
        raise TargetError(f"adapter {unloaded[0]!r} is unloaded\n  use lora_lite.bring_back(model, {unloaded[0]!r})")


def finite_scale(c: Any) -> float:
    if not is_number(c):
        problem = f"scale {c!r}: wanted a finite number; 0 is the base, 1 the method as trained"
        raise ConfigError(f"{problem}\n  lora_lite.scaled takes a list of them too, one for each row of a batch")
    return float(c)
