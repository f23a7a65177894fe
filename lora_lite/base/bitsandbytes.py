"""bitsandbytes' layers, which no other file knows. Facts that it rests on, bitsandbytes 0.50:

- A Linear8bitLt keeps int8 codes and per-row scales on `weight.CB/SCB` until its first forward, on `state.CB/SCB`
  after it.
- A bare parameter, such as fused experts', is kept in 4 bits by a parametrisation: each reading of it dequantises,
  unless torch's `parametrize.cached` has it. bitsandbytes caches so within each call of the module.
- On a CPU with AVX512-BF16, an eval forward without gradients repacks a Linear4bit weight in place. From then on
  dequantising gives garbage (relative error 1.4), and in train mode no gradient reaches the layer's input.
  `support_avx512bf16_for_cpu = False` keeps the layout.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..dtypes import dtype_name
from ..errors import QuantizedWeightError
from .kinds import Kind, is_instance, packed_in
from .storage import Bias, Quantization, Storage, filled, linear_by_rows, register_storage, spread

if TYPE_CHECKING:
    from .layer import BaseLayer


@register_storage
class Bnb4bit(Storage):
    """nf4 and fp4: codes in uint8, with a scale for each block of the flat weight; the scales may be quantised too."""

    def holds(self, module: Any, kind: Kind) -> bool:
        return _is_4bit(module) and _quant_state(module) is not None

    def describe(self, layer: "BaseLayer") -> str:
        return f"{_state(layer).quant_type}, 4-bit bitsandbytes"

    def dense(self, layer: "BaseLayer", expert: int | None) -> Float[Tensor, "o i"]:
        raise_if_repacked(layer.module, layer.path)
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.stored.data, _quant_state(layer.module)).float()  # (d_out, d_in)

    def linear(self, layer: "BaseLayer", t: Float[Tensor, "*b i"], expert: int | None) -> Float[Tensor, "*b o"]:
        """By bitsandbytes' own kernel, which dequantises as it does in the layer's forward."""
        raise_if_repacked(layer.module, layer.path)
        from bitsandbytes import matmul_4bit

        return matmul_4bit(t, layer.stored, quant_state=_quant_state(layer.module))

    def samples(self, layer: "BaseLayer") -> list[float]:
        codes = layer.stored.view(torch.uint8)  # FSDP wants them stored as floats: the same bytes in another dtype
        return samples_4bit(codes, _state(layer))

    def record(self, layer: "BaseLayer") -> Quantization:
        state, compute = _state(layer), getattr(layer.module, "compute_dtype", None)
        dtypes = None if compute is None else dtype_name(compute), dtype_name(state.dtype)
        return Quantization("bitsandbytes-4bit", state.quant_type, state.blocksize, bool(state.nested), *dtypes)

    def compute_dtype(self, layer: "BaseLayer") -> torch.dtype:
        return getattr(layer.module, "compute_dtype", None) or _state(layer).dtype

    def requantized(self, layer: "BaseLayer", weight: Float[Tensor, "o i"], bias: Bias) -> nn.Module:
        from bitsandbytes.nn import Linear4bit, Params4bit

        old, state = layer.module, _quant_state(layer.module)
        options = {
            "quant_type": state.quant_type,
            "compress_statistics": state.nested,
            "quant_storage": layer.stored.dtype,
        }
        d_out, d_in = weight.shape
        new: Any = Linear4bit(d_in, d_out, bias is not None, old.compute_dtype, device="meta", **options)
        new.compute_type_is_set = old.compute_type_is_set
        new.support_avx512bf16_for_cpu = old.support_avx512bf16_for_cpu
        params: Any = Params4bit
        values = weight.to("cpu", state.dtype)  # the move to a device is what quantises, so it starts on the CPU
        codes = params(values, blocksize=state.blocksize, module=new, **options).to(weight.device)
        return filled(new, codes, bias, old)


@register_storage
class Bnb4bitParameter(Bnb4bit):
    """A bare parameter in the same form, one matrix or a stack of them, which a parametrisation decodes."""

    def holds(self, module: Any, kind: Kind) -> bool:
        return kind.weight in packed_in(module)

    def dense(self, layer: "BaseLayer", expert: int | None) -> Float[Tensor, "o i"]:
        decoded = _decoded(layer.stored.data, _state(layer), expert)
        return layer.kind.matrices(decoded, layer.transposed).float()  # (d_out, d_in)

    def linear(self, layer: "BaseLayer", t: Float[Tensor, "*b i"], expert: int | None) -> Float[Tensor, "*b o"]:
        return Storage.linear(self, layer, t, expert)

    def requantized(self, layer: "BaseLayer", weight: Float[Tensor, "*e o i"], bias: Bias) -> nn.Module:
        """The parametrisation of this weight, which lies as the parameter does."""
        from bitsandbytes.functional import quantize_4bit
        from bitsandbytes.nn.parametrize import Bnb4bitParametrization

        state = _state(layer)
        options = {"quant_type": state.quant_type, "compress_statistics": state.nested}
        codes, new = quantize_4bit(weight.to(state.dtype), blocksize=state.blocksize, **options)
        parameter = nn.Parameter(codes, requires_grad=False)
        return ParametrizationList([Bnb4bitParametrization(new)], parameter, unsafe=True)


@register_storage
class Bnb8bit(Storage):
    """int8 codes with a scale for each row: weight = codes · scales."""

    def holds(self, module: Any, kind: Kind) -> bool:
        return _is_8bit(module) and module.weight.dtype == torch.int8 and _scales(module) is not None

    def describe(self, layer: "BaseLayer") -> str:
        return "int8, 8-bit bitsandbytes"

    def dense(self, layer: "BaseLayer", expert: int | None) -> Float[Tensor, "o i"]:
        codes, scales = _int8(layer.module)  # (d_out, d_in), (d_out,)
        return codes.float() * scales.float()[:, None]

    def linear(self, layer: "BaseLayer", t: Float[Tensor, "*b i"], expert: int | None) -> Float[Tensor, "*b o"]:
        """By the codes as numbers: the layer's own kernel would round t to int8 too (0.5 to 1 % of the result)."""
        codes, scales = _int8(layer.module)
        return linear_by_rows(t, codes) * scales.to(t.dtype)

    def samples(self, layer: "BaseLayer") -> list[float]:
        codes, scales = _int8(layer.module)
        return spread(codes) + spread(scales)

    def record(self, layer: "BaseLayer") -> Quantization:
        return Quantization("bitsandbytes-8bit", "int8")

    def requantized(self, layer: "BaseLayer", weight: Float[Tensor, "o i"], bias: Bias) -> nn.Module:
        from bitsandbytes.nn import Int8Params, Linear8bitLt

        d_out, d_in = weight.shape
        options = {"has_fp16_weights": False, "threshold": layer.module.state.threshold}
        new: Any = Linear8bitLt(d_in, d_out, bias is not None, device="meta", **options)
        params: Any = Int8Params
        codes = params(weight.to("cpu"), requires_grad=False, has_fp16_weights=False).to(weight.device)
        return filled(new, codes, bias, layer.module)


