"""PEFT's AdaLoRA: `lora_A` (r, i), `lora_B` (o, r) and `lora_E` (r, 1), in keys without ".weight", on convolutions too.

s = lora_alpha / (init_r + 1e-5) whatever is left of a layer's ranks, which rank_pattern tells as a list of init_r
booleans. A layer that lost all of them is one rank of zeros here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...base.layer import BaseLayer
from ...core.names import check_shapes, file_key
from ...core.state import Tensors
from ...core.targets import Target
from ...errors import brief
from ..factors import Layers
from ..keys import PREFIX
from .folder import PeftFolder
from .kinds import takes_adalora
from .parts import Part, Written, as_stored, config_of, names_of, same_everywhere
from .settings import number_of, whole_of

_DEFAULTS: dict[str, Any] = {"init_r": 12, "target_r": 8, "tinit": 0, "tfinal": 0, "deltaT": 1}
_NUMBERS = {"beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5}


def parts(source: PeftFolder, targets: dict[str, Target], layers: Mapping[str, BaseLayer]) -> list[Part]:
    """One part."""
    if others := [path for path, layer in layers.items() if not takes_adalora(layer)]:
        raise source.error(f"{others[0]}: PEFT has no AdaLoRA on it")
    settings, entries = source.settings, source.entries
    fields: dict[str, Any] = {name: whole_of(source, name, value) for name, value in _DEFAULTS.items()}
    fields |= {name: number_of(source, name, settings.get(name, value)) for name, value in _NUMBERS.items()}
    fields |= {"total_step": None if settings.get("total_step") is None else whole_of(source, "total_step", 0)}
    fields |= {"alpha": number_of(source, "lora_alpha", settings.get("lora_alpha", 8))}
    fields |= {"dropout": number_of(source, "lora_dropout", settings.get("lora_dropout", 0))}
    start, patterns = fields["init_r"], settings.get("rank_pattern") or {}
    specs: dict[str, tuple[int, ...]] = {}
    ranks: dict[str, int] = {}  # by the path in the model
    for path, target in targets.items():
        entry = entries.get(file_key(path, "lora_E"))
        r = (*(() if entry is None else entry.shape), 0)[0]
        mask = patterns.get(f"{path}.lora_E", [True] * start) if isinstance(patterns, dict) else None
        if not isinstance(mask, list) or not all(type(on) is bool for on in mask) or sum(mask) != r:
            raise source.error(f"{path} has tensors of rank {r}, and init_r={start}, rank_pattern={brief(mask, 80)}")
        specs |= {file_key(path, "lora_A"): (r, target.d_in), file_key(path, "lora_B"): (target.d_out, r)}
        specs |= {file_key(path, "lora_E"): (r, 1)}
        ranks[target.path] = max(r, 1)
    check_shapes(entries, specs, str(source.header.path))
    overrides = {path: {"r": r} for path, r in ranks.items() if r != start}

    def values(stored: Tensors, path: str, layer: BaseLayer | None, base: BaseLayer | None) -> dict[str, Tensor]:
        tensors = as_stored(stored, path)
        if len(tensors["lora_E"]):
            return tensors
        a, b, e = (tensors[f"lora_{name}"] for name in "ABE")
        return {"lora_A": a.new_zeros(1, a.shape[1]), "lora_B": b.new_zeros(len(b), 1), "lora_E": e.new_zeros(1, 1)}

    cfg = config_of(source, "adalora", targets, layers, overrides, reads=False, **fields)
    return [Part(cfg, targets, overrides, values)]


def written(root: nn.Module, layers: Layers) -> Written:
    """An adalora as it is, with the ranks that its layers have left."""
    tensors: dict[str, Tensor] = {}
    masks: dict[str, list[bool]] = {}
    names = (*_DEFAULTS, *_NUMBERS, "total_step", "alpha", "dropout")
    fields = dict(zip(names, same_everywhere(layers, *names), strict=True))
    for path, (site,) in layers.items():
        values = {name: site.tensor(name).detach() for name in ("lora_A", "lora_B", "lora_E")}
        if not any(map(torch.any, values.values())):  # no rank is left: PEFT has tensors of none then
            values = {"lora_A": values["lora_A"][:0], "lora_B": values["lora_B"][:, :0], "lora_E": values["lora_E"][:0]}
        r = len(values["lora_E"])
        masks[f"{path}.lora_E"] = [True] * r + [False] * (fields["init_r"] - r)
        tensors |= {f"{PREFIX}{path}.{name}": value for name, value in values.items()}
    targets, _ = names_of(root, list(layers), [])
    alpha, dropout = fields.pop("alpha"), fields.pop("dropout")
    fields["total_step"] = (
        fields["total_step"] or fields["tinit"] + fields["tfinal"] + 1
    )  # PEFT takes no adapter without
    return tensors, {
        **fields,
        "peft_type": "ADALORA",
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "rank_pattern": masks if any(not all(mask) for mask in masks.values()) else None,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": any(sites[0].base.transposed for sites in layers.values()),
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
