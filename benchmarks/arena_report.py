"""What the arena has found: the rows of its views, tables at 80 columns, and the section of a document."""

import io
import math
import re
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arena_statistics import Difference, Point, difference, mean_loss, pareto
from arena_trials import Record
from rich.console import Console
from rich.table import Table

VIEWS = {
    "parameters": "At about equal parameters",
    "kl": "At an equal divergence from the base",
    "time": "At equal training time",
}
COSTS = {
    "parameters": "trainable parameters",
    "step_ratio": "step time / LoRA's",
    "kept": "bytes kept for the backward",
    "kl": "KL from the base, nats per token",
}
"""What loss is drawn against."""

WIDTH = 80

MARK = "arena"
"""The section of a document between <!-- arena --> and <!-- /arena -->."""


@dataclass
class Result:
    """All that is known of a method. losses: by view and seed. seen: of each seed that is done, the divergence from the
    base at scale 1, and the scale that meets the budget."""

    name: str
    rank: int | None
    lr: float
    is_at_edge: bool
    costs: Record
    losses: dict[str, dict[int, Any]] = field(default_factory=dict)
    seen: list[tuple[float, float]] = field(default_factory=list)
    steps_in_time: int = 0

    @property
    def kl(self) -> float:
        return statistics.fmean(kl for kl, _ in self.seen) if self.seen else math.nan

    @property
    def scale(self) -> float:
        return statistics.fmean(scale for _, scale in self.seen) if self.seen else math.nan

    def cost(self, name: str) -> tuple[float, float, float]:
        """(low, value, high): what is exact has no width."""
        if name == "step_ratio":
            return self.costs["ratio_low"], self.costs["step_ratio"], self.costs["ratio_high"]
        value = self.kl if name == "kl" else float(self.costs[name])
        return value, value, value


@dataclass(frozen=True)
class Report:
    """reference: the name that all are compared with. rows: the tokens of each held-out row. head: what was run."""

    results: list[Result]
    reference: str
    rows: list[int]
    base_loss: float
    kl_budget: float
    head: list[str]
    left_out: Mapping[str, str]

    def difference(self, result: Result, view: str) -> Difference | None:
        """From the reference, in one view; None where one of the two isn't done."""
        reference = next((other for other in self.results if other.name == self.reference), None)
        if reference is None or not result.losses.get(view) or not reference.losses.get(view):
            return None
        if result.losses[view].keys().isdisjoint(reference.losses[view]):
            return None
        return difference(result.losses[view], reference.losses[view], self.rows)

    def ordered(self, view: str) -> list[Result]:
        """Those that are done in a view, from the lowest loss."""
        done = [result for result in self.results if result.losses.get(view)]
        return sorted(done, key=lambda result: mean_loss(result.losses[view]))

    def points(self, cost: str) -> list[Point]:
        return [
            Point(result.name, *result.cost(cost), result.losses["parameters"])
            for result in self.ordered("parameters")
            if math.isfinite(mean_loss(result.losses["parameters"]))
        ]

    def line(self, cost: str) -> list[str]:
        return pareto(self.points(cost), self.rows)


def text(report: Report) -> str:
    """Every table, at 80 columns."""
    parts = [*report.head, "", *(f"{_view(report, view)}\n" for view in VIEWS if report.ordered(view))]
    parts.append(f"{_costs(report)}\n")
    for cost, label in COSTS.items():
        parts.append(f"Pareto line of loss and {label}: {' -> '.join(report.line(cost)) or 'nobody'}")
    parts += [f"left out: {name}: {why}" for name, why in report.left_out.items()]
    lines = [line.rstrip() for part in parts for line in part.splitlines() or [""]]
    return "\n".join(short for line in lines for short in textwrap.wrap(line, WIDTH, subsequent_indent="  ") or [""])


def write_section(report: Report, file: Path, picture: str) -> None:
    """Put the tables between a document's marks. Raises ValueError for a document without them."""
    document = file.read_text()
    section = f"<!-- {MARK} -->\n```\n{text(report)}\n```\n\n![The arena]({picture})\n<!-- /{MARK} -->"
    new, count = re.subn(rf"<!-- {MARK} -->.*?<!-- /{MARK} -->", lambda _: section, document, flags=re.S)
    if count != 1:
        raise ValueError(f"{file} has {count} sections: wanted <!-- {MARK} --> and <!-- /{MARK} --> once")
    file.write_text(new)


def _view(report: Report, view: str) -> str:
    """Differences from the reference; in the main view with the learning rate, and the loss itself."""
    columns = {
        "parameters": ("r", "parameters", "rate", "loss"),
        "kl": ("KL at 1", "scale", "loss"),
        "time": ("steps", "loss"),
    }[view]
    head = (*columns, f"- {report.reference}", "95 % interval", "")
    title = VIEWS[view] + (f" ({report.kl_budget:g} nats per token at most)" if view == "kl" else "")
    if view == "parameters":
        title += f"; loss in nats per token (the base: {report.base_loss:.3f})"
    rows = []
    for result in report.ordered(view):
        cells = {
            "r": str(result.rank or ""),
            "parameters": count(result.costs["parameters"]),
            "rate": f"{result.lr:.1e}".replace("e-0", "e-") + "*" * result.is_at_edge,
            "loss": f"{mean_loss(result.losses[view]):.3f}",
            "KL at 1": f"{result.kl:.3f}",
            "scale": f"{result.scale:.2f}",
            "steps": str(result.steps_in_time),
        }
        rows.append([result.name, *(cells[column] for column in columns), *_compared(report, result, view)])
    return table(title, ("method", *head), rows)


def _compared(report: Report, result: Result, view: str) -> list[str]:
    found = report.difference(result, view)
    if result.name == report.reference or found is None:
        return ["", "", ""]
    if math.isinf(found.value):
        return ["", "diverged", "worse"]
    fewer = found.seeds < max(len(other.losses.get(view, ())) for other in report.results)
    short = f", {found.seeds} seeds" if fewer and found.seeds > 1 else ""
    return [f"{found.value:+.3f}", f"{found.low:+.3f} {found.high:+.3f}", found.verdict + short]


def _costs(report: Report) -> str:
    """Step times and bytes; beside PEFT's, a ratio of ours to theirs."""
    head = ("method", f"step / {report.reference}", "quartiles", "kept", "/ PEFT", "peak", "/ PEFT", "file")
    rows = []
    for result in report.results:
        costs, peft = result.costs, result.costs.get("peft")
        ratios = [f"{costs[name] / peft[name]:.2f}" if peft else "" for name in ("kept", "peak")]
        quartiles = f"{costs['ratio_low']:.2f} {costs['ratio_high']:.2f}"
        cells = [f"{costs['step_ratio']:.2f}", quartiles, size(costs["kept"]), ratios[0], size(costs["peak"])]
        rows.append([result.name, *cells, ratios[1], size(costs["file_bytes"])])
    return table("Costs; bytes are exact, and above the frozen base's", head, rows)


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    grid = Table(box=None, pad_edge=False, header_style="")
    for i, name in enumerate(head):
        grid.add_column(name, justify="left" if i in (0, len(head) - 1) and name in ("method", "") else "right")
    for row in rows:
        grid.add_row(*row)
    output = io.StringIO()
    Console(width=WIDTH, file=output, color_system=None).print(grid)
    return f"{title}\n{output.getvalue()}"


def count(number: float) -> str:
    """Of parameters."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Of bytes; what is kept may be less than the base's, where a method goes without an activation."""
    for unit, name in ((1e9, " GB"), (1e6, " MB"), (1e3, " kB")):
        if abs(number) >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f} B"
