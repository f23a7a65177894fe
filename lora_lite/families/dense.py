"""Methods whose change of the weight is a function of small tensors: ΔW = f(θ) (o, i), formed when it is wanted."""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.variant import Layer, LowRank
from ..ops.few import plus
from ..ops.recompute import add_dense, recomputed
from .factors import at_inference

Delta = Callable[..., Float[Tensor, "o i"]]


def with_delta(
    layer: Layer,
    x: Float[Tensor, "*b i"],
    y: Float[Tensor, "*b o"],
    f: Delta,
    *tensors: Tensor,
    dropout: float = 0.0,
) -> Float[Tensor, "*b o"]:
    """y + c drop(x) f(*tensors)ᵀ at the layer's scale c. The backward keeps x and the tensors, and no ΔW.

    f           a pure function, of nothing trained but its arguments
    dropout     in training, of the branch alone
    """
    p = dropout if layer.training else 0.0
    if not at_inference(layer):
        return add_dense(y, x, f, *tensors, s=layer.scale, dropout=p)
    # At inference ΔW is remembered, in x's dtype: it costs more than its product, and so does a cast of it.
    delta = layer.constant("delta", lambda *t: f(*t[:-1]).to(t[-1].dtype), *tensors, x.new_empty(0))
    return plus(y, F.linear(x, delta), layer.scale)


def as_low_rank(layer: Layer, f: Delta, *tensors: Tensor, dropout: float = 0.0) -> LowRank:
    """The same for `low_rank`: B is ΔW itself and A the identity, for convolutions, embeddings and experts. Of how it
    is made, the backward keeps the tensors alone."""
    return LowRank(None, recomputed(f, *tensors), layer.scale, dropout if layer.training else 0.0)
