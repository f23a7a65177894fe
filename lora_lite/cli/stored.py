"""An adapter on disk as layers with a config and tensors, whatever its format, without a model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base.fingerprint import BaseRecord
from ..base.stacks import place
from ..core.config import BaseConfig
from ..core.names import check_shapes, file_key
from ..core.resolve import specs_at
from ..core.targets import Target
from ..core.variant import weight_use
from ..errors import CheckpointError
from ..io.adapter_file import AdapterFile, read_file
from ..io.peft.folder import CONFIG, WEIGHTS
from ..io.peft.load import read_layers
from ..io.safetensors import Header, read_header, read_shards, shard_names

OURS, PEFT = "lora-lite file", "PEFT folder"
WIDEST = 1 << 20
"""Features of the widest layer that a file may name: whoever looks at it makes vectors of that size."""


@dataclass(frozen=True)
class StoredLayer:
    """One layer's share of an adapter; `target.experts` is above 0 if the tensors have a leading axis over experts.

    In a PEFT folder a side of the layer that no tensor tells is 0, and tensors that the base gives are missing.
    """

    target: Target
    cfg: BaseConfig
    scale: float
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter on disk, in this library's terms."""

    path: Path
    format: str
    """OURS or PEFT."""
    bytes: int
    cfg: BaseConfig
    """The config that most layers have."""
    scale: float
    layers: dict[str, StoredLayer]
    base: BaseRecord | None = None
    """The base that a file of ours remembers; None of a PEFT folder."""
    name_or_path: str | None = None
    """The base's name in a PEFT folder, which says nothing else of it."""

    def base_fields(self) -> dict[str, Any]:
        """Everything that is recorded of the base but the fingerprint, as JSON values."""
        if self.base is None:
            return {"name_or_path": self.name_or_path} if self.name_or_path else {}
        return {name: value for name, value in self.base.to_json().items() if name != "fingerprint"}


@dataclass(frozen=True)
class StoredTensors:
    """Tensors on disk that come without an adapter's config: headers alone."""

    path: Path
    headers: list[Header]


def read_stored(path: str | os.PathLike[str]) -> StoredAdapter | StoredTensors:
    """Read an adapter file of ours, a PEFT folder, or the headers of tensors; a folder with one safetensors file is
    that file.

    Raises:
        CheckpointError: for what is damaged or none of them.
        VariantError: for an unknown method.
    """
    path = Path(path)
    if is_peft(path):
        return _of_peft(path)
    headers = _headers(path)
    if len(headers) == 1 and "lora_lite" in headers[0].metadata:
        return _of_ours(read_file(headers[0].path))
    return StoredTensors(path, headers)


def is_peft(path: str | os.PathLike[str]) -> bool:
    """True for a folder with the config that PEFT writes."""
    return (Path(path) / CONFIG).is_file()


def read_adapter(path: str | os.PathLike[str]) -> StoredAdapter:
    """Read an adapter of either format.

    Raises:
        CheckpointError: for tensors that come without an adapter's config; and what `read_stored` raises.
    """
    stored = read_stored(path)
    if isinstance(stored, StoredTensors):
        raise CheckpointError(
            f"{path} holds tensors, and no config that says what to make of them\n"
            f"  load it with lora_lite.load(model, path, cfg=...) and save it again"
        )
    return stored


def _headers(path: Path) -> list[Header]:
    if not path.is_dir():
        return [read_header(path)]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        others = sorted(file.name for file in path.iterdir())
        raise CheckpointError(
            f"{path} holds no safetensors file\n  found: {', '.join(others[:5]) or 'nothing'}; pickles are never opened"
        )
    if shard_names(path) is not None:
        return list({header.path: header for header in read_shards(path).values()}.values())
    return [read_header(file) for file in files]


def _of_ours(file: AdapterFile) -> StoredAdapter:
    shapes = file.header.shapes()
    configs = {path: file.cfg.with_overrides(file.per_layer.get(path, {})) for path in file.targets}
    targets = {path: _target(file, path, cfg, shapes) for path, cfg in configs.items()}
    specs = {path: specs_at(targets[path], cfg) for path, cfg in configs.items()}
    flat = {file_key(path, name): spec for path in specs for name, spec in specs[path].items()}
    check_shapes(shapes, flat, str(file.path))  # before a tensor is read: the file may be anyone's
    tensors = file.tensors()
    layers = {}
    for path, cfg in configs.items():
        at_layer = {name: tensors[file_key(path, name)] for name in specs[path]}
        layers[path] = StoredLayer(targets[path], cfg, file.scale, at_layer)
    return StoredAdapter(file.path, OURS, file.path.stat().st_size, file.cfg, file.scale, layers, file.base)


def _of_peft(folder: Path) -> StoredAdapter:
    layers, settings = read_layers(folder)
    by_path = {layer.target.path: StoredLayer(layer.target, layer.cfg, 1.0, layer.tensors) for layer in layers}
    size = sum((folder / name).stat().st_size for name in (WEIGHTS, CONFIG))
    configs = [layer.cfg for layer in layers]
    name = settings.get("base_model_name_or_path")
    return StoredAdapter(folder, PEFT, size, max(configs, key=configs.count), 1.0, by_path, name_or_path=name)


def _target(file: AdapterFile, path: str, cfg: BaseConfig, shapes: Mapping[str, tuple[int, ...]]) -> Target:
    """The layer as its tensors tell: with a leading axis over experts if they have one more than their spec."""
    d_in, d_out = file.targets[path]
    if not (0 < d_in <= WIDEST and 0 < d_out <= WIDEST):
        raise CheckpointError(f"{file.path}: {path} would be {d_in} -> {d_out}; wanted 1 to {WIDEST} features")
    target = Target(path, d_in, d_out, "?", *place(path))
    name, spec = next(iter(specs_at(target, cfg).items()))
    shape = shapes.get(file_key(path, name), ())
    stacked = weight_use(cfg) != "unused" and len(shape) == len(spec.shape) + 1
    return replace(target, experts=shape[0]) if stacked else target
