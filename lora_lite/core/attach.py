"""Attach, detach, and the hooks.

The hooks are functions of this module bound to an adapter's name. They read everything from the
module that they fire on, so deepcopy, pickle, torch.compile, FSDP2's parameter swapping and
functional_call need nothing of their own here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from ..base import experts, fingerprint, probe, quant
from ..errors import ConfigError, TargetError
from .adapter import Adapter, get_adapter, scaled
from .config import BaseConfig
from .hooks import register_hooks
from .layer import AdapterState, Slot
from .names import file_key
from .plan import (
    Changes,
    attachable,
    changes_at,
    check_free,
    check_name,
    check_ready,
    checked_config,
    checked_specs,
    configs_at,
    is_stacked,
    layers_at,
)
from .session import (
    BaseChange,
    Session,
    check_unmerged,
    drop_slot,
    keep_session,
    keep_slot,
    leads,
    put,
    session_at,
    session_of,
    slots_of,
)
from .targets import Target, select
from .variant import ParamSpec, check_takes_data, lookup, needs_data, weight_use

Values = Callable[[str, ParamSpec, torch.dtype, torch.device], Tensor]
"""(key, spec, dtype, device) -> the first values of one tensor."""


def attach(model: nn.Module, cfg: BaseConfig, name: str = "default", calibration_data: Any = None) -> Adapter:
    """Put a fresh adapter on the model's target layers, in place, and freeze the base.

    The adapter's tensors become parameters and buffers of the layers, named `lora_*`, or `lora_*__<name>` for a
    name other than "default". Several adapters stack; they apply in the order attached, and the `forward` of each
    sees the x that the layer itself saw. `calibration_data` goes to the variant's `group_init`.

    Raises ConfigError, VariantError, TargetError, QuantizedWeightError or BaseModelError, and whatever a variant's
    own code raises; the model is then exactly as it was. Give the whole model: 4-bit layers outside the part that is
    given stay free to repack (lora_lite/quant.py).
    """
    variant, root = lookup(checked_config(cfg).variant), attachable(model)
    if needs_data(cfg) and calibration_data is None:
        raise ConfigError(f"variant {cfg.variant!r} is computed from data: use attach(..., calibration_data=...)")
    if calibration_data is not None:
        check_takes_data(cfg)
    targets, _, asked = select(root, cfg)
    changes = changes_at(cfg, targets)
    with installed(root, cfg, name, targets, changes, _fresh, asked=asked) as adapter, torch.no_grad():
        if next(adapter.parameters(), None) is not None:
            probe.check_gradients(root, layers_at(root, targets))
        views = adapter.views()
        for view in views.values():
            variant.init(view, view.cfg)
        with scaled(root, 0.0, name):
            variant.group_init(root, views, cfg, calibration_data)
        variant.refresh(views, cfg)
    logger.info(f"attached {adapter}: {adapter.counts()}")
    for path, (d_in, d_out) in adapter.targets.items():
        logger.trace(f"attached {name!r} at {path} ({d_in} -> {d_out})")
    return adapter


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off, or all: outputs, state_dict keys, hooks and requires_grad are as before attach.

    Raises TargetError for an unknown name, or where fully_shard or ZeRO-3 manages the parameters.
    """
    root, session = session_of(model)
    check_unmerged(session, "detach")
    names = list(session.adapters) if name is None else [get_adapter(model, name).name]
    for each in names:
        if Adapter(root, each).is_sharded:
            raise TargetError(
                f"adapter {each!r} is sharded by fully_shard or ZeRO-3, which keep a hold of the parameters\n"
                f"  use lora_lite.disabled(model), or load the base again"
            )
    for module, slot in [pair for each in names for pair in Adapter(root, each).slots()]:
        uninstall(module, slot.state.name)
    if len(names) == len(session.adapters):
        for change in list(session.changes):
            _undo(session, change)
    for each in names:
        _forget(root, session, each)
    logger.info(f"detached {', '.join(names) or 'nothing'} from {type(root).__name__}")


@contextmanager
def installed(
    root: nn.Module,
    cfg: BaseConfig,
    name: str,
    targets: list[Target],
    changes: Changes,
    values: Values,
    scale: float = 1.0,
    asked: bool = False,
) -> Iterator[Adapter]:
    """The transaction under attach and load: an adapter on the model, taken off again if the block raises.

    `root` is what `attachable` gave. `changes` are the fields of its config that differ by layer; the regexes of
    `per_layer` are not run here. `asked`: it is known already that the targets are linear layers.
    """
    configs = configs_at(cfg, targets, changes)
    layers, session = layers_at(root, targets), session_at(root)
    specs = checked_specs(targets, layers, configs, asked)
    check_ready(layers)
    check_name(name, session, type(root).__name__)
    check_free(name, layers, specs)
    check_unmerged(session, "attach another adapter")
    repackable = quant.repackable(root)
    state = AdapterState(name, cfg, targets, fingerprint.base_record(root, layers), scale, per_layer=changes)
    adapted = {id(p) for other in session.adapters for p in Adapter(root, other).parameters()}
    change = BaseChange((p for p in root.parameters() if p.requires_grad and id(p) not in adapted), repackable.values())

    with torch.inference_mode(False), ExitStack() as undo:  # tensors of inference mode could never be trained
        undo.callback(_forget, root, session, name)
        put(session.adapters, name, state)
        keep_session(root, session)
        session.changes.append(change)
        undo.callback(_undo, session, change)
        change.make()
        for target in targets:
            undo.callback(uninstall, layers[target.path], name)
            _install(layers[target.path], _slot(state, target, configs), specs[target.path], values)
        yield Adapter(root, name)
        undo.pop_all()


