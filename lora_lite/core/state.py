"""The state of attached adapters: a `Site` for each at each layer, and a `Session` on the model with all changes.

Sites lie in the layer's own `__dict__`, under one key, and so go where the module goes: deepcopy, pickle, FSDP2.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from ..base.bitsandbytes import keep_layout
from ..base.fingerprint import BaseRecord
from ..base.layer import BaseLayer
from ..errors import TargetError
from .graphs import guard_hooks
from .names import SITES, file_key, numbered
from .rows import Batch, Rows
from .scale import Changes, Scale
from .shared import Shared
from .swap import Swap
from .targets import Target

T = TypeVar("T")
Known = TypeVar("Known", "AdapterState", "Site")
Tensors = Mapping[str, Tensor]
MOST_BLOCKS = 256  # changes that are remembered once rows have scales of their own, which take memory
SESSION = "_lora_lite_session"


@dataclass(eq=False)
class Method:
    """One method of an adapter: a config, the layers that it chose, and the tensors that it has once."""

    cfg: Any
    sites: list["Site"] = field(default_factory=list)  # in module order
    shared: Shared | None = None


@dataclass(eq=False)
class AdapterState:
    """The state that all sites of one adapter share. Its tensors lie on the layers."""

    name: str
    methods: list[Method]
    base: BaseRecord | None  # None only of a stand-in, which is no model's
    scale: float = 1.0  # as it was set; a call goes by `scale_of_call`
    is_first: bool = False  # its hooks come before those of adapters that aren't first, whenever it was attached
    merged: bool = False  # its effect is in the weights, so its hooks do nothing
    max_rank: int | None = None  # of a LoRA that has room for others up to this rank (core/exchange.py)
    unloaded: bool = False  # its tensors are elsewhere, and it has no hooks
    watches: list[RemovableHandle] = field(default_factory=list)  # of the model's calls, where it acts at positions
    steps: int | None = 0  # that `Adapter.step` has counted; None of a file that doesn't say
    changes: Changes[Scale] | None = None  # None while c is the one that it came with: then a call asks nothing
    batch: Batch | None = None  # the block in which rows have adapters or scales of their own
    on: tuple[bool, ...] | None = None  # which rows, or labels, of a batch it is on; None: all
    row_scales: tuple[float, ...] | None = None  # in the place of `scale`
    in_place: Scale | None = None  # within `capturable`: the one whose tensor captured graphs read
    names: set[str] = field(default_factory=set)  # of its tensors on layers, in one set for all of them
    suffix: str = field(init=False)  # of its tensors' names on a layer: nothing, or `__fr` of adapter fr
    plain: Scale = field(init=False)  # made when c changes, not at each call: a token passes every layer
    traced: Scale = field(init=False)  # for a graph of torch.compile: an input of it, which may change

    def __post_init__(self) -> None:
        self.suffix = "" if self.name == "default" else f"__{self.name}"
        self._show()

    def set_scale(self, scale: float, set_in: int | None = None) -> tuple[float, int]:
        """It returns the arguments that undo it."""
        before = self.scale, -1 if self.changes is None else self.changes.set_in
        if self.in_place is not None:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise TargetError(
                    f"adapter {self.name!r}: the scale changes within a step that is being captured, so each replay "
                    f"would set it again\n  capture a step for one scale, and set it before each replay"
                )
            self.scale = scale
            self.in_place.value.fill_(scale)
            return before
        if is_compiling():
            self.changes = None  # there is no clock in a graph: what is pending goes by the scale as it is
            self.scale = scale
            self._show()
            return before
        self.changes = self.changes or Changes(self.plain)
        self.scale = scale
        self._show()
        self.changes.change(self.plain, set_in)
        return before

    def set_rows(
        self, batch: Batch | None, on: tuple[bool, ...] | None, row_scales: tuple[float, ...] | None
    ) -> tuple[Any, ...]:
        """It returns the arguments that undo it."""
        if self.in_place is not None:
            raise within_capturable("give rows scales of their own")
        before = self.batch, self.on, self.row_scales
        self.changes = self.changes or Changes(self.plain)
        self.changes.most = self.changes.most or MOST_BLOCKS
        self.batch, self.on, self.row_scales = batch, on, row_scales
        self._show()
        self.changes.change(self.plain)
        return before

    def _show(self) -> None:
        # A tensor of inference mode could take part in no training later.
        with nullcontext() if is_compiling() else torch.inference_mode(False):
            value = torch.tensor(self.scale, dtype=torch.float64, device="cpu")  # (): it casts nothing up
        self.plain = Scale(self.scale, self.scale == 0, self.scale == 1)
        self.traced = self.plain._replace(value=value)
        if self.batch is not None:
            self.batch.version += 1
            on = self.on or (True,) * self.batch.size
            scales = self.row_scales or (self.scale,) * len(on)
            each = [c if is_on else 0.0 for c, is_on in zip(scales, on, strict=True)]
            rows = Rows(self.batch, each, self.scale if self.row_scales is None else None)
            self.plain = Scale(None, rows.is_zero, False, rows)
            self.traced = Scale(None, False, False, rows)  # whatever the assignment, a graph is the same

    def scale_of_call(self) -> Scale:
        """The scale; for a forward that gradient checkpointing runs again, the one at which it ran first."""
        if is_compiling():
            return self.traced
        if self.changes is None:
            return self.plain
        return self.changes.of_this_call(self.plain)

    @property
    def sites(self) -> list["Site"]:
        """Every layer that it adapts, method by method."""
        return [site for method in self.methods for site in method.sites]

    @property
    def is_idle(self) -> bool:
        """Do its hooks leave everything as it is?"""
        if self.in_place is not None:  # any scale may come
            return False
        return self.merged or self.unloaded or self.scale_of_call().is_zero

    def __getstate__(self) -> dict[str, Any]:
        # No forward of a copy is pending, nor is it in the block that the original is in.
        plain = Scale(self.scale, self.scale == 0, self.scale == 1)
        alone = {"batch": None, "on": None, "row_scales": None, "plain": plain, "in_place": None}
        value = torch.tensor(self.scale, dtype=torch.float64, device="cpu")
        return self.__dict__ | alone | {"changes": None, "traced": plain._replace(value=value)}


@dataclass(eq=False)
class Site:
    """One adapter at one layer: all that is known of it there. `resolve.make_site` makes it, once."""

    target: Target
    base: BaseLayer
    cfg: Any  # the config at this layer
    overrides: dict[str, Any]  # the fields in which that differs from the adapter's
    base_weight: str  # the variant's use of the weight: "unused", "read" or "dense"
    stacked: bool  # each tensor is (experts, ...), over the experts that the layer fuses
    specs: dict[str, Any]  # the `ParamSpec` of each tensor
    parts: Any = None  # the `Parts` of its tensors, on a layer that tensor parallelism has sharded (core/split.py)
    state: AdapterState = field(init=False)  # set by the transaction: sites are checked before an adapter exists
    method: Method = field(init=False)  # as is this
    number: int = 1  # of the methods of its adapter at this weight: two on one layer act in the config's order
    handles: list[RemovableHandle] = field(default_factory=list)
    memo: dict[str, tuple[list[Tensor], Any]] = field(default_factory=dict)  # of `Layer.constant`
    positions: Any = None  # the `Positions` at which its method acts, one for all sites of a config; None: at all
    as_they_are: tuple[tuple[str, str], ...] = ()  # of tensors that a call's view casts to nothing: name, attribute
    # A forward outside of torch.compile has called the layer, at any scale, since its first adapter: one there knows.
    ran: bool = False
    never_ran: bool = False  # none had when the adapter's file was written, although one had called other layers

    @property
    def path(self) -> str:
        return self.target.path

    @property
    def module(self) -> Any:
        return self.base.module

    @property
    def module_path(self) -> str:
        """The path of its module, which a bare parameter's path goes on from."""
        return self.path.removesuffix(f".{self.prefix}") if self.prefix else self.path

    @property
    def is_first(self) -> bool:
        return self.state.is_first

    @property
    def through_weight(self) -> bool:
        """Is it reached through its weight: by its kind, or as a matrix of fused experts?"""
        return self.stacked or self.base.by_weight

    @property
    def slot(self) -> str:
        """Its key among the sites of its module: the adapter's name, with that of a bare parameter after a dot."""
        slot = f"{self.state.name}.{self.prefix}" if self.prefix else self.state.name
        return slot if self.number == 1 else f"{slot} {self.number}"

    @property
    def no_weight(self) -> str:
        """Why no weight holds the adapter, and what to do; empty where one does."""
        return self.base.kind.no_weight or (self.positions.NO_WEIGHT if self.positions else "")

    def key(self, tensor: str) -> str:
        """The key of one of its tensors in a file: `<path>.lora_A`, whatever the adapter's name."""
        return file_key(self.path, numbered(tensor, self.number))

    def attribute(self, tensor: str) -> str:
        """The name of a tensor on the layer: `lora_A`, or `lora_A__fr` of adapter fr."""
        if self.prefix:  # `lora_gate_up_proj_A` of a bare parameter: a module may have several
            tensor = f"lora_{self.prefix}_{tensor.removeprefix('lora_')}"
        return numbered(tensor, self.number) + self.state.suffix

    def tensor(self, name: str) -> Tensor:
        """One of its tensors, as it lies on the layer."""
        return cast(Tensor, getattr(self.module, self.attribute(name)))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.tensor(name)) for name in self.specs)

    def add(self) -> None:
        """Remember the adapter at its layer."""
        before = sites_of(self.module).get(self.slot)
        self.ran = self.ran or (before is not None and before.ran)
        _insert_in_order(self.module.__dict__.setdefault(SITES, {}), self.slot, self)

    def drop(self) -> None:
        """Forget it there; the last one leaves no trace. That the layer has been called stays known of it."""
        sites = sites_of(self.module)
        del sites[self.slot]
        if self.ran and (other := next((s for s in sites.values() if s.prefix == self.prefix), None)):
            other.ran = True
        if not sites:
            del self.module.__dict__[SITES]

    def __post_init__(self) -> None:
        self.prefix = self.base.kind.prefix  # a field: a call asks for it
        self.set_number(self.number)

    def set_number(self, number: int) -> None:
        self.number = number
        self.is_named = bool(self.prefix) or number > 1  # have its tensors other names on the layer than their own?

    def __getstate__(self) -> dict[str, Any]:
        specs = {name: replace(spec, init="zeros") for name, spec in self.specs.items()}  # functions may not pickle
        return self.__dict__ | {"memo": {}, "specs": specs}

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
        guard_hooks()  # no attach may have run in this process


