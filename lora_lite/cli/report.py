"""What an adapter on disk is: the figures that `lora-lite inspect` prints."""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from ..base.stacks import place, starred
from ..core.config import BaseConfig
from ..dtypes import dtype_name
from .norms import Weights, norm
from .stored import PEFT, StoredAdapter, StoredTensors, read_stored

Progress = Callable[[int, int], None]
"""(layers done, layers) -> None."""

T = TypeVar("T")


@runtime_checkable
class AtPath(Protocol):
    """What is said of one layer or tensor."""

    @property
    def path(self) -> str: ...


P = TypeVar("P", bound=AtPath)


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


@dataclass(frozen=True)
class Report:
    """What is on disk. Without an adapter's config, `layers` is empty and `loose` has the tensors."""

    path: Path
    format: str
    bytes: int
    variant: str | None
    config: dict[str, Any]
    """Fields that differ from the method's defaults, as JSON values."""
    scale: float | None
    base: dict[str, Any]
    """Class, name, dtype, and how it was quantised: what the format records of it."""
    tensors: int
    parameters: int
    dtypes: list[str]
    layers: list[LayerReport]
    loose: list[TensorReport]


def grouped(members: Iterable[P]) -> dict[str, list[P]]:
    """Those that differ in the block index only, by their path with a star."""
    groups: dict[str, list[P]] = defaultdict(list)
    for member in members:
        groups[starred(member.path)].append(member)
    return dict(groups)


def inspect(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, progress: Progress | None = None
) -> Report:
    """Read an adapter file, a PEFT folder, or tensors and no more; base is the folder of the original checkpoint.

    Raises CheckpointError for what is none of them, is damaged, or doesn't fit the base; VariantError for an unknown
    method.
    """
    found = read_stored(path)
    if isinstance(found, StoredTensors):
        return _of_tensors(found)
    weights = None if base is None else Weights(Path(base), found.layers)
    layers = [
        LayerReport(at, layer.target.d_in, layer.target.d_out, norm(layer, weights))
        for at, layer in counted(found.layers, progress)
    ]
    held = [tensor for layer in found.layers.values() for tensor in layer.tensors.values()]
    return Report(
        path=found.path,
        format=found.format,
        bytes=found.bytes,
        variant=" + ".join(dict.fromkeys(layer.cfg.variant for layer in found.layers.values())),
        config=_config(found),
        scale=found.scale,
        base={key: value for key, value in found.base.items() if key != "fingerprint"},
        tensors=len(held),
        parameters=sum(tensor.numel() for tensor in held),
        dtypes=sorted({dtype_name(tensor.dtype) for tensor in held}),
        layers=layers,
        loose=[],
    )


def _of_tensors(found: StoredTensors) -> Report:
    loose = [
        TensorReport(key, entry.shape, entry.dtype) for header in found.headers for key, entry in header.entries.items()
    ]
    return Report(
        path=found.path,
        format="tensors",
        bytes=sum(header.path.stat().st_size for header in found.headers),
        variant=None,
        config={},
        scale=None,
        base={},
        tensors=len(loose),
        parameters=sum(math.prod(tensor.shape) for tensor in loose),
        dtypes=sorted({tensor.dtype for tensor in loose}),
        layers=[],
        loose=loose,
    )


def _config(found: StoredAdapter) -> dict[str, Any]:
    """Of a PEFT folder without the regexes that find its layers; what differs by layer, by the layers' paths."""
    said = changed(found.cfg)
    if found.format != PEFT:
        return said
    said = {field: value for field, value in said.items() if field not in (*BaseConfig.FILTERS, "per_layer")}
    common = found.cfg.to_dict()
    differ = {
        at: {field: value for field, value in layer.cfg.to_dict().items() if value != common.get(field)}
        for at, layer in found.layers.items()
        if layer.cfg.variant == found.cfg.variant
    }
    differ = {at: fields for at, fields in differ.items() if fields}
    return said | ({"per_layer": differ} if differ else {})


def changed(cfg: BaseConfig) -> dict[str, Any]:
    """The fields that differ from their defaults, as JSON values."""
    values, defaults = cfg.to_dict(), type(cfg)(variant=cfg.variant).to_dict()
    return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}


def counted(items: Mapping[str, T], progress: Progress | None) -> Iterator[tuple[str, T]]:
    """The items, with word of how many are done."""
    for done, item in enumerate(items.items()):
        if progress is not None:
            progress(done, len(items))
        yield item
