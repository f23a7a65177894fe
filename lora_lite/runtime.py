"""Attach, detach, and the two hooks.

The hooks are functions of this module bound to an adapter's name. They read everything from the
module that they fire on, so deepcopy, pickle, torch.compile, FSDP2's parameter swapping and
functional_call need nothing of their own here.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DataParallel, DistributedDataParallel

from . import quant
from .adapter import (
    Adapter,
    Session,
    drop_slot,
    file_key,
    get_adapter,
    has_session,
    keep_session,
    keep_slot,
    session_of,
    slots_of,
)
from .config import BaseConfig
from .errors import ConfigError, QuantizedWeightError, TargetError, VariantError
from .layer import AdapterState, Layer, Slot
from .targets import Target, find_targets
from .variant import ParamSpec, Variant, lookup

Values = Callable[[str, ParamSpec, torch.dtype, torch.device], Tensor]
"""(key, spec, dtype, device) -> the first values of one tensor."""


def attach(model: nn.Module, cfg: BaseConfig, name: str = "default", calibration_data: Any = None) -> Adapter:
    """Put a fresh adapter on the model's target layers, in place, and freeze the base.

    The adapter's tensors become parameters and buffers of the layers, named `lora_*`, or `lora_*__<name>` for a
    name other than "default". Several adapters stack; they apply in the order attached, and the `forward` of each
    sees the x that the layer itself saw. `calibration_data` goes to the variant's `group_init`.

    Raises ConfigError, VariantError, TargetError, QuantizedWeightError or BaseModelError, and whatever a variant's
    own code raises; the model is then exactly as it was.
    """
    variant, root = checked_variant(cfg), attachable(model)
    if variant.needs_calibration and calibration_data is None:
        raise ConfigError(f"variant {cfg.variant!r} is computed from data: use attach(..., calibration_data=...)")
    if calibration_data is not None and variant.group_init is Variant.group_init:
        raise ConfigError(f"variant {cfg.variant!r} takes no calibration_data")
    with installed(root, cfg, name, find_targets(root, cfg), _fresh) as adapter, torch.no_grad():
        views = {slot.path: Layer(module, slot) for module, slot in adapter.slots()}
        for view in views.values():
            variant.init(view, cfg)
        variant.group_init(root, views, cfg, calibration_data)
    logger.info(f"attached {adapter}")
    for path, (d_in, d_out) in adapter.targets.items():
        logger.trace(f"attached {name!r} at {path} ({d_in} -> {d_out})")
    return adapter


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off, or all: outputs, state_dict keys, hooks and requires_grad are as before attach.

    Raises TargetError for an unknown name, or where fully_shard manages the parameters.
    """
    root, session = session_of(model)
    names = list(session.adapters) if name is None else [get_adapter(model, name).name]
    for each in names:
        if Adapter(root, each).is_sharded:
            raise TargetError(
                f"adapter {each!r} is sharded by fully_shard, which keeps a hold of its own on the parameters\n"
                f"  use lora_lite.disabled(model), or load the base again"
            )
    for each in names:
        for module, _ in list(Adapter(root, each).slots()):
            _uninstall(module, each)
        if list(session.adapters) == [each]:
            _give_back(root, session, session.frozen, session.kept_layout)
        _forget(root, session, each)
    logger.info(f"detached {', '.join(names) or 'nothing'} from {type(root).__name__}")


