"""The table of costs on a GPU, and the picture of its ratios."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from gpu_costs import Rates
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLUMNS = ("contender", "tokens/s", "GiB", "step / base", "quartiles", "/ PEFT", "floor", "traffic")
OUT = "out of memory"


def show(costs: Sequence[Any], rates: Rates, device: str) -> None:
    """Print the lines in groups of one setting each, at 100 columns."""
    print(f"{device}; {rates.flops / 1e12:.1f} TFLOP/s, {rates.bandwidth / 1e9:.0f} GB/s measured")
    table = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "contender" else "right")
    setting = ""
    for cost in costs:
        if cost.setting != setting:
            setting = cost.setting
            table.add_section()
            table.add_row(f"[bold]{setting}[/bold]")
        table.add_row(f"  {cost.contender}", *cells(cost))
    Console(width=100).print(table)


def cells(cost: Any) -> list[str]:
    """What stands in a line after the contender's name."""
    if cost.is_out:
        return [OUT]
    peak = None if cost.peak_bytes is None else cost.peak_bytes / 2**30
    quartiles = "" if cost.low is None else f"{cost.low:.2f} {cost.high:.2f}"
    ratios = [_number(x, ".2f") for x in (cost.to_peft, cost.floor, cost.traffic)]
    return [
        _number(cost.tokens_per_second, ".0f"),
        _number(peak, ".2f"),
        _number(cost.ratio, ".3f"),
        quartiles,
        *ratios,
    ]


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def draw(costs: Sequence[Any], file: Path, device: str) -> None:
    """Each ratio to the frozen base as a bar, with its floor as a line and its traffic model as a cross."""
    shown = [cost for cost in costs if cost.ratio is not None and cost.contender != "frozen base"][::-1]
    figure, axes = plt.subplots(figsize=(9, 0.25 * len(shown) + 1.2), dpi=100)
    colours = ["#9a9a9a" if cost.contender.startswith("PEFT") else "#3b7a57" for cost in shown]
    axes.barh(range(len(shown)), [cost.ratio for cost in shown], color=colours, height=0.6)
    axes.axvline(1, color="black", linewidth=1)
    for i, cost in enumerate(shown):
        axes.plot([cost.low, cost.high], [i, i], color="black", linewidth=1)
        if cost.floor is not None:
            axes.plot([cost.floor, cost.floor], [i - 0.4, i + 0.4], color="#b5483a", linewidth=2)
        if cost.traffic is not None:
            axes.plot([cost.traffic], [i], marker="x", color="#b5483a")
    axes.set_yticks(range(len(shown)), [f"{cost.setting}: {cost.contender}" for cost in shown], fontsize=7)
    axes.set_xlabel(f"step / frozen base on {device}; red: the floor, x: unfused traffic")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)
