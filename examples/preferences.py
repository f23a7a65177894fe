"""A preference that a program can check, plain words: its pairs, its measure on held-out questions, and a table."""

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from common import progress_bar
from prompt_sets import SHIPPED, halves, question
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

import lora_lite as ll

LETTERS, FEWEST = 5, 10
WIDTH = 80
BATCH = 20
TAUGHT = ("english", "past", "present")
"""Sets whose first halves are trained on. The second halves, which ask about other things, are held out."""

Chat = list[dict[str, str]]


def plainness(text: str) -> float:
    """The share of a text's distinct words that have LETTERS letters at most, from 0 to 1. What is missing of FEWEST
    words counts as long ones, so that neither one word nor one word again and again is plain."""
    words = set(re.findall(r"[^\W\d_]+", text.casefold()))
    return sum(len(word) <= LETTERS for word in words) / max(len(words), FEWEST)


def reward(completions: Sequence[Chat], **_: Any) -> list[float]:
    """`plainness` as TRL asks for it: of the answer in each chat."""
    return [plainness(completion[-1]["content"]) for completion in completions]


def questions() -> tuple[list[str], list[str]]:
    """(to train on, held out), from the shipped sets, without their system prompts."""
    taught = [question(prompt) for name in TAUGHT for prompt in halves(SHIPPED / f"{name}.jsonl")[0]]
    return taught, [question(prompt) for prompt in halves(SHIPPED / "english.jsonl")[1]]


def user(text: str) -> Chat:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> Chat:
    return [{"role": "assistant", "content": text}]


@torch.no_grad()
def drawn_pairs(model: Any, tokenizer: Any, prompts: Sequence[str], answers: int, tokens: int) -> list[dict[str, Chat]]:
    """For each prompt the plainest and the least plain of some answers that the model draws, as TRL takes a preference;
    none where they are as plain as each other."""
    pairs = []
    size = max(1, BATCH // answers)
    with progress_bar("drawing answers", len(prompts)) as bar:
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            (inputs,) = ll.prompt_batches(tokenizer, part, size)
            inputs = {key: value.to(model.device) for key, value in inputs.items()}
            options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": tokens}
            output = model.generate(
                **inputs, **options, num_return_sequences=answers, pad_token_id=tokenizer.pad_token_id
            )
            texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, prompt in enumerate(part):
                ordered = sorted(texts[i * answers : (i + 1) * answers], key=plainness)
                if plainness(ordered[0]) < plainness(ordered[-1]):
                    chosen, rejected = assistant(ordered[-1]), assistant(ordered[0])
                    pairs.append({"prompt": user(prompt), "chosen": chosen, "rejected": rejected})
            bar.update(len(part))
    return pairs


# ---- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What an adapter does at one c.

    plain       mean plainness of the answers, by the likeliest token each time
    kl          mean divergence from the base, in nats, over the tokens of the base's own answers and their prompts
    answers     to the held-out questions
    """

    name: str
    plain: float
    kl: float
    answers: list[str]


def scores(
    model: Any, tokenizer: Any, prompts: Sequence[str], coefficients: Iterable[float], tokens: int
) -> list[Score]:
    """The base, then the adapter at each c."""

    def answered() -> list[str]:
        return ll.greedy_answers(model, tokenizer, prompts, max_new_tokens=tokens, batch_size=BATCH)

    with ll.disabled(model):
        answers = answered()
    chats = [user(prompt) + assistant(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    batches = ll.prompt_batches(tokenizer, chats, BATCH)
    rows = [Score("base", _mean(answers), 0.0, answers)]
    for c in coefficients:
        with ll.scaled(model, c):
            answers = answered()
            kl = ll.kl_divergence(model, batches, positions="all").mean().item()
        rows.append(Score(f"c = {c:+g}", _mean(answers), kl, answers))
    return rows


def _mean(answers: Sequence[str]) -> float:
    return sum(map(plainness, answers)) / len(answers)


def show(title: str, prompt: str, rows: Sequence[Score]) -> None:
    """The figures of each row, and its answer to the first held-out question, in 80 columns."""
    table = Table(title=title, caption=f"plain words: share of up to {LETTERS} letters; the answer is to: {prompt}")
    for name in ("adapter", "plain words", "KL", "answer"):
        table.add_column(name, justify="right" if name in ("plain words", "KL") else "left")
    for row in rows:
        table.add_row(row.name, f"{row.plain:.3f}", f"{row.kl:.3f}", " ".join(row.answers[0].split()))
    Console(width=WIDTH).print(table)


# ---- training -----------------------------------------------------------------------------------


class Progress(TrainerCallback):
    """The examples' own bar, in the place of the trainer's, which prints a line for each step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar = progress_bar("training", state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.close()


def quiet() -> None:
    """Without TRL's bars over data of a moment, and its call of what transformers has renamed."""
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def settings(out: Any, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """The arguments that every run gives to TRL: float32 or bfloat16 as the base is, no file but the adapter's."""
    return {
        "output_dir": str(out),
        "max_steps": steps,
        "learning_rate": lr,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": max(1, steps // 10),
        "seed": seed,
        "bf16": False,
        "activation_checkpointing": False,  # it saves memory, and a small model has enough
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
