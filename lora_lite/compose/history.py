"""A history: rounds that were trained one after the other and are kept at fixed coefficients, as one adapter.

It comes before the other adapters of its model, and has buffers only. What its rounds are at each layer is in its
config (rounds.py), how they act in its variant.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from loguru import logger
from torch import Tensor, nn

from ..base.layer import find_layers
from ..core.adapt import adapt_input, adapt_output
from ..core.adapter import Adapter, adapters, get_adapter
from ..core.attach import detach, installed, reinstalled
from ..core.effective import Affine, in_order, random_rows
from ..core.layer import WEIGHTS, Layer
from ..core.names import file_key
from ..core.resolve import attachable, make_sites
from ..core.scaled import scaled
from ..core.state import Method, Site, check_unmerged, session_of, sites_at
from ..core.validate import is_name, is_number
from ..core.variant import LowRank, lookup
from ..errors import ConfigError, TargetError, VariantError
from .checks import check_whole, common_base
from .rounds import LONGEST_LABEL, HistoryConfig, RoundEntry

PAIR = ("lora_A", "lora_B", "lora_s")
_PLACES = {"block": "the residual stream at a block's output", "norm": "a norm", "conv": "all groups of a convolution"}
SAME = 1e-9  # a smaller part of what adapters make of a vector in float64 is rounding


@dataclass(frozen=True)
class Round(RoundEntry):
    """A kept round: its label in the history, its coefficient c, its config, and its layers.

    ranks   path of each of its layers -> its rank in the pair of products that low-rank rounds share; None where it
            acts by its own method
    """

    config: Any
    ranks: dict[str, int | None] = field(repr=False)

    @property
    def variant(self) -> str:
        """The name of the method that was trained in it."""
        return self.config.variant

    def __str__(self) -> str:
        ranks = sorted({rank for rank in self.ranks.values() if rank is not None})
        part = f"rank {' to '.join(map(str, sorted({ranks[0], ranks[-1]})))}" if ranks else "by its own method"
        return f"{self.label}: {self.variant}, c {self.c:g}, {len(self.ranks)} layers, {part}"


@dataclass(frozen=True)
class RoundAtLayer:
    """A round at one layer, with its tensors by the names of its own method, or of the pair of products."""

    site: Site
    rank_or_fields: Any  # as `HistoryConfig.here` has it
    tensors: dict[str, Tensor]


RoundParts = tuple[RoundEntry, dict[str, RoundAtLayer]]  # a round, and its part at each of its layers, by path


def freeze_into(
    model: nn.Module,
    name: str = "default",
    into: str = "history",
    c: float | int | None = None,
    label: str | None = None,
) -> Adapter:
    """Keep a trained adapter at a fixed coefficient as a round of a history, and take it off: its name is free again.

    into    the adapter that is the history; it is made for the first round
    c       the coefficient for good; None for the scale that the adapter has
    label   what to call the round; None for the adapter's name, with a number if the history has that already

    Low-rank rounds (LoRA, PiSSA, ssteer, any method that declares `low_rank`) become one pair of products however many
    they are, so the last bits may differ from theirs side by side; a round of another method acts as before.

    A history is an adapter: `save`, `load`, `scaled`, `merge` and `detach` take its name. It comes first on each layer.
    So for the round that is trained next, scale 0 is base + history, and `disabled` the pristine base: as the anchor of
    a divergence, `kl_divergence(model, batches, "default")` has the one and `kl_divergence(model, batches)` the other.

    Raises:
        ConfigError: for a coefficient that isn't finite, a bad label, or a history at another scale than 1.
        TargetError: for an unknown or sharded adapter, under DDP, while adapters are merged, if `into` is no history,
            or if an adapter that came before the round would act differently after it.
        BaseModelError: if round and history belong to different bases.
        CheckpointError: for NaN in the adapter.
        VariantError: for a method whose `low_rank` isn't what it does. After any of these nothing has changed.
    """
    root, adapter, session = attachable(model), get_adapter(model, name), session_of(model)[1]
    check_unmerged(session, "keep a round")
    given, c = c, adapter.scale if c is None else c
    if not is_number(c):
        raise ConfigError(f"c={c!r}: wanted a finite number, the coefficient at which to keep {name!r}")
    if given is None and c == 0:
        raise ConfigError(f"adapter {name!r} is off (scale 0): nothing would be kept\n  give c=, or c=0.0 for that")
    known = adapters(model).get(into)
    if known is not None and _history(known).scale != 1:
        raise ConfigError(f"{into!r} is at scale {known.scale:g}, which multiplies what it keeps\n  set it to 1 first")
    old = [] if known is None else _split_rounds(known)
    if isinstance(adapter.configs[0], HistoryConfig):
        raise TargetError(f"adapter {name!r} is a history itself\n  keep its rounds as they are, or drop_round some")
    if any(method.shared is not None for method in adapter.methods):
        problem = f"{adapter.variant!r} has tensors that all its layers share, and a history keeps each layer's own"
        raise TargetError(f"{problem}\n  keep it beside the history, or merge it")
    if any(site.positions for site in adapter.sites()):
        problem = f"adapter {name!r} acts at some positions of a sequence, and a history at all"
        raise TargetError(f"{problem}\n  keep it beside the history")
    check_whole(adapter, "keep")
    if bases := [site.base for site in adapter.sites() if not site.base.kind.has_matrix]:
        where = _PLACES[bases[0].kind.category]
        raise TargetError(
            f"{bases[0].path}: a history is of layers, and this adapter is on {where}\n"
            f"  keep it beside the history, or attach one to linear layers"
        )
    base = common_base(root, [adapter] if known is None else [known, adapter])
    rounds = list(old)  # none of the old ones is computed again
    for method in adapter.methods:
        entry = RoundEntry(_label(label, name, [entry.label for entry, _ in rounds]), float(c), method.cfg)
        label = None if label is None or len(adapter.methods) == 1 else _label(None, label, [entry.label])
        # Factors at scale 1, as c multiplies them from now on; compared with the forward at the scale to be kept.
        with torch.no_grad(), scaled(root, 1.0, name):
            factors = {site.path: _factors(site) for site in method.sites}
        with torch.no_grad(), scaled(root, c, name):
            rounds.append((entry, {site.path: _at_layer(site, factors[site.path]) for site in method.sites}))
    _check_order(model, adapter, into)
    install = installed if known is None else reinstalled  # both undo all of it if the block raises
    with install(root, *_join_rounds(root, into, rounds)) as adapter:
        adapter.set_base_record(base)
        detach(model, name)
    logger.info(f"kept in {adapter.name!r}, round {len(rounds)}: {history(model, into)[-1]}")
    return adapter


def history(model: nn.Module, name: str = "history") -> list[Round]:
    """The rounds of a history, in the order kept.

    Raises:
        TargetError: for a name that no history has.
    """
    adapter = _history(get_adapter(model, name))
    rounds = []
    for entry in adapter.config.rounds:
        parts = {s.path: s.cfg.here[entry.label] for s in adapter.sites() if entry.label in s.cfg.here}
        ranks = {path: part if isinstance(part, int) else None for path, part in parts.items()}
        rounds.append(Round(entry.label, entry.c, entry.config, ranks))
    return rounds


def drop_round(model: nn.Module, label: str, name: str = "history") -> None:
    """Take one round out of a history: the others are then, bit for bit, as if it had not been kept. With the last
    round the history comes off.

    Raises:
        TargetError: for an unknown round or history, or while adapters are merged; nothing has changed then.
    """
    root, adapter, session = attachable(model), _history(get_adapter(model, name)), session_of(model)[1]
    check_unmerged(session, "drop a round")
    check_whole(adapter, "keep")
    rounds = _split_rounds(adapter)
    left = [(entry, layers) for entry, layers in rounds if entry.label != label]
    if len(left) == len(rounds):
        raise TargetError(f"no round {label!r} in {name!r}\n  it has {', '.join(entry.label for entry, _ in rounds)}")
    if left:
        base = adapter.base_record
        with reinstalled(root, *_join_rounds(root, name, left)) as adapter:
            adapter.set_base_record(base.at(adapter.targets))
    else:
        detach(model, name)
    logger.info(f"dropped round {label!r} of {name!r}: {len(left)} left")


# ---- what may be kept ---------------------------------------------------------------------------


def _history(adapter: Adapter) -> Adapter:
    if not isinstance(adapter.configs[0], HistoryConfig):
        problem = f"adapter {adapter.name!r} is no history: its method is {adapter.variant!r}"
        raise TargetError(f"{problem}\n  lora_lite.freeze_into makes one, under a name that is free")
    return adapter


def _label(label: str | None, name: str, taken: Sequence[str]) -> str:
    if label is None:
        numbered = (name if n == 1 else f"{name}-{n}" for n in range(1, len(taken) + 2))
        label = next(free for free in numbered if free not in taken)
    if not is_name(label) or len(label) > LONGEST_LABEL or label in taken:
        wanted = f"letters and digits with single '_' or '-' between them, at most {LONGEST_LABEL}"
        raise ConfigError(f"label={label!r}: wanted {wanted}, and none of {list(taken)}")
    return label


def _check_order(model: nn.Module, adapter: Adapter, into: str) -> None:
    """TargetError if a layer would give something else once the adapter comes right after the history."""
    with ExitStack() as stack:
        for idle in (other for other in adapters(model).values() if other.scale == 0):
            stack.enter_context(scaled(model, 1.0, idle.name))  # its scale may be set again later
        for site in adapter.sites():
            order = sites_at(site.base)
            names = [other.state.name for other in order]
            start = names.index(into) + 1 if into in names else sum(other.state.is_first for other in order)
            for other in order[start : order.index(site)]:
                passed = other.state.name
                if passed == adapter.name:  # another of its own methods, which is kept before this one
                    continue
                if (other.target.d_in, other.target.d_out) != (site.target.d_in, site.target.d_out):
                    place = _PLACES[other.base.kind.category]
                    problem = f"{passed!r} came before {adapter.name!r}, and is on {place}: they can't be compared"
                    cure = f"a history comes first: keep {adapter.name!r} beside {passed!r}, or detach that"
                    raise TargetError(f"{site.path}: {problem}\n  {cure}")
                if not _alike(_outcome([other, site]), _outcome([site, other])):
                    problem = f"{passed!r} came before {adapter.name!r}, and would act differently after it"
                    cure = f"a history comes first: keep {passed!r} before, or detach it"
                    raise TargetError(f"{site.path}: {problem}\n  {cure}")


@torch.no_grad()
def _outcome(sites: Sequence[Site]) -> Tensor:
    """The output with adapters in this order for a few inputs, in float64; any linear map stands for the layer."""
    sites = in_order(sites)
    target, device = sites[0].target, sites[0].base.stored.device
    views = [Layer(s.module, s, torch.float64, None, 0 if s.stacked else None, {"training": False}) for s in sites]
    # Three inputs of one position, as a step of decoding has: some methods leave out positions by where they are.
    x, down, up = random_rows((3, 1, target.d_in), (target.d_in, 4), (4, target.d_out), device=device)
    for view in views:
        x = adapt_input(view, x)
    y = x @ down @ up  # (3, 1, d_out)
    for view in views:
        y = adapt_output(view, x, y)
    return y


def _alike(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= SAME * b.abs().max())


# ---- a round as parts at layers, and parts as a history ------------------------------------------


def _at_layer(site: Site, factors: tuple[Tensor, Tensor, Any] | None) -> RoundAtLayer:
    """An adapter at one layer: exact factors A, B, s of its change at scale 1, tested at the scale it has; or its
    tensors. Raises VariantError for factors of another change."""
    if factors is None:
        return RoundAtLayer(site, site.overrides, dict(site.tensors()))
    a, b, s = factors
    s, r, wrong = torch.as_tensor(s, dtype=torch.float64, device=a.device), a.shape[0], ""
    if not r or a.shape != (r, site.target.d_in) or b.shape != (site.target.d_out, r) or s.shape not in ((), (r,)):
        wrong = f"A {tuple(a.shape)}, B {tuple(b.shape)} and s {tuple(s.shape)}"
    else:
        view = Layer(site.module, site, torch.float64, instead={"training": False, "bias": None})
        x, y = random_rows((3, site.target.d_in), (3, site.target.d_out), device=a.device)
        added = site.state.scale * (s * (x @ a.double().mT)) @ b.double().mT  # (3, d_out)
        # Twice: what is added must be the same whatever y is.
        alike = [_alike(adapt_output(view, x, start), start + added) for start in (y, added)]
        if not (torch.equal(adapt_input(view, x), x) and all(alike)):
            wrong = "another change than its forward makes"
    if wrong:
        wanted = "A (r, d_in), B (d_out, r), s a number or (r,) in proportion to layer.scale: y + B (s A x) for any y"
        raise VariantError(f"{site.path}: low_rank of {site.cfg.variant!r} gave {wrong}\n  wanted {wanted}")
    return RoundAtLayer(site, r, dict(zip(PAIR, (a, b, s.expand(r)), strict=True)))


def _factors(site: Site) -> Any:
    """The method at a layer as a pair of products alone, if it is one."""
    factors = None if site.target.experts else lookup(site.cfg.variant).low_rank(Layer(site.module, site))
    factors = None if factors is None else LowRank(*factors)
    is_pair = factors is not None and factors.is_dense and factors.gain is None and factors.shift is None
    return tuple(factors[:3]) if factors is not None and is_pair else None


def _split_rounds(history: Adapter) -> list[RoundParts]:
    """The rounds of a history, each with its own tensors."""
    rounds = []
    for number, entry in enumerate(history.config.rounds, 1):
        layers = {}
        for site in (site for site in history.sites() if entry.label in site.cfg.here):
            if (columns := site.cfg.columns.get(entry.label)) is not None:
                a, b, s = (site.tensor(name) for name in PAIR)
                tensors = dict(zip(PAIR, (a[columns], b[:, columns], s[columns]), strict=True))  # (r, i), (o, r), (r,)
            else:
                start = f"lora_{number}_"
                tensors = {f"lora_{k.removeprefix(start)}": t for k, t in site.tensors() if k.startswith(start)}
            layers[site.path] = RoundAtLayer(site, site.cfg.here[entry.label], tensors)
        rounds.append((entry, layers))
    return rounds


def _join_rounds(
    root: nn.Module, name: str, rounds: Sequence[RoundParts]
) -> tuple[list[Method], str, dict[str, Tensor]]:
    """The method, name and tensors of a history of these rounds, for `installed`. Raises TargetError."""
    known = {path: part.site for _, layers in rounds for path, part in layers.items()}
    if tied := [site.path for site in known.values() if site.base.ties]:
        raise TargetError(
            f'{tied[0]}: with tied_weights="together" it acts on other modules too, and a history does not\n'
            f"  keep it beside the history, or merge it"
        )
    paths = [path for path in find_layers(dict(root.named_modules())) if path in known]  # in module order
    # Path -> {label: rank, or fields} of the rounds that are there.
    ranks = {path: {r.label: parts[path].rank_or_fields for r, parts in rounds if path in parts} for path in known}
    # The config says what most layers have, so that a file names the others alone.
    most = max(ranks.values(), key=list(ranks.values()).count)
    cfg = HistoryConfig(rounds=[entry for entry, _ in rounds], here=most, dtype=_dtype(rounds))
    overrides = {path: {"here": parts} for path, parts in ranks.items() if parts != most}
    sites = make_sites({known[path].target: known[path].base.as_it_is_now() for path in paths}, cfg, overrides)
    stacked = {site.path: site.stacked for site in sites}
    tensors: dict[str, list[Tensor]] = defaultdict(list)
    for number, (entry, layers) in enumerate(rounds, 1):
        for path, part in layers.items():
            if part.site.stacked != stacked[path]:
                acts = "rounds that act on the output of fused experts and rounds that act on each matrix"
                cure = f"keep {entry.label!r} in one of its own (into=)"
                raise TargetError(f"{path}: {acts} can't share a history\n  {cure}")
            prefix = "" if isinstance(part.rank_or_fields, int) else f"{number}_"
            for tensor, value in part.tensors.items():
                tensors[file_key(path, f"lora_{prefix}{tensor.removeprefix('lora_')}")].append(value.detach())
    return [Method(cfg, sites)], name, {key: _joined(key, values, cfg.dtype) for key, values in tensors.items()}


def _joined(key: str, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if not key.endswith(PAIR):
        return parts[0]  # bit for bit, so in its own dtype
    return torch.cat([part.to(dtype) for part in parts], dim=1 if key.endswith(PAIR[1]) else 0)


def _dtype(rounds: Sequence[RoundParts]) -> torch.dtype:
    """The dtype in which low-rank rounds' factors are exact, and their coefficients as exact as the layer computes."""
    dtypes = {torch.float32}
    for part in (part for _, layers in rounds for part in layers.values()):
        dtypes |= {part.tensors[name].dtype for name in PAIR[:2] if isinstance(part.rank_or_fields, int)}
        dtypes |= {part.site.base.stored.dtype} & {torch.float64}
    return reduce(torch.promote_types, dtypes)


@torch.no_grad()
def _with_history(site: Site, expert: int | None, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
    """A layer's weight with the adapters worked in that come before all others there, at their scales."""
    first = [other for other in sites_at(site.base) if other.is_first and not other.state.is_idle]
    if not first:
        return weight
    affine = Affine(first, torch.float64, weight.device, expert)
    return affine.write(weight, torch.empty_like(weight, dtype=torch.float64)).to(weight.dtype)


WEIGHTS["history"] = _with_history
