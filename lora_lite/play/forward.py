"""Rows of text through the model in one forward, each at scales of its own; keys and values are kept for the next."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..core.adapter import adapters
from ..core.scaled import scaled
from ..core.variant import lookup
from ..errors import BaseModelError, ConfigError, TargetError
from ..measure.evaluate import contiguous_into_head

Scales = Mapping[str, float]
"""The scale of each adapter by its name; those that aren't in it are off."""


@dataclass(frozen=True)
class Row:
    """A sequence of tokens, and the scales at which the model reads it."""

    ids: Sequence[int]
    scales: Scales = field(default_factory=dict)


@contextmanager
def at_scales(model: nn.Module, *rows: Scales) -> Iterator[None]:
    """Within the block, each row of a batch at its scales; with one, the whole batch.

    Raises:
        ConfigError: where an adapter has gone since the request began.
    """
    present = adapters(model)
    if gone := {name for scales in rows for name in scales} - present.keys():
        raise ConfigError(f"{len(gone)} of the adapters was changed or removed meanwhile\n  start it again")
    with ExitStack() as stack:
        for name in present:
            each = [float(scales.get(name, 0.0)) for scales in rows]
            # One number where all are equal: rows are told apart only where they differ.
            stack.enter_context(scaled(model, each[0] if len(set(each)) == 1 else each, name))
        yield


def accepts(model: Any, argument: str) -> bool:
    """Does the model's forward take an argument of this name?"""
    return argument in inspect.signature(model.forward).parameters


def positions_of(attended: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """The position of each token in its row, whatever the padding before it, as generate counts."""
    return (attended.cumsum(1) - 1).clamp_min(0)


def reading(
    model: Any, ids: Int[Tensor, "b t"], attended: Int[Tensor, "b t"], is_answer: Bool[Tensor, "b t"]
) -> dict[str, Tensor]:
    """The arguments of one forward over prompts with their answers, which reads them as a Decoder would write them.

    Where an adapter acts at positions, labels say which tokens are the answer: without them, a row is all prompt.
    """
    inputs = {"input_ids": ids, "attention_mask": attended}
    if accepts(model, "position_ids"):
        inputs["position_ids"] = positions_of(attended)
    configs = [cfg for adapter in adapters(model).values() for cfg in adapter.configs]
    if any(lookup(cfg.variant).positions(cfg) is not None for cfg in configs):
        inputs["labels"] = ids.where(is_answer, -100)
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in inputs.items()}


class Decoder:
    """Some rows, padded on the left, that grow by a token at each step.

    Where rows can't be told apart in one forward (adapters on fused experts), the rows of each scale go through the
    model by themselves: `apart` says so.
    """

    def __init__(self, model: Any, rows: Sequence[Row]) -> None:
        longest, device = max(len(row.ids) for row in rows), next(model.parameters()).device
        self.model, self.scales, self.apart = model, [row.scales for row in rows], False
        padding = [longest - len(row.ids) for row in rows]
        ids = [[0] * n + list(row.ids) for n, row in zip(padding, rows, strict=True)]
        attended = [[0] * n + [1] * (longest - n) for n in padding]
        self.ids, self.mask = torch.tensor(ids, device=device), torch.tensor(attended, device=device)  # (b, t) each
        self.groups, self.caches = [list(range(len(rows)))], [None]

    def read(self, last: bool = False) -> Float[Tensor, "b n v"]:
        """The prompts: float32 logits of every position, or of the last alone."""
        positions = positions_of(self.mask)  # (b, t)
        try:
            return self._forward(self.ids, positions, last)
        except TargetError:
            if self.apart or len(self.scales) == 1:
                raise
        by_scales: dict[tuple[tuple[str, float], ...], list[int]] = {}
        for i, scales in enumerate(self.scales):
            by_scales.setdefault(tuple(sorted(scales.items())), []).append(i)
        self.apart, self.groups, self.caches = True, list(by_scales.values()), [None] * len(by_scales)
        return self._forward(self.ids, positions, last)

    def step(self, tokens: Sequence[int]) -> Float[Tensor, "b v"]:
        """One more token to each row: float32 logits of the next."""
        ids = torch.tensor(tokens, device=self.ids.device)[:, None]  # (b, 1)
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        return self._forward(ids, self.mask.sum(1, keepdim=True) - 1, False)[:, -1]

    @torch.no_grad()
    def _forward(self, ids: Int[Tensor, "b t"], positions: Int[Tensor, "b t"], last: bool) -> Float[Tensor, "b n v"]:
        parts: list[Tensor] = []
        for i, rows in enumerate(self.groups):
            options: dict[str, Any] = {"position_ids": positions[rows]} if accepts(self.model, "position_ids") else {}
            if last and accepts(self.model, "logits_to_keep"):
                options["logits_to_keep"] = 1
            if (cache := self.caches[i]) is not None:
                options["past_key_values"] = cache
            scales = [self.scales[row] for row in rows]
            with at_scales(self.model, *scales), contiguous_into_head(self.model):
                out = self.model(input_ids=ids[rows], attention_mask=self.mask[rows], use_cache=True, **options)
            self.caches[i] = getattr(out, "past_key_values", None)
            if self.caches[i] is None:
                problem = f"{type(self.model).__name__} gives no keys and values to go on from"
                raise BaseModelError(f"{problem}\n  the page writes with models that keep a cache of them")
            parts.append(out.logits.float().cpu())  # (b of the group, t, v)
        order = [row for rows in self.groups for row in rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)[torch.tensor(order).argsort()]


def divergence(base: Float[Tensor, "n v"], other: Float[Tensor, "n v"]) -> Float[Tensor, "n"]:
    """KL(base ‖ other) of the next token at each position, in nats, float64, from logits; inf where it overflows."""
    p, q = base.log_softmax(-1), other.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1, dtype=torch.float64)
    return torch.where(kl.isfinite(), kl.clamp_min(0.0), torch.inf)  # rounding may leave less than nothing
