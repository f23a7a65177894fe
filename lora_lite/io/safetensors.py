"""Safetensors files and JSON as untrusted input: nothing is read before its size and place are known to be right.

No pickle is ever opened. A file is 8 bytes (the header's length, little-endian), a JSON header
`{key: {"dtype", "shape", "data_offsets": [start, stop]}, "__metadata__": {str: str}}`, then the tensors' bytes without
gaps. Reading is by `pread`-like calls into memory of its own; a mapped file would count as resident.
"""

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..dtypes import STORAGE_DTYPES, fits
from ..errors import CheckpointError, brief

INDEX = "model.safetensors.index.json"  # as transformers writes it beside the shards of one model
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # ends of names that are never opened: unpickling runs code
LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
LONGEST_JSON = 16_000_000  # bytes of a config or an index beside the tensors
LONGEST_NAME = 400  # characters of a key: a path in a model, with all that wrappers add
DEEPEST = 16  # levels of lists and objects in JSON; an adapter's metadata has 5

NO_SPECS: Mapping[str, Any] = {}
DTYPES = {  # the dtypes that are read into tensors here, by their names in a header
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_INDEX_END = INDEX.removeprefix("model")  # what follows the stem in the name of any index


@dataclass(frozen=True)
class Entry:
    """The place of one tensor: its bytes are [start, stop) of the file."""

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
    start: int = 0  # where the tensors' bytes begin

    def read(self, keys: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors of these keys, or all, in memory of their own. Raises CheckpointError."""
        with open_file(self.path) as file:
            return {key: self.tensor(file, key) for key in (self.entries if keys is None else keys)}

    def tensor(self, file: BinaryIO, key: str, index: int | None = None) -> Tensor:
        """One tensor, or one of those that it stacks, from the open file.

        Raises:
            CheckpointError: for a dtype that is not in DTYPES, or a file that became shorter since its header was read.
        """
        entry = self.entries[key]
        if index is not None:  # one expert of (experts, o, i) lies in one piece, so no other one is read
            size = (entry.stop - entry.start) // entry.shape[0]
            entry = Entry(entry.dtype, entry.shape[1:], entry.start + index * size, entry.start + (index + 1) * size)
        if entry.dtype not in DTYPES:
            raise CheckpointError(f"{self.path}: {key} is stored as {entry.dtype}; wanted one of {', '.join(DTYPES)}")
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])  # of its own, and no view: an adapter takes it
        file.seek(entry.start)
        buffer = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(buffer):  # one call of the system reads at most 2 GiB
            count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"{self.path} became shorter while it was read")
            done += count
        return tensor


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a safetensors file.

    Raises:
        CheckpointError: for anything that isn't one, whole and consistent.
    """
    path = Path(path)
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(size - 8, LONGEST_HEADER):  # before memory is taken for it
            raise _no_safetensors(path, first, f"{size} bytes, of which the header alone would be {length}")
        text = file.read(length)
    try:
        raw = parse_json(text, "its header")  # no key is there twice, so both readers see the same
        with safe_open(path, "numpy"):  # finds types, dtypes and sizes right, and the file filled, each byte once
            metadata = raw.pop("__metadata__", None) or {}
        check_names(raw, "its header")
        entries = {key: _entry(key, value, 8 + length, size) for key, value in raw.items()}
    except (CheckpointError, SafetensorError) as error:
        raise _no_safetensors(path, first, brief(error, 600)) from error
    return Header(path, entries, metadata, 8 + length)


def open_file(path: Path) -> BinaryIO:
    """A regular file, open to read.

    Raises:
        CheckpointError: for a folder, a pipe, a device, a name that leads nowhere.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            raise CheckpointError(f"{path} is not a file\n  an adapter is one file, as lora_lite.save writes it")
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}\n  an adapter is one file") from error


def _entry(key: str, value: dict[str, Any], start: int, size: int) -> Entry:
    if value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{key!r} isn't described by dtype, shape and data_offsets")
    shape, (first, last) = value["shape"], value["data_offsets"]
    # torch has at most 64 dimensions. No element is under a bit, but an empty tensor's other sides could be any.
    if len(shape) > 64 or max(shape, default=0) > size << 3:
        raise CheckpointError(f"{key!r} has a shape that this file can't hold")
    return Entry(value["dtype"], tuple(shape), start + first, start + last)


def _no_safetensors(path: Path, first: bytes, reason: str) -> CheckpointError:
    pickled = first.startswith((b"PK", b"\x80"))  # torch.save writes a zip, and wrote a bare pickle before 1.6
    kind = "looks like a pickle, which is never opened: it can run code" if pickled else "is cut short or damaged"
    cure = "copy or save it again"
    if path.suffix == ".ckpt":
        cure = "of a Lightning checkpoint, lora_lite.trainer.lightning.save_adapters(path, folder) makes files"
    if first.startswith(b"GGUF"):
        kind, cure = "is a GGUF file", f"name it {path.stem}.gguf"
    return CheckpointError(f"{path} is no safetensors file; it {kind}\n  {reason}\n  {cure}")


def check_names(names: Iterable[Any], where: str) -> None:
    """CheckpointError for a key that could be no path in a model, and would make messages of any length."""
    for name in names:
        if not (isinstance(name, str) and len(name) <= LONGEST_NAME and name.isprintable()):
            raise CheckpointError(
                f"{where} names {brief(name)!r}; wanted printable paths of at most {LONGEST_NAME} characters"
            )


def check_numbers(
    tensors: dict[str, Tensor], where: str, cure: str, specs: Mapping[str, Any] = NO_SPECS
) -> dict[str, Tensor]:
    """The tensors. CheckpointError unless all are finite floating numbers, or tables of the dtype and the range that
    their `ParamSpec` names."""
    wrong = [key for key, tensor in tensors.items() if not _is_sound(tensor, specs.get(key))]
    if wrong and tensors[wrong[0]].dtype == getattr(specs.get(wrong[0]), "dtype", None):
        raise CheckpointError(f"{where}: {wrong[0]} has indices out of their range or order\n  {cure}")
    if wrong:
        raise CheckpointError(
            f"{where}: {len(wrong)} tensors hold NaN, infinities or no floating numbers, such as {wrong[0]} "
            f"({tensors[wrong[0]].dtype})\n  {cure}"
        )
    return tensors


def _is_sound(tensor: Tensor, spec: Any) -> bool:
    if getattr(spec, "dtype", None) is None:
        return tensor.dtype in STORAGE_DTYPES and fits(tensor)
    return tensor.dtype == spec.dtype and (spec.below is None or _is_index(tensor, spec.below, spec.is_sorted))


def _is_index(table: Tensor, below: int, is_sorted: bool) -> bool:
    """Can it index something of this size? An index from a file may be anything."""
    in_range = not table.numel() or (int(table.min()) >= 0 and int(table.max()) < below)
    return in_range and not (is_sorted and (table.diff() <= 0).any())


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: for anything else, a key that is there twice, or nesting past DEEPEST.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {brief(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: wanted a JSON object, got {type(value).__name__}")
    level: list[Any] = [value]  # all lists and objects at one depth; no recursion, which a file could make deep
    for _ in range(DEEPEST):
        children = (outer.values() if type(outer) is dict else outer for outer in level)
        level = [item for items in children for item in items if type(item) in (dict, list)]
    if level:
        raise CheckpointError(f"{where} has lists or objects nested more than {DEEPEST} deep")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different: readers differ in which of two they take, so a file could be two."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a small file. Raises CheckpointError."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LONGEST_JSON:
            raise CheckpointError(f"{path} has {size} bytes; wanted at most {LONGEST_JSON} of JSON")
        return parse_json(file.read(size), str(path))


def shard_names(folder: Path, stem: str = "model") -> dict[str, str] | None:
    """Key -> file name, from a folder's index of sharded files; None if it has none.

    Raises:
        CheckpointError: for a name that isn't a plain one in this folder.
    """
    index = folder / f"{stem}{_INDEX_END}"
    if not os.path.lexists(index):  # a link that leads nowhere is an index that can't be read, not a lack of one
        return None
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: wanted a weight_map from keys to file names")
    check_names(names, str(index))
    for name in names.values():  # "/", "\\" and ":" could lead out of the folder, on one system or another
        plain = isinstance(name, str) and len(name) < 256 and name.isprintable() and not set(name) & set("/\\:")
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: it names the file {brief(name)!r}; wanted the plain name of a safetensors file here"
            )
    return names


def read_shards(folder: Path, stem: str = "model") -> dict[str, Header]:
    """The file that holds each key of a folder, one or sharded by an index.

    Raises:
        CheckpointError: for a file that can't be read, and unless each key is in one file, the one that the index says.
    """
    names = shard_names(folder, stem)
    if names is None:
        header = read_header(folder / f"{stem}.safetensors")
        return dict.fromkeys(header.entries, header)
    headers = {name: read_header(folder / name) for name in sorted(set(names.values()))}
    keys = [key for header in headers.values() for key in header.entries]
    lost, twice = [key for key in names if key not in headers[names[key]].entries], len(keys) - len(set(keys))
    unnamed = sorted(set(keys) - names.keys())
    if lost or twice or unnamed:
        raise CheckpointError(
            f"{folder}: the index and the files disagree: {len(lost)} keys are not where it says, {twice} are in two "
            f"files, {len(unnamed)} are in a file and not in the index\n  such as {', '.join((lost + unnamed)[:3])}"
        )
    return {key: headers[name] for key, name in names.items()}


def read_any(path: str | os.PathLike[str]) -> list[Header]:
    """The header of a file; of a folder, that of the one safetensors file in it, or those that its index names.

    Raises:
        CheckpointError: for a file that can't be read, and a folder in which it isn't clear which files are meant.
    """
    path = Path(path)
    if not path.is_dir():
        return [read_header(path)]
    names = sorted(os.listdir(path))
    stems = [name.removesuffix(_INDEX_END) for name in names if name.endswith(_INDEX_END)]
    if len(stems) == 1:
        return list({header.path: header for header in read_shards(path, stems[0]).values()}.values())
    files = [name for name in names if name.endswith(".safetensors")]
    if stems or len(files) != 1:
        pickles = [name for name in names if name.endswith(PICKLES)]
        listed = brief(", ".join(stems + files)) or "-"
        raise CheckpointError(
            f"{path}: {len(stems)} indexes and {len(files)} safetensors files: {listed}\n"
            f"  wanted one file, or several with one index ({_INDEX_END[1:]}); name the file itself"
            + "".join(f"\n  {brief(name)} looks like a pickle, which is never opened" for name in pickles[:1])
        )
    return [read_header(path / files[0])]


# ---- writing ------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block is done: a crash leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"  # beside it: a rename is atomic in one file system
    try:
        with temporary.open("xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())  # the bytes first, or a power cut could leave the new name on an empty file
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a whole safetensors file, or none."""
    with replacing(path) as handle:
        handle.write(to_bytes(tensors, metadata=metadata))


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file, or none."""
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
