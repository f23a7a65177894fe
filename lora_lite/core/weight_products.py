"""The products that an `AdaptedWeight` answers by the methods' own hooks: torch's functions, with a weight among them.

Each gets the arguments of the function that it answers, and gives None where it has no such form: then W' is taken.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .adapt import adapt_input, adapt_output
from .adapted_weight import AdaptedWeight, Use, answers
from .layer import Layer
from .variant import LowRank

Product = Callable[[Tensor], Tensor]


def _rows(weight: AdaptedWeight, x: Float[Tensor, "*b i"], product: Product) -> Float[Tensor, "*b o"]:
    """The adapters' output for x, with the layer's own product given."""
    expert = weight.experts
    for use in weight.uses:
        x = adapt_input(use.view(x.dtype, expert), x)
    y = product(x)  # (*b, d_out); by the very operation that the module asked for, so that a fresh adapter is bit-exact
    x = x.to(y.dtype)
    for use in weight.uses:
        y = adapt_output(use.view(y.dtype, expert), x, y)
    return y


def _by_expert(
    weight: AdaptedWeight, ids: Int[Tensor, "n"], x: Float[Tensor, "n *b i"], product: Product
) -> Float[Tensor, "n *b o"]:
    """As `_rows`, with an expert for each row of the first axis. The product is one; adapters run on their rows."""
    if not len(ids):
        return product(x)
    order = ids.argsort(stable=True)  # (n,)
    experts, counts = torch.unique_consecutive(ids[order], return_counts=True)
    sizes, back = counts.tolist(), order.argsort()

    def each(adapt: Callable[[int, Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        parts = zip(experts.tolist(), x[order].split(sizes), y[order].split(sizes), strict=True)
        return torch.cat([adapt(expert, *rows) for expert, *rows in parts])[back]

    def new_input(view: Callable[[int], Layer], expert: int, x: Tensor, _: Tensor) -> Tensor:
        return adapt_input(view(expert), x)

    def new_output(view: Callable[[int], Layer], expert: int, x: Tensor, y: Tensor) -> Tensor:
        return adapt_output(view(expert), x.to(y.dtype), y)

    for use in weight.uses:
        if use.variant.forward_input is not None:
            x = each(partial(new_input, use.of_experts(x.dtype)), x, x)
    y = product(x)
    for use in weight.uses:
        if use.variant.forward is not None:
            y = each(partial(new_output, use.of_experts(y.dtype)), x, y)
    return y


@answers(F.linear)
def _linear(inputs: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    if not isinstance(weight, AdaptedWeight) or weight.is_stack or weight.plain.ndim != 2:
        return None
    plain = weight.plain
    if bias is None and not weight.is_flipped:
        return _rows(weight, inputs, lambda x: F.linear(x, plain))

    def branch(factors: LowRank) -> Tensor:
        return factors.of_rows(inputs, len(plain)) if weight.is_flipped else factors.branch(inputs)

    result = _channelwise(weight, F.linear(inputs, plain, bias), bias, branch, False, weight.is_flipped)
    if result is not None or weight.is_flipped:  # flipped: a head that is tied to an adapted embedding
        return result
    # Elsewhere the model may add this bias by itself, so no method may see it: their change of the bare product.
    bare = F.linear(inputs, plain)
    return F.linear(inputs, plain, bias) + (
        _rows(weight, inputs, lambda x: bare if x is inputs else F.linear(x, plain)) - bare
    )


@answers(torch.matmul, Tensor.matmul, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)
def _matmul(a: Any, b: Any) -> Tensor | None:
    if isinstance(b, AdaptedWeight) and not isinstance(a, AdaptedWeight):
        if b.is_stack:
            fits = b.is_flipped and a.ndim == 3 and len(a) == len(b.plain)
            return _by_expert(b, b.experts, a, lambda x: x @ b.plain) if fits else None
        return _rows(b, a, lambda x: x @ b.plain) if b.is_flipped and b.plain.ndim == 2 else None
    if not isinstance(a, AdaptedWeight) or isinstance(b, AdaptedWeight) or a.is_flipped:
        return None
    if a.is_stack:  # (s, o, i) @ (s, i, n)
        fits = b.ndim == 3 and len(b) == len(a.plain)
        return _by_expert(a, a.experts, b.mT, lambda x: (a.plain @ x.mT).mT).mT if fits else None
    if a.plain.ndim != 2:
        return None
    return _rows(a, b, lambda x: a.plain @ x) if b.ndim == 1 else _rows(a, b.mT, lambda x: (a.plain @ x.mT).mT).mT


def _grouped(function: Any, x: Any, weight: Any, bias: Any = None, offs: Tensor | None = None, **kwargs: Any) -> Any:
    """x (n, i) in groups of rows, one for each expert, that end at offs (experts,)."""
    if not isinstance(weight, AdaptedWeight) or not (weight.is_stack and weight.is_flipped) or x.ndim != 2:
        return None
    if offs is None or bias is not None:  # F.grouped_mm hands bias=None on
        return None
    ends = offs.long()
    ids = weight.experts.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)))  # (m,)
    rest = len(x) - len(ids)  # rows after the last group belong to no expert of this process

    def product(rows: Tensor) -> Tensor:
        whole = torch.cat([rows, x[len(ids) :]]) if rest else rows
        return function(whole, weight.plain, offs=offs, **kwargs)

    if not rest:
        return _by_expert(weight, ids, x, product)
    y = function(x, weight.plain, offs=offs, **kwargs)
    return torch.cat([_by_expert(weight, ids, x[: len(ids)], lambda rows: product(rows)[: len(ids)]), y[len(ids) :]])


def _acts_on_y(use: Use) -> bool:
    return use.variant.forward_input is None and not use.variant.reads_input


def _channelwise(
    weight: AdaptedWeight,
    y: Float[Tensor, "*b o"],
    bias: Tensor | None,
    branch: Callable[[LowRank], Tensor],
    shows_bias: bool = True,
    is_mirrored: bool = False,
) -> Float[Tensor, "*b o"] | None:
    """y with the adapters' changes, or None if a method has no such form. `branch` makes B (s ⊙ A x).

    A method that acts on y alone has one only where it may see the bias in it. `is_mirrored`: the product is one with
    the transpose of the matrix that the methods know, as in a head that shares an embedding's weight.
    """
    views = [use.view(y.dtype, weight.experts, bias) for use in weight.uses]
    forms = [use.factors(view) for use, view in zip(weight.uses, views, strict=True)]
    if is_mirrored:  # a gain or a shift is of outputs, which are the inputs then
        forms, shows_bias = [f if f and f.gain is None and f.shift is None else None for f in forms], False
    if not all(form or (shows_bias and _acts_on_y(use)) for form, use in zip(forms, weight.uses, strict=True)):
        return None
    for view, factors in zip(views, forms, strict=True):
        if factors is None:
            y = adapt_output(view, y, y)
        elif not view.is_off:
            y = factors.added(y, branch(factors), view.bias)
    return y


def _convolution(function: Any, x: Tensor, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Patches are never formed: A is a kernel of r channels, B one of size 1."""
    if not isinstance(weight, AdaptedWeight):
        return None
    stride, padding, dilation, groups = _bound(args, kwargs, stride=1, padding=0, dilation=1, groups=1)
    spatial = weight.plain.ndim - 2
    ones = (1,) * spatial

    def branch(factors: LowRank) -> Tensor:
        rows = x if x.ndim == spatial + 2 else x[None]  # (n, i, *l)
        rows = F.dropout(rows, factors.dropout)
        if factors.a is None:  # B is ΔW
            kernel = (factors.b * factors.s).to(x.dtype).reshape(weight.plain.shape)
            out = function(rows, kernel, None, stride, padding, dilation, groups)
            return (out if x.ndim == spatial + 2 else out[0]).movedim(-1 - spatial, -1)
        by_group = factors.a.ndim == 3  # PEFT's: (g, r, i k) and (g, o / g, r)
        a, b = (factor.to(x.dtype).flatten(0, factor.ndim - 2) for factor in (factors.a, factors.b))
        a = a.unflatten(1, (-1, *weight.plain.shape[2:]))  # (r, i / g, *k), or (g r, i, *k)
        b = b.reshape(*b.shape, *ones)  # (o, r, *1)
        # Every group of channels goes through the same A; the outputs of a group see their own r channels.
        parts = rows if by_group else rows.reshape(-1, rows.shape[1] // groups, *rows.shape[2:])  # (n g, i / g, *l)
        h = function(parts, a, None, stride, padding, dilation)  # (n g, r, *l')
        s = factors.s.view(-1, *ones) if isinstance(factors.s, Tensor) and factors.s.ndim else factors.s
        h = (h * s).to(h.dtype).reshape(len(rows), -1, *h.shape[2:])  # (n, g r, *l')
        out = function(h, b, None, 1, 0, 1, groups)  # (n, o, *l')
        return (out if x.ndim == spatial + 2 else out[0]).movedim(-1 - spatial, -1)

    y = function(x, weight.plain, bias, stride, padding, dilation, groups)  # (n, o, *l')
    channels_last = _channelwise(weight, y.movedim(-1 - spatial, -1), bias, branch)
    return None if channels_last is None else channels_last.movedim(-1, -1 - spatial)


@answers(F.embedding)
def _lookup(ids: Tensor, weight: Any, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Any:
    """One-hot vectors are never formed for a method that has another form: A x is a lookup in Aᵀ."""
    if not isinstance(weight, AdaptedWeight) or not weight.is_flipped:
        return None

    def branch(factors: LowRank) -> Tensor:
        if factors.a is None:  # B is ΔW
            return F.embedding(ids, factors.b.mT, padding_idx) * factors.s
        if not factors.is_dense:
            places = torch.searchsorted(factors.a, ids).clamp(max=len(factors.a) - 1)  # (*b)
            has_change = (factors.a[places] == ids)[..., None]
            return F.embedding(places, factors.b.mT) * has_change * factors.s
        h = F.embedding(ids, factors.a.mT, padding_idx)  # (*b, r); the padding's column of A gets no gradient
        return (h * factors.s).to(factors.b.dtype) @ factors.b.mT  # (*b, d)

    y = F.embedding(ids, weight.plain, padding_idx, *args, **kwargs)  # (*b, d)
    result = _channelwise(weight, y, None, branch)
    if result is not None:
        return result
    used, places = ids.unique(return_inverse=True)
    one_hot = torch.zeros(len(used), len(weight.plain), dtype=y.dtype, device=y.device)  # (u, V), of tokens that occur
    one_hot.scatter_(1, used[:, None], 1)
    return _rows(weight, one_hot, lambda x: x @ weight.plain)[places]


def _bound(args: tuple[Any, ...], kwargs: dict[str, Any], **defaults: Any) -> list[Any]:
    """Arguments in the order of the defaults' names."""
    given = dict(zip(list(defaults)[: len(args)], args, strict=True)) | kwargs
    return [given.get(name, default) for name, default in defaults.items()]


_function: Any
for _function in (F.conv1d, F.conv2d, F.conv3d):
    answers(_function)(partial(_convolution, _function))
for _function in (F.grouped_mm, torch._grouped_mm):
    answers(_function)(partial(_grouped, _function))
