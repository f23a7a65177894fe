"""PEFT's adapter folders attached as adapters of this library, or read by layer without a model."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from ...base.layer import BaseLayer
from ...base.stacks import place
from ...core.adapter import Adapter
from ...core.attach import installed
from ...core.config import BaseConfig
from ...core.names import file_key
from ...core.resolve import attachable, make_sites
from ...core.shared import PLACE, Shared
from ...core.state import Method, number_sites
from ...core.targets import Target
from ...core.variant import ParamSpec, lookup
from ...errors import CheckpointError
from ..keys import layers_of
from ..raw import same_tensor
from ..safetensors import check_numbers
from . import adalora, beside, by_table, forms, ia3, lora
from .conversion import led_to_model
from .folder import PeftFolder, read_folder
from .formats import format_of
from .parts import Part, stored_as
from .table import Format
from .ties import without_heads

Reader = Callable[[PeftFolder, dict[str, Target], Mapping[str, BaseLayer]], list[Part]]
_READERS: dict[str, Reader] = {  # by peft_type; of the others all is beside an adapter (beside.py)
    "LORA": lora.parts,
    "IA3": ia3.parts,
    "ADALORA": adalora.parts,
}


def load_peft(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> Adapter:
    """Attach the adapter of a PEFT folder, or of a file of diffusers: LoRA, rsLoRA, rank and alpha patterns, DoRA,
    aLoRA, IA3, VeRA, AdaLoRA, LN tuning, trainable tokens.

    Tensors are bit-equal, in the file's dtype. Mixed dtypes are promoted to one that holds them all; so are 16-bit
    tensors of DoRA, PiSSA and OLoRA to float32, since their maths compares them with numbers of the live weight.

    What was trained beside it is in the adapter, as methods of their own: modules_to_save and whole embeddings as the
    variant full, biases as bias, tokens as tokens; so is IA3 on inputs (feedforward_modules), as ia3_ff. These hold the
    difference from this model's own. A folder whose init wrote the base is loaded without writing it, on a dense one:
    "pissa" and "olora" as the variants of these names, which make A0 and B0 of it again.

    A copy of the base's own weight, as PEFT adds it to an adapter on lm_head, is compared with this model's.

    Raises:
        CheckpointError: for a setting or a tensor that would be lost, or a base weight that isn't this model's, naming
            it.

    It raises what attach raises, too; the model is then as it was.
    """
    root = attachable(model)
    modules = dict(root.named_modules())
    source = forms.placed(root, led_to_model(root, read_folder(Path(folder), modules), modules))
    source, more, layers_beside = beside.placed(root, source)
    targets, layers = layers_of(root, source.header.path, source.paths)
    source = without_heads(root, source, {path: layers[target] for path, target in targets.items()})
    targets = {path: targets[path] for path in source.paths}
    if blocks := [path for path, target in targets.items() if target.experts and not target.by_weight]:
        raise source.error(f"target_parameters doesn't tell which experts of {blocks[0]} its tensors are of")
    taken = {path: forms.as_peft_takes(source, path, layers[target]) for path, target in targets.items()}
    targets = {path: targets[path].on(layer) for path, layer in taken.items()}
    _check_base(root, source, targets, taken)
    # Every shape and dtype is found right before a tensor is read, but for those that were compared with the model's.
    parts = parts_of(source, targets, taken) + beside.parts(source, more, layers_beside)
    if not parts:
        raise source.error("all of its tensors are this model's own: there is no adapter in it")
    methods, values = [], stored_tensors(source, taken)
    for part in parts:
        known = layers_beside if part.of_base else taken
        pairs = {target: known[path] for path, target in part.targets.items()}
        methods.append(Method(part.cfg, make_sites(pairs, part.cfg, part.overrides)))
    number_sites(methods)
    tensors = shared_tensors(source, parts[0], values)
    for part, method in zip(parts, methods, strict=True):
        known = layers_beside if part.of_base else taken
        for path, site in zip(part.targets, method.sites, strict=True):
            of_layer = part.values(values, path, known[path], known[path])
            tensors |= {
                site.key(name): stored_as(source, site.specs[name], part.cfg, name, tensor)
                for name, tensor in of_layer.items()
            }
    with installed(root, methods, name, _with_the_rest(methods, tensors)) as adapter:
        with torch.no_grad():
            for method in methods:
                # n0, A0 and B0 are the base's; the file's come next. Where it has all, no SVD is run.
                keys = {s.key(n) for s in method.sites for n, spec in s.specs.items() if spec.saved == "always"}
                for view in adapter.views(method).values() if keys - tensors.keys() else ():
                    lookup(method.cfg.variant).init(view, view.cfg)
        adapter.load_state_dict({key: tensors.get(key, tensor) for key, tensor in adapter.state_dict().items()})
    logger.info(f"loaded {adapter} from {folder}, in PEFT's format")
    return adapter


def shared_tensors(source: PeftFolder, part: Part, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that all layers of the folder's own method share, by our key."""
    specs = lookup(part.cfg.variant).shared_specs(list(part.targets.values()), part.cfg) if source.shared else {}
    once = {key: tensor for key, tensor in values.items() if key.startswith(f"{PLACE}.") and specs}
    return {
        key: stored_as(source, specs[key.rpartition(".")[2]], part.cfg, key, tensor) for key, tensor in once.items()
    }


