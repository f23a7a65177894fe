"""The results of a run: the answers as a table, the losses as a picture, and all numbers as JSON."""

import json
import platform
import textwrap
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

WINDOW = 10
"""Steps of training loss that are averaged."""


@dataclass
class History:
    """Losses of the training steps, held-out losses by step, and the tokens and seconds of the steps alone."""

    train: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def smoothed(self) -> list[float]:
        """At each step, the mean of the latest training losses."""
        windows = [self.train[max(0, end - WINDOW) : end] for end in range(1, len(self.train) + 1)]
        return [sum(window) / len(window) for window in windows]


def show(prompts: list[str], before: list[str], after: list[str], references: list[str] | None = None) -> None:
    """The answers beside each other, readable at 80 columns."""
    table = Table(title="Held-out answers", show_header=False)
    table.add_column(style="dim")
    for i, (prompt, old, new) in enumerate(zip(prompts, before, after, strict=True)):
        table.add_row("prompt", _short(prompt, "bold"))
        if references is not None:
            table.add_row("reference", _short(references[i]))
        table.add_row("before", _short(old))
        table.add_row("after", _short(new, "green"), end_section=True)
    Console().print(table)


def _short(text: str, style: str = "") -> Text:
    return Text(textwrap.shorten(text, 200, placeholder=" …"), style)


def plot(history: History, title: str, file: Path) -> None:
    """Training loss, each step and smoothed, and held-out loss, as a PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(history.train) + 1)
    axes.plot(steps, history.train, color="tab:blue", alpha=0.25, label="training, each step")
    axes.plot(steps, history.smoothed, color="tab:blue", label=f"training, mean of {WINDOW} steps")
    axes.plot(list(history.held_out), list(history.held_out.values()), "o-", color="tab:orange", label="held-out")
    for step, loss in history.held_out.items():
        axes.annotate(
            f"{loss:.2f}", (step, loss), (0, -15), textcoords="offset points", ha="center", color="tab:orange"
        )
    axes.set(title=title, xlabel="step", ylabel="loss per token of the completion")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def training_numbers(history: History) -> dict[str, Any]:
    """Every number of a training run."""
    losses = list(history.held_out.values())
    return {
        "held_out_loss_before": losses[0],
        "held_out_loss_after": losses[-1],
        "held_out_losses": history.held_out,
        "training_losses": history.train,
        "training_seconds": history.seconds,
        "tokens_per_second": history.tokens / history.seconds,
    }


def write_results(results: dict[str, Any], file: Path) -> None:
    """The results as JSON, with the versions that it takes to repeat them."""
    packages = ("lora-lite", "torch", "transformers", "bitsandbytes")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    file.write_text(json.dumps(results | {"versions": versions}, indent=2) + "\n")
