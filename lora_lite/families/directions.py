"""Directions of the residual stream in a config, and which of them acts at which layer, and how much of it."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch.nn.functional as F
from jaxtyping import Float
from loguru import logger
from torch import Tensor, nn

from ..core.config import BaseConfig
from ..core.layer import Layer
from ..core.validate import is_number, is_safe_regex
from ..errors import ConfigError
from ..measure.capture import capture
from ..measure.contrast import Center, Contrast, Method, contrast, is_quantile, orthonormal

__all__ = ["DirectionConfig", "Kernel", "Method", "SubspaceConfig", "fit", "fit_steps", "placed"]

T = TypeVar("T")

MOST_KERNELS = 100
REACH = 0.1
"""Of a vector: how far off a block's output may move when it is added to what a layer of the block writes."""


class Kernel(NamedTuple):
    """Weight over depth: the greatest at one block (a fraction lies between two), linear to the least at some blocks'
    distance from there, zero beyond."""

    max_weight: float
    max_weight_position: float
    min_weight: float
    min_weight_distance: float

    def at(self, block: int) -> float:
        """The strength at a block, by its index."""
        d = abs(block - self.max_weight_position)
        if d > self.min_weight_distance:
            return 0.0
        return self.max_weight + d / self.min_weight_distance * (self.min_weight - self.max_weight)


@dataclass(frozen=True, kw_only=True)
class DirectionConfig(BaseConfig):
    """Directions of the residual stream, and where they act.

    strength    λ, or its counterpart, before the kernels
    layer       whose directions: None each block's own; 18 those of block 18, everywhere; 18.5 between two blocks'. A
                block has directions if one of its layers is a target
    kernels     {regex: Kernel}, or pairs: the weight over depth of the layers whose path the regex is found in. A file
                may bring it, so it must be one that is searched in no time (`config.is_safe_regex`)
    center, winsorize, projected    as in `contrast`
    """

    strength: float = 1.0
    layer: int | float | None = None
    kernels: Any = ()
    center: Center | str = Center.MEAN
    winsorize: float | None = None
    projected: bool = False
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (*BaseConfig.SAME_AT_ALL_LAYERS, "center", "winsorize", "projected")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_number(self.strength), "strength", "a finite number")
        self.require(self.layer is None or (is_number(self.layer) and self.layer >= 0), "layer", "a depth, or None")
        self.require(is_quantile(self.winsorize), "winsorize", "a quantile above 0, at most 1, or None")
        self.require(isinstance(self.projected, bool), "projected", "True or False")
        pairs = self.kernels.items() if isinstance(self.kernels, Mapping) else self.kernels
        try:
            kernels = tuple((pattern, Kernel(*map(float, kernel))) for pattern, kernel in pairs)
            ok = all(all(map(math.isfinite, kernel)) and kernel[3] > 0 for _, kernel in kernels)
            ok = ok and len(kernels) <= MOST_KERNELS and all(is_safe_regex(pattern) for pattern, _ in kernels)
        except (TypeError, ValueError, OverflowError):
            kernels, ok = (), False
        wanted = "{regex: Kernel(four finite numbers, the distance above 0)}, with three repetitions at most"
        self.require(ok, "kernels", wanted)
        object.__setattr__(self, "kernels", kernels)


@dataclass(frozen=True, kw_only=True)
class SubspaceConfig(DirectionConfig):
    """rank: k, how many directions."""

    rank: int = 1
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (*DirectionConfig.SAME_AT_ALL_LAYERS, "rank")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(type(self.rank) is int and self.rank > 0, "rank", "a number of directions, at least 1")


def fit(model: nn.Module, targets: Mapping[str, Layer], cfg: SubspaceConfig, calibration_data: Any) -> None:
    """Each layer's own directions into its `lora_own`: out of two sides of prompts, or as given.

    The data is {"positive": batches, "negative": batches}, or {"directions": given} as `rows_for` takes it. Raises
    ConfigError.
    """
    given = given_in(calibration_data)
    if given is None:
        sides = contrasts(model, targets, cfg, calibration_data, rank=cfg.rank)
        given = {path: side.directions for path, side in sides.items()}
    for layer in targets.values():
        layer.lora_own.copy_(orthonormal(rows_for(layer, given, cfg.rank), layer.path))


def fit_steps(model: nn.Module, targets: Mapping[str, Layer], cfg: Any, calibration_data: Any) -> None:
    """Into each layer's `lora_own` the way from the negative side to the positive one, or what is given, as it is; into
    `lora_norm` how long the activations there are, or 0. cfg has `method` and `what`. Raises ConfigError."""
    given, sides = given_in(calibration_data), {}
    if given is None:
        sides = contrasts(model, targets, cfg, calibration_data, cfg.what, method=cfg.method)
        given = {path: side.step for path, side in sides.items()}
    for layer in targets.values():
        row, side = rows_for(layer, given, 1).double(), at_layer(layer, sides)
        layer.lora_own.copy_(orthonormal(row, layer.path)[0] * row.norm())
        layer.lora_norm.fill_(side.length if side else 0.0)
    if sides and cfg.what == "residual":
        layer = next(iter(targets.values()))
        step = layer.lora_norm * F.normalize(layer.lora_own, dim=0)
        check_reach(model, layer, step, next(iter(calibration_data["positive"])))


def given_in(calibration_data: Any) -> Any:
    """What {"directions": given} gives; None for two sides of prompts."""
    if isinstance(calibration_data, Mapping) and set(calibration_data) == {"directions"}:
        return calibration_data["directions"]
    return None


