"""The handle on an attached adapter, where to find it, and its scale.

An adapter's tensors are parameters and buffers of the layers that it adapts. Each of these layers
keeps a `Slot` per adapter, and the model that `attach` was given keeps a `Session`.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import quant
from .affine import Affine
from .config import dtype_name, is_number
from .errors import CheckpointError, ConfigError, TargetError, brief
from .layer import AdapterState, Layer, Slot
from .targets import Target
from .variant import check_takes_data, lookup

T = TypeVar("T")
A = TypeVar("A", AdapterState, Slot)

_SLOTS = "_lora_lite"
_SESSION = "_lora_lite_session"


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


class Adapter:
    """A handle on one attached adapter; keep it, or get it again from `adapters(model)`."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self._model = model
        self.name = name

    @property
    def config(self) -> Any:
        """The config it was attached with."""
        return self._state.cfg

    @property
    def variant(self) -> str:
        """The name of its method in REGISTRY."""
        return self.config.variant

    @property
    def base(self) -> dict[str, Any]:
        """What it was attached to: the `base` record of an adapter file."""
        return self._state.base

    @property
    def per_layer(self) -> dict[str, dict[str, Any]]:
        """Path of each layer at which the config differs, with the fields that do."""
        return {path: dict(fields) for path, fields in self._state.per_layer.items()}

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        """Path of each adapted layer, relative to the model given to `attach`, with its (d_in, d_out)."""
        return {target.path: (target.d_in, target.d_out) for target in self._state.targets}

    @property
    def layers(self) -> list[Target]:
        """What it was attached to, as `plan` describes it."""
        return list(self._state.targets)

    @property
    def scale(self) -> float:
        """The coefficient c: 0 is the base, bit for bit; 1 the method; otherwise y + c·(f(y) - y)."""
        return self._state.scale

    @scale.setter
    def scale(self, c: float) -> None:
        self._check_unmerged("change the scale")
        self._state.set_scale(_finite(c))

    def configure(self, *, calibration_data: Any = None, **changes: Any) -> None:
        """Change config fields that the method can follow while attached (its `live` ones), at once and on all layers
        but those where `per_layer` sets them; with calibration_data, compute it anew from that.

        Raises ConfigError for another field or a bad value, and what attach raises for the data; the adapter is then as
        it was.
        """
        self._check_unmerged("configure")
        state, variant = self._state, lookup(self.variant)
        fixed = sorted(changes.keys() - set(variant.live))
        if fixed:
            raise ConfigError(
                f"adapter {self.name!r}: {', '.join(fixed)} can't change while it is attached\n"
                f"  {self.variant!r} can follow {', '.join(variant.live) or 'no field'}; for others detach and attach"
            )
        if calibration_data is not None:
            check_takes_data(state.cfg)
        old, new, views = state.cfg, replace(state.cfg, **changes), self.views()
        self._use(new)
        kept = {} if calibration_data is None else {key: t.clone() for key, t in self.state_dict().items()}
        with torch.no_grad():
            try:
                if calibration_data is not None:
                    with scaled(self._model, 0.0, self.name):
                        variant.group_init(self._model, views, new, calibration_data)
                variant.refresh(views, new)
            except BaseException:
                self._use(old)
                if kept:
                    self.load_state_dict(kept)
                else:
                    variant.refresh(views, old)
                raise

    @property
    def is_sharded(self) -> bool:
        """True once fully_shard has taken its parameters or its layers' weights: all processes save it together."""
        weights = (quant.stored(module) for module in self._state.layers)
        return any(map(quant.is_sharded, weights)) or any(
            quant.is_sharded(tensor) for _, tensor in self.named_tensors()
        )

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers by their key in a file: `<path>.lora_A`, whatever the adapter's name."""
        for module, slot in self.slots():
            for tensor in slot.tensors:
                yield file_key(slot.path, tensor), getattr(module, slot.state.attribute(tensor))

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable tensors, for an optimiser."""
        for _, tensor in self.named_tensors():
            if isinstance(tensor, nn.Parameter):
                yield tensor

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor by its key in a file, detached; a sharded one stays sharded."""
        return {key: tensor.detach() for key, tensor in self.named_tensors()}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values in place: an optimiser keeps its parameters, and a sharded one takes its shard.

        Raises CheckpointError, before anything is copied, unless keys and shapes are exactly this adapter's.
        """
        self._check_unmerged("load values")
        own = dict(self.named_tensors())
        check_shapes(
            {key: tuple(t.shape) for key, t in tensors.items()},
            {key: tuple(t.shape) for key, t in own.items()},
            f"adapter {self.name!r}",
        )
        for key, tensor in own.items():
            tensor.copy_(quant.sharded_like(tensor, tensors[key].to(tensor.device, tensor.dtype)))

    def trained_on(self, base: dict[str, Any]) -> None:
        """Set the `base` record: a loaded adapter keeps that of the base its values belong to."""
        self._state.base = base

    def slots(self) -> Iterator[tuple[nn.Module, Slot]]:
        """Each adapted layer, with this adapter's slot on it."""
        merged: list[Any] = [swap.before for swap in self._session.merged]
        here = {id(module) for module in (*self._model.modules(), *merged)}  # not what something else has replaced
        for module in self._state.layers:
            slot = slots_of(module).get(self.name)
            if slot is not None and id(module) in here:
                yield module, slot

    def views(self) -> dict[str, Layer]:
        """Each adapted layer as the variant sees it, by path; experts with tensors of their own as `path[i]`."""
        views: dict[str, Layer] = {}
        for module in self._state.layers:  # no walk over the model: a search changes the config at every trial
            slot = slots_of(module)[self.name]
            for i in range(slot.target.experts) if slot.stacked else [None]:
                worked_in = {"history": partial(_with_history, module, i)}
                views[slot.path if i is None else f"{slot.path}[{i}]"] = Layer(
                    module, slot, expert=i, instead=worked_in
                )
        return views

    def counts(self) -> str:
        """How many layers of each kind, for messages: "30 o_proj, 30 down_proj"."""
        slots = [slot for _, slot in self.slots()]
        kinds = Counter(slot.path.rpartition(".")[2] for slot in slots)
        fused = Counter(slot.path.rpartition(".")[2] for slot in slots if slot.target.experts)
        return ", ".join(f"{n} {'blocks of fused ' if kind in fused else ''}{kind}" for kind, n in kinds.items())

    def _check_unmerged(self, what: str) -> None:
        if self._state.merged:
            check_unmerged(self._session, what)

    def _use(self, cfg: Any) -> None:
        """Make this the config, and at each layer the one with the fields that differ there. Raises ConfigError."""
        state = self._state
        configs = [cfg.at(state.per_layer.get(target.path, {})) for target in state.targets]
        state.cfg = cfg
        for module, at_layer in zip(state.layers, configs, strict=True):
            slots_of(module)[self.name].cfg = at_layer

    @property
    def _state(self) -> AdapterState:
        session = self._session
        if self.name not in session.adapters:
            raise TargetError(_not_attached(self.name, self._model))
        return session.adapters[self.name]

    @property
    def _session(self) -> Session:
        session: Session = self._model.__dict__.get(_SESSION, Session())
        return session

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        base = self.base["quantization"]
        kind = base["quant_type"] if base else self.base["dtype"]
        kind += f", {base['method']}" if base and base["method"] != "unknown" else ""
        return (
            f"{self.variant} {self.name!r}: {len(self.targets)} layers, {count:,} trainable parameters in "
            f"{dtype_name(self.config.dtype)}, on {self.base['class']} ({kind})"
            f"{'' if self.scale == 1 else f', scale {self.scale:g}'}"
        )


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on a model (or on what a wrapper holds), by name, in the order attached."""
    root, session = session_of(model)
    return {name: Adapter(root, name) for name in session.adapters}


def get_adapter(model: nn.Module, name: str) -> Adapter:
    """The adapter of that name. Raises TargetError."""
    found = adapters(model)
    if name not in found:
        raise TargetError(_not_attached(name, model))
    return found[name]


@contextmanager
def scaled(model: nn.Module, c: float, name: str | None = None) -> Iterator[None]:
    """Within the block, the coefficient of one adapter (or of all) is c; afterwards what it was, on error too.

    A backward may come after the block: what gradient checkpointing runs again then, it runs at the c of the forward
    (not where a compiled module stands inside of an eager checkpoint: call backward inside the block there). Where that
    can't be known, with several threads or a checkpoint inside of a reentrant one, it raises ConfigError.

    Raises ConfigError unless c is finite, TargetError for an unknown name.
    """
    c, session = _finite(c), session_of(model)[1]
    names = list(session.adapters) if name is None else [get_adapter(model, name).name]
    if any(session.adapters[each].merged for each in names):
        check_unmerged(session, "change the scale")
    before: list[tuple[AdapterState, tuple[float, int]]] = []
    try:
        for state in [session.adapters[each] for each in names]:
            before.append((state, state.set_scale(c)))
        yield
    finally:
        for state, old in before:
            state.set_scale(*old)


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Within the block, the model is its base, bit for bit."""
    return scaled(model, 0.0)


