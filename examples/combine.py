"""Arithmetic of skills: two adapters, each trained on a skill, as one in every way of `lora_lite.combine`.

    python examples/combine.py                                   # on SmolLM2-135M; nothing is downloaded
    python examples/combine.py --second ../shared/data/gsm8k/train.jsonl

The first skill is to describe a function of Python's standard library by its signature, the second to write the
signature by the description, or the pairs of a file. The table has the loss on held-out pairs of both skills: with the
base alone, with one adapter, and with each combination; the error is that of the SVD, and of rounding. Both adapters
are saved, for `lora-lite combine`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from batches import Example, batches, encode
from common import (
    Base,
    BaseDtype,
    load,
    plain_errors,
    set_up,
)
from finetune import History, Task, measure, train
from learning_rates import learning_rate
from loguru import logger
from pairs import INSTRUCTION, Pair, read_jsonl, split, stdlib_pairs
from rich.console import Console
from rich.table import Table
from smollm2 import smollm2_folder

import lora_lite as ll

SIGNATURE = "Write the signature of a Python function that does this."
NAMES = ("first", "second")
WIDTH = 80

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    first: Annotated[Path | None, typer.Option(help="JSONL of the first skill, as finetune.py's --data.")] = None,
    second: Annotated[Path | None, typer.Option(help="JSONL of the second skill.")] = None,
    model: Base = None,
    r: Annotated[int, typer.Option(min=1, help="Rank of each adapter.")] = 8,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    dtype: BaseDtype = "auto",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps for each skill.")] = 40,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs in a step.")] = 4,
    rows: Annotated[int, typer.Option(min=1, help="Held-out pairs of each skill to measure the loss on.")] = 32,
    max_length: Annotated[int, typer.Option(min=2, help="Longer pairs, in tokens, are left out.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the adapters' first values and the order of the data.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the two adapters.")] = Path("runs", "combine"),
) -> None:
    """Train two adapters, combine them in all ways, and show the loss of each way on both skills."""
    set_up(seed)
    with plain_errors():
        source = model or str(smollm2_folder())
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        skills = (read_jsonl(first) if first else stdlib_pairs(), read_jsonl(second) if second else signatures())
        tasks = [task_of(tokenizer, pairs, max_length, batch_size, rows, seed) for pairs in skills]
        base = load(source, None, dtype)
        before = losses(base, tasks)
        for name, task in zip(NAMES, tasks, strict=True):
            adapter = ll.attach(base, ll.LoRAConfig(r=r), name)
            train(base, adapter, task, learning_rate("lora") if lr is None else lr, steps, History())
            ll.save(base, out / f"{name}.safetensors", name)
            adapter.scale = 0.0  # the next one is trained on the base alone
        table(before, dict(measured(base, tasks, r, seed)))


def signatures() -> list[Pair]:
    """The standard library's pairs the other way round: from the summary to the signature."""
    return [
        Pair(f"{SIGNATURE}\n\n{pair.completion}", pair.prompt.removeprefix(f"{INSTRUCTION}\n\n"), pair.group)
        for pair in stdlib_pairs()
    ]


def task_of(tokenizer: Any, pairs: list[Pair], max_length: int, size: int, rows: int, seed: int) -> Task:
    """The batches of one skill. Raises DataError for pairs that are all too long."""
    train_set, held_out = (encode(tokenizer, part, max_length) for part in split(pairs))
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))
    chosen: list[Example] = [held_out[i] for i in order[:rows].tolist()]
    return Task(batches(tokenizer, train_set, size, seed), list(batches(tokenizer, chosen, size)), [])


def losses(model: Any, tasks: list[Task]) -> list[float]:
    """The held-out loss of each skill, with the adapters at their scales."""
    histories = [History() for _ in tasks]
    for task, history in zip(tasks, histories, strict=True):
        measure(model, task, history)
    return [history.held_out[0] for history in histories]


def ways(r: int, seed: int) -> dict[str, tuple[Mapping[str, float], dict[str, Any]]]:
    """What is combined, by what the table calls it: the weights, and how."""
    ones, halves = dict.fromkeys(NAMES, 1.0), dict.fromkeys(NAMES, 0.5)
    return {
        "first + second, exact": (ones, {}),
        "half of each, exact": (halves, {}),
        "first - second, exact": (dict(zip(NAMES, (1.0, -1.0), strict=True)), {}),
        f"svd, rank {r}": (ones, {"how": "svd", "rank": r}),
        "svd, energy 0.9": (ones, {"how": "svd", "energy": 0.9}),
        "ties, density 0.2": (ones, {"how": "ties", "density": 0.2}),
        "ties, density 0.2, λ 2": (dict.fromkeys(NAMES, 2.0), {"how": "ties", "density": 0.2}),
        "dare, density 0.5": (ones, {"how": "dare", "density": 0.5, "seed": seed}),
        "dare, density 0.1": (ones, {"how": "dare", "density": 0.1, "seed": seed}),
        "magnitude, density 0.2": (ones, {"how": "magnitude", "density": 0.2}),
    }


def measured(model: Any, tasks: list[Task], r: int, seed: int) -> Iterator[tuple[str, tuple[str, str, list[float]]]]:
    """For each row of the table its name, the ranks, the relative error, and the losses."""
    for name in NAMES:
        with ll.scaled(model, 1.0, name):
            yield f"{name} alone", (str(r), "", losses(model, tasks))
    for name, (weights, how) in ways(r, seed).items():
        for part in NAMES:
            ll.adapters(model)[part].scale = 1.0
        combined = ll.combine(model, weights, "both", **how)
        logger.info(f"{name}: {combined}")
        for part in NAMES:
            ll.adapters(model)[part].scale = 0.0
        ranks = [site.cfg.r for site in combined.adapter.sites() if site.cfg.variant == "lora"]
        form = "-".join(map(str, sorted({min(ranks), max(ranks)}))) if ranks else "full"
        yield name, (form, f"{combined.error:.0e}", losses(model, tasks))
        ll.detach(model, "both")


def table(before: list[float], rows: Mapping[str, tuple[str, str, list[float]]]) -> None:
    """Print the losses, in 80 columns."""
    shown = Table(title="Held-out loss of each skill")
    for title in ("adapter", "rank", "error", *NAMES):
        shown.add_column(title, justify="left" if title == "adapter" else "right")
    shown.add_row("base", "", "", *(f"{loss:.3f}" for loss in before), end_section=True)
    for name, (rank, error, values) in rows.items():
        shown.add_row(name, rank, error, *(f"{value:.3f}" for value in values), end_section=name == "second alone")
    Console(width=WIDTH).print(shown)


if __name__ == "__main__":
    app()