@contextmanager
def installed(root: nn.Module, cfg: BaseConfig, name: str, targets: list[Target], values: Values) -> Iterator[Adapter]:
    """The transaction under attach and load: an adapter on the model, taken off again if the block raises."""
    variant = checked_variant(cfg)
    _, session = session_of(root)
    modules = dict(root.named_modules())
    _check_name(name, session, root)
    specs = {target.path: checked_specs(variant, target, cfg) for target in targets}
    for target in targets:
        _check_target(target, modules[target.path], variant, session)
        _check_free(target.path, modules[target.path], specs[target.path], name)
    repackable = quant.repackable(root)
    state = AdapterState(name, cfg, quant.base_record(root, {target.path: modules[target.path] for target in targets}))
    adapted = {id(p) for other in session.adapters for p in Adapter(root, other).parameters()}
    base = {path: p for path, p in root.named_parameters() if p.requires_grad and id(p) not in adapted}

    with ExitStack() as undo:
        undo.callback(_forget, root, session, name)
        session.adapters[name] = state
        keep_session(root, session)
        undo.callback(_give_back, root, session, list(base), list(repackable))
        session.frozen.extend(base)
        session.kept_layout.extend(repackable)
        for layer in repackable.values():
            quant.keep_layout(layer, True)
        for parameter in base.values():
            parameter.requires_grad_(False)
        for target in targets:
            undo.callback(_uninstall, modules[target.path], name)
            _install(modules[target.path], target, specs[target.path], state, values)
        yield Adapter(root, name)
        undo.pop_all()


def _install(
    module: quant.Linear, target: Target, specs: Mapping[str, ParamSpec], state: AdapterState, values: Values
) -> None:
    variant = lookup(state.cfg.variant)
    slot = Slot(state, target.path, target.d_in, target.d_out, variant.base_weight)
    keep_slot(module, slot)
    for name, spec in specs.items():
        value = values(file_key(target.path, name), spec, state.cfg.dtype, module.weight.device)
        if spec.trainable:
            module.register_parameter(state.attribute(name), nn.Parameter(value))
        else:
            module.register_buffer(state.attribute(name), value)
        slot.tensors[name] = spec.keep_dtype
    if variant.forward_input is not None:
        hook = partial(_input_hook, state.name)
        slot.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    if variant.forward is not None:
        slot.handles.append(module.register_forward_hook(partial(_output_hook, state.name), with_kwargs=True))


def _uninstall(module: nn.Module, name: str) -> None:
    """Take one adapter off one layer, however far its installation got."""
    slot = drop_slot(module, name)
    if slot is None:
        return
    for handle in slot.handles:
        handle.remove()
    for tensor in slot.tensors:
        delattr(module, slot.state.attribute(tensor))


def _give_back(root: nn.Module, session: Session, frozen: list[str], kept_layout: list[str]) -> None:
    """Undo what attach changed on the base."""
    for path in frozen:
        root.get_parameter(path).requires_grad_(True)
    for path in kept_layout:
        quant.keep_layout(root.get_submodule(path), False)
    session.frozen = [path for path in session.frozen if path not in frozen]
    session.kept_layout = [path for path in session.kept_layout if path not in kept_layout]


def _forget(root: nn.Module, session: Session, name: str) -> None:
    """Take an adapter out of the record, and the record off the model after the last."""
    del session.adapters[name]
    keep_session(root, session)


def _fresh(key: str, spec: ParamSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
    value = torch.empty(spec.shape, dtype=dtype, device=device)
    spec.fill(value)
    return value


# ---- the two hooks ------------------------------------------------------------------------------


def _output_hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Any:
    slot = slots_of(module)[name]
    c = slot.state.scale
    if c == 0:
        return None
    variant = lookup(slot.state.cfg.variant)
    x = _argument(args, kwargs)
    new = variant.forward(Layer(module, slot, y.dtype), x.to(y.dtype), y)  # type: ignore[misc]
    return new if c == 1 or variant.handles_scale else y + c * (new - y)


def _input_hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    slot = slots_of(module)[name]
    c = slot.state.scale
    if c == 0:
        return None
    variant = lookup(slot.state.cfg.variant)
    x = _argument(args, kwargs)
    new = variant.forward_input(Layer(module, slot, x.dtype), x)  # type: ignore[misc]
    new = new if c == 1 or variant.handles_scale else x + c * (new - x)
    return ((new, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): new})


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A linear layer's one argument, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


# ---- checks, all before anything changes --------------------------------------------------------


