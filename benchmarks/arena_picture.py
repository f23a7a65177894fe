"""The picture of the arena: differences from the reference with their intervals, and loss against what it costs."""

import math
from pathlib import Path
from typing import Any

import matplotlib
from arena_report import COSTS, VIEWS, Report, count
from arena_statistics import mean_loss

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLOURS = {"better": "#3b7a57", "worse": "#b5483a", "not apart": "#777777", "one seed": "#bbbbbb"}
LOGARITHMIC = {"parameters", "kept", "kl"}


def draw(report: Report, file: Path) -> None:
    """Above a panel for each view, below one for each cost."""
    height = 0.26 * len(report.results) + 1.3
    figure = plt.figure(figsize=(15, height + 4.2), dpi=100, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[height, 4.2])
    above, below = parts
    views = [view for view in VIEWS if report.ordered(view)]
    for axes, view in zip(above.subplots(1, len(views), squeeze=False)[0], views, strict=True):
        forest(axes, report, view)
    panels = below.subplots(1, len(COSTS), sharey=True)
    for axes, cost in zip(panels, COSTS, strict=True):
        against(axes, report, cost)
    panels[0].set_ylabel("held-out loss, nats per token")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    plt.close(figure)


def forest(axes: Any, report: Report, view: str) -> None:
    """A method a line, the best above. Of one that is worse than the base without training, its loss alone."""
    results = report.ordered(view)[::-1]
    found = [report.difference(result, view) for result in results]
    for i, one in enumerate(found):
        if one is None or results[i].name == report.reference:
            axes.plot(0, i, "D", color="black", markersize=5)
            continue
        colour, loss = COLOURS[one.verdict], mean_loss(results[i].losses[view])
        if loss > report.base_loss:
            text = f"loss {loss:.2f}, the base's {report.base_loss:.2f} →" if math.isfinite(loss) else "diverged"
            axes.text(0.98, i, text, color=colour, ha="right", va="center", transform=axes.get_yaxis_transform())
            continue
        axes.plot([one.low, one.high], [i, i], color=colour, linewidth=2)
        axes.plot(one.value, i, "o", color=colour, markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(results)), [result.name for result in results], fontsize=9)
    axes.set_ylim(-0.7, max(0.7, len(results) - 0.3))
    axes.set_title(VIEWS[view], fontsize=10)
    axes.set_xlabel(f"loss - {report.reference}'s, 95 % interval; less is better", fontsize=9)
    _bare(axes)


def against(axes: Any, report: Report, cost: str) -> None:
    """Methods by their cost and loss; a line through those that beat all cheaper ones beyond doubt."""
    # One that is worse than the base without training would press all others together.
    points = [point for point in report.points(cost) if mean_loss(point.losses) <= report.base_loss]
    line = [name for name in report.line(cost) if name in {point.name for point in points}]
    axes.set_xlabel(COSTS[cost], fontsize=9)
    _bare(axes)
    if not points:
        return
    by_name = {point.name: point for point in points}
    for point in points:
        y, result = mean_loss(point.losses), next(r for r in report.results if r.name == point.name)
        one = report.difference(result, "parameters")
        colour = "black" if one is None or point.name == report.reference else COLOURS[one.verdict]
        if one is not None and math.isfinite(one.value):
            bars = [[one.value - one.low], [one.high - one.value]]
            axes.errorbar(point.cost, y, yerr=bars, color=colour, linewidth=1, fmt="none")
        axes.plot([point.low, point.high], [y, y], color=colour, linewidth=1)
        axes.plot(point.cost, y, "o", color=colour, markersize=5)
    if len(line) > 1:
        ends = [by_name[name] for name in line]
        axes.plot(
            [p.cost for p in ends], [mean_loss(p.losses) for p in ends], color="tab:blue", linewidth=1.2, zorder=0
        )
    if cost in LOGARITHMIC and all(point.cost > 0 for point in points):
        axes.set_xscale("log")
        costs = [point.cost for point in points]
        subs = (1.0,) if max(costs) > 1000 * min(costs) else (1.0, 3.0)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x) if x >= 1 else f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    _name_points(axes, points)


def _name_points(axes: Any, points: list[Any]) -> None:
    """Names right of the points, pushed apart from below where they would lie on each other."""
    axes.margins(x=0.18, y=0.08)
    axes.figure.canvas.draw()
    taken: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: mean_loss(point.losses)):
        x, y = axes.transData.transform((point.cost, mean_loss(point.losses)))
        shifted = y
        while any(abs(x - other_x) < 70 and abs(shifted - other_y) < 11 for other_x, other_y in taken):
            shifted += 3
        taken.append((x, shifted))
        offset = (6, (shifted - y) * 72 / axes.figure.get_figure(root=True).dpi - 3)
        axes.annotate(point.name, (point.cost, mean_loss(point.losses)), offset, textcoords="offset points", fontsize=8)


def _bare(axes: Any) -> None:
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
