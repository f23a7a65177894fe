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

from ...base.layer import BaseLayer, layer_of
from ...base.stacks import find_stacks, place
from ...core.adapter import Adapter
from ...core.attach import installed
from ...core.config import BaseConfig
from ...core.names import check_shapes, file_key
from ...core.resolve import Overrides, attachable, make_sites
from ...core.targets import Target
from ...core.variant import config_for, lookup
from ...dtypes import STORAGE_DTYPES
from ...errors import CheckpointError, ConfigError, QuantizedWeightError, brief
from ..keys import SECOND, THEIRS, resolve
from ..raw import same_tensor
from ..safetensors import DTYPES, check_numbers
from .folder import PeftFolder, alphas_of, check_rank, flag_of, number_of, read_folder

_REWRITES = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Starts of an init_lora_weights that writes the base, so that A and B belong to another one."""


@dataclass(frozen=True)
class _Part:
    """One adapter of ours in a folder."""

    cfg: BaseConfig
    targets: dict[str, Target]
    """By the path in the file."""
    overrides: Overrides
    """By the path in the model."""


def load_peft(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> Adapter:
    """Attach the adapter of a PEFT folder, or of a file of diffusers: LoRA, rsLoRA, rank and alpha patterns, DoRA, IA3.

    Tensors are bit-equal, in the file's dtype. Mixed dtypes are promoted to one that holds them all; so are 16-bit
    tensors of DoRA, PiSSA and OLoRA to float32, since their maths compares them with numbers of the live weight.

    IA3 on both outputs and inputs (feedforward_modules) becomes two adapters: `name` of the variant ia3, which is
    returned, and `<name>_ff` of ia3_ff; save_peft writes them as one again. A folder whose init wrote the base is
    loaded without writing it: "pissa" as the variant pissa, "olora" as a LoRA of rank 2r that takes the removed part
    out, on a dense base.

    A copy of the base's own weight, as PEFT adds it to an adapter on lm_head, is compared with this model's.

    Raises CheckpointError for a setting or a tensor that would be lost, or a base weight that isn't this model's,
    naming it, and what attach raises; the model is then as it was.
    """
    root = attachable(model)
    source = read_folder(Path(folder), dict(root.named_modules()))
    targets, layers = _targets(root, source)
    _check_base(root, source, targets, layers)
    parts = _ia3_parts(source, targets) if source.settings["peft_type"] == "IA3" else [_lora_part(source, targets)]
    held = _tensors(source, targets, layers)
    names, loaded = [name, name + SECOND][: len(parts)], []
    with ExitStack() as stack:
        for part, name in zip(parts, names, strict=True):
            sites = make_sites({target: layers[target] for target in part.targets.values()}, part.cfg, part.overrides)
            tensors = {
                site.key(tensor): held.get(site.key(tensor), torch.zeros(spec.shape)).to(part.cfg.dtype, copy=True)
                for site in sites
                for tensor, spec in site.specs.items()
            }
            adapter = stack.enter_context(installed(root, part.cfg, name, sites, tensors))
            with torch.no_grad():
                for view in adapter.views().values():  # n0, A0 and B0 are the base's; what else it fills comes next
                    lookup(part.cfg.variant).init(view, view.cfg)
            adapter.load_state_dict({key: held.get(key, tensor) for key, tensor in adapter.state_dict().items()})
            loaded.append(adapter)
    for adapter in loaded:
        logger.info(f"loaded {adapter} from {folder}, in PEFT's format")
    return loaded[0]


@dataclass(frozen=True)
class PeftLayer:
    """One layer of a folder without its model: a size that no tensor tells is 0, a tensor of the base isn't there."""

    target: Target
    cfg: BaseConfig
    tensors: dict[str, Tensor]


def read_layers(folder: Path) -> tuple[list[PeftLayer], dict[str, Any]]:
    """What load_peft would attach, by layer, and the folder's settings. Raises CheckpointError as it does.

    OLoRA's A and B are relative to the base weight, so it is refused here.
    """
    source = read_folder(folder)
    targets = {at: _by_shapes(source, at) for at in source.paths}
    ia3 = source.settings["peft_type"] == "IA3"
    if not ia3 and _method(source)[1] == "olora":
        raise source.error("init_lora_weights='olora' wrote the base: its A and B are half of the adapter")
    held = _held(source)
    return [
        PeftLayer(
            target,
            part.cfg.with_overrides(part.overrides.get(at, {})),
            {name: held[key] for name in THEIRS if (key := file_key(at, name)) in held},
        )
        for part in (_ia3_parts(source, targets) if ia3 else [_lora_part(source, targets)])
        for at, target in part.targets.items()
    ], source.settings


