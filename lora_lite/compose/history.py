"""A history: rounds that were trained one after the other and are kept at fixed coefficients, as one adapter.

It is an adapter like any other, so it is saved, loaded, scaled, merged and detached like one. It comes before the
other adapters of its model, and has buffers only. What its rounds are at each layer is in its config (rounds.py), how
they act in its variant.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from loguru import logger
from torch import Tensor, nn

from ..base.fingerprint import BaseRecord, base_record, same_base
from ..core.adapter import Adapter, adapters, get_adapter, scaled
from ..core.attach import detach, installed, reinstalled
from ..core.effective import Affine, in_order, random_rows
from ..core.hooks import adapt_input, adapt_output
from ..core.layer import WEIGHTS, Layer
from ..core.names import file_key
from ..core.resolve import attachable, make_sites
from ..core.state import Site, check_unmerged, session_of, sites_of
from ..core.validate import is_name, is_number
from ..core.variant import config_for, lookup
from ..errors import BaseModelError, ConfigError, TargetError, VariantError
from ..io.safetensors import check_numbers
from .rounds import LONGEST_LABEL, Kept, RoundsConfig

VARIANT = "history"
PAIR = ("lora_A", "lora_B", "lora_s")
SAME = 1e-9
"""Of what adapters make of a vector in float64: a difference below it is rounding."""


@dataclass(frozen=True)
class Round:
    """A kept round: how it is called in its history, its method and config, its coefficient c.

    ranks   path of each of its layers -> its rank in the pair of products that low-rank rounds share; None where it
            acts by its own method
    """

    label: str
    c: float
    config: Any
    ranks: dict[str, int | None] = field(repr=False)

    @property
    def variant(self) -> str:
        """The name of the method that was trained in it."""
        return self.config.variant

    def __str__(self) -> str:
        ranks = sorted({rank for rank in self.ranks.values() if rank is not None})
        how = f"rank {' to '.join(map(str, sorted({ranks[0], ranks[-1]})))}" if ranks else "by its own method"
        return f"{self.label}: {self.variant}, c {self.c:g}, {len(self.ranks)} layers, {how}"


@dataclass(frozen=True)
class RoundAtLayer:
    """A round at one layer: what `RoundsConfig.here` says of it, and its tensors by the names of its own method, or of
    the pair of products."""

    site: Site
    here: Any
    stacked: bool
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class RoundParts:
    """A round, and its part at each of its layers, by path."""

    kept: Kept
    at: dict[str, RoundAtLayer]


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
    they are, each with its own rank and layers; a round of another method acts as before, with its tensors as buffers.
    The change of several low-rank rounds is summed in one product, so its last bits may differ from theirs side by
    side.

    A history is an adapter: `save(model, path, "history")` writes all rounds to one file and `load(model, path,
    "history")` brings them back; `scaled`, `merge` and `detach` take its name. It comes first on each layer. So for the
    round that is trained next, scale 0 is base + history, and `disabled` the pristine base: as the anchor of a
    divergence, `kl_divergence(model, batches, "default")` has the one and `kl_divergence(model, batches)` the other.

    Raises ConfigError for a coefficient that isn't finite, a bad label, or a history at another scale than 1;
    TargetError for an unknown or sharded adapter, under DDP, while adapters are merged, if `into` is no history, or if
    an adapter that came before the round would act differently after it; BaseModelError if round and history belong to
    different bases; CheckpointError for NaN in the adapter; VariantError for a method whose `low_rank` isn't what it
    does. Nothing has changed then.
    """
    root, adapter, session = attachable(model), get_adapter(model, name), session_of(model)[1]
    check_unmerged(session, "keep a round")
    given, c = c, adapter.scale if c is None else c
    if not is_number(c):
        raise ConfigError(f"c={c!r}: wanted a finite number, the coefficient at which to keep {name!r}")
    if given is None and c == 0:
        raise ConfigError(
            f"adapter {name!r} is off (scale 0), so nothing of it would be kept\n  give c=, or c=0.0 for that"
        )
    known = adapters(model).get(into)
    if known is not None and _history(known).scale != 1:
        raise ConfigError(f"{into!r} is at scale {known.scale:g}, which multiplies what it keeps\n  set it to 1 first")
    old = [] if known is None else _split_rounds(known)
    if isinstance(adapter.config, RoundsConfig):
        raise TargetError(f"adapter {name!r} is a history itself\n  keep its rounds as they are, or drop_round some")
    _check_whole(adapter)
    base = _common_base(root, adapter, known)
    kept = Kept(_label(label, name, [each.kept.label for each in old]), float(c), adapter.config)
    with torch.no_grad(), scaled(root, 1.0, name):
        factors = {site.path: _factors(site) for site in adapter.sites()}
    with torch.no_grad(), scaled(root, c, name):
        new = RoundParts(kept, {site.path: _part(site, factors[site.path]) for site in adapter.sites()})
    _check_order(model, adapter, into)
    rounds = [*old, new]
    install = installed if known is None else reinstalled
    with install(root, *_join_rounds(root, into, rounds)) as adapter:
        adapter.set_base_record(base)
        detach(model, name)
    logger.info(f"kept in {adapter.name!r}, round {len(rounds)}: {history(model, into)[-1]}")
    return adapter


