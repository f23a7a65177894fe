"""Ways of storing a weight: how to get its numbers, how to multiply by it, and what to put in its place.

A new one, such as another quantiser's, is one class: every method, file and merge works on it once it is registered.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ..dtypes import STORAGE_DTYPES, dtype_name
from ..errors import QuantizedWeightError
from . import sharding
from .kinds import Kind, Size

if TYPE_CHECKING:
    from .layer import BaseLayer

ROWS = 256  # of a dense weight that are cast at a time: a whole copy in t's dtype would double the weight's memory
SAMPLES = 4  # stored elements of each tensor of a target's weight that tell one base from another
Bias = Float[Tensor, "o"] | None


@dataclass(frozen=True)
class Quantization:
    """How a model was quantised, as an adapter's file records it."""

    method: str  # "bitsandbytes-4bit", "bitsandbytes-8bit", the name of another one, or "unknown"
    quant_type: str  # "nf4", "fp4", "int8", or the description of an unknown one
    blocksize: int | None = None
    double_quant: bool = False
    # These leave a weight's values as they are, so two quantisations are equal whatever they say.
    compute_dtype: str | None = field(default=None, compare=False)
    weight_dtype: str | None = field(default=None, compare=False)
    modules: list[str] = field(default_factory=list, compare=False)  # paths of the quantised layers

    def in_words(self) -> str:
        """For a log line: "nf4, bitsandbytes-4bit"; the method only where it is known."""
        return self.quant_type if self.method == "unknown" else f"{self.quant_type}, {self.method}"


class Storage:
    """A way of storing a weight. It has no state: each question is about the layer that is given.

    A subclass says `holds`, `describe` and `dense`; what else it can do better than these defaults, it overrides.
    """

    is_dense = False  # the stored numbers are the weight
    is_known = True  # its numbers can be read
    decodes = True  # from the stored tensors, whose layout is known here: the layer needn't be run

    def holds(self, module: Any, kind: Kind) -> bool:
        """Is this module's weight stored so?"""
        raise NotImplementedError

    def describe(self, layer: "BaseLayer") -> str:
        """The way of storing for a person: "bfloat16", "nf4, 4-bit bitsandbytes", ..."""
        raise NotImplementedError

    def dense(self, layer: "BaseLayer", expert: int | None) -> Float[Tensor, "o i"]:
        """The numbers that the layer, or one of its experts, computes with, in their own memory; float32 or wider."""
        raise NotImplementedError

    def linear(self, layer: "BaseLayer", t: Float[Tensor, "*b i"], expert: int | None) -> Float[Tensor, "*b o"]:
        """t Wᵀ in t's dtype, differentiable in t."""
        return t @ self.dense(layer, expert).to(t.dtype).mT

    def samples(self, layer: "BaseLayer") -> list[float]:
        """Stored elements of the weight that tell one base from another; cheap at any size."""
        with sharding.gathered([layer.stored]):
            return spread(layer.stored)

    def record(self, layer: "BaseLayer") -> Quantization:
        """The record in an adapter's file. Where two records are equal, equal stored elements mean equal weights."""
        return Quantization("unknown", self.describe(layer))

    def compute_dtype(self, layer: "BaseLayer") -> torch.dtype | None:
        """The dtype that the layer multiplies in; None where that is its input's."""
        return None

    def requantized(self, layer: "BaseLayer", weight: Float[Tensor, "o i"], bias: Bias) -> nn.Module:
        """A module with these tensors, quantised as this layer is. Raises QuantizedWeightError where that can't be."""
        raise QuantizedWeightError(
            f'{layer.path}: a {layer.describe()} weight can\'t be quantised again here\n  use quantized="dequantize"'
        )


S = TypeVar("S", bound=type[Storage])


def register_storage(cls: S) -> S:
    """Class decorator: make a way of storing known. It is asked before those that were registered earlier."""
    STORAGES.insert(0, cls())
    return cls


