"""A picture of how far an adapter moves each layer: the norm of its delta over the depth of the model."""

from pathlib import Path

from ..base.stacks import place
from ..errors import ConfigError
from .report import Report, grouped

MARKERS = "osD^vPX*<>hd"


def plot_norms(report: Report, path: Path) -> None:
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
    names = {pattern.rpartition("*.")[2] for pattern in known}  # within the block; two stacks may have the same
    for i, (pattern, layers) in enumerate(known.items()):
        label = pattern if len(names) < len(known) else pattern.rpartition("*.")[2]
        depth, norms = zip(*((place(layer.path)[1], layer.norm) for layer in layers), strict=True)
        if None in depth:  # outside of the blocks
            axes.axhline(norms[0], label=label, color=f"C{i}", linestyle="--", linewidth=1)
        else:  # of the ten colours some come twice: markers tell them apart
            marker = MARKERS[i % len(MARKERS)]
            axes.plot(depth, norms, label=label, color=f"C{i}", marker=marker, markersize=4, linewidth=1)
    axes.set_xlabel("block")
    axes.set_ylabel("‖W' - W‖")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.set_title(f"{report.path.name}: {report.variant}, norm of the delta by layer", fontsize=10)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    figure.savefig(path, format="png")
