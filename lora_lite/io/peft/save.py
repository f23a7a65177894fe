"""Adapters written as PEFT's folders: as they are where PEFT has them, else as a plain LoRA of what they change."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loguru import logger
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ...core.adapter import Adapter, get_adapter
from ...core.state import check_unmerged, session_of
from ...errors import CheckpointError
from ..factors import PLAIN, Factors, Layers, adapted_layers, check_cut, low_rank
from ..keys import PREFIX
from ..safetensors import check_numbers, replacing
from . import adalora, by_checkpoint, by_table, forms, ia3, lora, whole
from .beside import VARIANTS
from .conversion import moved_keys, old_keys
from .folder import CONFIG, MLX_WEIGHTS, WEIGHTS
from .formats import FORMATS
from .parts import Written, written_at

_WRITERS: dict[str, Callable[[nn.Module, Layers], Written]] = {  # by variant
    "lora": lora.written,
    "dora": lora.written,
    "eva": lora.written,
    "loftq": lora.written,
    "orthogonal": lora.written_orthogonal,
    "ia3": ia3.written,
    "ia3_ff": ia3.written,
    "adalora": adalora.written,
}


def save_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | Sequence[str] = "default",
    rank: int | None = None,
    max_error: float | None = None,
    energy: float | int | None = None,
    per_expert: bool = False,
) -> float | None:
    """Write a PEFT folder: LoRA and DoRA (with `per_layer`), ia3, ia3_ff, VeRA, AdaLoRA, norm, tokens as they are,
    tensors bit-equal; what full, norm, bias and tokens change as the new values that PEFT keeps (modules_to_save,
    bias=, trainable_token_indices).

    name        one adapter, or several that make one of PEFT's: an ia3 and an ia3_ff on other layers
    rank        write what adapters of any kind, at their scales, change in the weights as a plain LoRA of this rank
                at every layer (zeros where it has fewer directions), alpha = r: its SVD, in float32 at least. Exact
                where the change has that rank: LoRA's r, 2r of PiSSA and other starts, abliteration's own in the modes
                none and pre. The relative error ‖W' - W - B A‖/‖W' - W‖ is logged
    energy      in the place of a rank: at each layer the least one whose singular values hold this share of
                ‖W' - W‖², Frobenius, such as 0.95. The relative error is then √(1 - energy) at most
    max_error   refuse a layer with a greater one, before anything is written
    per_expert  write a LoRA by the names of the model's checkpoints, as servers want it: each fused expert by itself,
                and gate apart from up (experts.3.gate_proj). Tensors are bit-equal rows of the adapter's

    Returns the greatest relative error of a layer; None without a rank and an energy, where there is none.

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
    if (folder / MLX_WEIGHTS).exists():
        problem = f"{folder} is an MLX adapter ({MLX_WEIGHTS}), whose settings PEFT's would take the place of"
        raise CheckpointError(f"{problem}\n  name a new folder")
    check_cut(rank, energy, max_error)
    chosen = [get_adapter(model, one) for one in ([name] if isinstance(name, str) else name)]
    layers, worst = adapted_layers(model, chosen), None
    is_cut = rank is not None or energy is not None
    if is_cut or per_expert:
        _check_lacks(layers, is_plain=is_cut)
        factors, worst = low_rank(layers, rank, energy, max_error) if is_cut else (_own_factors(chosen, layers), None)
        fields = {"use_rslora": False, "lora_dropout": 0.0, "use_dora": False}
        write = by_checkpoint.written if per_expert else _plain
        tensors, settings = write(root, layers, factors, **fields)
    else:
        tensors, settings = _native(root, chosen, layers)
    floats = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}  # tables have no NaN
    check_numbers(floats, f"{' and '.join(adapter.name for adapter in chosen)} in memory", "nothing was written")
    if settings["peft_type"] == "LORA" and not per_expert:  # PEFT renames no other keys
        tensors = _as_peft_reads(root, tensors, layers)
    _write(folder, tensors, _about(root, chosen[0]) | settings)
    logger.info(f"saved {' and '.join(map(str, chosen))} to {folder} in PEFT's format ({settings['peft_type']})")
    return worst


