"""A small playground, and what the jobs of the page say when they are run to their end."""

from collections.abc import Generator
from typing import Any

import torch
from models import perturb
from transformers import AutoTokenizer

import lora_lite as ll
from lora_lite.play.effect import Lines
from lora_lite.play.fit import Recipe
from lora_lite.play.forward import Decoder, Row
from lora_lite.play.playground import Entry, Playground

PROMPTS = ["Hi.", "Name a cat.", "What is two plus two?", "Tell me of the sea, in one line.", "Why?"]
LINES = Lines(
    ("Bread is good.", "The sea is calm.", "My cat sleeps.", "A held line.", "It rains today.", "Red and blue."),
    ("No, never that!", "Stop it at once!", "What a mess!", "Another held!", "Go away now!", "So loud here!"),
)


def playground(folder: str, **options: Any) -> Playground:
    """The model of a folder in float32, with five neutral prompts."""
    return Playground(
        ll.load_base(folder, "float32"), AutoTokenizer.from_pretrained(folder), "tiny", PROMPTS, **options
    )


def drive(steps: Generator[Any, None, Any]) -> list[dict[str, Any]]:
    """The events of a job."""
    return [event for event in steps if event is not None]


def result(steps: Generator[Any, None, Any]) -> Any:
    """The value that steps end with."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        return end.value


def texts(events: list[dict[str, Any]]) -> dict[str, str]:
    """The text of each column."""
    columns: dict[str, str] = {}
    for event in events:
        for key, text, _ in event["tokens"] if event["kind"] == "tokens" else ():
            columns[key] = columns.get(key, "") + text
    return columns


def divergences(events: list[dict[str, Any]], key: str) -> list[float | None]:
    """The KL of each token of a column."""
    tokens = [token for event in events if event["kind"] == "tokens" for token in event["tokens"]]
    return [kl for column, _, kl in tokens if column == key]


def attached(play: Playground, variant: str, name: str = "a1") -> str:
    """The id of an adapter of any method, moved away from the base, as `load` puts it on the page."""
    cfg: Any = ll.config_for(variant)
    perturb(ll.attach(play.model, cfg(), name), 0.3)
    ll.adapters(play.model)[name].scale = 0.0
    play.entries[name] = Entry(name, variant, variant, 1.0, variant)
    return name


def as_written(play: Playground, prompt: list[int], answer: list[int], scales: dict[str, float]) -> torch.Tensor:
    """(t, v) log-probabilities of the answer's tokens in float64, by one token a step, without padding."""
    decoder = Decoder(play.model, [Row(prompt, scales)])
    logits = [decoder.read()[0, -1], *[decoder.step([token])[0] for token in answer[:-1]]]
    return torch.stack(logits).double().log_softmax(-1)


def recipe(layer: int = 1, method: str = "steer", direction: str = "difference", lines: Lines = LINES) -> Recipe:
    return Recipe(lines, method, direction, layer)


def fitted(play: Playground, made_of: Recipe | None = None, label: str = "", replaces: str | None = None) -> str:
    """The id of a fit; each has a label of its own, if none is given."""
    label = label or f"Mine {len(play.entries) + 1}"
    return str(drive(play.fit(made_of or recipe(), label, replaces))[-1]["id"])
