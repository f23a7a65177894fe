"""Rounds of one LoRA trained at both poles: at c = +1 the manner of one side of prompts, at c = -1 that of the other.

The manner is learnt from the model's own answers under each side's system prompt, to the same question without it
(context distillation, Askell et al. 2021, arXiv:2112.00861). c = 0 stays the base with the rounds kept before.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from typing import Any

import torch
from batches import Batch, Example, batches, chat
from budget import seconds_of_one
from common import progress_bar
from finetune import CLIP, DivergedError, loss_of
from jsonl import DataError
from pairs import Pair
from prompt_sets import Prompt, question
from task import BATCH, Task
from torch import Tensor

import lora_lite as ll

NAME, HISTORY = "round", "history"
POLES = {"positive": 1.0, "negative": -1.0}


@dataclass
class Round:
    """The results of a round. losses: of steps, the sum of both poles. kl: from the pristine base, once it is kept."""

    label: str
    losses: list[float] = field(default_factory=list)
    found: ll.Calibrated | None = None
    kl: float = 0.0
    gap: float = 0.0


def taught(
    model: Any, tokenizer: Any, prompts: Mapping[str, Sequence[Prompt]], tokens: int
) -> dict[str, list[Example]]:
    """By side: the question alone, and how the model as it stands answers with the system prompt. Raises DataError."""
    by_side = {}
    for side, asked in prompts.items():
        answers = ll.greedy_answers(model, tokenizer, asked, max_new_tokens=tokens, batch_size=BATCH)
        pairs = [Pair(question(prompt), answer, side) for prompt, answer in zip(asked, answers, strict=True)]
        examples = [_example(tokenizer, pair) for pair in pairs if pair.completion.strip()]
        if not examples:
            raise DataError(f"the model has no answer to any of the {side} side's prompts, so nothing to learn from")
        by_side[side] = examples
    return by_side


def _example(tokenizer: Any, pair: Pair) -> Example:
    """The tokens, without an end: the answer was cut off at some length."""
    prompt, completion = chat(tokenizer, pair.prompt), pair.completion
    return Example(pair, *(tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, completion)))


def loss_at_both_poles(model: Any, name: str, pair: Sequence[Batch]) -> Tensor:
    """The sum of the loss of the first batch at c = 1 and of the second at c = -1."""
    losses = []
    for c, batch in zip(POLES.values(), pair, strict=True):
        with ll.scaled(model, c, name):
            losses.append(loss_of(model, batch))
    return torch.stack(losses).sum()


def train_at_both_poles(
    model: Any, adapter: ll.Adapter, data: Mapping[str, Iterable[Batch]], steps: int, lr: float
) -> Iterator[float]:
    """AdamW; the loss of each step, the sum of both poles. Raises DivergedError before a step that would spoil it."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0)
    endless = [chain.from_iterable(repeat(data[side])) for side in POLES]
    with progress_bar("training", steps) as bar:
        for step, pair in enumerate(islice(zip(*endless, strict=True), steps), 1):
            model.train()
            loss = loss_at_both_poles(model, adapter.name, pair)
            loss.backward()
            if not torch.nn.utils.clip_grad_norm_(adapter.parameters(), CLIP).isfinite():
                raise DivergedError(f"step {step}: the gradients are not finite\n  try a lower --lr than {lr:g}")
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
            bar.update()
            yield loss.item()
    model.eval()


def seconds_of_a_prompt(model: Any, tokenizer: Any, examples: Mapping[str, list[Example]], size: int, r: int) -> float:
    """The seconds for each prompt of a training step of up to `size` prompts of each pole, on an adapter that is taken
    off again. It changes nothing, the state of the random numbers included."""

    def step(count: int) -> None:
        pair = [next(iter(batches(tokenizer, examples[side], count))) for side in POLES]
        loss_at_both_poles(model, NAME, pair).backward()

    with torch.random.fork_rng(devices=[]):
        ll.attach(model, ll.LoRAConfig(r=r), NAME)
        model.eval()
        seconds = seconds_of_one(step, min(size, *map(len, examples.values())))
    ll.detach(model, NAME)
    return seconds


def play(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Mapping[str, list[Example]],
    label: str,
    *,
    r: int,
    steps: int,
    batch_size: int,
    lr: float,
    budget: float,
    seed: int,
) -> Round:
    """Train, calibrate, keep: c is where the round changes base + history by the budget on the neutral prompts."""
    adapter = ll.attach(model, ll.LoRAConfig(r=r), NAME)
    data = {side: batches(tokenizer, examples[side], batch_size, seed) for side in POLES}
    done = Round(label)
    done.losses += train_at_both_poles(model, adapter, data, steps, lr)
    done.found = ll.calibrate_scale(model, task.neutral, budget, name=NAME)
    if done.found.c == 0:
        raise ll.ConfigError(f"{label}: no c with a divergence of {budget:g} was found, so there is nothing to keep")
    ll.freeze_into(model, NAME, into=HISTORY, c=done.found.c, label=label)
    done.kl = ll.kl_divergence(model, task.neutral).mean().item()
    done.gap = mean_gap(model, task)
    return done


def mean_gap(model: Any, task: Task) -> float:
    """The mean gap over the held-out prompts of both sides."""
    gaps = task.gaps(model)
    return sum(gaps.values()) / len(gaps)