def history(model: nn.Module, name: str = "history") -> list[Round]:
    """The rounds of a history, in the order kept. Raises TargetError for a name that no history has."""
    adapter = _history(get_adapter(model, name))
    at_layers = {site.path: site.cfg.here for site in adapter.sites()}
    out = []
    for kept in adapter.config.rounds:
        found = {path: here[kept.label] for path, here in at_layers.items() if kept.label in here}
        ranks = {path: what if isinstance(what, int) else None for path, what in found.items()}
        out.append(Round(kept.label, kept.c, kept.config, ranks))
    return out


def drop_round(model: nn.Module, label: str, name: str = "history") -> None:
    """Take one round out of a history: the others are then, bit for bit, as if it had not been kept. With the last
    round the history comes off.

    Raises TargetError for an unknown round or history, or while adapters are merged; nothing has changed then.
    """
    root, adapter, session = attachable(model), _history(get_adapter(model, name)), session_of(model)[1]
    check_unmerged(session, "drop a round")
    _check_whole(adapter)
    rounds = _split_rounds(adapter)
    left = [each for each in rounds if each.kept.label != label]
    if len(left) == len(rounds):
        raise TargetError(f"no round {label!r} in {name!r}\n  it has {', '.join(each.kept.label for each in rounds)}")
    if left:
        base = adapter.base_record
        with reinstalled(root, *_join_rounds(root, name, left)) as adapter:
            adapter.set_base_record(base.at(adapter.targets))
    else:
        detach(model, name)
    logger.info(f"dropped round {label!r} of {name!r}: {len(left)} left")


# ---- what may be kept ---------------------------------------------------------------------------


def _history(adapter: Adapter) -> Adapter:
    if not isinstance(adapter.config, RoundsConfig):
        raise TargetError(
            f"adapter {adapter.name!r} is no history: its method is {adapter.variant!r}\n"
            f"  a history is made by lora_lite.freeze_into, under a name that is free"
        )
    return adapter


def _check_whole(adapter: Adapter) -> None:
    if adapter.is_sharded:
        raise TargetError(f"adapter {adapter.name!r} is sharded by fully_shard\n  save it, and keep it in one process")
    check_numbers(adapter.state_dict(), f"adapter {adapter.name!r} in memory", "go back to an earlier file of it")


def _label(label: str | None, name: str, taken: Sequence[str]) -> str:
    if label is None:
        numbered = (name if n == 1 else f"{name}-{n}" for n in range(1, len(taken) + 2))
        label = next(each for each in numbered if each not in taken)
    if not is_name(label) or len(label) > LONGEST_LABEL or label in taken:
        raise ConfigError(
            f"label={label!r}: wanted letters and digits with single '_' or '-' between them, at most {LONGEST_LABEL}, "
            f"and none of {list(taken)}"
        )
    return label


