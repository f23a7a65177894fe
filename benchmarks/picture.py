"""The table of ratios, and the picture of those that have a mark."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from measure import Ratio
from rich.console import Console
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def show(ratios: Sequence[Ratio], seconds: float) -> None:
    """Print the table, at 80 columns."""
    table = Table(box=None, pad_edge=False)
    for name in ("measure", "ratio", "quartiles", "floors", "mark", ""):
        table.add_column(name, justify="left" if name == "measure" else "right", overflow="fold")
    group = ""
    for ratio in ratios:
        if group and ratio.group != group:
            table.add_section()
        group = ratio.group
        spread = ratio.of if ratio.low is None else f"{ratio.low:.2f} {ratio.high:.2f}"
        mark = "" if ratio.mark is None else f"{ratio.mark:.2f}"
        met = {None: "", True: "met", False: "missed"}[ratio.met]
        floors = " ".join(f"{floor:.2f}" for floor in ratio.floors)
        table.add_row(ratio.measure, f"{ratio.value:.3f}", spread, floors, mark, met)
    Console(width=80).print(table)
    verdicts = [ratio.met for ratio in ratios]
    print(f"{verdicts.count(True)} marks met, {verdicts.count(False)} missed; {seconds / 60:.1f} minutes")


def draw(ratios: Sequence[Ratio], file: Path) -> None:
    """Each ratio as a share of its mark: left of the line is met."""
    marked = [ratio for ratio in ratios if ratio.mark][::-1]  # none of what has to be 0
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(marked) + 1), dpi=100)
    shares = [ratio.value / ratio.mark for ratio in marked if ratio.mark]
    colours = ["#3b7a57" if ratio.met else "#b5483a" for ratio in marked]
    axes.barh(range(len(marked)), shares, color=colours, height=0.6)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(marked)), [ratio.measure for ratio in marked], fontsize=8)
    for i, ratio in enumerate(marked):
        label = f"{ratio.value:.2f} of {ratio.mark:.2f}"
        axes.text(shares[i] + 0.015, i, label, va="center", fontsize=7, bbox={"facecolor": "white", "lw": 0, "pad": 1})
    axes.set_xlim(0, max(1.3, *(share + 0.2 for share in shares)))
    axes.set_xlabel("ratio / mark; less is better")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)
