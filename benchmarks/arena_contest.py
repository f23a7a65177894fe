"""The order of the arena's trials, how many steps fit into the time, and what is left of it.

Costs are measured first: from them follows how long a trial takes. Then each method, the reference first, has its
learning rate tuned, by the same number of trials for all, and is trained from all seeds: a run that ends early has
compared the first ones. The view at equal time comes last.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from arena_costs import base_costs, costs
from arena_methods import Entrant
from arena_report import Result
from arena_task import token_losses
from arena_trials import Arena, Record, Trial, losses_of, read, write
from loguru import logger

import lora_lite as ll

TUNING_SEED = 0
"""Of the trials that choose a learning rate. The seeds that are compared begin after it."""

LEAST_STEPS, MOST_STEPS = 8, 400
MARGIN = 0.9
"""The share of the time that is planned."""

SCALES = 4
"""That are tried to meet a KL budget, about."""

SAME_TIME = 0.03
"""A step whose time differs from the reference's by less counts as equal: it is noise."""


@dataclass(frozen=True)
class Settings:
    """minutes: no new trial begins that would end later; None for no limit. steps: None to fit them to the minutes."""

    reference: Entrant
    trials: int = 5
    seeds: int = 3
    steps: int | None = None
    minutes: float | None = None
    kl_budget: float = 0.05
    is_timed: bool = True


def next_power(losses: Mapping[int, float], centre: int) -> int:
    """The next half-decade k to try, a rate of 10^(k/2): the centre and its neighbours, then one beyond the better end.

    So if the best is at an end, the grid goes on there. If it isn't, the trial is made all the same: all have as many.
    """
    for power in (centre, centre + 1, centre - 1):
        if power not in losses:
            return power
    low, high = min(losses), max(losses)
    best = min(losses, key=lambda power: losses[power])
    if best in (low, high):
        return low - 1 if best == low else high + 1
    return low - 1 if losses[low] <= losses[high] else high + 1


