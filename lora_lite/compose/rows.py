"""A batch in which each row has its own adapter, or none."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..core.row_block import block_of_rows
from ..core.scaled import check_in_use
from ..core.state import check_unmerged, session_of
from ..errors import ConfigError, TargetError


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None], tokens: Tensor | None = None) -> Iterator[None]:
    """Within the block, row i of each batch goes by the adapter `names[i]` alone, at its scale; by none for None.

    It is for every method, for `generate` (beams have the adapter of their row) and for training: an adapter's
    gradients are those of its rows. A row's output is what the adapter gives it in a batch of its own rows, to
    rounding. `scaled(model, [...])` within the block, or by itself, gives each row its scale.

    names       one for each row of the batch
    tokens      (b, t), for rows that several sequences are packed in: for each token an index in `names`, of any
                length then. For one forward at a time, not for `generate`

    Gradient checkpointing runs a part of the forward again in the backward: of fused experts and other layers that are
    reached through their weight, call backward inside of the block.

    Raises:
        ConfigError: for no names, labels that are no index of them, another block of rows around this one, or a call
            with another number of rows.
        TargetError: for an unknown name, adapters that are merged, or a layer in which rows can't be told apart.
    """
    root, session = session_of(model)
    if session.batch is None:
        check_unmerged(session, "give rows adapters of their own")
    if not names or isinstance(names, str):
        raise ConfigError(f"names {names!r}: wanted an adapter's name, or None, for each row of the batch")
    if unknown := [name for name in names if name is not None and name not in session.adapters]:
        attached = ", ".join(session.adapters) or "none"
        raise TargetError(f"no adapter {unknown[0]!r} on this {type(model).__name__}\n  attached: {attached}")
    check_in_use(session.adapters[name] for name in set(names) if name is not None)
    if tokens is not None:
        is_index = tokens.ndim == 2 and tokens.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        if not is_index or tokens.numel() == 0 or not 0 <= int(tokens.min()) <= int(tokens.max()) < len(names):
            problem = f"tokens: got {tokens.dtype} of {tuple(tokens.shape)}"
            raise ConfigError(f"{problem}, wanted (b, t) indices of the {len(names)} names")
    with ExitStack() as undo:
        labels = None if tokens is None else tokens.detach().cpu().clone()  # theirs may change within the block
        batch = undo.enter_context(block_of_rows(root, session, len(names), labels))
        for state in session.adapters.values():
            if state.on is not None:
                raise ConfigError("a block of `rows` inside of another\n  give all rows their names in one")
            on = tuple(name == state.name for name in names)
            undo.callback(state.set_rows, *state.set_rows(batch, on, state.row_scales))
        yield
