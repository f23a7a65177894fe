"""The files of a checkpoint that is written, as their tensors and the bytes that these come in."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io.safetensors import INDEX, write_json


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


def bytes_of(tensor: Tensor) -> Any:
    """The bytes of a tensor, as a file takes them."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()  # numpy has no bfloat16


def write_index(folder: Path, shards: Sequence[Shard], parameters: int) -> None:
    """The index of these files, which holds the number of the model's parameters."""
    size = sum(tensor.size for shard in shards for tensor in shard.tensors)
    names = {tensor.key: shard.name for shard in shards for tensor in shard.tensors}
    metadata = {"total_parameters": parameters, "total_size": size}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(names.items()))})
