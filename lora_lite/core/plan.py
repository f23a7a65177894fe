"""`plan`: the layers that attach would adapt, and what it would leave out, as a table."""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..base.probe import check_gradients
from .config import BaseConfig
from .positions import check_can_act
from .resolve import attachable, checked_config, resolve
from .targets import LeftOut, Target, model_width, select
from .unadapted import Unadapted, lines, unadapted
from .variant import lookup


@dataclass(frozen=True)
class Plan:
    """The layers that `attach` would adapt. Prints as a table; iterates over its targets."""

    model: str
    variant: str
    targets: tuple[Target, ...]
    parameters: int
    d_model: int | None
    left_out: tuple[LeftOut, ...] = ()
    """The layers that the config's defaults leave out, and why; empty where target_names says what is wanted."""
    unadapted: tuple[Unadapted, ...] = ()
    """These and all other parameters without an adapter (norms, embeddings, convolutions), the largest share first."""

    def __len__(self) -> int:
        return len(self.targets)

    def __iter__(self) -> Iterator[Target]:
        return iter(self.targets)

    def __str__(self) -> str:
        """One row for all layers that differ in the block index only."""
        groups: dict[tuple[str, ...], list[Target]] = defaultdict(list)
        for target in self.targets:
            role = "-" if self.d_model is None else target.role(self.d_model) or "square"
            groups[target.pattern, f"{target.d_in} -> {target.d_out}", role, target.kind].append(target)
        head = ("layer", "in -> out", "role", "base", "n")
        rows = [head, *((*key, str(len(members))) for key, members in groups.items())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        title = f"{self.variant} on {self.model}: {len(self)} layers, {self.parameters:,} trainable parameters"
        return "\n".join([title, *table, *lines(self.unadapted)])


def plan(model: nn.Module, cfg: BaseConfig) -> Plan:
    """The layers that `attach(model, cfg)` would adapt; the model may be on the meta device.

    Raises:
        The errors of `attach` for the config, the model and its layers.
    """
    root = attachable(model)
    selection = select(root, checked_config(cfg))
    sites = resolve(selection, cfg)
    if lookup(cfg.variant).positions(cfg) is not None:
        check_can_act(root, sites)
    shared = lookup(cfg.variant).shared_specs([site.target for site in sites], cfg)
    specs = [spec for known in (shared, *(site.specs for site in sites)) for spec in known.values()]
    parameters = sum(math.prod(spec.shape) for spec in specs if spec.trainable)
    if parameters and not selection.all_plain:
        check_gradients(root, {site.path for site in sites})  # as attach: what a plan shows can be attached
    targets, left_out = tuple(site.target for site in sites), tuple(selection.left_out)
    paths = {target.path for target in targets}
    beside = () if cfg.target_names else unadapted(root, cfg, paths, dict(left_out))
    return Plan(type(root).__name__, cfg.variant, targets, parameters, model_width(root), left_out, beside)
