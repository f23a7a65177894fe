"""The arena on a tiny model: who is told apart, equal trials, what is there isn't run again, tables and picture."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_llama

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import arena_contest
import arena_costs
import arena_methods
import arena_report
from arena_contest import Contest, Settings, next_power
from arena_methods import FIELDS, Entrant, entrant, of_parameters, swept
from arena_picture import draw
from arena_report import COSTS, VIEWS, Report, Result, text, write_section
from arena_statistics import difference
from arena_task import Task, loss_of, read_task, token_losses
from arena_trials import Arena, Trial, losses_of
from batches import Example, collate
from pairs import Pair
from test_arena_statistics import ROWS

import lora_lite as ll

STEPS = 12

pytestmark = pytest.mark.slow  # it trains


def counting(count: int, start: int) -> list[Example]:
    """Rows that count up from a number by a step, 3 to 6 tokens of them to be said."""
    rows = []
    for i in range(start, start + count):
        first, step = i % 40 + 1, i % 3 + 1
        numbers = [(first + step * k) % 90 + 1 for k in range(6 + i % 4)]
        rows.append(Example(Pair(str(i), "", str(i)), numbers[:3], numbers[3:]))
    return rows


@pytest.fixture
def arena(tmp_path: Path) -> Arena:
    ids = {"input_ids": collate(0, counting(6, 500))["input_ids"]}
    task = Task("counting", counting(200, 0), counting(6, 300), counting(30, 400), [ids])
    model = tiny_llama(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    return Arena(model, task, 8, tmp_path)


def compared(arena: Arena, one: Entrant, other: Entrant, rates: tuple[float, float] = (1e-2, 1e-2)) -> Any:
    """The difference of two entrants over three seeds."""
    rows = [len(row.completion) for row in arena.task.held_out]
    sides = [
        {seed: losses_of(arena.run(Trial(member, lr, seed, STEPS)) or {}, sum(rows)) for seed in (1, 2, 3)}
        for member, lr in zip((one, other), rates, strict=True)
    ]
    return difference(*sides, rows)


# ---- who is told apart --------------------------------------------------------------------------


def test_two_loras_under_two_names_are_not_apart(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FIELDS, "other", {"variant": "lora"})
    found = compared(arena, entrant("other", 4), entrant("lora", 4))
    assert found.verdict == "not apart"
    assert found.value != 0.0  # they start from different random numbers, as two methods do


def test_one_at_a_bad_learning_rate_loses(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FIELDS, "other", {"variant": "lora"})
    assert compared(arena, entrant("other", 4), entrant("lora", 4), (1e-5, 1e-2)).verdict == "worse"
    assert compared(arena, entrant("other", 4), entrant("lora", 4), (1e-2, 1e-5)).verdict == "better"


def test_all_have_the_same_batches_for_one_seed(arena: Arena) -> None:
    first, again = (next(arena.task.batches(4, 1))["input_ids"].tolist() for _ in range(2))
    assert first == again != next(arena.task.batches(4, 2))["input_ids"].tolist()
    batches = arena.task.batches(100, 0)
    rows = [tuple(row.tolist()) for _ in range(2) for row in next(batches)["input_ids"]]
    assert len(rows) == 200  # one time through the data, each row once
    assert len(set(rows)) > 90


def test_the_losses_are_those_of_the_model_itself(arena: Arena) -> None:
    rows = arena.task.held_out
    losses = token_losses(arena.base, rows, 0)
    assert len(losses) == sum(len(row.completion) for row in rows)
    assert losses[: len(rows[0].completion)].mean() == pytest.approx(float(loss_of(arena.base, collate(0, rows[:1]))))
    assert losses[-len(rows[-1].completion) :].mean() == pytest.approx(
        float(loss_of(arena.base, collate(0, rows[-1:])))
    )


def test_a_divergence_is_a_result(arena: Arena) -> None:
    record = arena.run(Trial(entrant("full"), 1e30, 1, STEPS))
    assert record is not None
    assert not record["finite"]
    assert np.isinf(losses_of(record, 7)).all()


# ---- equal trials -------------------------------------------------------------------------------


def tried(losses: dict[int, float], count: int = 5) -> list[int]:
    """The half-decades that are tried from 0 on, for a loss at each."""
    found: dict[int, float] = {}
    while len(found) < count:
        power = next_power(found, 0)
        found[power] = losses[power]
    return list(found)


def test_the_grid_goes_on_where_the_best_is_at_its_end() -> None:
    assert tried({k: (k - 9) ** 2 for k in range(10)} | {-1: 100.0}) == [0, 1, -1, 2, 3]
    assert tried({k: (k + 9) ** 2 for k in range(-9, 2)}) == [0, 1, -1, -2, -3]
    assert sorted(tried({k: abs(k) for k in range(-5, 6)})) in ([-3, -2, -1, 0, 1], [-2, -1, 0, 1, 2])
    assert tried(dict.fromkeys(range(-5, 5), float("inf"))) == [0, 1, -1, -2, -3]


@pytest.mark.usefixtures("costed")
def test_each_method_has_as_many_trials(arena: Arena) -> None:
    lora, ia3 = contest_of(arena, ["lora", "ia3"], trials=4, seeds=2).run()
    assert (lora.steps_in_time, ia3.steps_in_time) == (3, 6)  # at half the time of a step, twice as many
    assert lora.losses["time"].keys() == ia3.losses["time"].keys() == {1, 2}
    assert np.array_equal(lora.losses["time"][1], lora.losses["parameters"][1])
    records = [json.loads(file.read_text()) for file in (arena.folder / "trials").glob("*.json")]
    for name in ("lora", "ia3"):
        mine = [record for record in records if record["method"] == name]
        assert sum(record["is_tuning"] for record in mine) == 4
        assert len({record["lr"] for record in mine if record["is_tuning"]}) == 4
        compared = [record for record in mine if record["kl_budget"] is not None]
        assert {record["seed"] for record in compared} == {1, 2}
        best = min((r for r in mine if r["is_tuning"]), key=lambda r: losses_of(r, 1).mean())["lr"]
        assert {record["lr"] for record in compared} == {best}


@pytest.fixture
def costed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs that nobody measures."""
    record = {"step_seconds": 0.01, "attach_seconds": 0.01, "ratio_low": 1.0, "ratio_high": 1.0, "kept": 1, "peak": 1}
    record |= {"file_bytes": 1, "parameters": 1}
    monkeypatch.setattr(arena_contest, "base_costs", lambda arena: {})
    ratios = {"ia3": 0.5}
    monkeypatch.setattr(arena_contest, "costs", lambda _, e, __: record | {"step_ratio": ratios.get(e.name, 1.0)})


