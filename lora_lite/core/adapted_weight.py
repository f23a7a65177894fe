"""A weight that knows its adapters: it stands in the parameter's place while a module that multiplies by it runs.

A hook on a layer sees no product that is made outside of the layer's call: a matrix of experts, nn.MultiheadAttention's
projections, a convolution's kernel by patches, a layer whose weight the model reads. This tensor does. It answers

    x Wᵀ, W x, x W[e], grouped products     by the methods' own hooks, on the rows that are multiplied: routed tokens
    convolutions, lookups in an embedding   a low-rank update by two small operations of the same kind, a change of y
                                            alone on y
    questions of shape, dtype and place     as the parameter would
    any other use                           as W', what the hooks make of the unit vectors: exact for affine methods,
                                            dearer, and rounded to the weight's dtype, as a merge is
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_map

from ..errors import TargetError, VariantError
from .adapt import adapt_input, adapt_output
from .layer import Layer
from .scale import Scale
from .state import Site
from .variant import LowRank, Variant, lookup

COLUMNS = 512  # unit vectors that go through the hooks at a time
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Use:
    """One adapter at work on a weight, in one call."""

    module: nn.Module
    site: Site
    scale: Scale

    def view(self, dtype: torch.dtype, expert: int | None, bias: Tensor | None = None) -> Layer:
        """The layer, or one of its experts, as the method sees it."""
        if not is_dynamo_compiling():  # a graph can't note it
            self.site.ran = True
        return Layer(self.module, self.site, dtype, expert, {"bias": bias}, self.scale)

    def of_experts(self, dtype: torch.dtype) -> Callable[[int], Layer]:
        """As `view`, for many experts: each tensor is parted once, or the backward would add up stacks of zeros."""
        self.site.ran = True
        parts = {name: getattr(self.module, self.site.attribute(name)).unbind() for name in self.site.specs}

        def view(expert: int) -> Layer:
            shown = {"bias": None, **{name: tensors[expert] for name, tensors in parts.items()}}
            return Layer(self.module, self.site, dtype, expert, shown, self.scale)

        return view

    @property
    def variant(self) -> Any:
        return lookup(self.site.cfg.variant)


class AdaptedWeight(Tensor):
    """A frozen weight, or a view of a part of it, with adapters in the order attached."""

    plain: Tensor
    uses: tuple[Use, ...]
    is_flipped: bool  # its last two axes are (d_in, d_out)
    experts: Any  # which it is of: an index, a tensor of them for a stack (s, ...), None for a layer of one

    @staticmethod
    def of(
        plain: Tensor, uses: Sequence[Use], is_flipped: bool, experts: Tensor | int | None = None
    ) -> "AdaptedWeight":
        """`plain` is as it lies on the module: (d_out, d_in), (d_in, d_out) if flipped, a kernel, or a stack."""
        # An alias of the parameter's memory: shape, dtype, device and layout are its own, and nothing is copied.
        weight: AdaptedWeight = Tensor._make_subclass(AdaptedWeight, plain.detach())
        weight.plain, weight.uses, weight.is_flipped, weight.experts = plain, tuple(uses), is_flipped, experts
        return weight

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            answer = _ANSWERS.get(function)
            if answer is None and "grouped_mm" in _name(function):  # torch's, and transformers' where torch has none
                answer = partial(_grouped, function)
            result = None if answer is None else answer(*args, **kwargs)
            if result is not None:
                return result
            if _is_question(function):
                return function(*args, **kwargs)
            return function(*tree_map(_as_dense, args), **tree_map(_as_dense, kwargs))

    @property
    def is_stack(self) -> bool:
        return isinstance(self.experts, Tensor)

    def used_by(self, use: Use) -> "AdaptedWeight":
        """The same with one more adapter."""
        return AdaptedWeight.of(self.plain, (*self.uses, use), self.is_flipped, self.experts)

    def viewed(self, plain: Tensor, is_flipped: bool | None = None, experts: Any = "same") -> "AdaptedWeight":
        """A view of the weight, with the same adapters on it."""
        is_flipped = self.is_flipped if is_flipped is None else is_flipped
        return AdaptedWeight.of(plain, self.uses, is_flipped, self.experts if isinstance(experts, str) else experts)

    def of_expert(self, index: int) -> "AdaptedWeight":
        """One matrix of a stack."""
        return self.viewed(self.plain[index], experts=int(self.experts[index]))


# ---- rows: what a hook on a linear layer would do -----------------------------------------------


def _rows(weight: AdaptedWeight, x: Float[Tensor, "*b i"], product: Product, bias: Tensor | None = None) -> Tensor:
    """The adapters' output for x, with the layer's own product given."""
    expert = weight.experts
    for use in weight.uses:
        x = adapt_input(use.view(x.dtype, expert), x)
    y = product(x)  # (*b, d_out); by the very operation that the module asked for, so that a fresh adapter is bit-exact
    x = x.to(y.dtype)
    for use in weight.uses:
        y = adapt_output(use.view(y.dtype, expert, bias), x, y)
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


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    if not isinstance(weight, AdaptedWeight) or weight.is_flipped or weight.is_stack or weight.plain.ndim != 2:
        return None
    plain = weight.plain
    if bias is None or all(_factors(use, use.view(x.dtype, weight.experts)) for use in weight.uses):
        return _rows(weight, x, lambda x: F.linear(x, plain, bias), bias)
    # Elsewhere the model may add this bias by itself, so no method may see it: their change of the bare product.
    change = _rows(weight, x, lambda x: F.linear(x, plain)) - F.linear(x, plain)
    return F.linear(x, plain, bias) + change


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


def _grouped(function: Any, x: Any, weight: Any, *args: Any, offs: Tensor | None = None, **kwargs: Any) -> Any:
    """x (n, i) in groups of rows, one for each expert, that end at offs (experts,)."""
    if not isinstance(weight, AdaptedWeight) or not (weight.is_stack and weight.is_flipped) or x.ndim != 2:
        return None
    if offs is None or args:
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


# ---- convolutions and embeddings ----------------------------------------------------------------


def _factors(use: Use, view: Layer) -> LowRank | None:
    """The method as a low-rank update, if it is one."""
    if use.variant.low_rank is Variant.low_rank:
        return None
    factors = use.variant.low_rank(view)
    return None if factors is None else LowRank(*factors)


def _acts_on_y(use: Use) -> bool:
    return use.variant.forward_input is None and not use.variant.reads_input


def _channelwise(weight: AdaptedWeight, y: Tensor, bias: Tensor | None, branch: Callable[[LowRank], Tensor]) -> Any:
    """y (*b, o) with the adapters' changes, or None if a method has no such form. `branch` makes B (s ⊙ A x)."""
    views = [use.view(y.dtype, None, bias) for use in weight.uses]
    forms = [_factors(use, view) for use, view in zip(weight.uses, views, strict=True)]
    if not all(form or _acts_on_y(use) for form, use in zip(forms, weight.uses, strict=True)):
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
        a = factors.a.to(x.dtype).unflatten(1, weight.plain.shape[1:])  # (r, i / groups, *k)
        b = factors.b.to(x.dtype).reshape(*factors.b.shape, *ones)  # (o, r, *1)
        # Every group of channels goes through the same A; the outputs of a group see their own r channels.
        parts = rows.reshape(-1, rows.shape[1] // groups, *rows.shape[2:])  # (n g, i / g, *l)
        h = function(parts, a, None, stride, padding, dilation)  # (n g, r, *l')
        s = factors.s.view(-1, *ones) if isinstance(factors.s, Tensor) and factors.s.ndim else factors.s
        h = (h * s).reshape(len(rows), -1, *h.shape[2:])  # (n, g r, *l')
        out = function(h, b, None, 1, 0, 1, groups)  # (n, o, *l')
        return (out if x.ndim == spatial + 2 else out[0]).movedim(-1 - spatial, -1)

    y = function(x, weight.plain, bias, stride, padding, dilation, groups)  # (n, o, *l')
    channels_last = _channelwise(weight, y.movedim(-1 - spatial, -1), bias, branch)
    return None if channels_last is None else channels_last.movedim(-1, -1 - spatial)


def _lookup(ids: Tensor, weight: Any, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Any:
    """One-hot vectors are never formed for a method that has another form: A x is a lookup in Aᵀ."""
    if not isinstance(weight, AdaptedWeight) or not weight.is_flipped:
        return None

    def branch(factors: LowRank) -> Tensor:
        h = F.embedding(ids, factors.a.mT, padding_idx)  # (*b, r); the padding's column of A gets no gradient
        return (h * factors.s) @ factors.b.mT  # (*b, d)

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
    given = dict(zip(defaults, args, strict=False)) | kwargs
    return [given.get(name, default) for name, default in defaults.items()]


# ---- views of the weight ------------------------------------------------------------------------


def _transposed(weight: Any, *axes: Any) -> Any:
    axes = tuple(axis % weight.plain.ndim for axis in axes) or (0, 1)
    if sorted(axes) != [weight.plain.ndim - 2, weight.plain.ndim - 1]:
        return None
    return weight.viewed(weight.plain.mT, not weight.is_flipped)


def _item(weight: Any, index: Any) -> Any:
    if not isinstance(weight, AdaptedWeight) or not weight.is_stack:
        return None
    if isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64):
        if index.ndim == 1:
            return weight.viewed(weight.plain[index], experts=weight.experts[index])
        return weight.of_expert(int(index)) if not index.ndim else None
    return weight.of_expert(index) if isinstance(index, int) else None


def _unbound(weight: Any, dim: int = 0) -> Any:
    return None if dim or not weight.is_stack else tuple(map(weight.of_expert, range(len(weight.plain))))


def _cast(weight: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(weight, AdaptedWeight):
        return None  # x.to(weight): a question of dtype and device
    return weight.viewed(weight.plain.to(*args, **kwargs))


def _same(weight: Any, *_: Any) -> Any:
    return weight if weight.plain.is_contiguous() else None


# ---- W' itself ----------------------------------------------------------------------------------


def _as_dense(value: Any) -> Any:
    return dense(value) if isinstance(value, AdaptedWeight) else value


def dense(weight: AdaptedWeight) -> Tensor:
    """W' in the shape and dtype of the weight, differentiable in the adapters' tensors.

    Raises:
        TargetError: in training, for a method that drops inputs: a matrix has none.
        VariantError: for a method that adds a constant, which no weight holds.
    """
    if weight.is_stack:
        return torch.stack([dense(weight.of_expert(i)) for i in range(len(weight.plain))])
    plain = weight.plain.mT if weight.is_flipped else weight.plain
    matrix = plain.flatten(1)  # (o, i); of a kernel (o, i / groups · k)
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))  # rounded once, at the end
    for use in weight.uses:
        view = use.view(matrix.dtype, weight.experts)
        factors = _factors(use, view)
        if factors is None:
            matrix = _of_unit_vectors(view, matrix)
        elif not view.is_off:
            if factors.dropout:
                raise TargetError(
                    f"{view.path}: dropout acts on a layer's input, and this module multiplies by its weight where "
                    f"the input can't be seen\n  use dropout=0 there (per_layer)"
                )
            delta = (factors.b * factors.s).to(matrix.dtype) @ factors.a.to(matrix.dtype)  # (o, i)
            matrix = factors.added(matrix.mT, delta.mT, None).mT
    matrix = matrix.to(plain.dtype).reshape(plain.shape)
    # In memory as the weight lies: a product of another layout would round otherwise.
    return (matrix.mT if weight.is_flipped else matrix).contiguous()


