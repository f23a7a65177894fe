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
from operator import getitem
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from ..base.kinds import packed_in
from ..errors import TargetError, VariantError
from .adapt import adapt_input, adapt_output, check_groups
from .layer import Layer
from .scale import Scale
from .state import Site
from .variant import LowRank, Variant, adds_constant, lookup

COLUMNS = 512  # unit vectors that go through the hooks at a time


_ADDS = (
    "{}: {!r} adds a constant, and no weight holds one\n"
    "  leave this layer out with exclude_names: its weight is read in a way that shows no rows, as under torch.compile"
)
_OPERANDS = ("input", "mat_a", "weight", "other", "mat2", "mat_b", "bias", "dim0", "dim1")
_ANSWERS: dict[Any, Callable[..., Any]] = {}
_QUESTIONS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "data_ptr", "element_size"}
_QUESTIONS |= {"storage_offset", "__len__", "__hash__", "is_floating_point", "is_complex", "get_device"}


def answers(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: what an AdaptedWeight makes of these functions of torch; None where W' is to be taken."""

    def register(answer: Callable[..., Any]) -> Callable[..., Any]:
        _ANSWERS.update(dict.fromkeys(functions, answer))
        return answer

    return register


def _getter(name: str) -> Any:
    """The function by which torch names the reading of a tensor's attribute."""
    return getattr(Tensor, name).__get__


_NUMBERS = tuple(map(_getter, ("data", "real", "H", "mH")))


def _is_question(function: Any) -> bool:
    """Does it ask for shape, dtype, device, ..., and not for numbers?"""
    name = getattr(function, "__name__", "")
    return (name == "__get__" and function not in _NUMBERS) or name in _QUESTIONS


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
        return Layer(self.module, self.site, dtype, self.scale, expert, {"bias": bias})

    def of_experts(self, dtype: torch.dtype) -> Callable[[int], Layer]:
        """As `view`, for many experts: each tensor is parted once, or the backward would add up stacks of zeros."""
        self.site.ran = True
        parts = {name: getattr(self.module, self.site.attribute(name)).unbind() for name in self.site.specs}

        def view(expert: int) -> Layer:
            shown = {"bias": None, **{name: tensors[expert] for name, tensors in parts.items()}}
            return Layer(self.module, self.site, dtype, self.scale, expert, shown)

        return view

    @property
    def variant(self) -> Any:
        return lookup(self.site.cfg.variant)

    def factors(self, view: Layer) -> LowRank | None:
        """The method as a low-rank update, if it is one."""
        factors = None if self.variant.low_rank is Variant.low_rank else self.variant.low_rank(view)
        return None if factors is None else LowRank(*factors)


class AdaptedWeight(Tensor):
    """A frozen weight, or a view of a part of it, with adapters in the order attached."""

    plain: Tensor
    uses: tuple[Use, ...]
    is_flipped: bool  # its last two axes are (d_in, d_out)
    experts: Any  # which it is of: an index, a tensor of them for a stack (s, ...), None for a layer of one
    threads: set[int]  # those that run the module which has it in a parameter's place

    @staticmethod
    def of(
        plain: Tensor, uses: Sequence[Use], is_flipped: bool, experts: Tensor | int | None = None
    ) -> "AdaptedWeight":
        """`plain` is as it lies on the module: (d_out, d_in), (d_in, d_out) if flipped, a kernel, or a stack."""
        # An alias of the parameter's memory: shape, dtype, device and layout are its own, and nothing is copied.
        weight: AdaptedWeight = Tensor._make_subclass(AdaptedWeight, plain.detach())
        weight.plain, weight.uses, weight.is_flipped, weight.experts = plain, tuple(uses), is_flipped, experts
        weight.threads = set()
        return weight

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        # Operands may come by keyword; in each function they are in this order, before its options.
        operands = [*args, *(options.pop(name) for name in _OPERANDS if name in options)]
        with torch._C.DisableTorchFunctionSubclass():
            answer = None if "out" in options else _ANSWERS.get(function)
            if answer is not None and (result := answer(*operands, **options)) is not None:
                return result
            if _is_question(function):
                return function(*args, **(kwargs or {}))
            return function(*tree_map(_as_dense, args), **tree_map(_as_dense, kwargs or {}))

    @property
    def is_stack(self) -> bool:
        return isinstance(self.experts, Tensor)

    def used_by(self, use: Use) -> "AdaptedWeight":
        """The same with one more adapter."""
        weight = AdaptedWeight.of(self.plain, (*self.uses, use), self.is_flipped, self.experts)
        weight.threads = self.threads
        return weight

    def serves(self, site: Site, scale: Scale | None) -> bool:
        """Is this adapter among its own, as another thread has put it there?

        Raises:
            TargetError: at another scale than in that thread.
        """
        use = next((use for use in self.uses if use.site is site), None)
        if use is not None and use.scale != scale:
            scale_there = f"another thread runs this model with {site.state.name!r} at scale {use.scale.value:g}"
            cure = "change scales where no forward is running, or give each thread a copy of the model; of a forward "
            cure += "that was interrupted there, run the model once more in that thread"
            raise TargetError(f"{site.path}: {scale_there}\n  {cure}")
        return use is not None

    def viewed(self, plain: Tensor, is_flipped: bool | None = None, experts: Any = "same") -> "AdaptedWeight":
        """A view of the weight, with the same adapters on it."""
        is_flipped = self.is_flipped if is_flipped is None else is_flipped
        return AdaptedWeight.of(plain, self.uses, is_flipped, self.experts if isinstance(experts, str) else experts)

    def of_expert(self, index: int) -> "AdaptedWeight":
        """One matrix of a stack."""
        return self.viewed(self.plain[index], experts=int(self.experts[index]))


def put(module: nn.Module, name: str, weight: Tensor) -> None:
    """A weight of the module has this one in its place."""
    # Python finds an attribute of the instance before nn.Module.__getattr__ is asked, but a property before both.
    module.__dict__[name] = weight
    if (packed := packed_in(module).get(name)) is not None:
        packed.__dict__["forward"] = partial(getitem, module.__dict__, name)


def take_back(module: nn.Module, name: str) -> None:
    """Where a weight of the module has an AdaptedWeight in its place, its own is there again."""
    weight, packed = module.__dict__.get(name), packed_in(module).get(name)
    if packed is not None:
        packed.__dict__.pop("forward", None)
        parametrize._cache.clear()  # what `parametrize.cached` has would be given in the next one's place
    if packed is not None or name in module._parameters:
        module.__dict__.pop(name, None)
    elif isinstance(weight, AdaptedWeight):
        module.__dict__[name] = weight.plain


# ---- views of the weight ------------------------------------------------------------------------


@answers(Tensor.t, torch.t, _getter("T"), _getter("mT"))
def _last_two(weight: Any) -> Any:
    return _transposed(weight, -1, -2)


@answers(Tensor.transpose, torch.transpose, Tensor.swapaxes)
def _transposed(weight: Any, *axes: Any) -> Any:
    axes = tuple(axis % weight.plain.ndim for axis in axes)
    if sorted(axes) != [weight.plain.ndim - 2, weight.plain.ndim - 1]:
        return None
    return weight.viewed(weight.plain.mT, not weight.is_flipped)


@answers(Tensor.__getitem__)
def _item(weight: Any, index: Any) -> Any:
    if not isinstance(weight, AdaptedWeight) or not weight.is_stack:
        return None
    if isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64):
        if index.ndim == 1:
            return weight.viewed(weight.plain[index], experts=weight.experts[index])
        return weight.of_expert(int(index)) if not index.ndim else None
    return weight.of_expert(index) if isinstance(index, int) else None


