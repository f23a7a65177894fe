"""Adapters written as PEFT's folders: as they are where PEFT has them, else as a plain LoRA of what they change."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ...base.matrices import ALL_CHANNELS
from ...core.adapter import Adapter, adapters, get_adapter
from ...core.effective import delta_weight
from ...core.names import check_shapes
from ...core.state import Site, check_unmerged, session_of
from ...core.validate import is_number
from ...errors import CheckpointError, ConfigError, brief
from ...ops.svd import low_rank_factors
from ..keys import PREFIX, SECOND
from ..safetensors import check_numbers, replacing
from . import forms
from .conversion import moved_keys, named_like_experts, old_keys
from .folder import CONFIG, WEIGHTS
from .ties import mirrored, tied_paths

Layers = dict[str, list[Site]]  # path -> the sites of the chosen adapters there, in the order attached
Written = tuple[dict[str, Tensor], dict[str, Any]]  # tensors by PEFT's key, settings


def save_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | Sequence[str] = "default",
    rank: int | None = None,
    max_error: float | None = None,
) -> float | None:
    """Write a PEFT folder: LoRA and DoRA (with `per_layer`), ia3, ia3_ff as they are, tensors bit-equal.

    name        one adapter, or several that make one of PEFT's: an ia3 and an ia3_ff on other layers. The name of an
                ia3 alone also takes the ia3_ff `<name>_ff` along, into which load_peft puts its second half; a list
                means what it names
    rank        write what adapters of any kind, at their scales, change in the weights as a plain LoRA of this rank
                (less where a layer has fewer directions), alpha = r: its SVD, in float32 at least. Exact where the
                change has that rank: LoRA's r, PiSSA's 2r, abliteration's own in the modes none and pre. The relative
                error ‖W' - W - B A‖/‖W' - W‖ is logged
    max_error   refuse a layer with a greater one, before anything is written

    Returns the greatest relative error of a layer; None without a rank, where there is none.

    Magnitudes of a 16-bit DoRA are written in float32, for the norms that PEFT computes and not the rounded ones kept
    here. A crash leaves the old folder or the new one; at worst, one without its config, that nothing loads.

    Nothing is written where it raises.

    Raises:
        CheckpointError: for what PEFT's format can't hold.
        TargetError: for an unknown name.
        ConfigError: for a bad argument.
        VariantError: if a method is not affine.
    """
    folder, (root, session) = Path(folder), session_of(model)
    check_unmerged(session, "export")
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; PEFT's format is a folder of two files")
    if not (rank is None or (type(rank) is int and rank > 0)):
        raise ConfigError(f"rank={rank!r}: wanted an integer of at least 1, or None")
    if max_error is not None and (rank is None or not is_number(max_error)):
        raise ConfigError(f"max_error={max_error!r} with rank={rank}: wanted a number beside a rank")
    chosen = [get_adapter(model, one) for one in (_with_second(model, name) if isinstance(name, str) else name)]
    layers, worst = _layers(model, chosen), None
    if rank is None:
        tensors, settings = _native(root, chosen, layers)
    else:
        tensors, settings, worst = _low_rank(root, layers, rank, max_error)
    check_numbers(tensors, f"{' and '.join(adapter.name for adapter in chosen)} in memory", "nothing was written")
    if settings["peft_type"] == "LORA":  # PEFT renames no other keys
        tensors = _as_peft_reads(root, tensors, layers)
    _write(folder, tensors, settings | _about(root, chosen[0]))
    logger.info(f"saved {' and '.join(map(str, chosen))} to {folder} in PEFT's format ({settings['peft_type']})")
    return worst


def _with_second(model: nn.Module, name: str) -> list[str]:
    """The adapter of this name, and the second half of an IA3 that load_peft made of one of PEFT's."""
    attached, pair = adapters(model), [name, name + SECOND]
    return pair if [attached[half].variant for half in pair if half in attached] == ["ia3", "ia3_ff"] else [name]


def _layers(model: nn.Module, chosen: Sequence[Adapter]) -> Layers:
    names = [adapter.name for adapter in chosen]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"name={names}: wanted one adapter, or several different ones")
    layers: Layers = {}
    for adapter in (adapter for adapter in adapters(model).values() if adapter.name in names):
        if adapter.is_sharded:
            raise CheckpointError(
                f"adapter {adapter.name!r} is sharded\n  use lora_lite.save, then load it in one process to convert it"
            )
        check_shapes(adapter.state_dict(), adapter.specs(), f"adapter {adapter.name!r} in memory")
        for site in adapter.sites():
            layers.setdefault(site.path, []).append(site)
    for path, (site, *_) in layers.items():
        if lack := forms.lacks(site):
            cure = "keep it as our file (lora_lite.save)" + ", or merge it" * (not site.no_weight)
            raise CheckpointError(f"{path or 'the model itself'}: {lack}\n  {cure}")
    return layers


