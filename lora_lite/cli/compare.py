"""Two adapters on disk compared layer by layer: their tensors, and what they do to the weights."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..io.keys import core
from .norms import delta
from .report import Track, grouped
from .stored import StoredAdapter, StoredLayer, read_adapter

Pairs = dict[str, tuple[Any, Any]]  # name of a field -> its values in A and in B


@dataclass(frozen=True)
class GroupDifference:
    """Layers of both adapters that differ in the block index only."""

    path: str
    layers: int
    tensors: float | None  # ‖a - b‖ / ‖a‖ over all of them; None unless methods and shapes are the same
    delta: float | None  # ‖ΔA - ΔB‖ / ‖ΔA‖ of ΔW = W' - W; None where that depends on the base
    cosine: float | None  # of ΔA and ΔB; None also where one of them is zero


@dataclass(frozen=True)
class Difference:
    """How two adapters differ."""

    config: Pairs  # scale and config fields; "r at 3 layers" where others have the same
    base: Pairs  # fields of the base that both record, and record differently
    only_a: list[str]  # paths of layers
    only_b: list[str]
    groups: list[GroupDifference]

    @property
    def equal(self) -> bool:
        """True for one adapter twice, to the last bit of its tensors."""
        same = all(group.tensors == 0 for group in self.groups)
        return same and not (self.config or self.base or self.only_a or self.only_b)


def compare(a: Path, b: Path, track: Track = iter) -> Difference:
    """Compare two adapters, layers matched by their paths without what wrappers add.

    Raises:
        CheckpointError: for tensors without a config; and what `inspect` raises.
    """
    first, second = read_adapter(a), read_adapter(b)
    layers_a, layers_b = _by_core(first.layers), _by_core(second.layers)
    pairs = {label: (layer, layers_b[key][1]) for key, (label, layer) in layers_a.items() if key in layers_b}
    sums = {path: _compared(*pair) for path, pair in track(pairs.items())}
    return Difference(
        _config(first, second, pairs.values()),
        _base(first, second),
        [label for key, (label, _) in layers_a.items() if key not in layers_b],
        [label for key, (label, _) in layers_b.items() if key not in layers_a],
        [_group(path, members) for path, members in grouped(sums).items()],
    )


def _by_core(layers: Mapping[str, StoredLayer]) -> dict[str, tuple[str, StoredLayer]]:
    """Each layer with its label, `q_proj (2)` of a second method there, by the label without what wrappers add."""
    bare = {core(label): (label, layer) for label, layer in layers.items()}
    whole = {label: (label, layer) for label, layer in layers.items()}
    return bare if len(bare) == len(layers) else whole  # two paths that differ in a prefix alone stay two


def _compared(a: StoredLayer, b: StoredLayer) -> Float[Tensor, "2 4"]:
    """The sums over a layer's tensors, and those over ΔW."""
    common = a.tensors.keys() & b.tensors.keys()  # a PEFT folder lacks what the base gives
    alike = (
        bool(common)
        and a.cfg.variant == b.cfg.variant
        and all(a.tensors[name].shape == b.tensors[name].shape for name in common)
    )
    fits = (a.target.d_in, a.target.d_out) == (b.target.d_in, b.target.d_out)
    delta_a, delta_b = (delta(a), delta(b)) if fits else (None, None)
    tensors = ((a.tensors[name], b.tensors[name]) for name in sorted(common)) if alike else None
    deltas = None if delta_a is None or delta_b is None else zip(delta_a, delta_b, strict=True)
    return torch.stack([_sums(tensors), _sums(deltas)])


def _sums(pairs: Iterable[tuple[Tensor, Tensor]] | None) -> Float[Tensor, "4"]:
    """|a|², |b|², a·b, |a - b|² of two vectors that come in parts; NaN where they can't be compared."""
    sums = torch.full((4,), math.nan if pairs is None else 0.0, dtype=torch.float64)
    for a, b in ((a.double(), b.double()) for a, b in pairs or ()):
        sums += torch.stack([term.sum() for term in (a * a, b * b, a * b, (a - b).square())])
    return sums


def _group(path: str, layers: list[Tensor]) -> GroupDifference:
    a, b, ab, d = torch.stack(layers).sum(0).unbind(-1)  # each (2,), of tensors and of ΔW: a NaN of one layer stays
    relative = torch.where(d == 0, d, d / a).sqrt()  # two zeros are equal
    cosine = ab / (a.sqrt() * b.sqrt())  # 0 / 0 is NaN, too
    figures = (*relative.tolist(), float(cosine[1]))
    return GroupDifference(path, len(layers), *(None if math.isnan(figure) else figure for figure in figures))


def _differing(a: Mapping[str, Any], b: Mapping[str, Any], names: Iterable[str]) -> Pairs:
    values = {name: (a.get(name, "-"), b.get(name, "-")) for name in names}  # "-": the method has no such field
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


def _config(a: StoredAdapter, b: StoredAdapter, pairs: Collection[tuple[StoredLayer, StoredLayer]]) -> Pairs:
    """Scale and fields that differ, at all layers or some."""
    filters = BaseConfig.FILTERS if a.format == b.format else ()  # PEFT's regexes are never ours
    methods_a, methods_b = ({"methods": [cfg.variant for cfg in side.configs], "scale": side.scale} for side in (a, b))
    out = _differing(methods_a, methods_b, ["scale", *(["methods"] if len(a.configs) != len(b.configs) else [])])
    # What one side alone has is told by "methods".
    for number, (one, other) in enumerate(zip(a.configs, b.configs, strict=False), 1):
        prefix = "" if len(a.configs) == len(b.configs) == 1 else f"{number} {one.variant} "
        differing_filters = _differing(one.to_dict(), other.to_dict(), filters)
        out |= {f"{prefix}{name}": values for name, values in differing_filters.items()}
    differing: dict[tuple[str, str], list[tuple[Any, Any]]] = defaultdict(list)
    # Without a layer that both have, their configs in order; of more on one side "methods" tells, as above.
    for cfg_a, cfg_b in [(x.cfg, y.cfg) for x, y in pairs] or zip(a.configs, b.configs, strict=False):
        fields_a, fields_b = cfg_a.to_dict(), cfg_b.to_dict()
        names = [name for name in fields_a | fields_b if name not in (*BaseConfig.FILTERS, "per_layer")]
        for name, values in _differing(fields_a, fields_b, names).items():
            differing[name, str(values)].append(values)  # as text, since a list can be no key
    for (name, _), layers in differing.items():
        out[name if len(layers) >= len(pairs) else f"{name} at {len(layers)} layers"] = layers[0]
    return out


def _base(a: StoredAdapter, b: StoredAdapter) -> Pairs:
    """Fields that both record of their base, and record differently; of the weights themselves, how many layers do."""
    base_a, base_b = (  # an empty name says nothing, and quantization=None says that the base was dense
        {name: value for name, value in side.base.items() if value or name == "quantization"} for side in (a, b)
    )
    out = _differing(base_a, base_b, [name for name in base_a if name in base_b])
    if a.record is not None and b.record is not None:
        weights_a, weights_b = ({core(p): f for p, f in r.fingerprint.items()} for r in (a.record, b.record))
        shared = weights_a.keys() & weights_b.keys()
        if others := sum(weights_a[path] != weights_b[path] for path in shared):
            out["weights"] = f"{len(shared)} layers", f"{others} of them differ"
    return out
