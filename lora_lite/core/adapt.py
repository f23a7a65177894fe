"""One adapter at one layer: its input and its output as the method makes them, at the adapter's scale."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from .layer import Layer
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
