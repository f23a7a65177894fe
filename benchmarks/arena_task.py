"""The data of the arena: rows of tokens to train on, to tune the learning rate on and to measure on, and neutral text.

A row is a question and its answer as plain text, without a chat template, which would be a third of its tokens. The
loss is on the answers.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from batches import IGNORED, Batch, Example, collate, encode
from pairs import read_jsonl, split, stdlib_pairs
from prompt_sets import SHIPPED, question, read_prompts
from torch import Tensor
from torch.nn import functional as F

import lora_lite as ll

GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k/train.jsonl"
"""Beside the repository, where it is."""

EVALUATED = 8
"""Rows at once, of about one length."""

ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Task:
    """Three sets of rows that share no question (of the standard library, no module), and batches of neutral text."""

    name: str
    train: list[Example]
    tuning: list[Example]
    held_out: list[Example]
    neutral: list[dict[str, Tensor]]
    pad: int = 0

    @property
    def fingerprint(self) -> str:
        rows = [[row.prompt + row.completion for row in part] for part in (self.train, self.tuning, self.held_out)]
        neutral = [batch["input_ids"].tolist() for batch in self.neutral]
        return hashlib.sha256(json.dumps([rows, neutral]).encode()).hexdigest()[:16]

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Without an end: the rows in a new order each time that they are gone through, the same for one seed."""
        order, rows = random.Random(seed), list[Example]()
        while True:
            while len(rows) < size:
                rows += order.sample(self.train, len(self.train))
            yield collate(self.pad, rows[:size])
            rows = rows[size:]


def read_task(
    data: Path | None, tokenizer: Any, base: Any, folder: Path, max_length: int, counts: tuple[int, int, int]
) -> Task:
    """The data of a JSONL file; without one GSM8K's where it is beside the project, else the standard library's.

    counts      rows of the tuning split, rows held out, and neutral prompts, at most
    folder      where the base's answers to the neutral prompts are kept: another run must have the same

    Raises DataError.
    """
    file = data or (GSM8K if GSM8K.exists() else None)
    tokenizer.chat_template = None
    rest, held_out = split(stdlib_pairs() if file is None else read_jsonl(file))
    train, tuning = split(rest)
    rows = [encode(tokenizer, pairs, max_length) for pairs in (train, tuning, held_out)]
    few = [
        by_length(random.Random(0).sample(part, min(n, len(part))))
        for part, n in zip(rows[1:], counts[:2], strict=True)
    ]
    texts = neutral_texts(tokenizer, base, folder, counts[2])
    name = "the standard library's docstrings" if file is None else f"{file.parent.name}/{file.name}"
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Task(name, rows[0], few[0], few[1], ll.prompt_batches(tokenizer, texts, EVALUATED), pad)


def neutral_texts(tokenizer: Any, base: Any, folder: Path, count: int) -> list[str]:
    """Everyday questions with the base's own answers, which are what it must not forget."""
    prompts = [f"{question(prompt)}\n" for prompt in read_prompts(SHIPPED / "neutral.jsonl")[:count]]
    asked = hashlib.sha256(json.dumps([base.config._name_or_path, str(base.dtype), prompts]).encode()).hexdigest()
    file = folder / f"neutral-{asked[:12]}.json"
    if not file.exists():
        answers = ll.greedy_answers(base, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS)
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]))
    texts: list[str] = json.loads(file.read_text())
    return texts


def by_length(rows: list[Example]) -> list[Example]:
    """Rows of about one length beside each other, so that a batch has little padding."""
    return sorted(rows, key=lambda row: len(row.prompt) + len(row.completion))


def loss_of(model: Any, batch: Batch) -> Tensor:
    """The mean loss over the tokens of the answers."""
    loss: Tensor = model(**moved(batch, model), use_cache=False).loss
    return loss


@torch.no_grad()
def token_losses(model: Any, rows: list[Example], pad: int) -> Tensor:
    """The loss of each token of the answers, row after row: (tokens,) float32."""
    model.eval()
    losses = []
    for start in range(0, len(rows), EVALUATED):
        batch = moved(collate(pad, rows[start : start + EVALUATED]), model)
        labels = batch.pop("labels")[:, 1:]  # (b, t): each is predicted one place before it
        logits = model(**batch, use_cache=False).logits[:, :-1].float()  # (b, t, v)
        loss = F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=IGNORED)  # (b, t)
        losses.append(loss[labels != IGNORED].cpu())
    return torch.cat(losses)


def moved(batch: Batch, model: Any) -> Batch:
    return {key: value.to(model.device) for key, value in batch.items()}
