"""What attach keeps: a slot for each adapter at each layer, and on the model a session with what it changed there."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from ..base import quant
from ..errors import TargetError
from .layer import AdapterState, Slot
from .variant import lookup

T = TypeVar("T")
A = TypeVar("A", AdapterState, Slot)
SLOTS = "_lora_lite"
SESSION = "_lora_lite_session"


class BaseChange:
    """What one attach changes beside the adapted layers: it freezes parameters and keeps the layout of 4-bit layers.

    It knows these objects, not their paths: what has replaced one since is not ours to change, and a wrapper that was
    put in since hides nothing. The references are weak, or the whole parameters that fully_shard has replaced would
    stay in memory. A copy or a pickle of the model takes along what is alive.
    """

    def __init__(self, frozen: Iterable[nn.Parameter], kept_layout: Iterable[nn.Module]) -> None:
        self._frozen = [weakref.ref(parameter) for parameter in frozen]
        self._kept_layout = [weakref.ref(layer) for layer in kept_layout]

    def __reduce__(self) -> Any:
        return BaseChange, (_alive(self._frozen), _alive(self._kept_layout))

    def make(self) -> None:
        for parameter in _alive(self._frozen):
            parameter.requires_grad_(False)
        for layer in _alive(self._kept_layout):
            quant.keep_layout(layer, True)

    def undo(self) -> None:
        """Nothing here may raise: a detach is done whole."""
        for parameter in _alive(self._frozen):
            parameter.requires_grad_(
                parameter.is_floating_point() or parameter.is_complex()
            )  # .data may hold codes now
        for layer in _alive(self._kept_layout):
            quant.keep_layout(layer, False)


@dataclass(eq=False)
class Swap:
    """One thing that a merge has changed on a module: the storage of a parameter, or a whole attribute."""

    holder: nn.Module
    name: str
    before: Tensor | nn.Module | None

    def put(self, value: Tensor | nn.Module | None) -> None:
        """In its place, on the device, in the dtype and the mode that the model has got meanwhile."""
        now = getattr(self.holder, self.name)
        if isinstance(value, nn.Module) and isinstance(now, nn.Module):
            value.train(now.training)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            now.data = value.to(now.device, now.dtype)  # the parameter stays the object that others know
        else:
            setattr(self.holder, self.name, value)

    def undo(self) -> None:
        self.put(self.before)


@dataclass(eq=False)
class Session:
    """The adapters on a model, and what their attaches changed; the last detach undoes it."""

    adapters: dict[str, AdapterState] = field(default_factory=dict)
    changes: list[BaseChange] = field(default_factory=list)
    merged: list[Swap] = field(default_factory=list)
    """What unmerge puts back; empty while nothing is merged."""
    memo: dict[bytes, Tensor] = field(default_factory=dict)
    """Results of the base, which is read-only meanwhile, by a hash of what they were computed from."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"memo": {}}


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """The adapters at one layer, in the order attached; an empty dict that isn't kept if there is none."""
    return module.__dict__.get(SLOTS, {})


def keep_slot(module: nn.Module, slot: Slot) -> None:
    """Remember an adapter at a layer, as `put` does. That the layer has been called is known of each adapter there."""
    slot.ran = slot.ran or any(other.ran for other in slots_of(module).values())
    put(module.__dict__.setdefault(SLOTS, {}), slot.state.name, slot)


def put(known: dict[str, A], name: str, value: A) -> None:
    """What is known of an adapter in the place it had, or a new one's after the others; one that leads, before those
    that don't."""
    later = {} if name in known or not leads(value) else {n: each for n, each in known.items() if not leads(each)}
    for each in later:
        del known[each]
    known.update({name: value, **later})


def leads(known: AdapterState | Slot) -> bool:
    """Does this adapter come before those that don't lead?"""
    return lookup(known.cfg.variant).leads


def drop_slot(module: nn.Module, name: str) -> Slot | None:
    """Forget an adapter at a layer; leaves no trace of the last one."""
    slot = slots_of(module).pop(name, None)
    if not slots_of(module):
        module.__dict__.pop(SLOTS, None)
    return slot


def session_of(model: nn.Module) -> tuple[nn.Module, Session]:
    """The module that adapters were attached to, inside any wrapper, and its record; a new one if there is none.

    Raises TargetError if there are several such modules, or if the model is a part of one.
    """
    modules = dict(model.named_modules())
    found = {path: module for path, module in modules.items() if has_session(module)}
    if len(found) > 1:
        raise TargetError(
            f"adapters were attached to several parts of this {type(model).__name__}: {', '.join(found)}\n"
            f"  call this for each part by itself"
        )
    for root in found.values():
        return root, session_at(root)
    if any(map(slots_of, modules.values())):
        raise TargetError(
            f"this {type(model).__name__} is a part of a model that adapters were attached to\n"
            f"  give the whole model, the one that attach was given"
        )
    return getattr(model, "_orig_mod", model), Session()


def session_at(root: nn.Module) -> Session:
    """The record on the module itself, a root that `session_of` or `attachable` gave; a new one if there is none."""
    session: Session = root.__dict__.get(SESSION, Session())
    return session


def check_unmerged(session: Session, what: str) -> None:
    """TargetError while adapters are merged: their effect is in the weights, so nothing here would change it."""
    merged = [name for name, state in session.adapters.items() if state.merged]
    if merged:
        raise TargetError(
            f"can't {what}: {', '.join(merged)} {'is' if len(merged) == 1 else 'are'} merged into the weights\n"
            f"  lora_lite.unmerge(model) first"
        )


def has_session(module: nn.Module) -> bool:
    """True for a module that adapters were attached to."""
    return SESSION in module.__dict__


def keep_session(root: nn.Module, session: Session) -> None:
    """Store the record on the model while it has adapters, and take it off after the last."""
    if session.adapters:
        root.__dict__[SESSION] = session
    else:
        root.__dict__.pop(SESSION, None)


def _alive(references: list[weakref.ref[T]]) -> list[T]:
    return [found for reference in references if (found := reference()) is not None]
