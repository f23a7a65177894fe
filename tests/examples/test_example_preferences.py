"""The examples of preference training: their rule, their pairs, both poles in one step, and whole runs."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dpo
import grpo
import preferences
import pytest
import torch
from datasets import Dataset
from models import config, perturb, tiny_llama
from transformers import AutoTokenizer
from trl import DPOConfig
from trl_tiny import PAIRS, tokenizer, trl_arguments

import lora_lite as ll
from lora_lite.trainer import reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # which TRL reads
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),  # torch's, on a machine without an accelerator
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),  # which TRL 1.16 still calls
]
EXAMPLES = Path(dpo.__file__).parent
SMALL: dict[str, Any] = {"r": 2, "lr": 1e-2, "dtype": "float32", "steps": 2, "held_out": 2, "tokens": 6, "seed": 0}


def test_the_rule_counts_distinct_short_words() -> None:
    short = "we can go to the sea and swim for long"
    assert preferences.plainness(short) == 1
    assert preferences.plainness("Extraordinary circumstances " + short) == pytest.approx(10 / 12)
    assert preferences.plainness("the the THE the the the the the the the") == 0.1
    assert preferences.plainness("") == preferences.plainness("12 34 !?") == 0
    assert preferences.reward([[{"role": "assistant", "content": short}]]) == [1.0]


def test_the_held_out_questions_ask_about_other_things() -> None:
    taught, held_out = preferences.questions()
    assert (len(taught), len(held_out)) == (60, 20)
    topics = {re.sub(r"Tell me about (.*)\.", r"\1", text) for text in held_out}
    assert not [text for text in taught if any(re.search(rf"\b{topic}\b", text) for topic in topics)]


def test_pairs_are_the_plainest_and_the_least_plain_of_what_was_drawn(tiny_chat: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    pairs = preferences.drawn_pairs(ll.load_base(tiny_chat, torch.float32), tokenizer, ["one", "two", "three"], 4, 12)
    assert pairs
    for pair in pairs:
        chosen, rejected = (preferences.plainness(pair[side][-1]["content"]) for side in ("chosen", "rejected"))
        assert chosen > rejected


def test_reversed_pairs_are_the_pairs_the_other_way_round() -> None:
    inputs = {"input_ids": torch.tensor([[1, 1], [2, 2], [3, 3], [4, 4]])}
    swapped = dpo.reversed_pairs(inputs)
    assert swapped["input_ids"].tolist() == [[3, 3], [4, 4], [1, 1], [2, 2]]
    assert torch.equal(dpo.reversed_pairs(swapped)["input_ids"], inputs["input_ids"])


def test_a_step_at_both_poles_has_the_gradients_of_two(tmp_path: Path) -> None:
    """Against DPO at each pole by itself: at c = -1, with the pairs the other way round."""
    model = tiny_llama()
    adapter = ll.attach(model, config("lora"))
    perturb(adapter)
    swapped = [pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in PAIRS]

    def gradients(kind: Any, pairs: Any) -> list[torch.Tensor]:
        trainer = kind(
            model,
            ref_model=reference(model),
            args=trl_arguments(DPOConfig, tmp_path, max_length=16),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer(),
        )
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        assert len(inputs["input_ids"]) == 2 * len(pairs)
        return list(torch.autograd.grad(trainer.compute_loss(model, inputs), list(adapter.parameters())))

    model.train()
    both = gradients(dpo.TrainerAtBothPoles, PAIRS)
    up = gradients(dpo.Trainer, PAIRS)
    with ll.scaled(model, -1.0):
        down = gradients(dpo.Trainer, swapped)
    for sum_, *parts in zip(both, up, down, strict=True):
        assert all(part.any() for part in parts)
        torch.testing.assert_close(sum_, parts[0] + parts[1])


@pytest.fixture
def run(tiny_chat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """An example in this process, on the tiny model."""

    def run(example: Any, **more: Any) -> None:
        monkeypatch.setattr(example, "set_up", torch.manual_seed)
        monkeypatch.setattr(example, "quiet", lambda: None)
        example.main(**(SMALL | {"model": tiny_chat, "beta": 0.1, "out": tmp_path} | more))

    return run


def table_of(text: str) -> dict[str, tuple[float, float]]:
    assert max(map(len, text.splitlines())) <= preferences.WIDTH
    rows = re.findall(r"│ (base|c = [+-]1) +│ +(\S+) │ +(\S+) │", text)
    return {name: (float(plain), float(kl)) for name, plain, kl in rows}


@pytest.mark.parametrize("poles", [False, True])
def test_dpo(poles: bool, run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(dpo, poles=poles, batch_size=2, prompts=3, answers=3)
    table = table_of(capsys.readouterr().out)
    assert list(table) == ["base", "c = +1", "c = -1"]
    assert table["base"][1] == 0 < table["c = +1"][1]
    assert (tmp_path / "adapter.safetensors").is_file()


def test_grpo(run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(grpo, groups=1, answers=2)
    assert list(table_of(capsys.readouterr().out)) == ["base", "c = +1"]
    assert (tmp_path / "adapter.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [("dpo.py", "--prompts", "3", "--answers", "3"), ("dpo.py", "--poles", "--prompts", "3"), ("grpo.py",)]
)
def test_a_run(smollm2: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    small = ["--steps", "2", "--held-out", "2", "--tokens", "12", "--out", str(tmp_path)]
    command = [sys.executable, str(EXAMPLES / arguments[0]), *arguments[1:], *small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert table_of(done.stdout)["base"][1] == 0
    assert "bit for bit" in done.stderr
