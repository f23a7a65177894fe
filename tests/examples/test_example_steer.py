"""The steering example: a whole run on a tiny model with the real one's tokenizer, its errors, and what it computes."""

import json
import re
from pathlib import Path
from typing import Any

import poles
import pytest
import steer
import torch
import typer
from batches import Example
from budget import Budget
from jsonl import DataError
from loguru import logger
from models import tiny_llama
from pairs import Pair
from prompt_sets import SHIPPED
from steer_report import Point, broken, repeated

import lora_lite as ll


@pytest.fixture
def small(tiny_chat: str, tmp_path: Path) -> dict[str, Any]:
    """Options for that model and sets of four prompts."""
    options: dict[str, Any] = {"out": tmp_path / "out", "positive_words": "Le,La,Les,Un", "negative_words": "The,A,In"}
    for side, name in (("positive", "french"), ("negative", "english"), ("neutral", "neutral")):
        options[side] = tmp_path / f"{name}.jsonl"
        lines = (SHIPPED / f"{name}.jsonl").read_text().splitlines(keepends=True)
        options[side].write_text("".join(lines[:4]))
    return options | {"model": tiny_chat, "step": 1.0, "answer_tokens": 3, "steps": 2, "r": 1, "batch_size": 1}


def run(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[int, str]:
    """(exit code, log) of the example in this process."""
    monkeypatch.setattr(steer, "set_up", lambda seed: None)
    monkeypatch.setenv("COLUMNS", "80")
    lines: list[str] = []
    logger.enable("lora_lite")
    sink = logger.add(lines.append, format="{message}")
    code = 0
    try:
        steer.main(**options)
    except typer.Exit as stopped:
        code = stopped.exit_code
    finally:
        logger.remove(sink)
    return code, "".join(lines)


def test_a_whole_run(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, log = run(monkeypatch, **small, break_kl=1e-4, max_kl=0.05, dtype="float32")
    assert code == 0, log
    assert "for --minutes 5: 5 points of the sweep as asked," in log
    assert "2 steps of 1 prompts of each pole in each round as asked" in log
    assert "history.safetensors on a fresh base gives the saved model's logits, bit for bit" in log
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for label in ("Answers", "Sweep over c", "breaks down", "The history", "round-1", "round-2", "the base"):
        assert label in shown
    names = {"history.safetensors", "results.json", "steer.safetensors", "sweep.png"}
    assert {file.name for file in small["out"].iterdir()} == names

    results = json.loads((small["out"] / "results.json").read_text())
    assert (results["dtype"], results["quantization"], results["steps"]) == ("float32", None, 2)
    assert [point["c"] for point in results["sweep"]] == [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert [point["kl"] == 0 for point in results["sweep"]] == [False, False, True, False, False]
    gaps = [point["gap"] for point in results["sweep"]]
    assert len(set(gaps)) == 5
    assert {len(point["answers"]) for point in results["sweep"]} == {2}
    assert [each["label"] for each in results["history"]] == ["round-1", "round-2"]
    assert all(len(each["losses"]) == 2 for each in results["history"])

    base = ll.load_base(small["model"], torch.bfloat16)
    assert ll.load(base, small["out"] / "steer.safetensors").scale == results["calibrated"]["c"]
    ll.detach(base)
    ll.load(base, small["out"] / "history.safetensors", "history")
    kept = ll.history(base)
    assert [(each.label, each.c) for each in kept] == [(each["label"], each["c"]) for each in results["history"]]
    assert all(set(each.ranks.values()) == {1} for each in kept)


class Tokenizer:
    """As much as batches use."""

    pad_token_id = eos_token_id = 0


EXAMPLES = {side: [Example(Pair("", "", ""), [5] * 4, [6] * 4)] * 3 for side in ("positive", "negative")}


@pytest.mark.parametrize(("size", "tried"), [(1, {1}), (2, {1, 2}), (4, {1, 3})])
def test_a_step_is_timed_with_one_prompt_first_and_leaves_nothing(
    size: int, tried: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state, counts = tiny_llama(), torch.get_rng_state(), set()
    both = poles.loss_at_both_poles

    def noted(model: Any, name: str, pair: Any) -> Any:
        counts.update(len(batch["input_ids"]) for batch in pair)
        return both(model, name, pair)

    monkeypatch.setattr(poles, "loss_at_both_poles", noted)
    assert 0 < poles.seconds_of_a_prompt(model, Tokenizer(), EXAMPLES, size, 2) < 1
    assert counts == tried
    assert ll.adapters(model) == {}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("steps", "batch_size", "timed"), [(None, None, [4]), (None, 2, [2]), (None, 9, [4]), (5, 2, [])]
)
def test_no_more_prompts_are_timed_at_once_than_a_step_may_have(
    steps: int | None, batch_size: int | None, timed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none where the number of steps is given."""
    sizes: list[int] = []

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(steer, "mean_gap", lambda *_: 0.0)
    monkeypatch.setattr(steer, "taught", lambda *_: EXAMPLES)
    monkeypatch.setattr(steer, "seconds_of_a_prompt", lambda *args: sizes.append(args[3]) or 1.0)
    monkeypatch.setattr(steer, "play", stop)
    rest = steer.Rest(Budget(5.0), 0.0, steps, batch_size)
    settings = {"rounds": 2, "answer_tokens": 3, "r": 2, "lr": 1e-3, "max_kl": 0.1, "seed": 0}
    task: Any = None
    with pytest.raises(KeyboardInterrupt):
        steer.play_all(None, None, task, {"positive": ([], []), "negative": ([], [])}, settings, rest, tmp_path)
    assert sizes == timed


def test_what_is_finished_is_kept_on_ctrl_c(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    play = steer.play

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if args[4] == "round-2":
            raise KeyboardInterrupt
        return play(*args, **kwargs)

    monkeypatch.setattr(steer, "play", interrupted)
    code, log = run(monkeypatch, **small)
    assert code == 130
    assert f"interrupted: history.safetensors, steer.safetensors of this run is in {small['out']}" in log
    base = ll.load_base(small["model"], torch.bfloat16)
    ll.load(base, small["out"] / "history.safetensors", "history")
    assert [each.label for each in ll.history(base)] == ["round-1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive": Path("none.jsonl")}, "none.jsonl is not a file"),
        ({"step": 0.0}, "--most 2, --step 0: wanted 1 to 100 steps from 0 to the most"),
        ({"step": float("nan")}, "--step nan: wanted"),
        ({"negative_words": None}, "--positive-words and --negative-words: give both, or neither"),
        ({"rounds": 3}, "--rounds 3: .*french.jsonl has 2 prompts to learn from"),
        ({"layer": 9}, r"layers"),
        ({"max_kl": -1.0}, r"calibrate_scale\(target_kl=-1.0\)"),
        ({"lr": 1e36}, r"step 2: the gradients are not finite\n  try a lower --lr than 1e\+36"),
    ],
)
def test_errors_that_the_user_can_mend(
    options: dict[str, Any], message: str, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, log = run(monkeypatch, **small | options)
    assert code == 1
    assert re.search(message, log), log
    assert "Traceback" not in log


def test_where_it_breaks_down_on_each_side() -> None:
    points = [Point(c, 0.0, kl, 0.0, []) for c, kl in ((-2, 3.0), (-1, 0.5), (0, 0.0), (1, 1.5), (2, 0.9), (3, 4.0))]
    assert broken(points, 1.0) == {-2, 1}
    assert broken(points, 2.0) == {-2, 3}
    assert broken(points, 5.0) == set()
    assert repeated(["one two three four", "One two three one two three"]) == pytest.approx(1 / 6)
    assert repeated(["", "two words"]) == 0.0


def test_the_grid_has_zero() -> None:
    assert steer.grid(2.0, 0.5) == [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
    assert steer.grid(1.0, 0.3) == pytest.approx([-0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9])
    with pytest.raises(DataError, match="wanted 1 to 100 steps"):
        steer.grid(1.0, 1e-3)
