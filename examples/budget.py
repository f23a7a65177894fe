"""A time budget: one of each thing is timed on this machine, and how many are done is fitted to the time."""

import time
from collections.abc import Callable

import torch
from loguru import logger

MARGIN = 0.9
"""The share of the time that is planned. The rest is for delays, and for what isn't measured, such as pictures."""

WARM = 1.0
"""Seconds: a call that takes less is measured again, since the first may have warmed up."""


class Budget:
    """Minutes of wall-clock time, which run from when this is made."""

    def __init__(self, minutes: float) -> None:
        self.minutes, self.started = minutes, time.perf_counter()

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self.started

    def plan(self, later: float = 0.0) -> "Plan":
        """A plan for what is left, but for `later`: seconds for what comes after what is planned."""
        return Plan(self.minutes, MARGIN * 60 * self.minutes - self.spent - later)


class Plan:
    """How many of each part of a run fit in some seconds: a part gets a share of what those before it have left."""

    def __init__(self, minutes: float, seconds: float) -> None:
        self.minutes, self.seconds, self.parts = minutes, seconds, list[str]()

    def fits(self, each: float, most: int, least: int = 1, share: float = 1.0) -> int:
        """How many things of `each` seconds a share of the time pays for, within the bounds."""
        paid = share * max(self.seconds, 0.0)
        affordable = most if each == 0 else min(most, int(paid / each))
        return max(least, affordable)

    def take(
        self, what: str, each: float, most: int, least: int = 1, share: float = 1.0, given: int | None = None
    ) -> int:
        """How many are done, `given` where that is said. Their time is no longer left."""
        count = self.fits(each, most, least, share) if given is None else given
        self.seconds -= count * each
        self.parts.append(f"{count} {what} {'as asked' if given is not None else f'at {each:.2g} s'}")
        return count

    def log(self) -> None:
        """One line of what was chosen and why, and a warning if that takes longer than there is time."""
        logger.info(f"for --minutes {self.minutes:g}: {', '.join(self.parts)}")
        if self.seconds < 0:
            logger.warning(f"that takes about {-self.seconds / 60:.1f} minutes more than --minutes {self.minutes:g}")


def seconds_of(run: Callable[[], object]) -> float:
    """The seconds that a call takes; of a quick one, the second call."""
    seconds = _timed(run)
    return seconds if seconds > WARM else _timed(run)


def seconds_of_one(run: Callable[[int], object], most: int) -> float:
    """The seconds that each of `most` takes that are done at once. `run(1)` is timed first, and `run(most)` only where
    that is quick: many at once may need more memory and time than there is."""
    alone = seconds_of(lambda: run(1))
    return alone if most == 1 or alone > WARM else seconds_of(lambda: run(most)) / most


def _timed(run: Callable[[], object]) -> float:
    started = _now()
    run()
    return _now() - started


def _now() -> float:
    """The clock's seconds, once the accelerator, if any, has done what was asked of it: a call only starts it."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