def _of_unit_vectors(layer: Layer, matrix: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
    blocks = []
    for start in range(0, layer.in_features, COLUMNS):
        columns = torch.arange(start, min(start + COLUMNS, layer.in_features), device=matrix.device)
        unit = F.one_hot(columns, layer.in_features).to(matrix.dtype)  # (n, i)
        x = adapt_input(layer, unit)
        # The same object where the method leaves inputs alone: no product then.
        blocks.append(adapt_output(layer, x, matrix.mT[columns] if x is unit else x @ matrix.mT))  # (n, o)
    zero = matrix.new_zeros(1, layer.in_features)
    x = adapt_input(layer, zero)
    if adapt_output(layer, x, x @ matrix.mT).any():
        raise VariantError(
            f"{layer.path}: {layer.cfg.variant!r} adds a constant, and no weight holds one\n"
            f"  leave this layer out with exclude_names: its weight is read in a way that shows no output"
        )
    return torch.cat(blocks).mT


# ---- which function is what ---------------------------------------------------------------------


def _getter(name: str) -> Any:
    """The function by which torch names the reading of a tensor's attribute."""
    return getattr(Tensor, name).__get__


_ANSWERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _lookup,
    **dict.fromkeys((torch.matmul, Tensor.matmul, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), _matmul),
    **dict.fromkeys((Tensor.t, torch.t, _getter("T"), _getter("mT")), lambda weight: _transposed(weight, -1, -2)),
    **dict.fromkeys((Tensor.transpose, torch.transpose, Tensor.swapaxes), _transposed),
    Tensor.__getitem__: _item,
    Tensor.unbind: _unbound,
    Tensor.to: _cast,
    Tensor.contiguous: _same,
    Tensor.detach: lambda weight: weight if isinstance(weight, AdaptedWeight) else None,
    **{function: partial(_convolution, function) for function in (F.conv1d, F.conv2d, F.conv3d)},
}
_QUESTIONS = frozenset(
    [
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "is_contiguous",
        "data_ptr",
        "element_size",
        "storage_offset",
        "__len__",
        "__hash__",
        "is_floating_point",
        "is_complex",
        "get_device",
    ]
)


def _name(function: Any) -> str:
    return getattr(function, "__name__", "")


def _is_question(function: Any) -> bool:
    """Does it ask for shape, dtype, device, ..., and not for numbers?"""
    return (_name(function) == "__get__" and function not in _NUMBERS) or _name(function) in _QUESTIONS


_NUMBERS = tuple(map(_getter, ("data", "real", "H", "mH")))
