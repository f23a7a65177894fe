"""Products that mix the two halves of each group of channels: y' = y + s (p ⊙ y + q ⊙ P y), where P swaps the halves.

With u the gradient of y':  dy = u + s (p ⊙ u + P (q ⊙ u))      dp = s Σ_tokens u ⊙ y      dq = s Σ_tokens u ⊙ P y

Plain autograd keeps P y, p, q and what the halves are made of; this keeps y and what p and q are functions of.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .low_rank import is_traced_or_transformed
from .recompute import gradients

Coefficients = Callable[..., Float[Tensor, "2 o"]]


def mix_halves(y: Float[Tensor, "*b o"], half: int, f: Coefficients, *tensors: Tensor, s: Any = 1.0) -> Tensor:
    """y' in y's dtype, for groups of 2 half channels, and p and q = f(*tensors), a pure function."""
    if torch.is_grad_enabled() and not is_traced_or_transformed():
        out: Tensor = _Mix.apply(y, half, f, float(s), *tensors)
        return out
    return _mixed(y, half, s * f(*tensors))


def _mixed(y: Tensor, half: int, coefficients: Float[Tensor, "2 o"]) -> Tensor:
    p, q = coefficients.to(y.dtype)
    return torch.addcmul(torch.addcmul(y, y, p), _swapped(y, half), q)


def _swapped(t: Float[Tensor, "*b o"], half: int) -> Float[Tensor, "*b o"]:
    blocks = t.unflatten(-1, (-1, 2, half))
    return torch.cat([blocks[..., 1:, :], blocks[..., :1, :]], -2).flatten(-3)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        y, half, f, s, *tensors = operands
        ctx.save_for_backward(y, *tensors)
        ctx.half, ctx.f, ctx.s = half, f, s
        return _mixed(y, half, s * f(*tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (u,), (y, *tensors), needs, half, s = grads, ctx.saved_tensors, ctx.needs_input_grad, ctx.half, ctx.s
        if torch.is_grad_enabled():  # second derivatives: of the plain form
            plain = lambda y, *tensors: _mixed(y, half, s * ctx.f(*tensors))  # noqa: E731
            dy, *rest = gradients(plain, (y, *tensors), (needs[0], *needs[4:]), u)
            return dy, None, None, None, *rest
        dy = None

        def of_coefficients(coefficients: Tensor) -> Tensor:  # (2, o), which dy needs, too
            nonlocal dy
            p, q = s * coefficients.detach().to(u.dtype)
            dy = torch.addcmul(u, u, p).add_(_swapped(u * q, half)) if needs[0] else None
            products = u * y, u * _swapped(y, half)  # no vecdot, which autocast would round
            return s * torch.stack([product.reshape(-1, product.shape[-1]).sum(0) for product in products])

        rest = gradients(ctx.f, tuple(tensors), needs[4:], of_coefficients)
        return dy, None, None, None, *rest