class BaseChange:
    """The changes of one attach beside the adapted layers: parameters are frozen, layouts of 4-bit layers kept.

    It knows objects, not paths: what has replaced one since is not ours to change, and a wrapper that was put in since
    hides nothing.
    """

    def __init__(self, frozen: Iterable[nn.Parameter], kept_layout: Iterable[nn.Module]) -> None:
        # Weak, or the whole parameters that fully_shard has replaced would stay in memory: the base twice.
        self._frozen = [weakref.ref(parameter) for parameter in frozen]
        self._kept_layout = [weakref.ref(layer) for layer in kept_layout]

    def __reduce__(self) -> Any:
        return BaseChange, (_alive(self._frozen), _alive(self._kept_layout))

    def make(self) -> None:
        for parameter in _alive(self._frozen):
            parameter.requires_grad_(False)
        for layer in _alive(self._kept_layout):
            keep_layout(layer, True)  # repacked, it would pass no gradient to the adapters below it

    def undo(self) -> None:
        """Nothing here may raise: a detach is done whole."""
        for parameter in _alive(self._frozen):
            # Its .data may hold codes by now, which can't require gradients.
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        for layer in _alive(self._kept_layout):
            keep_layout(layer, False)


@dataclass(eq=False)
class Session:
    """The adapters on a model, and what their attaches changed; the last detach undoes it."""

    adapters: dict[str, AdapterState] = field(default_factory=dict)
    changes: list[BaseChange] = field(default_factory=list)
    merged: list[Swap] = field(default_factory=list)  # what unmerge puts back
    memo: dict[bytes, Tensor] = field(default_factory=dict)  # results of the base, by a hash of their inputs
    batch: Batch | None = None  # the block of rows that the model is in

    def add(self, state: AdapterState) -> None:
        _insert_in_order(self.adapters, state.name, state)

    def keep_at(self, root: nn.Module) -> None:
        """Store the record on the model while it has adapters, and take it off after the last."""
        if self.adapters:
            root.__dict__[SESSION] = self
        else:
            root.__dict__.pop(SESSION, None)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"memo": {}, "batch": None}  # a copy's base may change


