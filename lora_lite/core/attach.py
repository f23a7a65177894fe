"""Attach and detach: the transaction that puts an adapter's tensors and hooks on the layers of a model."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from ..base.bitsandbytes import repackable
from ..base.fingerprint import base_record
from ..base.probe import check_gradients
from ..errors import CheckpointError, ConfigError, TargetError, VariantError
from .adapted_weight import take_back
from .adapter import Adapter, adapters, get_adapter
from .config import BaseConfig
from .graphs import forget_graphs
from .hooks import register_hooks
from .names import SITES, TIES
from .positions import watch
from .resolve import attachable, check_free, check_name, check_weights_present, checked_configs, resolve
from .room import empty_room, with_room
from .scaled import check_in_use, scaled
from .shared import Shared
from .split import check_tokens_are_whole, share_whole
from .state import (
    AdapterState,
    BaseChange,
    Method,
    Session,
    Site,
    Tensors,
    check_unmerged,
    number_sites,
    session_at,
    session_of,
    sites_of,
)
from .targets import select
from .ties import tie
from .variant import ParamSpec, Variant, check_takes_data, lookup, needs_data

MOST_REMADE = 1 << 28  # numbers of a tensor that a file leaves out: 1 GiB, where VeRA of rank 1024 takes 0.1


def attach(
    model: nn.Module,
    cfg: BaseConfig | Sequence[BaseConfig],
    name: str = "default",
    calibration_data: Any = None,
    max_rank: int | None = None,
) -> Adapter:
    """Put a fresh adapter on the model's target layers, in place, and freeze the base.

    The adapter's tensors become parameters and buffers of the layers, named `lora_*`, or `lora_*__<name>` for a
    name other than "default". Several adapters stack; they apply in the order attached, and the `forward` of each
    sees the x that the layer itself saw. `calibration_data` goes to the variant's `group_init`. Give the whole model:
    4-bit layers outside the part that is given stay free to repack (lora_lite/base/bitsandbytes.py).

    cfg     a config, or a list of them: one adapter of several methods, with one name, file and scale. Each config has
            its own targets; two on one layer act in the list's order
    max_rank    of a LoRA: room for others up to this rank, which lora_lite.load(..., replace=True) puts in its place
                without a new graph. Its tensors are of that rank, with zeros beyond `cfg.r` that stay zeros in training

    Raises:
        ConfigError, VariantError: for a config, name or data that the method can't take.
        TargetError, QuantizedWeightError, BaseModelError: for a model or a layer that can't carry the adapter.
        After these, and after whatever a variant's own code raises, the model is exactly as it was.
    """
    configs, root = checked_configs(cfg), attachable(model)
    if max_rank is not None:
        if len(configs) > 1:
            raise ConfigError(f"max_rank={max_rank!r} is for one LoRA, and these are {len(configs)} methods")
        rank, configs = getattr(configs[0], "r", 0), [with_room(configs[0], max_rank)]
    _check_data(configs, calibration_data)
    selections = [select(root, config) for config in configs]
    methods = [
        Method(config, resolve(selection, config)) for selection, config in zip(selections, configs, strict=True)
    ]
    with installed(root, methods, name) as adapter, torch.no_grad():
        if not all(selection.all_plain for selection in selections) and next(adapter.parameters(), None) is not None:
            check_gradients(root, adapter.targets)  # a layer that rounds may pass none, or wrong ones
        for method in methods:
            _fill(root, adapter, method, calibration_data)
        if max_rank is not None:
            empty_room(adapter, rank)
            methods[0].sites[0].state.max_rank = max_rank
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            share_whole(root, (tensor for _, tensor in adapter.named_tensors()))
    logger.info(f"attached {adapter}: {adapter.counts()}")
    logger.trace("attached {!r} at {}", name, adapter.targets)
    return adapter


def _check_data(configs: Sequence[BaseConfig], calibration_data: Any) -> None:
    """ConfigError for data that is missing, or that no method would look at."""
    for cfg in configs if calibration_data is None else ():
        if needs_data(cfg):
            raise ConfigError(f"variant {cfg.variant!r} is computed from data: use attach(..., calibration_data=...)")
    if calibration_data is not None and not any(map(needs_data, configs)):
        for cfg in configs:
            check_takes_data(cfg)


def _fill(root: nn.Module, adapter: Adapter, method: Method, calibration_data: Any) -> None:
    """The values that a method's tensors start at, where its ParamSpecs don't say them."""
    variant, views = lookup(method.cfg.variant), adapter.views(method)
    for view in views.values():
        variant.init(view, view.cfg)  # all layers have theirs before group_init, which sees them together
    if variant.group_init is not Variant.group_init:
        with scaled(root, 0.0, adapter.name):  # the model runs without the adapter
            variant.group_init(root, views, method.cfg, calibration_data)
        method.sites[0].state.changes = None  # no graph of a new adapter can be pending
    variant.refresh(views, method.cfg)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off, or all: outputs, state_dict keys, hooks and requires_grad are as before attach.

    Raises:
        TargetError: for an unknown name, or where fully_shard or ZeRO-3 manages the parameters.
    """
    root, session = session_of(model)
    check_unmerged(session, "detach")
    leaving = list(adapters(root).values()) if name is None else [get_adapter(model, name)]
    # Before anything changes.
    # Of tensor parallelism, each process has its own parts.
    if sharded := [each for each in leaving if each.is_sharded and each.sharded_by != "tensor parallelism"]:
        problem = f"adapter {sharded[0].name!r} is sharded by {sharded[0].sharded_by}"
        raise TargetError(
            f"{problem}, which keeps a hold of the parameters\n  use lora_lite.disabled(model), or load the base again"
        )
    for site in [site for adapter in leaving for site in adapter.sites()]:
        uninstall(site.module, site.slot)
    if len(leaving) == len(session.adapters):  # the base is read-only until the last one goes
        for change in list(session.changes):
            _undo(session, change)
    for adapter in leaving:
        _forget(root, session, adapter.name)
    logger.info(f"detached {', '.join(each.name for each in leaving) or 'nothing'} from {type(root).__name__}")


