"""Adapters of the methods that are tables (`table.py`), read from PEFT's folders and written as them."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...base.layer import BaseLayer
from ...core.config import BaseConfig
from ...core.names import check_shapes, file_key
from ...core.resolve import make_site, specs_at
from ...core.shared import PLACE
from ...core.state import Site, Tensors
from ...core.targets import Target
from ...core.variant import config_for, lookup
from ...errors import CheckpointError, ConfigError, brief
from ..factors import Layers
from ..keys import PREFIX
from ..safetensors import DTYPES
from .folder import PeftFolder
from .parts import Part, Written, config_of, names_of
from .patterns import by_pattern
from .settings import flag_of, number_of, text_of, whole_of
from .table import AtLayer, Format, Named, Setting, Shape

_COMMON = {"bias": "none", "layers_to_transform": None, "layers_pattern": None}


def parts(table: Format, source: PeftFolder, targets: dict[str, Target], layers: Mapping[str, BaseLayer]) -> list[Part]:
    """One part. Every shape in the file is compared with what the settings say before a tensor is read."""
    if table.at_place is not None and not source.is_in_order:
        raise source.error("the order of its model's layers is a part of it\n  load it on its model (load_peft)")
    if not layers and (table.sizes is None or (table.shared and not source.shared)):
        cure = "load it on its model (load_peft), and save it as a file of this library"
        raise source.error(f"its tensors don't tell the sizes of its layers, and no model is given\n  {cure}")
    if others := [path for path, layer in layers.items() if not table.takes(layer)]:
        raise source.error(f"{others[0]}: PEFT has no {table.variant} on it, or other numbers than a weight holds")
    values = {ours: _value(source, setting) for ours, setting in table.fields.items()} | table.read(source)
    at_layers = _at_layers(table, source, targets, layers, values)
    common, overrides = _parted(source, config_for(table.variant), at_layers, targets)
    variant, listed, values = lookup(table.variant), list(targets.values()), values | common
    floats = {ours: key for ours, key in (source.keys | source.shared).items() if not _is_table(table, source, ours)}
    cfg = config_of(source, table.variant, targets, layers, overrides, table.reads_base, floats, **values)
    if any(spec.saved == "never" for spec in variant.shared_specs(listed, cfg).values()):
        # What isn't in the file is made again, in float32, and rounded to the config's dtype.
        cfg = config_of(source, table.variant, targets, layers, overrides, True, floats, **values)
    wanted: dict[str, Shape] = {}
    for path, target in targets.items():
        in_file = {
            key.rpartition(".")[2]: source.entries[key].shape for key in source.keys if key.rpartition(".")[0] == path
        }
        cfg_there = cfg.with_overrides(overrides.get(target.path, {}))
        shapes = _shapes(table, source, target, layers.get(path), cfg_there, in_file)
        wanted |= {file_key(path, name): shape for name, shape in shapes.items()}
    for name, spec in variant.shared_specs(listed, cfg).items():
        key, entry = file_key(PLACE, name), source.entries.get(file_key(PLACE, name))
        # Of unknown sizes it is the file's.
        shape = tuple(entry.shape) if entry is not None and not layers else spec.shape
        if name in table.rows:
            wanted |= {f"{key}.{n}": shape[1:] for n in range(shape[0])}
        elif spec.saved == "always" and table.key_of(name):
            wanted |= {key: shape}
    check_shapes(source.entries, wanted, str(source.header.path))

    def tensors_at(stored: Tensors, path: str, layer: BaseLayer | None, base: BaseLayer | None) -> dict[str, Tensor]:
        start = file_key(path, "")
        names = {key.removeprefix(start): key for key in source.keys if key.rpartition(".")[0] == path}
        tensors = {name: stored[key] for name, key in names.items()}
        if layer is None:
            return tensors
        if table.of_base is not None:
            cfg_there = cfg.with_overrides(overrides.get(targets[path].path, {}))
            shared = {key.rpartition(".")[2]: tensor for key, tensor in stored.items() if key.startswith(f"{PLACE}.")}
            return table.of_base(base or layer, cfg_there, tensors, shared)
        if table.at_place is not None:
            tensors |= table.at_place(cfg, list(targets).index(path), len(targets), tensors)
        once = {key: tensor for key, tensor in stored.items() if key.startswith(f"{PLACE}.")}
        return {name: tensor for name, tensor in table.ours(layer, tensors | once).items() if name not in once}

    return [Part(cfg, targets, overrides, tensors_at)]


def _is_table(table: Format, source: PeftFolder, ours: str) -> bool:
    """Is it a tensor of integers? Raises CheckpointError for a table of floats."""
    if not table.is_table(ours):
        return False
    entry = source.entries[ours]
    if DTYPES.get(entry.dtype, torch.float32).is_floating_point:
        raise source.error(f"{brief(ours, 200)} is stored as {entry.dtype}; wanted integers")
    return True


def _value(source: PeftFolder, setting: Setting) -> Any:
    """A setting's value, of its default's type. Raises CheckpointError."""
    name, default = setting.name, setting.default
    if isinstance(default, bool):
        return flag_of(source, name, default)
    if isinstance(default, int):
        return whole_of(source, name, default)
    if isinstance(default, float):
        return number_of(source, name, source.settings.get(name, default))
    if isinstance(default, str):
        return text_of(source, name, default)
    return None if source.settings.get(name) is None else whole_of(source, name, 0)


def _at_layers(
    table: Format,
    source: PeftFolder,
    targets: Mapping[str, Target],
    layers: Mapping[str, BaseLayer],
    values: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """The values at each layer that its path or its tensors tell."""
    shapes: dict[str, dict[str, Shape]] = {path: {} for path in targets}
    for ours in source.keys:
        path, _, name = ours.rpartition(".")
        shapes[path][name] = tuple(source.entries[ours].shape)
    result: dict[str, dict[str, Any]] = {path: {} for path in targets}
    for ours, setting in table.fields.items():
        if setting.pattern:
            numbers, _ = by_pattern(source, targets, setting.pattern, setting.name, values[ours], table.anchored)
            for path, number in numbers.items():
                result[path][ours] = int(number) if isinstance(setting.default, int) else number
    for path, target in targets.items():
        place = AtLayer(source, path, target, layers.get(path), {**values, **result[path]}, shapes[path])
        try:
            result[path] |= table.at_layer(place)
        except (KeyError, IndexError) as error:  # a folder is anyone's
            problem = f"{path}: it lacks a tensor that tells its config, or that has another shape"
            raise source.error(f"{problem}\n  save the adapter again") from error
    return result


def _parted(
    source: PeftFolder, kind: type[BaseConfig], at_layers: Mapping[str, dict[str, Any]], targets: Mapping[str, Target]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The values that most layers have, and the others by the path in the model. Raises CheckpointError."""
    fields = list(dict.fromkeys(field for values in at_layers.values() for field in values))
    common = {field: Counter(values[field] for values in at_layers.values()).most_common(1)[0][0] for field in fields}
    overrides: dict[str, dict[str, Any]] = {}
    for path, values in at_layers.items():
        others = {field: value for field, value in values.items() if value != common[field]}
        if fixed := [field for field in others if field in kind.SAME_AT_ALL_LAYERS]:
            raise source.error(
                f"{path}: {fixed[0]} is {brief(repr(others[fixed[0]]), 60)}, and {common[fixed[0]]} elsewhere"
            )
        overrides |= {targets[path].path: others} if others else {}
    return common, overrides