def number_sites(methods: Iterable[Method]) -> None:
    """Tell the sites of one adapter which of its methods they are of at their weight: the first there, the second."""
    counts: Counter[tuple[int, str]] = Counter()
    for site in (site for method in methods for site in method.sites):
        counts[id(site.module), site.prefix] += 1
        site.set_number(counts[id(site.module), site.prefix])


def sites_of(module: nn.Module) -> dict[str, Site]:
    """The adapters at one layer, in the order attached; an empty dict that isn't kept if there is none."""
    return cast(dict[str, Site], module.__dict__.get(SITES, {}))


def _insert_in_order(known: dict[str, Known], name: str, value: Known) -> None:
    """Put what is known of an adapter in the place that it had; a new one's after the others, but before those that
    aren't first if it is."""
    later = {}  # what has to come after it: a dict keeps the order in which keys came
    if value.is_first and name not in known:
        later = {other: known.pop(other) for other in list(known) if not known[other].is_first}
    known.update({name: value, **later})


def sites_at(base: BaseLayer) -> list[Site]:
    """The adapters at one weight, in the order attached; a module may hold several."""
    return [site for site in sites_of(base.module).values() if site.prefix == base.kind.prefix]


def session_of(model: nn.Module) -> tuple[nn.Module, Session]:
    """The module that adapters were attached to, and its record; a new one if there is none."""
    modules = dict(model.named_modules())  # so a wrapper (DDP, compile) is looked through
    roots = {path: module for path, module in modules.items() if SESSION in module.__dict__}
    if len(roots) > 1:
        raise TargetError(
            f"adapters were attached to several parts of this {type(model).__name__}: {', '.join(roots)}\n"
            f"  call this for each part by itself"
        )
    for root in roots.values():  # the only one
        return root, session_at(root)
    if any(map(sites_of, modules.values())):
        raise TargetError(
            f"this {type(model).__name__} is a part of a model that adapters were attached to\n"
            f"  give the whole model, the one that attach was given"
        )
    return getattr(model, "_orig_mod", model), Session()


