"""The tables of steer.py, the sweep over c and the rounds that were kept, and a picture of the sweep."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from poles import Round
from rich.console import Console
from rich.table import Table
from rich.text import Text

import lora_lite as ll

LEAST_KL = 1e-2
"""Left end of the picture's axis, which is logarithmic."""
WORDS = 3
"""In a row, that an answer has had before: a repetition."""


@dataclass(frozen=True)
class Point:
    """One c of the sweep.

    gap         mean over the held-out prompts of both sides
    kl          mean divergence from the base on the neutral prompts, in nats
    repeated    of all answers' runs of WORDS words, the share that the same answer has had before
    answers     to the questions that are shown
    """

    c: float
    gap: float
    kl: float
    repeated: float
    answers: list[str]


def repeated(answers: Sequence[str]) -> float:
    runs = new = 0
    for answer in answers:
        words = answer.casefold().split()
        grams = [tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)]
        runs, new = runs + len(grams), new + len(set(grams))
    return 1 - new / runs if runs else 0.0


def broken(points: Sequence[Point], limit: float) -> set[float]:
    """The first c on each side of 0 at which the divergence is above the limit, if there is one."""
    over = [point.c for point in points if point.kl > limit]
    sides = [c for c in over if c > 0], [c for c in over if c < 0]
    return {min(side, key=abs) for side in sides if side}


def _sign(c: float) -> str:
    return f"{c:+g}" if c else "0"


def show_sweep(points: Sequence[Point], limit: float) -> None:
    """A row for each c, those at which it breaks down in red."""
    table = Table(
        title="Sweep over c",
        caption=f"breaks down: first on its side with a\nKL above --break-kl {limit:g}\n"
        f"repeated: of runs of {WORDS} words in an answer,\nthe share that it has had before",
    )
    for name in ("c", "gap", "KL", "repeated", "note"):
        table.add_column(name, justify="right")
    marked = broken(points, limit)
    for point in points:
        style = "bold red" if point.c in marked else "bold" if point.c == 0 else ""
        note = "breaks down" if point.c in marked else "the base" if point.c == 0 else ""
        numbers = _sign(point.c), f"{point.gap:+.2f}", f"{point.kl:.3f}", f"{point.repeated:.0%}"
        table.add_row(*numbers, note, style=style)
    Console().print(table)


def show_answers(questions: Sequence[str], points: Sequence[Point]) -> None:
    """Each question with its answer at each c, readable at 80 columns."""
    table = Table(title="Answers", show_header=False)
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column()
    for i, asked in enumerate(questions):
        table.add_row("", Text(asked, "bold"))
        for point in points:
            answer = textwrap.shorten(point.answers[i], 120, placeholder=" …")
            table.add_row(_sign(point.c), Text(answer), end_section=point is points[-1])
    Console().print(table)


def plot_sweep(
    points: Sequence[Point], limit: float, chosen: ll.Calibrated, gap: float, title: str, file: Path
) -> None:
    """Effect against divergence, each c written to its point, as a PNG; gap is that at the calibrated c."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    marked = broken(points, limit)
    (base,) = [point.gap for point in points if point.c == 0]
    for sign, colour in ((1, "tab:blue"), (-1, "tab:orange")):
        side = sorted((point for point in points if point.c * sign > 0), key=lambda point: abs(point.c))
        xs, ys = [max(point.kl, LEAST_KL) for point in side], [point.gap for point in side]
        axes.plot(xs, ys, "o-", color=colour, label="c > 0" if sign > 0 else "c < 0")
        for point, x in zip(side, xs, strict=True):
            axes.annotate(
                _sign(point.c), (x, point.gap), (6, -13) if sign > 0 else (5, 5), textcoords="offset points", fontsize=8
            )
            if point.c in marked:
                label = None if sign < 0 and len(marked) > 1 else f"breaks down: first KL above {limit:g}"
                axes.plot(x, point.gap, "x", color="tab:red", markersize=12, markeredgewidth=2.5, label=label)
    axes.axhline(base, color="grey", linestyle="--", linewidth=1, label="the base, c = 0")
    axes.axvline(limit, color="tab:red", linestyle=":", linewidth=1)
    axes.plot(max(chosen.kl, LEAST_KL), gap, "*", color="black", markersize=13, label=f"calibrated: c = {chosen.c:.2f}")
    axes.set(title=title, xlabel="KL divergence on neutral prompts (nats)", ylabel="gap on held-out prompts")
    axes.set_xscale("log")
    axes.margins(y=0.1)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=110)


def show_rounds(kept: Sequence[ll.Round], rounds: Sequence[Round], gap: float) -> None:
    """The history: what each round is, and what it and those before it make of the base."""
    table = Table(
        title="The history",
        caption=f"KL of round: from base + the rounds before; in all: from the base\ngap without any round: {gap:+.2f}",
    )
    for name in ("round", "method", "c", "rank", "loss", "KL of\nround", "KL\nin all", "gap\nin all"):
        table.add_column(name, justify="left" if name in ("round", "method") else "right")
    for entry, done in zip(kept, rounds, strict=True):
        ranks = {rank for rank in entry.ranks.values() if rank is not None}
        table.add_row(
            entry.label,
            entry.variant,
            f"{entry.c:.3f}",
            "/".join(map(str, sorted(ranks))) or "-",
            f"{done.losses[0]:.2f} → {done.losses[-1]:.2f}",
            f"{done.found.kl:.3f}" if done.found else "",
            f"{done.kl:.3f}",
            f"{done.gap:+.2f}",
        )
    Console().print(table)
