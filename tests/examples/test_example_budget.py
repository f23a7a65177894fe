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
    assert budget.Plan(5.0, -1.0).fits(0.0, most=10) == 10
    assert budget.Plan(5.0, -1.0).fits(1.0, most=10, least=2) == 2


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


def test_many_at_once_are_timed_only_where_one_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def each_takes(seconds: float) -> Any:
        def run(count: int) -> None:
            nonlocal now
            counts.append(count)
            now += seconds * count

        return run

    assert budget.seconds_of_one(each_takes(0.5), 8) == pytest.approx(0.5)
    assert counts == [1, 1, 8]
    counts.clear()
    assert budget.seconds_of_one(each_takes(1.5), 8) == pytest.approx(1.5)
    assert counts == [1]
    counts.clear()
    assert budget.seconds_of_one(each_takes(0.5), 1) == pytest.approx(0.5)
    assert counts == [1, 1]


def test_the_clock_waits_for_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    now, started = 0.0, 0.0

    def wait() -> None:
        nonlocal now, started
        now, started = now + started, 0.0

    def run() -> None:
        nonlocal started
        started = 3.0

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", wait)
    started = 7.0  # of what came before
    assert budget.seconds_of(run) == 3.0


def test_the_loss_is_measured_as_often_as_was_paid_for() -> None:
    for steps in range(1, finetune.MOST_STEPS + 1):
        after = finetune.measured_after(steps)
        assert len(after) == min(steps, finetune.EVALUATIONS)
        assert max(after) == steps
        assert min(after) > 0


class Tokenizer:
    """As much as batches use."""

    pad_token_id = eos_token_id = 0


def sizes(monkeypatch: pytest.MonkeyPatch, minutes: float, seconds: float, **given: int) -> finetune.Sizes:
    """What is fitted when a forward or backward of a pair takes `seconds`, a token of an answer `seconds` / 2."""
    now, loss_of = 0.0, finetune.loss_of

    def pass_time(spent: float) -> None:
        nonlocal now
        now += spent

    def timed_loss(model: Any, batch: Any) -> torch.Tensor:
        count = len(batch["input_ids"])
        probed.append(count)
        pass_time(seconds * count)
        loss: torch.Tensor = loss_of(model, batch)
        if loss.requires_grad:
            loss.register_hook(lambda grad: pass_time(seconds * count))
        return loss

    probed.clear()
    pairs = [batches.Example(Pair("", "", ""), [5] * 4, [6] * 4)] * 64
    model = tiny_llama()
    ll.attach(model, ll.LoRAConfig(dropout=0.5))
    state = torch.get_rng_state(), random.getstate()
    asked: dict[str, Any] = dict.fromkeys(("steps", "batch_size", "eval_pairs")) | given
    with monkeypatch.context() as patched:
        patched.setattr(time, "perf_counter", lambda: now)
        patched.setattr(finetune, "loss_of", timed_loss)
        patched.setattr(finetune, "answers", lambda *_: pass_time(seconds / 2 * finetune.PROBED_TOKENS))
        found = finetune.fitted(model, Tokenizer(), pairs, budget.Budget(minutes), 0.0, **asked)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert all(p.grad is None for p in model.parameters())
    pass_time(seconds * found.eval_pairs * (finetune.EVALUATIONS + 1) + seconds * found.tokens)
    pass_time(2 * seconds * found.pairs * (1 + found.steps))
    planned.append(now)
    return found


probed: list[int] = []
"""Pairs at once in each loss that was timed."""
planned: list[float] = []
"""Seconds that each run takes with the sizes that were fitted, the fitting included."""


def test_a_fast_machine_does_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes(monkeypatch, 5.0, 0.001) == finetune.Sizes(steps=80, pairs=8, eval_pairs=64, tokens=48)
    assert max(probed) == 8


def test_slower_steps_are_fewer_then_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, slower = (sizes(monkeypatch, 5.0, seconds) for seconds in (0.25, 0.9))
    assert finetune.LEAST_STEPS <= slower.steps <= slow.steps < 80
    assert 1 <= slower.pairs < slow.pairs == 8
    assert 200 < planned[-2] < 300
    assert 200 < planned[-1] < 300
    assert sizes(monkeypatch, 10.0, 0.25).steps > slow.steps


def test_no_more_pairs_are_tried_at_once_than_a_step_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is for one pair, the timing has one; and where one takes long, it isn't tried with more."""
    assert sizes(monkeypatch, 5.0, 0.01, batch_size=1).pairs == 1
    assert set(probed) == {1}
    sizes(monkeypatch, 5.0, 0.01, batch_size=3)
    assert set(probed) == {1, 3}
    sizes(monkeypatch, 5.0, 20.0)
    assert set(probed) == {1}


def test_a_step_is_not_timed_where_their_number_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: pytest.fail("a step"))
    assert sizes(monkeypatch, 5.0, 0.01, steps=7).steps == 7


def test_too_little_time_does_the_least_and_says_so(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    least = finetune.Sizes(finetune.LEAST_STEPS, 1, finetune.LEAST_EVAL_PAIRS, finetune.LEAST_TOKENS)
    assert sizes(monkeypatch, 0.0, 10.0) == least
    assert any(line.startswith("WARNING that takes about") for line in log)


def test_what_is_given_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sizes(monkeypatch, 5.0, 30.0, steps=40, eval_pairs=3)
    assert (found.steps, found.pairs, found.eval_pairs) == (40, 8, 3)
    assert sizes(monkeypatch, 5.0, 30.0, batch_size=5).pairs == 5
