"""A layer of the frozen model as an object: which module it is, of which kind, and how it stores its weight."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..dtypes import fits
from ..errors import BaseModelError, QuantizedWeightError
from . import bitsandbytes, measured  # noqa: F401  these imports register their ways of storing
from .kinds import BLOCK, KINDS, LINEAR, Kind, Size, held, packed_in
from .matrices import ALL_CHANNELS, NORM, kinds_by_weight
from .readers import readers
from .stacks import Modules
from .storage import DENSE, STORAGES, Quantization, Storage, filled, holds_numbers

_CALLED = (*KINDS, NORM)  # the kinds of module whose call a hook sees


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
    reader: nn.Module | None = None  # the module whose forward reads the weight, where no call of a layer shows it
    within: str = ""  # the path of `module` in the reader
    # Modules that hold the weight as well and are adapted with it, its name there, and whose call multiplies by it.
    ties: tuple[tuple[nn.Module, str, nn.Module], ...] = ()

    @property
    def stored(self) -> Tensor:
        """The tensor that holds the weight, as it lies on the module: codes where it is quantised."""
        # By weight, not what a running call has put in the parameter's place.
        return self.kind.stored(self.module) if self.reader is None else held(self.module, self.kind.weight)

    @property
    def packed(self) -> Any:
        """The parametrisation that gives a bare parameter in bitsandbytes' 4 bits; None for any other weight."""
        return packed_in(self.module).get(self.kind.weight)

    @property
    def bias(self) -> Tensor | None:
        """(d_out,), or (experts, d_out), that a method sees in the output; None for a layer without one.

        Where the model multiplies by the weight itself, a bias is added elsewhere.
        """
        return self.kind.bias_of(self.module) if self.shows_bias else None

    @property
    def shows_bias(self) -> bool:
        return self.reader is None or self.kind.shows_bias

    @property
    def is_lazy(self) -> bool:
        """True for a layer such as nn.LazyLinear before its first forward."""
        return is_lazy(self.stored)

    @property
    def is_held(self) -> bool:
        """Are its numbers a parameter of the module, whose place another tensor can take?"""
        return self.storage.is_dense and self.kind.has_matrix and self.kind.weight in self.module._parameters

    def describe(self) -> str:
        """How its weight is stored, for a person."""
        return "no weight" if self.kind is BLOCK else self.storage.describe(self)

    def oriented(self, stored: Tensor) -> Float[Tensor, "*e o i"]:
        """A tensor that lies as the weight does, as matrices (d_out, d_in)."""
        return self.kind.matrices(stored, self.transposed)

    @property
    def by_weight(self) -> bool:
        """Is it reached through its weight, and not by a hook on its call?"""
        return self.reader is not None

    @property
    def is_block(self) -> bool:
        """Is it the residual stream at a block's output?"""
        return self.kind is BLOCK

    def weight(self, expert: int | None = None) -> Float[Tensor, "*e o i"]:
        """The weight (d_out, d_in) of a dense layer, or of one of its experts, in its own dtype, as it is stored.

        Raises:
            QuantizedWeightError: where the stored numbers aren't the weight.
        """
        # Asked at each call: another library may have quantised the layer since it was found dense.
        stored = self.stored
        if not (self.storage.is_dense and holds_numbers(stored)):
            raise QuantizedWeightError(
                f"{self.path}: .weight of a layer that is {self.describe()} holds codes, not numbers\n"
                f"  use layer.dense_weight() in init, or layer.linear(t) for t Wᵀ"
            )
        weight = self.kind.matrices(stored, self.transposed)
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

    @torch.no_grad()
    def matrix(self, expert: int | None = None) -> Float[Tensor, "o i"]:
        """The same numbers to be read alone: no copy of a dense weight of that dtype, nor a check, at each forward."""
        if self.storage.is_dense and self.stored.dtype in (torch.float32, torch.float64):
            return self.weight(expert).detach()
        return self.storage.dense(self, expert)

    def linear(self, t: Float[Tensor, "*b i"], expert: int | None = None) -> Float[Tensor, "*b o"]:
        """t Wᵀ in t's dtype, differentiable in t: no bias, no hooks. Quantised layers use their own kernel."""
        return self.storage.linear(self, t, expert)

    def as_it_is_now(self) -> "BaseLayer":
        """The module found anew: a quantiser may have been at work since (bitsandbytes', on the move to a device)."""
        now = _layer(self.path, self.module, self.kind)
        if self.by_weight:
            return (
                self
                if now is None
                else replace(now, reader=self.reader, within=self.within, ties=self.ties, is_plain=True)
            )
        return now or layer_of(self.module, self.path) or self  # codes become a weight

    def dense_module(self, weight: Float[Tensor, "o i"], bias: Float[Tensor, "o"] | None) -> nn.Linear:
        """An nn.Linear with these tensors, frozen, to stand where the layer does."""
        d_out, d_in = weight.shape
        # On "meta" nothing is initialised: that would take time, and random numbers from the user's generator.
        new = nn.Linear(d_in, d_out, bias is not None, device="meta")
        return filled(new, nn.Parameter(weight, requires_grad=False), bias, self.module)


def layer_of(module: nn.Module, path: str = "") -> BaseLayer | None:
    """The module as a layer that is called; None if it is none."""
    # Most modules have no parameters of their own, and so are no norm.
    for kind in _CALLED if module._parameters else KINDS:
        if (size := kind.size(module)) is not None:
            return _stored(path, module, kind, size)
    return None


