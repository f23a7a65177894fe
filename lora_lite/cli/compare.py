"""Two adapters on disk compared layer by layer: their tensors, and what they do to the weights."""

import math
import os
from collections import defaultdict
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
    """The cosine of ΔA and ΔB; None also where one of them is zero."""


@dataclass(frozen=True)
class Difference:
    """How two adapters differ."""

    a: Path
    b: Path
    config: dict[str, tuple[Any, Any]]
    """Scale and config fields that aren't the same, by name; "r at 3 layers" where others have the same."""
    base: dict[str, tuple[Any, Any]]
    """Fields of the base that both record, and record differently."""
    only_a: list[str]
    only_b: list[str]
    """Paths of layers."""
    groups: list[GroupDifference]

    @property
    def equal(self) -> bool:
        """True for one adapter twice, to the last bit of its tensors."""
        same = all(group.tensors == 0 for group in self.groups)
        return same and not (self.config or self.base or self.only_a or self.only_b)


@dataclass(frozen=True)
class Sums:
    """Sums over two vectors: |a|², |b|², a·b, |a - b|²."""

    a: float = 0.0
    b: float = 0.0
    ab: float = 0.0
    d: float = 0.0

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> "Sums":
        """The sums of vectors that come in parts."""
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


def compare(a: str | os.PathLike[str], b: str | os.PathLike[str], progress: Progress | None = None) -> Difference:
    """Compare two adapters, layers matched by their paths without what wrappers add.

    Raises:
        CheckpointError: for tensors without a config; and what `inspect` raises.
    """
    first, second = read_adapter(a), read_adapter(b)
    layers_a, layers_b = _by_core(first.layers), _by_core(second.layers)
    pairs = {layer.target.path: (layer, layers_b[path]) for path, layer in layers_a.items() if path in layers_b}
    compared = {path: _compared(*pair) for path, pair in counted(pairs, progress)}
    return Difference(
        first.path,
        second.path,
        _config(first, second, pairs.values()),
        _base(first, second),
        [layer.target.path for path, layer in layers_a.items() if path not in layers_b],
        [layer.target.path for path, layer in layers_b.items() if path not in layers_a],
        [_group(path, sums) for path, sums in grouped(compared).items()],
    )


def _by_core(layers: Mapping[str, StoredLayer]) -> dict[str, StoredLayer]:
    bare = {core(path): layer for path, layer in layers.items()}
    return bare if len(bare) == len(layers) else dict(layers)


def _compared(a: StoredLayer, b: StoredLayer) -> tuple[Sums | None, Sums | None]:
    """The sums of a layer's tensors, and those of ΔW; None as in GroupDifference."""
    common = a.tensors.keys() & b.tensors.keys()  # a PEFT folder lacks what the base gives
    alike = a.cfg.variant == b.cfg.variant and all(a.tensors[name].shape == b.tensors[name].shape for name in common)
    tensors = Sums.of((a.tensors[name], b.tensors[name]) for name in sorted(common)) if alike else None
    fits = (a.target.d_in, a.target.d_out) == (b.target.d_in, b.target.d_out)
    blocks_a, blocks_b = (delta(a), delta(b)) if fits else (None, None)
    if blocks_a is None or blocks_b is None:
        return tensors, None
    return tensors, Sums.of(zip(blocks_a, blocks_b, strict=True))


def _group(path: str, layers: list[tuple[Sums | None, Sums | None]]) -> GroupDifference:
    tensors, deltas = map(_total, zip(*layers, strict=True))
    tensors_differ = None if tensors is None else tensors.difference
    if deltas is None:
        return GroupDifference(path, len(layers), tensors_differ, None, None)
    return GroupDifference(path, len(layers), tensors_differ, deltas.difference, deltas.cosine)


def _total(parts: Collection[Sums | None]) -> Sums | None:
    """The sum of the parts; None if one of them is."""
    known = [part for part in parts if part is not None]
    return sum(known, Sums()) if len(known) == len(parts) else None


def _config(
    a: StoredAdapter, b: StoredAdapter, pairs: Collection[tuple[StoredLayer, StoredLayer]]
) -> dict[str, tuple[Any, Any]]:
    """Scale and fields that differ, at all layers or some; which layers were asked for between files of one format."""
    filters = BaseConfig.FILTERS if a.format == b.format else ()
    of_a, of_b = ({name: side.cfg.to_dict()[name] for name in filters} | {"scale": side.scale} for side in (a, b))
    out = {name: (of_a[name], of_b[name]) for name in of_a if of_a[name] != of_b[name]}
    differing: dict[tuple[str, str], list[tuple[Any, Any]]] = defaultdict(list)
    for cfg_a, cfg_b in [(x.cfg, y.cfg) for x, y in pairs] or [(a.cfg, b.cfg)]:
        fields_a, fields_b = cfg_a.to_dict(), cfg_b.to_dict()
        for name in fields_a | fields_b:
            values = fields_a.get(name, ABSENT), fields_b.get(name, ABSENT)
            if values[0] != values[1] and name not in (*BaseConfig.FILTERS, "per_layer"):
                differing[name, str(values)].append(values)  # as text, since a list can be no key
    for (name, _), layers in differing.items():
        out[name if len(layers) >= len(pairs) else f"{name} at {len(layers)} layers"] = layers[0]
    return out


def _base(a: StoredAdapter, b: StoredAdapter) -> dict[str, tuple[Any, Any]]:
    """Fields that both record of their base, and record differently; of the weights themselves, how many layers do."""
    of_a, of_b = (  # an empty name says nothing, and quantization=None says that the base was dense
        {name: value for name, value in side.base_fields().items() if value or name == "quantization"}
        for side in (a, b)
    )
    out = {name: (of_a[name], of_b[name]) for name in of_a if name in of_b and of_a[name] != of_b[name]}
    if a.base is not None and b.base is not None:
        weights_a, weights_b = ({core(path): f for path, f in base.fingerprint.items()} for base in (a.base, b.base))
        shared = weights_a.keys() & weights_b.keys()
        if others := sum(weights_a[path] != weights_b[path] for path in shared):
            out["weights"] = f"{len(shared)} layers", f"{others} of them differ"
    return out