def contest_of(arena: Arena, names: list[str], minutes: float | None = None, **settings: Any) -> Contest:
    entrants = [of_parameters(name, arena.replica(), 5000) for name in names]
    return Contest(arena, entrants, Settings(entrants[0], **{"steps": 3, "minutes": minutes, **settings}))


# ---- entering -----------------------------------------------------------------------------------


def test_what_is_registered_takes_part(arena: Arena, double: Any) -> None:
    assert "double" in arena_methods.names()
    assert arena_methods.names()[0] == "lora"
    assert not {"abliteration", "steer", "history"} & set(arena_methods.names())
    record = arena.run(Trial(entrant("double"), 1e-2, 1, 2))
    assert record is not None
    assert record["finite"]


def test_ranks_are_chosen_for_a_number_of_parameters(arena: Arena) -> None:
    model = arena.replica()
    for name in ("lora", "dora", "adalora", "pissa"):
        goal = ll.plan(model, entrant("lora", 6).config(100)).parameters
        count = ll.plan(model, of_parameters(name, model, goal).config(100)).parameters
        assert count == pytest.approx(goal, rel=0.2), name
    assert of_parameters("ia3", model, 10_000).rank is None
    assert [member.name for member in swept("lora", model, [2, 4], 1000)] == ["lora r=2", "lora r=4"]
    with pytest.raises(ll.TargetError):
        of_parameters("bias", model, 1000)
    with pytest.raises(ll.VariantError):
        entrant("nobody")


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of seeds, of older versions and of sparse tensors
@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "vera", "hira", "shira", "oft", "miss"])
def test_pefts_model_is_of_the_same_method(arena: Arena, name: str, tmp_path: Path) -> None:
    """As many trained parameters in both, so bytes are compared of the same."""
    model, adapter = arena.attached(entrant(name, 3), 0, 100)
    ll.save_peft(model, tmp_path)
    twin: Any = arena_costs.theirs(arena, tmp_path)()
    count = sum(parameter.numel() for parameter in twin.parameters() if parameter.requires_grad)
    assert count == sum(parameter.numel() for parameter in adapter.parameters())