def find_layers(modules: Modules) -> dict[str, BaseLayer]:
    """Every weight that an adapter can go on, by path, in module order; a bare parameter by its own path.

    Inside of a layer nothing is looked at: other libraries' adapters.
    """
    layers: dict[str, BaseLayer] = {}
    reads, within = readers(modules), None
    for path, module in modules.items():
        if within is not None and path.startswith(within):
            continue
        layer = layer_of(module, path)
        if layer is not None:
            # Code that calls it in one branch and reads its weight alone in another (Bloom) means a layer with a hook.
            is_called = f"{path}()" in reads and f"{path}.bias" not in reads
            if (reader := reads.get(f"{path}.weight")) is not None and layer.is_held and not is_called:
                layer = replace(layer, reader=modules[reader], within=_below(reader, path), is_plain=True)
            layers[path], within = layer, f"{path}." if path else ""
        # A block of fused experts is a layer whose matrices are others, and x @ weight takes one that is (d_in, d_out).
        is_open = layer is None or layer.experts or (not layer.storage.decodes and holds_numbers(layer.stored))
        has_others = (module._parameters or "parametrizations" in module._modules) and is_open
        for kind in kinds_by_weight(module) if has_others else ():
            name = ".".join(filter(None, (path, kind.prefix)))
            if (weight := _layer(name, module, kind)) is not None and weight.storage.decodes:
                reader = reads.get(name if kind.prefix else f"{path}.weight", called_around(modules, path))
                layers[name] = replace(weight, reader=modules[reader], within=_below(reader, path))
    return layers


def shapes_of(layers: Iterable[BaseLayer]) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) by path of all that has the shape of a linear layer, and of fused experts."""
    return {layer.path: (layer.d_in, layer.d_out) for layer in layers if layer.kind in KINDS}


def called_around(modules: Modules, path: str) -> str:
    """The path of the nearest module, this one or around it, that has a forward: a ModuleList is never called."""
    while path and type(modules[path]).forward is nn.Module.forward:
        path = path.rpartition(".")[0]
    return path


def _below(outer: str, path: str) -> str:
    return path.removeprefix(outer).removeprefix(".")


def _layer(path: str, module: nn.Module, kind: Kind) -> BaseLayer | None:
    size = kind.size(module)
    return None if size is None else _stored(path, module, kind, size)


def _stored(path: str, module: nn.Module, kind: Kind, size: Size) -> BaseLayer:
    """The one place where the storage is asked."""
    # torch's own class with plain numbers in it is nobody's quantised layer, so no quantiser is asked.
    plain = type(module) is nn.Linear and DENSE.holds_size(module, kind, size)
    storage = DENSE if plain else next(storage for storage in STORAGES if storage.holds(module, kind))
    # A forward on the instance is anyone's (accelerate, a patch); an unknown storage may round its input.
    is_plain = storage.decodes and "forward" not in vars(module) and kind.computes_its_product(module)
    return BaseLayer(path, module, kind, storage, *size, is_plain)


def stream_of(block: nn.Module, path: str, width: int) -> BaseLayer:
    """The residual stream of this width, as it leaves the block."""
    return BaseLayer(path, block, BLOCK, DENSE, width, width, is_plain=True)


def on_all_channels(layer: BaseLayer) -> BaseLayer | None:
    """A convolution with groups as PEFT's LoRA takes it; None for any other layer."""
    size = ALL_CHANNELS.size(layer.module)
    return None if size is None else replace(layer, kind=ALL_CHANNELS, **size._asdict())


def stand_in(path: str, module: nn.Module, size: Size) -> BaseLayer:
    """A module with a plain `weight` (d_out, d_in) as a layer. The weight isn't looked at: it may be still on disk."""
    return BaseLayer(path, module, LINEAR, DENSE, *size)


def _right_in(module: nn.Module, path: str) -> list[BaseLayer | None]:
    """The module as a layer, or its bare parameters where bitsandbytes keeps some in 4 bits."""
    return _packed(module, path) if "parametrizations" in module._modules else [layer_of(module, path)]


def _packed(module: nn.Module, path: str) -> list[BaseLayer | None]:
    kinds = [kind for kind in kinds_by_weight(module) if kind.weight in packed_in(module)]
    packed = [_layer(f"{path}.{kind.prefix}".lstrip("."), module, kind) for kind in kinds]
    return packed or [layer_of(module, path)]


def quantization_of(model: nn.Module, known: Iterable[BaseLayer] = ()) -> Quantization | None:
    """How the model was quantised, for the record in an adapter file, or None.

    known   layers of it that were found just now: the dense ones among them aren't looked at again

    The method is that of the first layer of a known one; "unknown" if all layers that aren't dense are of no known way.
    """
    called = (layer for layer in known if layer.kind in _CALLED and "parametrizations" not in layer.module._modules)
    dense = {id(layer.module) for layer in called if layer.storage.is_dense}
    asked = ((path, module) for path, module in model.named_modules() if id(module) not in dense)
    layers = [layer for path, module in asked for layer in _right_in(module, path)]
    quantized = [layer for layer in layers if layer is not None and not (layer.storage.is_dense or layer.is_lazy)]
    if not quantized:
        return None
    first = next((layer for layer in quantized if layer.storage.is_known), quantized[0])
    record = first.storage.record(first)
    record.modules.extend(sorted(layer.path for layer in quantized))
    return record
