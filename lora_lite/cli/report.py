"""The figures of an adapter on disk that `lora-lite inspect` prints."""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..base.stacks import place, starred
from ..core.config import BaseConfig
from ..dtypes import dtype_name
from .norms import Weights, norm
from .stored import PEFT, StoredAdapter, StoredTensors, read_stored

Progress = Callable[[int, int], None]
"""(layers done, layers) -> None."""

T = TypeVar("T")


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer; `norm` is ‖W' - W‖ (Frobenius), None where that depends on a base that wasn't given."""

    path: str
    d_in: int
    d_out: int
    norm: float | None

    @property
    def block(self) -> int | None:
        """The block's index in its stack; None outside of every stack."""
        return place(self.path)[1]


@dataclass(frozen=True)
class TensorReport:
    """One tensor of those that no config describes."""

    path: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """An adapter's figures. Of tensors without a config, `layers` is empty and `loose` has them."""

    path: Path
    format: str
    bytes: int
    variant: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    """Fields that differ from the method's defaults, as JSON values."""
    scale: float | None = None
    base: dict[str, Any] = field(default_factory=dict)
    """Class, name, dtype and quantization, as far as the format records them."""
    tensors: int
    parameters: int
    dtypes: list[str]
    layers: list[LayerReport] = field(default_factory=list)
    loose: list[TensorReport] = field(default_factory=list)


def grouped(members: Mapping[str, T]) -> dict[str, list[T]]:
    """The members by path, with a star for the block index: those that differ in it alone come together."""
    groups: dict[str, list[T]] = defaultdict(list)
    for path, member in members.items():
        groups[starred(path)].append(member)
    return dict(groups)


def inspect(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, progress: Progress | None = None
) -> Report:
    """Read an adapter file, a PEFT folder, or tensors and no more; base is the folder of the original checkpoint.

    Raises:
        CheckpointError: for what is none of them, is damaged, or doesn't fit the base.
        VariantError: for an unknown method.
    """
    stored = read_stored(path)
    if isinstance(stored, StoredTensors):
        return _of_tensors(stored)
    weights = None if base is None else Weights(Path(base), stored.layers)
    layers = [
        LayerReport(path, layer.target.d_in, layer.target.d_out, norm(layer, weights))
        for path, layer in counted(stored.layers, progress)
    ]
    tensors = [tensor for layer in stored.layers.values() for tensor in layer.tensors.values()]
    return Report(
        path=stored.path,
        format=stored.format,
        bytes=stored.bytes,
        variant=" + ".join(dict.fromkeys(layer.cfg.variant for layer in stored.layers.values())),
        config=_config(stored),
        scale=stored.scale,
        base=stored.base_fields(),
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in tensors),
        dtypes=sorted({dtype_name(tensor.dtype) for tensor in tensors}),
        layers=layers,
    )


def _of_tensors(stored: StoredTensors) -> Report:
    entries = [item for header in stored.headers for item in header.entries.items()]
    return Report(
        path=stored.path,
        format="tensors",
        bytes=sum(header.path.stat().st_size for header in stored.headers),
        tensors=len(entries),
        parameters=sum(math.prod(entry.shape) for _, entry in entries),
        dtypes=sorted({entry.dtype for _, entry in entries}),
        loose=[TensorReport(key, entry.shape, entry.dtype) for key, entry in entries],
    )


def _config(stored: StoredAdapter) -> dict[str, Any]:
    """The fields that differ from their defaults, as JSON values; of a PEFT folder without the regexes that find its
    layers, and what differs by layer under the layers' paths."""
    values, defaults = stored.cfg.to_dict(), type(stored.cfg)(variant=stored.cfg.variant).to_dict()
    changed = {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}
    if stored.format != PEFT:
        return changed
    per_layer = {}
    for path, layer in stored.layers.items():
        fields = {name: value for name, value in layer.cfg.to_dict().items() if value != values.get(name)}
        if fields and layer.cfg.variant == stored.cfg.variant:
            per_layer[path] = fields
    changed = {name: value for name, value in changed.items() if name not in (*BaseConfig.FILTERS, "per_layer")}
    return changed | ({"per_layer": per_layer} if per_layer else {})


def counted(items: Mapping[str, T], progress: Progress | None) -> Iterator[tuple[str, T]]:
    """The items; `progress` is told how many are done."""
    for done, item in enumerate(items.items()):
        if progress is not None:
            progress(done, len(items))
        yield item