def _common_base(root: nn.Module, adapter: Adapter, known: Adapter | None) -> BaseRecord:
    """The record of the base that both belong to, with the fingerprints of all their layers. Raises BaseModelError."""
    if known is None:
        return adapter.base_record
    live = base_record(root, {site.path: site.base for each in (adapter, known) for site in each.sites()}.values())
    records = [adapter.base_record, known.base_record]
    shared = known.targets.keys() & adapter.targets.keys()
    are_live = [same_base(record, live.at(record.fingerprint)) for record in records]
    if are_live[0] != are_live[1] or not same_base(*(record.at(shared) for record in records)):
        raise BaseModelError(
            f"adapter {adapter.name!r} and the history {known.name!r} belong to different bases\n"
            f"  {adapter.name}: {records[0]}\n"
            f"  {known.name}: {records[1]}\n"
            f"  one of them was loaded with verify_base=False: keep it in a history of its own (into=)"
        )
    return replace(records[1], fingerprint=records[1].fingerprint | records[0].fingerprint)


def _check_order(model: nn.Module, adapter: Adapter, into: str) -> None:
    """TargetError if a layer would give something else once the adapter comes right after the history."""
    with ExitStack() as stack:
        for each in adapters(model).values():
            if each.scale == 0:
                stack.enter_context(scaled(model, 1.0, each.name))
        for site in adapter.sites():
            order = list(sites_of(site.module).values())
            names = [other.state.name for other in order]
            start = names.index(into) + 1 if into in names else sum(other.state.is_first for other in order)
            for other in order[start : order.index(site)]:
                if not _alike(_outcome([other, site]), _outcome([site, other])):
                    raise TargetError(
                        f"{site.path}: {other.state.name!r} came before {adapter.name!r}, and would act differently "
                        f"after it\n  a history comes first: keep {other.state.name!r} before, or detach it"
                    )


@torch.no_grad()
def _outcome(sites: Sequence[Site]) -> Tensor:
    """What adapters in this order make of one input, in float64; any linear map stands for the layer."""
    sites = in_order(sites)
    target, device = sites[0].target, sites[0].base.stored.device
    views = [Layer(s.module, s, torch.float64, 0 if s.stacked else None, {"training": False}) for s in sites]
    # Of one position each: a step of decoding, in which nothing is left out for where it is.
    x, down, up = random_rows((3, 1, target.d_in), (target.d_in, 4), (4, target.d_out), device=device)
    for view in views:
        x = adapt_input(view, x)
    y = x @ down @ up
    for view in views:
        y = adapt_output(view, x, y)
    return y


def _alike(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= SAME * b.abs().max())


# ---- a round as parts at layers, and parts as a history ------------------------------------------


Factors = tuple[Tensor, Tensor, Any]
"""A, B, s"""


def _factors(site: Site) -> Factors | None:
    return None if site.target.experts else lookup(site.cfg.variant).low_rank(Layer(site.module, site))


def _part(site: Site, factors: Factors | None) -> RoundAtLayer:
    """An adapter at one layer: exact factors of its change at scale 1, tested at the scale it has; or its tensors."""
    if factors is None:
        return RoundAtLayer(site, site.overrides, site.stacked, dict(site.tensors()))
    a, b, s = factors
    s = torch.as_tensor(s, dtype=torch.float64, device=a.device)
    r = a.shape[0]
    if not r or a.shape != (r, site.target.d_in) or b.shape != (site.target.d_out, r) or s.shape not in ((), (r,)):
        raise _not_low_rank(site, f"A {tuple(a.shape)}, B {tuple(b.shape)} and s {tuple(s.shape)}")
    view = Layer(site.module, site, torch.float64, instead={"training": False, "bias": None})
    x, y = random_rows((3, site.target.d_in), (3, site.target.d_out), device=a.device)
    added = site.state.scale * (s * (x @ a.double().mT)) @ b.double().mT
    # Twice: what is added must be the same whatever y is.
    alike = [_alike(adapt_output(view, x, start), start + added) for start in (y, added)]
    if not (torch.equal(adapt_input(view, x), x) and all(alike)):
        raise _not_low_rank(site, "another change than its forward makes")
    return RoundAtLayer(site, r, False, dict(zip(PAIR, (a, b, s.expand(r)), strict=True)))


