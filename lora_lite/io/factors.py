"""Adapters as two factors a layer, whatever their methods are: a plain LoRA, as other libraries' formats hold it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from jaxtyping import Float
from loguru import logger
from torch import Tensor, nn

from ..core.adapter import Adapter, adapters
from ..core.change import Change, added_change
from ..core.effective import delta_weight
from ..core.names import check_shapes
from ..core.state import Site
from ..core.validate import is_number
from ..errors import CheckpointError, ConfigError
from ..ops.svd import balanced_factors, energy_rank, low_rank_factors

Layers = dict[str, list[Site]]
"""The adapters to write at each layer, by its path."""

PLAIN = ("lora", "eva", "loftq")
"""The methods that are two factors, at any layer."""


@dataclass(frozen=True)
class Factors:
    """The update of a layer, alpha / r B A; of fused experts, with an axis for them in front."""

    a: Float[Tensor, "*e r i"]
    b: Float[Tensor, "*e o r"]
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[-2]


def check_cut(rank: int | None, energy: float | int | None, max_error: float | int | None) -> None:
    """ConfigError unless these say how an adapter of any method becomes a plain LoRA, or that it doesn't."""
    if not (rank is None or (type(rank) is int and rank > 0)):
        raise ConfigError(f"rank={rank!r}: wanted an integer of at least 1, or None")
    if energy is not None and (rank is not None or not is_number(energy) or not 0 < energy <= 1):
        raise ConfigError(f"energy={energy!r} with rank={rank}: wanted a share above 0, at most 1, without a rank")
    if max_error is not None and ((rank is None and energy is None) or not is_number(max_error)):
        raise ConfigError(f"max_error={max_error!r} with rank={rank}: wanted a number beside a rank or an energy")


def adapted_layers(model: nn.Module, chosen: Sequence[Adapter]) -> Layers:
    """The layers of these adapters, in the order in which they act at each.

    Raises:
        CheckpointError: for a sharded adapter, or a tensor that has lost its shape.
        ConfigError: for none, or one that is named twice.
    """
    names = [adapter.name for adapter in chosen]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"name={names}: wanted one adapter, or several different ones")
    layers: Layers = {}
    for adapter in (adapter for adapter in adapters(model).values() if adapter.name in names):
        if adapter.is_sharded:
            raise CheckpointError(
                f"adapter {adapter.name!r} is sharded\n  use lora_lite.save, then load it in one process to convert it"
            )
        check_shapes(adapter.state_dict(), adapter.specs(), f"adapter {adapter.name!r} in memory")
        for site in adapter.sites():
            layers.setdefault(site.path, []).append(site)
    return layers


def low_rank(
    layers: Layers, rank: int | None, energy: float | int | None, max_error: float | int | None
) -> tuple[dict[str, Factors], float]:
    """The factors of what the adapters change, and the greatest relative error of a layer. Raises CheckpointError."""
    factors, norms = {}, {}  # by path
    for path, sites in layers.items():
        factors[path], norms[path] = _factors_of(path, sites, rank, energy)
    errors = {path: rest / size if size else 0.0 for path, (rest, size) in norms.items()}
    worst = max(errors, key=lambda path: errors[path])
    rest, size = (math.hypot(*values) for values in zip(*norms.values(), strict=True))  # of all layers
    overall = rest / size if size else 0.0
    low, high = (f(pair.rank for pair in factors.values()) for f in (min, max))
    form = f"rank {rank}" if energy is None else f"rank {low} to {high}, with {energy:g} of the energy at each layer"
    line = f"as a LoRA of {form}: relative error {overall:.1e} overall, {errors[worst]:.1e} at worst ({worst})"
    logger.info(line)
    if max_error is not None and not errors[worst] <= max_error:
        raise CheckpointError(
            f"{line}\n  wanted at most max_error={max_error}; nothing was written: give a higher rank or energy"
        )
    return factors, errors[worst]


def _factors_of(
    path: str, sites: Sequence[Site], rank: int | None, energy: float | int | None
) -> tuple[Factors, tuple[float, float]]:
    """The factors of what a layer's adapters change, and (‖W' - W - B A‖, ‖W' - W‖). Raises CheckpointError."""
    dtype = reduce(torch.promote_types, (site.cfg.dtype for site in sites), torch.float32)
    is_stack = sites[0].base.kind.category == "experts"
    pairs, norms = [], []
    for expert in range(sites[0].base.experts) if is_stack else [None]:
        # Where the change is a product itself, as a LoRA's, no matrix of the layer's size is made.
        change = added_change(sites, expert) or Change(None, *delta_weight(sites, expert))
        if change.shift is not None and change.shift.any():
            raise CheckpointError(
                f"{path}: {sites[0].cfg.variant!r} changes its bias, which a plain LoRA can't hold\n"
                f"  keep it as our file (lora_lite.save), or merge it"
            )
        a, b = (factor.to(dtype) for factor in _factors(change, rank, energy))  # (r, i), (o, r)
        # From the factors as they are written: rounding counts as error, too.
        norms.append((change.distance(a, b), change.norm()))
        pairs.append((a, b))
    rest, size = (math.hypot(*values) for values in zip(*norms, strict=True))
    r = max(len(a) for a, _ in pairs)  # experts may need less: zeros fill them up
    filled = [(F.pad(a, (0, 0, 0, r - len(a))), F.pad(b, (0, r - len(a)))) for a, b in pairs]
    a, b = (torch.stack(side) if is_stack else side[0] for side in zip(*filled, strict=True))
    return Factors(a, b, float(r)), (rest, size)  # alpha = r: a scaling of 1


def _factors(change: Change, rank: int | None, energy: float | int | None) -> tuple[Tensor, Tensor]:
    """The A and B with the least ‖W' - W - B A‖ of this rank, or of the least one that holds the energy."""
    if change.a is None and rank is not None:
        a, b = low_rank_factors(change.b, rank)
    else:
        svd = change.svd()
        a, b = balanced_factors(svd, energy_rank(svd[1], energy or 1.0) if rank is None else min(rank, len(svd[1])))
    empty = 0 if rank is None else rank - len(a)  # of a small layer: servers know one rank for all
    return F.pad(a, (0, 0, 0, empty)), F.pad(b, (0, empty))
