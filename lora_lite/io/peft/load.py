"""PEFT's adapter folders attached as adapters of this library, or read by layer without a model."""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from ...base.layer import BaseLayer
from ...base.matrices import ALL_CHANNELS
from ...base.stacks import place
from ...core.adapter import Adapter
from ...core.attach import installed
from ...core.config import BaseConfig
from ...core.names import check_shapes, file_key
from ...core.resolve import Overrides, attachable, make_sites
from ...core.shared import Shared
from ...core.state import Method
from ...core.targets import Target
from ...core.variant import config_for, lookup
from ...dtypes import STORAGE_DTYPES
from ...errors import CheckpointError, ConfigError, QuantizedWeightError, brief
from ..keys import SECOND, THEIRS, layers_of
from ..raw import same_tensor
from ..safetensors import DTYPES, check_numbers
from . import forms
from .conversion import led_to_model
from .folder import PeftFolder, alphas_of, check_rank, flag_of, number_of, read_folder
from .ties import without_heads

# Starts of an init_lora_weights that writes the base, so that A and B belong to another one.
_REWRITES = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class Part:
    """One adapter of ours in a folder."""

    cfg: BaseConfig
    targets: dict[str, Target]  # by the path in the file
    overrides: Overrides  # by the path in the model


def load_peft(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> Adapter:
    """Attach the adapter of a PEFT folder, or of a file of diffusers: LoRA, rsLoRA, rank and alpha patterns, DoRA, IA3.

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
            zeros = {key: torch.zeros(spec.shape, dtype=part.cfg.dtype) for key, spec in specs.items()}
            adapter = stack.enter_context(installed(root, [Method(part.cfg, sites)], part_name, zeros))
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
        CheckpointError: as load_peft does, and for OLoRA, whose A and B are relative to the base weight.
    """
    source = read_folder(folder)
    targets = _targets_by_shapes(source)
    if source.settings["peft_type"] != "IA3" and _method(source)[1] == "olora":
        raise source.error("init_lora_weights='olora' wrote the base: its A and B are half of the adapter")
    stored = stored_tensors(source)
    return [
        StoredLayer(
            target,
            part.cfg.with_overrides(part.overrides.get(path, {})),
            {name: stored[key] for name in THEIRS if (key := file_key(path, name)) in stored},
        )
        for part in parts_of(source, targets, {})
        for path, target in part.targets.items()
    ], source.settings


def _targets_by_shapes(source: PeftFolder) -> dict[str, Target]:
    """The layers as their tensors tell; 0 stands for a side that they don't."""
    targets, shapes = {}, {key: entry.shape for key, entry in source.entries.items()}
    for path in source.paths:
        a, b, scales = (shapes.get(file_key(path, name), ()) for name in ("lora_A", "lora_B", "lora_l"))
        d_in = a[-1] if len(a) == 2 else scales[1] if len(scales) == 2 and scales[0] == 1 else 0
        d_out = b[0] if len(b) == 2 else scales[0] if len(scales) == 2 and scales[1] == 1 else 0
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
    if source.settings["peft_type"] == "IA3":
        return _ia3_parts(source, targets, layers)
    return [_lora_part(source, targets, layers)]


def _lora_part(source: PeftFolder, targets: dict[str, Target], layers: Mapping[str, BaseLayer]) -> Part:
    variant, init = _method(source)
    rslora = flag_of(source, "use_rslora")
    dropout = number_of(source, "lora_dropout", source.settings.get("lora_dropout", 0))
    if init in ("pissa", "olora") and dropout:
        problem = f"lora_dropout={dropout} with init_lora_weights={init!r} can't be kept here"
        raise source.error(f"{problem}\n  dropout acts in training only: set it to 0 in the file if you don't train on")
    if (stacks := [path for path, t in targets.items() if t.experts]) and (init or variant == "dora"):
        setting = f"init_lora_weights={init!r}" if init else "use_dora=true"
        raise source.error(f"{setting} on experts, {stacks[0]}, isn't supported: PEFT has no such adapter")
    shapes, alphas = forms.shapes(source, layers), alphas_of(source, targets)
    specs: dict[str, tuple[int, ...]] = {}
    ranks: dict[str, int] = {}
    settings: dict[str, tuple[int, float]] = {}  # path in the model -> (r, alpha)
    for path, target in targets.items():
        alpha, experts = alphas[path], (target.experts,) if target.experts else ()
        # A tensor that isn't there, or without dimensions, fails check_shapes.
        r = (*shapes.get(file_key(path, "lora_A"), ()), 1, 1)[len(experts)]
        # PEFT's r is of all groups of a convolution together.
        parts = target.experts if path in layers and layers[path].kind is ALL_CHANNELS else 1
        specs |= {file_key(path, "lora_A"): (*experts, r, target.d_in)}
        specs |= {file_key(path, "lora_B"): (*experts, target.d_out, r)}
        specs |= {file_key(path, "lora_m"): (target.d_out,)} if variant == "dora" else {}
        ranks[path] = r * parts
        alpha /= math.sqrt(parts) if rslora else parts  # the same s
        if init == "olora":
            r, alpha = 2 * r, alpha * (math.sqrt(2) if rslora else 2)  # [B, -B0] [A; A0] at the same s
        elif init == "pissa" and rslora:
            alpha *= math.sqrt(r)  # PiSSA's s is α/r
        settings[target.path] = (r, alpha)
    check_shapes(shapes, specs, str(source.header.path))
    for path, r in ranks.items():
        check_rank(source, path, r)
    # The most frequent rank and alpha are the config's, the others its per_layer.
    ((most, _),) = Counter(settings.values()).most_common(1)
    overrides = {path: {"r": r, "alpha": alpha} for path, (r, alpha) in settings.items() if (r, alpha) != most}
    extra: dict[str, Any] = {} if variant == "pissa" else {"rslora": rslora, "dropout": dropout}
    extra |= {"tied_weights": "together"} if flag_of(source, "ensure_weight_tying") else {}
    reads = init == "olora" or lookup(variant).base_weight != "unused"
    cfg = _config(source, variant, targets, layers, overrides, reads, r=most[0], alpha=most[1], **extra)
    return Part(cfg, targets, overrides)


def _method(source: PeftFolder) -> tuple[str, Any]:
    """Our variant, and the init where it is one that wrote the base in a way that is known here."""
    dora, init = flag_of(source, "use_dora"), source.settings.get("init_lora_weights", True)
    init = init.lower() if isinstance(init, str) else init
    if init is None or isinstance(init, bool) or init in ("gaussian", "eva", "orthogonal"):
        return "dora" if dora else "lora", None
    if init in ("pissa", "olora") and not dora:
        return "pissa" if init == "pissa" else "lora", init
    if not str(init).startswith(_REWRITES):
        raise source.error(
            f"init_lora_weights={brief(repr(init))} isn't supported: what it does to the base or to training is lost"
        )
    both = " with use_dora" if dora else ""
    raise source.error(
        f"init_lora_weights={init!r}{both} wrote the base: its A and B belong to another one\n"
        f"  make a plain LoRA of it: PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...);\n"
        f"  or, if your model is the base that was written, set init_lora_weights to true in the file"
    )


def _ia3_parts(source: PeftFolder, targets: dict[str, Target], layers: Mapping[str, BaseLayer]) -> list[Part]:
    """One part or two, by the shapes: (o, 1) scales outputs, (1, i) inputs; a convolution's by feedforward_modules."""
    entries, specs = source.entries, {}
    halves: dict[str, dict[str, Target]] = {"ia3": {}, "ia3_ff": {}}
    for path, target in targets.items():
        key = file_key(path, "lora_l")
        wanted: dict[str, tuple[int, ...]] = {"ia3": (target.d_out, 1), "ia3_ff": (1, target.d_in)}
        if path in layers and layers[path].kind.category == "conv":
            wanted = {forms.ia3_on(source, path): forms.ia3_shape(source, path, layers[path])}
        fitting = [variant for variant, shape in wanted.items() if key in entries and entries[key].shape == shape]
        if len(fitting) > 1:
            raise CheckpointError(
                f"{source.header.path}: {source.keys[key]} is (1, 1), so it could scale input or output"
            )
        variant = fitting[0] if fitting else next(iter(wanted))
        halves[variant][path], specs[key] = target, wanted[variant]
    check_shapes(entries, specs, str(source.header.path))
    return [
        Part(_config(source, variant, half, layers, {}, False), half, {}) for variant, half in halves.items() if half
    ]


def _config(
    source: PeftFolder,
    variant: str,
    targets: Mapping[str, Target],
    layers: Mapping[str, BaseLayer],
    overrides: Overrides,
    reads: bool,
    **values: Any,
) -> BaseConfig:
    """Our config, with regexes of its own that find these layers exactly. `reads`: its maths reads the base weight."""
    dtype = _dtype(source, targets, reads)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path, fields in overrides.items():
        groups.setdefault(tuple(fields.items()), []).append(path)
    per_layer = {_exactly(paths): dict(fields) for fields, paths in groups.items()}  # a regex for each pair of values
    names = (_exactly(target.path for target in targets.values()),)
    values |= {"kinds": tuple(dict.fromkeys(layers[path].kind.category for path in targets))} if layers else {}
    try:
        return config_for(variant)(variant=variant, target_names=names, dtype=dtype, per_layer=per_layer, **values)
    except ConfigError as error:
        raise source.error(str(error)) from error


def _exactly(paths: Iterable[str]) -> str:
    return f"^({'|'.join(map(re.escape, paths))})$"


def _dtype(source: PeftFolder, targets: Mapping[str, Target], reads: bool) -> torch.dtype:
    """One dtype that holds the numbers of all these layers' tensors. Raises CheckpointError."""
    names = {entry.dtype: ours for ours, entry in source.entries.items() if ours.rpartition(".")[0] in targets}
    for dtype, ours in names.items():
        if DTYPES.get(dtype) not in STORAGE_DTYPES:
            raise CheckpointError(f"{source.header.path}: {source.keys[ours]} is stored as {dtype}; wanted floats")
    return reduce(torch.promote_types, [*([torch.float32] if reads else []), *(DTYPES[dtype] for dtype in names)])


def _tensors(
    source: PeftFolder, targets: Mapping[str, Target], layers: Mapping[Target, BaseLayer]
) -> dict[str, Tensor]:
    """The file's tensors by their key in the model, as this library shapes them."""
    stored = stored_tensors(source)
    return {
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
    if "lora_l" in tensors:
        tensors["lora_l"] = forms.over_patches(source, path, layer, tensors["lora_l"])
    if source.settings["peft_type"] == "LORA" and _method(source)[1] == "olora":
        a, b = tensors["lora_A"], tensors["lora_B"]
        b0, a0 = _removed_by_olora(base, r=len(a))  # (o, r), (r, i)
        tensors["lora_A"] = torch.cat([a.to(a0), a0])  # (2r, i)
        tensors["lora_B"] = torch.cat([b.to(b0), -b0], dim=1)  # (o, 2r)
    return tensors


def stored_tensors(source: PeftFolder) -> dict[str, Tensor]:
    """The file's tensors by our key, as this library shapes them. Raises CheckpointError for a NaN or an infinity."""
    tensors = source.header.read()
    check_numbers(tensors, str(source.header.path), "save the adapter again")
    by_ours = {ours: tensors[key] for ours, key in source.keys.items()}
    is_scale = {ours: ours.endswith("lora_l") and tensor.ndim <= 2 for ours, tensor in by_ours.items()}
    return {ours: tensor.flatten() if is_scale[ours] else tensor for ours, tensor in by_ours.items()}


def _removed_by_olora(layer: BaseLayer, r: int) -> tuple[Tensor, Tensor]:
    """(B0, A0): the first r columns and rows of W = Q R."""
    if not layer.storage.is_dense:
        raise QuantizedWeightError(
            f"{layer.path}: OLoRA took a part out of a dense weight, and this one is {layer.describe()}\n"
            f"  load the base without quantization, or convert the folder (path_initial_model_for_weight_conversion)"
        )
    q, rest = torch.linalg.qr(layer.dense_weight())  # (o, k), (k, i) with k = min(o, i)
    return q[:, :r].cpu(), rest[:r].cpu()
