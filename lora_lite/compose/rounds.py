"""The config of a history: the rounds that it keeps, in their order, and the part of each at a layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from ..core.config import BaseConfig
from ..core.validate import is_name, is_number
from ..core.variant import config_for

LONGEST_LABEL = 100
MOST_ROUNDS = 256  # a file may be anyone's, and each of its layers is looked up in all rounds


@dataclass(frozen=True)
class RoundEntry:
    """One round: its label in the history, its coefficient, and the config that it was trained with."""

    label: str
    c: float
    config: BaseConfig


class OwnMethod(NamedTuple):
    """A round that acts at a layer by its own method: `lora_A` is `lora_<prefix>_A` there."""

    prefix: str
    cfg: BaseConfig
    c: float


@dataclass(frozen=True, kw_only=True)
class HistoryConfig(BaseConfig):
    """The config of a history, which `lora_lite.freeze_into` makes.

    rounds  a RoundEntry, or its fields as a mapping, for each round in the order kept
    here    label -> what the round is at a layer: of a low-rank change its rank, that is how many columns of the common
            pair of products are its own; of any other method the fields of its config that differ there. A round that
            isn't named is not on the layer
    """

    variant: str = "history"
    rounds: Sequence[Any] = ()
    here: Mapping[str, Any] = field(default_factory=dict, hash=False)
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (*BaseConfig.SAME_AT_ALL_LAYERS, "rounds")
    # A layer's work, in order: columns of the pair of products, consecutive rounds at once; other methods.
    steps: ClassVar[tuple[slice | OwnMethod, ...]]
    own_methods: ClassVar[
        tuple[OwnMethod, ...]
    ]  # the rounds that act by their own method; a prefix is the round's number
    columns: ClassVar[dict[str, slice]]  # label of a low-rank round -> its columns of the pair of products
    coefficients: ClassVar[tuple[float, ...]]  # c of each column

    def __post_init__(self) -> None:
        self.require(isinstance(self.rounds, list | tuple), "rounds", "a list of rounds")
        self.require(len(self.rounds) <= MOST_ROUNDS, "rounds", f"at most {MOST_ROUNDS}")
        object.__setattr__(self, "rounds", tuple(map(self._as_entry, self.rounds)))
        entries = {entry.label: entry for entry in self.rounds}
        self.require(len(entries) == len(self.rounds), "rounds", "labels of which no two are alike")
        is_known = isinstance(self.here, Mapping) and self.here.keys() <= entries.keys()
        self.require(is_known, "here", "{label of a round: rank, or fields}")
        parts = {label: self._rank_or_fields(entries[label], value) for label, value in self.here.items()}
        object.__setattr__(self, "here", parts)
        self._set_steps()
        super().__post_init__()

    @property
    def rank(self) -> int:
        """The rank of the pair of products."""
        return len(self.coefficients)

    def _set_steps(self) -> None:
        steps: list[slice | OwnMethod] = []
        columns: dict[str, slice] = {}
        coefficients: list[float] = []
        for number, entry in enumerate(self.rounds, 1):
            part, last = self.here.get(entry.label), steps[-1] if steps else None
            if isinstance(part, int):
                columns[entry.label] = slice(len(coefficients), len(coefficients) + part)
                coefficients += [entry.c] * part
                if isinstance(last, slice):  # two products for all of them, instead of two each
                    steps[-1] = slice(last.start, len(coefficients))
                else:
                    steps.append(columns[entry.label])
            elif part is not None:
                steps.append(OwnMethod(str(number), entry.config.with_overrides(part), entry.c))
        own_methods = tuple(step for step in steps if isinstance(step, OwnMethod))
        # Once and not as properties: a config is read at every forward.
        vars(self).update(
            steps=tuple(steps), own_methods=own_methods, columns=columns, coefficients=tuple(coefficients)
        )

    def _as_entry(self, value: Any) -> RoundEntry:
        if isinstance(value, RoundEntry):
            return value
        ok = isinstance(value, Mapping) and value.keys() == {"label", "c", "config"}
        ok = ok and is_name(value["label"]) and len(value["label"]) <= LONGEST_LABEL and is_number(value["c"])
        ok = ok and isinstance(value["config"], Mapping) and isinstance(value["config"].get("variant"), str)
        self.require(ok, "rounds", "a label, a finite c and a config for each")
        cls = config_for(value["config"]["variant"])
        self.require(not issubclass(cls, HistoryConfig), "rounds", "no history within a history")
        return RoundEntry(value["label"], float(value["c"]), cls.from_dict(value["config"]))

    def _rank_or_fields(self, entry: RoundEntry, value: Any) -> Any:
        if isinstance(value, Mapping):
            return entry.config.checked_overrides(value)
        self.require(type(value) is int and 0 < value < 2**31, "here", "a rank of at least 1, or fields, for each")
        return value

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {
            "rounds": [vars(entry) | {"config": entry.config.to_dict()} for entry in self.rounds]
        }
