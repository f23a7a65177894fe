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

from ..base.kinds import Kind
from ..errors import TargetError
from .layer import Layer
from .scale import Scale
from .state import SITES, Site, sites_of
from .variant import REGISTRY, lookup


def adapt_input(layer: Layer, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b i"]:
    """The layer's input as one adapter makes it, at its scale."""
    variant: Any = REGISTRY.get(layer.cfg.variant) or lookup(layer.cfg.variant)  # .get: a call less for each token
    if variant.forward_input is None or layer.is_off:
        return x
    new: Tensor = variant.forward_input(layer, x)  # (*b, i)
    return new if variant.handles_scale or layer.is_whole else x + layer.scale * (new - x)


def adapt_output(layer: Layer, x: Float[Tensor, "*b d"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
    """The layer's output as one adapter makes it, at its scale."""
    variant: Any = REGISTRY.get(layer.cfg.variant) or lookup(layer.cfg.variant)
    if variant.forward is None or layer.is_off:
        return y
    new: Tensor = variant.forward(layer, x, y)  # (*b, o); at c = 1 it is taken as it is, since a blend would round
    return new if variant.handles_scale or layer.is_whole else y + layer.scale * (new - y)


def register_hooks(site: Site) -> None:
    """Register a site's hooks anew; those of an adapter that is first come before all others."""
    name, variant, handles = site.state.name, lookup(site.cfg.variant), site.handles
    while handles:
        handles.pop().remove()
    before = partial(site.module.register_forward_pre_hook, prepend=site.state.is_first)
    after = partial(site.module.register_forward_hook, prepend=site.state.is_first)
    if site.stacked:
        handles.append(before(partial(_experts_hook, name)))
        handles.append(
            after(partial(_experts_done, site.base.kind), always_call=True)
        )  # after an Exception in the forward, too
        return
    if variant.forward_input is not None:
        handles.append(before(partial(_input_hook, name), with_kwargs=True))  # x may come by keyword
    if variant.forward is not None:
        handles.append(after(partial(_output_hook, name), with_kwargs=True))


def _called(module: nn.Module, name: str) -> tuple[Site, Scale | None]:
    """The site of a layer that is being called, and the scale of this call; None where the adapter does nothing."""
    site: Site = module.__dict__[SITES][name]  # of this module: a copy has sites of its own
    state = site.state
    if is_dynamo_compiling() or compiler._is_compiling_flag:  # is_compiling(), without its second call
        scale = state.traced
    else:
        site.ran = True  # a graph can't note it: a mutation inside of a compiled checkpoint breaks the graph
        scale = state.plain if state.changes is None else state.scale_of_call()
    return site, None if state.merged or scale.is_zero else scale


def _output_hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
    site, scale = _called(module, name)
    if scale is None:
        return None  # torch hands on the layer's own output: the base, bit for bit
    x = args[0] if args else next(iter(kwargs.values()))  # (*b, d_in)
    if not isinstance(y, Tensor):
        raise TargetError(
            f"{site.path}: wanted a tensor from this layer, got {type(y).__name__}\n  leave it out with exclude_names"
        )
    if x.dtype != y.dtype:  # x is never cast up: the layer's output says in which dtype it computes
        x = x.to(y.dtype)
    return adapt_output(Layer(module, site, y.dtype, scale=scale), x, y)


def _input_hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    site, scale = _called(module, name)
    if scale is None:
        return None
    x = args[0] if args else next(iter(kwargs.values()))  # (*b, d_in)
    new = adapt_input(Layer(module, site, x.dtype, scale=scale), x)
    return ((new, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): new})


def _experts_hook(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    """Fused experts, each with tensors of its own: for this forward, their matrices with the adapter worked in."""
    site, scale = _called(module, name)
    kind = site.base.kind
    if site is next(other for other in sites_of(module).values() if other.stacked):
        kind.restore(module)  # what an interrupt may have left: hooks that clear up run after an Exception only
    if scale is None:
        return
    matrices = kind.oriented(module, kind.stored(module))  # (experts, o, i), with what earlier adapters change
    stacked = {tensor: getattr(module, site.attribute(tensor)) for tensor in site.specs}  # each (experts, ...)

    def one(tensors: dict[str, Tensor], matrix: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        layer = Layer(module, site, matrix.dtype, instead=tensors)
        unit = torch.eye(layer.in_features, dtype=matrix.dtype, device=matrix.device)  # (i, i), a row for each vector
        x = adapt_input(layer, unit)  # the same object where the method leaves inputs alone: no product then
        return adapt_output(layer, x, matrix.mT if x is unit else x @ matrix.mT).mT

    kind.replace(module, torch.func.vmap(one)(stacked, matrices))  # (experts, o, i): all experts in one pass


def _experts_done(kind: Kind, module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
    kind.restore(module)
