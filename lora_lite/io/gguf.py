"""GGUF files as untrusted input, and written: llama.cpp's container (docs/gguf.md of ggml, version 3, little-endian).

    "GGUF", version u32, tensors u64, fields u64
    fields       key, type u32, value
    tensors      name, dimensions u32, sizes u64 each, the fastest first, type u32, offset u64 from the data's start
    padding to general.alignment (32), then the tensors' bytes, each one padded likewise

A text is its length u64 and its bytes. Every count of the file is held against the bytes that are left before anything
is read for it, and the tensors lie one after the other, as ggml wants them: none overlaps another. gguf.GGUFReader maps
the file and believes its counts.
"""

import io
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError, brief
from .safetensors import Entry, Header, check_names, open_file

MAGIC, VERSIONS = b"GGUF", (2, 3)  # version 1 had lengths of 32 bits
ALIGNMENT = 32  # where general.alignment isn't there
LONGEST_TEXT = 1_000_000  # bytes of a text; a model card's description is the longest that a converter writes
LONGEST_TENSOR_NAME = 63  # GGML_MAX_NAME - 1
MOST = 65_536  # fields, tensors, and texts in a list; an adapter has a few thousand
_TEXT, _LIST = 8, 9
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # to the codes of struct
_TYPES = {0: "F32", 1: "F16", 8: "Q8_0", 28: "F64", 30: "BF16"}  # GGML's numbers of types to safetensors' names
_BYTES = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "F64": (1, 8), "Q8_0": (32, 34)}  # (numbers, bytes) of a block
_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}

Value = str | int | float | bool | None
"""A field; None for a list, which no adapter needs."""


