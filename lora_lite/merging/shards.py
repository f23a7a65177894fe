"""The files of a merged checkpoint, as their tensors and the bytes that these come in."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class OutputTensor:
    """One tensor of the output."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    size: int  # bytes
    pieces: Callable[[], Iterator[Any]]  # its bytes in order: chunks of the base's file, or matrices that are computed


@dataclass
class Shard:
    """One file of the output, named as the base's."""

    name: str
    tensors: list[OutputTensor] = field(default_factory=list)

    def header(self) -> bytes:
        """8 bytes of length, and the JSON, padded to a multiple of 8."""
        offset, entries = 0, {}
        for tensor in self.tensors:
            offsets = [offset, offset := offset + tensor.size]
            entries[tensor.key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # or the tensors' bytes would start unaligned
        return len(text).to_bytes(8, "little") + text

    def pieces(self) -> Iterator[Any]:
        """The file's bytes, some at a time."""
        yield self.header()
        for tensor in self.tensors:
            yield from tensor.pieces()

    @property
    def size(self) -> int:
        return len(self.header()) + sum(tensor.size for tensor in self.tensors)