def _shapes(
    table: Format,
    source: PeftFolder,
    target: Target,
    layer: BaseLayer | None,
    cfg: BaseConfig,
    in_file: Mapping[str, Shape],
) -> dict[str, Shape]:
    """The shapes of a layer's tensors in the file, by our names; without a model, where PEFT's are ours."""
    try:
        if layer is None:
            return {name: spec.shape for name, spec in specs_at(target, cfg).items() if spec.saved == "always"}
        site = make_site(target, layer, cfg, {})
    except ConfigError as error:
        raise source.error(str(error)) from error
    if table.shapes_by is not None:
        return table.shapes_by(site, in_file)
    if table.shapes is not None:
        return table.shapes(site)
    return {name: tuple(tensor.shape) for name, tensor in _theirs(table, site, _empty).items()}


def _empty(site: Site, name: str) -> Tensor:
    return torch.empty(site.specs[name].shape, device="meta")


def _stored(site: Site, name: str) -> Tensor:
    return site.tensor(name).detach()


def _theirs(table: Format, site: Site, tensor: Callable[[Site, str], Tensor]) -> dict[str, Tensor]:
    """A layer's tensors as PEFT shapes them, by our names."""
    is_embedding = site.base.kind.category == "embedding"
    saved = [name for name, spec in site.specs.items() if spec.saved == "always"]
    tensors = {name: tensor(site, name) for name in saved}
    theirs = table.theirs(site, tensors)
    return {name: values for name, values in theirs.items() if table.end_of(name, is_embedding) is not None}