def _by_shapes(source: PeftFolder, at: str) -> Target:
    """The layer as its tensors tell; 0 stands for a side that they don't."""
    shapes = source.shapes()
    a, b, scales = (shapes.get(file_key(at, name), ()) for name in ("lora_A", "lora_B", "lora_l"))
    d_in = a[-1] if len(a) == 2 else scales[1] if len(scales) == 2 and scales[0] == 1 else 0
    d_out = b[0] if len(b) == 2 else scales[0] if len(scales) == 2 and scales[1] == 1 else 0
    return Target(at, d_in, d_out, "?", *place(at))


def _targets(root: nn.Module, source: PeftFolder) -> tuple[dict[str, Target], dict[Target, BaseLayer]]:
    """The model's linear layer for each path of the file. Raises CheckpointError."""
    modules = dict(root.named_modules())
    mapping = resolve(source.header.path, source.paths, set(modules), type(root).__name__)
    targets, layers, stacks = {}, {}, find_stacks(modules)
    for in_file, path in mapping.items():
        layer = layer_of(modules[path], path)
        if layer is None or layer.experts:
            raise CheckpointError(
                f"{source.header.path}: {in_file} is no linear layer of this {type(root).__name__} but "
                f"{type(modules[path]).__name__}\n  convolutions, embeddings and fused experts aren't supported"
            )
        targets[in_file] = target = Target.of(layer, stacks)
        layers[target] = layer
    return targets, layers


def _check_base(
    root: nn.Module, source: PeftFolder, targets: Mapping[str, Target], layers: Mapping[Target, BaseLayer]
) -> None:
    """Raises CheckpointError for a tensor of the base that isn't, or can't be known to be, the live one."""
    for ours, key in source.base.items():
        in_file, _, name = ours.rpartition(".")
        target = targets[in_file]
        path, live = file_key(target.path, name), root.get_submodule(target.path).state_dict().get(name)
        same = live is not None and same_tensor(live, source.header, key, layers[target].storage)
        if not same:
            raise CheckpointError(
                f"{source.header.path}: {key} {'can not be compared with' if same is None else 'is not'} this model's "
                f"{path}\n  the adapter belongs to another base, or to one that was trained with it: load it there, or "
                f"take that tensor out of the file if you know that the difference does not matter"
            )


def _lora_part(source: PeftFolder, targets: dict[str, Target]) -> _Part:
    variant, init = _method(source)
    rslora = flag_of(source, "use_rslora")
    dropout = number_of(source, "lora_dropout", source.settings.get("lora_dropout", 0))
    if init in ("pissa", "olora") and dropout:
        raise source.error(
            f"lora_dropout={dropout} with init_lora_weights={init!r} can't be kept here\n"
            f"  dropout acts in training only: set it to 0 in the file if you don't train on"
        )
    shapes, alphas = source.shapes(), alphas_of(source, targets)
    at_layers: dict[str, tuple[int, float]] = {}
    wanted: dict[str, tuple[int, ...]] = {}
    for at, target in targets.items():
        r = (*shapes.get(file_key(at, "lora_A"), ()), 1)[0]
        wanted |= {file_key(at, "lora_A"): (r, target.d_in), file_key(at, "lora_B"): (target.d_out, r)}
        wanted |= {file_key(at, "lora_m"): (target.d_out,)} if variant == "dora" else {}
        alpha = alphas[at]
        if init == "olora":
            r, alpha = 2 * r, alpha * (math.sqrt(2) if rslora else 2)  # [B, -B0] [A; A0] at the same s
        elif init == "pissa" and rslora:
            alpha *= math.sqrt(r)  # PiSSA's s is α/r
        at_layers[target.path] = (r, alpha)
    check_shapes(shapes, wanted, str(source.header.path))
    for at in targets:
        check_rank(source, at, shapes[file_key(at, "lora_A")][0])
    (r, alpha), _ = Counter(at_layers.values()).most_common(1)[0]
    differ = {path: {"r": here[0], "alpha": here[1]} for path, here in at_layers.items() if here != (r, alpha)}
    common: dict[str, Any] = {"r": r, "alpha": alpha}
    if variant != "pissa":
        common |= {"rslora": rslora, "dropout": dropout}
    reads = init == "olora" or lookup(variant).base_weight != "unused"
    return _Part(_config(source, variant, targets, differ, reads, **common), targets, differ)


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