def _not_low_rank(site: Site, found: str) -> VariantError:
    return VariantError(
        f"{site.path}: low_rank of {site.cfg.variant!r} gave {found}\n"
        f"  wanted A (r, d_in), B (d_out, r), s a number or (r,), in proportion to layer.scale: the output is "
        f"y + B (s A x) for any y"
    )


def _split_rounds(history: Adapter) -> list[RoundParts]:
    """The rounds of a history, each with what is its own."""
    rounds = [RoundParts(kept, {}) for kept in history.config.rounds]
    for site in history.sites():
        tensors, columns = dict(site.tensors()), site.cfg.columns()
        for label, at in ((r.kept.label, r.at) for r in rounds if r.kept.label in site.cfg.here):
            if label in columns:
                a, b, s = (tensors[name] for name in PAIR)
                part = dict(zip(PAIR, (a[columns[label]], b[:, columns[label]], s[columns[label]]), strict=True))
            else:
                start = f"lora_{site.cfg.prefix(label)}_"
                part = {f"lora_{k.removeprefix(start)}": t for k, t in tensors.items() if k.startswith(start)}
            at[site.path] = RoundAtLayer(site, site.cfg.here[label], site.stacked, part)
    return rounds


def _join_rounds(
    root: nn.Module, name: str, rounds: Sequence[RoundParts]
) -> tuple[RoundsConfig, str, list[Site], dict[str, Tensor]]:
    """The config, name, sites and tensors of a history of these rounds, for `installed`. Raises TargetError."""
    order = {path: i for i, (path, _) in enumerate(root.named_modules())}
    layers = {path: part.site for r in rounds for path, part in r.at.items()}
    per_round = {path: {r.kept.label: r.at[path].here for r in rounds if path in r.at} for path in layers}
    most = max(per_round.values(), key=list(per_round.values()).count)
    config: Any = config_for(VARIANT)
    cfg = config(rounds=[r.kept for r in rounds], here=most, dtype=_dtype(rounds))
    overrides = {path: {"here": here} for path, here in per_round.items() if here != most}
    paths = sorted(layers, key=lambda path: order[path])
    sites = make_sites({layers[path].target: layers[path].base for path in paths}, cfg, overrides)
    parts: dict[str, list[Tensor]] = {}
    stacked = {site.path: site.stacked for site in sites}
    for r in rounds:
        for path, part in r.at.items():
            if part.stacked != stacked[path]:
                raise TargetError(
                    f"{path}: rounds that act on the output of fused experts and rounds that act on each matrix "
                    f"can't share a history\n  keep {r.kept.label!r} in one of its own (into=)"
                )
            prefix = "" if isinstance(part.here, int) else f"{cfg.prefix(r.kept.label)}_"
            for tensor, value in part.tensors.items():
                key = file_key(path, f"lora_{prefix}{tensor.removeprefix('lora_')}")
                parts.setdefault(key, []).append(value.detach())
    return cfg, name, sites, {key: _joined(key, values, cfg.dtype) for key, values in parts.items()}


def _joined(key: str, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if not key.endswith(PAIR):
        return parts[0].clone()  # bit for bit, so in its own dtype
    return torch.cat([part.to(dtype) for part in parts], dim=1 if key.endswith(PAIR[1]) else 0)


def _dtype(rounds: Sequence[RoundParts]) -> torch.dtype:
    """The dtype in which the factors of low-rank rounds are exact, and their coefficients as exact as the layer
    computes."""
    dtypes = {torch.float32}
    for part in (part for r in rounds for part in r.at.values()):
        dtypes |= {part.tensors[name].dtype for name in PAIR[:2] if isinstance(part.here, int)}
        dtypes |= {part.site.base.stored.dtype} & {torch.float64}
    return reduce(torch.promote_types, dtypes)


# ---- what else the runtime offers with histories -------------------------------------------------


@torch.no_grad()
def _with_history(module: nn.Module, expert: int | None, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
    """A layer's weight with the adapters worked in that come before all others there, at their scales."""
    first = [site for site in sites_of(module).values() if site.state.is_first and not site.state.is_idle]
    if not first:
        return weight
    affine = Affine(first, torch.float64, weight.device, expert)
    return affine.write(weight, torch.empty_like(weight, dtype=torch.float64)).to(weight.dtype)


WEIGHTS["history"] = _with_history
