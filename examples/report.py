"""What a training run leaves behind: the answers as a table, the losses as a picture, and all numbers as JSON."""

import json
import platform
import textwrap
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pairs import Pair
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


def show(pairs: list[Pair], before: list[str], after: list[str]) -> None:
    """The answers beside each other, readable at 80 columns."""
    table = Table(title="Held-out answers", show_header=False)
    table.add_column(style="dim")
    for pair, old, new in zip(pairs, before, after, strict=True):
        table.add_row("prompt", _short(pair.prompt, "bold"))
        table.add_row("reference", _short(pair.completion))
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


def write_results(settings: dict[str, Any], history: History, seconds: float, file: Path) -> None:
    """Every number of the run, and what it takes to repeat it."""
    losses = list(history.held_out.values())
    packages = ("lora-lite", "torch", "transformers", "bitsandbytes")
    results = settings | {
        "held_out_loss_before": losses[0],
        "held_out_loss_after": losses[-1],
        "held_out_losses": history.held_out,
        "training_losses": history.train,
        "seconds": seconds,
        "training_seconds": history.seconds,
        "tokens_per_second": history.tokens / history.seconds,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
    file.write_text(json.dumps(results, indent=2) + "\n")
