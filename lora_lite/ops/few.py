"""Few tokens without gradients: a cast of a weight to 16 bits takes longer there than 16-bit products save."""

import torch
from torch import Tensor

from .low_rank import FEW, WIDE, is_traced_or_transformed


def few_wide(x: Tensor) -> Tensor:
    """x (*b, i) in float32 where it is of so few tokens and without gradients; x itself elsewhere."""
    if x.dtype in WIDE or torch.is_grad_enabled() or x.numel() > FEW * x.shape[-1] or is_traced_or_transformed():
        return x
    return x.float()
