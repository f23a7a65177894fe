"""A layer of the frozen model as an object: which module it is, of which kind, and how it stores its weight."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..dtypes import STORAGE_DTYPES, fits
from ..errors import BaseModelError, QuantizedWeightError
from . import bitsandbytes, sharding  # noqa: F401  the import of bitsandbytes registers its ways of storing
from .kinds import KINDS, LINEAR, Kind, Size
from .storage import DENSE, STORAGES, Quantization, Storage

PLAIN = (Tensor, nn.Parameter)


@dataclass(frozen=True, eq=False)
class BaseLayer:
    """A layer that an adapter can go on. `layer_of` decides its kind and its storage, once.

    It reads the module at each call, so tensors that others exchange there (FSDP2, functional_call) are seen.
    """

    path: str
    module: Any
    kind: Kind
    storage: Storage
    d_in: int
    d_out: int
    experts: int = 0  # how many matrices it fuses; 0 for a layer of one
    transposed: bool = False  # each matrix is stored as (d_in, d_out)
    is_plain: bool = False  # known to compute x Wᵀ + b, by its class and storage; others are run on some rows to see

    @property
    def stored(self) -> Tensor:
        """The tensor that holds the weight, as it lies on the module: codes where it is quantised."""
        tensor: Tensor = getattr(self.module, self.kind.weight)
        return tensor

    @property
    def bias(self) -> Tensor | None:
        """(d_out,), or (experts, d_out); None for a layer without one."""
        return self.kind.bias_of(self.module)

    @property
    def is_lazy(self) -> bool:
        """True for a layer such as nn.LazyLinear before its first forward."""
        return isinstance(self.stored, UninitializedParameter | UninitializedBuffer)

    def describe(self) -> str:
        """How its weight is stored, for a person."""
        return self.storage.describe(self)

    def weight(self, expert: int | None = None) -> Float[Tensor, "*e o i"]:
        """The weight (d_out, d_in) of a dense layer, or of one of its experts, in its own dtype, as it is stored.

        Raises:
            QuantizedWeightError: where the stored numbers aren't the weight.
        """
        stored = self.stored
        # Asked at each call: another library may have quantised the layer since it was found dense.
        plain = type(stored) in PLAIN or sharding.is_dtensor(stored)
        if not (self.storage.is_dense and plain and stored.dtype in STORAGE_DTYPES):
            raise QuantizedWeightError(
                f"{self.path}: .weight of a layer that is {self.describe()} holds codes, not numbers\n"
                f"  use layer.dense_weight() in init, or layer.linear(t) for t Wᵀ"
            )
        weight = stored.mT if self.transposed else stored
        return weight if expert is None else weight[expert]

    @torch.no_grad()
    def dense_weight(self, expert: int | None = None) -> Float[Tensor, "o i"]:
        """The numbers that the layer (or one of its experts) computes with, as a matrix (d_out, d_in) of its own.

        It is float32, of a float64 layer float64.

        Raises:
            QuantizedWeightError: where they can't be read.
            BaseModelError: on a NaN or an infinity.
        """
        weight = self.storage.dense(self, expert)
        if not fits(weight):
            raise BaseModelError(
                f"{self.path}: {int((~weight.isfinite()).sum())} of {weight.numel()} base weights are NaN or infinite\n"
                f"  this variant reads the weight; check the checkpoint or the dtype it was loaded in"
            )
        return weight

    def linear(self, t: Float[Tensor, "*b i"], expert: int | None = None) -> Float[Tensor, "*b o"]:
        """t Wᵀ in t's dtype, differentiable in t: no bias, no hooks. Quantised layers use their own kernel."""
        return self.storage.linear(self, t, expert)

    def as_it_is_now(self) -> "BaseLayer":
        """The module found anew: a quantiser may have been at work since (bitsandbytes', on the move to a device)."""
        return layer_of(self.module, self.path) or self

    def dense_module(self, weight: Float[Tensor, "o i"], bias: Float[Tensor, "o"] | None) -> nn.Linear:
        """An nn.Linear with these tensors, frozen, to stand where the layer does."""
        d_out, d_in = weight.shape
        # On "meta" nothing is initialised: that would take time, and random numbers from the user's generator.
        new = nn.Linear(d_in, d_out, bias is not None, device="meta").train(self.module.training)
        new.weight = nn.Parameter(weight, requires_grad=False)
        new.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        return new


def layer_of(module: nn.Module, path: str = "") -> BaseLayer | None:
    """The module as a layer; None if it is none. The one place where kind and storage are asked."""
    for kind in KINDS:
        if (size := kind.size(module)) is not None:
            # torch's own class with plain numbers in it is nobody's quantised layer, so no quantiser is asked.
            plain = type(module) is nn.Linear and DENSE.holds(module, kind)
            storage = DENSE if plain else next(storage for storage in STORAGES if storage.holds(module, kind))
            # A forward on the instance is anyone's (accelerate, a patch); an unknown storage may round its input.
            is_plain = storage.is_known and "forward" not in vars(module) and kind.computes_its_product(module)
            return BaseLayer(path, module, kind, storage, *size, kind.lies_transposed(module), is_plain)
    return None


def stand_in(path: str, module: nn.Module, size: Size) -> BaseLayer:
    """A module with a plain `weight` (d_out, d_in) as a layer. The weight isn't looked at: it may be still on disk."""
    return BaseLayer(path, module, LINEAR, DENSE, *size)


def quantization_of(model: nn.Module) -> Quantization | None:
    """How the model was quantised, for the record in an adapter file, or None.

    The method is that of the first layer of a known one; "unknown" if all layers that aren't dense are of no known way.
    """
    layers = [layer for path, module in model.named_modules() if (layer := layer_of(module, path)) is not None]
    quantized = [layer for layer in layers if not (layer.storage.is_dense or layer.is_lazy)]
    if not quantized:
        return None
    first = next((layer for layer in quantized if layer.storage.is_known), quantized[0])
    record = first.storage.record(first)
    record.modules.extend(sorted(layer.path for layer in quantized))
    return record
