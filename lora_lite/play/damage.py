"""Damage: how far the model moves from its base where nobody asked it to, on neutral requests.

The base answers some everyday requests, once. At every token of these answers, KL(base ‖ adapted) of the next token is
averaged, in nats. A system prompt's damage is measured in the same way, at the same tokens of the same answers.
"""

import json
import math
from collections.abc import Generator, Iterator, Mapping
from importlib import resources
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from ..core.adapter import adapters
from ..measure.calibrate_scale import result_of, root_search
from ..measure.evaluate import divergences
from .forward import Decoder, Row, Scales, at_scales, divergence, reading
from .generate import stop_tokens
from .jobs import Event, Steps
from .texts import chat_ids

ANSWER = 12  # tokens of each neutral answer
BATCH = 4  # requests in a forward, so that a step takes less than a second
FURTHEST = 2.0  # the end of a slider
TOLERANCE = 0.025  # the budget's c costs 95 to 100 % of it: the search aims at the middle, and may miss by this much
MOST_POINTS = 5000  # remembered

Number = Generator[None, None, float]
"""Steps that end with a number."""


def neutral_prompts() -> list[str]:
    """The everyday requests that are shipped."""
    text = resources.files(__package__).joinpath("neutral.json").read_text(encoding="utf-8")
    prompts: list[str] = json.loads(text)
    return prompts


def answer_positions(inputs: Mapping[str, Any]) -> Bool[Tensor, "b t"]:
    """The positions whose next token is one of the answer, which fills the last ANSWER columns but for padding."""
    attended = inputs["attention_mask"].bool()  # (b, t)
    where = torch.zeros_like(attended)
    where[:, -ANSWER - 1 : -1] = attended[:, -ANSWER:]
    return where


