"""x Sᵀ for a sparse S (o, i) of n trained numbers, on a CPU: by its rows, with no (o, i) matrix in the backward either.

    y' = y + s x Sᵀ      dx = s u S      dv_k = s Σ_tokens u[p_k] x[q_k], for the numbers v_k at places (p_k, q_k)

A number and token takes 3.5 times as long as in a float32 product with a matrix, and 15 times as long as in a bfloat16
one, of which there are three in a step, and ΔW and its gradient to be formed: see `is_sparse_enough`.
"""

import warnings
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .low_rank import WIDE, is_traced_or_transformed, no_autocast
from .recompute import gradients

DENSEST = 1 / 16
"""The share of a matrix's numbers up to which these products are the smaller work."""


class Rows(NamedTuple):
    """Where the numbers lie, row by row: as compressed rows have it.

    order      (n,) which number comes where; of length 0 where they are in order
    starts     (o + 1,) where each row starts
    columns    (n,)
    """

    order: Int[Tensor, "_"]
    starts: Int[Tensor, "_"]
    columns: Int[Tensor, "n"]


def is_sparse_enough(x: Tensor, n: int, o: int, i: int) -> bool:
    """Are n numbers of (o, i) few enough, and is this a CPU, outside of torch.compile and of every transform?"""
    return x.device.type == "cpu" and n <= DENSEST * o * i and x.numel() > 0 and not is_traced_or_transformed()


def by_rows(places: Int[Tensor, "*two n"], o: int, i: int) -> Rows:
    """The rows of a table of row-major places in (o, i), or of (2, n) rows and columns."""
    if places.dim() == 2:
        places = places[0] * i + places[1]
    places = places.int() if o * i < 2**31 else places
    order = places.new_empty(0)
    if len(places) > 1 and not (places[1:] >= places[:-1]).all():
        places, order = places.sort(stable=True)
        order = order.to(places.dtype)
    starts = F.pad(torch.bincount(places // i, minlength=o).cumsum(0), (1, 0))
    return Rows(order, starts.to(places.dtype), places % i)


def add_sparse(
    y: Float[Tensor, "*b o"], x: Float[Tensor, "*b i"], values: Float[Tensor, "n"], rows: Rows, s: Any = 1.0
) -> Float[Tensor, "*b o"]:
    """y + s x Sᵀ in y's dtype, computed in float32 (float64 for x in it). The backward keeps x, the values and where
    they lie."""
    if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad or values.requires_grad):
        out: Tensor = _AddSparse.apply(y, x, values, float(s), *rows)
        return out
    with no_autocast(x) or nullcontext():
        return _forward(y, x, values, s, rows)


def _forward(y: Tensor, x: Tensor, values: Tensor, s: Any, rows: Rows) -> Tensor:
    i, o = x.shape[-1], y.shape[-1]
    change = _tokens(_matrix(values, rows, o, i, x) @ _columns(x), y.dtype)  # (n, o)
    return y.add(change.view(y.shape), alpha=s)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype in WIDE else t.float()


def _columns(x: Float[Tensor, "*b i"]) -> Float[Tensor, "i n"]:
    return _wide(x.reshape(-1, x.shape[-1])).mT.contiguous()


def _tokens(columns: Float[Tensor, "d n"], dtype: torch.dtype) -> Float[Tensor, "n d"]:
    """Rounded before it is turned: copies that do both are ten times as slow."""
    return columns.to(dtype).mT.contiguous()


def _matrix(values: Tensor, rows: Rows, o: int, i: int, like: Tensor) -> Tensor:
    _warned_once()
    values = values.to(_wide(like.new_empty(0)).dtype)
    values = values.index_select(0, rows.order) if len(rows.order) else values
    return torch.sparse_csr_tensor(rows.starts, rows.columns, values, (o, i), check_invariants=False)


@cache
def _warned_once() -> None:
    """torch warns once in a process that such tensors are in beta; what is used of them is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0))


class _AddSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        y, x, values, s, *rows = operands
        ctx.save_for_backward(x, values, *rows)
        ctx.s = s
        with no_autocast(x) or nullcontext():
            return _forward(y, x, values, s, Rows(*rows))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with no_autocast(grads[0]) or nullcontext():
            return _AddSparse._backward(ctx, grads[0])

    @staticmethod
    def _backward(ctx: Any, u: Tensor) -> Any:
        x, values, *parts = ctx.saved_tensors
        rows, needs, s, (o, i) = Rows(*parts), ctx.needs_input_grad, ctx.s, (u.shape[-1], x.shape[-1])
        places = _row_of_each(rows, o) * i + rows.columns.long()  # (n,), in order
        if torch.is_grad_enabled():  # second derivatives: of the plain form

            def branch(x: Tensor, values: Tensor) -> Tensor:
                values = values.index_select(0, rows.order) if len(rows.order) else values
                matrix = values.new_zeros(o * i).index_add(0, places, values).view(o, i)
                return s * (x @ matrix.mT.to(x.dtype))

            return u, *gradients(branch, (x, values), needs[1:3], u), None, None, None, None
        columns, dx, dv = _columns(u), None, None  # (o, n)
        if needs[1]:
            index = torch.stack([rows.columns.long(), places // i])  # of Sᵀ, (i, o)
            in_order = _matrix(values, rows, o, i, u).values()
            transposed = torch.sparse_coo_tensor(index, in_order, (i, o), check_invariants=False, is_coalesced=True)
            dx = _tokens(torch.sparse.mm(transposed, columns), x.dtype).view(x.shape)
            dx = dx if s == 1 else dx.mul_(s)
        if needs[2]:
            flat = _wide(x.reshape(-1, i)).contiguous()  # (n, i)
            at_places = _matrix(torch.zeros_like(values), rows, o, i, u)
            dv = torch.sparse.sampled_addmm(at_places, columns, flat, beta=0.0, alpha=s).values().to(values.dtype)
            dv = torch.empty_like(dv).index_copy_(0, rows.order.long(), dv) if len(rows.order) else dv
        return u, dx, dv, None, None, None, None


def _row_of_each(rows: Rows, o: int) -> Int[Tensor, "n"]:
    return torch.arange(o, device=rows.starts.device).repeat_interleave(
        rows.starts.diff(), output_size=len(rows.columns)
    )