@contextmanager
def installed(
    root: nn.Module,
    methods: list[Method],
    name: str,
    tensors: Tensors | None = None,
    scale: float = 1.0,
    steps: int | None = None,
    freeze: bool = True,
    owned: bool = False,
) -> Iterator[Adapter]:
    """The transaction under attach and load: an adapter on the model, taken off again if the block raises.

    root        what `attachable` gave
    tensors     the values by their keys in a file; without them, each starts as its ParamSpec says
    steps       of the training that the tensors come from, None if the file doesn't say
    freeze      freeze the base, which the adapter whose place this one takes has done already
    owned       nobody else holds `tensors`, nor a part of their memory: the adapter takes them without a copy
    """
    session, state = session_at(root), _state(root, methods, name, scale, 0 if tensors is None else steps)
    check_name(name, session, type(root).__name__)
    check_free(state.sites)
    check_unmerged(session, "attach another adapter")
    # Not of targets alone: gradients pass the others too.
    change = BaseChange(_trainable(root, session), repackable(root)) if freeze else BaseChange((), ())

    with torch.inference_mode(False), ExitStack() as undo:  # tensors of inference mode could never be trained
        undo.callback(_forget, root, session, name)
        session.add(state)
        session.keep_at(root)
        if freeze:
            session.changes.append(change)
            undo.callback(_undo, session, change)
            change.make()
        # Each undo is noted before its step, so that a failure within the step is undone as well.
        for site in state.sites:
            undo.callback(uninstall, site.module, site.slot)
            _install(site, tensors, owned)
        for method in methods:
            if specs := lookup(method.cfg.variant).shared_specs([site.target for site in method.sites], method.cfg):
                _install_shared(root, state, method, specs, tensors)
            if lookup(method.cfg.variant).positions(method.cfg) is not None:
                watch(root, method.sites)
        forget_graphs()
        yield Adapter(root, name)
        undo.pop_all()