def _native(root: nn.Module, chosen: Sequence[Adapter], layers: Layers) -> Written:
    """The adapters as they are. Raises CheckpointError for what PEFT hasn't."""
    scaled, variants = [adapter.name for adapter in chosen if adapter.scale != 1], [a.variant for a in chosen]
    if scaled:
        raise CheckpointError(
            f"{scaled[0]!r} has a scale, which PEFT can't hold\n  set it to 1, or give rank= to include it"
        )
    if variants in (["lora"], ["dora"]):
        return _native_lora(root, layers, is_dora=variants == ["dora"])
    if {*variants} <= {"ia3", "ia3_ff"} and all(len(sites) == 1 for sites in layers.values()):
        return _native_ia3(root, layers)
    raise CheckpointError(
        f"PEFT has no adapter like {', '.join(f'{a.name!r} ({a.variant})' for a in chosen)}\n"
        f"  give rank= to write what they change as a plain LoRA: 2r is exact for pissa, its own rank for "
        f"abliteration in the modes none and pre"
    )


def _native_lora(root: nn.Module, layers: Layers, is_dora: bool) -> Written:
    common = {(sites[0].cfg.rslora, sites[0].cfg.dropout) for sites in layers.values()}
    if len(common) > 1:
        raise CheckpointError(
            f"rslora and dropout differ by layer: {sorted(common)}\n  PEFT has one of each for all layers"
        )
    tensors: dict[str, Tensor] = {}
    ranks = {}
    for path, (site,) in layers.items():
        parts = site.target.experts if site.base.kind is ALL_CHANNELS else 1  # PEFT's r is of all groups
        alpha = float(site.cfg.r if site.cfg.alpha is None else site.cfg.alpha)
        ranks[path] = (site.cfg.r * parts, alpha * (math.sqrt(parts) if site.cfg.rslora else parts))
        values = {name: site.tensor(name).detach() for name in ("lora_A", "lora_B")}
        values |= {"lora_m": _magnitude(site)} if is_dora else {}  # (o,)
        tensors |= _theirs(root, layers, site, values)
    ((rslora, dropout),) = common
    return tensors, _lora_settings(root, layers, ranks, use_rslora=rslora, lora_dropout=dropout, use_dora=is_dora)


@torch.no_grad()
def _magnitude(site: Site) -> Tensor:
    """m of DoRA; where n0 was rounded to 16 bits, the m that gives the same outputs with norms of the live weight."""
    a, b, m, n0 = (site.tensor(f"lora_{name}").detach() for name in ("A", "B", "m", "n0"))
    if torch.promote_types(n0.dtype, torch.float32) == n0.dtype:
        return m
    weight = site.base.as_it_is_now().dense_weight().double()  # (o, i)
    square = weight.square().sum(1)  # (o,)
    # Outputs are m / ‖W + s B A‖ times those of W + s B A: here with a norm that starts from the rounded n0.
    moved = (weight + site.cfg.scaling * b.double() @ a.double()).square().sum(1)
    return (m.double() * (moved / (n0.double().square() + moved - square)).sqrt()).float()


def _native_ia3(root: nn.Module, layers: Layers) -> Written:
    tensors: dict[str, Tensor] = {}
    inner: list[str] = []
    for path, (site,) in layers.items():
        scales, on_input = site.tensor("lora_l").detach(), site.cfg.variant == "ia3_ff"
        scales = scales[None] if on_input else scales[:, None]  # (1, i) or (o, 1)
        tensors |= _theirs(root, layers, site, {"lora_l": scales})
        inner += [path] if on_input else []
    targets, feedforward = _modules(root, list(layers), inner)
    return tensors, {
        "peft_type": "IA3",
        "target_modules": targets,
        "feedforward_modules": feedforward,
        "fan_in_fan_out": any(site.base.transposed and not site.base.by_weight for (site,) in layers.values()),
        "init_ia3_weights": True,
    }