def gathered(table: Format, tensors: Named, layers: Mapping[str, BaseLayer]) -> Named:
    """The file's tensors by our key, and the shared ones as ours are. Their shapes are known to fit."""
    for name in table.rows:
        key = file_key(PLACE, name)
        rows = {other for other in tensors if other.startswith(f"{key}.")}
        whole = torch.stack([tensors[f"{key}.{n}"] for n in range(len(rows))])
        tensors = {other: tensor for other, tensor in tensors.items() if other not in rows} | {key: whole}
    return tensors | table.once(tensors, layers)


def written(table: Format, root: nn.Module, layers: Layers) -> Written:
    """The adapter as it is. Raises CheckpointError for what PEFT has no place for."""
    tensors: dict[str, Tensor] = {}
    for path, (site,) in layers.items():
        if not table.takes(site.base) or site.number != 1:
            raise CheckpointError(f"{path}: PEFT has no {table.variant} on it\n  keep it as our file (lora_lite.save)")
        is_embedding = site.base.kind.category == "embedding"
        for name, values in _theirs(table, site, _stored).items():
            tensors[f"{PREFIX}{path}.{table.end_of(name, is_embedding)}"] = values
    (site, *_), *_ = layers.values()
    cfg, shared = site.method.cfg, site.method.shared
    # What PEFT draws again it draws in float32: of a narrower dtype it is written.
    is_narrow = torch.promote_types(cfg.dtype, torch.float32) != cfg.dtype
    for name, spec in ({} if shared is None else shared.specs).items():
        if name in table.rows and shared is not None:
            rows = enumerate(shared.tensor(name).detach())
            tensors |= {str(table.key_of(f"{name}.{n}")): row for n, row in rows}
        if (key := table.key_of(name)) is not None and (spec.saved == "always" or is_narrow) and shared is not None:
            tensors[key] = shared.tensor(name).detach()
    names, _ = names_of(root, list(layers), [])
    common = _COMMON | {"fan_in_fan_out": any(site.base.transposed for (site,) in layers.values())}
    settings = {"peft_type": table.peft_type, "target_modules": names, **table.given, **table.write(cfg)}
    settings |= table.by_layer({path: site for path, (site,) in layers.items()})
    for ours, setting in table.fields.items():
        settings |= _setting(table, ours, setting, layers)
        settings |= {setting.name: True} if ours == "save_projection" and is_narrow else {}
    settings = {name: value for name, value in common.items() if name not in table.lacks} | settings
    return tensors, table.settle(settings, tensors, layers)


def _setting(table: Format, ours: str, setting: Setting, layers: Layers) -> dict[str, Any]:
    """A field as PEFT's setting, and its pattern. Raises CheckpointError where it differs by layer and has none."""
    values = {path: {ours: getattr(site.cfg, ours), **table.at_site(site)}[ours] for path, (site,) in layers.items()}
    if ours == "alpha":  # None stands for the rank
        values = {path: layers[path][0].cfg.r if value is None else value for path, value in values.items()}
    common = Counter(values.values()).most_common(1)[0][0]
    others = {f"{'^' * table.anchored}{path}": value for path, value in values.items() if value != common}
    if others and not setting.pattern:
        problem = f"{ours} differs by layer: {brief(sorted(set(values.values())), 80)}"
        raise CheckpointError(f"{problem}\n  PEFT has one for all layers")
    if isinstance(common, float) and common == int(common) and isinstance(setting.default, int):
        common = int(common)
    return {setting.name: common} | ({setting.pattern: others} if setting.pattern else {})