def attachable(model: nn.Module) -> nn.Module:
    """The module that adapters go on: the model itself, or what torch.compile has wrapped. Raises TargetError."""
    root: nn.Module = getattr(model, "_orig_mod", model)
    for path, module in model.named_modules():
        if isinstance(module, DistributedDataParallel | DataParallel):
            raise TargetError(
                f"{type(module).__name__} has registered the parameters already, and would never reduce the "
                f"gradients of new ones\n  attach first, then wrap"
            )
        if module is not root and has_session(module):
            raise TargetError(
                f"{path}: adapters were attached to this part alone\n  attach to the same module each time"
            )
    return root


def checked_variant(cfg: BaseConfig) -> Variant:
    """The config's variant. Raises VariantError if there is none, ConfigError if this isn't its config class."""
    variant = lookup(cfg.variant)
    if type(cfg) is not variant.config:
        raise ConfigError(
            f"variant {cfg.variant!r} is configured by {variant.config.__name__}, got {type(cfg).__name__}\n"
            f"  use lora_lite.config_for({cfg.variant!r})(...)"
        )
    return variant


def checked_specs(variant: Variant, target: Target, cfg: BaseConfig) -> dict[str, ParamSpec]:
    """The variant's tensors at a layer. Raises ConfigError with the layer's path, or VariantError for a bad name."""
    try:
        specs = variant.param_specs(target.d_in, target.d_out, cfg)
    except ConfigError as error:
        raise ConfigError(f"{target.path}: {error}") from error
    wrong = [name for name in specs if not re.fullmatch(r"lora_[A-Za-z0-9]+(_[A-Za-z0-9]+)*", name)]
    if wrong or not specs:
        raise VariantError(
            f"variant {variant.name!r}: param_specs gave {list(specs)}; wanted one name or more, each like lora_xyz"
        )
    return specs


def _check_name(name: str, session: Session, root: nn.Module) -> None:
    if not re.fullmatch(r"[A-Za-z0-9]+([_-][A-Za-z0-9]+)*", name):
        raise ConfigError(
            f"adapter name {name!r}: it becomes part of parameter names\n"
            f"  use letters and digits, with single '_' or '-' between them"
        )
    if name in session.adapters:
        raise TargetError(
            f"adapter {name!r} is attached to this {type(root).__name__} already\n"
            f"  give the new one another name, detach the old one, or lora_lite.restore a file's values into it"
        )


def _check_target(target: Target, module: quant.Linear, variant: Variant, session: Session) -> None:
    path, kind = target.path, quant.kind_of(module)
    if module.weight.is_meta:
        raise TargetError(f"{path}: its weight is on the meta device\n  load the model's weights before attach")
    if quant.is_sharded(module.weight):
        raise TargetError(f"{path}: fully_shard has sharded its weight already\n  attach first, then fully_shard")
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise TargetError(
            f"{path}: nn.MultiheadAttention reads this weight without calling the layer, so no adapter on it would "
            f"ever run\n  leave it out with exclude_names"
        )
    if kind is quant.Kind.UNKNOWN and variant.base_weight != "unused":
        raise QuantizedWeightError(
            f"{path}: {variant.name!r} reads the weight, and this one is {target.kind}\n"
            f"  use a dense or bitsandbytes base, or a variant that never reads it, such as lora"
        )
    if kind is not quant.Kind.DENSE and variant.base_weight == "dense":
        raise QuantizedWeightError(
            f"{path}: {variant.name!r} needs a dense weight, and this one is {target.kind}\n"
            f"  load the base without quantization, or use a variant that works on any base, such as lora"
        )
    foreign = [slot.state.name for slot in slots_of(module).values() if slot.state not in session.adapters.values()]
    if foreign:
        raise TargetError(
            f"{path}: adapters {foreign} were attached to a module around this one\n"
            f"  attach to the same module each time"
        )


def _check_free(path: str, module: nn.Module, specs: Mapping[str, ParamSpec], name: str) -> None:
    taken = [
        attribute for attribute in map(AdapterState(name, None, {}).attribute, specs) if hasattr(module, attribute)
    ]
    if taken:
        raise TargetError(
            f"{path}: it has {', '.join(taken)} already, put there by something else\n"
            f"  take that off first, or attach under another name"
        )