class Dense(Storage):
    """Plain numbers in a floating dtype, perhaps sharded."""

    is_dense = True

    def holds(self, module: Any, kind: Kind) -> bool:
        size = kind.size(module)
        return size is not None and self.holds_size(module, kind, size)

    def holds_size(self, module: Any, kind: Kind, size: Size) -> bool:
        """Is it stored so, with the size that its kind gave?"""
        weight = kind.stored(module)
        if not holds_numbers(weight):
            return False
        shape = sharding.shape_of(weight)  # packed codes have another one
        if len(shape) < 2:
            return not kind.has_matrix
        ends = (shape[0], shape[1:].numel()) if len(shape) > 2 and not size.experts else shape[-2:]
        return tuple(ends) == ((size.d_in, size.d_out) if size.transposed else (size.d_out, size.d_in))

    def describe(self, layer: "BaseLayer") -> str:
        return dtype_name(layer.stored.dtype)

    def dense(self, layer: "BaseLayer", expert: int | None) -> Float[Tensor, "o i"]:
        with sharding.gathered([layer.stored]):
            weight = sharding.whole(layer.weight(expert))
            return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)  # callers may write into it

    def linear(self, layer: "BaseLayer", t: Float[Tensor, "*b i"], expert: int | None) -> Float[Tensor, "*b o"]:
        weight = layer.weight(expert)
        return F.linear(t, weight) if weight.dtype == t.dtype else linear_by_rows(t, weight)


class Unknown(Storage):
    """Whatever nobody else knows: only methods that never read the weight can go on it. Never a guess."""

    is_known = decodes = False

    def holds(self, module: Any, kind: Kind) -> bool:
        return True

    def describe(self, layer: "BaseLayer") -> str:
        return f"unknown ({type(layer.stored).__name__}, {dtype_name(layer.stored.dtype)})"

    def dense(self, layer: "BaseLayer", expert: int | None) -> Float[Tensor, "o i"]:
        raise QuantizedWeightError(
            f"{layer.path}: the weight is {layer.describe()}, so its values can't be read\n"
            f'  use a variant whose base_weight is "unused", or a base whose layers can be run'
        )

    def samples(self, layer: "BaseLayer") -> list[float]:
        return []  # it may hold no numbers


DENSE, UNKNOWN = Dense(), Unknown()
STORAGES: list[Storage] = [DENSE, UNKNOWN]  # the first that holds a module's weight is its own; UNKNOWN holds any


def holds_numbers(tensor: Tensor) -> bool:
    """True for a plain tensor, perhaps sharded, in a floating dtype."""
    # Not isinstance: a quantiser's subclass of Tensor may hold codes and name the dtype of the original weight.
    plain = type(tensor) in (Tensor, nn.Parameter) or sharding.is_dtensor(tensor)
    return plain and tensor.dtype in STORAGE_DTYPES


def filled(new: Any, weight: Tensor, bias: Bias, old: nn.Module) -> Any:
    """A new layer with this weight and bias, in the mode of the old one."""
    new.weight, new.bias = weight, None if bias is None else nn.Parameter(bias, requires_grad=False)
    return new.train(old.training)


def linear_by_rows(t: Float[Tensor, "*b i"], weight: Shaped[Tensor, "o i"]) -> Float[Tensor, "*b o"]:
    """t Wᵀ in t's dtype, with W cast ROWS rows at a time."""
    return torch.cat([F.linear(t, rows.to(t.dtype)) for rows in weight.split(ROWS)], dim=-1)


def spread(tensor: Tensor) -> list[float]:
    """Up to SAMPLES elements from the first to the last."""
    if sharding.is_dtensor(tensor):
        return sharding.elements(tensor.detach(), spread_places(tensor.numel())).float().tolist()
    flat = (tensor if tensor.is_contiguous() else tensor.mT).detach().reshape(-1)
    return flat.index_select(0, torch.tensor(spread_places(flat.numel()), device=flat.device)).float().tolist()


@cache
def spread_places(numel: int) -> list[int]:
    """The indices of the elements of a flat tensor that are looked at."""
    return torch.linspace(0, numel - 1, min(SAMPLES, numel), dtype=torch.float64, device="cpu").long().tolist()
