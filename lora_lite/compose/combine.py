"""Several adapters as one: the weighted sum of what they change in the weights, exact or compressed or made sparse."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import torch
from loguru import logger
from torch import Tensor, nn

from ..base.layer import find_layers
from ..core.adapter import Adapter, get_adapter
from ..core.attach import installed
from ..core.change import Change, added_change, check_has_weight
from ..core.effective import delta_weight, in_order
from ..core.names import file_key
from ..core.resolve import attachable, check_name, make_sites
from ..core.state import Method, Site, check_unmerged, session_of
from ..core.validate import is_number
from ..core.variant import config_for
from ..errors import ConfigError, QuantizedWeightError, TargetError
from .checks import check_whole, common_base
from .recipe import Part, Recipe, part_of, stacked

Sites = dict[str, list[Site]]  # name of an adapter -> its sites at a layer


@dataclass(frozen=True)
class Combined:
    """A combination: the adapter, and how far it is from the sum that was asked for.

    errors  path of each layer -> ‖Δ - (W' - W)‖ / ‖Δ‖, Frobenius, for the Δ that the way of combining gives: it comes
            of the SVD, and of the rounding to the adapter's dtype
    error   the same over all layers together
    """

    adapter: Adapter
    errors: dict[str, float] = field(repr=False)
    error: float

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda path: self.errors[path])
        ranks = [s.cfg.r for s in self.adapter.sites() if s.cfg.variant == "lora"]
        rank = f", rank {' to '.join(str(r) for r in sorted({min(ranks), max(ranks)}))}" if ranks else ""
        error = f"relative error {self.error:.1e} overall, {self.errors[worst]:.1e} at worst ({worst})"
        return f"{self.adapter.variant}, {len(self.errors)} layers{rank}, {error}"


def combine(
    model: nn.Module,
    weights: Mapping[str, float | int],
    into: str,
    how: str = "exact",
    *,
    rank: int | None = None,
    energy: float | int | None = None,
    density: float | int | None = None,
    seed: int | None = None,
) -> Combined:
    """Attach one adapter that changes the weights as several do together: Σ weight · (W' - W), each alone on the base
    and at the scale that it has.

    The new adapter is an ordinary one: it is trained, saved, merged and combined again. It is a `lora`, with the rank
    that each layer needs and a scaling of 1, of methods that add a low-rank update; a `full` at layers where the sum is
    no such update (DoRA, IA3, rotations; ties, dare and magnitude without a rank).

    The given adapters stay attached, at their scales, so the model is the sum of all until they are off: set
    `ll.adapters(model)[name].scale = 0` for each, or `ll.detach(model, name)`. Scale 0 before the call is an error.

    weights     name of each adapter -> its weight, of any sign; layers that one alone has are in the sum, too
    how         "exact": the factors beside each other, so ranks add up. "svd": the best of a `rank`, or of the least
                rank that holds `energy` of ‖ΔW‖² at each layer. "ties" (arXiv:2306.01708), "dare" (arXiv:2311.03099),
                "magnitude": sums of what a `density` leaves of each ΔW (not of A and B), layer by layer; with a rank
                or an energy, as a lora by the SVD of that. TIES averages, and its λ is the new adapter's scale
    seed        of dare, 0 if it isn't given

    Raises:
        ConfigError: for a bad argument, no adapter, a weight that isn't finite, or an adapter at scale 0.
        TargetError: for an unknown name, `into` that is taken, merged or sharded adapters, and what no weight holds: an
            adapter at some positions, on a block's output, on the output of fused experts.
        QuantizedWeightError: for a method whose change depends on the weight, on a quantised layer.
        BaseModelError: for adapters of different bases.
        CheckpointError: for a NaN.
        VariantError: for a method that isn't affine. After any of these nothing has changed.
    """
    recipe = Recipe(how, rank, energy, density, seed)
    root, session = attachable(model), session_of(model)[1]
    check_unmerged(session, "combine adapters")
    check_name(into, session, type(root).__name__)
    chosen = [_adapter(model, name, weight) for name, weight in _checked(weights).items()]
    base, layers = common_base(root, chosen), _layers(root, chosen)
    cfgs = [cfg for adapter in chosen for cfg in adapter.configs]
    dtype = reduce(torch.promote_types, (cfg.dtype for cfg in cfgs), torch.float32)
    with torch.no_grad():
        parts = {path: _part(s, weights, recipe, _generator(seed or 0, path), dtype) for path, s in layers.items()}
    methods, tensors = _methods(layers, parts, dtype)
    with installed(root, methods, into, tensors) as adapter:
        adapter.set_base_record(base.at(adapter.targets))
        for site in adapter.sites():  # what a merge on disk refuses in one of them, it refuses in their sum
            site.never_ran = any(s.never_ran for sites in layers[site.path].values() for s in sites)
    errors = {path: _ratio(part.error, part.norm) for path, part in parts.items()}
    combined = Combined(adapter, errors, _ratio(*_norms([*parts.values()])))
    terms = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
    logger.info(f"combined {terms} into {into!r} ({how}): {combined}")
    return combined


# ---- what may be combined -----------------------------------------------------------------------


def _checked(weights: Mapping[str, float | int]) -> Mapping[str, float | int]:
    if not (weights and all(map(is_number, weights.values()))):
        raise ConfigError(f"weights={weights!r}: wanted {{name of an adapter: finite weight}}, one at least")
    return weights


def _adapter(model: nn.Module, name: str, weight: float | int) -> Adapter:
    adapter = get_adapter(model, name)
    if adapter.scale == 0:
        problem = f"adapter {name!r} is off (scale 0): nothing of it would be combined"
        raise ConfigError(f"{problem}\n  set its scale first, or leave it out")
    check_whole(adapter, "combine")
    return adapter


def _layers(root: nn.Module, chosen: Sequence[Adapter]) -> dict[str, Sites]:
    """The sites at each layer by adapter, in module order. Raises TargetError."""
    layers: dict[str, Sites] = {}
    for adapter in chosen:
        for site in adapter.sites():
            check_has_weight([site])
            if site.target.experts and not site.base.by_weight:
                problem = f"{site.cfg.variant!r} is on the block of fused experts, and not on their matrices"
                raise TargetError(f"{site.path}: {problem}\n  keep it attached, or adapt those (kinds='experts')")
            layers.setdefault(site.path, {}).setdefault(adapter.name, []).append(site)
    for path, by_name in layers.items():
        sites = [site for several in by_name.values() for site in several]
        if len({(bool(site.base.ties), site.base.by_weight) for site in sites}) > 1:
            problem = "some of the adapters act on the modules that share its weight, and some don't (tied_weights)"
            raise TargetError(f"{path}: {problem}\n  attach all of them with one tied_weights")
    return {path: layers[path] for path in find_layers(dict(root.named_modules())) if path in layers}


def _change(sites: Sequence[Site], expert: int | None) -> Change:
    """The change of one adapter at a layer, at its scale."""
    sites = in_order(sites)
    if (change := added_change(sites, expert)) is not None:
        return change
    layer = sites[0].base.as_it_is_now()
    if not layer.storage.is_dense:
        methods = " and ".join(dict.fromkeys(repr(site.cfg.variant) for site in sites))
        raise QuantizedWeightError(
            f"{layer.path}: what {methods} changes depends on the weight, and this one is {layer.describe()}\n"
            f"  combine on the unquantised base, or adapters that add to any weight, such as lora"
        )
    return Change(None, *delta_weight(sites, expert))


def _part(
    by_name: Sites, weights: Mapping[str, float | int], recipe: Recipe, generator: torch.Generator, dtype: torch.dtype
) -> Part:
    """The combination at one layer; of fused experts their tensors are stacked."""
    target = next(iter(by_name.values()))[0].target
    experts = range(target.experts) if target.experts else [None]
    sums = []
    for expert in experts:
        changes = [_change(sites, expert).times(weights[name]) for name, sites in by_name.items()]
        sums.append(recipe.sum(changes, generator))
    if any(change.shift is not None for change in sums):  # then of every expert, so that they can be stacked
        sums = [c if c.shift is not None else c._replace(shift=c.b.new_zeros(len(c.b))) for c in sums]
    parts = [part_of(change, recipe, target.has_bias, dtype) for change in sums]
    if not target.experts:
        return parts[0]
    tensors = {name: stacked([part.tensors[name] for part in parts]) for name in parts[0].tensors}
    return Part(parts[0].variant, tensors, *_norms(parts))


def _generator(seed: int, path: str) -> torch.Generator:
    """The random numbers of a layer: the same whatever other layers there are, and in which order."""
    digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def _norms(parts: Sequence[Part]) -> tuple[float, float]:
    """‖error‖ and ‖change‖ of several matrices as one."""
    return math.hypot(*(part.error for part in parts)), math.hypot(*(part.norm for part in parts))


# ---- the combination as an adapter --------------------------------------------------------------


def _methods(
    layers: Mapping[str, Sites], parts: Mapping[str, Part], dtype: torch.dtype
) -> tuple[list[Method], dict[str, Tensor]]:
    """The methods for `installed`, and their tensors: a lora and a full, apart or tied as the given adapters are."""
    groups: dict[tuple[str, bool], list[str]] = {}
    sites = {path: next(iter(by_name.values()))[0] for path, by_name in layers.items()}
    for path, part in parts.items():
        groups.setdefault((part.variant, bool(sites[path].base.ties)), []).append(path)
    methods = []
    for (variant, is_tied), paths in groups.items():
        fields: dict[str, Any] = {
            "target_names": f"^({'|'.join(map(re.escape, paths))})$",
            "kinds": tuple(dict.fromkeys(kind for path in paths for kind in _kinds(layers[path]))),
            "tied_weights": "together" if is_tied else "apart",
            "dtype": dtype,
        }
        overrides: dict[str, dict[str, Any]] = {}
        if variant == "lora":
            settings = {path: _settings(parts[path]) for path in paths}
            ((most, _),) = Counter(settings.values()).most_common(1)
            fields |= most._asdict()
            rest = {path: setting._asdict() for path, setting in settings.items() if setting != most}
            overrides = {path: {k: v for k, v in rest[path].items() if v != fields[k]} for path in rest}
        cfg = config_for(variant)(**fields)
        # Found linear when the adapters were attached.
        targets = {sites[path].target: sites[path].base.as_it_is_now() for path in paths}
        methods.append(Method(cfg, make_sites(targets, cfg, overrides, asked=True)))
    tensors = {file_key(path, name): value for path, part in parts.items() for name, value in part.tensors.items()}
    return methods, tensors


def _kinds(by_name: Sites) -> list[str]:
    """The kind of a layer; of a module that stands in for a layer, what the adapters' configs say it may be."""
    sites = [site for several in by_name.values() for site in several]
    said = {kind for site in sites for kind in site.cfg.kinds} & {"conv", "embedding"}
    return [sites[0].base.kind.category, *sorted(said)]


class _Settings(NamedTuple):
    """The fields of a LoRAConfig that may differ by layer; alpha None is r, a scaling of 1."""

    r: int
    bias: bool


def _settings(part: Part) -> _Settings:
    return _Settings(part.tensors["lora_A"].shape[-2], "lora_bias" in part.tensors)


def _ratio(error: float, norm: float) -> float:
    return error / norm if norm else 0.0
