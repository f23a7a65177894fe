"""The tables of PEFT's Uni-LoRA, which its folders leave out by default: drawn once more, as PEFT does at load.

All entries of all layers' A and B, in the order of the model's modules, get the indices 0 ... D - 1 about equally
often, in the order of NumPy's generator. So the layers have to be known: those that target_modules names in the model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...base.layer import BaseLayer, find_layers
from ...core.validate import is_safe_regex
from ...errors import brief
from ..keys import PREFIX
from ..safetensors import Entry, Header
from .settings import flag_of, whole_of

if TYPE_CHECKING:
    from .folder import PeftFolder

MOST_INDICES = 1 << 28
"""Numbers that a folder's settings may ask to be drawn."""


@dataclass(frozen=True)
class _WithTables(Header):
    """A file with tensors that aren't in it."""

    tables: Mapping[str, Tensor] = field(default_factory=dict)

    def read(self, keys: Any = None) -> dict[str, Tensor]:
        keys = list(self.entries if keys is None else keys)
        stored = super().read([key for key in keys if key not in self.tables])
        return {key: self.tables[key] if key in self.tables else stored[key] for key in keys}


def with_tables(source: "PeftFolder", modules: Mapping[str, nn.Module]) -> Header:
    """The file of a folder as PEFT writes it with save_indices=True. Raises CheckpointError."""
    if source.settings.get("peft_type") != "UNILORA" or flag_of(source, "save_indices") or not modules:
        return source.header
    layers = _layers(source, modules)
    r, length = whole_of(source, "r", 4), whole_of(source, "theta_d_length", 256)
    sizes = {path: ((r, layer.d_in), (layer.d_out, r)) for path, layer in layers.items()}
    total = sum(a[0] * a[1] + b[0] * b[1] for a, b in sizes.values())
    theta = source.header.entries.get("base_model.unilora_theta_d")
    if not 0 < total <= MOST_INDICES or theta is None or tuple(theta.shape) != (length,) or not length:
        problem = f"r={r}, theta_d_length={length}: wanted at most {MOST_INDICES:,} indices, one or more, of its theta"
        raise source.error(f"{problem}\n  save the adapter again")
    indices = _drawn(total, length, whole_of(source, "proj_seed", 42))  # (total,)
    scales = indices.bincount(minlength=length).clamp_min(1).float().rsqrt()  # (D,)
    tables: dict[str, Tensor] = {}
    entries, start = dict(source.header.entries), 0
    for path, shapes in sizes.items():
        dtype = layers[path].stored.dtype  # PEFT rounds them to a 16-bit base's
        of_layer = scales.to(dtype).float() if dtype.is_floating_point else scales
        for name, shape in zip("AB", shapes, strict=True):
            table = indices[start : start + shape[0] * shape[1]].view(shape)
            key, start = f"{PREFIX}{path}.unilora_{{}}_{name}", start + table.numel()
            tables |= {key.format("indices"): table, key.format("scales"): of_layer[table]}
    entries |= {k: Entry("F32" if t.is_floating_point() else "I64", tuple(t.shape), 0, 0) for k, t in tables.items()}
    return _WithTables(source.header.path, entries, source.header.metadata, source.header.start, tables)


def _layers(source: "PeftFolder", modules: Mapping[str, nn.Module]) -> dict[str, BaseLayer]:
    """The layers that target_modules names, in the model's order. Raises CheckpointError."""
    names, cure = source.settings.get("target_modules"), "save it once more with save_indices=True"
    for setting in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if value := source.settings.get(setting):
            raise source.error(f"{setting}={brief(value, 60)} with indices that the file leaves out\n  {cure}")
    if isinstance(names, str) and not is_safe_regex(names):
        raise source.error(f"target_modules={brief(names, 60)} is a regex that may take long\n  {cure}")
    if isinstance(names, str):
        paths = [path for path in modules if re.fullmatch(names, path)]
    elif isinstance(names, list) and all(isinstance(name, str) and name for name in names):
        ends = tuple(f".{name}" for name in names)
        paths = [path for path in modules if path in names or path.endswith(ends)]
    else:
        raise source.error(f"target_modules={brief(repr(names), 60)}: wanted names, or a regex")
    known = find_layers(modules)
    return {path: known[path] for path in paths if path in known and not source.is_saved(path)}


def _drawn(total: int, length: int, seed: int) -> Tensor:
    """The indices of all entries: each as often, the rest of them without repetition, in a random order."""
    generator = np.random.default_rng(seed)
    indices = np.repeat(np.arange(length), total // length)
    if rest := total % length:
        indices = np.concatenate([indices, generator.choice(length, size=rest, replace=False)])
    generator.shuffle(indices)
    return torch.from_numpy(indices).long()