@dataclass(frozen=True)
class Gguf:
    """A GGUF file whose header is whole and agrees with the file's size."""

    header: Header
    fields: dict[str, Value]

    def matrix_or_vector(self, key: str) -> Tensor:
        """A tensor in memory of its own, row-major; 8-bit blocks (Q8_0) as float32. Raises CheckpointError."""
        entry = self.header.entries[key]
        if entry.dtype != "Q8_0":
            return self.header.read([key])[key]
        size = entry.stop - entry.start
        raw = Header(self.header.path, {key: Entry("U8", (size // 34, 34), entry.start, entry.stop)}).read()[key]
        scales, steps = raw[:, :2].contiguous().view(torch.float16), raw[:, 2:].contiguous().view(torch.int8)
        return (scales.float() * steps.float()).reshape(entry.shape)  # (blocks, 1) * (blocks, 32)


def is_gguf(path: Path) -> bool:
    """Does the file begin as a GGUF file? Raises nothing."""
    try:
        with open_file(path) as file:
            return file.read(4) == MAGIC
    except (CheckpointError, OSError):
        return False


def read_gguf(path: Path) -> Gguf:
    """The header of a GGUF file.

    Raises:
        CheckpointError: for anything that isn't one, whole and consistent, and for tensors of other types than F32,
            F16, BF16, F64 and Q8_0, which a model may have and no adapter.
    """
    try:
        # Fields are a few bytes each, and open_file's calls go to the system.
        with open_file(path) as raw, io.BufferedReader(raw, 1 << 16) as file:  # type: ignore[type-var]
            size = os.fstat(raw.fileno()).st_size
            return _read(path, _Cursor(file, size), size)
    except _DamageError as error:
        raise CheckpointError(
            f"{path} is no GGUF file, or is damaged: {brief(error, 600)}\n  copy or convert it again"
        ) from error


class _DamageError(ValueError):
    """A fault of a file, before the file's name is put to it."""


class _Cursor:
    """A place in a file, which knows how many bytes are left."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left = file, size

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise _DamageError(f"{what} would be {count} bytes, and {self.left} are left")
        self.left -= count
        read = self.file.read(count)
        if len(read) < count:
            raise _DamageError("it became shorter while it was read")
        return read

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def count(self, most: int, what: str, least: int = 1) -> int:
        """A count of things of at least some bytes each."""
        count = self.number("Q", what)
        if count > min(most, self.left // least):
            raise _DamageError(f"{count} {what} in the {self.left} bytes that are left; wanted at most {most}")
        return count

    def text(self, what: str, longest: int = LONGEST_TEXT) -> str:
        try:
            return self.take(self.count(longest, f"bytes of {what}"), what).decode()
        except UnicodeDecodeError as error:
            raise _DamageError(f"{what} is no UTF-8") from error


def _read(path: Path, cursor: _Cursor, size: int) -> Gguf:
    if cursor.take(4, "its first bytes") != MAGIC:
        raise _DamageError("it doesn't begin with GGUF")
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        raise _DamageError(f"its version is {version}, of {VERSIONS}; a file for big-endian machines isn't read")
    tensors, count = cursor.count(MOST, "tensors", 24), cursor.count(MOST, "fields", 13)
    fields: dict[str, Value] = {}
    for _ in range(count):
        key = cursor.text("a field's key", 65_535)
        if key in fields:  # readers differ in which of two they take, so a file could be two
            raise _DamageError(f"the field {key!r} is there twice")
        fields[key] = _value(cursor, key)
    alignment = fields.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise _DamageError(f"general.alignment={alignment!r}; wanted a power of 2 from 8 on")
    places: dict[str, tuple[str, tuple[int, ...], int]] = {}  # name -> type, shape, offset
    for _ in range(tensors):
        name = cursor.text("a tensor's name", LONGEST_TENSOR_NAME)
        if name in places:
            raise _DamageError(f"the tensor {name!r} is there twice")
        places[name] = _place(cursor, name, fields.get("general.type"))
    check_names([*fields, *places], str(path))
    start = _padded(size - cursor.left, alignment)
    entries, stop, end = {}, start, start
    for name, (dtype, shape, offset) in places.items():
        if start + offset != end:
            raise _DamageError(
                f"{name!r} begins at byte {offset} of the data, and the tensors before it end at {end - start}"
            )
        numbers, width = _BYTES[dtype]
        if not shape or shape[-1] % numbers:
            raise _DamageError(f"{name!r} is {dtype} {shape}")
        stop = end + prod(shape) // numbers * width
        entries[name], end = Entry(dtype, shape, end, stop), _padded(stop, alignment)
    if places and not stop <= size <= end:  # the last one's padding may be left out
        raise _DamageError(f"its tensors end at byte {stop}, and it has {size}")
    return Gguf(Header(path, entries, {}, start), fields)


def _value(cursor: _Cursor, key: str) -> Value:
    kind = cursor.number("I", "a field's type")
    if kind == _TEXT:
        return cursor.text(f"the field {key!r}")
    if kind != _LIST:
        return cursor.number(_code(kind, key), f"the field {key!r}")
    inner = cursor.number("I", "a list's type")
    if inner == _TEXT:
        for _ in range(cursor.count(MOST, f"texts of {key!r}", 8)):
            cursor.text(f"a text of {key!r}")
        return None
    width = struct.calcsize(f"<{_code(inner, key)}")
    cursor.take(width * cursor.count(LONGEST_TEXT, f"numbers of {key!r}", width), f"the field {key!r}")
    return None


def _code(kind: int, key: str) -> str:
    if kind not in _SCALARS:  # a list of lists, too: llama.cpp takes none
        raise _DamageError(f"the field {key!r} has the type {kind}")
    return _SCALARS[kind]


def _place(cursor: _Cursor, name: str, of: Value) -> tuple[str, tuple[int, ...], int]:
    dimensions = cursor.number("I", f"the dimensions of {name!r}")
    if not 1 <= dimensions <= 4:
        raise _DamageError(f"{name!r} has {dimensions} dimensions; wanted 1 to 4")
    sizes = [cursor.number("Q", f"the sizes of {name!r}") for _ in range(dimensions)]
    kind, offset = cursor.number("I", f"the type of {name!r}"), cursor.number("Q", f"the offset of {name!r}")
    if kind not in _TYPES:
        raise _DamageError(
            f"{name!r} has GGML's type {kind} in a file of the type {brief(of)!r}; "
            f"an adapter's tensors are {', '.join(_TYPES.values())}, and a model's file is no adapter"
        )
    if not all(0 < size < 1 << 40 for size in sizes):
        raise _DamageError(f"{name!r} has the sizes {sizes}")
    return _TYPES[kind], tuple(reversed(sizes)), offset


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


# ---- writing ------------------------------------------------------------------------------------


def write_gguf(file: BufferedIOBase, fields: Mapping[str, str | int | float], tensors: Mapping[str, Tensor]) -> None:
    """Write a whole GGUF file: texts, ints as u32, floats as f32; tensors of float32, float16 or bfloat16, row-major.

    Raises:
        CheckpointError: for a name that GGML has no room for, before anything is written.
    """
    long = [name for name in tensors if len(name.encode()) > LONGEST_TENSOR_NAME]
    if long:
        raise CheckpointError(f"{long[0]} is longer than the {LONGEST_TENSOR_NAME} bytes of a tensor's name in GGML")
    header = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(fields))]
    for key, value in fields.items():
        kind, code = (_TEXT, "") if isinstance(value, str) else (4, "<I") if isinstance(value, int) else (6, "<f")
        packed = _packed(value) if isinstance(value, str) else struct.pack(code, value)
        header += [_packed(key), struct.pack("<I", kind), packed]
    offset = 0
    for name, tensor in tensors.items():
        sizes = struct.pack(f"<I{tensor.ndim}Q", tensor.ndim, *reversed(tensor.shape))
        header += [_packed(name), sizes, struct.pack("<IQ", _NUMBERS[tensor.dtype], offset)]
        offset += _padded(tensor.nbytes, ALIGNMENT)
    _write_padded(file, b"".join(header))
    for tensor in tensors.values():
        _write_padded(file, tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _packed(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _write_padded(file: BufferedIOBase, data: bytes) -> None:
    file.write(data)
    file.write(bytes(_padded(len(data), ALIGNMENT) - len(data)))