def is_bitsandbytes(module: nn.Module) -> bool:
    """True for a layer of bitsandbytes, quantised already or not."""
    return _is_4bit(module) or _is_8bit(module)


def samples_4bit(codes: Tensor, state: Any) -> list[float]:
    """Elements of 4-bit codes (uint8) and of the scales in bitsandbytes' QuantState."""
    parts = [codes, state.absmax]
    parts += [state.state2.absmax, state.offset] if state.nested else []
    return [value for part in parts for value in spread(part)]


# ---- the layout of 4-bit weights, which a forward may change ------------------------------------


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Every 4-bit layer multiplies in this dtype; left to itself, one takes that of its first input."""
    for layer in _layers_4bit(model).values():
        layer.compute_dtype, layer.compute_type_is_set = dtype, True  # or the first forward sets it again


def repackable(model: nn.Module) -> list[nn.Module]:
    """Every 4-bit layer that an eval forward on this CPU would repack.

    Raises:
        QuantizedWeightError: if one has been repacked.
    """
    layers = _layers_4bit(model)
    for path, layer in layers.items():  # targets or not: no gradient passes a repacked one to the adapters below
        raise_if_repacked(layer, path)
    return [layer for layer in layers.values() if layer.support_avx512bf16_for_cpu]


@contextmanager
def layout_kept(model: nn.Module) -> Iterator[None]:
    """Within the block, no forward repacks a 4-bit layer."""
    layers = [layer for layer in _layers_4bit(model).values() if layer.support_avx512bf16_for_cpu]
    for layer in layers:
        keep_layout(layer, True)
    try:
        yield
    finally:
        for layer in layers:  # not those that an adapter or the user had forbidden to repack before
            keep_layout(layer, False)


def keep_layout(module: Any, keep: bool) -> None:
    """Forbid (or allow again) that a forward repacks this 4-bit layer for AVX512-BF16."""
    module.support_avx512bf16_for_cpu = not keep


def raise_if_repacked(module: Any, path: str) -> None:
    """Raises QuantizedWeightError if an eval forward has repacked this 4-bit layer."""
    if getattr(_quant_state(module), "packing_format_for_cpu", False):
        raise QuantizedWeightError(
            f"{path}: an eval forward has repacked this 4-bit weight for AVX512-BF16; it can't be read or "
            f"trained through any more\n"
            f"  load the model again, with lora_lite.load_base(...) or with attach before the first forward"
        )


def _layers_4bit(model: nn.Module) -> dict[str, Any]:
    if "bitsandbytes.nn" not in sys.modules:  # while nothing has imported it, nothing is of it
        return {}
    return {path: module for path, module in model.named_modules() if _is_4bit(module)}


_is_4bit = partial(is_instance, module="bitsandbytes.nn", name="Linear4bit")
_is_8bit = partial(is_instance, module="bitsandbytes.nn", name="Linear8bitLt")


def _decoded(codes: Tensor, state: Any, index: int | None) -> Tensor:
    """The numbers of a 4-bit tensor in the shape of its QuantState; with an index, of that matrix of a stack alone."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    size = state.shape[1:].numel()
    # A block of numbers with one scale must not reach over two matrices. Nor over two rows: bitsandbytes 0.50 on a CPU
    # misreads those, each shape otherwise, and what the layer computes with is what it reads.
    if index is None or state.shape[-1] % state.blocksize:
        whole: Tensor = dequantize_4bit(codes, state)
        return whole if index is None else whole[index]
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    scales = scales.view(-1, size // state.blocksize)[index].contiguous()  # (blocks of one matrix,)
    codes = codes.view(torch.uint8).view(-1, size // 2, 1)[index]  # (size / 2, 1): two codes in a byte
    options = {"blocksize": state.blocksize, "quant_type": state.quant_type, "dtype": state.dtype}
    return dequantize_4bit(codes, QuantState(scales, shape=state.shape[1:], code=state.code, **options))


def _state(layer: "BaseLayer") -> Any:
    """The QuantState of a layer's weight."""
    return _quant_state(layer.module) if layer.packed is None else layer.packed[0].quant_state


def _quant_state(module: Any) -> Any:
    """The QuantState of a Linear4bit. FSDP keeps it on the module only."""
    state = getattr(module.weight, "quant_state", None)
    return module.quant_state if state is None else state


def _int8(module: Any) -> tuple[Tensor, Tensor]:
    """Codes (d_out, d_in) and scales (d_out,) of a Linear8bitLt."""
    state, weight = module.state, module.weight
    codes = weight.CB if state.CB is None else state.CB
    return (weight.data if codes is None else codes), _scales(module) / 127  # a row's largest number has the code 127


def _scales(module: Any) -> Any:
    """127 times the scales of a Linear8bitLt; None until it is quantised."""
    return module.weight.SCB if module.state.SCB is None else module.state.SCB
