"""The one op of every low-rank update: as many passes as the maths has, and little kept for the backward but x.

    y' = y + s (x̂ Aᵀ) Bᵀ                                     x̂ = drop(x)
    y' = y + c [(g - 1) ⊙ (y - b) + g ⊙ s (x̂ Aᵀ) Bᵀ]          with a gain g (o,) on the direction d = W x + s B A x̂

Plain autograd keeps x̂ and its mask, x̂ Aᵀ, casts of A and B, and for the gain W x, B A x̂ and their sum. Here, with u
the gradient of y', h = x̂ Aᵀ and k = 1 - c + c g:

    dB = c g ⊙ s uᵀ h      dA = (s u (c g ⊙ B))ᵀ x̂      dx = s u (c g ⊙ B) A      dy = k ⊙ u
    dg = c Σ_tokens u ⊙ d = c [Σ_tokens u ⊙ (y - b) + Σ_r s uᵀ h ⊙ B]

so from x, the parameters, h (r numbers a token) and, with a gain, y. x̂ is made again from the seed of its mask. Without
gradients, of a few tokens, products run in x's dtype, float32 at least: at that size the casts of A and B are what
takes time, and float32 products are the faster ones on a CPU.

torch.compile, torch.func and forward-mode AD take the plain form, which they differentiate and fuse on their own.

The update is LoRA's (Hu et al. 2021, arXiv:2106.09685, 4.1), the gain DoRA's (Liu et al. 2024, arXiv:2402.09353, 4.3).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, compiler
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

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
    if gain is not None:
        gain = _in(gain, torch.promote_types(gain.dtype, x.dtype))
    if (
        is_dynamo_compiling()
        or compiler._is_compiling_flag
        or _innermost_transform() is not None
        or forward_ad._current_level >= 0
    ):
        return _plain(y, x, a, b, s, dropout, gain, c, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (a, b, gain, x, y, bias)):
        out: Tensor = _AddLowRank.apply(y, x, a, b, gain, bias, float(s), float(c), dropout)
        return out
    few = not dropout and x.numel() <= FEW * x.shape[-1]
    if few and not _is_autocast_on():
        return _few(y, x, a, b, s, gain, c, bias)
    with _as_written(x):
        if few:
            return _few(y, x, a, b, s, gain, c, bias)
        return _many(y, _dropped(x, dropout, _seed(dropout)), a, b, s, gain, c, bias)[0]


def is_transformed() -> bool:
    """Is a torch.func transform at work, or a level of forward_ad? Neither has a public question for it."""
    return _innermost_transform() is not None or forward_ad._current_level >= 0


def _plain(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: Any, p: float, gain: Tensor | None, c: Any, bias: Tensor | None
) -> Tensor:
    branch = ((F.dropout(x, p) @ a.to(x.dtype).mT) * s) @ b.to(x.dtype).mT
    if gain is None:
        return y + branch
    wx = y if bias is None else y - bias
    return y + c * ((gain - 1).to(x.dtype) * wx + gain.to(x.dtype) * branch)


def _few(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: Any, gain: Tensor | None, c: Any, bias: Tensor | None
) -> Tensor:
    """In float32 throughout (float64 for x in it), rounded once."""
    if x.dtype not in WIDE:
        x = x.float()
    if a.dtype != x.dtype or b.dtype != x.dtype:
        a, b = a.to(x.dtype), b.to(x.dtype)
    branch = F.linear(F.linear(x, a), b)
    if gain is None:
        if x.dtype == y.dtype:
            return torch.add(y, branch, alpha=s)
        return (branch.add_(y) if s == 1 else torch.add(y, branch, alpha=s)).to(y.dtype)
    out = torch.empty_like(y)
    if bias is None and c == 1:
        return torch.mul(torch.add(y, branch, alpha=s), gain, out=out)
    wx = _in(y, x.dtype) if bias is None else _in(y, x.dtype) - _in(bias, x.dtype)
    return torch.add(y, gain * torch.add(wx, branch, alpha=s) - wx, alpha=c, out=out)


def _many(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: Any, gain: Tensor | None, c: Any, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y' and h (n, r), in the dtype of x; two products, the second with the sum in it."""
    (o, _), (_, i), rows = b.shape, a.shape, x.numel() // x.shape[-1]
    if gain is not None:
        wx = y if bias is None else y - bias
        y = torch.addcmul(y, wx, (c * (gain - 1)).to(y.dtype))
        b = (c * gain)[:, None] * b
    h = F.linear(x.reshape(rows, i), _in(a, x.dtype))
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)  # no view, which could not be changed in place later
    torch.addmm(y.reshape(rows, o), h, _in(b, x.dtype).mT, alpha=s, out=out.view(rows, o))
    return out, h


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        s: float,
        c: float,
        p: float,
    ) -> Tensor:
        seed = _seed(p)
        with _as_written(x):
            out, h = _many(y, _dropped(x, p, seed), a, b, s, gain, c, bias)
        ctx.save_for_backward(x, a, b, h, gain, *((None, None) if gain is None else (bias, y)))
        ctx.s, ctx.c, ctx.p, ctx.seed = s, c, p, seed
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, a, b, h, gain, bias, y = ctx.saved_tensors
        (u,), s, c = grads, ctx.s, ctx.c
        (o, _), (_, i), rows = b.shape, a.shape, x.numel() // x.shape[-1]
        with _as_written(x):
            flat, dropped = u.reshape(rows, o), _dropped(x, ctx.p, ctx.seed).reshape(rows, i)
            low, up = _in(a, x.dtype), _in(b if gain is None else (c * gain)[:, None] * b, x.dtype)
            needs = ctx.needs_input_grad
            if torch.is_grad_enabled():
                h = dropped @ low.mT  # what was kept of it has no graph
            uh = None
            if needs[3] or needs[4]:
                uh = _in(_product(flat.mT, h, s), b.dtype)  # (o, r)
            v = _product(flat, up, s)  # (n, r)
            da = _in(v.mT @ dropped, a.dtype) if needs[2] else None
            # in the shape of x by its product, not by a view: autograd adds other gradients of x into its memory
            dx = _dropped(v.view(*x.shape[:-1], len(low)) @ low, ctx.p, ctx.seed) if needs[1] else None
            if gain is None:
                return u, dx, da, uh, None, None, None, None, None
            less = c * (gain - 1)  # k - 1
            dy = torch.addcmul(u, u, less.to(u.dtype)) if needs[0] else None
            db = _in((c * gain)[:, None] * uh, b.dtype) if needs[3] else None
            dg = None
            if needs[4]:
                wx = (y if bias is None else y - bias).reshape(rows, o)
                dg = c * (torch.linalg.vecdot(flat, wx, dim=0).to(gain.dtype) + (uh * b).sum(1))
            dbias = -less * flat.sum(0).to(gain.dtype) if needs[5] else None
        return dy, dx, da, db, dg, dbias, None, None, None


def _product(a: Tensor, b: Tensor, s: float) -> Tensor:
    """s a b, in one pass."""
    return a @ b if s == 1 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=s)


def _in(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), at once where it is; of one token such calls are a good part of the time."""
    return t if t.dtype == dtype else t.to(dtype)


def _seed(p: float) -> int:
    """Out of the CPU's generator, which gradient checkpointing sets back for a second run."""
    return int(torch.randint(2**62, (), device="cpu")) if p else 0


def _dropped(x: Tensor, p: float, seed: int) -> Tensor:
    if not p:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # one order of numbers, whatever the strides of x
    return x * mask.bernoulli_(1 - p, generator=generator).div_(1 - p)


def _as_written(x: Tensor) -> AbstractContextManager[Any]:
    """Products in the dtypes given, under autocast too."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
