"""The arena's statistics against what is known: intervals that hold the truth as often as they say, a Pareto line."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from arena_statistics import Losses, Point, difference, pareto

ROWS = [3, 9, 5, 12, 4, 7, 6, 8, 10, 5, 3, 11, 6, 7, 9, 4, 8, 5, 6, 12, 7, 3, 9, 6, 5, 8, 10, 4, 7, 6]


def losses(value: float, seeds: int = 1) -> Losses:
    """Of a method that is worse than nought by this at each token."""
    return {seed: np.full(sum(ROWS), value, dtype=np.float32) for seed in range(seeds)}


def drawn(
    random: np.random.Generator, effect: float, seeds: int, of_rows: float, of_seeds: float
) -> tuple[Losses, Losses]:
    """A method and its reference: hard and easy rows for both, and what differs between them at each row and seed."""
    tokens = np.repeat(np.arange(len(ROWS)), ROWS)
    hard, row = random.normal(2, 1, len(ROWS)), random.normal(0, of_rows, len(ROWS))
    sides: tuple[dict, dict] = ({}, {})
    for seed in range(seeds):
        common = hard[tokens] + random.normal(0, 0.3, len(tokens))
        noise = random.normal(0, of_seeds) + random.normal(0, 0.2, len(tokens))
        sides[0][seed], sides[1][seed] = (common + effect + row[tokens] + noise).astype("f4"), common.astype("f4")
    return sides


@pytest.mark.parametrize(("of_rows", "of_seeds"), [(0.3, 0.0), (0.3, 0.05), (0.01, 0.2)])
def test_an_interval_holds_the_truth_as_often_as_it_says(of_rows: float, of_seeds: float) -> None:
    """Whether rows or seeds make the noise; the estimate's own bias is none, so it is counted around the truth."""
    random = np.random.default_rng(1)
    times, effect = 400, 0.1
    found = [difference(*drawn(random, effect, 3, of_rows, of_seeds), ROWS, draws=600) for _ in range(times)]
    held = sum(one.low <= effect <= one.high for one in found) / times
    assert 0.92 <= held <= 0.99, held
    assert np.mean([one.value for one in found]) == pytest.approx(effect, abs=0.02)


def test_rows_are_drawn_whole() -> None:
    """Tokens of a row share what differs: an interval that took them as independent would be far too narrow."""
    method, reference = drawn(np.random.default_rng(2), 0.0, 1, 0.3, 0.0)
    one = difference(method, reference, ROWS)
    by_token = 1.96 * (method[0] - reference[0]).std() / np.sqrt(sum(ROWS))
    assert (one.high - one.low) / 2 > 1.5 * by_token


def test_what_both_share_cancels() -> None:
    method, reference = drawn(np.random.default_rng(3), 0.08, 3, 0.0, 0.0)
    one = difference(method, reference, ROWS)
    assert one.verdict == "worse"
    assert one.high - one.low < 0.2 < reference[0].std()  # the losses themselves differ by far more


def test_few_seeds_make_a_wide_interval() -> None:
    """Three seeds that differ: a t distribution's 4.3 standard errors, not 1.96."""
    method = {seed: np.full(sum(ROWS), value, dtype=np.float32) for seed, value in enumerate((0.9, 1.0, 1.1))}
    one = difference(method, losses(0.0, 3), ROWS)
    assert one.value == pytest.approx(1.0, abs=1e-6)
    assert (one.high - one.low) / 2 == pytest.approx(4.303 * 0.1 / np.sqrt(3), rel=0.15)
    assert one.seeds == 3


def test_one_seed_tells_nothing_of_a_method() -> None:
    assert difference(losses(1.0), losses(0.5), ROWS).verdict == "one seed"
    assert difference(losses(1.0, 2), losses(0.5, 2), ROWS).verdict == "worse"
    one = [Point("a", 1, 1, 1, losses(2.0)), Point("b", 2, 2, 2, losses(1.0))]
    assert pareto(one, ROWS) == ["a"]


def test_only_common_seeds_are_paired() -> None:
    assert difference(losses(1.0, 3), losses(0.5, 2), ROWS).seeds == 2
    with pytest.raises(ValueError, match="no common seed"):
        difference({1: losses(1.0)[0]}, {2: losses(1.0)[0]}, ROWS)


def test_one_that_diverged_is_worse() -> None:
    one = difference(losses(np.inf), losses(1.0), ROWS)
    assert (one.verdict, one.value) == ("worse", np.inf)


def point(name: str, cost: float, loss: float, spread: float = 0.0, of_cost: float = 0.0) -> Point:
    """Seeds at loss ± spread."""
    by_seed = {seed: losses(loss + spread * (seed - 1))[0] for seed in range(3)}
    return Point(name, cost - of_cost, cost, cost + of_cost, by_seed)


def test_a_pareto_line_goes_through_those_that_beat_all_cheaper_ones() -> None:
    points = [point("dear", 3, 0.9), point("cheap", 1, 2.0), point("middle", 2, 1.5), point("worse", 2.5, 1.7)]
    assert pareto(points, ROWS) == ["cheap", "middle", "dear"]


def test_a_pareto_line_is_not_drawn_where_intervals_overlap() -> None:
    noisy = [point("cheap", 1, 2.0), point("middle", 2, 1.9, spread=0.3), point("dear", 3, 0.9, spread=0.3)]
    assert pareto(noisy, ROWS) == ["cheap", "dear"]
    assert pareto([point("cheap", 1, 2.0), point("same", 2, 2.0)], ROWS) == ["cheap"]


def test_of_two_whose_costs_are_not_apart_the_better_one_stays() -> None:
    assert pareto([point("a", 1.0, 2.0, of_cost=0.1), point("b", 1.1, 1.0, of_cost=0.1)], ROWS) == ["b"]
    assert pareto([point("a", 1.0, 2.0, of_cost=0.1), point("b", 1.3, 1.0, of_cost=0.1)], ROWS) == ["a", "b"]
    assert pareto([point("a", 1.0, 2.0), point("b", 1.0, 1.0)], ROWS) == ["b"]
