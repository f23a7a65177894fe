"""Adapters on disk combined into one file, without their base where none is needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compose.combine import combine as combine_attached
from ..core.targets import Target
from ..errors import ConfigError
from ..io.checkpoint import load, load_onto_stand_in, save
from .bases import open_base
from .norms import is_free
from .stored import OURS, StoredAdapter, read_adapter

INTO = "combined"


def combine(parts: Sequence[str], out: Path, base_dir: Path | None = None, **how: Any) -> str:
    """Write the weighted sum of adapters as an adapter file; `parts` are texts like "a.safetensors=-0.5".

    how         the keyword arguments of `lora_lite.combine`

    Returns what was written, as a line or two for a person.

    Raises:
        ConfigError: for a part without a weight, an `out` that exists, and without a base for an adapter that needs it.
        CheckpointError: for tensors without a config; and what load_base, load, load_peft, combine and save raise.
    """
    pairs = [_pair(part) for part in parts]
    if out.exists():
        raise ConfigError(f"{out} exists\n  name a new place, or remove it")
    adapters = [read_adapter(path) for path, _ in pairs]
    weights = {f"part{number}": weight for number, (_, weight) in enumerate(pairs, 1)}
    if base_dir is None:
        model = _stand_in(adapters)
        for name, adapter in zip(weights, adapters, strict=True):
            load_onto_stand_in(model, adapter.path, name)
    else:
        model = open_base(base_dir, *(adapter.record for adapter in adapters))
        for name, adapter in zip(weights, adapters, strict=True):
            load(model, adapter.path, name=name)
    combined = combine_attached(model, weights, INTO, **how)
    save(model, out, INTO)
    return f"{out}: {OURS}, {combined}"


def _pair(part: str) -> tuple[Path, float]:
    path, equals, weight = part.rpartition("=")
    try:
        return Path(path), float(weight) if equals and path else float("")
    except ValueError:
        raise ConfigError(f"{part!r}: wanted an adapter and its weight, such as a.safetensors=1.0") from None


def _stand_in(adapters: Sequence[StoredAdapter]) -> nn.Module:
    """Modules with the paths and sizes of the adapters' layers. Raises ConfigError for an adapter that needs more."""
    targets: dict[str, Target] = {}
    for adapter in adapters:
        _check_needs_no_base(adapter)
        targets |= {layer.target.path: layer.target for layer in adapter.layers.values()}
    root = nn.Module()
    for path, target in targets.items():
        *parents, name = path.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        layer = nn.Linear(target.d_in, target.d_out, target.has_bias, device="meta").to_empty(device="cpu")
        # Zeros: the weight's take no memory, as each change was found to be the same for any weight; of a bias, which
        # shifts are told from, they are read.
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        layer.weight = nn.Parameter(torch.zeros(()).expand(target.d_out, target.d_in), requires_grad=False)
        module.add_module(name, layer)
    return root


def _check_needs_no_base(adapter: StoredAdapter) -> None:
    others = {kind for cfg in adapter.configs for kind in cfg.kinds} - {"linear", "conv", "embedding"}
    tied = any(cfg.tied_weights != "apart" for cfg in adapter.configs)
    for path, layer in adapter.layers.items():
        is_plain = not (layer.target.experts or layer.target.is_diagonal or others or tied)
        if adapter.format != OURS or not is_plain or not is_free(layer):
            what = f"{layer.cfg.variant!r} at {path}" if adapter.format == OURS else "a PEFT folder"
            raise ConfigError(f"{adapter.path}: {what} can't be combined without the base\n  give --base FOLDER")