def contrasts(
    model: nn.Module, targets: Mapping[str, Layer], cfg: DirectionConfig, data: Any, what: str = "residual", **how: Any
) -> dict[str, Contrast]:
    """Between two sides of prompts, at the block of each target; or in its own output. Raises as `contrast`."""
    around = [f"{layer.block[0]}{layer.block[1]}" for layer in targets.values() if layer.block]
    where = list(targets) if what == "output" else list(dict.fromkeys(around))
    options: dict[str, Any] = {"center": cfg.center, "winsorize": cfg.winsorize, "projected": cfg.projected, **how}
    return contrast(model, data, where, what=what, **options)


def at_layer(layer: Layer, found: Mapping[str, T]) -> T | None:
    """What is found for a layer, by its own path or that of its block."""
    stack, block = layer.block or ("", None)
    return found.get(layer.path, found.get(f"{stack}{block}"))


def rows_for(layer: Layer, given: Any, rank: int) -> Float[Tensor, "k o"]:
    """A layer's own of what is given: a tensor (d,) or (k, d) for all layers, (n_blocks, k, d) by block, or {path of a
    layer or of its block: (d,) or (k, d)}. Raises ConfigError."""
    block = layer.block[1] if layer.block else None
    rows: Any
    if isinstance(given, Mapping):
        rows = at_layer(layer, given)
    elif isinstance(given, Tensor) and given.ndim == 3:
        rows = given[block] if block is not None and block < len(given) else None
    else:
        rows = given
    got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
    if got not in ((rank, layer.out_features), (layer.out_features,)[: 1 if rank == 1 else 0]):
        raise ConfigError(
            f"{layer.path}: wanted directions {(rank, layer.out_features)} for its block {block}, got {got}\n"
            f"  give a tensor (d,) or (k, d), one (n_blocks, k, d), or {{path: (k, d)}}"
        )
    return rows.detach().reshape(rank, -1)


def turned(a: Float[Tensor, "k o"], b: Float[Tensor, "k o"], t: float) -> Float[Tensor, "k o"]:
    """Orthonormal directions between those of two blocks."""
    b = b * (a * b).sum(1, keepdim=True).sign()  # of a principal direction the sign means nothing
    return orthonormal((1 - t) * a + t * b, f"{t:g} of the way between two blocks")


Between = Callable[[Tensor, Tensor, float], Tensor]


def placed(layers: Mapping[str, Layer], between: Between = turned) -> list[tuple[Layer, Float[Tensor, "*k o"], float]]:
    """Each layer with what acts on it, its own `lora_own` or another's, and its weight, by its config.

    `between(a, b, t)` is what lies between two blocks'. Raises ConfigError.
    """
    own = {layer.block: layer.lora_own for layer in layers.values()}
    chosen: dict[tuple[str, float], Tensor] = {}
    out = []
    for layer in layers.values():
        rows, cfg = layer.lora_own, layer.cfg
        if cfg.layer is not None:
            at = (layer.block[0] if layer.block else "", cfg.layer)
            rows = chosen[at] if at in chosen else chosen.setdefault(at, _rows_at(cfg.layer, at[0], own, between))
            if rows.shape != layer.lora_own.shape:
                raise ConfigError(
                    f"layer={cfg.layer}: its directions are {tuple(rows.shape)}, and {layer.path} wants "
                    f"{tuple(layer.lora_own.shape)}\n  one layer's directions suit targets of one width"
                )
        out.append((layer, rows, cfg.strength * _weight(layer)))
    return out


def _weight(layer: Layer) -> float:
    """By the one kernel whose regex is found in the layer's path; 1 without kernels."""
    kernels = layer.cfg.kernels
    if not kernels:
        return 1.0
    found = [kernel for pattern, kernel in kernels if re.search(pattern, layer.path)]
    if len(found) != 1 or layer.block is None:
        raise ConfigError(
            f"kernels: {len(found)} of {[pattern for pattern, _ in kernels]} match {layer.path}\n"
            f"  every target wants exactly one, and to be in a block; leave others out with exclude_names"
        )
    return found[0].at(layer.block[1])


def _rows_at(
    depth: int | float, stack: str, own: Mapping[tuple[str, int] | None, Tensor], between: Between
) -> Float[Tensor, "*k o"]:
    """What one block of a stack has; at a depth between two blocks, what lies between theirs."""
    low, high = math.floor(depth), math.ceil(depth)
    a, b = own.get((stack, low)), own.get((stack, high))
    if a is None or b is None:
        held = sorted(key[1] for key in own if key is not None and key[0] == stack)
        raise ConfigError(
            f"layer={depth}: no direction is kept for it\n"
            f"  blocks with one: {held or 'none'}; target that block too, a kernel can give it no weight"
        )
    return a if low == high else between(a, b, depth - low).to(a.dtype)


def check_reach(model: nn.Module, layer: Layer, step: Float[Tensor, "o"], batch: Any) -> None:
    """Warn if a vector that is added to what a layer writes moves its block's output by another one: not so where the
    sum of all that the block writes is what it puts out, but so where a norm or a factor comes after the layer."""
    if layer.block is None:
        return
    block = f"{layer.block[0]}{layer.block[1]}"

    def mean() -> Tensor:
        return capture(model, [batch], [block], progress=False)[block].mean

    before = mean()
    handle = model.get_submodule(layer.path).register_forward_hook(lambda module, args, y: y + step.to(y))
    try:
        moved = mean() - before
    finally:
        handle.remove()
    off = float((moved - step.to(moved)).norm() / step.norm())
    if off > REACH:
        logger.warning(
            f"{layer.path}: a vector added there moves the output of {block} by another one ({off:.0%} off)\n"
            f"  a norm or a factor follows it: the effect is not that of adding the vector at the block's output"
        )
