"""Columns of text that are written together: the base and the adapted model, with the same prompt and the same dice.

A column that is compared has a second row, its shadow: the base reads what the adapted model has written. So the two
next-token distributions at each token are of the same text, and KL(base ‖ adapted) says where the adapter acts.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.adapter import adapters
from ..errors import ConfigError
from .forward import Decoder, Row, divergence
from .jobs import Event, Steps
from .texts import MOST_TOKENS, Spelling, chat_ids, pieces

MOST_NEW_TOKENS = 256
OF_THE_BATCH = {"lily"}
"""Methods by which a row depends on the others, and on its padding."""
MOST_READ = 4 * MOST_TOKENS
"""Tokens of all rows' prompts, which are read in one step: a text's four longest rows. Their logits are in memory."""
MOST_KEPT = 32 << 10
"""Tokens whose keys and values are in memory, of all texts under way: 0.8 GB on SmolLM2-135M."""


@dataclass(frozen=True)
class Column:
    """A text to be written: at which scales, after which system prompt, and if beside the base's opinion of it."""

    key: str
    scales: Mapping[str, float] = field(default_factory=dict)
    system: str | None = None
    compared: bool = False


@dataclass
class _Writing:
    """A column under way: its row, its shadow's if it is compared, its text, its divergences, and why it has ended."""

    column: Column
    row: int
    shadow: int | None
    spelling: Spelling
    kl: list[float]
    ended: str = ""


class Room:
    """The memory for keys and values, which the texts under way share."""

    def __init__(self) -> None:
        self.kept = 0  # tokens

    def wait_for(self, tokens: int) -> Steps:
        """Steps that do nothing, until the others leave so much room, or all of it."""
        while self.kept and self.kept + tokens > MOST_KEPT:
            yield None

    @contextmanager
    def taken(self, tokens: int) -> Iterator[None]:
        """Within the block, so many tokens of the room are in use."""
        self.kept += tokens
        try:
            yield
        finally:
            self.kept -= tokens


