"""What a base weight is, and the two right ways to use one that isn't plain numbers.

The only file that knows bitsandbytes' layers. Facts that it rests on, bitsandbytes 0.50:

- A Linear8bitLt keeps int8 codes and per-row scales on `weight.CB/SCB` until its first forward,
  on `state.CB/SCB` after it.
- On a CPU with AVX512-BF16, an eval forward without gradients repacks a Linear4bit weight in
  place. From then on dequantising gives garbage (relative error 1.4), and in train mode no
  gradient reaches the layer's input. `support_avx512bf16_for_cpu = False` keeps the layout.
"""

import enum
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..dtypes import STORAGE_DTYPES, dtype_name, fits
from ..errors import BaseModelError, QuantizedWeightError
from . import experts, sharding

ROWS = 256
"""Rows of a dense weight that are cast at a time."""

SAMPLES = 4
"""Stored elements of each tensor of a target's weight that tell one base from another."""

Linear = Any
"""A module with the shape of a linear layer; typed as nn.Module, its attributes would be tensors or modules only."""


class Kind(enum.Enum):
    """The kinds of base weight that the runtime can tell apart."""

    DENSE = "dense"
    BNB_4BIT = "bitsandbytes 4-bit"
    BNB_8BIT = "bitsandbytes 8-bit"
    UNKNOWN = "unknown"


def _loaded(module: str, name: str) -> type | None:
    """A class of an optional package, or None while nothing has imported it (so nothing is one)."""
    return getattr(sys.modules.get(module), name, None)


def _is(value: Any, module: str, name: str) -> bool:
    cls = _loaded(module, name)
    return cls is not None and isinstance(value, cls)


def stored(layer: Linear) -> Tensor:
    """The tensor that holds the weight: codes where it is quantised, all matrices of fused experts."""
    matrices = experts.down(layer)
    return layer.weight if matrices is None else matrices


def stored_parameter(layer: Linear) -> Tensor:
    """The same, as it lies on the module."""
    return experts.stored(layer) if experts.count(layer) else layer.weight


def is_lazy(layer: Linear) -> bool:
    """True for a layer such as nn.LazyLinear before its first forward."""
    return isinstance(stored(layer), UninitializedParameter | UninitializedBuffer)


def is_bypassed(layer: Linear) -> bool:
    """True for the out-projection of nn.MultiheadAttention, whose weight is read without calling the layer."""
    return isinstance(layer, NonDynamicallyQuantizableLinear)


def is_bitsandbytes(layer: Linear) -> bool:
    """True for a layer of bitsandbytes, quantised already or not."""
    return _is(layer, "bitsandbytes.nn", "Linear4bit") or _is(layer, "bitsandbytes.nn", "Linear8bitLt")


def is_transposed(layer: Linear) -> bool:
    """True for transformers' Conv1D (GPT-2), whose weight is (d_in, d_out)."""
    return _is(layer, "transformers.pytorch_utils", "Conv1D")


