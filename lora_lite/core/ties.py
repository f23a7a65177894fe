"""An embedding's weight that others hold as well, as the head does: one adapter for all, if the config says so."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from ..base.layer import BaseLayer
from ..base.readers import readers
from ..errors import TargetError
from .config import BaseConfig
from .names import TIES
from .state import Site, sites_of
from .variant import Variant, adds_constant, lookup

_APART = 'use tied_weights="apart"'


def tie(root: nn.Module, cfg: BaseConfig, sites: Sequence[Site], every: Sequence[Site]) -> None:
    """Note at each embedding who else holds its weight, so that they multiply by W', too.

    every       the sites of all methods of the adapter, these among them

    Raises:
        TargetError: for a weight that several modules hold with tied_weights="refuse"; with "together" for one that
            isn't an embedding's, a method that is no low-rank update, other adapters that would see W' as the base, and
            where nothing is tied.
    """
    modules = dict(root.named_modules())
    reads, targets = readers(modules), {id(site.module) for site in sites}
    for site in sites:
        holders = _holders(modules, site.base)
        if not holders:
            continue
        problem = f"{site.path}: {next(iter(holders))} holds its weight as well"
        if cfg.tied_weights == "refuse":
            raise TargetError(f'{problem}\n  use tied_weights="apart" or "together", or untie them before attach')
        tied = [modules[path] for path in holders]
        _check_together(problem, site, cfg, tied, targets)
        beside = [other for other in every if any(other.module is module for module in tied)]
        if any(other.base_weight != "unused" for other in beside):
            raise TargetError(f"{problem}, where another method of this adapter reads the weight\n  {_APART}")
        # A module around the holder may read the weight without calling it.
        ties = tuple((modules[p], name, modules[reads.get(f"{p}.{name}", p)]) for p, name in holders.items())
        site.base = replace(site.base, reader=site.base.reader or site.module, ties=ties)
    if cfg.tied_weights == "together" and not any(site.base.ties for site in sites):
        problem = f'tied_weights="together": no other module holds the weight of {sites[0].path}'
        raise TargetError(f'{problem}\n  use a base whose embedding and head are tied, or tied_weights="apart"')


def _holders(modules: Mapping[str, nn.Module], base: BaseLayer) -> dict[str, str]:
    """Path of each other module that holds the layer's weight -> its name there."""
    if base.is_block:
        return {}
    return {
        path: name
        for path, module in modules.items()
        for name, parameter in module._parameters.items()
        if parameter is base.stored and module is not base.module and module is not base.packed
    }


def _check_together(
    problem: str, site: Site, cfg: BaseConfig, tied: Sequence[nn.Module], targets: Collection[int]
) -> None:
    """TargetError where one adapter can't act on all that hold the weight of this site."""
    others = [other for module in tied for other in sites_of(module).values()]
    from_another_end = TIES in site.module.__dict__ or any(other.base.ties for other in others)
    if site.base.kind.category != "embedding" or from_another_end or any(id(module) in targets for module in tied):
        cure = 'with tied_weights="together" name the embedding alone, and always the same one'
    elif lookup(cfg.variant).low_rank is Variant.low_rank:
        problem, cure = f"{problem}, and {cfg.variant!r} is no low-rank update", _APART
    elif adds_constant(site.specs):
        problem, cure = f"{problem}, and {cfg.variant!r} adds a constant, which no weight holds", _APART
    elif any(other.base_weight != "unused" for other in others):
        problem, cure = f"{problem}, where an adapter reads the weight", "detach that first"
    else:
        return
    raise TargetError(f"{problem}\n  {cure}")
