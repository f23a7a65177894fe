"""Methods whose change of the weight has two factors that are made of smaller tensors: ΔW = B A, (A, B) = f(θ)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.validate import is_number
from ..core.variant import Layer, LowRank
from ..ops.dropout import dropout_seed, dropped
from ..ops.low_rank import add_low_rank, is_traced_or_transformed
from ..ops.recompute import recomputed

Factors = Callable[..., tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]]


@dataclass(frozen=True, kw_only=True)
class SeededConfig(AdapterConfig):
    """dropout: on x, of the branch alone. seed: of what is drawn and never trained."""

    seed: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(type(self.seed) is int and 0 <= self.seed < 2**31, "seed", "an integer from 0 to 2^31")
        self.require(is_number(self.dropout) and 0 <= self.dropout < 1, "dropout", "a probability below 1")


def with_factors(
    layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"], f: Factors, *tensors: Tensor, dropout: float = 0.0
) -> Float[Tensor, "*b o"]:
    """y + c B A drop(x) for (A, B) = f(*tensors) at the layer's scale c. The backward keeps x and the tensors alone.

    f           a pure function, of nothing trained but its arguments
    dropout     in training, of the branch alone
    """
    p, s = dropout if layer.training else 0.0, layer.scale
    if not torch.is_grad_enabled() and not p and not is_traced_or_transformed():
        return add_low_rank(y, x, *f(*tensors), s)
    seed = dropout_seed() if p and not is_traced_or_transformed() else None  # a graph draws its masks itself

    def branch(x: Tensor, *tensors: Tensor) -> Tensor:
        a, b = f(*tensors)
        x = F.dropout(x, p) if seed is None else dropped(x, p, seed)
        return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * s  # (*b, r), (*b, o)

    return y + recomputed(branch, x, *tensors).to(y.dtype)


def as_low_rank(layer: Layer, f: Factors, *tensors: Tensor, dropout: float = 0.0) -> LowRank:
    """The same for `low_rank`, of convolutions, embeddings and experts."""
    return LowRank(*f(*tensors), layer.scale, dropout if layer.training else 0.0)