@contextmanager
def remade(
    root: nn.Module, cfg: BaseConfig, name: str, targets: list[Target], changes: Changes, values: Values
) -> Iterator[Adapter]:
    """As `installed`, of an adapter that is attached: it gets this config, these targets and new tensors at its place
    in the order, and keeps its scale. As it was again if the block raises. `root` is what `attachable` gave."""
    configs = configs_at(cfg, targets, changes)
    layers, session = layers_at(root, targets), session_at(root)
    specs = checked_specs(targets, layers, configs)
    check_ready(layers)
    check_unmerged(session, f"change {name!r}")
    before = session.adapters[name]
    check_free(name, layers, {path: at for path, at in specs.items() if name not in slots_of(layers[path])})
    state = AdapterState(name, cfg, targets, fingerprint.base_record(root, layers), before.scale, per_layer=changes)

    with torch.inference_mode(False), ExitStack() as undo:
        undo.callback(put, session.adapters, name, before)
        put(session.adapters, name, state)
        for target in targets:
            layer, slot = layers[target.path], _slot(state, target, configs)
            held = slots_of(layer).get(name)
            if held is None:
                undo.callback(uninstall, layer, name)
                _install(layer, slot, specs[target.path], values)
            else:
                undo.callback(_exchange, layer, held, {each: _tensor(layer, held, each) for each in held.tensors})
                made = {each: _value(layer, slot, each, spec, values) for each, spec in specs[target.path].items()}
                slot.tensors = {each: spec.keep_dtype for each, spec in specs[target.path].items()}
                _exchange(layer, slot, made)
                state.layers.append(layer)
        yield Adapter(root, name)
        undo.pop_all()
    for layer in before.layers:
        if layer not in state.layers:
            uninstall(layer, name)


def _slot(state: AdapterState, target: Target, configs: Mapping[str, BaseConfig]) -> Slot:
    cfg = configs[target.path]
    return Slot(state, target, cfg, weight_use(cfg), is_stacked(target, cfg))


def _install(module: quant.Linear, slot: Slot, specs: Mapping[str, ParamSpec], values: Values) -> None:
    keep_slot(module, slot)
    slot.state.layers.append(module)
    for name, spec in specs.items():
        _hold(module, slot, name, _value(module, slot, name, spec, values))
        slot.tensors[name] = spec.keep_dtype
    leading = [each for each in slots_of(module).values() if leads(each)]
    for each in reversed(leading) if slot in leading else [slot]:
        register_hooks(module, each)


def _value(module: quant.Linear, slot: Slot, name: str, spec: ParamSpec, values: Values) -> Tensor:
    value = values(file_key(slot.path, name), spec, slot.cfg.dtype, quant.stored(module).device)
    return nn.Parameter(value) if spec.trainable else value


def _hold(module: nn.Module, slot: Slot, name: str, value: Tensor) -> None:
    if isinstance(value, nn.Parameter):
        module.register_parameter(slot.state.attribute(name), value)
    else:
        module.register_buffer(slot.state.attribute(name), value)


def _tensor(module: nn.Module, slot: Slot, name: str) -> Tensor:
    tensor: Tensor = getattr(module, slot.state.attribute(name))
    return tensor


def _exchange(module: nn.Module, slot: Slot, tensors: Mapping[str, Tensor]) -> None:
    """This slot with these tensors in the place of the adapter's slot that is there, under the same hooks."""
    there = slots_of(module)[slot.state.name]
    slot.handles = there.handles
    keep_slot(module, slot)
    _drop_tensors(module, there)
    for name, tensor in tensors.items():
        _hold(module, slot, name, tensor)


def _drop_tensors(module: nn.Module, slot: Slot) -> None:
    for tensor in slot.tensors:
        with suppress(AttributeError):  # another library's doing, such as a parametrization
            delattr(module, slot.state.attribute(tensor))


def uninstall(module: nn.Module, name: str) -> None:
    """Take one adapter off one layer, however far its installation got."""
    slot = drop_slot(module, name)
    if slot is None:
        return
    for handle in slot.handles:
        handle.remove()
    experts.unshadow(module)
    _drop_tensors(module, slot)


def _undo(session: Session, change: BaseChange) -> None:
    change.undo()
    session.changes.remove(change)


def _forget(root: nn.Module, session: Session, name: str) -> None:
    """Take an adapter out of the record, and the record off the model after the last."""
    del session.adapters[name]
    keep_session(root, session)


def _fresh(key: str, spec: ParamSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
    value = torch.empty(spec.shape, dtype=dtype, device=device)
    spec.fill(value)
    return value


# ---- the hooks ----------------------------------------------------------------------------------
