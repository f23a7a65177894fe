"""The tables and pictures of abliterate.py: each block's direction, and the trials of the search."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial
from rich.console import Console
from rich.table import Table
from search import COMPONENTS, front, kernel_of

import lora_lite as ll

LEAST_KL = 1e-4
"""Left end of the picture's axis, which is logarithmic."""


@dataclass(frozen=True)
class Block:
    """One block's direction.

    separation  distance of the two sides' centres, in standard deviations: of the distances of each side's prompts from
                its centre, the root of the mean square
    neighbour   cosine with the direction of the block before
    positive, negative  norms of the centres
    """

    path: str
    separation: float
    neighbour: float | None
    positive: float
    negative: float

    @property
    def label(self) -> str:
        return self.path.rpartition(".")[2]


def describe(
    fitted: Mapping[str, ll.Contrast], positive: Mapping[str, ll.Statistics], negative: Mapping[str, ll.Statistics]
) -> list[Block]:
    """The blocks in order; the statistics are of the two sides, with "std"."""
    blocks: list[Block] = []
    before = None
    for path, contrast in fitted.items():
        spreads = [side[path].std for side in (positive, negative)]
        variance = sum(float(std.square().sum()) for std in spreads if std is not None) / len(spreads)
        direction = contrast.directions[0]
        blocks.append(
            Block(
                path,
                separation=float((contrast.positive - contrast.negative).norm()) / max(variance, 1e-30) ** 0.5,
                neighbour=None if before is None else float(torch.dot(before, direction)),
                positive=float(contrast.positive.norm()),
                negative=float(contrast.negative.norm()),
            )
        )
        before = direction
    return blocks


def show_directions(blocks: Sequence[Block]) -> None:
    """A row for each block, the best separated one in bold."""
    table = Table(
        title="Direction of each block",
        caption="separation: distance of the centres / spread",
    )
    for name in ("block", "separation", "cosine with\nblock before", "norm of\npositive", "norm of\nnegative"):
        table.add_column(name, justify="right")
    widest = max(block.separation for block in blocks)
    for block in blocks:
        cosine = "" if block.neighbour is None else f"{block.neighbour:.3f}"
        style = "bold green" if block.separation == widest else ""
        numbers = (f"{block.separation:.2f}", cosine, f"{block.positive:.1f}", f"{block.negative:.1f}")
        table.add_row(block.label, *numbers, style=style)
    Console().print(table)


def plot_directions(blocks: Sequence[Block], title: str, file: Path) -> None:
    """The table as a PNG: three rows over depth."""
    figure = Figure(figsize=(7, 6.5), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    depth = range(len(blocks))
    best = max(depth, key=lambda i: blocks[i].separation)
    top.plot(depth, [block.separation for block in blocks], "o-", color="tab:blue", markersize=4)
    top.annotate(
        f"block {blocks[best].label}",
        (best, blocks[best].separation),
        (0, 7),
        textcoords="offset points",
        ha="center",
        color="tab:blue",
    )
    top.set(title=title, ylabel="separation\n(distance / spread)", ylim=(0, 1.2 * blocks[best].separation))
    cosines = [float("nan") if block.neighbour is None else block.neighbour for block in blocks]
    middle.plot(depth, cosines, "o-", color="tab:green", markersize=4)
    middle.set(ylabel="cosine with\nthe block before", ylim=(min([0.0, *cosines[1:]]) - 0.02, 1.02))
    bottom.plot(depth, [block.positive for block in blocks], "o-", color="tab:orange", markersize=4, label="positive")
    bottom.plot(depth, [block.negative for block in blocks], "o--", color="tab:purple", markersize=2, label="negative")
    bottom.set(ylabel="norm of\nthe centre", xlabel="block", yscale="log")
    bottom.legend(frameon=False)
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def show_front(trials: Sequence[FrozenTrial], chosen: FrozenTrial) -> None:
    """The trials that no other beats, by rising KL; the chosen one in bold."""
    best = front(trials)
    rows = best if chosen in best else [*best, chosen]
    table = Table(
        title=f"Pareto front: {len(best)} of {len(trials)} trials",
        caption="kernels: greatest strength @ block → least ± blocks away, zero beyond",
    )
    for name in ("trial", "gap", "KL", "layer", *COMPONENTS):
        table.add_column(name, justify="left" if name in COMPONENTS else "right")
    for trial in rows:
        gap, kl = trial.values
        kernels = [_kernel(kernel_of(trial.params, name)) for name in COMPONENTS]
        style = "bold green" if trial.number == chosen.number else ""
        table.add_row(
            str(trial.number), f"{gap:+.2f}", f"{kl:.3f}", f"{trial.params['layer']:.1f}", *kernels, style=style
        )
    Console().print(table)


def _kernel(kernel: ll.Kernel) -> str:
    greatest, position, least, distance = kernel
    return f"{greatest:.2f}@{position:.1f} → {least:.2f}±{distance:.0f}"


def plot_front(
    trials: Sequence[FrozenTrial], chosen: FrozenTrial, base: tuple[float, float], max_kl: float, title: str, file: Path
) -> None:
    """All trials, the front and the chosen one marked, as a PNG; base holds both sides' gaps without an adapter."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    best = front(trials)
    points = axes.scatter(*_points(trials), c=[trial.number for trial in trials], cmap="viridis", s=22, zorder=2)
    figure.colorbar(points, ax=axes, label="trial", pad=0.01)
    axes.plot(*_points(best), color="tab:red", drawstyle="steps-post", linewidth=1, label="Pareto front", zorder=1)
    axes.plot(*_points([chosen]), "*", color="tab:red", markersize=16, label=f"picked: trial {chosen.number}", zorder=3)
    for gap, side in zip(base, ("positive", "negative"), strict=True):
        axes.axhline(gap, color="grey", linestyle="--", linewidth=1)
        axes.annotate(
            f"{side} side without an adapter",
            (0.01, gap),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color="grey",
            fontsize=8,
        )
    axes.axvline(max_kl, color="grey", linestyle=":", linewidth=1, label=f"--max-kl {max_kl:g}")
    axes.set(title=title, xlabel="KL divergence on neutral prompts (nats)", ylabel="gap left on the positive side")
    axes.set_xscale("log")
    axes.margins(y=0.08)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def _points(trials: Sequence[FrozenTrial]) -> tuple[list[float], list[float]]:
    return [max(trial.values[1], LEAST_KL) for trial in trials], [trial.values[0] for trial in trials]
