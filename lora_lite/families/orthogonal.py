"""Methods that turn a layer's input or output: x' = x + c x T with T = R - I, which is 0 exactly at the start.

The frozen layer keeps nothing of x' for the backward, and the turn keeps x and its parameters: T is made again there.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.variant import Layer
from ..ops.low_rank import is_traced_or_transformed
from ..ops.recompute import recomputed


def change_by(
    layer: Layer,
    x: Float[Tensor, "*b i"],
    turn: Callable[..., Tensor],
    product: Callable[[Tensor, Tensor], Tensor],
    *tensors: Tensor,
) -> Float[Tensor, "*b i"]:
    """c product(x, turn(*tensors)) at the layer's scale c, to be added to x. Both functions are pure.

    turn        T, of tensors in float32 at least; at inference it is remembered
    product     x T (*b, i), linear in x and in its dtype
    """

    def wide(*tensors: Tensor) -> Tensor:
        return turn(*(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors))

    if layer.training or torch.is_grad_enabled() or is_traced_or_transformed():
        change = recomputed(lambda x, *tensors: product(x, wide(*tensors)), x, *tensors)
    else:
        change = product(x, layer.constant("turn", wide, *tensors))
    return layer.scale * change


def check_cayley(cfg: BaseConfig) -> None:
    """ConfigError unless `use_cayley_neumann` and `num_cayley_neumann_terms` are valid."""
    series, terms = "use_cayley_neumann", "num_cayley_neumann_terms"
    cfg.require(isinstance(getattr(cfg, series), bool), series, "True or False")
    value = getattr(cfg, terms)
    cfg.require(type(value) is int and value > 1, terms, "2 or more: one term is the identity, whatever is trained")


def series_terms(cfg: BaseConfig) -> int | None:
    """How many terms the rotation has; None for the exact one."""
    terms: int | None = getattr(cfg, "num_cayley_neumann_terms") if getattr(cfg, "use_cayley_neumann") else None
    return terms
