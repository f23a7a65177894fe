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

from ..dtypes import STORAGE_DTYPES, fits
from ..errors import CheckpointError, brief

LONGEST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""
LONGEST_JSON = 16_000_000
"""Bytes of a config or an index beside the tensors."""
LONGEST_NAME = 400
"""Characters of a key: a path in a model, with all that wrappers add."""
DEEPEST = 16
"""Levels of lists and objects in JSON; an adapter's metadata has 5."""

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
_INDEX = ".safetensors.index.json"
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
        with open_file(self.path) as file:
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
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(size - 8, LONGEST_HEADER):
            raise _no_safetensors(path, first, f"{size} bytes, of which the header alone would be {length}")
        text = file.read(length)
    try:
        raw = parse_json(text, "its header")
        metadata = raw.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError("its metadata isn't text by name")
        check_names(raw, "its header")
        entries = {key: _entry(key, value, 8 + length, size) for key, value in raw.items()}
        _check_places(entries, 8 + length, size)
    except (CheckpointError, AttributeError) as error:
        raise _no_safetensors(path, first, str(error)) from error
    return Header(path, entries, metadata, 8 + length)


def open_file(path: Path) -> BinaryIO:
    """A regular file, open to read. CheckpointError for a folder, a pipe, a device, a name that leads nowhere."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file\n  an adapter is one file, as lora_lite.save writes it")
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}\n  an adapter is one file") from error


def check_names(names: Iterable[Any], where: str) -> None:
    """CheckpointError for a key that could be no path in a model, and would make messages of any length."""
    for name in names:
        if not (isinstance(name, str) and len(name) <= LONGEST_NAME and name.isprintable()):
            raise CheckpointError(
                f"{where} names {brief(name)!r}; wanted printable paths of at most {LONGEST_NAME} characters"
            )


def _entry(key: str, value: Any, start: int, size: int) -> Entry:
    if not (isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"}):
        raise CheckpointError(f"{key!r} isn't described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else []
    ok = len(offsets) == 2 and len(numbers) <= 66 and set(map(type, numbers)) == {int} if numbers else False
    if not ok or min(numbers) < 0 or max(numbers) > size << 3:
        raise CheckpointError(f"{key!r} has a shape or offsets that this file can't hold")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{key!r} has the unknown dtype {brief(dtype)!r}")
    if math.prod(shape) * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(f"{key!r} is {dtype} {brief(shape)}, and has {offsets[1] - offsets[0]} bytes")
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _check_places(entries: Mapping[str, Entry], start: int, size: int) -> None:
    at = start
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            raise CheckpointError(f"the bytes of {key!r} overlap another tensor's, or leave a gap")
        at = entry.stop
    if at != size:
        raise CheckpointError(f"its tensors end at byte {at} of {size}")


def _no_safetensors(path: Path, first: bytes, why: str) -> CheckpointError:
    pickled = first.startswith((b"PK", b"\x80"))
    kind = "looks like a pickle, which is never opened: it can run code" if pickled else "is cut short or damaged"
    return CheckpointError(f"{path} is no safetensors file; it {kind}\n  {why}\n  copy or save it again")


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object; CheckpointError for anything else, a key that is there twice, or nesting past DEEPEST."""
    try:
        text = text if isinstance(text, str) else text.decode()
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {brief(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: wanted a JSON object, got {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [item for each in level for item in _items(each) if type(item) in (dict, list)]
    if level:
        raise CheckpointError(f"{where} has lists or objects nested more than {DEEPEST} deep")
    return value


def _items(value: Any) -> Iterable[Any]:
    return value.values() if type(value) is dict else value


def check_numbers(tensors: Mapping[str, Tensor], where: str, cure: str) -> None:
    """CheckpointError unless all are finite floating numbers."""
    odd = [key for key, tensor in tensors.items() if tensor.dtype not in STORAGE_DTYPES or not fits(tensor)]
    if odd:
        raise CheckpointError(
            f"{where}: {len(odd)} tensors hold NaN, infinities or no floating numbers, such as {odd[0]} "
            f"({tensors[odd[0]].dtype})\n  {cure}"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a small file. Raises CheckpointError."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LONGEST_JSON:
            raise CheckpointError(f"{path} has {size} bytes; wanted at most {LONGEST_JSON} of JSON")
        return parse_json(file.read(size), str(path))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key is there twice")
    return made


def shard_names(folder: Path, stem: str = "model") -> dict[str, str] | None:
    """Key -> file name, from a folder's index of sharded files; None if it has none.

    Raises CheckpointError for a name that isn't a plain one in this folder.
    """
    index = folder / f"{stem}{_INDEX}"
    if not os.path.lexists(index):
        return None
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: wanted a weight_map from keys to file names")
    check_names(names, str(index))
    for name in names.values():
        plain = isinstance(name, str) and len(name) < 256 and name.isprintable() and not set(name) & set("/\\:")
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: it names the file {brief(name)!r}; wanted the plain name of a safetensors file here"
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


def read_any(path: str | os.PathLike[str]) -> list[Header]:
    """The header of a file; of a folder, that of the one safetensors file in it, or those that its index names.

    Raises CheckpointError.
    """
    path = Path(path)
    if not path.is_dir():
        return [read_header(path)]
    names = sorted(os.listdir(path))
    stems = [name.removesuffix(_INDEX) for name in names if name.endswith(_INDEX)]
    if len(stems) == 1:
        return list({header.path: header for header in read_shards(path, stems[0]).values()}.values())
    files = [name for name in names if name.endswith(".safetensors")]
    if stems or len(files) != 1:
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
        listed = brief(", ".join(stems + files)) or "-"
        raise CheckpointError(
            f"{path}: {len(stems)} indexes and {len(files)} safetensors files: {listed}\n"
            f"  wanted one file, or several with one index ({_INDEX[1:]}); name the file itself"
            + "".join(f"\n  {brief(name)} looks like a pickle, which is never opened" for name in pickles[:1])
        )
    return [read_header(path / files[0])]


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