def write(
    model: Any,
    tokenizer: Any,
    columns: Sequence[Column],
    prompt: str,
    *,
    seed: int = 0,
    temperature: float = 0.0,
    max_new_tokens: int = 64,
    room: Room | None = None,
) -> Steps:
    """The events of a text: "prompt" with the tokens of the prompt and their KL, "tokens" for each step, "end".

    temperature     0: the likeliest token. Above it, tokens are drawn by adding Gumbel noise, which is the same in all
                    columns: where two distributions agree, so do their tokens
    room            that it shares with other texts

    Raises:
        ConfigError: for what `chat_ids` refuses, or more tokens than the model reads, or than one step may read.
    """
    started = time.perf_counter()
    ids = {column.system: chat_ids(tokenizer, prompt, column.system) for column in columns}
    longest, context = max(map(len, ids.values())), getattr(model.config, "max_position_embeddings", None)
    if context is not None and longest + max_new_tokens > context:
        problem = (
            f"the prompt has {longest} tokens and the answer may have {max_new_tokens}; this model reads {context}"
        )
        raise ConfigError(f"{problem}\n  write a shorter prompt, or ask for fewer tokens")
    rows = [Row(ids[column.system], column.scales) for column in columns]
    compared = [column for column in columns if column.compared]
    shadows = {column.key: len(columns) + i for i, column in enumerate(compared)}
    rows += [Row(ids[column.system]) for column in compared]
    if len(rows) * longest > MOST_READ:
        problem = f"{len(columns)} columns are {len(rows)} rows, and a prompt of {longest} tokens is too long for them"
        raise ConfigError(f"{problem}\n  write one of {MOST_READ // len(rows)} at most, or ask for fewer columns")
    writings = [_Writing(c, i, shadows.get(c.key), Spelling(tokenizer), []) for i, c in enumerate(columns)]
    room, size = room or Room(), len(rows) * (longest + max_new_tokens)
    yield from room.wait_for(size)
    with room.taken(size):
        decoder = Decoder(model, rows)
        logits = decoder.read(last=not compared)  # (b, t, v)
        prompts = [_prompt(tokenizer, ids, w, logits) for w in writings if w.shadow is not None]
        logits, generator = logits[:, -1].clone(), torch.Generator().manual_seed(seed)  # (b, v); a view would keep all
        yield {"kind": "prompt", "columns": prompts}
        if decoder.apart:
            names = ", ".join(f"{adapter.variant}" for adapter in adapters(model).values())
            why = f"in one forward, rows can't be told apart with these methods ({names}): each column goes by itself"
            yield {"kind": "note", "text": f"{why}, which is slower"}
        on = {name for column in columns for name, c in column.scales.items() if c}
        if OF_THE_BATCH & {cfg.variant for name in on for cfg in adapters(model)[name].configs}:
            yield {"kind": "note", "text": "lily mixes by all tokens of a forward: each column depends on the others"}
        stops = stop_tokens(model, tokenizer)
        first = None
        for step in range(max_new_tokens):
            tokens, written = [next(iter(stops), 0)] * len(rows), []
            noise = gumbel(logits.shape[-1], generator) if temperature else None
            for writing in writings:
                if not writing.ended:
                    tokens[writing.row], event = _next(writing, logits, noise, temperature, stops)
                    if writing.shadow is not None:
                        tokens[writing.shadow] = tokens[writing.row]
                    written.append(event)
            first = time.perf_counter() - started if first is None else first
            yield {"kind": "tokens", "step": step, "tokens": written}
            if all(writing.ended for writing in writings):
                break
            if step + 1 < max_new_tokens:
                logits = decoder.step(tokens)
        seconds = {"first": first, "seconds": time.perf_counter() - started}
        yield {"kind": "end", "columns": {w.column.key: _ending(w) for w in writings}, **seconds}


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer."""
    stop = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = stop if isinstance(stop, list) else [stop, tokenizer.eos_token_id]
    return sorted({token for token in several if token is not None})


def gumbel(size: int, generator: torch.Generator) -> Float[Tensor, "v"]:
    """Noise g with P(argmax(log p + g) = i) = p_i (Gumbel 1954)."""
    uniform = torch.rand(size, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    return -(-uniform.log()).log()


def _prompt(
    tokenizer: Any, ids: Mapping[str | None, list[int]], writing: _Writing, logits: Float[Tensor, "b t v"]
) -> Event:
    """The prompt's tokens, each with the KL of the distribution that it was drawn from; the first from none."""
    assert writing.shadow is not None
    prompt = ids[writing.column.system]
    rows = logits[[writing.shadow, writing.row], -len(prompt) : -1]  # (2, n - 1, v)
    kl = [0.0, *divergence(rows[0], rows[1]).tolist()]
    tokens = [[text, _finite(value)] for text, value in zip(pieces(tokenizer, prompt), kl, strict=True)]
    return {"key": writing.column.key, "tokens": tokens}


def _next(
    writing: _Writing, logits: Float[Tensor, "b v"], noise: Tensor | None, temperature: float, stops: Sequence[int]
) -> tuple[int, list[Any]]:
    """The next token of a column, and its part of the event: [key, text, KL or None]."""
    row = logits[writing.row]  # (v,)
    kl = None
    if writing.shadow is not None:
        kl = _finite(float(divergence(logits[writing.shadow][None], row[None])))
        if kl is not None:
            writing.kl.append(kl)
    if not bool(row.isfinite().all()):
        writing.ended = "overflow"
        return 0, [writing.column.key, "", None]
    scores = row.double()
    token = int((scores if noise is None else scores / temperature + noise).argmax())
    if token in stops:
        writing.ended = "stop"
        return token, [writing.column.key, "", kl]
    return token, [writing.column.key, writing.spelling.add(token), kl]


def _ending(writing: _Writing) -> Event:
    kl = writing.kl
    mean = sum(kl) / len(kl) if kl else None
    return {"why": writing.ended or "length", "tokens": len(writing.spelling.ids), "mean": mean}


def _finite(value: float) -> float | None:
    """The number, or None for what JSON can't say."""
    return value if value < float("inf") else None
