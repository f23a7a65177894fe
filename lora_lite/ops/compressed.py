"""A product x Aᵀ whose gradient for A is of a compressed x, which alone is kept (VeLoRA, arXiv:2405.17991, section 3).

    h = drop(x) Aᵀ      c_g = x_g · e, for the G groups x_g of drop(x), e of length 1      x̃_g = s c_g e
    dA = uᵀ x̃ = s (uᵀ c) ⊗ e      dx = drop(u A)

The backward keeps G numbers a token in place of x.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .dropout import dropped


def group_width(d_in: int, groups: int) -> int:
    """How many channels a group has; the last one is filled up with zeros."""
    return -(-d_in // groups)


def grouped(x: Float[Tensor, "*b i"], groups: int) -> Float[Tensor, "n G w"]:
    width = group_width(x.shape[-1], groups)
    return F.pad(x, (0, groups * width - x.shape[-1])).reshape(-1, groups, width)


def mean_direction(x: Float[Tensor, "*b i"], groups: int) -> Float[Tensor, "w"]:
    """The mean of all groups of all tokens, at length 1; the ones' where that is 0, or there are no tokens."""
    total = grouped(x.detach(), groups).float().sum((0, 1))  # (w,), of the mean's direction
    return F.normalize(torch.where(total.any(), total, torch.ones_like(total)), dim=0)


def compressed_product(
    x: Float[Tensor, "*b i"], a: Float[Tensor, "r i"], e: Float[Tensor, "w"], groups: int, s: float, p: float, seed: int
) -> Float[Tensor, "*b r"]:
    """x Aᵀ in x's dtype, with the gradients at the head of the file. p: of dropout on x, by this seed."""
    out: Tensor = _Compressed.apply(x, a, e, groups, s, p, seed)
    return out


class _Compressed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        x, a, e, groups, s, p, seed = operands
        x = dropped(x, p, seed) if p else x
        ctx.save_for_backward(grouped(x, groups) @ e.to(x.dtype), a, e)  # c (n, G)
        ctx.s, ctx.p, ctx.seed = s, p, seed
        return F.linear(x, a.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (u,), (c, a, e) = grads, ctx.saved_tensors
        flat = u.reshape(-1, u.shape[-1])  # (n, r)
        dx = u @ a.to(u.dtype)
        dx = dropped(dx, ctx.p, ctx.seed) if ctx.p else dx
        outer = (flat.mT @ c)[:, :, None] * e.to(u.dtype)  # (r, G, w)
        da = ctx.s * outer.flatten(1)[:, : a.shape[1]]
        return dx, da.to(a.dtype), None, None, None, None, None