# ---- for the runtime and the checkpoints --------------------------------------------------------


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """The adapters at one layer, in the order attached; an empty dict that isn't kept if there is none."""
    return module.__dict__.get(_SLOTS, {})


def keep_slot(module: nn.Module, slot: Slot) -> None:
    """Remember an adapter at a layer, as `put` does."""
    put(module.__dict__.setdefault(_SLOTS, {}), slot.state.name, slot)


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
        module.__dict__.pop(_SLOTS, None)
    return slot


def session_of(model: nn.Module) -> tuple[nn.Module, Session]:
    """The module that adapters were attached to, inside any wrapper, and its record; a new one if there is none.

    Raises TargetError if there are several such modules, or if the model is a part of one.
    """
    found = {path: module for path, module in model.named_modules() if has_session(module)}
    if len(found) > 1:
        raise TargetError(
            f"adapters were attached to several parts of this {type(model).__name__}: {', '.join(found)}\n"
            f"  call this for each part by itself"
        )
    for root in found.values():
        return root, root.__dict__[_SESSION]
    if any(slots_of(module) for module in model.modules()):
        raise TargetError(
            f"this {type(model).__name__} is a part of a model that adapters were attached to\n"
            f"  give the whole model, the one that attach was given"
        )
    return getattr(model, "_orig_mod", model), Session()


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
    return _SESSION in module.__dict__