@dataclass
class Contest:
    arena: Arena
    entrants: Sequence[Entrant]
    settings: Settings
    left_out: dict[str, str] = field(default_factory=dict)
    costs: dict[str, Record] = field(default_factory=dict)
    steps: int = 0
    started: float = field(default_factory=time.perf_counter)
    _expected: float = 0.0  # seconds of all that is still to be done, at the speed at which costs were measured
    _speed: tuple[float, float] = (0.0, 0.0)  # seconds of new trials: as they took, as they were expected to take
    _done: int = 0
    _row_seconds: float = 0.0

    def run(self) -> list[Result]:
        """Everything, or as much as there is time for. Ctrl-C ends it as the time does."""
        results: dict[str, Result] = {}
        try:
            self._measure_costs()
            if self.settings.reference.name not in self.costs:
                return []
            self.steps = self._planned()
            for entrant in self._present():
                with self._leaving_out(entrant):
                    if (tuned := self._tuned(entrant)) is not None:
                        results[entrant.name] = tuned
                        self._compared(entrant, tuned, "parameters")
            for entrant in self._present() if self.settings.is_timed else ():
                with self._leaving_out(entrant):
                    if entrant.name in results:
                        self._compared(entrant, results[entrant.name], "time")
        except KeyboardInterrupt:
            logger.warning("stopped: the same command goes on from here")
        return list(results.values())

    def rows(self) -> list[int]:
        """The tokens of each held-out row."""
        return [len(row.completion) for row in self.arena.task.held_out]

    # ---- parts ----------------------------------------------------------------------------------

    def _measure_costs(self) -> None:
        base_costs(self.arena)
        tuning = self.arena.task.tuning
        started = time.perf_counter()
        token_losses(self.arena.base, tuning, self.arena.task.pad)
        self._row_seconds = (time.perf_counter() - started) / len(tuning)
        for i, entrant in enumerate(self.entrants, 1):
            if self._is_over(0.0):
                self.left_out[entrant.name] = "no time to measure what it costs"
                continue
            with self._leaving_out(entrant):
                record = self.costs[entrant.name] = costs(self.arena, entrant, self.settings.reference)
                logger.info(
                    f"costs [{i}/{len(self.entrants)}] {entrant.name}: a step takes {record['step_seconds']:.2f} s, "
                    f"{record['step_ratio']:.2f} of {self.settings.reference.name}'s"
                )

    @contextmanager
    def _leaving_out(self, entrant: Entrant) -> Iterator[None]:
        """A method that fails is told of, and the others go on."""
        try:
            yield
        except (ll.LoraLiteError, RuntimeError, ValueError) as error:
            self.left_out[entrant.name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            logger.warning(f"{entrant.name} is left out: {error}")

    def _planned(self) -> int:
        """The number of steps: as asked, as an earlier run in this folder has planned, or as many as fit.

        If all would have too few, the view at equal time isn't planned for, and takes what time is left.
        """
        settings, file = self.settings, self.arena.folder / "plan.json"
        known = read(file) if file.exists() else {}
        steps, why, is_timed = settings.steps, "as asked", settings.is_timed
        if steps is None and known.get("setting") == self.arena.setting:
            steps, why = known["steps"], f"as an earlier run has planned ({file})"
        minutes = settings.minutes or 55.0
        left = 60 * minutes - (time.perf_counter() - self.started)
        if steps is None:
            is_timed = is_timed and self._fitting(left, True) >= LEAST_STEPS
            steps = min(max(self._fitting(left, is_timed), LEAST_STEPS), MOST_STEPS)
            why = f"which fit into {minutes:g} minutes"
        fixed, of_a_step = self._work(is_timed)
        self._expected = fixed + steps * of_a_step
        write(file, {"setting": self.arena.setting, "steps": steps})
        at_equal_time = f" + {settings.seeds} at equal time" if is_timed else ", and at equal time if there is time"
        logger.info(
            f"{len(self.costs)} methods x ({settings.trials} learning rates + {settings.seeds} seeds"
            f"{at_equal_time if settings.is_timed else ''}), {steps} steps, {why}: about {self._expected / 60:.0f} "
            f"minutes, less what is done already"
        )
        if settings.minutes and self._expected > left:
            late = "what isn't done by then is left for another run of the same command"
            logger.warning(f"there are {max(left, 0) / 60:.0f} minutes left: {late}")
        return steps

    def _fitting(self, seconds: float, is_timed: bool) -> int:
        """The number of steps that fit."""
        fixed, of_a_step = self._work(is_timed)
        return int((MARGIN * seconds - fixed) / of_a_step)

    def _tuned(self, entrant: Entrant) -> Result | None:
        """The learning rate with the lowest loss on the tuning split; None if there was no time for all trials."""
        centre = round(2 * np.log10(entrant.rate))
        losses: dict[int, float] = {}
        while len(losses) < self.settings.trials:
            power = next_power(losses, centre)
            trial = Trial(entrant, 10 ** (power / 2), TUNING_SEED, self.steps, is_tuning=True)
            record = self._run(trial)
            if record is None:
                self.left_out[entrant.name] = f"no time: {len(losses)} of {self.settings.trials} learning rates tried"
                return None
            tokens = sum(len(row.completion) for row in self.arena.task.tuning)
            losses[power] = float(losses_of(record, tokens).mean(dtype=np.float64))
        best = min(losses, key=lambda power: losses[power])
        is_at_edge = len(losses) > 1 and best in (min(losses), max(losses))
        return Result(entrant.name, entrant.rank, 10 ** (best / 2), is_at_edge, self.costs[entrant.name])

    def _compared(self, entrant: Entrant, result: Result, view: str) -> None:
        """All seeds of a method, put into its result. The main view's trials give that at equal divergence, too."""
        tokens, steps = sum(self.rows()), self.steps
        if view == "time":
            steps = result.steps_in_time = self._steps_in_time(result)
        for seed in range(TUNING_SEED + 1, TUNING_SEED + 1 + self.settings.seeds):
            budget = self.settings.kl_budget if steps == self.steps else None  # with it, it is the main view's trial
            record = self._run(Trial(entrant, result.lr, seed, steps, kl_budget=budget))
            if record is None:
                return
            result.losses.setdefault(view, {})[seed] = losses_of(record, tokens)
            if view == "parameters":
                result.losses.setdefault("kl", {})[seed] = losses_of(record, tokens, at_budget=True)
                result.seen.append((record.get("kl", np.nan), record.get("scale", np.nan)))

    def _steps_in_time(self, result: Result) -> int:
        """As many as the method takes while the reference takes its own."""
        ratio = result.costs["step_ratio"]
        return self.steps if abs(ratio - 1) < SAME_TIME else max(1, round(self.steps / ratio))

    # ---- time -----------------------------------------------------------------------------------

    def _present(self) -> Iterator[Entrant]:
        return (entrant for entrant in self.entrants if entrant.name in self.costs)

    def _count(self) -> int:
        of_a_method = self.settings.trials + (1 + self.settings.is_timed) * self.settings.seeds
        return len(self.costs) * of_a_method

    def _work(self, is_timed: bool) -> tuple[float, float]:
        """Seconds of all trials beside their steps, and of one step of all of them."""
        settings, reference = self.settings, self.costs[self.settings.reference.name]
        fixed = of_a_step = 0.0
        for name, record in self.costs.items():
            entrant = next(entrant for entrant in self.entrants if entrant.name == name)
            tuning = Trial(entrant, 0.0, 0, 0, is_tuning=True)
            fixed += settings.trials * self._seconds(tuning)
            fixed += settings.seeds * self._seconds(Trial(entrant, 0.0, 0, 0, kl_budget=settings.kl_budget))
            of_a_step += (settings.trials + settings.seeds) * record["step_seconds"]
            if is_timed:
                fixed += settings.seeds * self._seconds(Trial(entrant, 0.0, 0, 0))
                of_a_step += settings.seeds * reference["step_seconds"]
        return fixed, of_a_step

    def _seconds(self, trial: Trial) -> float:
        """What a trial is expected to take."""
        task, record = self.arena.task, self.costs[trial.entrant.name]
        rows = len(task.tuning) if trial.is_tuning else len(task.held_out)
        if trial.kl_budget is not None:
            rows += len(task.held_out) + SCALES * sum(len(batch["input_ids"]) for batch in task.neutral)
        seconds: float = record["attach_seconds"] + trial.steps * record["step_seconds"] + rows * self._row_seconds
        return seconds

    def _is_over(self, seconds: float) -> bool:
        """Would something that takes so long end too late?"""
        spent = time.perf_counter() - self.started
        return self.settings.minutes is not None and spent + seconds > 60 * self.settings.minutes

    @property
    def _slowness(self) -> float:
        taken, expected = self._speed
        return taken / expected if expected else 1.0

    def _run(self, trial: Trial) -> Record | None:
        expected, started = self._seconds(trial), time.perf_counter()
        record = self.arena.run(trial, stop=lambda: self._is_over(expected * self._slowness))
        if record is None:
            return None
        seconds = time.perf_counter() - started
        if seconds > 0.5 * record["seconds"]:  # else it is from an earlier run
            self._speed = self._speed[0] + seconds, self._speed[1] + expected
        self._done += 1
        self._expected = max(0.0, self._expected - expected)
        purpose = "tuning" if trial.is_tuning else f"seed {trial.seed}"
        logger.info(
            f"[{self._done}/{self._count()}] {trial.entrant.name} at {trial.lr:.1e}, {purpose}, {trial.steps} steps: "
            f"loss {losses_of(record, 1).mean():.3f}; about {self._expected * self._slowness / 60:.0f} minutes left"
        )
        return record


def options(contest: Contest) -> dict[str, Any]:
    """For the results' file."""
    settings = contest.settings
    return {**vars(settings), "reference": settings.reference.name, "steps": contest.steps}
