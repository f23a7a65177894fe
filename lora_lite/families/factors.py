"""Methods whose change of the weight is B A, with factors that are functions of small tensors: (A, B) = f(θ)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.validate import positive_or_none
from ..core.variant import Layer, LowRank
from ..errors import ConfigError
from ..ops.few import plus
from ..ops.low_rank import add_low_rank, is_traced_or_transformed
from ..ops.recompute import Factors, add_factors, frozen_linear


@dataclass(frozen=True, kw_only=True)
class FactorsConfig(AdapterConfig):
    """A rank, and LoRA's scale and dropout.

    alpha: None means r. rslora: s = alpha/√r in place of alpha/r. dropout: of the branch.
    """

    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(positive_or_none(self.alpha), "alpha", "a number above 0, or None for r")

    @property
    def scaling(self) -> float:
        """The factor s."""
        return (self.alpha or self.r) / (math.sqrt(self.r) if self.rslora else self.r)


@dataclass(frozen=True, kw_only=True)
class SeededConfig(AdapterConfig):
    """dropout: on x, of the branch alone. seed: of what is drawn and never trained."""

    seed: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(type(self.seed) is int and 0 <= self.seed < 2**31, "seed", "an integer from 0 to 2^31")


def check_directions(cfg: Any, d_in: int, d_out: int, most: int | None = None) -> None:
    """ConfigError for a rank above `most`, the directions of a (d_out, d_in) weight that the method can take; all."""
    most = min(d_in, d_out) if most is None else most
    if cfg.r > most:
        raise ConfigError(
            f"{type(cfg).__name__}(r={cfg.r}): a ({d_out}, {d_in}) weight has {most} directions\n"
            f"  lower r, there alone with per_layer, or leave the layer out with exclude_names"
        )


def with_factors(
    layer: Layer,
    x: Float[Tensor, "*b i"],
    y: Float[Tensor, "*b o"],
    f: Factors,
    *tensors: Tensor,
    dropout: float = 0.0,
) -> Float[Tensor, "*b o"]:
    """y + c (drop(x) Aᵀ Bᵀ + shift) at the layer's scale c. The backward keeps x and the tensors alone.

    f           (A (r, i), B (o, r)), or these and a shift (o,): a pure function of its arguments, and of config fields
                that aren't `live`, since at inference the factors are remembered by the tensors alone
    dropout     in training, of the branch alone
    """
    if not at_inference(layer):
        return add_factors(y, x, f, *tensors, s=layer.scale, dropout=dropout if layer.training else 0.0)
    a, b, *shift = layer.constant("factors", f, *tensors)
    y = add_low_rank(y, x, a, b, layer.scale)
    return plus(y, shift[0].to(y.dtype), layer.scale) if shift else y


def with_core(
    layer: Layer,
    x: Float[Tensor, "*b i"],
    y: Float[Tensor, "*b o"],
    factors: tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]],
    core: Callable[..., Float[Tensor, "r r"]],
    *tensors: Tensor,
    dropout: float = 0.0,
) -> Float[Tensor, "*b o"]:
    """y + c drop(x) Aᵀ Cᵀ Bᵀ at the layer's scale c, for frozen factors A and B and C = core(*tensors).

    The backward keeps r numbers a token.
    """
    a, b = factors
    if at_inference(layer):  # there B C is remembered
        up = layer.constant("up", lambda b, *tensors: b @ core(*tensors).to(b.dtype), b, *tensors)
        return add_low_rank(y, x, a, up, layer.scale)
    h = frozen_linear(F.dropout(x, dropout, layer.training), a)  # (*b, r)
    return add_factors(y, h, lambda b, *tensors: (core(*tensors), b), b, *tensors, s=layer.scale)


def at_inference(layer: Layer) -> bool:
    """Is this a forward in which `layer.constant` remembers?"""
    return not (layer.training or torch.is_grad_enabled() or is_traced_or_transformed())


def as_low_rank(layer: Layer, f: Factors, *tensors: Tensor, dropout: float = 0.0) -> LowRank:
    """The same for `low_rank`, of convolutions, embeddings and experts."""
    a, b = f(*tensors)
    return LowRank(a, b, layer.scale, dropout if layer.training else 0.0)
