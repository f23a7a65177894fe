"""One layer of a combination: changes of its weight summed by a recipe, and the sum as the tensors of an adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.change import Change, total
from ..core.validate import is_number
from ..errors import ConfigError
from ..ops.svd import Svd, balanced_factors, energy_rank
from .sparse_sums import RULES

HOW = ("exact", "svd", *RULES)


@dataclass(frozen=True)
class Recipe:
    """How to combine, with every argument found right."""

    how: str = "exact"
    rank: int | None = None
    energy: float | int | None = None
    density: float | int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        how = self.how
        self._require(how in HOW, "how", f"one of {HOW}")
        self._require(self.rank is None or (type(self.rank) is int and self.rank > 0), "rank", "1 at least, or None")
        for name in ("energy", "density"):
            value = getattr(self, name)
            self._require(value is None or (is_number(value) and 0 < value <= 1), name, "above 0, at most 1, or None")
        self._require(self.seed is None or (type(self.seed) is int and self.seed >= 0), "seed", "0 or more, or None")
        bounds = [name for name in ("rank", "energy") if getattr(self, name) is not None]
        if len(bounds) > 1 or (how == "svd" and not bounds) or (how == "exact" and bounds):
            wanted = {"exact": "neither", "svd": "one of them"}.get(how, "one of them, or neither")
            raise ConfigError(f"how={how!r} with rank={self.rank}, energy={self.energy}: wanted {wanted}")
        wanted = f"a number with {', '.join(RULES)}, None with others"
        self._require((self.density is None) == (how not in RULES), "density", wanted)
        self._require(self.seed is None or how == "dare", "seed", "None, but for how='dare'")

    def _require(self, ok: bool, name: str, wanted: str) -> None:
        if not ok:
            raise ConfigError(f"combine(how={self.how!r}, {name}={getattr(self, name)!r}): wanted {name} {wanted}")

    @property
    def is_bounded(self) -> bool:
        """Is the result of low rank, whatever the changes are?"""
        return self.rank is not None or self.energy is not None

    def sum(self, changes: Sequence[Change], generator: torch.Generator) -> Change:
        """The sum of the changes of one matrix, each with its weight in it."""
        if self.density is None:
            return total(changes)
        rule, density = RULES[self.how], self.density
        delta = rule([change.delta for change in changes], density, generator)
        if all(change.shift is None for change in changes):
            return Change(None, delta)
        # A constant is a vector of the task, too: where an adapter has none, it is 0.
        shifts = [delta.new_zeros(len(delta)) if change.shift is None else change.shift for change in changes]
        return Change(None, delta, rule(shifts, density, generator))

    def rank_of(self, svd: Svd) -> int:
        """How many of these directions stay."""
        if self.rank is not None:
            return min(self.rank, len(svd[1]))
        return energy_rank(svd[1], 1.0 if self.energy is None else self.energy)


class Part(NamedTuple):
    """The combination at one layer: a lora's tensors or a full's, ‖its error‖ and ‖the change itself‖."""

    variant: str
    tensors: dict[str, Tensor]
    error: float
    norm: float


def part_of(change: Change, recipe: Recipe, has_bias: bool, dtype: torch.dtype) -> Part:
    """A change as the tensors of a lora or of a full, with the error that they have as they are stored."""
    shift = change.shift
    has_no_place = shift is not None and not has_bias  # full has no place for it: then a lora of all directions
    bias = {} if shift is None else {"lora_bias": shift.to(dtype)}
    if change.b.ndim == 1 or (change.a is None and not recipe.is_bounded and not has_no_place):
        weight = change.b.to(dtype)
        bias = {"lora_bias": torch.zeros(len(weight)).to(weight)} | bias if has_bias else bias
        error, norm = float((change.b - weight.double()).norm()), float(change.b.norm())
        return Part("full", {"lora_weight": weight} | bias, error, norm)
    if change.a is not None and not recipe.is_bounded:
        factors = change.a, change.b
    else:
        factors = balanced_factors(svd := change.svd(), recipe.rank_of(svd))
    a, b = (factor.to(dtype) for factor in factors)  # (r, i), (o, r)
    norm = change.norm()
    error = change.distance(a, b) if norm else 0.0  # of an adapter less itself all that is left is rounding
    return Part("lora", {"lora_A": a, "lora_B": b} | bias, error, norm)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Those of experts as one: factors of a smaller rank get directions of zeros, on which nothing depends."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    stack = tensors[0].new_zeros(len(tensors), *shape)
    for row, tensor in zip(stack, tensors, strict=True):
        row[tuple(map(slice, tensor.shape))] = tensor
    return stack
