"""An adapter on disk as a merge reads it, layer by layer: a file of this library, or a folder of PEFT."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..base.fingerprint import BaseRecord
from ..base.kinds import BLOCK
from ..base.layer import find_layers, on_all_channels
from ..core.attach import make_shared
from ..core.config import BaseConfig
from ..core.names import check_shapes
from ..core.positions import Positions
from ..core.resolve import specs_at
from ..core.shared import Shared
from ..core.state import Site
from ..core.targets import Target
from ..core.variant import ParamSpec, lookup
from ..errors import CheckpointError
from ..io.adapter_file import AdapterFile, read_file
from ..io.formats.load import check_ours
from ..io.peft import beside, forms
from ..io.peft.conversion import led_to_model
from ..io.peft.folder import CONFIG, PeftFolder, read_folder
from ..io.peft.load import parts_of, shared_tensors, stored_tensors
from ..io.peft.parts import Part, stored_as
from ..io.peft.ties import without_heads
from ..io.safetensors import Header
from .base_folder import LayerLocation

Locations = Mapping[str, LayerLocation]


class AdapterTensors(NamedTuple):
    """An adapter's tensors, read."""

    at: Callable[[str, Site], dict[str, Tensor]]
    """By name, at the layer of this path in the file, for a site that stands for it: some of PEFT's are relative to the
    layer's weight."""
    shared: Callable[[str, int], Shared | None] = lambda path, number: None
    """Those that the method has once which is the `number`-th at this path."""


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

    configs: Callable[[Locations, Path], dict[str, list[BaseConfig]]]
    """The config of each method at each layer of a base's folder; CheckpointError unless the layer has its size and its
    tensors."""

    read: Callable[[Locations], AdapterTensors]
    """Read all tensors. CheckpointError for a NaN or an infinity."""


def open_adapter(path: Path, model: Any) -> AdapterSource:
    """The adapter of a file of this library, or of a PEFT folder, for a model on the meta device, or None.

    Raises:
        CheckpointError: for anything else, and for what would be lost of it.
        VariantError: for a method that isn't registered.
    """
    check_ours(path)
    if not path.is_dir():
        file = read_file(path)
        # By its shape alone it is taken for a linear layer.
        if model is None and any("embedding" in method.cfg.kinds for method in file.methods):
            raise CheckpointError(f"{path}: an adapter on an embedding needs the config.json of the base model")
        return _of_file(file)
    modules = {} if model is None else dict(model.named_modules())
    folder = read_folder(path, modules)
    if modules:
        folder, *_ = beside.placed(model, forms.placed(model, led_to_model(model, folder, modules)))
        layers = find_layers(modules)
        folder = without_heads(model, folder, {path: layers[path] for path in folder.paths if path in layers})
    return _of_folder(path, folder)


def _of_file(file: AdapterFile) -> AdapterSource:
    if any(method.cfg.on_blocks for method in file.methods):
        raise CheckpointError(f"{file.path}: {BLOCK.no_weight}")
    if any(lookup(method.cfg.variant).positions(method.cfg) is not None for method in file.methods):
        raise CheckpointError(f"{file.path}: {Positions.NO_WEIGHT}")
    layers: list[dict[str, tuple[Target, Mapping[str, ParamSpec]]]] = []

    def read(locations: Locations) -> AdapterTensors:
        tensors = file.tensors(file.specs(layers))
        numbered = zip(file.methods, file.shared(layers, tensors), strict=True)
        once = {(path, method.numbers[path]): shared for method, shared in numbered for path in method.targets}

        def at(path: str, site: Site) -> dict[str, Tensor]:
            method = next(m for m in file.methods if m.numbers.get(path) == site.number)
            return {name: tensors[key] for name in site.specs if (key := method.key(path, name)) in tensors}

        return AdapterTensors(at, lambda path, number: once[path, number])

    def configs(locations: Locations, base: Path) -> dict[str, list[BaseConfig]]:
        cfgs: dict[str, list[BaseConfig]] = {path: [] for path in locations}
        for method in file.methods:
            layers.append({})
            for path in method.targets:
                cfg, target = method.cfg_at(path), locations[path].target
                _check_size(file, method.targets[path], path, locations[path], base)
                if target.experts and not (target.by_weight or cfg.FUSED_EXPERTS):
                    raise CheckpointError(f"{path}: no {cfg.variant!r} on fused experts\n  this is another base model")
                cfgs[path].append(cfg)
                layers[-1][path] = target, specs_at(target, cfg)
        check_shapes(file.header.entries, file.specs(layers), str(file.path))
        file.check_ties({path for path in method.targets if locations[path].tied_to} for method in file.methods)
        return cfgs

    path, header = file.path, file.header
    return AdapterSource(path, [path], header, file.targets, file.scale, file.never_ran, file.base, {}, configs, read)