class Neutral:
    """The neutral requests with the base's answers, and the divergences that were measured on them."""

    def __init__(self, model: Any, tokenizer: Any, prompts: list[str] | None = None) -> None:
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts or neutral_prompts()
        self.answers: list[list[list[int]]] = []  # of each batch, of each request the tokens
        self.sides: dict[int, dict[int, Tensor]] = {}  # of each batch, the base's log-probabilities
        self.points: dict[tuple[Any, ...], float] = {}

    def _prompts(self, i: int) -> list[str]:
        return self.prompts[i * BATCH : (i + 1) * BATCH]

    @property
    def batches(self) -> int:
        """How many forwards measure a divergence."""
        return math.ceil(len(self.prompts) / BATCH)

    def prepare(self, batch: int) -> Iterator[None]:
        """The base's greedy answers of the batches up to this one."""
        stops = stop_tokens(self.model, self.tokenizer)
        for i in range(batch + 1):
            if i < len(self.answers):
                continue
            rows = [Row(chat_ids(self.tokenizer, prompt)) for prompt in self._prompts(i)]
            decoder = Decoder(self.model, rows)
            answers: list[list[int]] = [[] for _ in rows]
            tokens = decoder.read(last=True)[:, -1].argmax(-1).tolist()
            for _ in range(ANSWER):
                yield
                for answer, token in zip(answers, tokens, strict=True):
                    if not (answer and answer[-1] in stops):
                        answer.append(token)
                tokens = decoder.step(tokens).argmax(-1).tolist()
            if i == len(self.answers):  # another job may have been faster
                self.answers.append(answers)

    def inputs(self, i: int, system: str | None = None) -> dict[str, Tensor]:
        """A batch of the requests with their answers, (b, t): padded on the left, and after an answer that ends."""
        prompts = [chat_ids(self.tokenizer, prompt, system) for prompt in self._prompts(i)]
        longest, rows, masks = max(map(len, prompts)), [], []
        for prompt, answer in zip(prompts, self.answers[i], strict=True):
            before, after = longest - len(prompt), ANSWER - len(answer)
            rows.append([0] * before + prompt + answer + [0] * after)
            masks.append([0] * before + [1] * (len(prompt) + len(answer)) + [0] * after)
        ids, attended = torch.tensor(rows), torch.tensor(masks)  # (b, t) each
        is_answer = attended.bool() & (torch.arange(ids.shape[1]) >= longest)
        return reading(self.model, ids, attended, is_answer)

    def damage(self, scales: Scales, versions: Mapping[str, str], batches: int | None = None) -> Number:
        """The mean KL(base ‖ adapted) in nats of all adapters at these scales, inf where it overflows; remembered by
        their versions. `batches`: on the first few alone."""
        count = self.batches if batches is None else batches
        on = {name: c for name, c in scales.items() if c}
        key = self._key(on, versions, count)
        if not on:
            return 0.0
        if key not in self.points:
            parts = []
            for i in range(count):
                yield from self.prepare(i)
                side = self.sides.setdefault(i, {})
                with at_scales(self.model, on):
                    batch = [self.inputs(i)]
                    parts.append(divergences(self.model, batch, None, answer_positions, False, side, overflow=True))
                yield
            self._remember(key, torch.cat(parts))
        return self.points[key]

    def _key(self, on: Scales, versions: Mapping[str, str], batches: int) -> tuple[Any, ...]:
        """The key that a damage is remembered by: adapters in the model's order."""
        return batches, *((versions[name], on[name]) for name in adapters(self.model) if name in on)

    def system_damage(self, system: str) -> Number:
        """The same of a system prompt, at the same tokens of the same answers, with every adapter off."""
        key = ("system", system)
        if key not in self.points:
            parts = []
            for i in range(self.batches):
                yield from self.prepare(i)
                sides = []
                for prompt in (None, system):
                    sides.append(self._logits(self.inputs(i, prompt)))
                    yield
                parts.append(divergence(*sides))
            self._remember(key, torch.cat(parts))
        return self.points[key]

    @torch.no_grad()
    def _logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """The base's float32 logits (n, v) at the positions of the answers."""
        with at_scales(self.model, {}):
            logits = self.model(**inputs, use_cache=False).logits
        return logits[answer_positions(inputs)].float()

    def _remember(self, key: tuple[Any, ...], kl: Tensor) -> None:
        # By rounding, a mean of next to nothing may be less than that.
        self.points[key] = max(0.0, float(kl.mean())) if kl.isfinite().all() else math.inf
        while len(self.points) > MOST_POINTS:
            del self.points[next(iter(self.points))]

    def curve(self, version: str) -> list[tuple[float, float]]:
        """(c, KL) of an adapter alone, as far as it is known, by c."""
        alone = {key[1]: kl for key, kl in self.points.items() if key[0] == self.batches and len(key) == 2}
        known = [(c, kl) for (of, c), kl in alone.items() if of == version]
        return sorted([(0.0, 0.0), *known])

    def budget(self, name: str, version: str, target: float, limit: float) -> Steps:
        """`calibrate_scale`, step by step: the c of this adapter alone, on one side of 0, that costs `target` nats or
        a little less."""
        aim = target * (1 - TOLERANCE)
        search = root_search(aim, limit, tolerance=TOLERANCE, max_evaluations=12)
        try:
            c = next(search)
            while True:
                is_new = self._key({name: c}, {name: version}, self.batches) not in self.points
                kl = yield from self.damage({name: c}, {name: version})
                if is_new:
                    yield {"kind": "curve", "adapter": name, "points": [[c, finite(kl)]]}
                c = search.send(kl)
        except StopIteration as end:
            result = result_of(end.value, aim, TOLERANCE)
        yield {
            "kind": "budget",
            "adapter": name,
            "pole": math.copysign(1, limit),
            "c": result.c,
            "kl": result.kl,
            "met": result.met,
            "monotone": result.monotone,
        }


def budgets(neutral: Neutral, versions: Mapping[str, str], target: float) -> Steps:
    """The curve of each adapter as far as it is known, then the c of its budget, on both sides of 0."""
    for name, version in versions.items():
        points = [[c, finite(kl)] for c, kl in neutral.curve(version)]
        yield {"kind": "curve", "adapter": name, "points": points}
    for limit in (FURTHEST, -FURTHEST):
        for name, version in versions.items():
            yield from neutral.budget(name, version, target, limit)


def finite(value: float) -> Event | float | None:
    """The number, or None for what JSON can't say: an overflow."""
    return value if math.isfinite(value) else None
