"""The time budget that the examples share, and that what it leads to follows the measurements."""

import random
import time
from typing import Any

import batches
import budget
import finetune
import pytest
import torch
from models import tiny_llama
from pairs import Pair

import lora_lite as ll


def test_a_part_gets_its_share_within_its_bounds() -> None:
    plan = budget.Plan(5.0, 100.0)
    assert plan.fits(2.0, most=80) == 50
    assert plan.fits(2.0, most=80, share=0.25) == 12
    assert plan.fits(2.0, most=10) == 10
    assert plan.fits(80.0, most=10, least=3) == 3
    assert plan.fits(0.0, most=10) == 10
    assert plan.fits(1.0, most=0, least=0) == 0


def test_what_one_part_takes_is_not_left_for_the_next() -> None:
    plan = budget.Plan(5.0, 100.0)
    assert plan.take("answers", 5.0, most=10, share=0.5) == 10
    assert plan.take("steps", 5.0, most=80) == 10
    assert plan.seconds == 0
    assert plan.take("more", 5.0, most=80, least=2) == 2
    assert plan.take("given", 5.0, most=80, given=7) == 7
    assert plan.seconds == -45


def test_the_plan_is_one_line_and_says_where_the_time_is_too_short(log: list[str]) -> None:
    plan = budget.Plan(5.0, 100.0)
    plan.take("steps", 6.14, most=80, share=0.5)
    plan.take("pairs", 1.0, most=80, given=3)
    plan.log()
    assert log == ["INFO for --minutes 5: 8 steps at 6.1 s, 3 pairs as asked"]
    plan.take("trials", 60.0, most=80, least=4)
    plan.log()
    assert log[2].startswith("WARNING that takes about 3.2 minutes more than --minutes 5")


def test_the_time_runs_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    time_left = budget.Budget(2.0)
    now = 130.0
    assert time_left.spent == 30
    assert time_left.plan(later=8.0).seconds == pytest.approx(budget.MARGIN * 120 - 38)


def test_a_quick_call_is_measured_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, takes = 0.0, [0.9, 0.1, 2.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def run() -> None:
        nonlocal now
        now += takes.pop(0)

    assert budget.seconds_of(run) == pytest.approx(0.1)
    assert budget.seconds_of(run) == pytest.approx(2.0)


class Tokenizer:
    """As much as batches use."""

    pad_token_id = eos_token_id = 0


def sizes(monkeypatch: pytest.MonkeyPatch, minutes: float, seconds: float, **given: int) -> finetune.Sizes:
    """What is fitted when a step of 8 pairs, an evaluation of them, and the probed answers each take so long."""
    monkeypatch.setattr(budget, "seconds_of", lambda run: (run(), seconds)[1])
    monkeypatch.setattr(finetune, "answers", lambda *_: [])
    pairs = [batches.Example(Pair("", "", ""), [5] * 4, [6] * 4)] * 64
    model = tiny_llama()
    ll.attach(model, ll.LoRAConfig(dropout=0.5))
    state = torch.get_rng_state(), random.getstate()
    asked: dict[str, Any] = dict.fromkeys(("steps", "batch_size", "eval_pairs")) | given
    found = finetune.fitted(model, Tokenizer(), pairs, budget.Budget(minutes), 0.0, **asked)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert all(p.grad is None for p in model.parameters())
    return found


def test_a_fast_machine_does_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes(monkeypatch, 5.0, 0.01) == finetune.Sizes(steps=80, pairs=8, eval_pairs=64, tokens=48)


def test_slower_steps_are_fewer_then_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, slower = (sizes(monkeypatch, 5.0, seconds) for seconds in (4.0, 12.0))
    assert finetune.LEAST_STEPS <= slower.steps <= slow.steps < 80
    assert 1 <= slower.pairs < slow.pairs == 8
    assert slow.steps * 4.0 + 5 * slow.eval_pairs / 8 * 4.0 + 2 * slow.tokens * 4.0 / finetune.PROBED_TOKENS < 300
    assert sizes(monkeypatch, 10.0, 4.0).steps > slow.steps


def test_too_little_time_does_the_least_and_says_so(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    least = finetune.Sizes(finetune.LEAST_STEPS, 1, finetune.LEAST_EVAL_PAIRS, finetune.LEAST_TOKENS)
    assert sizes(monkeypatch, 0.0, 10.0) == least
    assert any(line.startswith("WARNING that takes about") for line in log)


def test_what_is_given_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sizes(monkeypatch, 5.0, 30.0, steps=40, eval_pairs=3)
    assert (found.steps, found.pairs, found.eval_pairs) == (40, 8, 3)
    assert sizes(monkeypatch, 5.0, 30.0, batch_size=5).pairs == 5
