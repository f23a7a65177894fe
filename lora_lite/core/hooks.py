"""The hooks: functions of this module bound to an adapter's name.

They read everything from the module that they fire on, so deepcopy, pickle, torch.compile, FSDP2's parameter swapping
and functional_call need nothing of their own here.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, compiler, nn
from torch.compiler import is_dynamo_compiling

from ..base import experts, quant
from ..errors import TargetError
from .layer import Coefficient, Layer, Slot
from .session import SLOTS, slots_of
from .variant import REGISTRY, lookup


def apply_input(layer: Layer, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b i"]:
    """What one adapter makes of the layer's input, at its scale."""
    variant: Any = lookup(layer.cfg.variant)
    if variant.forward_input is None or layer.is_off:
        return x
    new: Tensor = variant.forward_input(layer, x)
    return new if variant.handles_scale or layer.is_whole else x + layer.scale * (new - x)


def apply_output(layer: Layer, x: Float[Tensor, "*b d"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
    """What one adapter makes of the layer's output, at its scale."""
    variant: Any = lookup(layer.cfg.variant)
    if variant.forward is None or layer.is_off:
        return y
    new: Tensor = variant.forward(layer, x, y)
    return new if variant.handles_scale or layer.is_whole else y + layer.scale * (new - y)


def register_hooks(module: quant.Linear, slot: Slot) -> None:
    """Register a slot's hooks, those of an adapter that leads before all others."""
    name, variant, handles = slot.state.name, lookup(slot.cfg.variant), slot.handles
    while handles:
        handles.pop().remove()
    before = partial(module.register_forward_pre_hook, prepend=variant.leads)
    after = partial(module.register_forward_hook, prepend=variant.leads)
    if slot.stacked:
        handles.append(before(partial(_experts_hook, name)))
        handles.append(after(_experts_done, always_call=True))
        return
    if variant.forward_input is not None:
        handles.append(before(partial(_input_hook, name), with_kwargs=True))
    if variant.forward is not None:
        handles.append(after(partial(_output_hook, name), with_kwargs=True))


def _called(module: nn.Module, name: str) -> tuple[Slot, Coefficient | None]:
    """The slot of a layer that is being called, and the scale of this call; None where the adapter does nothing."""
    slot: Slot = module.__dict__[SLOTS][name]
    state = slot.state
    if is_dynamo_compiling() or compiler._is_compiling_flag:  # is_compiling(), without its second call
        now = state.traced
    else:
        slot.ran = True  # a graph can't note it: a mutation inside of a compiled checkpoint breaks the graph
        now = state.outside_of_graphs()
    return slot, None if state.merged or now.is_off else now


def _output_hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
    """`_called` and `apply_output`, in no more calls than it takes: either costs 3 µs of 170 for one token."""
    slot = module.__dict__[SLOTS][name]
    state = slot.state
    if is_dynamo_compiling() or compiler._is_compiling_flag:
        now = state.traced
    else:
        slot.ran = True
        now = state.outside_of_graphs()
    if state.merged or now.is_off:
        return None
    x = args[0] if args else next(iter(kwargs.values()))
    if not isinstance(y, Tensor):
        raise TargetError(
            f"{slot.path}: wanted a tensor from this layer, got {type(y).__name__}\n  leave it out with exclude_names"
        )
    if x.dtype != y.dtype:
        x = x.to(y.dtype)
    variant: Any = REGISTRY.get(slot.cfg.variant) or lookup(slot.cfg.variant)
    new = variant.forward(Layer(module, slot, y.dtype, now=now), x, y)
    return new if variant.handles_scale or now.is_whole else y + now.c * (new - y)


def _input_hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    slot, now = _called(module, name)
    if now is None:
        return None
    x = args[0] if args else next(iter(kwargs.values()))
    variant: Any = REGISTRY.get(slot.cfg.variant) or lookup(slot.cfg.variant)
    new = variant.forward_input(Layer(module, slot, x.dtype, now=now), x)
    if not (variant.handles_scale or now.is_whole):
        new = x + now.c * (new - x)
    return ((new, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): new})


def _experts_hook(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    """Fused experts, each with tensors of its own: for this forward, their matrices with the adapter worked in."""
    slot, now = _called(module, name)
    if slot is next(each for each in slots_of(module).values() if each.stacked):
        experts.unshadow(module)  # what an interrupt may have left: hooks that clear up run after an Exception only
    matrices = experts.down(module)
    if now is None or matrices is None:
        return
    tensors = {tensor: getattr(module, slot.state.attribute(tensor)) for tensor in slot.tensors}

    def one(tensors: dict[str, Tensor], matrix: Tensor) -> Tensor:
        layer = Layer(module, slot, matrix.dtype, instead=tensors)
        e = torch.eye(layer.in_features, dtype=matrix.dtype, device=matrix.device)
        x = apply_input(layer, e)
        return apply_output(layer, x, matrix.mT if x is e else x @ matrix.mT).mT

    experts.shadow(module, torch.func.vmap(one)(tensors, matrices))


def _experts_done(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
    experts.unshadow(module)
