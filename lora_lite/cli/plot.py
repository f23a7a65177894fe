"""A picture of how far an adapter moves each layer: the norm of its delta over the depth of the model."""

import os

from ..errors import ConfigError
from .report import Report, grouped

MARKERS = "osD^vPX*<>hd"


def plot_norms(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a PNG: ‖W' - W‖ over the block's index, a line for each kind of layer; a dashed one outside of the blocks.

    Raises:
        ConfigError: where no norm is known.
        ModuleNotFoundError: without matplotlib (extra "demo").
    """
    known = grouped({layer.path: layer for layer in report.layers if layer.norm is not None})
    if not known:
        raise ConfigError(f"{report.path}: no norm is known to plot\n  give --base, the folder of the original weights")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for i, (label, layers) in enumerate(zip(_labels(list(known)), known.values(), strict=True)):
        marker = MARKERS[i % len(MARKERS)]
        depth, norms = zip(*((layer.block, layer.norm) for layer in layers), strict=True)
        if None in depth:
            axes.axhline(norms[0], label=label, color=f"C{i}", linestyle="--", linewidth=1)
        else:
            axes.plot(depth, norms, label=label, color=f"C{i}", marker=marker, markersize=4, linewidth=1)
    axes.set_xlabel("block")
    axes.set_ylabel("‖W' - W‖")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.set_title(f"{report.path.name}: {report.variant}, norm of the delta by layer", fontsize=10)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    figure.savefig(path, format="png")


def _labels(patterns: list[str]) -> list[str]:
    """The last name of each pattern, and as many before it as tell them apart."""
    parts = [pattern.split(".") for pattern in patterns]
    for n in range(1, max(map(len, parts))):
        labels = [".".join(part[-n:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return patterns
