"""An adapter on disk as a merge reads it, layer by layer: a file of this library, or a folder of PEFT."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base.fingerprint import BaseRecord
from ..core.config import BaseConfig
from ..core.names import check_shapes, file_key
from ..core.resolve import specs_at
from ..core.state import Site
from ..core.targets import Target
from ..core.variant import ParamSpec
from ..errors import CheckpointError
from ..io.adapter_file import AdapterFile, read_file
from ..io.peft.conversion import led_to_model
from ..io.peft.folder import CONFIG, PeftFolder, read_folder
from ..io.peft.load import parts_of, stored_tensors, tensors_at
from ..io.safetensors import Header
from .in_memory import NO_WEIGHT

TensorsAt = Callable[[str, Site], dict[str, Tensor]]
"""The adapter's tensors by name, at the layer of this path in the file, for a site that stands for it: some of PEFT's
are relative to the layer's weight."""


@dataclass(frozen=True)
class AdapterSource:
    """An adapter on disk. Its header and settings are read; it has been matched to no model, and no tensor is read."""

    path: Path  # for messages
    files: list[Path]
    header: Header  # of the file with its tensors
    targets: Collection[str]  # paths of its layers, as the file has them
    scale: float
    never_ran: list[str]
    base: BaseRecord | None  # a PEFT folder has none
    copies: Mapping[str, str]  # `<path>.weight` of a base tensor that the file holds too -> its key there

    configs: Callable[[Mapping[str, Target], Path], dict[str, BaseConfig]]
    """The config at each layer of a base's folder; CheckpointError unless each has its size and its tensors."""

    read: Callable[[], TensorsAt]
    """Read all tensors. CheckpointError for a NaN or an infinity."""


def open_adapter(path: Path, model: Any) -> AdapterSource:
    """The adapter of a file of this library, or of a PEFT folder, for a model on the meta device, or None.

    Raises:
        CheckpointError: for anything else, and for what would be lost of it.
        VariantError: for a method that isn't registered.
    """
    if not path.is_dir():
        return _of_file(read_file(path))
    folder = read_folder(path)
    return _of_folder(path, folder if model is None else led_to_model(model, folder, dict(model.named_modules())))


def _of_file(file: AdapterFile) -> AdapterSource:
    if file.cfg.on_blocks:
        raise CheckpointError(f"{file.path}: {NO_WEIGHT}")

    def read() -> TensorsAt:
        tensors = file.tensors()
        return lambda path, site: {name: tensors[file_key(path, name)] for name in site.specs}

    def configs(targets: Mapping[str, Target], base: Path) -> dict[str, BaseConfig]:
        cfgs: dict[str, BaseConfig] = {}
        specs: dict[str, ParamSpec] = {}
        for path, target in targets.items():
            sizes = file.targets[path]
            if sizes != (target.d_in, target.d_out):
                saved = f"{path} was saved from a layer with (d_in, d_out) = {sizes}"
                present = f"{target.path} of {base} has {target.d_in, target.d_out}"
                raise CheckpointError(f"{file.path}: {saved}, and {present}\n  this is another base model")
            cfg = cfgs[path] = file.cfg.with_overrides(file.per_layer.get(path, {}))
            if target.experts and not cfg.FUSED_EXPERTS:
                raise CheckpointError(f"{path}: no {cfg.variant!r} on fused experts\n  this is another base model")
            specs |= {file_key(path, name): spec for name, spec in specs_at(target, cfg).items()}
        check_shapes(file.header.entries, specs, str(file.path))
        return cfgs

    path, header = file.path, file.header
    return AdapterSource(path, [path], header, file.targets, file.scale, file.never_ran, file.base, {}, configs, read)


def _of_folder(path: Path, folder: PeftFolder) -> AdapterSource:
    def read() -> TensorsAt:
        stored = stored_tensors(folder)
        return lambda path, site: {
            name: tensor.to(site.cfg.dtype) for name, tensor in tensors_at(folder, stored, path, site.base).items()
        }

    def configs(targets: Mapping[str, Target], base: Path) -> dict[str, BaseConfig]:
        if fused := [target.path for target in targets.values() if target.experts]:
            problem = f"{fused[0]} of {base} are fused experts"
            raise CheckpointError(f"{path}: {problem}; PEFT's format has no place for them")
        return {
            in_file: part.cfg.with_overrides(part.overrides.get(target.path, {}))
            for part in parts_of(folder, dict(targets), {})
            for in_file, target in part.targets.items()
        }

    files = [folder.header.path, *([path / CONFIG] if (path / CONFIG).is_file() else [])]
    return AdapterSource(path, files, folder.header, folder.paths, 1.0, [], None, folder.base, configs, read)