def _with_the_rest(methods: list[Method], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, and zeros for those that the file lacks because they are the base's."""
    places = ((site, name, spec) for method in methods for site in method.sites for name, spec in site.specs.items())
    rest = {
        site.key(name): torch.zeros(spec.shape, dtype=spec.dtype or site.cfg.dtype)
        for site, name, spec in places
        if spec.saved == "always"
    }
    return rest | dict(tensors)


@dataclass(frozen=True)
class StoredLayer:
    """One layer of an adapter on disk. In a PEFT folder a size that no tensor tells is 0; base tensors are absent, and
    what is relative to the base's has its own names there, until there is a base."""

    target: Target
    cfg: BaseConfig
    tensors: dict[str, Tensor]  # with a leading axis over experts where `target.experts` isn't 0
    scale: float = 1.0
    shared: Shared | None = None  # the tensors that the adapter has once
    relative: Callable[[BaseLayer], dict[str, Tensor]] | None = None  # its tensors, of the layer's base


def read_layers(folder: Path) -> tuple[list[StoredLayer], dict[str, Any]]:
    """The layers that load_peft would attach to, and the folder's settings.

    Raises:
        CheckpointError: as load_peft does; for VeRA without its projections, whose sizes no tensor tells.
    """
    source = read_folder(folder)
    targets = _targets_by_shapes(source)
    whole = {path: _whole_target(source, path) for path in source.beside}
    parts, stored = parts_of(source, targets, {}) + beside.parts(source, whole, {}), stored_tensors(source, {})
    once = {key.rpartition(".")[2]: tensor for key, tensor in stored.items() if key.startswith(f"{PLACE}.")}
    shared = Shared({name: ParamSpec(tuple(tensor.shape)) for name, tensor in once.items()})
    for name, tensor in once.items():
        shared.hold(name, tensor)
    return [
        StoredLayer(
            target,
            part.cfg.with_overrides(part.overrides.get(path, {})),
            part.values(stored, path, None, None),
            shared=shared if source.shared and not part.of_base else None,
            relative=partial(part.values, stored, path, None) if part.of_base else None,
        )
        for part in parts
        for path, target in part.targets.items()
    ], source.settings


def _whole_target(source: PeftFolder, path: str) -> Target:
    """A layer as its whole tensors tell; 0 stands for a side that they don't."""
    keys = {name: source.whole[key] for name in ("weight", "bias") if (key := file_key(path, name)) in source.whole}
    shapes = {name: source.header.entries[key].shape for name, key in keys.items()}
    d_out, *rest = shapes.get("weight") or shapes.get("bias") or (0,)
    is_norm = len(shapes.get("weight", ())) == 1
    d_in = d_out if is_norm else math.prod(rest) if "weight" in shapes else 0
    return Target(path, d_in, d_out, "?", *place(path), has_bias="bias" in shapes, is_diagonal=is_norm)


def _targets_by_shapes(source: PeftFolder) -> dict[str, Target]:
    """The layers as their tensors tell; 0 stands for a side that they don't."""
    targets, shapes = {}, {key: tuple(entry.shape) for key, entry in source.entries.items()}
    table = format_of(source.settings)
    for path in source.paths:
        if table is not None:
            targets[path] = Target(path, *_sizes(table, path, shapes), "?", *place(path))
            continue
        a, b, scales = (shapes.get(file_key(path, name), ()) for name in ("lora_A", "lora_B", "lora_l"))
        d_in = a[-1] if len(a) == 2 else scales[1] if len(scales) == 2 and scales[0] == 1 else 0
        d_out = b[0] if len(b) == 2 else scales[0] if len(scales) == 2 and scales[1] == 1 else 0
        targets[path] = Target(path, d_in, d_out, "?", *place(path))
    return targets


def _sizes(table: Format, path: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """The size of a layer as its tensors tell; (0, 0) where they don't."""
    layer = {name: shape for key, shape in shapes.items() for where, _, name in [key.rpartition(".")] if where == path}
    try:
        return (0, 0) if table.sizes is None else table.sizes(layer)
    except (KeyError, IndexError):  # a folder is anyone's
        return 0, 0


def _check_base(
    root: nn.Module, source: PeftFolder, targets: Mapping[str, Target], layers: Mapping[str, BaseLayer]
) -> None:
    """Raises CheckpointError for a tensor of the base that isn't, or can't be known to be, the live one."""
    for ours, key in source.base.items():
        in_file, _, name = ours.rpartition(".")
        target = targets[in_file]
        live = root.get_submodule(target.path).state_dict().get(name)
        same = live is not None and same_tensor(live, source.header, key, layers[in_file].storage)
        if not same:
            relation = "can not be compared with" if same is None else "is not"
            raise CheckpointError(
                f"{source.header.path}: {key} {relation} this model's {file_key(target.path, name)}\n"
                f"  the adapter belongs to another base, or one trained with it: load it there, or remove that tensor"
            )


def parts_of(source: PeftFolder, targets: dict[str, Target], layers: Mapping[str, BaseLayer]) -> list[Part]:
    """The methods of ours that a folder's own becomes, one or two, on these layers by their path in the file.

    layers      by that path, too; none without a model, where all are linear

    Raises:
        CheckpointError: for settings, keys or shapes that aren't such an adapter's. No tensor is read.
    """
    if (table := format_of(source.settings)) is not None:
        return by_table.parts(table, source, targets, layers)
    reader = _READERS.get(source.settings["peft_type"])
    return [] if reader is None else reader(source, targets, layers)


def stored_tensors(source: PeftFolder, layers: Mapping[str, BaseLayer]) -> dict[str, Tensor]:
    """The file's tensors by our key, as this library shapes them. Raises CheckpointError for a NaN or an infinity."""
    tensors = source.header.read([*source.in_file.values(), *source.copies])
    table = format_of(source.settings)
    tables = {key for ours, key in source.in_file.items() if table and table.is_table(ours)}
    floats = {key: tensor for key, tensor in tensors.items() if key not in tables}  # `stored_as` checks the tables
    check_numbers(floats, str(source.header.path), "save the adapter again")
    for key, other in source.copies.items():
        if not torch.equal(tensors[key], tensors[other]):
            raise CheckpointError(f"{source.header.path}: {key} and {other} are one tensor, and differ")
    for key in source.zeros:
        if torch.any(source.header.read([key])[key]):
            raise CheckpointError(f"{source.header.path}: {key} holds zeros in PEFT's files, and here other numbers")
    by_ours = {ours: tensors[key] for ours, key in source.in_file.items()}
    by_ours = by_ours if table is None else by_table.gathered(table, by_ours, layers)
    is_scale = {ours: ours.endswith("lora_l") and tensor.ndim <= 2 for ours, tensor in by_ours.items()}
    return {ours: tensor.flatten() if is_scale[ours] else tensor for ours, tensor in by_ours.items()}
