"""A format of adapter files: how one is known, read and written; and what all readers of them ask."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...base.layer import BaseLayer
from ...core.config import BaseConfig
from ...core.targets import Target
from ...core.variant import config_for
from ...dtypes import STORAGE_DTYPES
from ...errors import CheckpointError, ConfigError
from ..safetensors import DTYPES, Header


@dataclass(frozen=True)
class Piece:
    """One method at one layer, between a file and a model: `target` and `layer` are the model's own."""

    target: Target
    layer: BaseLayer
    cfg: BaseConfig  # without filters; r and alpha are those of this layer
    tensors: dict[str, Tensor]  # by the names of the method's ParamSpecs: "lora_A" (r, i), "lora_B" (o, r)
    scale: float = 1.0  # not 1 in `steer` alone, which a file holds as c v; a LoRA's is in its alpha


Pieces = dict[str, Piece]
"""The pieces of an adapter by the layers' paths in the model."""

Contents = dict[Path, bytes]
"""The bytes to write, by the path of each file."""


def on_its_layer(_: nn.Module, piece: Piece) -> str:
    """The path of a piece's own layer."""
    return piece.target.path


def never(_: Path | Header) -> bool:
    """Nothing is told from it."""
    return False


@dataclass(frozen=True)
class Format:
    """A kind of file that another program reads and writes.

    read      the pieces of a file, on the layers of this model: (model, path) -> pieces. The file is untrusted. Raises
              CheckpointError for what it can't be, or would lose. What a method computes from the base (DoRA's norms)
              need not be there
    write     the contents of the files that hold these pieces, for a file or folder at this path: (model, pieces, path,
              **options). Of a folder's files that which tells what it is comes last. It writes nothing: `save_as` does,
              once they are proved. Raises CheckpointError for what the format can't say
    """

    name: str  # of format= and --to
    says: str  # for a person, such as "GGUF LoRA"
    variants: tuple[str, ...]  # the methods that it holds as they are; others go as a plain LoRA (rank=, energy=)
    read: Callable[[nn.Module, Path], Pieces]
    write: Callable[..., Contents]
    is_path: Callable[[Path], bool] = never  # by the first bytes of a file, or the names in a folder; raises nothing
    is_header: Callable[[Header], bool] = never  # by the keys of a safetensors file
    options: Mapping[str, Callable[[Any], None]] = field(default_factory=dict)
    """Further arguments of `write`, each with its check, which raises ConfigError before a model is looked at."""
    place: Callable[[nn.Module, Piece], str] = on_its_layer  # where `read` gives a piece back: its path there


def config(where: str, variant: str, **fields: Any) -> BaseConfig:
    """A config of what a file says of one layer. Raises CheckpointError for what the config refuses."""
    try:
        return config_for(variant)(**fields)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def read_matrix(header: Header, key: str) -> Tensor:
    """A matrix of a safetensors file. Raises CheckpointError for another shape, or no floating numbers."""
    entry = header.entries[key]
    if len(entry.shape) != 2 or 0 in entry.shape or DTYPES.get(entry.dtype) not in STORAGE_DTYPES:
        shape = tuple(entry.shape)
        raise CheckpointError(f"{header.path}: {key} is {entry.dtype} {shape}\n  wanted a matrix of floating numbers")
    return header.read([key])[key]
