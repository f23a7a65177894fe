"""Maps of x and parameters θ whose backward keeps these alone: what lies between them is made again.

    recomputed(f, x, θ)      f(x, θ)
    add_dense(y, x, f, θ)    y + s drop(x) f(θ)ᵀ, with ΔW = f(θ) (o, i)
    add_factors(y, x, f, θ)  y + s (drop(x) Aᵀ Bᵀ + β), with (A (r, i), B (o, r)) = f(θ), or these and β (o,)

Plain autograd keeps every step of f, and of a product with ΔW the whole matrix: o i numbers a layer, whatever the size
of θ. Here ΔW, or A and B, are formed again in the backward, and with u the gradient of y'

    dx = s u ΔW      dΔW = s uᵀ drop(x)      dθ = (∂f/∂θ)ᵀ dΔW
    dx = s u B A     dA = (s u B)ᵀ drop(x)   dB = s uᵀ (drop(x) Aᵀ)     dβ = s Σ_tokens u

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
from .few import few_wide, plus
from .low_rank import add_low_rank, is_traced_or_transformed, no_autocast, times

_is_autocast_on = torch._C._is_any_autocast_enabled
Factors = Callable[..., tuple[Tensor, ...]]


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
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, *tensors)):
        seed = dropout_seed() if dropout else 0
        out: Tensor = _AddDense.apply(y, x, f, float(s), dropout, seed, *tensors)
        return out
    if _is_autocast_on() and (off := no_autocast(x)):
        with off:
            return add_dense(y, x, f, *tensors, s=s, dropout=dropout)
    x = few_wide(dropped(x, dropout, dropout_seed()) if dropout else x)
    return plus(y, F.linear(x, f(*tensors).to(x.dtype)), s)


def add_factors(
    y: Float[Tensor, "*b o"],
    x: Float[Tensor, "*b i"],
    f: Factors,
    *tensors: Tensor,
    s: Any = 1.0,
    dropout: float = 0.0,
) -> Float[Tensor, "*b o"]:
    """y + s (drop(x) Aᵀ Bᵀ + β) in y's dtype; f is a pure function of tensors in any dtype. x is of y's dtype.

    f           (A (r, i), B (o, r)), or these and β (o,). One of them that needs no gradient takes no product for it
    dropout     the probability on x, of the branch alone; 0 outside of training
    """
    if is_traced_or_transformed():
        return _plain_factors(F.dropout(x, dropout), y, s, *f(*tensors))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, *tensors)):
        seed = dropout_seed() if dropout else 0
        out: Tensor = _AddFactors.apply(y, x, f, float(s), dropout, seed, *tensors)
        return out
    with no_autocast(x) or nullcontext():
        a, b, *shift = f(*tensors)
        y = plus(y, shift[0].to(y.dtype), s) if shift else y
        return add_low_rank(y, x, a, b, s, dropout)


def _plain_factors(x: Tensor, y: Tensor, s: Any, a: Tensor, b: Tensor, *shift: Tensor) -> Tensor:
    beta = shift[0].to(x.dtype) if shift else None
    return y + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype), beta) * s


def _plain(x: Tensor, y: Tensor, f: Callable[..., Tensor], s: Any, *tensors: Tensor) -> Tensor:
    return y + (F.linear(x, f(*tensors).to(x.dtype)) * s).to(y.dtype)


def _sum(y: Tensor, x: Tensor, w: Tensor, s: float) -> Tensor:
    """y + s x Wᵀ as one product, in a tensor of its own: a view could not be changed in place later."""
    out, (o, i) = torch.empty(y.shape, dtype=y.dtype, device=y.device), w.shape
    torch.addmm(y.reshape(-1, o), x.reshape(-1, i).to(y.dtype), w.mT.to(y.dtype), alpha=s, out=out.view(-1, o))
    return out


def gradients(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], needs: tuple[bool, ...], u: Any) -> list[Any]:
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
            return None, *gradients(ctx.f, ctx.saved_tensors, ctx.needs_input_grad[1:], grads[0])


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
            return _sum(y, dropped(x, p, seed) if p else x, f(*tensors), s)

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

            dx, *rest = gradients(branch, (x, *tensors), (needs[1], *needs[6:]), u)
            return u, dx, None, None, None, None, *rest
        dx = None

        def of_delta(delta: Tensor) -> Tensor:  # (o, i), which dx needs, too: it is formed once
            nonlocal dx
            flat = u.reshape(-1, u.shape[-1])  # (n, o)
            if needs[1]:
                dx = times(flat, delta.detach().to(u.dtype), s).view(x.shape)
                dx = dropped(dx, p, ctx.seed) if p else dx
            x_hat = (dropped(x, p, ctx.seed) if p else x).reshape(-1, x.shape[-1])
            return times(flat.mT, x_hat.to(u.dtype), s)

        rest = gradients(ctx.f, tuple(tensors), needs[6:], of_delta)
        return u, dx, None, None, None, None, *rest


class _AddFactors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        y, x, f, s, p, seed, *tensors = operands
        ctx.f, ctx.s, ctx.p, ctx.seed = f, s, p, seed
        ctx.save_for_backward(x, *tensors)
        with no_autocast(x) or nullcontext():
            a, b, *shift = f(*tensors)
            x_hat = dropped(x, p, seed) if p else x
            y = y.add(shift[0].to(y.dtype), alpha=s) if shift else y
            return _sum(y, F.linear(x_hat, a.to(x.dtype)), b, s)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with no_autocast(grads[0]) or nullcontext():
            return _AddFactors._backward(ctx, grads[0])

    @staticmethod
    def _backward(ctx: Any, u: Tensor) -> Any:
        f, s, p, seed, needs = ctx.f, ctx.s, ctx.p, ctx.seed, ctx.needs_input_grad
        x, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives: of the plain form

            def branch(x: Tensor, *tensors: Tensor) -> Tensor:
                return _plain_factors(dropped(x, p, seed) if p else x, torch.zeros_like(u), s, *f(*tensors))

            dx, *rest = gradients(branch, (x, *tensors), (needs[1], *needs[6:]), u)
            return u, dx, None, None, None, None, *rest
        inputs = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs[6:], strict=True)]
        with torch.enable_grad():
            factors = f(*inputs)  # A, B and perhaps β, with the graph that leads to them alone
        (a, b), rows = (t.detach().to(u.dtype) for t in factors[:2]), u.numel() // u.shape[-1]
        flat, x_hat = u.reshape(rows, len(b)), (dropped(x, p, seed) if p else x).reshape(rows, x.shape[-1]).to(u.dtype)
        v = times(flat, b, s)  # s u B (n, r), which dA and dx share
        dx = None
        if needs[1]:  # no view: autograd adds other gradients of x into its memory
            dx = v.view(*u.shape[:-1], len(a)) @ a
            dx = dropped(dx, p, seed) if p else dx
        products = {0: lambda: v.mT @ x_hat, 1: lambda: times(flat.mT, x_hat @ a.mT, s), 2: lambda: s * flat.sum(0)}
        trained = [(t, products[i]().to(t.dtype)) for i, t in enumerate(factors) if t.requires_grad]
        wanted = [t for t in inputs if t.requires_grad]
        outs, grads = [t for t, _ in trained], [grad for _, grad in trained]
        of_tensors = iter(torch.autograd.grad(outs, wanted, grads, allow_unused=True) if outs else ())
        rest = [next(of_tensors) if t.requires_grad else None for t in inputs]
        return u, dx, None, None, None, None, *rest