def _check_size(file: AdapterFile, sizes: tuple[int, int], path: str, location: LayerLocation, base: Path) -> None:
    """CheckpointError for a layer of another size than the file's."""
    target = location.target
    if sizes == (target.d_in, target.d_out):
        return
    if problem := reason_for_no_weight(location, sizes):
        raise CheckpointError(f"{file.path}: {path}: {problem}")
    saved = f"{path} was saved from a layer with (d_in, d_out) = {sizes}"
    present = f"{target.path} of {base} has {target.d_in, target.d_out}"
    raise CheckpointError(f"{file.path}: {saved}, and {present}\n  this is another base model")


def reason_for_no_weight(location: LayerLocation, sizes: tuple[int, int]) -> str:
    """Why no weight there holds an adapter of this (d_in, d_out), which aren't the layer's own; "" of another layer."""
    whole = on_all_channels(location.layer)
    return "" if whole is None or (whole.d_in, whole.d_out) != sizes else whole.kind.no_weight


def _of_folder(path: Path, folder: PeftFolder) -> AdapterSource:
    def parts_at(locations: Locations) -> dict[str, list[Part]]:
        """The methods at each layer. Raises CheckpointError."""
        targets = {in_file: location.target for in_file, location in locations.items()}
        layers = {in_file: location.layer for in_file, location in locations.items()}
        parts: dict[str, list[Part]] = {in_file: [] for in_file in locations}
        of_folder = parts_of(folder, {p: targets[p] for p in folder.paths}, {p: layers[p] for p in folder.paths})
        others = beside.parts(folder, {p: targets[p] for p in folder.beside}, {p: layers[p] for p in folder.beside})
        for part in of_folder + others:
            for in_file in part.targets:
                parts[in_file].append(part)
        return parts

    def read(locations: Locations) -> AdapterTensors:
        stored, parts = stored_tensors(folder, {}), parts_at(locations)
        shared = None
        if folder.paths:
            part = parts[next(iter(folder.paths))][0]
            specs = lookup(part.cfg.variant).shared_specs([locations[p].target for p in folder.paths], part.cfg)
            once = shared_tensors(folder, part, stored)
            shared = make_shared(specs, part.cfg, once) if specs else None

        def tensors_at(in_file: str, site: Site) -> dict[str, Tensor]:
            values = parts[in_file][site.number - 1].values(stored, in_file, locations[in_file].layer, site.base)
            return {
                name: stored_as(folder, site.specs[name], site.cfg, name, tensor) for name, tensor in values.items()
            }

        return AdapterTensors(tensors_at, lambda in_file, number: shared if number == 1 else None)

    def configs(locations: Locations, base: Path) -> dict[str, list[BaseConfig]]:
        for in_file, target in ((in_file, location.target) for in_file, location in locations.items()):
            if target.experts and (not target.by_weight or in_file in folder.beside):
                problem = f"{target.path} of {base} are fused experts"
                raise CheckpointError(f"{path}: {problem}; PEFT's format has no place for them")
        for in_file in folder.paths:
            if problem := forms.as_peft_takes(folder, in_file, locations[in_file].layer).kind.no_weight:
                raise CheckpointError(f"{path}: {in_file}: {problem}")
        parts = parts_at(locations)
        if any(lookup(p.cfg.variant).positions(p.cfg) is not None for methods in parts.values() for p in methods):
            raise CheckpointError(f"{path}: {Positions.NO_WEIGHT}")
        return {
            in_file: [p.cfg.with_overrides(p.overrides.get(locations[in_file].target.path, {})) for p in at_layer]
            for in_file, at_layer in parts.items()
        }

    files = [folder.header.path, *([path / CONFIG] if (path / CONFIG).is_file() else [])]
    targets = [*folder.paths, *(in_file for in_file in folder.beside if in_file not in folder.paths)]
    return AdapterSource(path, files, folder.header, targets, 1.0, [], None, folder.base, configs, read)
