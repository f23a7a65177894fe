"""bitsandbytes without a layer: quantised tensors as they lie in a file, and the quantiser of an adapter's base.

On disk a 4-bit weight is `weight` (codes), `weight.absmax`, `weight.quant_map`, `weight.quant_state.bitsandbytes__nf4`
(JSON), and with double quantisation `weight.nested_absmax` and `weight.nested_quant_map`; an 8-bit one is `weight`
(I8), `SCB` and `weight_format`. Blocks of a weight are quantised independently, so all goes in chunks, but for the mean
that double quantisation takes of all scales.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from ..base.bitsandbytes import samples_4bit
from ..base.storage import Quantization, spread
from ..dtypes import STORAGE_DTYPES
from ..errors import CheckpointError, QuantizedWeightError
from ..io.safetensors import Header, parse_json

CHUNK = 1 << 18  # elements at a time: 1 MiB of float32, and a multiple of every blocksize
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BLOCKSIZE = 64  # bitsandbytes' default
NESTED_BLOCKSIZE = 256  # at which bitsandbytes quantises the scales themselves
KNOWN = {("bitsandbytes-4bit", "nf4"), ("bitsandbytes-4bit", "fp4"), ("bitsandbytes-8bit", "int8")}
STATE = 256  # bytes of the JSON beside the codes, with blanks after it, so that a file's size is known before them

_STATE = re.compile(r"\.quant_state\.bitsandbytes__(nf4|fp4)$")


@dataclass(frozen=True)
class Packed:
    """A quantised weight in a file."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # of the numbers that it stands for; None where the format doesn't say (8-bit)
    parts: dict[str, str]  # name of each part beside the codes -> its key


def find_packed(headers: Mapping[str, Header]) -> dict[str, Packed]:
    """Every bitsandbytes weight by its key. Raises CheckpointError for one that isn't whole."""
    packed = {}
    for key, header in headers.items():
        if state := _STATE.search(key):
            weight = key[: state.start()]
            packed[weight] = _packed_4bit(headers, weight, key, state[1])
        elif key.endswith(".weight") and header.entries[key].dtype == "I8":
            names = {name: key.removesuffix("weight") + name for name in ("SCB", "weight_format")}
            parts = {name: part for name, part in names.items() if part in headers}  # older files have no format
            if "SCB" in parts:  # or it is another library's int8
                packed[key] = Packed(key, header.entries[key].shape, None, parts)
    return packed


