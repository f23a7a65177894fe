"""From pairs of texts to batches of tokens, with the loss on completions only."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from pairs import DataError, Pair
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Tensor]

IGNORED = -100
"""The label that transformers leaves out of the loss."""


@dataclass(frozen=True)
class Example:
    """A pair, and its tokens."""

    pair: Pair
    prompt: list[int]
    completion: list[int]


def encode(tokenizer: Any, pairs: list[Pair], max_length: int) -> list[Example]:
    """The pairs that fit in max_length tokens. Raises DataError if none does."""
    examples = [encode_pair(tokenizer, pair) for pair in pairs]
    fitting = [e for e in examples if len(e.prompt) + len(e.completion) <= max_length]
    if not fitting:
        shortest = min(len(e.prompt) + len(e.completion) for e in examples)
        raise DataError(
            f"none of {len(pairs)} pairs fits in --max-length {max_length}\n  the shortest has {shortest} tokens"
        )
    return fitting


def encode_pair(tokenizer: Any, pair: Pair) -> Example:
    prompt = tokenizer(chat(tokenizer, pair.prompt), add_special_tokens=False).input_ids
    completion = tokenizer(pair.completion, add_special_tokens=False).input_ids
    return Example(pair, prompt, [*completion, tokenizer.eos_token_id])


def chat(tokenizer: Any, prompt: str) -> str:
    """The prompt as the model was taught to read it, up to where its answer starts."""
    if tokenizer.chat_template is None:
        return f"{prompt}\n"
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def batches(tokenizer: Any, examples: list[Example], size: int, seed: int | None = None) -> Iterable[Batch]:
    """Batches in the order of the examples, or with a seed in a new order each time that they are gone through."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    order = None if seed is None else torch.Generator().manual_seed(seed)
    dataset = cast(Dataset[Example], examples)
    return DataLoader(dataset, size, shuffle=seed is not None, collate_fn=partial(collate, pad), generator=order)


def collate(pad: int, examples: list[Example]) -> Batch:
    """Pad on the left, so that completions end together: only there does the loss need logits, which cost most."""
    left = partial(pad_sequence, batch_first=True, padding_side="left")
    tokens = [torch.tensor(e.prompt + e.completion) for e in examples]
    labels = [torch.tensor([IGNORED] * len(e.prompt) + e.completion) for e in examples]
    mask = left([torch.ones_like(row) for row in tokens])
    scored = 1 + max(len(e.completion) for e in examples)  # a token is predicted one place before it
    return {
        "input_ids": left(tokens, padding_value=pad),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": left(labels, padding_value=IGNORED)[:, -scored:],
        # Places, not a number: for that, transformers cuts out a strided view, and a CPU takes 50 times as long to
        # multiply it in bfloat16.
        "logits_to_keep": torch.arange(-scored, 0),
    }
