"""The one op of every low-rank update: as many passes as the maths has, and little kept for the backward but x.

    y' = y + s (x̂ Aᵀ) Bᵀ                                     x̂ = drop(x)
    y' = y + c [(g - 1) ⊙ (y - b) + g ⊙ s (x̂ Aᵀ) Bᵀ]          with a gain g (o,) on the direction d = W x + s B A x̂

Plain autograd keeps x̂ and its mask, x̂ Aᵀ, casts of A and B, and for the gain W x, B A x̂ and their sum. Here, with u
the gradient of y', h = x̂ Aᵀ and k = 1 - c + c g:

    dB = c g ⊙ s uᵀ h      dA = (s u (c g ⊙ B))ᵀ x̂      dx = s u (c g ⊙ B) A      dy = k ⊙ u
    dg = c Σ_tokens u ⊙ d = c [Σ_tokens u ⊙ (y - b) + Σ_r s uᵀ h ⊙ B]

These need x (for dA alone), the parameters, h (r numbers a token) and, with a gain, y. x̂ is made again from the seed of
its mask.

torch.compile, torch.func and forward-mode AD take the reference form, which they differentiate and fuse on their own.

The update is LoRA's (Hu et al. 2021, arXiv:2106.09685, 4.1), the gain DoRA's (Liu et al. 2024, arXiv:2402.09353, 4.3).
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, compiler
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from .dropout import dropout_seed, dropped

WIDE = torch.float32, torch.float64
_innermost_transform = torch._C._functorch.peek_interpreter_stack
_is_autocast_on = torch._C._is_any_autocast_enabled
FEW = 16
"""Tokens up to which products without gradients run in float32 or wider, in the fewest calls."""


def add_low_rank(
    y: Float[Tensor, "*b o"],
    x: Float[Tensor, "*b i"],
    a: Float[Tensor, "r i"],
    b: Float[Tensor, "o r"],
    s: Any,
    dropout: float = 0.0,
    gain: Float[Tensor, "o"] | None = None,
    c: Any = 1.0,
    bias: Float[Tensor, "o"] | None = None,
) -> Float[Tensor, "*b o"]:
    """y' in y's dtype, for A, B and g of any dtype, which get their gradients in it. x is of y's dtype.

    dropout     the probability on x, of the branch alone; 0 outside of training
    gain, c, bias    g, its coefficient, and what y holds beside W x

    With a gain, y is kept for the backward: an in-place change of it raises there, as PyTorch does for its own ops.
    """
    if gain is not None and gain.dtype != (wide := torch.promote_types(gain.dtype, x.dtype)):
        gain = gain.to(wide)
    is_traced = is_dynamo_compiling() or compiler._is_compiling_flag
    if is_traced or _innermost_transform() is not None or forward_ad._current_level >= 0:
        return _reference(y, x, a, b, s, dropout, gain, c, bias)
    if _is_autocast_on() and (off := no_autocast(x)):
        with off:
            return add_low_rank(y, x, a, b, s, dropout, gain, c, bias)
    # written out, as are the casts below: of one token, a Python call is 1 % of the time
    if (s if gain is None else c).__class__ is not float and isinstance(s if gain is None else c, Tensor):
        return _of_tensor(y, x, a, b, s, dropout, gain, c, bias)
    if torch.is_grad_enabled():
        needs_grad = a.requires_grad or b.requires_grad or x.requires_grad or y.requires_grad
        if needs_grad or (gain is not None and gain.requires_grad) or (bias is not None and bias.requires_grad):
            out: Tensor = _AddLowRank.apply(y, x, a, b, float(s), gain, float(c), bias, dropout)
            return out
    if dropout:
        x = dropped(x, dropout, dropout_seed())
    elif x.numel() <= FEW * x.shape[-1]:
        # In float32 (float64 for x in it) throughout, rounded once: at that size the casts of A and B are what takes
        # time, and float32 products are the faster ones on a CPU.
        x_wide = x if x.dtype in WIDE else x.float()
        if a.dtype != x_wide.dtype or b.dtype != x_wide.dtype:
            a, b = a.to(x_wide.dtype), b.to(x_wide.dtype)
        branch = F.linear(F.linear(x_wide, a), b)  # (*b, o)
        if gain is not None:
            return _with_gain(y, branch, s, gain, c, bias)
        out = branch.add_(y) if s == 1 else torch.add(y, branch, alpha=s, out=branch)
        return out if x_wide is x else out.to(y.dtype)
    return _forward(y, x, a, b, s, gain, c, bias)[0]


def is_traced_or_transformed() -> bool:
    """Is torch.compile at work, or what `is_transformed` asks for?"""
    return is_dynamo_compiling() or compiler._is_compiling_flag or is_transformed()


def is_transformed() -> bool:
    """Is a torch.func transform at work, or a level of forward_ad? Neither has a public question for it."""
    return _innermost_transform() is not None or forward_ad._current_level >= 0


def _reference(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: Any, p: float, gain: Tensor | None, c: Any, bias: Tensor | None
) -> Tensor:
    """The equation as it stands, of few tokens without gradients in float32 as elsewhere. A graph takes long to compile
    if it has many nodes."""
    is_few = not torch.is_grad_enabled() and x.dtype not in WIDE and x.numel() <= FEW * x.shape[-1]
    x, dtype = x.float() if is_few else x, y.dtype
    a, b, x = (
        a if a.dtype == x.dtype else a.to(x.dtype),
        b if b.dtype == x.dtype else b.to(x.dtype),
        F.dropout(x, p) if p else x,
    )
    branch = F.linear(F.linear(x, a) * s, b)
    if gain is None:
        return (y + branch).to(dtype)
    wx = y if bias is None else y - bias
    return (y + c * ((gain - 1).to(x.dtype) * wx + gain.to(x.dtype) * branch)).to(dtype)


def _with_gain(y: Tensor, branch: Tensor, s: Any, gain: Tensor, c: Any, bias: Tensor | None) -> Tensor:
    """y' of few tokens, in the dtype of branch, rounded once."""
    out = torch.empty_like(y)
    if bias is None and c == 1:
        return torch.mul(torch.add(y, branch, alpha=s), gain, out=out)
    wx = y.to(branch.dtype) if bias is None else y.to(branch.dtype) - bias.to(branch.dtype)
    return torch.add(y, gain * torch.add(wx, branch, alpha=s) - wx, alpha=c, out=out)


