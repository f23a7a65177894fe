"""The config of a history: the rounds that it keeps, in their order, and what each of them is at a layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..core.config import BaseConfig
from ..core.validate import is_name, is_number
from ..core.variant import config_for

LONGEST_LABEL = 100
MOST_ROUNDS = 256
"""A file may be anyone's, and each of its layers is looked up in all rounds."""


@dataclass(frozen=True)
class Kept:
    """One round: its label in the history, its coefficient, and the config that it was trained with."""

    label: str
    c: float
    config: BaseConfig

    def to_dict(self) -> dict[str, Any]:
        return {"label": self.label, "c": self.c, "config": self.config.to_dict()}


@dataclass(frozen=True)
class Whole:
    """A round that acts at a layer by its own method: its config there; `prefix` is in the names of its tensors."""

    prefix: str
    config: BaseConfig
    c: float


@dataclass(frozen=True, kw_only=True)
class RoundsConfig(BaseConfig):
    """Made by `lora_lite.freeze_into`.

    rounds  a Kept, or its fields as a mapping, for each round in the order kept
    here    label -> what the round is at a layer: of a low-rank change its rank, that is how many columns of the common
            pair of products are its own; of any other method the fields of its config that differ there. A round that
            isn't named is not on the layer
    """

    rounds: Sequence[Any] = ()
    here: Mapping[str, Any] = field(default_factory=dict, hash=False)
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (*BaseConfig.SAME_AT_ALL_LAYERS, "rounds")
    steps: ClassVar[tuple[slice | Whole, ...]]
    """What happens at a layer, in order: columns of the pair of products, consecutive rounds at once; other methods."""
    whole: ClassVar[tuple[Whole, ...]]
    """Of these, the rounds that act by their own method."""
    rank: ClassVar[int]
    """Of the pair of products."""
    coefficients: ClassVar[tuple[float, ...]]
    """c of each of its columns."""

    def __post_init__(self) -> None:
        self.require(isinstance(self.rounds, list | tuple), "rounds", "a list of rounds")
        self.require(len(self.rounds) <= MOST_ROUNDS, "rounds", f"at most {MOST_ROUNDS}")
        object.__setattr__(self, "rounds", tuple(map(self._as_kept, self.rounds)))
        known = {kept.label: kept for kept in self.rounds}
        self.require(len(known) == len(self.rounds), "rounds", "labels of which no two are alike")
        ok = isinstance(self.here, Mapping) and self.here.keys() <= known.keys()
        self.require(ok, "here", "{label of a round: rank, or fields}")
        here = {label: self._as_here(known[label], what) for label, what in self.here.items()}
        object.__setattr__(self, "here", here)
        steps = tuple(self._steps())  # of a config that is read at every forward
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "whole", tuple(step for step in steps if isinstance(step, Whole)))
        ranks = [(kept.c, here.get(kept.label)) for kept in self.rounds]
        columns = tuple(c for c, rank in ranks if isinstance(rank, int) for _ in range(rank))
        object.__setattr__(self, "coefficients", columns)
        object.__setattr__(self, "rank", len(columns))
        super().__post_init__()

    def columns(self) -> dict[str, slice]:
        """Which columns of the pair of products at a layer are whose."""
        found, stop = {}, 0
        for label in (kept.label for kept in self.rounds if isinstance(self.here.get(kept.label), int)):
            start, stop = stop, stop + self.here[label]
            found[label] = slice(start, stop)
        return found

    def prefix(self, label: str) -> str:
        """What the names of a round's tensors have after `lora_`, if it acts by its own method: its number."""
        return next(str(number) for number, kept in enumerate(self.rounds, 1) if kept.label == label)

    def _steps(self) -> list[slice | Whole]:
        steps: list[slice | Whole] = []
        columns = self.columns()
        for number, kept in enumerate(self.rounds, 1):
            last = steps[-1] if steps else None
            if kept.label in columns and isinstance(last, slice):
                steps[-1] = slice(last.start, columns[kept.label].stop)
            elif kept.label in columns:
                steps.append(columns[kept.label])
            elif kept.label in self.here:
                steps.append(Whole(str(number), kept.config.with_overrides(self.here[kept.label]), kept.c))
        return steps

    def _as_kept(self, value: Any) -> Kept:
        if isinstance(value, Kept):
            return value
        ok = isinstance(value, Mapping) and value.keys() == {"label", "c", "config"}
        ok = ok and is_name(value["label"]) and len(value["label"]) <= LONGEST_LABEL and is_number(value["c"])
        ok = ok and isinstance(value["config"], Mapping) and isinstance(value["config"].get("variant"), str)
        self.require(ok, "rounds", "a label, a finite c and a config for each")
        cls = config_for(value["config"]["variant"])
        self.require(not issubclass(cls, RoundsConfig), "rounds", "no history within a history")
        return Kept(value["label"], float(value["c"]), cls.from_dict(value["config"]))

    def _as_here(self, kept: Kept, what: Any) -> Any:
        if isinstance(what, Mapping):
            return kept.config.checked_overrides(what)
        self.require(type(what) is int and 0 < what < 2**31, "here", "a rank of at least 1, or fields, for each")
        return what

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"rounds": [kept.to_dict() for kept in self.rounds]}
