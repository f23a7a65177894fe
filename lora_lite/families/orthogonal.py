"""Methods that turn inputs, outputs or a subspace: x' = x + c x T with T = R - I, which is 0 exactly at the start.

The frozen layer keeps nothing of x' for the backward, and the turn keeps x and its parameters: T is made again there.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.variant import Layer
from ..errors import ConfigError
from ..ops.cayley import add_turn
from ..ops.recompute import recomputed
from .factors import at_inference

MOST_TERMS = 1000
"""A file, which anyone may have written, can't ask for a series that never ends."""


def change_by(
    layer: Layer,
    x: Float[Tensor, "*b i"],
    turn: Callable[..., Tensor],
    product: Callable[[Tensor, Tensor], Tensor],
    *tensors: Tensor,
) -> Float[Tensor, "*b i"]:
    """c product(x, turn(*tensors)) at the layer's scale c. Both functions are pure.

    turn        T, of tensors in float32 at least; at inference it is remembered
    product     x T, linear in x and in its dtype
    """

    def wide(*tensors: Tensor) -> Tensor:
        return turn(*(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors))

    if not at_inference(layer):
        return layer.scale * recomputed(lambda x, *tensors: product(x, wide(*tensors)), x, *tensors)
    return layer.scale * product(x, layer.constant("turn", wide, *tensors))


def with_turn(
    layer: Layer, y: Float[Tensor, "*b i"], x: Float[Tensor, "*b i"], turn: Callable[..., Tensor], *tensors: Tensor
) -> Float[Tensor, "*b i"]:
    """y + c x T at the layer's scale c, for blocks T (n, s, s) = turn(*tensors), as `change_by` has it."""

    def wide(*tensors: Tensor) -> Tensor:
        return turn(*(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors))

    if not at_inference(layer):
        return add_turn(y, x, wide, *tensors, s=layer.scale)
    return add_turn(y, x, lambda turn: turn, layer.constant("turn", wide, *tensors), s=layer.scale)


def check_cayley(cfg: BaseConfig) -> None:
    """ConfigError unless `num_cayley_neumann_terms` is valid."""
    terms, name = getattr(cfg, "num_cayley_neumann_terms"), "num_cayley_neumann_terms"  # noqa: B009
    wanted = f"2 or more, up to {MOST_TERMS}: one term is the identity, whatever is trained"
    cfg.require(type(terms) is int and 1 < terms <= MOST_TERMS, name, wanted)


def check_divides(cfg: BaseConfig, field: str, d: int, times: int = 1) -> None:
    """ConfigError unless this field's number, or that many of it, divides the d channels."""
    size = getattr(cfg, field) * times
    if d % size:
        raise ConfigError(
            f"{type(cfg).__name__}({field}={getattr(cfg, field)}): {size} doesn't divide a layer's {d} channels\n"
            f"  choose another one, there alone with per_layer, or leave the layer out with exclude_names"
        )


def series_terms(cfg: Any) -> int | None:
    """How many terms the rotation has; None for the exact one."""
    terms: int | None = cfg.num_cayley_neumann_terms if cfg.use_cayley_neumann else None
    return terms