def features(layer: Linear) -> tuple[int, int] | None:
    """(d_in, d_out) of anything that has the shape of a linear layer, or fuses several (experts), else None."""
    matrices = experts.down(layer)
    if matrices is not None:
        return matrices.shape[2], matrices.shape[1]
    if not isinstance(getattr(layer, "weight", None), Tensor):
        return None
    if is_transposed(layer):
        return sharding.shape_of(layer.weight)[0], sharding.shape_of(layer.weight)[1]
    d_in, d_out = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return (d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None


def kind_of(layer: Linear) -> Kind:
    """What the layer's weight is. Never a guess: what isn't recognised is UNKNOWN."""
    weight = stored(layer)
    if _is(layer, "bitsandbytes.nn", "Linear4bit"):
        return Kind.BNB_4BIT if _quant_state(layer) is not None else Kind.UNKNOWN
    if _is(layer, "bitsandbytes.nn", "Linear8bitLt"):
        return Kind.BNB_8BIT if weight.dtype == torch.int8 and _scales(layer) is not None else Kind.UNKNOWN
    plain = type(weight) in (Tensor, nn.Parameter) or sharding.is_dtensor(weight)
    if not plain or weight.dtype not in STORAGE_DTYPES:
        return Kind.UNKNOWN
    *_, rows, columns = sharding.shape_of(weight)
    shape = (rows, columns) if is_transposed(layer) else (columns, rows)
    return Kind.DENSE if shape == features(layer) else Kind.UNKNOWN


def describe(layer: Linear) -> str:
    """The weight's kind for a person: "bfloat16", "nf4, 4-bit bitsandbytes", ..."""
    kind = kind_of(layer)
    if kind is Kind.BNB_4BIT:
        return f"{_quant_state(layer).quant_type}, 4-bit bitsandbytes"
    if kind is Kind.BNB_8BIT:
        return "int8, 8-bit bitsandbytes"
    weight = stored(layer)
    name = dtype_name(weight.dtype)
    return name if kind is Kind.DENSE else f"unknown ({type(weight).__name__}, {name})"


def plain_weight(layer: Linear, path: str, expert: int | None = None) -> Tensor:
    """The weight (d_out, d_in) of a dense layer, or of one of its experts, in its own dtype.

    Raises QuantizedWeightError where the stored numbers aren't the weight.
    """
    if kind_of(layer) is not Kind.DENSE:
        raise QuantizedWeightError(
            f"{path}: .weight of a layer that is {describe(layer)} holds codes, not numbers\n"
            f"  use layer.dense_weight() in init, or layer.linear(t) for t Wᵀ"
        )
    weight = stored(layer).mT if is_transposed(layer) else stored(layer)
    return weight if expert is None else weight[expert]


@torch.no_grad()
def dense_weight(layer: Linear, path: str, expert: int | None = None) -> Float[Tensor, "o i"]:
    """The numbers that the layer (or one of its experts) computes with, as a matrix (d_out, d_in) of its own.

    It is float32, of a float64 layer float64.
    Raises QuantizedWeightError on an unknown kind and on a repacked layer, BaseModelError on a
    NaN or an infinity.
    """
    kind = kind_of(layer)
    if kind is Kind.DENSE:
        with sharding.gathered([stored_parameter(layer)]):
            plain = sharding.whole(plain_weight(layer, path, expert))
            weight = plain.to(torch.promote_types(plain.dtype, torch.float32), copy=True)
    elif kind is Kind.BNB_4BIT:
        raise_if_repacked(layer, path)
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(layer.weight.data, _quant_state(layer)).float()
    elif kind is Kind.BNB_8BIT:
        codes, scales = _int8(layer)
        weight = codes.float() * scales.float()[:, None]
    else:
        raise QuantizedWeightError(
            f"{path}: the weight is {describe(layer)}, so its values can't be read\n"
            f'  use a variant whose base_weight is "unused", or a dense or bitsandbytes base'
        )
    if not fits(weight):
        raise BaseModelError(
            f"{path}: {int((~weight.isfinite()).sum())} of {weight.numel()} base weights are NaN or infinite\n"
            f"  this variant reads the weight; check the checkpoint or the dtype it was loaded in"
        )
    return weight


def linear(layer: Linear, t: Float[Tensor, "*b i"], path: str, expert: int | None = None) -> Float[Tensor, "*b o"]:
    """t Wᵀ in t's dtype: no bias, no hooks, differentiable in t; a dense or 8-bit W is cast ROWS rows at a time.

    4-bit layers use bitsandbytes' kernel, which dequantises as it does in their forward. 8-bit layers multiply by the
    int8 codes as numbers and scale the columns: their own kernel would round t to int8 too (0.5 to 1 % of the result).
    """
    kind = kind_of(layer)
    if kind is Kind.BNB_4BIT:
        raise_if_repacked(layer, path)
        from bitsandbytes import matmul_4bit

        return matmul_4bit(t, layer.weight, quant_state=_quant_state(layer))
    if kind is Kind.BNB_8BIT:
        codes, scales = _int8(layer)
        return _linear_by_rows(t, codes) * scales.to(t.dtype)
    weight = plain_weight(layer, path, expert)
    return F.linear(t, weight) if weight.dtype == t.dtype else _linear_by_rows(t, weight)


def _linear_by_rows(t: Float[Tensor, "*b i"], weight: Shaped[Tensor, "o i"]) -> Float[Tensor, "*b o"]:
    return torch.cat([F.linear(t, rows.to(t.dtype)) for rows in weight.split(ROWS)], dim=-1)


def samples(layer: Linear) -> list[float]:
    """Stored elements of the weight, evenly spaced: numbers of a dense weight, codes and scales of a quantised one.

    Cheap at any size, and enough to tell one base from another. None of an unknown kind, which may hold no numbers.
    """
    kind = kind_of(layer)
    if kind is Kind.UNKNOWN:
        return []
    if kind is Kind.BNB_8BIT:
        codes, scales = _int8(layer)
        return spread(codes) + spread(scales)
    if kind is Kind.BNB_4BIT:
        return samples_4bit(layer.weight.view(torch.uint8), _quant_state(layer))
    with sharding.gathered([stored_parameter(layer)]):
        return spread(stored(layer))


def samples_4bit(codes: Tensor, state: Any) -> list[float]:
    """Of 4-bit codes (uint8) and bitsandbytes' QuantState."""
    parts = [codes, state.absmax]
    parts += [state.state2.absmax, state.offset] if state.nested else []
    return [value for part in parts for value in spread(part)]


def spread(tensor: Tensor) -> list[float]:
    """Up to SAMPLES elements from the first to the last."""
    flat = (tensor if tensor.is_contiguous() else tensor.mT).detach().reshape(-1)
    return flat[torch.tensor(spread_places(flat.numel()), device=flat.device)].float().tolist()


@cache
def spread_places(numel: int) -> list[int]:
    """Which elements of a flat tensor are looked at."""
    return torch.linspace(0, numel - 1, min(SAMPLES, numel), dtype=torch.float64, device="cpu").long().tolist()


def quantization(model: nn.Module) -> dict[str, Any] | None:
    """How the model was quantised, for the record in an adapter file, or None.

    The method is that of the first bitsandbytes layer; "unknown" if all layers that aren't dense are of unknown kinds.
    """
    odd = {p: m for p, m in model.named_modules() if features(m) and kind_of(m) is not Kind.DENSE}
    layers = {path: layer for path, layer in odd.items() if not is_lazy(layer)}
    if not layers:
        return None
    first: Linear = next(iter(layers.values()))
    layer: Linear = next((each for each in layers.values() if kind_of(each) is not Kind.UNKNOWN), first)
    record = {
        "method": "unknown",
        "quant_type": describe(layer),
        "blocksize": None,
        "double_quant": False,
        "compute_dtype": None,
        "weight_dtype": None,
        "modules": sorted(layers),
    }
    if kind_of(layer) is Kind.BNB_8BIT:
        return record | {"method": "bitsandbytes-8bit", "quant_type": "int8"}
    if kind_of(layer) is Kind.UNKNOWN:
        return record
    state, compute = _quant_state(layer), layer.compute_dtype
    return record | {
        "method": "bitsandbytes-4bit",
        "quant_type": state.quant_type,
        "blocksize": state.blocksize,
        "double_quant": bool(state.nested),
        "compute_dtype": None if compute is None else dtype_name(compute),
        "weight_dtype": dtype_name(state.dtype),
    }


def compute_dtype(layer: Linear) -> torch.dtype | None:
    """In which a 4-bit layer multiplies; None where it takes its input's."""
    if kind_of(layer) is not Kind.BNB_4BIT:
        return None
    return layer.compute_dtype or _quant_state(layer).dtype


def dense_module(layer: Linear, weight: Float[Tensor, "o i"], bias: Float[Tensor, "o"] | None) -> nn.Linear:
    """An nn.Linear with these tensors, frozen, to stand where the layer does."""
    d_out, d_in = weight.shape
    made = nn.Linear(d_in, d_out, bias is not None, device="meta").train(layer.training)
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return made


def requantized(layer: Linear, weight: Float[Tensor, "o i"], bias: Float[Tensor, "o"] | None) -> nn.Module:
    """A layer with these tensors, quantised as this bitsandbytes layer is."""
    import bitsandbytes as bnb

    d_out, d_in = weight.shape
    device = weight.device
    made: Any
    params: Any = bnb.nn.Params4bit if kind_of(layer) is Kind.BNB_4BIT else bnb.nn.Int8Params
    if kind_of(layer) is Kind.BNB_4BIT:
        state = _quant_state(layer)
        how = {"quant_type": state.quant_type, "compress_statistics": state.nested, "quant_storage": layer.weight.dtype}
        made = bnb.nn.Linear4bit(d_in, d_out, bias is not None, layer.compute_dtype, device="meta", **how)
        given = weight.to("cpu", state.dtype)
        made.weight = params(given, blocksize=state.blocksize, module=made, **how).to(device)
        made.compute_type_is_set = layer.compute_type_is_set
        made.support_avx512bf16_for_cpu = layer.support_avx512bf16_for_cpu
    else:
        threshold = layer.state.threshold
        made = bnb.nn.Linear8bitLt(
            d_in, d_out, bias is not None, has_fp16_weights=False, threshold=threshold, device="meta"
        )
        made.weight = params(weight.to("cpu"), requires_grad=False, has_fp16_weights=False).to(device)
    made.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    new: nn.Module = made.train(layer.training)
    return new


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Every 4-bit layer multiplies in this dtype; left to itself, one takes that of its first input."""
    for layer in _layers_4bit(model).values():
        layer.compute_dtype, layer.compute_type_is_set = dtype, True


def repackable(model: nn.Module) -> dict[str, nn.Module]:
    """Every 4-bit layer, by path, that an eval forward on this CPU would repack.

    Raises QuantizedWeightError if one has been repacked: gradients don't pass through it, so it spoils the
    adapters below it, whether it is a target or not.
    """
    layers = _layers_4bit(model)
    for path, layer in layers.items():
        raise_if_repacked(layer, path)
    return {path: layer for path, layer in layers.items() if layer.support_avx512bf16_for_cpu}


@contextmanager
def layout_kept(model: nn.Module) -> Iterator[None]:
    """Within the block, no forward repacks a 4-bit layer."""
    free = [layer for layer in _layers_4bit(model).values() if layer.support_avx512bf16_for_cpu]
    for layer in free:
        keep_layout(layer, True)
    try:
        yield
    finally:
        for layer in free:
            keep_layout(layer, False)


def _layers_4bit(model: nn.Module) -> dict[str, Linear]:
    return {path: m for path, m in model.named_modules() if _is(m, "bitsandbytes.nn", "Linear4bit")}


def keep_layout(layer: Linear, keep: bool) -> None:
    """Forbid (or allow again) that a forward repacks this 4-bit layer for AVX512-BF16."""
    layer.support_avx512bf16_for_cpu = not keep


def raise_if_repacked(layer: Linear, path: str) -> None:
    """QuantizedWeightError if an eval forward has repacked this 4-bit layer."""
    if getattr(_quant_state(layer), "packing_format_for_cpu", False):
        raise QuantizedWeightError(
            f"{path}: an eval forward has repacked this 4-bit weight for AVX512-BF16; it can't be read or "
            f"trained through any more\n"
            f"  load the model again, with lora_lite.load_base(...) or with attach before the first forward"
        )


def _quant_state(layer: Linear) -> Any:
    """Of a Linear4bit; FSDP leaves it on the module only."""
    state = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if state is None else state


def _int8(layer: Linear) -> tuple[Tensor, Tensor]:
    """Codes (d_out, d_in) and scales (d_out,) of a Linear8bitLt: weight = codes · scales."""
    state, weight = layer.state, layer.weight
    codes = weight.CB if state.CB is None else state.CB
    return (weight.data if codes is None else codes), _scales(layer) / 127


def _scales(layer: Linear) -> Any:
    """Of a Linear8bitLt; None until it is quantised."""
    return layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
