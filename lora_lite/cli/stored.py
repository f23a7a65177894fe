"""An adapter on disk as layers with a config and tensors, whatever its format, without a model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
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
from ..io.safetensors import Header, read_header, read_shards

OURS, PEFT = "lora-lite file", "PEFT folder"
WIDEST = 1 << 20
"""Features of the widest layer that a file may name: whoever looks at it makes vectors of that size."""


@dataclass(frozen=True)
class StoredLayer:
    """One layer's share of an adapter; `target.experts` is above 0 if the tensors have a leading axis over experts.

    Of a PEFT folder a side of the layer that no tensor tells is 0, and tensors that the base gives aren't there.
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
    """Of most layers."""
    scale: float
    base: dict[str, Any]
    """The base record of a file of ours; of a PEFT folder, its `name_or_path`."""
    layers: dict[str, StoredLayer]
    record: BaseRecord | None = None
    """`base` as an object; None of a PEFT folder."""


@dataclass(frozen=True)
class StoredTensors:
    """Tensors on disk that come without an adapter's config: headers alone."""

    path: Path
    headers: list[Header]


def read_stored(path: str | os.PathLike[str]) -> StoredAdapter | StoredTensors:
    """A file or folder as what it is: an adapter file of ours, a PEFT folder, or tensors and no more.

    A folder with one safetensors file is that file. Raises CheckpointError for what is damaged or none of them,
    VariantError for an unknown method.
    """
    path = Path(path)
    if is_peft(path):
        return _of_peft(path)
    headers = _headers(path)
    if len(headers) == 1 and "lora_lite" in headers[0].metadata:
        return _of_ours(read_file(headers[0].path))
    return StoredTensors(path, headers)


def is_peft(path: str | os.PathLike[str]) -> bool:
    """Is it a folder as PEFT writes them?"""
    return (Path(path) / CONFIG).is_file()


def read_adapter(path: str | os.PathLike[str]) -> StoredAdapter:
    """As `read_stored`. Raises CheckpointError for tensors that come without an adapter's config too."""
    found = read_stored(path)
    if isinstance(found, StoredTensors):
        raise CheckpointError(
            f"{path} holds tensors, and no config that says what to make of them\n"
            f"  load it with lora_lite.load(model, path, cfg=...) and save it again"
        )
    return found


def _headers(path: Path) -> list[Header]:
    if not path.is_dir():
        return [read_header(path)]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        others = sorted(file.name for file in path.iterdir())
        raise CheckpointError(
            f"{path} holds no safetensors file\n  found: {', '.join(others[:5]) or 'nothing'}; pickles are never opened"
        )
    if (path / "model.safetensors.index.json").exists():
        return list({header.path: header for header in read_shards(path).values()}.values())
    return [read_header(file) for file in files]


def _of_ours(file: AdapterFile) -> StoredAdapter:
    shapes, configs = (
        file.header.shapes(),
        {at: file.cfg.with_overrides(file.per_layer.get(at, {})) for at in file.targets},
    )
    targets = {at: _target(file, at, cfg, shapes) for at, cfg in configs.items()}
    specs = {at: specs_at(targets[at], cfg) for at, cfg in configs.items()}
    check_shapes(shapes, {file_key(at, name): spec for at in specs for name, spec in specs[at].items()}, str(file.path))
    held = file.tensors()
    layers = {
        at: StoredLayer(targets[at], configs[at], file.scale, {name: held[file_key(at, name)] for name in specs[at]})
        for at in file.targets
    }
    size = file.path.stat().st_size
    return StoredAdapter(file.path, OURS, size, file.cfg, file.scale, file.base.to_json(), layers, file.base)


def _of_peft(folder: Path) -> StoredAdapter:
    layers, settings = read_layers(folder)
    by_path = {layer.target.path: StoredLayer(layer.target, layer.cfg, 1.0, layer.tensors) for layer in layers}
    size = sum((folder / name).stat().st_size for name in (WEIGHTS, CONFIG))
    name = settings.get("base_model_name_or_path")
    cfgs = [layer.cfg for layer in layers]
    most = max(cfgs, key=cfgs.count)
    return StoredAdapter(folder, PEFT, size, most, 1.0, {"name_or_path": name} if name else {}, by_path)


def _target(file: AdapterFile, at: str, cfg: BaseConfig, shapes: Mapping[str, tuple[int, ...]]) -> Target:
    """The layer as its tensors tell: with a leading axis over experts if they have one more than their spec."""
    d_in, d_out = file.targets[at]
    if not (0 < d_in <= WIDEST and 0 < d_out <= WIDEST):
        raise CheckpointError(f"{file.path}: {at} would be {d_in} -> {d_out}; wanted 1 to {WIDEST} features")
    target = Target(at, d_in, d_out, "?", *place(at))
    name, spec = next(iter(specs_at(target, cfg).items()))
    found = shapes.get(file_key(at, name), ())
    if weight_use(cfg) == "unused" or len(found) != len(spec.shape) + 1:
        return target
    return Target(at, d_in, d_out, "?", *place(at), experts=found[0])
