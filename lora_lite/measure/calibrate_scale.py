"""How far an adapter can be turned up within a budget of divergence from the base."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from loguru import logger
from torch import Tensor, nn

from ..core.adapter import adapters, get_adapter, scaled
from ..core.validate import is_number
from ..errors import ConfigError
from .batches import Positions, check_several
from .evaluate import ROUNDING, divergences

STATISTICS = ("mean", "p95")
FIRST = 1.0
"""The first c that is tried, or the limit if that is nearer to 0."""
FALL = 0.01
"""Of a divergence: a fall beyond it as c grows is no rounding."""


@dataclass(frozen=True)
class Calibrated:
    """What `calibrate_scale` found.

    c          the coefficient; the largest seen within the budget, if it could not be met
    kl         the statistic of the divergences at c, in nats
    target     the budget that was asked for
    met        is kl within the tolerance of the target?
    monotone   did the divergence grow with |c| all over the curve? If not, other c may meet the target as well
    curve      (c, kl) of every evaluation, by |c|
    """

    c: float
    kl: float
    target: float
    met: bool
    monotone: bool
    curve: tuple[tuple[float, float], ...]

    @property
    def evaluations(self) -> int:
        """How many scales were tried."""
        return len(self.curve)


def calibrate_scale(
    model: nn.Module,
    batches: Iterable[Any],
    target_kl: float,
    *,
    statistic: str = "mean",
    name: str | None = None,
    limit: float = 8.0,
    tolerance: float = 0.02,
    max_evaluations: int = 30,
    positions: Positions = "last",
    apply: bool = False,
    progress: bool = False,
) -> Calibrated:
    """The coefficient c at which KL(base ‖ adapted) on these batches is target_kl nats, by bisection.

    statistic    of the divergences at the positions looked at: their "mean", or "p95", their 95 % quantile
    name         of the adapter to turn, the others as they stand; None: all together
    limit        how far to look from c = 0, where the divergence is 0; a negative one looks at the other pole
    tolerance    of the target, at which to stop
    apply        leave the adapter's scale at c; otherwise it is afterwards as it was. It is so after an error, too
    batches, positions    as in `capture`; a generator is read once, into memory

    |c| doubles from 1 until the divergence is above the target. Then the bracket is cut where its root, about linear in
    c, would meet the target, but never nearer to an end than a tenth; in the middle, if the same end has moved twice.
    Where the adapted model overflows, the divergence is infinite. The base runs once for each batch.

    Where the target can't be met (too little divergence up to the limit, or a jump over the target) or the divergence
    falls as c grows, nothing is raised: the result says so, and a warning is logged. Its c then is within the budget.

    Raises ConfigError for a bad argument or no batches, and what `kl_divergence` and `scaled` raise.
    """
    _check(target_kl, statistic, limit, tolerance, max_evaluations)
    check_several(batches)
    kept = list(batches)
    base_side: dict[int, Tensor] = {}
    names = list(adapters(model)) if name is None else [get_adapter(model, name).name]
    seen: dict[float, float] = {}

    def at(c: float) -> float:
        with scaled(model, c, name):
            kl = divergences(model, kept, name, positions, progress, base_side, overflow=True)
        seen[c] = float(kl.quantile(0.95) if statistic == "p95" else kl.mean()) if kl.isfinite().all() else math.inf
        return seen[c]

    def going_on() -> bool:
        met = any(abs(kl - target_kl) <= tolerance * target_kl for kl in seen.values())
        return not met and len(seen) < max_evaluations

    low, kl_low = 0.0, 0.0
    high = math.copysign(min(FIRST, abs(limit)), limit)
    while (kl_high := at(high)) < target_kl and high != limit and going_on():
        low, kl_low = high, kl_high
        high = limit if abs(2 * high) > abs(limit) else 2 * high
    ends = ""
    while kl_high > target_kl and going_on():
        a, b = (math.sqrt(max(kl, 0.0)) for kl in (kl_low, kl_high))
        part = min(max((math.sqrt(target_kl) - a) / (b - a), 0.1), 0.9)
        if ends[-2:] in ("ll", "hh"):
            part = 0.5  # the same end was moved twice: a line through such a curve leads nowhere
        middle = low + part * (high - low)
        if middle in (low, high):
            break  # a jump between neighbouring numbers
        if (kl := at(middle)) < target_kl:
            low, kl_low, ends = middle, kl, ends + "l"
        else:
            high, kl_high, ends = middle, kl, ends + "h"
    found = _result(seen, target_kl, tolerance)
    if apply:
        for each in names:
            get_adapter(model, each).scale = found.c
    _report(found, limit, statistic)
    return found


def _check(target_kl: Any, statistic: Any, limit: Any, tolerance: Any, max_evaluations: Any) -> None:
    for field, got, ok, wanted in (
        ("target_kl", target_kl, is_number(target_kl) and target_kl > ROUNDING, "a number of nats above 1e-5"),
        ("statistic", statistic, statistic in STATISTICS, f"one of {STATISTICS}"),
        ("limit", limit, is_number(limit) and limit != 0, "a finite number, below 0 for the other pole"),
        ("tolerance", tolerance, is_number(tolerance) and 0 < tolerance < 1, "a fraction of the target"),
        ("max_evaluations", max_evaluations, type(max_evaluations) is int and max_evaluations > 0, "at least 1"),
    ):
        if not ok:
            raise ConfigError(f"calibrate_scale({field}={got!r}): wanted {wanted}")


def _result(seen: dict[float, float], target: float, tolerance: float) -> Calibrated:
    curve = sorted(({0.0: 0.0} | seen).items(), key=lambda point: abs(point[0]))
    within = [c for c, kl in curve if kl <= target]
    c, kl = min(curve, key=lambda point: abs(point[1] - target))
    met = abs(kl - target) <= tolerance * target
    if not met:
        c = within[-1]
        kl = dict(curve)[c]
    falls = any(b < a * (1 - FALL) - ROUNDING for (_, a), (_, b) in itertools.pairwise(curve))
    return Calibrated(c, kl, target, met, not falls, tuple(curve[1:]))


def _report(found: Calibrated, limit: float, statistic: str) -> None:
    line = f"{statistic} divergence {found.kl:.4g} at c = {found.c:.4g}, after {found.evaluations} evaluations"
    if not found.met:
        furthest, kl = found.curve[-1]
        short = furthest == limit and kl < found.target
        why = f"at c = {limit:g} it is {kl:.4g}" if short else "it jumps, or max_evaluations is too small"
        logger.warning(f"no c with a divergence of {found.target:g} was found: {why}\n  {line}")
    if not found.monotone:
        points = ", ".join(f"{kl:.3g} at {c:.3g}" for c, kl in found.curve)
        logger.warning(f"the divergence falls as c grows: {points}\n  other c may meet {found.target:g} as well")
    if found.met and found.monotone:
        logger.info(line)
