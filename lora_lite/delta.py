"""What adapters change in a layer's weight, W' - W, and its best form of low rank."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import quant
from .affine import Affine
from .exact import exactly
from .layer import Slot

OVERSAMPLE, SEED = 8, 0
LOW_RANK = 1e-9
"""Of a matrix's norm: what is left outside of some directions is float64's rounding."""


def change(module: nn.Module, slots: Sequence[Slot]) -> tuple[Float[Tensor, "o i"], Float[Tensor, "o"] | None]:
    """(W' - W, b' - b) in float64, of a layer with these adapters at their scales; None for a bias that stays.

    W is what the layer computes with, dequantised if it is quantised. Raises VariantError for an adapter that isn't
    affine, and what `quant.dense_weight` raises.
    """
    with exactly(module):
        return _change(module, slots)


def _change(module: nn.Module, slots: Sequence[Slot]) -> tuple[Float[Tensor, "o i"], Float[Tensor, "o"] | None]:
    weight = quant.dense_weight(module, slots[0].path).double()
    bias = getattr(module, "bias", None)
    affine = Affine(module, slots, torch.float64, weight.device)
    delta = torch.empty_like(weight)
    for start, stop, columns in affine.columns(weight):
        delta[:, start:stop] = columns - weight[:, start:stop]
    new = affine.bias(bias, lambda: weight)
    if new is None:
        return delta, None
    moved = new if bias is None else new - bias.double()
    return delta, moved if moved.any() else None


def factors(delta: Float[Tensor, "o i"], rank: int) -> tuple[Float[Tensor, "k i"], Float[Tensor, "o k"]]:
    """The A, B with the least ‖delta - B A‖: U S Vᵀ to this rank at most, A = √S Vᵀ, B = U √S."""
    u, s, vt = _svd(delta, rank)
    root = s[:rank].sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root


def _svd(delta: Float[Tensor, "o i"], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Within the range that a few products with random vectors span, if that is all there is; else in full."""
    q = min(rank + OVERSAMPLE, *delta.shape)
    probe = torch.randn(delta.shape[1], q, dtype=delta.dtype, generator=torch.Generator().manual_seed(SEED))
    basis = torch.linalg.qr(delta @ probe.to(delta.device))[0]
    inside = basis.mT @ delta
    if (delta - basis @ inside).norm() > LOW_RANK * delta.norm():
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        return u, s, vt
    u, s, vt = torch.linalg.svd(inside, full_matrices=False)
    return basis @ u, s, vt
