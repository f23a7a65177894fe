"""Maps of x and parameters θ whose backward keeps these alone: what lies between them is made again.

    recomputed(f, x, θ)      f(x, θ)
    add_dense(y, x, f, θ)    y + s drop(x) f(θ)ᵀ, with ΔW = f(θ) (o, i)

Plain autograd keeps every step of f, and of a product with ΔW the whole matrix: o i numbers a layer, whatever the size
of θ. Here ΔW is formed again in the backward, and with u the gradient of y'

    dx = s u ΔW      dΔW = s uᵀ drop(x)      dθ = (∂f/∂θ)ᵀ dΔW

torch.compile, torch.func and forward-mode AD take the plain form, which they differentiate and fuse on their own. The
idea is gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) of one layer's adapter.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .dropout import dropout_seed, dropped
from .low_rank import is_traced_or_transformed, no_autocast


def recomputed(f: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """f(*inputs), a new tensor. f is pure and called again in the backward; what it captures is constant."""
    if is_traced_or_transformed() or not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        return f(*inputs)
    out: Tensor = _Recomputed.apply(f, *inputs)
    return out


def frozen_linear(x: Float[Tensor, "*b i"], w: Float[Tensor, "o i"]) -> Float[Tensor, "*b o"]:
    """x Wᵀ in x's dtype, for a W that isn't trained: the backward keeps W as it is stored, and no cast of it."""
    if is_traced_or_transformed() or not (torch.is_grad_enabled() and x.requires_grad):
        return F.linear(x, w.to(x.dtype))
    out: Tensor = _FrozenLinear.apply(x, w)
    return out


def add_dense(
    y: Float[Tensor, "*b o"],
    x: Float[Tensor, "*b i"],
    f: Callable[..., Float[Tensor, "o i"]],
    *tensors: Tensor,
    s: Any = 1.0,
    dropout: float = 0.0,
) -> Float[Tensor, "*b o"]:
    """y + s drop(x) f(*tensors)ᵀ in y's dtype; f is a pure function of tensors in any dtype.

    dropout     the probability on x, of the branch alone; 0 outside of training
    """
    if is_traced_or_transformed():
        return _plain(F.dropout(x, dropout), y, f, s, *tensors)
    seed = dropout_seed() if dropout else 0
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, *tensors)):
        out: Tensor = _AddDense.apply(y, x, f, float(s), dropout, seed, *tensors)
        return out
    with no_autocast(x) or nullcontext():
        return _plain(dropped(x, dropout, seed) if dropout else x, y, f, s, *tensors)


def _plain(x: Tensor, y: Tensor, f: Callable[..., Tensor], s: Any, *tensors: Tensor) -> Tensor:
    return y + (F.linear(x, f(*tensors).to(x.dtype)) * s).to(y.dtype)


def _gradients(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], needs: tuple[bool, ...], u: Any) -> list[Any]:
    """The gradients of f(*inputs) for u, or for what u makes of f's value; None for an input that needs none."""
    twice = torch.is_grad_enabled()  # a graph of the gradients is wanted, so they are of the inputs themselves
    if not twice:
        inputs = tuple(t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True))
    with torch.enable_grad():
        out = f(*inputs)
    u = u(out) if callable(u) else u
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    if not wanted:
        return [None] * len(inputs)
    grads = iter(torch.autograd.grad(out, wanted, u.to(out.dtype), create_graph=twice, allow_unused=True))
    return [next(grads) if need else None for need in needs]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        f, *inputs = operands
        ctx.f = f
        ctx.save_for_backward(*inputs)
        with no_autocast(inputs[0]) or nullcontext():
            out: Tensor = f(*inputs)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with no_autocast(grads[0]) or nullcontext():
            return None, *_gradients(ctx.f, ctx.saved_tensors, ctx.needs_input_grad[1:], grads[0])


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        x, w = operands
        ctx.save_for_backward(w)
        return F.linear(x, w.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (u,), (w,) = grads, ctx.saved_tensors
        return frozen_linear(u, w.mT), None


class _AddDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        y, x, f, s, p, seed, *tensors = operands
        ctx.f, ctx.s, ctx.p, ctx.seed = f, s, p, seed
        ctx.save_for_backward(x, *tensors)
        with no_autocast(x) or nullcontext():
            return _plain(dropped(x, p, seed) if p else x, y, f, s, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with no_autocast(grads[0]) or nullcontext():
            return _AddDense._backward(ctx, grads[0])

    @staticmethod
    def _backward(ctx: Any, u: Tensor) -> Any:
        s, p, needs = ctx.s, ctx.p, ctx.needs_input_grad
        x, *tensors = ctx.saved_tensors  # read once: a checkpoint gives them only once
        if torch.is_grad_enabled():  # second derivatives: of the plain form

            def branch(x: Tensor, *tensors: Tensor) -> Tensor:
                return _plain(dropped(x, p, ctx.seed) if p else x, torch.zeros_like(u), ctx.f, s, *tensors)

            dx, *rest = _gradients(branch, (x, *tensors), (needs[1], *needs[6:]), u)
            return u, dx, None, None, None, None, *rest
        dx = None

        def of_delta(delta: Tensor) -> Tensor:  # (o, i), which dx needs, too: it is formed once
            nonlocal dx
            flat = u.reshape(-1, u.shape[-1])  # (n, o)
            if needs[1]:
                dx = (flat @ delta.detach().to(u.dtype)).view(x.shape) * s
                dx = dropped(dx, p, ctx.seed) if p else dx
            x_hat = (dropped(x, p, ctx.seed) if p else x).reshape(-1, x.shape[-1])
            return (flat.mT @ x_hat) * s

        rest = _gradients(ctx.f, tuple(tensors), needs[6:], of_delta)
        return u, dx, None, None, None, None, *rest