@answers(Tensor.unbind, torch.unbind)
def _unbound(weight: Any, dim: int = 0) -> Any:
    return None if dim or not weight.is_stack else tuple(map(weight.of_expert, range(len(weight.plain))))


@answers(Tensor.to)
def _cast(weight: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(weight, AdaptedWeight):
        return None  # x.to(weight): a question of dtype and device
    return weight.viewed(weight.plain.to(*args, **kwargs))


@answers(Tensor.contiguous)
def _contiguous(weight: Any, *_: Any, **__: Any) -> Any:
    return weight if weight.plain.is_contiguous() else None


@answers(Tensor.detach)
def _detached(weight: Any) -> Any:
    return weight


# ---- W' itself ----------------------------------------------------------------------------------


def _as_dense(value: Any) -> Any:
    return dense(value) if isinstance(value, AdaptedWeight) else value


def dense(weight: AdaptedWeight) -> Tensor:
    """W' in the shape and dtype of the weight, differentiable in the adapters' tensors.

    Raises:
        TargetError: in training, for a method that drops inputs: a matrix has none; where no weight holds the adapter.
        VariantError: for a method that adds a constant, which no weight holds.
    """
    if weight.is_stack:
        return torch.stack([dense(weight.of_expert(i)) for i in range(len(weight.plain))])
    plain = weight.plain.mT if weight.is_flipped else weight.plain
    matrix = plain.flatten(1)  # (o, i); of a kernel (o, i / groups · k)
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))  # rounded once, at the end
    for use in weight.uses:
        view = use.view(matrix.dtype, weight.experts)
        if problem := use.site.base.kind.no_weight:
            raise TargetError(f"{view.path}: {problem}")
        factors = use.factors(view)
        # Not by its numbers: a constant of 0 would pass, and raise once it is trained. No graph can ask for them.
        if not view.is_off and (adds_constant(use.site.specs) or (factors and factors.shift is not None)):
            raise VariantError(_ADDS.format(view.path, view.cfg.variant))
        if factors is None:
            if use.site.base.kind.category == "conv" and not is_dynamo_compiling():
                check_groups(view, use.module, matrix)
            matrix = _of_unit_vectors(view, matrix)
        elif not view.is_off:
            if factors.dropout:
                raise TargetError(
                    f"{view.path}: dropout acts on a layer's input, and this module multiplies by its weight where "
                    f"the input can't be seen\n  use dropout=0 there (per_layer)"
                )
            delta = factors.delta(view.in_features, matrix.dtype)  # (o, i)
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
        raise VariantError(_ADDS.format(layer.path, layer.cfg.variant))
    return torch.cat(blocks).mT
