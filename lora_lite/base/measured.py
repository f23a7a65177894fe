"""The weight of a layer of any quantiser, measured: what the layer's own forward makes of the unit vectors.

Nothing here knows how a library lays its codes out (torchao, HQQ, quanto, GPTQ, AWQ, FP8, GGUF, ...). Whatever the
layer multiplies by is its weight, in the rounding of the dtype that it computes in.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..dtypes import dtype_name
from ..errors import QuantizedWeightError
from .affine import check_affine, input_dtype
from .kinds import KINDS, Kind
from .own_forward import NotRunError, can_run, unbiased
from .storage import SAMPLES, STORAGES, Quantization, Storage, spread_places

if TYPE_CHECKING:
    from .layer import BaseLayer

UNNAMED = "unknown"  # the method where no class says one
VECTORS = 256  # unit vectors that go through the forward at a time
# Words in the names of packages and classes, and what transformers' config calls the quantiser. The first that fits is
# the one: gptqmodel has layers for AWQ and GGUF too.
METHODS = {
    "torchao": "torchao",
    "compressed_tensors": "compressed-tensors",
    "quanto": "quanto",
    "hqq": "hqq",
    "gguf": "gguf",
    "mxfp4": "mxfp4",
    "fbgemm": "fbgemm_fp8",
    "fp8": "fp8",
    "bitnet": "bitnet",
    "higgs": "higgs",
    "eetq": "eetq",
    "awq": "awq",
    "gptq": "gptq",
}


class Measured(Storage):
    """Anything that isn't known otherwise and can be run. Its numbers are read after a probe that it is affine."""

    decodes = False

    def holds(self, module: Any, kind: Kind) -> bool:
        if not any(kind is called for called in KINDS):
            return False
        size = kind.size(module)
        return size is not None and not size.experts and can_run(module, kind.stored(module))

    def describe(self, layer: "BaseLayer") -> str:
        return f"{_method(layer)} ({_class_name(layer)}, {dtype_name(layer.stored.dtype)})"

    @torch.no_grad()
    def dense(self, layer: "BaseLayer", expert: int | None) -> Float[Tensor, "o i"]:
        check_affine(layer)
        dtype, device = input_dtype(layer), layer.stored.device
        weight = torch.empty(layer.d_out, layer.d_in, dtype=torch.promote_types(dtype, torch.float32), device=device)
        with unbiased(layer) as run:
            for start in range(0, layer.d_in, VECTORS):
                units = _units(range(start, min(start + VECTORS, layer.d_in)), layer)  # (n, d_in)
                weight[:, start : start + VECTORS] = run(units).mT  # (d_out, n)
            if run(torch.zeros(1, layer.d_in, dtype=dtype, device=device)).any():
                raise QuantizedWeightError(
                    f"{layer.path}: this layer ({layer.describe()}) adds a constant that isn't its bias\n"
                    f"  use a variant that doesn't read the weight, such as lora"
                )
        return weight

    def linear(self, layer: "BaseLayer", t: Float[Tensor, "*b i"], expert: int | None) -> Float[Tensor, "*b o"]:
        """By the layer's own forward, in t's dtype if it takes that, else in its own."""
        wants_gradient = t.requires_grad and torch.is_grad_enabled()
        for dtype in dict.fromkeys((t.dtype, input_dtype(layer)) if t.dim() == 2 else ()):
            try:
                with unbiased(layer) as run, torch.set_grad_enabled(wants_gradient):
                    y = run(t.to(dtype))  # (n, d_out)
            except NotRunError:
                continue
            if y.requires_grad or not wants_gradient:
                return y.to(t.dtype)
        return t @ self.dense(layer, expert).to(t.dtype).mT

    def samples(self, layer: "BaseLayer") -> list[float]:
        """Numbers of the weight itself: how the codes lie may differ from device to device."""
        columns, rows = (spread_places(size) for size in (layer.d_in, layer.d_out))
        try:
            with unbiased(layer) as run:
                values = run(_units(columns, layer)).float()  # (SAMPLES, d_out)
        except NotRunError:
            return []
        return values[range(len(columns)), (rows * SAMPLES)[: len(columns)]].tolist()

    def record(self, layer: "BaseLayer") -> Quantization:
        method = _method(layer)
        kind = self.describe(layer) if method == UNNAMED else _class_name(layer)
        return Quantization(method, kind, weight_dtype=dtype_name(input_dtype(layer)))


MEASURED = Measured()
STORAGES.insert(-1, MEASURED)  # asked after all that say what they hold, and before UNKNOWN


def _units(columns: Any, layer: "BaseLayer") -> Float[Tensor, "n i"]:
    """The unit vectors of these input channels, as rows."""
    device = layer.stored.device
    units = torch.zeros(len(columns), layer.d_in, dtype=input_dtype(layer), device=device)
    units[torch.arange(len(columns), device=device), torch.tensor(list(columns), device=device)] = 1
    return units


def _method(layer: "BaseLayer") -> str:
    """The quantiser, by the names of the classes that make the layer."""
    classes = [type(layer.stored), type(layer.module), type(getattr(layer.module, "quantization_scheme", None))]
    names = " ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in classes).lower()
    return next((method for word, method in METHODS.items() if word in names), UNNAMED)


def _class_name(layer: "BaseLayer") -> str:
    """The class that holds the codes: of the tensor, or a quantiser's layer where that one is torch's own."""
    stored = type(layer.stored)
    by_layer = stored in (Tensor, nn.Parameter) and _method(layer) != UNNAMED
    return (type(layer.module) if by_layer else stored).__name__