def keep_session(root: nn.Module, session: Session) -> None:
    """Store the record on the model while it has adapters, and take it off after the last."""
    if session.adapters:
        root.__dict__[_SESSION] = session
    else:
        root.__dict__.pop(_SESSION, None)


def file_key(path: str, tensor: str) -> str:
    """The key of a tensor in `state_dict()` and in a file; the path of a bare layer is empty."""
    return f"{path}.{tensor}" if path else tensor


def check_shapes(got: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str) -> None:
    """CheckpointError unless both sides have the same keys with the same shapes."""
    missing, extra = sorted(wanted.keys() - got.keys()), sorted(got.keys() - wanted.keys())
    differ = [key for key in wanted if key in got and got[key] != wanted[key]]
    wrong = [f"{key} {brief(got[key])}, wanted {brief(wanted[key])}" for key in differ]
    for problem, keys in (("missing keys", missing), ("unexpected keys", extra), ("wrong shapes", wrong)):
        if keys:
            raise CheckpointError(
                f"{where}: {len(keys)} {problem}; {len(got)} tensors where {len(wanted)} are wanted\n"
                f"  such as {brief('; '.join(keys[:3]), 1200)}\n"
                f"  an adapter is loaded whole or not at all"
            )


@torch.no_grad()
def _with_history(module: nn.Module, expert: int | None, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
    """A layer's weight with the adapters worked in that lead all others there, at their scales."""
    leading = [slot for slot in slots_of(module).values() if leads(slot) and not slot.state.is_idle]
    if not leading:
        return weight
    affine = Affine(module, leading, torch.float64, weight.device, expert)
    return torch.cat([columns for *_, columns in affine.columns(weight)], dim=1).to(weight.dtype)


def _alive(references: list[weakref.ref[T]]) -> list[T]:
    return [found for reference in references if (found := reference()) is not None]


def _finite(c: float) -> float:
    if not is_number(c):
        raise ConfigError(f"scale {c!r}: wanted a finite number; 0 is the base, 1 the method as trained")
    return float(c)


def _not_attached(name: str, model: nn.Module) -> str:
    attached = ", ".join(session_of(model)[1].adapters) or "none"
    return f"no adapter {name!r} on this {type(model).__name__}\n  attached: {attached}; attach or load it first"
