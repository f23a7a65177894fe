"""Products that mix the two halves of each group of channels: y' = y + p ⊙ y + q ⊙ P y, where P swaps the halves.

With u the gradient of y':  dy = u + p ⊙ u + P (q ⊙ u)      dp = Σ_tokens u ⊙ y      dq = Σ_tokens u ⊙ P y

Plain autograd keeps P y and what the halves are made of; this keeps y. One addcmul for each product.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .low_rank import is_traced_or_transformed


def mix_halves(y: Float[Tensor, "*b o"], p: Float[Tensor, "o"], q: Float[Tensor, "o"], half: int) -> Tensor:
    """y' in y's dtype, for groups of 2 half channels. p and q of any dtype get their gradients in it."""
    if torch.is_grad_enabled() and not is_traced_or_transformed():
        out: Tensor = _Mix.apply(y, p, q, half)
        return out
    return _mixed(y, p.to(y.dtype), q.to(y.dtype), half)


def _mixed(y: Tensor, p: Tensor, q: Tensor, half: int) -> Tensor:
    return torch.addcmul(torch.addcmul(y, y, p), _swapped(y, half), q)


def _swapped(t: Float[Tensor, "*b o"], half: int) -> Float[Tensor, "*b o"]:
    blocks = t.unflatten(-1, (-1, 2, half))
    return torch.cat([blocks[..., 1:, :], blocks[..., :1, :]], -2).flatten(-3)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        y, p, q, half = operands
        ctx.save_for_backward(y, p, q)
        ctx.half = half
        return _mixed(y, p.to(y.dtype), q.to(y.dtype), half)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (u,), (y, p, q), (needs_y, needs_p, needs_q, _) = grads, ctx.saved_tensors, ctx.needs_input_grad
        dy = torch.addcmul(u, u, p.to(u.dtype)) + _swapped(u * q.to(u.dtype), ctx.half) if needs_y else None
        flat, of_y = u.flatten(0, -2), y.flatten(0, -2)  # (n, o)
        dp = (flat * of_y).sum(0).to(p.dtype) if needs_p else None  # no vecdot, which autocast would round
        dq = (flat * _swapped(of_y, ctx.half)).sum(0).to(q.dtype) if needs_q else None
        return dy, dp, dq, None