def _low_rank(
    root: nn.Module, layers: Layers, rank: int, max_error: float | None
) -> tuple[dict[str, Tensor], dict[str, Any], float]:
    tensors: dict[str, Tensor] = {}
    ranks, norms = {}, {}  # path -> (r, alpha); path -> (‖rest‖, ‖W' - W‖)
    for path, sites in layers.items():
        delta, moved_bias = delta_weight(sites)
        if moved_bias is not None:
            raise CheckpointError(
                f"{path}: {sites[0].cfg.variant!r} changes its bias, which a plain LoRA can't hold\n"
                f"  keep it as our file (lora_lite.save), or merge it"
            )
        dtype = reduce(torch.promote_types, (site.cfg.dtype for site in sites), torch.float32)
        a, b = (factor.to(dtype) for factor in low_rank_factors(delta, rank))  # (r, i), (o, r)
        # From the factors as they are written: rounding counts as error, too.
        norms[path] = float((delta - b.double() @ a.double()).norm()), float(delta.norm())
        tensors |= _theirs(root, layers, sites[0], {"lora_A": a, "lora_B": b})
        ranks[path] = (len(a), float(len(a)))  # alpha = r: a scaling of 1
    errors = {path: rest / size if size else 0.0 for path, (rest, size) in norms.items()}
    worst = max(errors, key=lambda path: errors[path])
    rest, size = (math.hypot(*values) for values in zip(*norms.values(), strict=True))  # of all layers
    overall = rest / size if size else 0.0
    line = f"as a LoRA of rank {rank}: relative error {overall:.1e} overall, {errors[worst]:.1e} at worst ({worst})"
    logger.info(line)
    if max_error is not None and not errors[worst] <= max_error:
        raise CheckpointError(
            f"{line}\n  wanted at most max_error={max_error}; nothing was written: give a higher rank"
        )
    settings = _lora_settings(root, layers, ranks, use_rslora=False, lora_dropout=0.0, use_dora=False)
    return tensors, settings, errors[worst]


def _lora_settings(
    root: nn.Module, layers: Layers, ranks: Mapping[str, tuple[int, float]], **fields: Any
) -> dict[str, Any]:
    """The settings for these ranks and alphas by path. Raises CheckpointError for layers that PEFT would lose."""
    r, alpha = (Counter(values).most_common(1)[0][0] for values in zip(*ranks.values(), strict=True))
    bare = [path for path in ranks if forms.is_parameter(layers[path][0])]
    called = [path for path in ranks if path not in bare]
    weights = {path: f"{path}.weight" for path in named_like_experts(root, called)}
    _check_kept(root, {path: layers[path] for path in called}, list(weights), fields)
    pairs: dict[str, set[tuple[int, float]]] = {}  # an attention's two projections share what PEFT calls the module's
    for path in called:
        pairs.setdefault(forms.module_path(layers[path][0]), set()).add(ranks[path])
    if uneven := [path for path, settings in pairs.items() if len(settings) > 1]:
        raise CheckpointError(f"{uneven[0]}: PEFT has one r and alpha for both projections of an attention")
    lacks = "DoRA" if fields["use_dora"] else "dropout" if fields["lora_dropout"] else None
    attention = [path for path in called if forms.in_attention(layers[path][0])]
    if bare and lacks:
        raise CheckpointError(f"{bare[0]}: PEFT has no {lacks} on a bare parameter\n  keep it as our file")
    if attention and fields["use_dora"]:
        cure = "keep it as our file, or give rank= to write a plain LoRA"
        raise CheckpointError(f"{attention[0]}: PEFT has no DoRA on nn.MultiheadAttention\n  {cure}")
    # PEFT 0.21.2 caches what the inner ones decode to before their adapters are on it.
    packed = [path for path in bare if layers[path][0].base.packed is not None]
    if len({path.rpartition(".")[0] for path in packed}) < len(packed):
        problem = "of several parameters in bitsandbytes' 4 bits on one module, PEFT applies one adapter"
        raise CheckpointError(f"{packed[0]}: {problem}\n  keep it as our file, or adapt one of them (target_names)")
    modules = [forms.module_path(layers[path][0]) for path in called if path not in weights]
    targets, _ = _modules(root, list(dict.fromkeys(modules)), []) if modules else ([], [])
    weights |= {path: path for path in bare}
    by_name = {forms.pattern_path(layers[path][0], weights.get(path, path)): pair for path, pair in ranks.items()}
    # PEFT takes those of a head from its own path, and its factors from the embedding.
    by_name |= {head: pair for path, pair in ranks.items() for head in tied_paths(root, layers[path][0])}
    by_pattern = {f"^{re.escape(name)}": pair for name, pair in by_name.items()}  # PEFT adds $; without ^, ends match
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {name: other for name, (other, _) in by_pattern.items() if other != r},
        "alpha_pattern": {name: _whole(other) for name, (_, other) in by_pattern.items() if other != alpha},
        "target_modules": targets,
        **({"target_parameters": sorted(weights.values())} if weights else {}),
        **({"ensure_weight_tying": True} if any(site.base.ties for site, *_ in layers.values()) else {}),
        "bias": "none",
        "fan_in_fan_out": any(site.base.transposed and not site.base.by_weight for site, *_ in layers.values()),
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        **fields,
    }