def _check_lacks(layers: Layers, is_plain: bool = False) -> None:
    """Raises CheckpointError for a layer on which PEFT has no such adapter, or a plain LoRA can't be one."""
    for path, (site, *others) in layers.items():
        lack = forms.lacks(site, is_plain)
        if is_plain and any(each.positions is not None for each in (site, *others)):
            lack = "it acts at some positions of a sequence, which a plain LoRA can't say"
        if lack:
            cure = "keep it as our file (lora_lite.save)" + ", or merge it" * (not site.no_weight)
            raise CheckpointError(f"{path or 'the model itself'}: {lack}\n  {cure}")


def _native(root: nn.Module, chosen: Sequence[Adapter], layers: Layers) -> Written:
    """The adapters as they are. Raises CheckpointError for what PEFT hasn't."""
    _check_scales(chosen)
    known = [site for sites in layers.values() for site in sites]
    main: Layers = {}
    for site in known:
        if site.cfg.variant not in VARIANTS:
            main.setdefault(site.path, []).append(site)
    _check_lacks(main)
    methods = {id(site.method): site.cfg.variant for sites in main.values() for site in sites}
    are_ia3 = {*methods.values()} <= {"ia3", "ia3_ff"} and all(len(sites) == 1 for sites in main.values())
    writer = _writer(next(iter(methods.values()), ""))
    if methods and not ((len(methods) == 1 or are_ia3) and writer):
        raise CheckpointError(
            f"PEFT has no adapter like {', '.join(f'{a.name!r} ({a.variant})' for a in chosen)}\n"
            f"  give rank= to write what they change as a plain LoRA: 2r is exact for pissa and other "
            f"starts, its own rank for abliteration in the modes none and pre"
        )
    tensors, settings = writer(root, main) if writer else ({}, {})
    return whole.with_the_rest(root, tensors, settings, main, [s for s in known if s.cfg.variant in VARIANTS])


def is_written(variant: str) -> bool:
    """Has PEFT such a method, in whose format it is written as it is?"""
    return variant in VARIANTS or _writer(variant) is not None


def _writer(variant: str) -> Callable[[nn.Module, Layers], Written] | None:
    table = next((table for table in FORMATS if table.variant == variant), None)
    return _WRITERS.get(variant) if table is None else partial(by_table.written, table)


def _check_scales(chosen: Sequence[Adapter]) -> None:
    scaled = [adapter.name for adapter in chosen if adapter.scale != 1]
    if scaled:
        raise CheckpointError(
            f"{scaled[0]!r} has a scale, which PEFT can't hold\n  set it to 1, or give rank= to include it"
        )


def _own_factors(chosen: Sequence[Adapter], layers: Layers) -> dict[str, Factors]:
    """The factors of LoRAs as they are. Raises CheckpointError for a method that is more than two factors."""
    _check_scales(chosen)
    factors = {}
    for path, (site, *others) in layers.items():
        cfg: Any = site.cfg
        if others or cfg.variant not in PLAIN or set(site.specs) - {"lora_A", "lora_B"} or site.positions is not None:
            raise CheckpointError(
                f"{path}: per_expert is for one LoRA of two factors, and here is {cfg.variant!r}\n"
                f"  give rank= to write what it changes as a plain LoRA"
            )
        a, b = (site.tensor(name).detach() for name in ("lora_A", "lora_B"))
        factors[path] = Factors(a, b, float(cfg.scaling * cfg.r))  # servers don't know rsLoRA's scaling of experts
    return factors


def _plain(root: nn.Module, layers: Layers, factors: Mapping[str, Factors], **fields: Any) -> Written:
    tensors: dict[str, Tensor] = {}
    for path, (site, *_) in layers.items():
        tensors |= written_at(root, layers, site, {"lora_A": factors[path].a, "lora_B": factors[path].b})
    ranks = {path: (pair.rank, pair.alpha) for path, pair in factors.items()}
    return tensors, lora.settings_of(root, layers, ranks, **fields)


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
