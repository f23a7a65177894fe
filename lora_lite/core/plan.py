"""`plan`: the layers that attach would adapt, and what it would leave out, as a table."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from ..base.probe import check_gradients
from .config import BaseConfig
from .positions import check_can_act
from .resolve import attachable, checked_configs, resolve
from .targets import LeftOut, Target, model_width, select
from .ties import tie
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


def plan(model: nn.Module, cfg: BaseConfig | Sequence[BaseConfig]) -> Plan:
    """The layers that `attach(model, cfg)` would adapt; the model may be on the meta device.

    Raises:
        The errors of `attach` for the config, the model and its layers.
    """
    configs, root = checked_configs(cfg), attachable(model)
    selections = [select(root, config) for config in configs]
    methods = [resolve(selection, config) for selection, config in zip(selections, configs, strict=True)]
    targets = [site.target for sites in methods for site in sites]
    parameters = 0
    for config, sites in zip(configs, methods, strict=True):
        if config.tied_weights != "apart":  # noted at the sites, which nobody installs: the model keeps nothing of it
            tie(root, config, sites, [site for others in methods for site in others])
        if lookup(config.variant).positions(config) is not None:
            check_can_act(root, sites)
        shared = lookup(config.variant).shared_specs([site.target for site in sites], config)
        specs = [spec for known in (shared, *(site.specs for site in sites)) for spec in known.values()]
        parameters += sum(math.prod(spec.shape) for spec in specs if spec.trainable)
    paths = {target.path for target in targets}
    if parameters and not all(selection.all_plain for selection in selections):
        check_gradients(root, paths)  # as attach: what a plan shows can be attached
    left_out = tuple(one for one in selections[0].left_out if one.path not in paths)
    beside = (
        () if any(config.target_names for config in configs) else unadapted(root, configs[0], paths, dict(left_out))
    )
    variants = " + ".join(config.variant for config in configs)
    unique = tuple(dict.fromkeys(targets))  # two methods may share a layer
    return Plan(type(root).__name__, variants, unique, parameters, model_width(root), left_out, beside)