def _ia3_parts(source: PeftFolder, targets: dict[str, Target]) -> list[_Part]:
    """By the shapes: (o, 1) scales outputs, (1, i) inputs."""
    shapes = source.shapes()
    of: dict[str, dict[str, Target]] = {"ia3": {}, "ia3_ff": {}}
    wanted = {}
    for at, target in targets.items():
        key = file_key(at, "lora_l")
        forms = {"ia3": (target.d_out, 1), "ia3_ff": (1, target.d_in)}
        fit = [variant for variant, shape in forms.items() if shapes.get(key) == shape]
        if len(fit) > 1:
            raise CheckpointError(
                f"{source.header.path}: {source.keys[key]} is (1, 1), so it could scale input or output"
            )
        variant = fit[0] if fit else "ia3"
        of[variant][at], wanted[key] = target, forms[variant]
    check_shapes(shapes, wanted, str(source.header.path))
    return [_Part(_config(source, variant, own, {}, False), own, {}) for variant, own in of.items() if own]


def _config(
    source: PeftFolder, variant: str, targets: Mapping[str, Target], overrides: Overrides, reads: bool, **values: Any
) -> BaseConfig:
    """Ours, with regexes of its own that find these layers exactly. `reads`: its maths reads the base weight."""
    dtype = _dtype(source, targets, reads)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path, here in overrides.items():
        groups.setdefault(tuple(here.items()), []).append(path)
    per_layer = {_exactly(paths): dict(items) for items, paths in groups.items()}
    names = (_exactly(target.path for target in targets.values()),)
    try:
        return config_for(variant)(variant=variant, target_names=names, dtype=dtype, per_layer=per_layer, **values)
    except ConfigError as error:
        raise source.error(str(error)) from error


def _exactly(paths: Iterable[str]) -> str:
    return f"^({'|'.join(map(re.escape, paths))})$"


def _dtype(source: PeftFolder, files: Mapping[str, Target], reads: bool) -> torch.dtype:
    entries = {key: source.header.entries[key] for ours, key in source.keys.items() if ours.rpartition(".")[0] in files}
    odd = [key for key, entry in entries.items() if DTYPES.get(entry.dtype) not in STORAGE_DTYPES]
    if odd:
        raise CheckpointError(f"{source.header.path}: {odd[0]} is stored as {entries[odd[0]].dtype}; wanted floats")
    dtypes = {DTYPES[entry.dtype] for entry in entries.values()} | ({torch.float32} if reads else set())
    return reduce(torch.promote_types, sorted(dtypes, key=str))


def _tensors(
    source: PeftFolder, targets: Mapping[str, Target], layers: Mapping[Target, BaseLayer]
) -> dict[str, Tensor]:
    """The file's tensors by their key in the model, as this library shapes them."""
    held = {}
    for ours, value in _held(source).items():
        at, _, tensor = ours.rpartition(".")
        held[file_key(targets[at].path, tensor)] = value
    if _method(source)[1] == "olora":
        for target in targets.values():
            a, b = file_key(target.path, "lora_A"), file_key(target.path, "lora_B")
            b0, a0 = _removed_by_olora(layers[target], r=held[a].shape[0])
            held[a], held[b] = torch.cat([held[a].to(a0), a0]), torch.cat([held[b].to(b0), -b0], dim=1)
    return held


def _held(source: PeftFolder) -> dict[str, Tensor]:
    """The file's tensors by our key, as this library shapes them."""
    read = source.header.read()
    check_numbers(read, str(source.header.path), "save the adapter again")
    return {ours: read[key].flatten() if ours.endswith("lora_l") else read[key] for ours, key in source.keys.items()}


def _removed_by_olora(layer: BaseLayer, r: int) -> tuple[Tensor, Tensor]:
    """(B0, A0): the first r columns and rows of W = Q R."""
    if not layer.storage.is_dense:
        raise QuantizedWeightError(
            f"{layer.path}: OLoRA took a part out of a dense weight, and this one is {layer.describe()}\n"
            f"  load the base without quantization, or convert the folder (path_initial_model_for_weight_conversion)"
        )
    q, rest = torch.linalg.qr(layer.dense_weight())
    return q[:, :r].cpu(), rest[:r].cpu()
