"""Who takes part in the arena, and how: a method that is registered takes part by its class's defaults.

What differs from them is in the tables here, one line each; so is what PEFT has of the same.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from learning_rates import LEARNING_RATES, OTHER

import lora_lite as ll

Fields = dict[str, Any]

REFERENCE = "lora"

FIELDS: dict[str, Fields | Callable[[int], Fields]] = {
    "adalora": lambda steps: {"total_step": steps, "tinit": steps // 10, "tfinal": steps // 3},
    "rslora": {"variant": "lora", "rslora": True},
    "c3a": {"block_size": 64},
}
"""Fields that differ from the defaults, or a function of the number of steps that gives them. A name that isn't a
variant's says which one it is."""

RANKED: dict[str, Callable[[int], Fields] | None] = {
    "adalora": lambda r: {"init_r": math.ceil(1.5 * r), "target_r": r},
    "vera": None,
    "ssteer": None,
    "antipasto": None,
    "fourierft": lambda r: {"n_frequency": 1500 * r},  # of a layer of 576 and 1536 channels, LoRA has 2112 r
    "waveft": lambda r: {"n_frequency": 1500 * r},
    "gralora": lambda r: {"r": r, "alpha": 2.0 * r},
    "loha": lambda r: {"r": r, "alpha": float(r)},
    "lokr": lambda r: {"r": r, "alpha": float(r)},
    **dict.fromkeys(("adamss", "pvera", "randlora", "tinylora", "unilora", "vblora")),
}
"""The fields of a rank, where these aren't just r; None: it keeps its default, since one that makes as many parameters
as LoRA's would be larger than the layers."""

RATES: dict[str, float] = {
    **dict.fromkeys(("full", "osf", "frod"), 1e-4),
    **dict.fromkeys(("lora", "dora", "hira", "miss", "gralora", "loha", "lokr", "peanut", "hra", "shira"), 2e-3),
    **dict.fromkeys(("vera", "pvera", "norm", "bias", "beft", "road", "boft", "waveft", "c3a"), 1e-2),
    "delora": 1e-3,
    **dict.fromkeys(("fourierft", "vblora", "unilora", "tinylora"), 3e-2),
}
"""Where the search for a learning rate starts, if that isn't the demo's (examples/learning_rates.py)."""

SAME_START = {"pissa", "ssteer", "antipasto"}
"""Variants that start from an SVD of the weights, the same for each seed: computed once, and loaded after that."""

RANKS = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128)
"""Those that are tried to come near a number of parameters."""


@dataclass(frozen=True)
class Entrant:
    """A method with its fields. rank: as it was chosen; None for a method without one, or with its default."""

    name: str
    variant: str
    fields: Callable[[int], Fields]
    rank: int | None = None

    def config(self, steps: int) -> Any:
        """Raises ConfigError."""
        config: Any = ll.config_for(self.variant)
        return config(**{"variant": self.variant, **self.fields(steps)})

    @property
    def rate(self) -> float:
        """The learning rate at which the search starts."""
        rate = LEARNING_RATES.get(self.variant) or OTHER
        return RATES.get(self.name, RATES.get(self.variant, rate))


def names() -> list[str]:
    """All that are trained: those that are registered, and those of the table, the reference first."""
    trained = [name for name in ll.REGISTRY if LEARNING_RATES.get(name, OTHER) is not None]
    return [REFERENCE, *(name for name in dict.fromkeys([*trained, *FIELDS]) if name != REFERENCE)]


def entrant(name: str, rank: int | None = None) -> Entrant:
    """By name; with a rank, if it has one. Raises VariantError for an unknown name."""
    given = FIELDS.get(name, {})
    variant = given.get("variant", name) if isinstance(given, Mapping) else name
    ll.config_for(variant)
    ranked = None if rank is None else fields_of_rank(name, variant)
    chosen = {} if ranked is None or rank is None else ranked(rank)
    return Entrant(name, variant, partial(_fields, given, chosen), None if ranked is None else rank)


def fields_of_rank(name: str, variant: str) -> Callable[[int], Fields] | None:
    """The function of a rank that gives the fields, or None for a method without one."""
    for key in (name, variant):
        if key in RANKED:
            return RANKED[key]
    has_rank = "r" in {field.name for field in fields(ll.config_for(variant))}
    return (lambda r: {"r": r}) if has_rank else None


def of_parameters(name: str, model: Any, parameters: int) -> Entrant:
    """With the rank that makes it nearest to a number of trainable parameters, by their ratio; one without a rank as
    it is. Raises LoraLiteError for a method that can't go on this model."""
    plain = entrant(name)
    if fields_of_rank(name, plain.variant) is None:
        ll.plan(model, plain.config(100))
        return plain
    distances: dict[int, float] = {}
    for rank in RANKS:
        try:
            count = ll.plan(model, entrant(name, rank).config(100)).parameters
        except ll.ConfigError as error:  # a layer is too small for this rank, or the method wants more than a rank
            last = error
            continue
        distances[rank] = abs(math.log(count / parameters))
    if not distances:
        raise last
    return entrant(name, min(distances, key=lambda rank: distances[rank]))


def swept(name: str, model: Any, ranks: Sequence[int], parameters: int) -> list[Entrant]:
    """At each of these ranks, under a name that says so; one without a rank once."""
    plain = entrant(name)
    if fields_of_rank(name, plain.variant) is None:
        return [of_parameters(name, model, parameters)]
    members = [entrant(name, rank) for rank in ranks]
    for member in members:
        ll.plan(model, member.config(100))
    return [Entrant(f"{name} r={member.rank}", member.variant, member.fields, member.rank) for member in members]


def source_of(variant: str) -> str:
    """A hash of the method's file: an edit of it makes its results old."""
    file = inspect.getsourcefile(ll.config_for(variant))
    return hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()[:16]


def _fields(given: Fields | Callable[[int], Fields], chosen: Fields, steps: int) -> Fields:
    return {**(given(steps) if callable(given) else given), **chosen}
