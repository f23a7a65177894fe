"""A history: rounds that were trained one after the other and are kept at fixed coefficients, as one adapter.

It is an adapter like any other, so it is saved, loaded, scaled, merged and detached like one. It comes before the
other adapters of its model, and has buffers only. What its rounds are at each layer is in its config (rounds.py), how
they act in its variant.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from ..base import fingerprint, quant
from ..core.adapter import Adapter, adapters, get_adapter, scaled
from ..core.attach import Values, detach, installed, remade
from ..core.hooks import apply_input, apply_output
from ..core.layer import Layer, Slot
from ..core.names import file_key
from ..core.plan import Changes, attachable, is_stacked
from ..core.session import check_unmerged, leads, session_of, slots_of
from ..core.targets import Target
from ..core.validate import is_name, is_number
from ..core.variant import ParamSpec, config_for, lookup
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
class _Piece:
    """A round at one layer: what `RoundsConfig.here` says of it, and its tensors by the names of its own method, or of
    the pair of products."""

    target: Target
    here: Any
    stacked: bool
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class _Pieces:
    kept: Kept
    at: dict[str, _Piece]


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
    old = [] if known is None else _apart(known)
    if isinstance(adapter.config, RoundsConfig):
        raise TargetError(f"adapter {name!r} is a history itself\n  keep its rounds as they are, or drop_round some")
    _check_whole(adapter)
    base = _common_base(root, adapter, known)
    kept = Kept(_label(label, name, [each.kept.label for each in old]), float(c), adapter.config)
    with torch.no_grad(), scaled(root, 1.0, name):
        factors = {slot.path: _factors(module, slot) for module, slot in adapter.slots()}
    with torch.no_grad(), scaled(root, c, name):
        pieces = {slot.path: _piece(adapter, module, slot, factors[slot.path]) for module, slot in adapter.slots()}
    new = _Pieces(kept, pieces)
    _check_order(model, adapter, into)
    rounds = [*old, new]
    how = installed if known is None else remade
    with how(root, *_together(root, into, rounds)) as made:
        made.trained_on(base)
        detach(model, name)
    logger.info(f"kept in {made.name!r}, round {len(rounds)}: {history(model, into)[-1]}")
    return made


def history(model: nn.Module, name: str = "history") -> list[Round]:
    """The rounds of a history, in the order kept. Raises TargetError for a name that no history has."""
    adapter = _history(get_adapter(model, name))
    at_layers = {slot.path: slot.cfg.here for _, slot in adapter.slots()}
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
    rounds = _apart(adapter)
    left = [each for each in rounds if each.kept.label != label]
    if len(left) == len(rounds):
        raise TargetError(f"no round {label!r} in {name!r}\n  it has {', '.join(each.kept.label for each in rounds)}")
    if left:
        base = adapter.base
        with remade(root, *_together(root, name, left)) as made:
            made.trained_on(_at(base, made.targets))
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


def _common_base(root: nn.Module, adapter: Adapter, known: Adapter | None) -> dict[str, Any]:
    """The record of the base that both belong to, with the fingerprints of all their layers. Raises BaseModelError."""
    if known is None:
        return adapter.base
    here = fingerprint.base_record(
        root, {slot.path: module for each in (adapter, known) for module, slot in each.slots()}
    )
    both = [_at(each.base, known.targets.keys() & adapter.targets.keys()) for each in (adapter, known)]
    own = [fingerprint.same_base(each.base, _at(here, each.targets)) for each in (adapter, known)]
    if own[0] != own[1] or not fingerprint.same_base(*both):
        raise BaseModelError(
            f"adapter {adapter.name!r} and the history {known.name!r} belong to different bases\n"
            f"  {adapter.name}: {fingerprint.base_line(adapter.base)}\n"
            f"  {known.name}: {fingerprint.base_line(known.base)}\n"
            f"  one of them was loaded with verify_base=False: keep it in a history of its own (into=)"
        )
    return {**known.base, "fingerprint": known.base["fingerprint"] | adapter.base["fingerprint"]}


def _at(base: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """A base record with the fingerprints of these layers alone."""
    return {**base, "fingerprint": {path: base["fingerprint"][path] for path in paths}}


def _check_order(model: nn.Module, adapter: Adapter, into: str) -> None:
    """TargetError if a layer would give something else once the adapter comes right after the history."""
    with ExitStack() as stack:
        for each in adapters(model).values():
            if each.scale == 0:
                stack.enter_context(scaled(model, 1.0, each.name))
        for module, slot in adapter.slots():
            here = list(slots_of(module).values())
            names = [each.state.name for each in here]
            start = names.index(into) + 1 if into in names else sum(map(leads, here))
            for other in here[start : here.index(slot)]:
                if not _alike(_outcome(module, [other, slot]), _outcome(module, [slot, other])):
                    raise TargetError(
                        f"{slot.path}: {other.state.name!r} came before {adapter.name!r}, and would act differently "
                        f"after it\n  a history comes first: keep {other.state.name!r} before, or detach it"
                    )


@torch.no_grad()
def _outcome(module: nn.Module, slots: Sequence[Slot]) -> Tensor:
    """What adapters in this order make of one input, in float64; any linear map stands for the layer."""
    slots = sorted(slots, key=lambda slot: not slot.stacked)  # experts' matrices come first
    target, device = slots[0].target, quant.stored(module).device
    views = [Layer(module, s, torch.float64, 0 if s.stacked else None, {"training": False}) for s in slots]
    # Of one position each: a step of decoding, in which nothing is left out for where it is.
    x, down, up = _random((3, 1, target.d_in), (target.d_in, 4), (4, target.d_out), device=device)
    for view in views:
        x = apply_input(view, x)
    y = x @ down @ up
    for view in views:
        y = apply_output(view, x, y)
    return y


def _alike(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= SAME * b.abs().max())


def _random(*shapes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in shapes]


# ---- rounds as pieces, and pieces as a history ---------------------------------------------------


Factors = tuple[Tensor, Tensor, Any]
"""A, B, s"""


def _factors(module: nn.Module, slot: Slot) -> Factors | None:
    return None if slot.target.experts else lookup(slot.cfg.variant).low_rank(Layer(module, slot))


def _piece(adapter: Adapter, module: nn.Module, slot: Slot, found: Factors | None) -> _Piece:
    """An adapter at one layer: exact factors of its change at scale 1, tested at the scale it has; or its tensors."""
    if found is None:
        tensors = {name: getattr(module, slot.state.attribute(name)) for name in slot.tensors}
        return _Piece(slot.target, adapter.per_layer.get(slot.path, {}), slot.stacked, tensors)
    a, b, s = found
    s = torch.as_tensor(s, dtype=torch.float64, device=a.device)
    r = a.shape[0]
    if not r or a.shape != (r, slot.target.d_in) or b.shape != (slot.target.d_out, r) or s.shape not in ((), (r,)):
        raise _not_low_rank(slot, f"A {tuple(a.shape)}, B {tuple(b.shape)} and s {tuple(s.shape)}")
    view = Layer(module, slot, torch.float64, instead={"training": False, "bias": None})
    x, y = _random((3, slot.target.d_in), (3, slot.target.d_out), device=a.device)
    added = slot.state.scale * (s * (x @ a.double().mT)) @ b.double().mT
    alike = [_alike(apply_output(view, x, at), at + added) for at in (y, added)]
    if not (torch.equal(apply_input(view, x), x) and all(alike)):
        raise _not_low_rank(slot, "another change than its forward makes")
    return _Piece(slot.target, r, False, dict(zip(PAIR, (a, b, s.expand(r)), strict=True)))


def _not_low_rank(slot: Slot, found: str) -> VariantError:
    return VariantError(
        f"{slot.path}: low_rank of {slot.cfg.variant!r} gave {found}\n"
        f"  wanted A (r, d_in), B (d_out, r), s a number or (r,), in proportion to layer.scale: the output is "
        f"y + B (s A x) for any y"
    )


def _apart(history: Adapter) -> list[_Pieces]:
    """The rounds of a history, each with what is its own."""
    out = [_Pieces(kept, {}) for kept in history.config.rounds]
    for module, slot in history.slots():
        tensors = {name: getattr(module, slot.state.attribute(name)) for name in slot.tensors}
        columns = slot.cfg.columns()
        for label, at in ((each.kept.label, each.at) for each in out if each.kept.label in slot.cfg.here):
            if label in columns:
                a, b, s = (tensors[name] for name in PAIR)
                own = dict(zip(PAIR, (a[columns[label]], b[:, columns[label]], s[columns[label]]), strict=True))
            else:
                start = f"lora_{slot.cfg.prefix(label)}_"
                own = {f"lora_{k.removeprefix(start)}": t for k, t in tensors.items() if k.startswith(start)}
            at[slot.path] = _Piece(slot.target, slot.cfg.here[label], slot.stacked, own)
    return out


def _together(
    root: nn.Module, name: str, rounds: Sequence[_Pieces]
) -> tuple[RoundsConfig, str, list[Target], Changes, Values]:
    """What `installed` and `remade` want for a history of these rounds. Raises TargetError."""
    targets = {path: piece.target for each in rounds for path, piece in each.at.items()}
    places = {path: i for i, (path, _) in enumerate(root.named_modules())}
    here = {path: {e.kept.label: e.at[path].here for e in rounds if path in e.at} for path in targets}
    most = max(here.values(), key=list(here.values()).count)
    changes: Changes = {path: {"here": what} for path, what in here.items() if what != most}
    parts: dict[str, list[Tensor]] = {}
    config: Any = config_for(VARIANT)
    cfg = config(rounds=[each.kept for each in rounds], here=most, dtype=_dtype(root, rounds))
    for each in rounds:
        for path, piece in each.at.items():
            prefix = "" if isinstance(piece.here, int) else f"{cfg.prefix(each.kept.label)}_"
            if piece.stacked != is_stacked(piece.target, cfg.with_overrides(changes.get(path, {}))):
                raise TargetError(
                    f"{path}: rounds that act on the output of fused experts and rounds that act on each matrix "
                    f"can't share a history\n  keep {each.kept.label!r} in one of its own (into=)"
                )
            for tensor, value in piece.tensors.items():
                parts.setdefault(file_key(path, f"lora_{prefix}{tensor.removeprefix('lora_')}"), []).append(value)

    def values(key: str, spec: ParamSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
        found = [part.detach().to(device, copy=True) for part in parts[key]]
        if not key.endswith(PAIR):
            return found[0]  # bit for bit, so in its own dtype
        return torch.cat([part.to(dtype) for part in found], dim=1 if key.endswith(PAIR[1]) else 0)

    return cfg, name, sorted(targets.values(), key=lambda target: places[target.path]), changes, values


def _dtype(root: nn.Module, rounds: Sequence[_Pieces]) -> torch.dtype:
    """In which the factors of low-rank rounds are exact, and their coefficients as exact as the layer computes."""
    modules, found = dict(root.named_modules()), {torch.float32}
    for path, piece in (item for each in rounds for item in each.at.items()):
        found |= {piece.tensors[name].dtype for name in PAIR[:2] if isinstance(piece.here, int)}
        found |= {quant.stored(modules[path]).dtype} & {torch.float64}
    return reduce(torch.promote_types, found)
