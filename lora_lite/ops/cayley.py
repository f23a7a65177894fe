"""Rotations near the identity: R = I + T, where T is formed by itself and is 0 exactly where Q is.

    exact      R = (I + Q)(I - Q)⁻¹                         T = 2 (I - Q)⁻¹ Q                  orthogonal
    n terms    R = (I + Q)(I + Q + ... + Qⁿ⁻²)              T = 2Q + 2Q² + ... + 2Qⁿ⁻² + Qⁿ⁻¹    nearly so for a small Q

Both turn the same way for a skew Q = -Qᵀ. A difference R - I would lose the digits of a small turn, T keeps them.

`add_turn` is y + s x T for a T of blocks. With u the gradient of that, dx = s u Tᵀ and dT = s xᵀ u by block; T is made
again for the gradients of what it is made of, and the product isn't.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .low_rank import is_traced_or_transformed, no_autocast
from .recompute import gradients


def skew(v: Float[Tensor, "*n p"], s: int) -> Float[Tensor, "*n s s"]:
    """Q = -Qᵀ with the p = s (s - 1) / 2 numbers of each row above its diagonal, row by row."""
    rows, columns = torch.triu_indices(s, s, 1, device=v.device)
    above = (rows * s + columns).expand(v.shape)  # half the time of an index by rows and columns
    upper = v.new_zeros(*v.shape[:-1], s * s).scatter(-1, above, v).unflatten(-1, (s, s))
    return upper - upper.mT


def bounded(q: Float[Tensor, "*n s s"], eps: float | None) -> Float[Tensor, "*n s s"]:
    """Q, shrunk to ‖Q‖ = eps where it is larger; Q itself without a bound."""
    if eps is None:
        return q
    norm = torch.linalg.vector_norm(q, dim=(-2, -1), keepdim=True)
    return q * torch.where(norm > eps, eps / (norm + 1e-12), 1)


def rotation_less_identity(q: Float[Tensor, "*n s s"], terms: int | None = None) -> Float[Tensor, "*n s s"]:
    """T, exact or of so many terms; in the dtype of Q, float32 at least."""
    if terms is None:
        eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        turn: Tensor = torch.linalg.solve_ex(eye - q, 2 * q).result  # never singular: Q's eigenvalues are imaginary
        return turn
    turn = q
    for _ in range(terms - 2):  # Horner's scheme: Q (2 + Q (2 + ... Q))
        turn = 2 * q + q @ turn
    return turn


def turned_by(x: Float[Tensor, "*b i"], turn: Float[Tensor, "n s s"]) -> Float[Tensor, "*b i"]:
    """x T of each block of s neighbours with its own T, or with the one T of all blocks: what x R adds to x."""
    blocks = x.unflatten(-1, (-1, turn.shape[-1]))  # (*b, i / s, s)
    turn = turn.to(x.dtype)
    if len(turn) == 1:
        return (blocks @ turn[0]).flatten(-2)
    return torch.einsum("...nk,nkc->...nc", blocks, turn).flatten(-2)


def add_turn(
    y: Float[Tensor, "*b i"],
    x: Float[Tensor, "*b i"],
    turn: Callable[..., Float[Tensor, "n s s"]],
    *tensors: Tensor,
    s: Any = 1.0,
) -> Float[Tensor, "*b i"]:
    """y + s x T in y's dtype, for T = turn(*tensors) as in `turned_by`. The backward keeps x and the tensors.

    turn    a pure function of tensors in any dtype
    """
    if is_traced_or_transformed() or isinstance(s, Tensor):
        return y + s * turned_by(x, turn(*tensors))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, *tensors)):
        out: Tensor = _AddTurn.apply(None if y is x else y, x, turn, float(s), *tensors)
        return out
    with no_autocast(x) or nullcontext():
        return _turned(y, x, turn(*tensors), s)


def _blocks(x: Float[Tensor, "*b i"], n: int, width: int) -> Float[Tensor, "n m s"]:
    """Block by block, without a copy of a contiguous x; all in one where there is one T."""
    return x.reshape(1, -1, width) if n == 1 else x.reshape(-1, n, width).transpose(0, 1)


def _turned(y: Tensor, x: Tensor, turn: Float[Tensor, "n s s"], s: float) -> Float[Tensor, "*b i"]:
    (n, width, _), out = turn.shape, torch.empty(y.shape, dtype=y.dtype, device=y.device)
    turn, into = turn.to(x.dtype), _blocks(out, n, width)  # a view
    torch.baddbmm(_blocks(y, n, width), _blocks(x, n, width), turn, alpha=s, out=into)
    return out


class _AddTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        y, x, turn, s, *tensors = operands
        ctx.turn, ctx.s, ctx.is_same = turn, s, y is None
        ctx.save_for_backward(x, *tensors)
        with no_autocast(x) or nullcontext():
            return _turned(x if y is None else y, x, turn(*tensors), s)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with no_autocast(grads[0]) or nullcontext():
            return _AddTurn._backward(ctx, grads[0])

    @staticmethod
    def _backward(ctx: Any, u: Tensor) -> Any:
        (x, *tensors), s, needs, is_same = ctx.saved_tensors, ctx.s, ctx.needs_input_grad, ctx.is_same
        dy, dx = None if is_same else u, None
        if torch.is_grad_enabled():  # second derivatives: of the plain form

            def change(x: Tensor, *tensors: Tensor) -> Tensor:
                turned = s * turned_by(x, ctx.turn(*tensors))
                return x + turned if is_same else turned

            dx, *rest = gradients(change, (x, *tensors), (needs[1], *needs[4:]), u)
            return dy, dx, None, None, *rest

        def of_turn(turn: Tensor) -> Tensor:  # (n, s, s), which dx needs, too: it is formed once
            nonlocal dx
            n, width, _ = turn.shape
            if needs[1]:
                back = turn.detach().mT
                dx = _turned(u, u, back, s) if is_same else s * turned_by(u, back)
            # copies: of strided blocks the product takes three times as long in bfloat16
            product = torch.bmm(_blocks(x, n, width).contiguous().mT, _blocks(u, n, width).contiguous())
            return product if s == 1 else s * product

        rest = gradients(ctx.turn, tuple(tensors), needs[4:], of_turn)
        return dy, dx, None, None, *rest
