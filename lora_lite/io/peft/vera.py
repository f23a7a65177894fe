"""PEFT's VeRA. What all layers share is `base_model.vera_A` (r, widest input) and `vera_B` (widest output, r).

With save_projection=false neither is in the file, and both are drawn from projection_prng_key: A first, then B, each
uniform, in float32, of the sizes of the largest target. So are ours.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...base.layer import BaseLayer
from ...core.names import check_shapes, file_key
from ...core.shared import PLACE
from ...core.targets import Target
from . import forms
from .folder import PeftFolder, flag_of, number_of, whole_of
from .parts import Layers, Part, Written, config_of, names_of, same_everywhere, written_at

_THEIRS = {"A": "base_model.vera_A", "B": "base_model.vera_B"}


def parts(source: PeftFolder, targets: dict[str, Target], layers: Mapping[str, BaseLayer]) -> list[Part]:
    """One part. Without a model the shared tensors' sizes are as the file has them: no tensor tells a layer's input."""
    if others := [path for path, layer in layers.items() if not forms.is_plain_linear(layer)]:
        raise source.error(f"{others[0]}: PEFT has no VeRA on it")
    r, is_saved = whole_of(source, "r", 256), flag_of(source, "save_projection", default=True)
    specs: dict[str, tuple[int, ...]] = {}
    for path, target in targets.items():
        specs |= {file_key(path, "lora_d"): (r,), file_key(path, "lora_b"): (target.d_out,)}
    if is_saved:
        d_in, d_out = (max(getattr(target, side) for target in targets.values()) for side in ("d_in", "d_out"))
        if not layers and (in_file := source.entries.get(file_key(PLACE, "A"))) is not None:
            d_in = (*in_file.shape, 0, 0)[1]
        specs |= {file_key(PLACE, "A"): (r, d_in), file_key(PLACE, "B"): (d_out, r)}
    check_shapes(source.entries, specs, str(source.header.path))
    fields: dict[str, Any] = {
        "r": r,
        "seed": whole_of(source, "projection_prng_key", 0),
        "save_projection": is_saved,
        "d_initial": number_of(source, "d_initial", source.settings.get("d_initial", 0.1)),
        "dropout": number_of(source, "vera_dropout", source.settings.get("vera_dropout", 0)),
    }
    # What is drawn again is so in float32, and rounded to the config's dtype.
    return [Part(config_of(source, "vera", targets, layers, {}, reads=not is_saved, **fields), targets, {})]


def written(root: nn.Module, layers: Layers) -> Written:
    """A vera as it is. A and B in 16 bits are written, as PEFT would draw others."""
    tensors: dict[str, Tensor] = {}
    for (site,) in layers.values():
        values = {name: site.tensor(name).detach() for name in site.specs}
        tensors |= written_at(root, layers, site, values)
    (site, *_), shared = next(iter(layers.values())), site.method.shared
    (dropout,), cfg = same_everywhere(layers, "dropout"), site.cfg
    is_saved = cfg.save_projection or torch.promote_types(cfg.dtype, torch.float32) != cfg.dtype
    tensors |= {key: shared.tensor(name) for name, key in _THEIRS.items()} if is_saved and shared else {}
    targets, _ = names_of(root, list(layers), [])
    return tensors, {
        "peft_type": "VERA",
        "r": cfg.r,
        "projection_prng_key": cfg.seed,
        "save_projection": is_saved,
        "d_initial": cfg.d_initial,
        "vera_dropout": dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": any(sites[0].base.transposed for sites in layers.values()),
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