def _packed_4bit(headers: Mapping[str, Header], weight: str, state_key: str, quant_type: str) -> Packed:
    header = headers[state_key]
    stored = parse_json(bytes(header.read([state_key])[state_key].tolist()), f"{header.path}: {state_key}")
    shape: Any = stored.get("shape")
    dtype, blocksize = getattr(torch, str(stored.get("dtype")), None), stored.get("blocksize")
    names = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if "nested_blocksize" in stored else [])]
    parts = {name: f"{weight}.{name}" for name in names} | {f"quant_state.bitsandbytes__{quant_type}": state_key}
    lost = [key for key in (weight, *parts.values()) if key not in headers]
    is_matrix = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in shape)
    if lost or not is_matrix or dtype not in STORAGE_DTYPES or blocksize not in BLOCKSIZES:
        raise CheckpointError(f"{header.path}: {weight} is no whole 4-bit weight{': no ' + lost[0] if lost else ''}")
    codes, scales = (headers[key].entries[key] for key in (weight, parts["absmax"]))
    sizes = codes.stop - codes.start, torch.Size(scales.shape).numel()
    n = shape[0] * shape[1]
    wanted = -(-n // 2), -(-n // blocksize)  # two codes a byte, whatever dtype they are stored as (quant_storage)
    if sizes != wanted:
        raise CheckpointError(f"{header.path}: {weight} has (bytes of codes, scales) {sizes}, and {shape} {wanted}")
    return Packed(weight, tuple(shape), dtype, parts)


def unpack(headers: Mapping[str, Header], packed: Packed) -> tuple[Float[Tensor, "o i"], list[Any]]:
    """The numbers that a quantised tensor stands for, in `packed.dtype` (8-bit: float32); and its fingerprint."""
    codes, *parts = (headers[key].read([key])[key] for key in (packed.key, *packed.parts.values()))
    tensors = dict(zip(packed.parts, parts, strict=True))
    if "SCB" in tensors:
        return _scaled(codes, tensors["SCB"])
    from bitsandbytes.functional import QuantState

    state = QuantState.from_dict(tensors, device=torch.device("cpu"))
    codes = codes.view(torch.uint8).reshape(-1)  # (o i / 2,)
    return _dequantized(codes, state, torch.empty(packed.shape, dtype=state.dtype))


def as_trained(
    weight: Float[Tensor, "o i"], quantization: Quantization, dtype: torch.dtype
) -> tuple[Float[Tensor, "o i"], list[Any]]:
    """The numbers that a layer computes with once this weight is loaded in `dtype` and quantised; and its fingerprint.

    4-bit: in `dtype`, in the weight's own memory if it has that dtype. 8-bit: float32. Bit-equal to the live layer's
    `dense_weight()` on a CPU.

    Raises:
        QuantizedWeightError: for a quantiser that isn't known.
    """
    if (quantization.method, quantization.quant_type) not in KNOWN:
        problem = f"the adapter was trained on {quantization.quant_type} weights ({quantization.method})"
        raise QuantizedWeightError(f'{problem}, which can\'t be made again\n  use base_weights="original"')
    packed = pack(weight, quantization, dtype)
    return packed.numbers, packed.fingerprint


class PackedWeight(NamedTuple):
    """A weight that was quantised just now."""

    parts: dict[str, Tensor]  # the tensors of a file, by their names there beside the codes, "weight"
    numbers: Float[Tensor, "o i"]  # that they stand for
    fingerprint: list[Any]


def pack(weight: Float[Tensor, "o i"], quantization: Quantization, dtype: torch.dtype) -> PackedWeight:
    """The weight in `dtype`, quantised by a way of bitsandbytes. Memory and numbers are those of `as_trained`."""
    weight, quant_type = weight.to(dtype).contiguous(), quantization.quant_type
    if quantization.method == "bitsandbytes-8bit":
        from bitsandbytes.functional import int8_vectorwise_quant

        chunks = weight.split(max(1, CHUNK // weight.shape[1]))
        pairs = zip(*(int8_vectorwise_quant(rows.half())[:2] for rows in chunks), strict=True)
        codes, scales = map(torch.cat, pairs)
        parts = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}  # row by row
        return PackedWeight(parts, *_scaled(codes, scales))
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise

    flat, blocksize = weight.view(-1), quantization.blocksize or BLOCKSIZE  # (o i,)
    # Whole from the start: small tensors that stay, between chunks that come and go, would fragment the heap.
    packed = torch.empty(-(-len(flat) // 2), dtype=torch.uint8)
    absmax, offset, nested = torch.empty(-(-len(flat) // blocksize)), None, None
    for start in range(0, len(flat), CHUNK):
        some, state = quantize_4bit(flat[start : start + CHUNK], blocksize=blocksize, quant_type=quant_type)
        packed[start // 2 :][: some.numel()] = some.view(-1)
        absmax[start // blocksize :][: state.absmax.numel()] = state.absmax
    if quantization.double_quant:
        offset = absmax.mean()  # the one number that needs all blocks
        absmax, nested = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    code = get_4bit_type(quant_type, device="cpu")  # (16,)
    state = QuantState(absmax, weight.shape, code, blocksize, quant_type, dtype, offset, nested)
    parts = {"weight": packed[:, None], **state.as_dict(packed=True)}
    json = parts[key := f"quant_state.bitsandbytes__{quant_type}"]
    parts[key] = F.pad(json, (0, STATE - len(json)), value=ord(" "))  # the offset's digits vary
    return PackedWeight(parts, *_dequantized(packed, state, weight))


def layout(shape: tuple[int, int], quantization: Quantization) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The key's end, dtype and shape of each tensor that `pack` makes of a weight of this shape, in a file's order."""
    n = shape[0] * shape[1]
    if quantization.method == "bitsandbytes-8bit":
        return {"weight": ("I8", shape), "SCB": ("F32", shape[:1]), "weight_format": ("U8", ())}
    blocks, nested = -(-n // (quantization.blocksize or BLOCKSIZE)), quantization.double_quant
    parts: dict[str, tuple[str, tuple[int, ...]]] = {"weight": ("U8", (-(-n // 2), 1))}
    parts |= {"absmax": ("U8" if nested else "F32", (blocks,)), "quant_map": ("F32", (16,))}
    if nested:
        parts |= {"nested_absmax": ("F32", (-(-blocks // NESTED_BLOCKSIZE),)), "nested_quant_map": ("F32", (256,))}
    return parts | {f"quant_state.bitsandbytes__{quantization.quant_type}": ("U8", (STATE,))}


def _scaled(codes: Int8[Tensor, "o i"], scb: Tensor) -> tuple[Float[Tensor, "o i"], list[Any]]:
    scales = scb.float() / 127  # (o,): one for each row
    return codes.float().mul_(scales[:, None]), ["int8", *spread(codes), *spread(scales)]


def _dequantized(codes: UInt8[Tensor, "c"], state: Any, out: Tensor) -> tuple[Float[Tensor, "o i"], list[Any]]:
    """`out` with the numbers of these 4-bit codes written into it."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    flat, blocksize, absmax = out.view(-1), state.blocksize, state.absmax
    if state.nested:  # as bitsandbytes' own dequantising does it
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    for start in range(0, len(flat), CHUNK):
        stop = min(start + CHUNK, len(flat))
        scales, shape = absmax[start // blocksize : -(-stop // blocksize)].float(), torch.Size([stop - start])
        part = QuantState(scales, shape, None, blocksize, state.quant_type, out.dtype)
        flat[start:stop] = dequantize_4bit(codes[start // 2 : -(-stop // 2)].unsqueeze(1), part)
    return out, ["uint8", *samples_4bit(codes, state)]