def session_at(root: nn.Module) -> Session:
    """The record on the module itself, a root that `session_of` or `attachable` gave; a new one if there is none."""
    return cast(Session, root.__dict__.get(SESSION) or Session())


def not_attached(name: str, model: nn.Module) -> str:
    attached = ", ".join(session_of(model)[1].adapters) or "none"
    return f"no adapter {name!r} on this {type(model).__name__}\n  attached: {attached}; attach or load it first"


def check_unmerged(session: Session, action: str) -> None:
    """TargetError while adapters are merged: their effect is in the weights, so nothing would change it. And where each
    row has its own, or graphs read their tensors."""
    if any(state.in_place for state in session.adapters.values()):
        raise within_capturable(action)
    if session.batch is not None:
        raise TargetError(f"can't {action}: each row has its own adapter or scale\n  leave the block of `rows` first")
    if merged := [name for name, state in session.adapters.items() if state.merged]:
        raise TargetError(
            f"can't {action}: {', '.join(merged)} {'is' if len(merged) == 1 else 'are'} merged into the weights\n"
            f"  lora_lite.unmerge(model) first"
        )


def within_capturable(action: str) -> TargetError:
    """The error for what would leave captured graphs with the tensors, or the numbers, of before."""
    return TargetError(
        f"can't {action} within `capturable`: a captured graph would go on with what was\n  leave the block first"
    )


def _alive(references: list[weakref.ref[T]]) -> list[T]:
    return [value for reference in references if (value := reference()) is not None]
