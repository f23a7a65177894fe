"""PEFT's adapter folders attached as adapters of this library, or read by layer without a model."""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
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
from ...core.shared import Shared
from ...core.state import Method
from ...core.targets import Target
from ...core.variant import ParamSpec, lookup
from ...errors import CheckpointError
from ..keys import SECOND, THEIRS, layers_of
from ..raw import same_tensor
from ..safetensors import check_numbers
from . import forms, ia3, lora, vera
from .conversion import led_to_model
from .folder import PeftFolder, read_folder
from .parts import Part
from .ties import without_heads

Reader = Callable[[PeftFolder, dict[str, Target], Mapping[str, BaseLayer]], list[Part]]
_READERS: dict[str, Reader] = {"LORA": lora.parts, "IA3": ia3.parts, "VERA": vera.parts}  # by peft_type


def load_peft(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> Adapter:
    """Attach the adapter of a PEFT folder, or of a file of diffusers: LoRA, rsLoRA, rank and alpha patterns, DoRA, IA3,
    VeRA.

    Tensors are bit-equal, in the file's dtype. Mixed dtypes are promoted to one that holds them all; so are 16-bit
    tensors of DoRA, PiSSA and OLoRA to float32, since their maths compares them with numbers of the live weight.

    IA3 on both outputs and inputs (feedforward_modules) becomes two adapters: `name` of the variant ia3, which is
    returned, and `<name>_ff` of ia3_ff; save_peft writes them as one again. A folder whose init wrote the base is
    loaded without writing it: "pissa" as the variant pissa, "olora" as a LoRA of rank 2r that takes the removed part
    out, on a dense base.

    A copy of the base's own weight, as PEFT adds it to an adapter on lm_head, is compared with this model's.

    Raises:
        CheckpointError: for a setting or a tensor that would be lost, or a base weight that isn't this model's, naming
            it.

    It raises what attach raises, too; the model is then as it was.
    """
    root = attachable(model)
    modules = dict(root.named_modules())
    source = forms.placed(root, led_to_model(root, read_folder(Path(folder), modules), modules))
    targets, layers = layers_of(root, source.header.path, source.paths)
    source = without_heads(root, source, {path: layers[target] for path, target in targets.items()})
    targets = {path: targets[path] for path in source.paths}
    if blocks := [path for path, target in targets.items() if target.experts and not target.by_weight]:
        raise source.error(f"target_parameters doesn't tell which experts of {blocks[0]} its tensors are of")
    taken = {path: forms.as_peft_takes(source, path, layers[target]) for path, target in targets.items()}
    targets = {path: targets[path].on(layer) for path, layer in taken.items()}
    layers = {targets[path]: layer for path, layer in taken.items()}
    _check_base(root, source, targets, layers)
    # Every shape and dtype is found right before a tensor is read.
    parts = parts_of(source, targets, {path: layers[target] for path, target in targets.items()})
    stored, loaded = _tensors(source, targets, layers), []
    with ExitStack() as stack:
        for part, part_name in zip(parts, (name, name + SECOND)[: len(parts)], strict=True):
            sites = make_sites({target: layers[target] for target in part.targets.values()}, part.cfg, part.overrides)
            specs = {site.key(tensor): spec for site in sites for tensor, spec in site.specs.items()}
            first = {key: torch.zeros(spec.shape, dtype=part.cfg.dtype) for key, spec in specs.items()}
            first |= {key: stored[key].to(part.cfg.dtype) for key in source.shared}
            adapter = stack.enter_context(installed(root, [Method(part.cfg, sites)], part_name, first))
            with torch.no_grad():
                for view in adapter.views().values():  # n0, A0 and B0 are the base's; the file's numbers come next
                    lookup(part.cfg.variant).init(view, view.cfg)
            adapter.load_state_dict({key: stored.get(key, tensor) for key, tensor in adapter.state_dict().items()})
            loaded.append(adapter)
    for adapter in loaded:
        logger.info(f"loaded {adapter} from {folder}, in PEFT's format")
    return loaded[0]


@dataclass(frozen=True)
class StoredLayer:
    """One layer of an adapter on disk. In a PEFT folder a size that no tensor tells is 0; base tensors are absent."""

    target: Target
    cfg: BaseConfig
    tensors: dict[str, Tensor]  # with a leading axis over experts where `target.experts` isn't 0
    scale: float = 1.0
    shared: Shared | None = None  # the tensors that the adapter has once


def read_layers(folder: Path) -> tuple[list[StoredLayer], dict[str, Any]]:
    """The layers that load_peft would attach to, and the folder's settings.

    Raises:
        CheckpointError: as load_peft does; for OLoRA, whose A and B are relative to the base weight, and for VeRA
            without its projections, whose sizes no tensor tells.
    """
    source = read_folder(folder)
    targets = _targets_by_shapes(source)
    if source.settings["peft_type"] == "LORA" and lora.is_olora(source):
        raise source.error("init_lora_weights='olora' wrote the base: its A and B are half of the adapter")
    parts, stored = parts_of(source, targets, {}), stored_tensors(source)
    if source.settings["peft_type"] == "VERA" and not source.shared:
        cure = "load it on its model, and save it with save_projection=True"
        raise source.error(f"save_projection=false: A and B are drawn in sizes that the model's layers have\n  {cure}")
    shared = Shared({key.rpartition(".")[2]: ParamSpec(tuple(stored[key].shape)) for key in source.shared})
    for key in source.shared:
        shared.hold(key.rpartition(".")[2], stored[key])
    return [
        StoredLayer(
            target,
            part.cfg.with_overrides(part.overrides.get(path, {})),
            {name: stored[key] for name in THEIRS if (key := file_key(path, name)) in stored},
            shared=shared if source.shared else None,
        )
        for part in parts
        for path, target in part.targets.items()
    ], source.settings


def _targets_by_shapes(source: PeftFolder) -> dict[str, Target]:
    """The layers as their tensors tell; 0 stands for a side that they don't."""
    targets, shapes = {}, {key: entry.shape for key, entry in source.entries.items()}
    for path in source.paths:
        names = ("lora_A", "lora_B", "lora_l", "lora_b")
        a, b, scales, outputs = (shapes.get(file_key(path, name), ()) for name in names)
        d_in = a[-1] if len(a) == 2 else scales[1] if len(scales) == 2 and scales[0] == 1 else 0
        d_out = b[0] if len(b) == 2 else scales[0] if len(scales) == 2 and scales[1] == 1 else 0
        d_out = outputs[0] if len(outputs) == 1 else d_out
        targets[path] = Target(path, d_in, d_out, "?", *place(path))
    return targets


def _check_base(
    root: nn.Module, source: PeftFolder, targets: Mapping[str, Target], layers: Mapping[Target, BaseLayer]
) -> None:
    """Raises CheckpointError for a tensor of the base that isn't, or can't be known to be, the live one."""
    for ours, key in source.base.items():
        in_file, _, name = ours.rpartition(".")
        target = targets[in_file]
        live = root.get_submodule(target.path).state_dict().get(name)
        same = live is not None and same_tensor(live, source.header, key, layers[target].storage)
        if not same:
            relation = "can not be compared with" if same is None else "is not"
            raise CheckpointError(
                f"{source.header.path}: {key} {relation} this model's {file_key(target.path, name)}\n"
                f"  the adapter belongs to another base, or one trained with it: load it there, or remove that tensor"
            )


def parts_of(source: PeftFolder, targets: dict[str, Target], layers: Mapping[str, BaseLayer]) -> list[Part]:
    """The adapters of ours in a folder, one or two, on these layers by their path in the file.

    layers      by that path, too; none without a model, where all are linear

    Raises:
        CheckpointError: for settings, keys or shapes that aren't such an adapter's. No tensor is read.
    """
    return _READERS[source.settings["peft_type"]](source, targets, layers)


def _tensors(
    source: PeftFolder, targets: Mapping[str, Target], layers: Mapping[Target, BaseLayer]
) -> dict[str, Tensor]:
    """The file's tensors by their key in the model, as this library shapes them."""
    stored = stored_tensors(source)
    return {key: stored[key] for key in source.shared} | {
        file_key(target.path, name): tensor
        for path, target in targets.items()
        for name, tensor in tensors_at(source, stored, path, layers[target], layers[target]).items()
    }


def tensors_at(
    source: PeftFolder, stored: Mapping[str, Tensor], path: str, layer: BaseLayer, base: BaseLayer
) -> dict[str, Tensor]:
    """The tensors of one layer by name, of those that `stored_tensors` gave; those of OLoRA are relative to the weight
    of `base`, which is the layer itself or stands for it.

    Raises:
        QuantizedWeightError: for OLoRA on a weight that isn't dense.
    """
    keys = {name: key for name in THEIRS if (key := file_key(path, name)) in stored}
    tensors = {name: forms.ours(layer, name, stored[key]) for name, key in keys.items()}
    match source.settings["peft_type"]:
        case "LORA":
            return lora.tensors_of(source, base, tensors)
        case "IA3":
            return ia3.tensors_of(source, path, layer, tensors)
        case _:
            return tensors


def stored_tensors(source: PeftFolder) -> dict[str, Tensor]:
    """The file's tensors by our key, as this library shapes them. Raises CheckpointError for a NaN or an infinity."""
    tensors = source.header.read()
    check_numbers(tensors, str(source.header.path), "save the adapter again")
    by_ours = {ours: tensors[key] for ours, key in source.in_file.items()}
    is_scale = {ours: ours.endswith("lora_l") and tensor.ndim <= 2 for ours, tensor in by_ours.items()}
    return {ours: tensor.flatten() if is_scale[ours] else tensor for ours, tensor in by_ours.items()}