def _check_kept(root: nn.Module, layers: Layers, as_weights: Sequence[str], fields: Mapping[str, Any]) -> None:
    """Raises CheckpointError if PEFT would lose layers, or fail, as it reads a folder with these settings.

    as_weights  those of the paths that target_parameters names; PEFT adapts a weight by its name without its layer
    """
    moved = moved_keys(root, layers)
    moved = {path: goal for path, goal in moved.items() if path not in old_keys(root, moved)}
    packed = [path for path in as_weights if not layers[path][0].base.as_it_is_now().storage.is_dense]
    lacks = "DoRA" if fields["use_dora"] else "dropout" if fields["lora_dropout"] else None
    cure = "keep it as our file (lora_lite.save), merge it, leave these layers out (exclude_names)"
    like_experts = "it takes their names for fused experts', and has no"
    if moved:
        lost, goal = list(moved), next(iter(moved.values()))
        why = f"it reads their keys as an old checkpoint's: the first would go to {goal}"
    elif packed:
        lost, why = packed, f"{like_experts} adapter on a packed weight by its name"
    elif as_weights and lacks:
        lost, why = list(as_weights), f"{like_experts} {lacks} on a weight by its name"
        cure += ", or give rank= to write a plain LoRA"
    else:
        return
    raise CheckpointError(
        f"PEFT would lose {len(lost)} of these {len(layers)} layers as it reads the folder onto this "
        f"{type(root).__name__}\n  {brief(', '.join(lost), 600)}\n  {why}\n  {cure}"
    )


def _whole(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha  # 16, as PEFT writes it, and not 16.0


def _modules(root: nn.Module, layers: Sequence[str], inner: Sequence[str]) -> tuple[Any, Any]:
    """target_modules, and feedforward_modules, that PEFT resolves to exactly these layers.

    A list reaches what ends with one of its entries, a string is a regex for the full path. Last names, where they
    reach nothing else, are what most tools know best; then full paths; then a regex.
    """
    paths = [path for path, _ in root.named_modules()]
    for last in (True, False):
        names, inner_names = (sorted({p.rpartition(".")[2] if last else p for p in side}) for side in (layers, inner))
        ends = tuple(f".{name}" for name in names)
        reached = [path for path in paths if path in names or path.endswith(ends)]
        reached_inner = [path for path in layers if path.endswith(tuple(inner_names))]
        if set(reached) == set(layers) and set(reached_inner) == set(inner):
            return names, inner_names
    return "|".join(map(re.escape, layers)), "|".join(map(re.escape, inner)) if inner else []


def _theirs(root: nn.Module, layers: Layers, site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one layer by PEFT's keys, in its shapes."""
    names = forms.nested(site.module)
    others = [sites[0] for sites in layers.values() if sites[0].module is site.module and sites[0].prefix]
    on_module = sorted(others, key=lambda other: names.index(other.prefix))
    result = {forms.key_of(site, name, on_module): forms.theirs(site, name, tensor) for name, tensor in tensors.items()}
    return result | mirrored(root, site, tensors)


def _as_peft_reads(root: nn.Module, tensors: Mapping[str, Tensor], layers: Layers) -> dict[str, Tensor]:
    """The tensors by the keys that lead PEFT to their layers, where it would rename the layers' own."""
    olds = {f"{PREFIX}{path}.": f"{PREFIX}{old}." for path, old in old_keys(root, moved_keys(root, layers)).items()}
    starts = {key: next((start for start in olds if key.startswith(start)), "") for key in tensors}
    return {olds.get(start, "") + key.removeprefix(start): tensors[key] for key, start in starts.items()}


def _about(root: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """The settings that say what the adapter goes on."""
    kind = type(root)
    causal = kind.__name__.endswith("ForCausalLM")
    return {
        "base_model_name_or_path": adapter.base_record.name_or_path,
        "task_type": "CAUSAL_LM" if causal else None,
        "auto_mapping": None if causal else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "revision": None,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _write(folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Both files are whole on disk before either takes its place; the config, without which nothing loads, is last."""
    whole = {key: tensor.cpu().clone().contiguous() for key, tensor in tensors.items()}
    with replacing(folder / CONFIG) as config, replacing(folder / WEIGHTS) as weights:
        config.write((json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
        weights.write(to_bytes(whole, metadata={"format": "pt"}))
        (folder / CONFIG).unlink(missing_ok=True)  # the old config never lies beside the new weights
