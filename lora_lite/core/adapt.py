"""One adapter at one layer: its input and its output as the method makes them, at the adapter's scale."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import TargetError
from .layer import Layer
from .variant import REGISTRY, lookup


def adapt_input(layer: Layer, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b i"]:
    """The layer's input as one adapter makes it, at its scale."""
    variant: Any = REGISTRY.get(layer.cfg.variant) or lookup(layer.cfg.variant)  # .get: a call less for each token
    if variant.forward_input is None or layer.is_off:
        return x
    new: Tensor = variant.forward_input(layer, x)  # (*b, i)
    return new if variant.handles_scale or layer.is_whole else blended(layer.scale, new, x)


def adapt_output(layer: Layer, x: Float[Tensor, "*b d"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
    """The layer's output as one adapter makes it, at its scale."""
    variant: Any = REGISTRY.get(layer.cfg.variant) or lookup(layer.cfg.variant)
    if variant.forward is None or layer.is_off:
        return y
    new: Tensor = variant.forward(layer, x, y)  # (*b, o)
    return new if variant.handles_scale or layer.is_whole else blended(layer.scale, new, y)


def blended(c: Any, new: Float[Tensor, "*b d"], old: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """At c = 1 nobody asks: a blend would round."""
    return old + c * (new - old)


@torch.no_grad()
def check_groups(layer: Layer, module: nn.Module, like: Tensor) -> None:
    """TargetError for a method that mixes outputs of different groups of a convolution: they see different channels, so
    no kernel holds it.

    like    a tensor of the dtype and on the device of what the view computes
    """
    groups, n = getattr(module, "groups", 1), layer.out_features
    if groups == 1 or REGISTRY[layer.cfg.variant].forward is None:
        return
    y, x = torch.eye(n, dtype=like.dtype, device=like.device), like.new_zeros(n, layer.in_features)
    change = adapt_output(layer, x, y) - adapt_output(layer, x, torch.zeros_like(y))  # row j: what output j becomes
    group = torch.arange(n, device=like.device) // (n // groups)
    if change[group[:, None] != group].any():
        raise TargetError(
            f"{layer.path}: {layer.cfg.variant!r} mixes outputs of different groups of this convolution, "
            f"and no kernel does\n  keep the adapter attached, outside of torch.compile"
        )
