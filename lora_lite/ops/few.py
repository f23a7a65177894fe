"""Few tokens without gradients: a cast of a weight to 16 bits takes longer there than 16-bit products save."""

from typing import Any

import torch
from torch import Tensor

from .low_rank import FEW, WIDE, is_traced_or_transformed


def few_wide(x: Tensor) -> Tensor:
    """x (*b, i) in float32 where it is of so few tokens and without gradients; x itself elsewhere."""
    if x.dtype in WIDE or torch.is_grad_enabled() or x.numel() > FEW * x.shape[-1] or is_traced_or_transformed():
        return x
    return x.float()


def plus(y: Tensor, change: Tensor, s: Any = 1.0, scales: Tensor | None = None) -> Tensor:
    """y + s scales ⊙ change in y's dtype, rounded once, for a change that may be wider; without gradients. s is a
    number, or a tensor () whose value nothing asks for."""
    if isinstance(s, Tensor):
        change = change if scales is None else change * scales.to(change.dtype)
        return torch.addcmul(y.to(change.dtype), change, s.to(change.dtype)).to(y.dtype)
    if scales is not None:
        return torch.addcmul(y, change, scales.to(change.dtype), value=s, out=torch.empty_like(y))
    if change.dtype == y.dtype:
        return y.add(change, alpha=s)
    return torch.add(y, change, alpha=s, out=torch.empty_like(y))  # `out=` rounds in this pass, not in one of its own
