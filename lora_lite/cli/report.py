"""The figures of an adapter on disk that `lora-lite inspect` prints."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..base.stacks import starred
from ..core.config import BaseConfig
from ..dtypes import dtype_name
from ..io.safetensors import Header
from .norms import Weights, norm
from .stored import PEFT, StoredAdapter, read_stored

Track = Callable[[Iterable[Any]], Iterable[Any]]  # gives the items back, and shows how many are done

T = TypeVar("T")


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer; `norm` is ‖W' - W‖ (Frobenius), None where that depends on a base that wasn't given."""

    path: str
    d_in: int  # 0 where no tensor of a PEFT folder tells it
    d_out: int
    norm: float | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """An adapter's figures. Of tensors without a config, `layers` is empty and `loose` has them."""

    path: Path
    format: str
    bytes: int
    variant: str | None = None
    config: dict[str, Any] = field(default_factory=dict)  # what differs from the method's defaults, as JSON values
    scale: float | None = None
    base: dict[str, Any] = field(default_factory=dict)  # class, name, dtype, quantization, as far as they are recorded
    tensors: int
    parameters: int
    dtypes: list[str]
    layers: list[LayerReport] = field(default_factory=list)
    loose: list[dict[str, Any]] = field(default_factory=list)  # path, shape and dtype of each tensor


def grouped(members: Mapping[str, T]) -> dict[str, list[T]]:
    """The members by path, with a star for the block index: those that differ in it alone come together."""
    groups: dict[str, list[T]] = defaultdict(list)
    for path, member in members.items():
        groups[starred(path)].append(member)
    return dict(groups)


def inspect(path: Path, base: Path | None = None, track: Track = iter) -> Report:
    """Read an adapter file, a PEFT folder, or tensors and no more; base is the folder of the original checkpoint.

    Raises:
        CheckpointError: for what is none of them, is damaged, or doesn't fit the base.
        VariantError: for an unknown method.
    """
    stored = read_stored(path)
    if not isinstance(stored, StoredAdapter):
        return _loose(path, stored)
    weights = None if base is None else Weights(base, stored.layers)
    tensors = [tensor for layer in stored.layers.values() for tensor in layer.tensors.values()]
    for shared in {id(layer.shared): layer.shared for layer in stored.layers.values() if layer.shared}.values():
        tensors += [tensor for name, tensor in shared.tensors() if shared.specs[name].saved == "always"]
    return Report(
        path=stored.path,
        format=stored.format,
        bytes=stored.bytes,
        variant=" + ".join(dict.fromkeys(layer.cfg.variant for layer in stored.layers.values())),
        config=_config(stored),
        scale=stored.scale,
        base=stored.base,
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in tensors),
        dtypes=sorted({dtype_name(tensor.dtype) for tensor in tensors}),
        layers=[
            LayerReport(path, layer.target.d_in, layer.target.d_out, norm(layer, weights))
            for path, layer in track(stored.layers.items())
        ],
    )


def _loose(path: Path, headers: list[Header]) -> Report:
    entries = {key: entry for header in headers for key, entry in header.entries.items()}
    return Report(
        path=path,
        format="tensors",
        bytes=sum(header.path.stat().st_size for header in headers),
        tensors=len(entries),
        parameters=sum(math.prod(entry.shape) for entry in entries.values()),
        dtypes=sorted({entry.dtype for entry in entries.values()}),
        loose=[{"path": key, "shape": entry.shape, "dtype": entry.dtype} for key, entry in entries.items()],
    )


def _config(stored: StoredAdapter) -> dict[str, Any]:
    """The fields that differ from their defaults; of a PEFT folder, what differs by layer under the layers' paths."""
    per_method = [_config_of(stored, cfg) for cfg in stored.configs]
    if len(per_method) == 1:
        return per_method[0]
    named = zip((cfg.variant for cfg in stored.configs), per_method, strict=True)
    return {f"{number} {variant}": fields for number, (variant, fields) in enumerate(named, 1)}


def _config_of(stored: StoredAdapter, cfg: BaseConfig) -> dict[str, Any]:
    changed = _differing(cfg, type(cfg)(variant=cfg.variant))
    if stored.format != PEFT:
        return changed
    alike = {path: layer.cfg for path, layer in stored.layers.items() if layer.cfg.variant == cfg.variant}
    per_layer = {path: fields for path, other in alike.items() if (fields := _differing(other, cfg))}
    # The regexes that find its layers are made up: the folder's own were never run.
    changed = {name: value for name, value in changed.items() if name not in (*BaseConfig.FILTERS, "per_layer")}
    return changed | ({"per_layer": per_layer} if per_layer else {})


def _differing(cfg: BaseConfig, other: BaseConfig) -> dict[str, Any]:
    values = other.to_dict()  # without an empty per_layer
    return {name: value for name, value in cfg.to_dict().items() if value != values.get(name)}