@pytest.mark.slow
def test_costs_are_exact_and_beside_pefts(arena: Arena) -> None:
    before = {key: tensor.clone() for key, tensor in arena.base.state_dict().items()}
    found = {name: arena_costs.costs(arena, entrant(name, 4), entrant("lora", 4)) for name in ("lora", "hira")}
    assert all(torch.equal(tensor, before[key]) for key, tensor in arena.base.state_dict().items())  # PEFT's writes it
    for name, record in found.items():
        assert record["parameters"] == ll.plan(arena.replica(), entrant(name, 4).config(1)).parameters
        assert record["ratio_low"] <= record["step_ratio"] <= record["ratio_high"]
        assert 0 < record["kept"] < record["peak"], name
    assert found["lora"]["kept"] == found["lora"]["peft"]["kept"]  # without casts, with the same tensors
    assert found["lora"]["peak"] <= found["lora"]["peft"]["peak"]
    assert found["lora"]["file_bytes"] > 4 * found["lora"]["parameters"]


# ---- what is there isn't run again --------------------------------------------------------------


@pytest.mark.usefixtures("costed")
def test_a_run_goes_on_where_it_stopped(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    first = contest_of(arena, ["lora", "ia3"], trials=3, seeds=2).run()
    files = {file: file.read_text() for file in arena.folder.rglob("*.json")}
    monkeypatch.setattr(Arena, "attached", lambda *_: pytest.fail("it ran again"))
    again = contest_of(arena, ["lora", "ia3"], trials=3, seeds=2).run()
    assert {file: file.read_text() for file in arena.folder.rglob("*.json")} == files
    for one, other in zip(first, again, strict=True):
        assert (one.name, one.lr) == (other.name, other.lr)
        for view in VIEWS:
            assert all(np.array_equal(one.losses[view][seed], other.losses[view][seed]) for seed in (1, 2)), view


def test_a_trial_is_repeated_bit_for_bit(arena: Arena, tmp_path: Path) -> None:
    trial = Trial(entrant("lora", 4), 1e-2, 1, 3)
    other = Arena(arena.base, arena.task, arena.batch_size, tmp_path / "other")
    first, again = (place.run(trial) or {} for place in (arena, other))
    assert first["losses"] == again["losses"]


def test_whatever_a_result_depends_on_is_in_its_key(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(entrant("lora", 4), 1e-2, 1, 3)
    changes: list[dict[str, Any]] = [
        {"lr": 2e-2},
        {"seed": 2},
        {"steps": 4},
        {"is_tuning": True},
        {"kl_budget": 0.1},
        {"entrant": entrant("lora", 5)},
    ]
    keys = [arena.facts(trial), *(arena.facts(replace(trial, **change)) for change in changes)]
    monkeypatch.setattr("arena_trials.source_of", lambda variant: "edited")
    keys.append(arena.facts(trial))
    task = replace(arena.task, held_out=arena.task.held_out[1:])
    keys.append(Arena(arena.base, task, arena.batch_size, arena.folder).facts(trial))
    keys.append(Arena(arena.base, arena.task, 3, arena.folder).facts(trial))
    assert len({json.dumps(key) for key in keys}) == len(keys)


@pytest.mark.usefixtures("costed")
def test_no_trial_begins_after_the_minutes(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    contest = contest_of(arena, ["lora", "ia3"], minutes=1e-9)
    assert contest.run() == []
    assert contest.left_out == dict.fromkeys(("lora", "ia3"), "no time to measure what it costs")
    contest = contest_of(arena, ["lora", "ia3"], minutes=1)
    monkeypatch.setattr(Contest, "_is_over", lambda self, seconds: self._done == 7)
    (lora,) = contest.run()
    assert set(lora.losses["parameters"]) == {1, 2}  # the third is for another run
    assert contest.left_out == {"ia3": "no time: 0 of 5 learning rates tried"}


@pytest.mark.usefixtures("costed")
def test_a_method_that_fails_does_not_end_the_run(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Arena.run

    def failing(self: Arena, trial: Trial, stop: Any) -> Any:
        if trial.entrant.name == "ia3":
            raise ll.BaseModelError("it overflows\n  another dtype")
        return run(self, trial, stop)

    monkeypatch.setattr(Arena, "run", failing)
    contest = contest_of(arena, ["lora", "ia3", "norm"], trials=1, seeds=1, is_timed=False)
    assert [result.name for result in contest.run()] == ["lora", "norm"]
    assert contest.left_out == {"ia3": "BaseModelError: it overflows"}


@pytest.mark.usefixtures("costed")
def test_steps_are_fitted_once(arena: Arena) -> None:
    contest = contest_of(arena, ["lora"], steps=None, trials=1, seeds=1, minutes=0.02)
    contest.run()
    assert contest.steps > 3
    again = contest_of(arena, ["lora"], steps=None, trials=1, seeds=1, minutes=50)
    again.run()
    assert again.steps == contest.steps  # or nothing that is there would be of use


# ---- the KL budget ------------------------------------------------------------------------------


def test_the_budget_is_a_ceiling(arena: Arena) -> None:
    near = arena.run(Trial(entrant("lora", 4), 1e-6, 1, 3, kl_budget=0.05)) or {}
    assert near["scale"] == 1.0  # below the budget: no larger scale, which nobody has trained
    assert near["losses_at_budget"] == near["losses"]
    far = arena.run(Trial(entrant("lora", 4), 3e-2, 1, STEPS, kl_budget=0.001)) or {}
    assert far["kl"] > 0.001
    assert 0 < far["scale"] < 1
    assert far["kl_at_scale"] == pytest.approx(0.001, rel=0.1)
    assert losses_of(far, 1, at_budget=True).mean() > losses_of(far, 1).mean()


# ---- the report ---------------------------------------------------------------------------------


def a_report() -> Report:
    """With long names, large numbers, a method that diverged, and one with fewer seeds."""
    costs = {"step_ratio": 1.234, "ratio_low": 1.1, "ratio_high": 12.34, "kept": 123456789, "peak": 2123456789}
    costs |= {"parameters": 106_202_880, "file_bytes": 423_456_789, "peft": {"kept": 555555555, "peak": 3123456789}}
    results = []
    for i, name in enumerate(("lora", "antipasto r=128", "diverged", "a cheap one")):
        loss = np.full(sum(ROWS), np.inf if name == "diverged" else 1.2345 + 0.1 * (i % 3), dtype=np.float32)
        own: dict[str, Any] = costs | {"parameters": 1000 if i == 3 else 106_202_880 + i, "kept": 10**8 * (4 - i)}
        seeds = {seed: loss + np.float32(0.001 * seed) for seed in range(1 if i == 3 else 3)}
        views: dict[str, Any] = dict.fromkeys(VIEWS, seeds)
        results.append(Result(name, 128, 3.16e-3, i == 1, own, views, [(0.2345, 0.456)] * 3, 17))
    head = ["make arena", "SmolLM2"]
    return Report(results, "lora", ROWS, 1.95, 0.05, head, {"bias": "no layer has a bias, " * 5})


def test_tables_fit_80_columns() -> None:
    lines = text(a_report()).splitlines()
    assert max(map(len, lines)) <= 80
    whole = "\n".join(lines)
    assert "antipasto r=128" in whole
    assert re.search(r"^diverged .* diverged +worse$", whole, re.M)
    assert re.search(r"^a cheap one .* one seed$", whole, re.M)
    assert "left out: bias: no layer has a bias" in whole
    assert sum(line.startswith("Pareto line") for line in lines) == len(COSTS)


def test_a_document_gets_its_section(tmp_path: Path) -> None:
    document = tmp_path / "arena.md"
    document.write_text("before\n<!-- arena -->\nold\n<!-- /arena -->\nafter\n")
    for _ in range(2):
        write_section(a_report(), document, "arena.png")
    written = document.read_text()
    assert written.startswith("before\n<!-- arena -->\n```\nmake arena")
    assert written.endswith("![The arena](arena.png)\n<!-- /arena -->\nafter\n")
    assert "old" not in written
    document.write_text("nothing")
    with pytest.raises(ValueError, match="has 0 sections"):
        write_section(a_report(), document, "arena.png")


def test_the_picture_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its line goes through the names of the report's, and isn't there for one name alone."""
    lines: list[Any] = []
    original = arena_report.Report.line
    monkeypatch.setattr(Report, "line", lambda self, cost: lines.append(original(self, cost)) or lines[-1])
    draw(a_report(), tmp_path / "arena.png")
    assert (tmp_path / "arena.png").stat().st_size > 10_000
    assert len(lines) == len(COSTS)


# ---- whole runs ---------------------------------------------------------------------------------


def test_the_data_has_three_parts_that_share_nothing(tiny_chat: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"question": f"What is {i} and {i}?", "answer": f"{2 * i}."}) + "\n" for i in range(99))
    )
    tokenizer, base = AutoTokenizer.from_pretrained(tiny_chat), AutoModelForCausalLM.from_pretrained(tiny_chat)
    task = read_task(data, tokenizer, base, tmp_path, 40, (5, 6, 3))
    parts = [{row.pair.prompt for row in part} for part in (task.train, task.tuning, task.held_out)]
    assert (len(parts[1]), len(parts[2])) == (5, 6)
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert sum(len(batch["input_ids"]) for batch in task.neutral) == 3
    assert read_task(data, tokenizer, base, tmp_path, 40, (5, 6, 3)).fingerprint == task.fingerprint