def _trainable(root: nn.Module, session: Session) -> Iterator[nn.Parameter]:
    """The parameters that want a gradient, but for those of adapters.

    Those are told by their names: with many adapters, a look at each site and tensor takes longer than all else.
    """
    ours = set().union(*(state.names for state in session.adapters.values()))
    for module in root.modules():
        if not isinstance(module, Shared):
            names = ours if SITES in module.__dict__ else ()
            parameters = (p for name, p in module._parameters.items() if name not in names)
            yield from (p for p in parameters if p is not None and p.requires_grad)


@contextmanager
def reinstalled(root: nn.Module, methods: list[Method], name: str, tensors: Tensors) -> Iterator[Adapter]:
    """The transaction that gives an attached adapter these methods, layers and new tensors; it keeps its scale and its
    place in the order. `root` is what `attachable` gave."""
    session = session_at(root)
    before = session.adapters[name]
    check_in_use([before])
    state = _state(root, methods, name, before.scale)
    check_unmerged(session, f"change {name!r}")
    check_free(state.sites, exchanged=before)

    with torch.inference_mode(False), ExitStack() as undo:
        undo.callback(session.add, before)
        session.add(state)
        for site in state.sites:
            old = sites_of(site.module).get(site.slot)
            if old is None:
                undo.callback(uninstall, site.module, site.slot)
                _install(site, tensors)
            else:
                undo.callback(_exchange, old, dict(old.tensors()))  # the same objects: an optimiser may know them
                device = site.base.stored.device
                values = {t: _value(s, site.key(t), site.cfg, device, tensors) for t, s in site.specs.items()}
                _exchange(site, values)
        forget_graphs()
        yield Adapter(root, name)
        undo.pop_all()
    for place in {(site.module, site.slot) for site in before.sites} - {(s.module, s.slot) for s in state.sites}:
        uninstall(*place)  # only now: nothing after it can fail, so nothing has to put it back


def uninstall(module: nn.Module, slot: str) -> None:
    """Take one adapter off one layer, however far its installation got."""
    site = sites_of(module).get(slot)
    if site is None:
        return
    site.drop()
    for handle in site.handles:
        handle.remove()
    if site.through_weight:
        take_back(site.module, site.base.kind.weight)  # a forward that was interrupted may have left one of ours
        for holder, weight, _ in site.base.ties:
            take_back(holder, weight)
            if holder.__dict__.get(TIES, {}).pop(slot, None) and not holder.__dict__[TIES]:
                del holder.__dict__[TIES]
    _drop_tensors(site)


def _state(root: nn.Module, methods: list[Method], name: str, scale: float, steps: int | None = None) -> AdapterState:
    """The state that new sites share. Raises TargetError for a weight that is not on this machine, or tied."""
    every = [site for method in methods for site in method.sites]
    check_weights_present(every)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        check_tokens_are_whole(root)
    for method in methods:
        if method.cfg.tied_weights != "apart":
            tie(root, method.cfg, method.sites, every)
    # At attach: a later edit or shard can't falsify it.
    base = base_record(root, [site.base for site in every])
    state = AdapterState(name, methods, base, scale, is_first=lookup(methods[0].cfg.variant).leads, steps=steps)
    for method in methods:
        for site in method.sites:
            site.state, site.method = state, method
    number_sites(methods)
    return state


def _install(site: Site, tensors: Tensors | None, owned: bool = False) -> None:
    site.add()
    device = site.base.stored.device
    for name, spec in site.specs.items():
        hold(site, name, _value(spec, site.key(name), site.cfg, device, tensors, site.stacked, owned))
    # Hooks run in the order of registering, so one that is first moves those that were first before it along.
    for other in [s for s in sites_of(site.module).values() if s.is_first][::-1] if site.is_first else [site]:
        register_hooks(other)


