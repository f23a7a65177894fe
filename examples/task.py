"""Two sets of prompts to contrast: what to fit on, what to measure on, and which side an answer begins like."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonl import DataError
from loguru import logger
from prompt_sets import Prompt, own_token_sets, shipped_words, token_sets
from torch import Tensor

import lora_lite as ll

BATCH = 20
SIDES = ("positive", "negative")

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Task:
    """The prompts as batches: to fit on by side, held out by side, and neutral; and the two sets of first tokens."""

    fitted: Mapping[str, Batches]
    held_out: Mapping[str, Batches]
    neutral: Batches
    tokens: tuple[list[int], list[int]]

    def gap(self, model: Any, side: str) -> float:
        return ll.logit_gap(model, self.held_out[side], *self.tokens).mean().item()

    def gaps(self, model: Any) -> dict[str, float]:
        return {side: self.gap(model, side) for side in SIDES}

    def measure(self, model: Any) -> tuple[float, float]:
        """The two figures that a trial is judged by: the gap left on the positive side, and the divergence."""
        return self.gap(model, "positive"), ll.kl_divergence(model, self.neutral).mean().item()


def chosen_words(paths: Mapping[str, Path], positive: str | None, negative: str | None) -> list[list[str]] | None:
    """The first words of both sides: as given, or those of the shipped sets; None for the model's own.

    Raises DataError for one side alone.
    """
    if (positive is None) != (negative is None):
        raise DataError("--positive-words and --negative-words: give both, or neither")
    if positive is None or negative is None:
        positive, negative = (shipped_words(paths[side]) for side in SIDES)
    if positive is None or negative is None:
        return None
    return [[word.strip() for word in words.split(",") if word.strip()] for words in (positive, negative)]


def make_task(
    model: Any,
    tokenizer: Any,
    sides: Mapping[str, tuple[list[Prompt], list[Prompt]]],
    neutral: list[Prompt],
    words: list[list[str]] | None,
) -> Task:
    """Raises DataError for words that don't tell the sides apart, ConfigError for chats without a template."""
    fitted, held_out = (
        {side: ll.prompt_batches(tokenizer, sides[side][half], BATCH) for side in SIDES} for half in (0, 1)
    )
    tokens = token_sets(tokenizer, *words) if words else own_token_sets(model, fitted["positive"], fitted["negative"])
    for side, ids in zip(SIDES, tokens, strict=True):
        logger.info(f"first tokens of the {side} side: {' '.join(tokenizer.convert_ids_to_tokens(ids))}")
    return Task(fitted, held_out, ll.prompt_batches(tokenizer, neutral, BATCH), tokens)
