"""The effect of an adapter on sentences that its fit has not seen, in nats a token.

mean log p of the positive side's tokens less that of the negative side's, adapted less base. Above 0, the model would
sooner speak like the positive side. Each sentence is the model's answer to one request.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from .damage import Number
from .forward import Scales, at_scales, reading
from .texts import chat_ids, word_ids

REQUEST = "Write a sentence."
HELD_OUT = 4  # every fourth line
MOST_HELD_OUT = 8  # lines of a side that are measured on
SIDES = ("positive", "negative")


@dataclass(frozen=True)
class Lines:
    """Two lists of sentences."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]

    @property
    def is_split(self) -> bool:
        """Are there enough on both sides that every fourth can stay out of the fit?"""
        return min(len(self.positive), len(self.negative)) >= HELD_OUT

    def fitted(self, side: str) -> tuple[str, ...]:
        """The lines that a vector is fitted to."""
        lines: tuple[str, ...] = getattr(self, side)
        return tuple(line for i, line in enumerate(lines) if i % HELD_OUT < HELD_OUT - 1) if self.is_split else lines

    def held_out(self, side: str) -> tuple[str, ...]:
        """The lines that the effect is measured on; none, where the sides are too short to spare any."""
        lines: tuple[str, ...] = getattr(self, side)
        return lines[HELD_OUT - 1 :: HELD_OUT][:MOST_HELD_OUT] if self.is_split else ()


def batch_of(tokenizer: Any, lines: Sequence[str], system: str | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """The lines as answers: a batch (b, t) padded on the left, and where its lines' tokens are, (b, t) booleans."""
    prefix, words = chat_ids(tokenizer, REQUEST, system), [word_ids(tokenizer, line) for line in lines]
    longest = max(map(len, words))
    padding = [longest - len(ids) for ids in words]
    ids = [[0] * n + prefix + word for n, word in zip(padding, words, strict=True)]
    attended = [[0] * n + [1] * (len(row) - n) for n, row in zip(padding, ids, strict=True)]
    is_word = torch.tensor([[0] * (len(row) - len(w)) + [1] * len(w) for row, w in zip(ids, words, strict=True)])
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(attended)}, is_word.bool()


class Effects:
    """The mean log-probabilities that were measured, by what they depend on."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.known: dict[tuple[Any, ...], float] = {}

    def effect(self, lines: Lines, scales: Scales, versions: dict[str, str], system: str | None = None) -> Number:
        """The effect of adapters at these scales, or of a system prompt."""
        on = {name: c for name, c in scales.items() if c}
        moved = 0.0
        for side, sign in zip(SIDES, (1, -1), strict=True):
            with_it = yield from self._mean(lines.held_out(side), on, versions, system)
            without = yield from self._mean(lines.held_out(side), {}, {}, None)
            moved += sign * (with_it - without)
        return moved

    def _mean(self, lines: tuple[str, ...], on: Scales, versions: dict[str, str], system: str | None) -> Number:
        key = (lines, tuple(sorted((versions[name], c) for name, c in on.items())), system)
        if key not in self.known:
            batch, is_word = batch_of(self.tokenizer, lines, system)
            self.known[key] = self._mean_log_probability(batch, is_word, on)
            yield
            while len(self.known) > 5000:
                del self.known[next(iter(self.known))]
        return self.known[key]

    @torch.no_grad()
    def _mean_log_probability(self, batch: dict[str, Tensor], is_word: Bool[Tensor, "b t"], on: Scales) -> float:
        inputs = reading(self.model, batch["input_ids"], batch["attention_mask"], is_word)
        with at_scales(self.model, on):
            logits = self.model(**inputs, use_cache=False).logits
        before = is_word[:, 1:].to(logits.device)  # the position that each token comes after
        logp = logits[:, :-1][before].float().log_softmax(-1)  # (n, v)
        return float(logp.gather(1, inputs["input_ids"][:, 1:][before][:, None]).double().mean())