def _install_shared(
    root: nn.Module, state: AdapterState, method: Method, specs: Mapping[str, ParamSpec], tensors: Tensors | None
) -> None:
    """The tensors that a method has once become those of a child module of the model."""
    devices, variant = {site.base.stored.device for site in method.sites}, method.cfg.variant
    if len(devices) > 1:
        problem = f"{variant!r} has tensors that all its layers share, and these lie on {len(devices)} devices"
        raise TargetError(f"{problem}\n  load the model onto one, or choose layers on one (target_names, layers)")
    if wrong := [name for name in specs if not _is_free(name, method.sites)]:
        raise VariantError(f"variant {variant!r}: shared_specs gave {wrong[0]!r}; wanted a name like A, of no layer's")
    number = 1 + sum(other.shared is not None for other in state.methods)
    shared = make_shared(specs, method.cfg, tensors, method.sites[0].base.stored.device, number)
    if hasattr(root, place := shared.place + state.suffix):
        raise TargetError(f"this {type(root).__name__} has an attribute {place!r}\n  attach under another name")
    method.shared = shared
    root.add_module(place, shared)


def _is_free(name: str, sites: Sequence[Site]) -> bool:
    """Can a shared tensor have this name: `A`, which no layer's `lora_A` hides, and no attribute of a module?"""
    fits = re.fullmatch(r"[A-Za-z0-9]+(_[A-Za-z0-9]+)*", name) is not None and not name.startswith("lora_")
    return fits and not hasattr(Shared({}), name) and not any(f"lora_{name}" in site.specs for site in sites)


def make_shared(
    specs: Mapping[str, ParamSpec],
    cfg: BaseConfig,
    tensors: Tensors | None,
    device: torch.device | str = "cpu",
    number: int = 1,
) -> Shared:
    """The tensors that an adapter has once, from a file's or as their ParamSpecs say.

    Raises:
        CheckpointError: where a file's metadata would take more memory than an adapter's tensors can need.
    """
    shared = Shared(specs, number)
    for name, spec in specs.items():
        if tensors is not None and shared.key(name) not in tensors and math.prod(spec.shape) > MOST_REMADE:
            raise CheckpointError(
                f"{shared.key(name)} isn't in the file and would be made again, of shape {spec.shape}\n"
                f"  wanted at most {MOST_REMADE:,} numbers: the file may be damaged, or made to take memory"
            )
        shared.hold(name, _value(spec, shared.key(name), cfg, device, tensors))
    return shared


def _value(
    spec: ParamSpec,
    key: str,
    cfg: BaseConfig,
    device: torch.device | str,
    tensors: Tensors | None,
    stacked: bool = False,
    owned: bool = False,
) -> Tensor:
    """The first value of a tensor: from a file, or as its ParamSpec says."""
    if tensors is None or (spec.saved != "always" and key not in tensors):
        value = torch.empty(spec.shape, dtype=spec.dtype or cfg.dtype, device=device)
        for part in value if stacked else [value]:  # each expert's by itself: its size is what the bounds are of
            spec.fill(part)
    else:
        # A tensor that was made within inference mode could never be trained; its copy, made out of it, can.
        value = tensors[key].to(device, copy=not owned or tensors[key].is_inference())
    return nn.Parameter(value) if spec.trainable else value


def hold(site: Site, name: str, value: Tensor) -> None:
    value = value if site.parts is None else site.parts.part(site, name, value)
    is_parameter, attribute = isinstance(value, nn.Parameter), site.attribute(name)
    site.state.names.add(attribute)
    (site.module.register_parameter if is_parameter else site.module.register_buffer)(attribute, value)


def _exchange(site: Site, values: Tensors) -> None:
    """Put a site with these tensors in the place of its adapter's other one at the layer, under the same hooks."""
    before = sites_of(site.module)[site.slot]
    site.handles = before.handles  # a hook finds its site by the adapter's name, so it needs no registering
    site.add()
    _drop_tensors(before)
    for name, value in values.items():
        hold(site, name, value)


def _drop_tensors(site: Site) -> None:
    for tensor in site.specs:
        with suppress(AttributeError):  # another library's doing, such as a parametrization
            delattr(site.module, site.attribute(tensor))


def _undo(session: Session, change: BaseChange) -> None:
    change.undo()
    session.changes.remove(change)


def _forget(root: nn.Module, session: Session, name: str) -> None:
    state = session.adapters.pop(name)
    while state.watches:
        state.watches.pop().remove()
    for shared in (method.shared for method in state.methods if method.shared is not None):
        root._modules.pop(shared.place + state.suffix, None)
    session.keep_at(root)