def _of_tensor(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: Any, p: float, gain: Tensor | None, c: Any, bias: Tensor | None
) -> Tensor:
    """y' at a scale (s, or c with a gain) that is a tensor (), which nothing waits for: a captured graph reads it.

    Without gradients it isn't rounded to 16 bits, as a product of a tensor of that dtype with it would on a GPU.
    """
    if torch.is_grad_enabled() or p:
        return _reference(y, x, a, b, s, p, gain, c, bias)
    if x.numel() > FEW * x.shape[-1]:
        if gain is None:
            b, s = b.to(torch.promote_types(b.dtype, torch.float32)) * s, 1.0
        return _forward(y, x, a, b, s, gain, c, bias)[0]
    if x.dtype not in WIDE:
        x = x.float()
    change = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))  # (*b, o)
    if gain is not None:
        wx = y.to(x.dtype) if bias is None else y.to(x.dtype) - bias.to(x.dtype)
        change, s = gain * torch.add(wx, change, alpha=s) - wx, c
    return torch.addcmul(y, change, s).to(y.dtype)


def _forward(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: Any, gain: Tensor | None, c: Any, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y' and h (n, r), in the dtype of x; two products, the second with the sum in it."""
    (o, _), (_, i), rows = b.shape, a.shape, x.numel() // x.shape[-1]
    if gain is None:
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)  # no view, which could not be changed in place later
    else:
        # y' = [y + c (g - 1) ⊙ (y - b)] + s h (c g ⊙ B)ᵀ: then what follows is the same as without a gain
        wx = y if bias is None else y - bias
        y = out = torch.addcmul(y, wx, (c * (gain - 1)).to(y.dtype)).contiguous()
        b = (c * gain)[:, None] * b
    if a.dtype != x.dtype or b.dtype != x.dtype:
        a, b = a.to(x.dtype), b.to(x.dtype)
    h = F.linear(x.reshape(rows, i), a)  # (n, r)
    torch.addmm(y.reshape(rows, o), h, b.mT, alpha=s, out=out.view(rows, o))
    return out, h


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        y, x, a, b, s, gain, c, bias, p = operands
        seed = dropout_seed() if p else 0
        out, h = _forward(y, dropped(x, p, seed) if p else x, a, b, s, gain, c, bias)
        needs = ctx.needs_input_grad
        kept_x = x if needs[2] else None  # dA alone is made of it: LoRA-FA, with A frozen, keeps h
        kept_h = h if needs[3] or needs[5] else None  # dB and dg are made of it: MiCA, with B frozen, keeps x
        ctx.save_for_backward(kept_x, a, b, kept_h, gain, *((None, None) if gain is None else (bias, y)))
        ctx.s, ctx.c, ctx.p, ctx.seed = s, c, p, seed
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The equations at the head of the file. Autograd casts dA and dB to the dtypes of A and B."""
        (u,), s, c, p, needs = grads, ctx.s, ctx.c, ctx.p, ctx.needs_input_grad
        if _is_autocast_on() and (off := no_autocast(u)):
            with off:
                return _AddLowRank.backward(ctx, u)
        x, a, b, h, gain, bias, y = ctx.saved_tensors  # read once: a checkpoint gives them only once
        (o, _), (_, i), rows = b.shape, a.shape, u.numel() // u.shape[-1]
        flat = u.reshape(rows, o)  # (n, o)
        down, up = a, b if gain is None else (c * gain)[:, None] * b  # A (r, i), c g ⊙ B (o, r)
        if down.dtype != u.dtype or up.dtype != u.dtype:
            down, up = down.to(u.dtype), up.to(u.dtype)
        x_hat = None if x is None else (dropped(x, p, ctx.seed) if p else x).reshape(rows, i)  # x̂ (n, i)
        if torch.is_grad_enabled() and (needs[3] or needs[5]):  # a second derivative wants h with its graph
            if x_hat is None:
                raise RuntimeError("a second derivative with A frozen: x isn't kept\n  use torch.func, or train A too")
            h = x_hat @ down.mT
        uh = times(flat.mT, h, s) if needs[3] or needs[5] else None  # s uᵀ h (o, r)
        v = times(flat, up, s)  # s u (c g ⊙ B) (n, r), which dA and dx share
        da = None if x_hat is None else v.mT @ x_hat
        dx = None
        if needs[1]:
            # its product has the shape of x, no view gives it: autograd adds other gradients of x into its memory
            dx = v.view(*u.shape[:-1], len(down)) @ down
            dx = dropped(dx, p, ctx.seed) if p else dx
        if gain is None:
            return u, dx, da, uh, None, None, None, None, None  # uh is dB here
        k_minus_1 = c * (gain - 1)  # (o,), with the digits that k rounds off
        dy = torch.addcmul(u, u, k_minus_1.to(u.dtype)) if needs[0] else None
        db = (c * gain)[:, None] * uh if needs[3] else None
        dg = None
        if needs[5]:
            # d = W x + s B h is never formed: Σ_tokens u ⊙ (s B h) is Σ_r (s uᵀ h) ⊙ B, with r terms in place of n
            wx = (y if bias is None else y - bias).reshape(rows, o)
            dg = c * (torch.linalg.vecdot(flat, wx, dim=0).to(gain.dtype) + (uh * b).sum(1))
        dbias = -k_minus_1 * flat.sum(0).to(gain.dtype) if needs[7] else None
        return dy, dx, da, db, None, dg, None, dbias, None


def times(a: Tensor, b: Tensor, s: float) -> Tensor:
    """s a b, in one pass."""
    return a @ b if s == 1 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=s)


def no_autocast(x: Tensor) -> AbstractContextManager[Any] | None:
    """A context where x's device has no autocast, so that products are in the dtypes given; None if it has none."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else None
