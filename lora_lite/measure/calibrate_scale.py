"""calibrate_scale: the scale of an adapter at which its divergence from the base meets a budget."""

import itertools
import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

from loguru import logger
from torch import Tensor, nn

from ..core.adapter import adapters, get_adapter
from ..core.scaled import scaled
from ..core.validate import is_number
from ..errors import ConfigError
from .batches import Positions, check_several
from .evaluate import ROUNDING, divergences

STATISTICS = ("mean", "p95")
FIRST = 1.0  # the first c that is tried, or the limit if that is nearer to 0
FALL = 0.01  # a fall of the divergence by more than this fraction, as c grows, is no rounding


@dataclass(frozen=True)
class Calibrated:
    """The result of `calibrate_scale`.

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
        """The number of scales that were tried."""
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
    name         the adapter to scale, the others as they stand; None: all together
    limit        the furthest c; c = 0, where the divergence is 0, is the other end. A negative one is the other pole
    tolerance    the fraction of the target by which the divergence may miss it
    apply        leave the adapter's scale at c; otherwise it is afterwards as it was. It is so after an error, too
    batches, positions    as in `capture`; a generator is read once, into memory

    |c| doubles from 1 until the divergence is above the target; then the bracket is cut. Where the adapted model
    overflows, the divergence is infinite. The base runs once for each batch.

    Where the target can't be met (too little divergence up to the limit, or a jump over the target) or the divergence
    falls as c grows, nothing is raised: the result says so, and a warning is logged. Its c then is within the budget.

    Raises:
        ConfigError: for a bad argument or no batches.
        And all that `kl_divergence` and `scaled` raise.
    """
    _check(target_kl, statistic, limit, tolerance, max_evaluations)
    check_several(batches)
    batches = list(batches)
    base_side: dict[int, Tensor] = {}
    chosen = adapters(model).values() if name is None else [get_adapter(model, name)]

    def divergence(c: float) -> float:
        with scaled(model, c, name):
            kl = divergences(model, batches, name, positions, progress, base_side, overflow=True)  # (n,)
        if not kl.isfinite().all():
            return math.inf  # it overflows: c is too large
        return float(kl.quantile(0.95) if statistic == "p95" else kl.mean())

    points = find_root(divergence, target_kl, limit, tolerance=tolerance, max_evaluations=max_evaluations)
    result = result_of(points, target_kl, tolerance)
    if apply:
        for adapter in chosen:
            adapter.scale = result.c
    _report(result, limit, statistic)
    return result


def find_root(
    f: Callable[[float], float], target: float, limit: float, *, tolerance: float, max_evaluations: int
) -> dict[float, float]:
    """`root_search` with the values of f. Returns its points."""
    search = root_search(target, limit, tolerance=tolerance, max_evaluations=max_evaluations)
    try:
        x = next(search)
        while True:
            x = search.send(f(x))
    except StopIteration as end:
        points: dict[float, float] = end.value
        return points


def root_search(
    target: float, limit: float, *, tolerance: float, max_evaluations: int
) -> Generator[float, float, dict[float, float]]:
    """Search x between 0 and limit with f(x) = target > 0, for an f that grows from f(0) = 0 about with x²: yields x,
    and is sent f(x), so that whoever evaluates f can do other things in between.

    |x| doubles from FIRST until f is above the target. Then the bracket is cut where a line through the roots of f at
    its ends meets the root of the target. f may jump, fall, or be infinite, but not NaN. Returns {x: f(x)} in order: 0,
    which isn't evaluated, and every x that is. The last is within the tolerance, a fraction of the target, if any is.
    """
    points, low, high = {0.0: 0.0}, 0.0, None
    moved = ""  # the ends of the bracket that have moved: "l" or "h" each
    x = math.copysign(min(FIRST, abs(limit)), limit)
    while x not in points and len(points) <= max_evaluations:  # it comes again at the limit, or if f jumps over target
        points[x] = yield x
        if abs(points[x] - target) <= tolerance * target:
            break
        if points[x] < target:
            low, moved = x, moved + "l"
        else:
            high, moved = x, "" if high is None else moved + "h"
        if high is None:
            x = limit if abs(2 * x) > abs(limit) else 2 * x
            continue
        a, b = (math.sqrt(max(points[end], 0.0)) for end in (low, high))  # rounding may leave a divergence below 0
        part = min(max((math.sqrt(target) - a) / (b - a), 0.1), 0.9)  # each cut takes off a tenth at least
        if moved[-2:] in ("ll", "hh"):
            part = 0.5  # the same end was moved twice: a line through such a curve leads nowhere
        x = low + part * (high - low)
    return points


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


def result_of(points: dict[float, float], target: float, tolerance: float) -> Calibrated:
    """The point nearest to the target; if that misses it, the furthest one that is within the budget."""
    curve = sorted(points.items(), key=lambda point: abs(point[0]))
    c, kl = min(curve, key=lambda point: abs(point[1] - target))
    met = abs(kl - target) <= tolerance * target
    if not met:
        c, kl = [point for point in curve if point[1] <= target][-1]  # (0, 0) is one
    falls = any(b < a * (1 - FALL) - ROUNDING for (_, a), (_, b) in itertools.pairwise(curve))
    return Calibrated(c, kl, target, met, not falls, tuple(curve[1:]))


def _report(result: Calibrated, limit: float, statistic: str) -> None:
    line = f"{statistic} divergence {result.kl:.4g} at c = {result.c:.4g}, after {result.evaluations} evaluations"
    if not result.met:
        furthest, kl = result.curve[-1]
        is_too_small = furthest == limit and kl < result.target
        why = f"at c = {limit:g} it is {kl:.4g}" if is_too_small else "it jumps, or max_evaluations is too small"
        logger.warning(f"no c with a divergence of {result.target:g} was found: {why}\n  {line}")
    if not result.monotone:
        points = ", ".join(f"{kl:.3g} at {c:.3g}" for c, kl in result.curve)
        logger.warning(f"the divergence falls as c grows: {points}\n  other c may meet {result.target:g} as well")
    if result.met and result.monotone:
        logger.info(line)
