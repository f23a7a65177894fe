"""The abliteration example: its prompt sets, its search, and a whole run of it as a person starts it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import abliterate
import budget
import optuna
import prompt_sets
import pytest
import search
import torch
import typer
from jsonl import DataError
from loguru import logger
from models import tiny_llama
from optuna.trial import FrozenTrial, TrialState
from prompt_sets import SHIPPED

import lora_lite as ll

ABLITERATE = Path(__file__).parents[2] / "examples" / "abliterate.py"
PAIRS = [("french", "english"), ("upper", "lower"), ("past", "present")]


# ---- prompt sets --------------------------------------------------------------------------------


ASKED = "tell me about write a short text hundred years ago today"


def noun(prompt: str) -> str:
    """The one word of a shipped prompt that changes."""
    (found,) = set(prompt.lower().rstrip(".").split()) - set(ASKED.split())
    return found


@pytest.mark.parametrize(("positive", "negative"), PAIRS)
def test_shipped_pairs_ask_about_the_same_things(positive: str, negative: str) -> None:
    chats = [prompt_sets.read_prompts(SHIPPED / f"{name}.jsonl") for name in (positive, negative)]
    for side in chats:
        assert len(side) == 40
        assert len({chat[0]["content"] for chat in side}) == 1  # type: ignore[index, call-overload]
        assert [[turn["role"] for turn in chat] for chat in side] == [["system", "user"]] * 40  # type: ignore[index]
    nouns = [[noun(prompt_sets.question(chat)) for chat in side] for side in chats]
    assert nouns[0] == nouns[1]
    assert len(set(nouns[0])) == 40
    assert nouns[0] == [noun(prompt_sets.question(p)) for p in prompt_sets.read_prompts(SHIPPED / "french.jsonl")]
    fitted, held_out = prompt_sets.halves(SHIPPED / f"{positive}.jsonl")
    assert (len(fitted), len(held_out), fitted + held_out) == (20, 20, chats[0])


def test_neutral_prompts() -> None:
    prompts = prompt_sets.read_prompts(SHIPPED / "neutral.jsonl")
    assert len(set(map(str, prompts))) == len(prompts) == 48
    assert all(isinstance(prompt, str) for prompt in prompts)


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "set.txt"
    file.write_text("One?\n\n  Two? \nThree?\nFour?\n")
    assert prompt_sets.halves(file) == (["One?", "Two?"], ["Three?", "Four?"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"set\.jsonl is empty"),
        ('{"prompt": "a"}\nTell me.\n', r"(?s)set\.jsonl, line 2: not JSON.*found: Tell me\."),
        ('["a"]\n', r"(?s)line 1: a JSON list, wanted an object of 'prompt', and 'system' if"),
        ('{"question": "a"}\n', r"(?s)line 1: wanted 'prompt'.*found: 'question'"),
        ('{"prompt": "a", "sytem": "b"}\n', r"(?s)line 1: wanted 'prompt'.*found: 'prompt', 'sytem'"),
        ('{"prompt": "a", "system": 1}\n', r"(?s)line 1: 'system' is not text.*found: 1"),
        ('{"prompt": "a"}\n' * 3, r"set\.jsonl has 3 prompts: wanted 4 at least, half of them to be held out"),
    ],
)
def test_bad_prompt_sets(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        prompt_sets.halves(file)


def test_a_missing_prompt_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)nothing\.jsonl is not a file.*wanted a JSON object a line"):
        prompt_sets.read_prompts(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match=r"(?s)nothing\.txt is not a file.*wanted a prompt a line"):
        prompt_sets.read_prompts(tmp_path / "nothing.txt")


# ---- token sets ---------------------------------------------------------------------------------


class Letters:
    """As much of a tokenizer as `token_sets` uses: a token a letter."""

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        return type("Encoding", (), {"input_ids": [ord(letter) for letter in text]})


def test_words_that_begin_alike_count_for_neither_side() -> None:
    assert prompt_sets.token_sets(Letters(), ["Le", "Un", "Ce"], ["The", "Us"]) == ([67, 76], [84])
    with pytest.raises(DataError, match=r"first words Us: no first token that the other side hasn't"):
        prompt_sets.token_sets(Letters(), ["Le", "Un"], ["Us"])
    with pytest.raises(DataError, match=r"first words \(none\)"):
        prompt_sets.token_sets(Letters(), [], ["Us"])


def test_the_words_of_a_pair_of_sets(tmp_path: Path) -> None:
    shipped = {"positive": SHIPPED / "french.jsonl", "negative": SHIPPED / "english.jsonl"}
    french, english = abliterate.chosen_words(shipped, None, None) or []
    assert {"Le", "Un"} <= set(french)
    assert {"The", "In"} <= set(english)
    assert abliterate.chosen_words(shipped, "Oui, Non", "Yes") == [["Oui", "Non"], ["Yes"]]
    for other in (SHIPPED / "upper.jsonl", tmp_path / "french.jsonl"):
        assert abliterate.chosen_words(shipped | {"positive": other}, None, None) is None
    with pytest.raises(DataError, match="--positive-words and --negative-words: give both, or neither"):
        abliterate.chosen_words(shipped, "Oui", None)


def test_without_words_the_models_own_first_tokens() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    sides = [[{"input_ids": torch.full((2, 4), token)}] for token in (5, 9)]
    positive, negative = prompt_sets.own_token_sets(model, *sides)
    with torch.no_grad():
        p, n = (model(**batches[0]).logits[0, -1].softmax(-1) for batches in sides)
    assert int(p.argmax()) in positive
    assert int(n.argmax()) in negative
    for here, there, tokens in ((p, n, positive), (n, p, negative)):
        assert all(here[token] > prompt_sets.DISTINCT * there[token] for token in tokens)
        assert len(tokens) <= prompt_sets.LIKELY
    with pytest.raises(DataError, match="begins its answers to both sides alike"):
        prompt_sets.own_token_sets(model, sides[0], sides[0])


# ---- the search ---------------------------------------------------------------------------------


@pytest.fixture
def adapter() -> ll.Adapter:
    return ll.attach(tiny_llama(), ll.AbliterationConfig(), calibration_data={"directions": torch.randn(64)})


SETTINGS = {"model": "tiny", "seed": 0}


def measure_of(adapter: ll.Adapter) -> search.Measure:
    """Objectives that depend on the trial alone."""
    return lambda: (-sum(kernel.max_weight for _, kernel in adapter.config.kernels), adapter.config.layer)


def values(study: optuna.Study) -> list[Any]:
    return [(trial.params, trial.values) for trial in search.measured(study)]


def test_a_search_in_two_parts_is_the_search_in_one(adapter: ll.Adapter, tmp_path: Path) -> None:
    whole = search.open_study(tmp_path / "a" / "study.jsonl", SETTINGS, 2)
    search.search(whole, adapter, measure_of(adapter), 14, 2, seed=3)
    for trials in (4, 14):
        part = search.open_study(tmp_path / "b" / "study.jsonl", SETTINGS, 2)
        search.search(part, adapter, measure_of(adapter), trials, 2, seed=3)
        assert search.tried(part) == trials
    assert values(part) == values(whole)
    assert values(part)[0][0] == search.uniform(2)
    with pytest.raises(DataError, match=r"(?s)study\.jsonl is a search with another model, seed.*another --out"):
        search.open_study(tmp_path / "b" / "study.jsonl", {"model": "other", "seed": 1}, 2)
    with pytest.raises(DataError, match=r"study\.jsonl is a search with another dtype"):  # one that tells none
        search.open_study(tmp_path / "b" / "study.jsonl", SETTINGS | {"dtype": "float32"}, 2)


def test_an_interrupted_search_keeps_what_was_tried(adapter: ll.Adapter, tmp_path: Path) -> None:
    left = [1.0, 2.0]

    def measure() -> tuple[float, float]:
        if not left:
            raise KeyboardInterrupt
        return left.pop(), 0.0

    study = search.open_study(tmp_path / "study.jsonl", SETTINGS, 2)
    with pytest.raises(KeyboardInterrupt):
        search.search(study, adapter, measure, 5, 2, seed=0)
    study.ask()  # a killed process leaves a trial that is running
    again = search.open_study(tmp_path / "study.jsonl", SETTINGS, 2)
    assert search.tried(again) == 2
    assert [trial.state for trial in again.trials] == [TrialState.COMPLETE] * 2 + [TrialState.FAIL] * 2
    search.search(again, adapter, measure_of(adapter), 5, 2, seed=0)
    assert len(search.measured(again)) == 5


def test_a_trial_that_the_method_refuses_is_left_out(adapter: ll.Adapter, tmp_path: Path) -> None:
    def measure() -> tuple[float, float]:
        raise ll.BaseModelError("too much")

    study = search.open_study(tmp_path / "study.jsonl", SETTINGS, 2)
    search.search(study, adapter, measure, 3, 2, seed=0)
    assert search.tried(study) == 3
    with pytest.raises(DataError, match="no trial was measured"):
        search.pick(search.measured(study), 0.1)


@pytest.mark.parametrize(
    ("path", "component"),
    [
        ("model.layers.3.self_attn.o_proj", "attention"),
        ("model.layers.3.linear_attn.out_proj", "attention"),
        ("transformer.h.3.attn.c_proj", "attention"),
        ("encoder.block.3.layer.0.SelfAttention.o", "attention"),
        ("model.layers.3.mlp.down_proj", "mlp"),
        ("model.layers.3.mlp.experts", "mlp"),
        ("model.decoder.layers.3.fc2", "mlp"),
    ],
)
def test_every_target_has_one_kernel(path: str, component: str) -> None:
    assert [name for name, pattern in search.COMPONENTS.items() if re.search(pattern, path)] == [component]


def trial(number: int, gap: float, kl: float) -> FrozenTrial:
    found = optuna.trial.create_trial(values=[gap, kl])
    found.number = number
    return found


def test_picking_from_a_front() -> None:
    trials = [trial(0, 2.0, 0.0), trial(1, -1.0, 0.08), trial(2, -0.5, 0.09), trial(3, -3.0, 0.5), trial(4, 1.0, 0.02)]
    assert [t.number for t in search.front(trials)] == [0, 4, 1, 3]
    assert search.pick(trials, 0.1).number == 1
    assert search.pick(trials, 0.05).number == 4
    assert search.pick(trials, 1.0).number == 3
    assert search.pick(trials[1:4], 0.01).number == 1
    assert search.pick(trials, 0.1, 2).number == 2
    with pytest.raises(DataError, match=r"(?s)--pick 9: no such trial.*measured: 0, 1, 2, 3, 4"):
        search.pick(trials, 0.1, 9)


# ---- fitting to the time ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "asked", "seconds", "wanted"),
    [
        (0, None, 0.01, abliterate.MOST_TRIALS),
        (0, None, 100.0, abliterate.LEAST_TRIALS),
        (20, None, 0.01, abliterate.MOST_TRIALS),
        (20, None, 100.0, 20 + abliterate.LEAST_TRIALS),
        (abliterate.MOST_TRIALS - 1, None, 100.0, abliterate.MOST_TRIALS),
        (abliterate.MOST_TRIALS + 3, None, 0.01, abliterate.MOST_TRIALS + 3),
        (20, 12, 0.01, 12),
        (20, 70, 100.0, 70),
    ],
)
def test_a_search_goes_on_to_what_the_time_allows(
    found: int, asked: int | None, seconds: float, wanted: int, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    """A finished search does no more by itself; a number that is asked for counts the trials that are there."""
    monkeypatch.setattr(abliterate, "seconds_of", lambda run: seconds)
    task: Any = type("Task", (), {"measure": lambda self, model: (0.0, 0.0)})()
    time_left = budget.Budget(5.0)
    tokens, trials = abliterate.fitted_to(time_left, None, None, task, [[]], 1.0, found, 7, asked)
    assert (tokens, trials) == (7, wanted)
    new = max(0, wanted - found)
    assert f"{new} trials {'as asked' if asked else f'at {seconds:.2g} s'}" in log[0]


@pytest.mark.parametrize("asked", [[["shown"]], [["shown"], ["searched", "for markers"]]])
def test_the_trials_take_what_the_rest_leaves(asked: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abliterate, "seconds_of", lambda run: 3.0)
    task: Any = type("Task", (), {"measure": lambda self, model: (0.0, 0.0)})()
    tokens, trials = abliterate.fitted_to(budget.Budget(5.0), None, None, task, asked, 10.0, 0, None, None)
    assert abliterate.LEAST_TRIALS < trials <= abliterate.MOST_TRIALS
    assert abliterate.LEAST_TOKENS < tokens < abliterate.MOST_TOKENS
    answers = 2 * tokens * len(asked) * 3.0 / abliterate.PROBED_TOKENS
    assert 200 < 10 + 3 * (trials + 3) + answers < 300


# ---- whole runs ---------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Any]:
    """Options for sets of four prompts."""
    options: dict[str, Any] = {"out": tmp_path / "out", "positive_words": "Le,La,Les,Un", "negative_words": "The,A,In"}
    for side, name in (("positive", "french"), ("negative", "english"), ("neutral", "neutral")):
        options[side] = tmp_path / f"{name}.jsonl"
        lines = (SHIPPED / f"{name}.jsonl").read_text().splitlines(keepends=True)
        options[side].write_text("".join(lines[:4]))
    return options


@pytest.mark.slow
def test_a_run_and_going_on_from_it(
    smollm2: str, small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [part for name, value in small.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [
        sys.executable,
        str(ABLITERATE),
        *arguments,
        "--trials",
        "2",
        "--minutes",
        "0",
        "--markers",
        " est , les ",
        "--answer-tokens",
        "4",
    ]
    # One thread: where tests run side by side, two would wait for each other ten times as long.
    environment = os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ABLITERATE.parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "Error" not in done.stderr
    assert "search 100%" in done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    for label in ("separation", "Pareto front", "prompt", "before", "after"):
        assert label in done.stdout
    names = {"adapter.safetensors", "directions.png", "front.png", "results.json", "study.jsonl"}
    assert {file.name for file in small["out"].iterdir()} == names
    results = json.loads((small["out"] / "results.json").read_text())
    assert len(results["trials"]) == 2
    assert len(results["directions"]) == 30
    picked = results["trials"][results["picked"]]
    assert results["gap_after"]["positive"] == pytest.approx(picked["gap"], abs=1e-6)
    assert results["kl_mean"] == pytest.approx(picked["kl"], abs=1e-6)
    assert results["marker_rate"].keys() == {"before", "after"}
    assert "torch" in results["versions"]
    adapter = ll.load(ll.load_base(smollm2), small["out"] / "adapter.safetensors")
    assert adapter.config.layer == picked["layer"]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(abliterate, "search", interrupted)
    code, log = run(monkeypatch, **small, trials=9)
    assert code == 130
    assert "holds 2 trials: the search goes on from there to 9" in log
    assert "interrupted after 2 of 9 trials, which are kept: the same command goes on" in log


def test_a_search_goes_on_in_its_own_dtype_alone(
    tiny_chat: str, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --dtype, two machines may take two: the figures of one are none of the other's."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(abliterate, "search", interrupted)
    monkeypatch.setattr(abliterate, "fitted_to", lambda *_: (1, 1))
    assert run(monkeypatch, **small, model=tiny_chat, dtype="float32")[0] == 130
    assert run(monkeypatch, **small, model=tiny_chat, dtype="float32")[0] == 130
    code, log = run(monkeypatch, **small, model=tiny_chat, dtype="bfloat16")
    assert code == 1
    assert f"{small['out'] / 'study.jsonl'} is a search with another dtype" in log


def test_errors_that_the_user_can_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, log = run(monkeypatch, positive=tmp_path / "none.jsonl", out=tmp_path / "out")
    assert code == 1
    assert "none.jsonl is not a file" in log
    assert list(tmp_path.iterdir()) == []


def run(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[int, str]:
    """(exit code, log) of the example in this process, when it stops early."""
    monkeypatch.setattr(abliterate, "set_up", lambda seed: None)
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}")
    try:
        with pytest.raises(typer.Exit) as stopped:
            abliterate.main(**options)
    finally:
        logger.remove(sink)
    return stopped.value.exit_code, "".join(lines)
