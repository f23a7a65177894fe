"""How two adapters on disk differ, layer by layer: in their tensors, and in what they do to the weights."""

import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.config import BaseConfig
from ..io.keys import core
from .norms import delta
from .report import Progress, counted, grouped
from .stored import StoredAdapter, StoredLayer, read_adapter

ABSENT = "-"
"""In place of a config field that the method doesn't have."""


@dataclass(frozen=True)
class GroupDifference:
    """Layers of both adapters that differ in the block index only."""

    path: str
    layers: int
    tensors: float | None
    """‖a - b‖ / ‖a‖ over all tensors; None if methods or shapes aren't the same."""
    delta: float | None
    """‖ΔA - ΔB‖ / ‖ΔA‖ of ΔW = W' - W; None where that depends on the base."""
    cosine: float | None
    """Of ΔA and ΔB; None also where one of them is zero."""


@dataclass(frozen=True)
class Difference:
    """How two adapters differ."""

    a: Path
    b: Path
    config: dict[str, tuple[Any, Any]]
    """Scale and config fields that aren't the same, by name; "r at 3 layers" where others have the same."""
    base: dict[str, tuple[Any, Any]]
    """What both say of their base, and say differently."""
    only_a: list[str]
    only_b: list[str]
    """Paths of layers."""
    groups: list[GroupDifference]

    @property
    def equal(self) -> bool:
        """Is it one adapter, to the last bit of its tensors?"""
        same = all(group.tensors == 0 for group in self.groups)
        return same and not (self.config or self.base or self.only_a or self.only_b)


@dataclass(frozen=True)
class Sums:
    """Of two vectors: |a|², |b|², a·b, |a - b|²."""

    a: float = 0.0
    b: float = 0.0
    ab: float = 0.0
    d: float = 0.0

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> "Sums":
        """Of vectors that come in parts."""
        return sum((cls._part(a.double(), b.double()) for a, b in pairs), cls())

    @classmethod
    def _part(cls, a: Tensor, b: Tensor) -> "Sums":
        return cls(*(float(term.sum()) for term in (a.square(), b.square(), a * b, (a - b).square())))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.a + other.a, self.b + other.b, self.ab + other.ab, self.d + other.d)

    @property
    def difference(self) -> float:
        """‖a - b‖ / ‖a‖."""
        return math.sqrt(self.d / self.a) if self.a else (math.inf if self.d else 0.0)

    @property
    def cosine(self) -> float | None:
        """None where one of them is zero."""
        return self.ab / math.sqrt(self.a * self.b) if self.a and self.b else None


@dataclass(frozen=True)
class LayerDifference:
    """One layer of both adapters."""

    path: str
    tensors: Sums | None
    """None if methods or shapes aren't the same."""
    delta: Sums | None
    """Of ΔW = W' - W; None where that depends on the base."""


def compare(a: str | os.PathLike[str], b: str | os.PathLike[str], progress: Progress | None = None) -> Difference:
    """Two adapters side by side, layers matched by their paths without what wrappers add.

    Raises what `inspect` raises, and CheckpointError for tensors without a config.
    """
    first, second = read_adapter(a), read_adapter(b)
    of_a, of_b = _by_core(first.layers), _by_core(second.layers)
    pairs = {layer.target.path: (layer, of_b[at]) for at, layer in of_a.items() if at in of_b}
    compared = [_compared(path, *pair) for path, pair in counted(pairs, progress)]
    return Difference(
        first.path,
        second.path,
        _config(first, second, pairs.values()),
        _base(first, second),
        [layer.target.path for at, layer in of_a.items() if at not in of_b],
        [layer.target.path for at, layer in of_b.items() if at not in of_a],
        [_group(path, members) for path, members in grouped(compared).items()],
    )


def _by_core(layers: Mapping[str, StoredLayer]) -> dict[str, StoredLayer]:
    bare = {core(path): layer for path, layer in layers.items()}
    return bare if len(bare) == len(layers) else dict(layers)


def _compared(path: str, a: StoredLayer, b: StoredLayer) -> LayerDifference:
    common = a.tensors.keys() & b.tensors.keys()  # a PEFT folder lacks what the base gives
    alike = a.cfg.variant == b.cfg.variant and all(a.tensors[name].shape == b.tensors[name].shape for name in common)
    tensors = Sums.of((a.tensors[name], b.tensors[name]) for name in sorted(common)) if alike else None
    fits = (a.target.d_in, a.target.d_out) == (b.target.d_in, b.target.d_out)
    blocks_a, blocks_b = (delta(a), delta(b)) if fits else (None, None)
    if blocks_a is None or blocks_b is None:
        return LayerDifference(path, tensors, None)
    return LayerDifference(path, tensors, Sums.of(zip(blocks_a, blocks_b, strict=True)))


def _group(path: str, layers: list[LayerDifference]) -> GroupDifference:
    tensors, deltas = _total([layer.tensors for layer in layers]), _total([layer.delta for layer in layers])
    return GroupDifference(
        path,
        len(layers),
        None if tensors is None else tensors.difference,
        None if deltas is None else deltas.difference,
        None if deltas is None else deltas.cosine,
    )


def _total(parts: list[Sums | None]) -> Sums | None:
    """None if a part is."""
    known = [part for part in parts if part is not None]
    return sum(known, Sums()) if len(known) == len(parts) else None


def _config(
    a: StoredAdapter, b: StoredAdapter, pairs: Collection[tuple[StoredLayer, StoredLayer]]
) -> dict[str, tuple[Any, Any]]:
    """Scale and fields that differ, at all layers or some; which layers were asked for between files of one format."""
    filters = BaseConfig.FILTERS if a.format == b.format else ()
    asked = [{field: each.cfg.to_dict()[field] for field in filters} | {"scale": each.scale} for each in (a, b)]
    out = {field: (asked[0][field], asked[1][field]) for field in asked[0] if asked[0][field] != asked[1][field]}
    found: dict[str, list[tuple[Any, Any]]] = {}
    for first, second in [(x.cfg, y.cfg) for x, y in pairs] or [(a.cfg, b.cfg)]:
        values = [cfg.to_dict() for cfg in (first, second)]
        for field in dict.fromkeys((*values[0], *values[1])):
            of_a, of_b = (each.get(field, ABSENT) for each in values)
            if of_a != of_b and field not in (*BaseConfig.FILTERS, "per_layer"):
                found.setdefault(f"{field}\0{of_a}\0{of_b}", []).append((of_a, of_b))
    for key, members in found.items():
        field = key.partition("\0")[0]
        out[field if len(members) >= len(pairs) else f"{field} at {len(members)} layers"] = members[0]
    return out


def _base(a: StoredAdapter, b: StoredAdapter) -> dict[str, tuple[Any, Any]]:
    """What both record of their base, and record differently; of the weights themselves, how many layers do."""
    said = [{key: value for key, value in each.base.items() if value or key == "quantization"} for each in (a, b)]
    both = said[0].keys() & said[1].keys() - {"fingerprint"}
    out = {key: (said[0][key], said[1][key]) for key in said[0] if key in both and said[0][key] != said[1][key]}
    first, second = ({core(at): seen for at, seen in each.base.get("fingerprint", {}).items()} for each in (a, b))
    shared = first.keys() & second.keys()
    other = sum(first[at] != second[at] for at in shared)
    return out | ({"weights": (f"{len(shared)} layers", f"{other} of them differ")} if other else {})
