"""The statistics of the arena: differences of two methods, paired by token, with intervals, and Pareto lines.

Two methods are measured on the same tokens, and seed s gives both the same batches in the same order. So what a hard
row, or a lucky order, does to both cancels in the difference. What doesn't is of two sources:

    rows    another sample of texts gives other differences. Tokens of one row aren't independent, so rows are
            drawn anew (bootstrap), each with all its tokens
    seeds   another seed gives another adapter. The differences of S seeds give a standard error, with a t
            distribution of S - 1 degrees of freedom: three seeds drawn anew would give 0.4 of the width

Both are drawn together, and 95 % of the draws are the interval. One seed says nothing of other seeds: its interval is
of that one adapter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Losses = Mapping[int, NDArray[np.float32]]
"""By seed: the loss of each token, row after row."""

DRAWS, LEVEL = 4000, 0.95


@dataclass(frozen=True)
class Difference:
    """A method's mean loss per token less the reference's, in nats, with the interval. seeds: how many both have."""

    value: float
    low: float
    high: float
    seeds: int

    @property
    def verdict(self) -> str:
        """The method beside the reference: less loss is better. One seed alone tells nothing of a method."""
        if self.seeds == 1 and np.isfinite(self.value):
            return "one seed"
        return "better" if self.high < 0 else "worse" if self.low > 0 else "not apart"


class Point(NamedTuple):
    """A method in a picture of loss against cost; the cost's interval, which has no width if it is exact."""

    name: str
    low: float
    cost: float
    high: float
    losses: Losses


def difference(method: Losses, reference: Losses, rows: Sequence[int], draws: int = DRAWS) -> Difference:
    """Paired by token and by seed. rows: the tokens of each row. An infinite loss, of a seed that diverged, gives an
    infinite difference. Raises ValueError without a seed that both have."""
    seeds = sorted(method.keys() & reference.keys())
    if not seeds:
        raise ValueError(f"no common seed: {sorted(method)} and {sorted(reference)}")
    tokens = np.asarray(rows, dtype=np.float64)  # (n,)
    starts = np.concatenate([[0], np.cumsum(rows)[:-1]])
    pairs = [method[seed].astype(np.float64) - reference[seed] for seed in seeds]
    sums = np.stack([np.add.reduceat(pair, starts) for pair in pairs])  # (seeds, n)
    by_seed = sums.sum(1) / tokens.sum()  # (seeds,)
    value = float(by_seed.mean())
    if not np.isfinite(value):
        return Difference(value, value, value, len(seeds))
    random = np.random.default_rng(0)
    times = random.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=draws)  # (draws, n)
    of_rows = (times @ sums.mean(0)) / (times @ tokens) - value  # (draws,)
    of_rows *= np.sqrt(len(rows) / max(1, len(rows) - 1))  # rows drawn anew vary less than rows do
    of_seeds = np.zeros(draws)
    if len(seeds) > 1:
        error = by_seed.std(ddof=1) / np.sqrt(len(seeds))
        of_seeds = error * random.standard_t(len(seeds) - 1, size=draws)
    low, high = np.quantile(value + of_rows + of_seeds, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(value, float(low), float(high), len(seeds))


def pareto(points: Sequence[Point], rows: Sequence[int]) -> list[str]:
    """The names on the line, from the cheapest: each beats all cheaper ones on it by more than the interval.

    Of two whose costs are not apart, the one with the lower loss alone stays.
    """
    line: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, mean_loss(point.losses))):
        if all(difference(point.losses, other.losses, rows).verdict == "better" for other in line):
            while line and line[-1].high >= point.low:
                line.pop()
            line.append(point)
    return [point.name for point in line]


def mean_loss(losses: Losses) -> float:
    """Per token, over all seeds."""
    return float(np.mean([loss.mean(dtype=np.float64) for loss in losses.values()]))
