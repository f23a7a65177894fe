"""Safetensors files and JSON as untrusted input: nothing is read before its size and place are known to be right.

No pickle is ever opened. A file is 8 bytes (the header's length, little-endian), a JSON header
`{key: {"dtype", "shape", "data_offsets": [start, stop]}, "__metadata__": {str: str}}`, then the tensors' bytes without
gaps. Reading is by `pread`-like calls into memory of its own; a mapped file would count as resident.
"""

import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from .errors import CheckpointError

LONGEST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""
LONGEST_JSON = 16_000_000
"""Bytes of a config or an index beside the tensors."""

DTYPES = dict(
    zip(
        ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"),
        (
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
            *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        ),
        strict=True,
    )
)
"""Of the dtypes in a header, those that are read into tensors here."""
_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}
_BITS |= {"U64": 64, "U32": 32, "U16": 16, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}


@dataclass(frozen=True)
class Entry:
    """Where one tensor is: its bytes are [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A safetensors file whose header is whole and agrees with the file's size."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)
    start: int = 0
    """Where the tensors' bytes begin."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor."""
        return {key: entry.shape for key, entry in self.entries.items()}

    def read(self, keys: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors of these keys, or all, in memory of their own. Raises CheckpointError."""
        with self.path.open("rb", buffering=0) as file:
            return {key: self.tensor(file, key) for key in (self.entries if keys is None else keys)}

    def tensor(self, file: BinaryIO, key: str, index: int | None = None) -> Tensor:
        """One tensor, or one of those that it stacks, from the open file. Raises CheckpointError."""
        entry = self.entries[key]
        if index is not None:
            size = (entry.stop - entry.start) // entry.shape[0]
            entry = Entry(entry.dtype, entry.shape[1:], entry.start + index * size, entry.start + (index + 1) * size)
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"{self.path}: {key} is stored as {entry.dtype}; wanted one of {', '.join(DTYPES)}")
        raw = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
        file.seek(entry.start)
        into = memoryview(raw.numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(into):
            count = file.readinto(into[done:])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"{self.path} became shorter while it was read")
            done += count
        return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a safetensors file. Raises CheckpointError for anything that isn't one, whole and consistent."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file\n  an adapter is one file, as lora_lite.save writes it")
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(size - 8, LONGEST_HEADER):
            raise _no_safetensors(path, first, f"{size} bytes, of which the header alone would be {length}")
        text = file.read(length)
    try:
        raw = parse_json(text, str(path))
        metadata = raw.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError("its metadata isn't text by name")
        entries = {key: _entry(key, value, 8 + length, size) for key, value in raw.items()}
        _check_places(entries, 8 + length, size)
    except (CheckpointError, AttributeError) as error:
        raise _no_safetensors(path, first, str(error)) from error
    return Header(path, entries, metadata, 8 + length)


def _entry(key: str, value: Any, start: int, size: int) -> Entry:
    if not (isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"}):
        raise CheckpointError(f"{key[:80]!r} isn't described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    numbers = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and len(shape) <= 64
    if not numbers or not all(type(n) is int and 0 <= n <= size << 3 for n in (*shape, *offsets)):
        raise CheckpointError(f"{key[:80]!r} has a shape or offsets that this file can't hold")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{key[:80]!r} has the unknown dtype {str(dtype)[:40]!r}")
    if math.prod(shape) * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(f"{key[:80]!r} is {dtype} {shape}, and has {offsets[1] - offsets[0]} bytes")
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _check_places(entries: Mapping[str, Entry], start: int, size: int) -> None:
    at = start
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            raise CheckpointError(f"the bytes of {key[:80]!r} overlap another tensor's, or leave a gap")
        at = entry.stop
    if at != size:
        raise CheckpointError(f"its tensors end at byte {at} of {size}")


def _no_safetensors(path: Path, first: bytes, why: str) -> CheckpointError:
    pickled = first.startswith((b"PK", b"\x80"))
    kind = "looks like a pickle, which is never opened: it can run code" if pickled else "is cut short or damaged"
    return CheckpointError(f"{path} is no safetensors file; it {kind}\n  {why}\n  copy or save it again")


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object; CheckpointError for anything else, a key that is there twice, or endless nesting."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: wanted a JSON object, got {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a small file. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    if path.stat().st_size > LONGEST_JSON:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; wanted at most {LONGEST_JSON} of JSON")
    return parse_json(path.read_bytes(), str(path))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key is there twice")
    return made


def shard_names(folder: Path, stem: str = "model") -> dict[str, str] | None:
    """Key -> file name, from a folder's index of sharded files; None if it has none.

    Raises CheckpointError for a name that isn't a plain one in this folder.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        return None
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: wanted a weight_map from keys to file names")
    for name in names.values():
        plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: it names the file {str(name)[:80]!r}; wanted the plain name of a safetensors file here"
            )
    return names


def read_shards(folder: Path, stem: str = "model") -> dict[str, Header]:
    """The file that holds each key of a folder, one or sharded by an index. Raises CheckpointError."""
    names = shard_names(folder, stem)
    if names is None:
        header = read_header(folder / f"{stem}.safetensors")
        return dict.fromkeys(header.entries, header)
    headers = {name: read_header(folder / name) for name in sorted(set(names.values()))}
    held = [key for header in headers.values() for key in header.entries]
    lost, twice = [k for k in names if k not in headers[names[k]].entries], len(held) - len(set(held))
    unnamed = sorted(set(held) - names.keys())
    if lost or twice or unnamed:
        raise CheckpointError(
            f"{folder}: the index and the files disagree: {len(lost)} keys are not where it says, {twice} are in two "
            f"files, {len(unnamed)} are in a file and not in the index\n  such as {', '.join((lost + unnamed)[:3])}"
        )
    return {key: headers[name] for key, name in names.items()}


# ---- writing ------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block is done: a crash leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with temporary.open("xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A whole safetensors file, or none."""
    with replacing(path) as handle:
        handle.write(to_bytes(tensors, metadata=metadata))


def write_json(path: Path, value: Any) -> None:
    """A whole JSON file, or none."""
    with replacing(path) as handle:
        handle.write((json.dumps(value, indent=2) + "\n").encode())


def sync_folder(path: Path) -> None:
    """Make a rename last through a power cut, where folders can be opened."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
