"""The table of ratios, and the picture of those that have a mark."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from measure import Ratio
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def show(found: Sequence[Ratio], seconds: float) -> None:
    """At 80 columns."""
    table = Table(box=None, pad_edge=False)
    for name in ("measure", "ratio", "quartiles", "mark", ""):
        table.add_column(name, justify="left" if name == "measure" else "right", overflow="fold")
    group = ""
    for each in found:
        if group and each.group != group:
            table.add_section()
        group = each.group
        spread = each.of if each.low is None else f"{each.low:.2f} {each.high:.2f}"
        mark = "" if each.mark is None else f"{each.mark:.2f}"
        met = {None: "", True: "met", False: "missed"}[each.met]
        table.add_row(each.measure, f"{each.value:.3f}", spread, mark, met)
    Console(width=80).print(table)
    verdicts = [each.met for each in found]
    print(f"{verdicts.count(True)} marks met, {verdicts.count(False)} missed; {seconds / 60:.1f} minutes")


def draw(found: Sequence[Ratio], file: Path) -> None:
    """Each ratio as a share of its mark: left of the line is met."""
    marked = [each for each in found if each.mark is not None][::-1]
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(marked) + 1), dpi=100)
    shares = [each.value / each.mark for each in marked if each.mark]
    colours = ["#3b7a57" if each.met else "#b5483a" for each in marked]
    axes.barh(range(len(marked)), shares, color=colours, height=0.6)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(marked)), [each.measure for each in marked], fontsize=8)
    for i, each in enumerate(marked):
        label = f"{each.value:.2f} of {each.mark:.2f}"
        axes.text(shares[i] + 0.015, i, label, va="center", fontsize=7, bbox={"facecolor": "white", "lw": 0, "pad": 1})
    axes.set_xlim(0, max(1.3, *(share + 0.2 for share in shares)))
    axes.set_xlabel("ratio / mark; less is better")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)
