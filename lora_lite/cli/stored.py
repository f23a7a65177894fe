"""An adapter on disk as layers with a config and tensors, whatever its format, without a model."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..base.fingerprint import BaseRecord
from ..base.stacks import place
from ..core.config import BaseConfig
from ..core.names import check_shapes
from ..core.resolve import specs_at
from ..core.targets import Target
from ..core.variant import weight_use
from ..errors import CheckpointError, brief
from ..io.adapter_file import METADATA, AdapterFile, FileMethod, checked
from ..io.formats.load import check_ours
from ..io.peft.folder import CONFIG, WEIGHTS
from ..io.peft.load import StoredLayer, read_layers
from ..io.safetensors import Header, read_any

OURS, PEFT = "lora-lite file", "PEFT folder"
WIDEST = 1 << 20  # features of a layer that a file may name: whoever looks at it makes vectors of that size


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter on disk, in this library's terms."""

    path: Path
    format: str  # OURS or PEFT
    bytes: int
    configs: list[BaseConfig]  # of each method; in a PEFT folder the one that most of its layers have
    scale: float
    layers: dict[str, StoredLayer]
    base: dict[str, Any]  # all that is recorded of the base but the fingerprint, as JSON values
    record: BaseRecord | None = None  # a PEFT folder has none, and says no more of its base than a name

    @property
    def cfg(self) -> BaseConfig:
        """The config of its first method."""
        return self.configs[0]


def read_stored(path: Path) -> StoredAdapter | list[Header]:
    """Read an adapter file of ours, a PEFT folder, or the headers of tensors that come without a config; a folder with
    one safetensors file is that file.

    Raises:
        CheckpointError: for what is damaged or none of them.
        VariantError: for an unknown method.
    """
    check_ours(path)
    if is_peft(path):
        return _peft(path)
    headers = read_any(path)
    return _ours(checked(headers[0])) if len(headers) == 1 and METADATA in headers[0].metadata else headers


def is_peft(path: Path) -> bool:
    """True for a folder with the config that PEFT writes."""
    return (path / CONFIG).is_file()


def read_adapter(path: Path) -> StoredAdapter:
    """Read an adapter of either format.

    Raises:
        CheckpointError: for tensors that come without an adapter's config; and what `read_stored` raises.
    """
    stored = read_stored(path)
    if not isinstance(stored, StoredAdapter):
        raise _without_config(path)
    return stored


def read_record(path: Path) -> BaseRecord:
    """The record of the base in a file of ours, whose layers aren't looked at: those of a convolution, no size tells.

    Raises:
        CheckpointError: for tensors that come without an adapter's config, and what is damaged.
        VariantError: for an unknown method.
    """
    headers = read_any(path)
    if len(headers) != 1 or METADATA not in headers[0].metadata:
        raise _without_config(path)
    return checked(headers[0]).base


def _without_config(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} holds tensors, and no config that says what to make of them\n"
        f"  load it with lora_lite.load(model, path, cfg=...) and save it again"
    )


def _ours(file: AdapterFile) -> StoredAdapter:
    by_method = [{path: _target(file, method, path) for path in method.targets} for method in file.methods]
    layers = [
        {path: (target, specs_at(target, method.cfg_at(path))) for path, target in targets.items()}
        for method, targets in zip(file.methods, by_method, strict=True)
    ]
    specs = file.specs(layers)
    check_shapes(file.header.entries, specs, str(file.path))  # before a tensor is read: the file may be anyone's
    tensors = file.tensors(specs)
    stored: dict[str, StoredLayer] = {}
    for method, known, shared in zip(file.methods, layers, file.shared(layers, tensors), strict=True):
        for path, (target, names) in known.items():
            values = {name: tensors[key] for name in names if (key := method.key(path, name)) in tensors}
            stored[_name(path, stored)] = StoredLayer(target, method.cfg_at(path), values, file.scale, shared)
    base = {name: value for name, value in file.base.to_json().items() if name != "fingerprint"}
    configs = [method.cfg for method in file.methods]
    return StoredAdapter(file.path, OURS, file.path.stat().st_size, configs, file.scale, stored, base, file.base)


def _peft(folder: Path) -> StoredAdapter:
    layers, settings = read_layers(folder)
    size = sum((folder / name).stat().st_size for name in (WEIGHTS, CONFIG))
    by_variant: dict[str, list[BaseConfig]] = defaultdict(list)
    by_path: dict[str, StoredLayer] = {}
    for layer in layers:
        by_variant[layer.cfg.variant].append(layer.cfg)
        by_path[_name(layer.target.path, by_path)] = layer
    most = [max(configs, key=configs.count) for configs in by_variant.values()]
    name = settings.get("base_model_name_or_path")
    base = {"name_or_path": brief(name)} if name else {}  # any JSON value, and it goes to a terminal
    return StoredAdapter(folder, PEFT, size, most, 1.0, by_path, base)


def _name(path: str, layers: Mapping[str, StoredLayer]) -> str:
    """The path, and of a second method there its number: "score (2)"."""
    number = 1 + sum(layer.target.path == path for layer in layers.values()) if path in layers else 1
    return path if number == 1 else f"{path} ({number})"


def _target(file: AdapterFile, method: FileMethod, path: str) -> Target:
    """The layer as its tensors tell: with a leading axis over experts if they have one more than their spec."""
    (d_in, d_out), cfg = method.targets[path], method.cfg_at(path)
    if max(d_in, d_out) > WIDEST:
        raise CheckpointError(f"{file.path}: {path} would be {d_in} -> {d_out}; wanted 1 to {WIDEST} features")
    target = method.as_in_file(Target(path, d_in, d_out, "?", *place(path)))
    name, spec = next(iter(specs_at(target, cfg).items()))
    entry = file.header.entries.get(method.key(path, name))
    shape = () if entry is None else entry.shape
    if len(shape) != len(spec.shape) + 1:
        return target
    return replace(target, experts=shape[0], by_weight=weight_use(cfg) == "unused")  # then it is on the matrices
