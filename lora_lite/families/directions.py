"""Directions of the residual stream: found at attach, and which of them acts at which layer, and how much of it."""

import enum
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple

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

__all__ = [
    *("DirectionConfig", "Kernel", "Method", "SubspaceConfig", "Unit", "VectorConfig"),
    *("active_directions", "fit_subspace", "fit_vector"),
]

MOST_KERNELS = 100
TOLERANCE = 0.1
"""How far a block's output may be off, as a share of a vector that is added to what a layer of the block writes."""


class Kernel(NamedTuple):
    """A weight over depth: the greatest at one block (a fraction lies between two), from there linear to the least at a
    distance of some blocks, and 0 beyond."""

    max_weight: float
    max_weight_position: float
    min_weight: float
    min_weight_distance: float

    def at(self, block: int) -> float:
        """The weight at a block, by its index."""
        distance = abs(block - self.max_weight_position)
        if distance > self.min_weight_distance:
            return 0.0
        return self.max_weight + distance / self.min_weight_distance * (self.min_weight - self.max_weight)


@dataclass(frozen=True, kw_only=True)
class DirectionConfig(BaseConfig):
    """Directions of the residual stream, and where they act: on what writes to it, fused experts included.

    strength    λ, or its counterpart, before the kernels
    layer       whose directions: None each block's own; 18 those of block 18, everywhere; 18.5 between two blocks'. A
                block has directions if one of its layers is a target
    kernels     {regex: Kernel}, or pairs: the weight over depth of the layers whose path the regex is found in. A file
                may bring it, so it must be one that is searched in no time (`config.is_safe_regex`)
    center, winsorize, projected    as in `contrast`
    """

    target_roles: Sequence[str] = ("writer",)
    strength: float = 1.0
    layer: int | float | None = None
    kernels: Any = ()
    center: Center | str = Center.MEAN
    winsorize: float | None = None
    projected: bool = False
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (*BaseConfig.SAME_AT_ALL_LAYERS, "center", "winsorize", "projected")
    FUSED_EXPERTS: ClassVar[bool] = True
    WITHOUT_MATRIX: ClassVar[tuple[str, ...]] = ("norm", "block")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_number(self.strength), "strength", "a finite number")
        self.require(self.layer is None or (is_number(self.layer) and self.layer >= 0), "layer", "a depth, or None")
        self.require(is_quantile(self.winsorize), "winsorize", "a quantile above 0, at most 1, or None")
        pairs = self.kernels.items() if isinstance(self.kernels, Mapping) else self.kernels
        try:
            kernels = tuple((pattern, Kernel(*map(float, numbers))) for pattern, numbers in pairs)
            valid = all(all(map(math.isfinite, kernel)) and kernel.min_weight_distance > 0 for _, kernel in kernels)
            valid = valid and len(kernels) <= MOST_KERNELS and all(is_safe_regex(pattern) for pattern, _ in kernels)
        except (TypeError, ValueError, OverflowError):
            kernels, valid = (), False
        wanted = "{regex: Kernel(four finite numbers, the distance above 0)}, with three repetitions at most"
        self.require(valid, "kernels", wanted)
        object.__setattr__(self, "kernels", kernels)  # the one form: pairs, which a frozen config can be hashed with


@dataclass(frozen=True, kw_only=True)
class SubspaceConfig(DirectionConfig):
    """rank: k, how many directions."""

    rank: int = 1
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (*DirectionConfig.SAME_AT_ALL_LAYERS, "rank")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(type(self.rank) is int and self.rank > 0, "rank", "a number of directions, at least 1")


class Unit(enum.StrEnum):
    DIFFERENCE, NORM = "difference", "norm"


@dataclass(frozen=True, kw_only=True)
class VectorConfig(DirectionConfig):
    """One vector for each layer.

    unit     of strength. "difference": the distance of the sides along the direction; of given directions their own
             length. "norm": the length of the activations of the layer's own block, as the fit measured it
    method   "difference" of the sides' centres, "pca" or "probe", as in `contrast`
    what     "residual": the direction is of the stream as it leaves the block. "output": of what the layer puts out
    """

    unit: Unit | str = Unit.DIFFERENCE
    method: Method | str = Method.DIFFERENCE
    what: str = "residual"
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (*DirectionConfig.SAME_AT_ALL_LAYERS, "method", "what")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.what in ("residual", "output"), "what", '"residual" or "output"')
        self.require(self.what == "residual" or self.layer is None, "layer", "None with what='output'")
        self.require(self.method == "difference" or self.center == "mean", "center", f"'mean' for {self.method!r}")


def fit_subspace(model: nn.Module, targets: Mapping[str, Layer], cfg: SubspaceConfig, calibration_data: Any) -> None:
    """A `group_init`: k orthonormal directions into each layer's `lora_own`, from two sides of prompts or as given.

    The data is {"positive": batches, "negative": batches}, or {"directions": given} as `given_rows` takes it. Raises
    ConfigError.
    """
    contrasts = contrast_targets(model, targets, cfg, calibration_data, rank=cfg.rank)
    given = {path: contrast.directions for path, contrast in contrasts.items()} or calibration_data["directions"]
    for layer in targets.values():
        layer.lora_own.copy_(orthonormal(given_rows(layer, given, cfg.rank), layer.path))


def fit_vector(model: nn.Module, targets: Mapping[str, Layer], cfg: VectorConfig, calibration_data: Any) -> None:
    """A `group_init`: into each layer's `lora_own` the way from the negative side to the positive one, or the vector
    that is given; into `lora_norm` the length of the activations there, 0 for a given one.

    The data is that of `fit_subspace`; cfg has `method` and `what`. Raises ConfigError.
    """
    contrasts = contrast_targets(model, targets, cfg, calibration_data, what=cfg.what, method=cfg.method)
    given = {path: contrast.step for path, contrast in contrasts.items()} or calibration_data["directions"]
    for layer in targets.values():
        vector, contrast = given_rows(layer, given, 1).double(), of_layer(layer, contrasts)  # (1, o)
        layer.lora_own.copy_(orthonormal(vector, layer.path)[0] * vector.norm())
        layer.lora_norm.fill_(contrast.length if contrast else 0.0)
    if contrasts and cfg.what == "residual" and not cfg.on_blocks:
        layer, batch = next(iter(targets.values())), next(iter(calibration_data["positive"]))
        warn_if_transformed(model, layer, batch)  # one layer is enough: blocks are built alike


def contrast_targets(
    model: nn.Module, targets: Mapping[str, Layer], cfg: DirectionConfig, data: Any, **options: Any
) -> dict[str, Contrast]:
    """The contrast of two sides of prompts, by the path of each target's block, or with what="output" of the target.
    None at all for {"directions": given}. Raises as `contrast`."""
    if isinstance(data, Mapping) and set(data) == {"directions"}:
        return {}
    blocks = filter(None, map(block_path, targets.values()))
    where = list(targets) if options.get("what") == "output" else list(dict.fromkeys(blocks))
    settings: dict[str, Any] = {"center": cfg.center, "winsorize": cfg.winsorize, "projected": cfg.projected}
    return contrast(model, data, where, **settings, **options)


def block_path(layer: Layer) -> str:
    """The path of the block that a layer is in; "" outside of every block."""
    return f"{layer.block[0]}{layer.block[1]}" if layer.block else ""


def of_layer(layer: Layer, values: Mapping[str, Any]) -> Any:
    """The value for a layer, by its own path or that of its block; None if there is none."""
    return values.get(layer.path, values.get(block_path(layer)))


def given_rows(layer: Layer, given: Any, rank: int) -> Float[Tensor, "k o"]:
    """The rows for a layer in what is given: a tensor (d,) or (k, d) for all layers, (n_blocks, k, d) by block, or
    {path of a layer or of its block: (d,) or (k, d)}. Raises ConfigError."""
    block = layer.block[1] if layer.block else None
    if isinstance(given, Mapping):
        given = of_layer(layer, given)
    elif isinstance(given, Tensor) and given.ndim == 3:
        given = given[block] if block is not None and block < len(given) else None
    got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
    if got != (rank, layer.out_features) and (rank > 1 or got != (layer.out_features,)):
        raise ConfigError(
            f"{layer.path}: wanted directions {(rank, layer.out_features)} for its block {block}, got {got}\n"
            f"  give a tensor (d,) or (k, d), one (n_blocks, k, d), or {{path: (k, d)}}"
        )
    return given.detach().reshape(rank, -1)


def warn_if_transformed(model: nn.Module, layer: Layer, batch: Any) -> None:
    """Warn if a vector that is added to what a layer writes moves its block's output by another vector.

    It does so where a norm or a factor comes after the layer, before its block adds all up.
    """
    block, step = block_path(layer), layer.lora_norm * F.normalize(layer.lora_own, dim=0)  # step (o,)

    def mean_output() -> Float[Tensor, "d"]:
        return capture(model, [batch], [block], progress=False)[block].mean

    before = mean_output()
    with model.get_submodule(layer.path).register_forward_hook(lambda module, args, y: y + step.to(y)):
        moved = mean_output() - before
    error = float((moved - step.to(moved)).norm() / step.norm())
    if error > TOLERANCE:
        logger.warning(
            f"{layer.path}: a vector added there moves the output of {block} by another one ({error:.0%} off)\n"
            f"  a norm or a factor follows it: kinds=('block',) adds it at the block's output itself"
        )


def interpolate(a: Float[Tensor, "k o"], b: Float[Tensor, "k o"], t: float) -> Float[Tensor, "k o"]:
    """Orthonormal directions between those of two blocks."""
    b = b * (a * b).sum(1, keepdim=True).sign()  # of a principal direction the sign means nothing
    return orthonormal((1 - t) * a + t * b, f"{t:g} of the way between two blocks")


def active_directions(
    layers: Mapping[str, Layer], between: Callable[[Tensor, Tensor, float], Tensor] = interpolate
) -> list[tuple[Layer, Float[Tensor, "*k o"], float]]:
    """Each layer with the directions that act on it, its own `lora_own` or another's, and their weight, by its config.

    `between(a, b, t)` is what lies between two blocks'. Raises ConfigError.
    """
    by_block = {layer.block: layer.lora_own for layer in layers.values()}

    @cache  # one interpolation for each stack and depth, not one for each layer
    def at_depth(depth: int | float, stack: str) -> Float[Tensor, "*k o"]:
        low, high = math.floor(depth), math.ceil(depth)
        a, b = by_block.get((stack, low)), by_block.get((stack, high))
        if a is None or b is None:
            blocks = sorted(block[1] for block in by_block if block and block[0] == stack)
            raise ConfigError(
                f"layer={depth}: no direction is kept for it\n"
                f"  blocks with one: {blocks or 'none'}; target that block too, a kernel can give it no weight"
            )
        return a if low == high else between(a, b, depth - low).to(a.dtype)

    active = []
    for layer in layers.values():
        rows, cfg = layer.lora_own, layer.cfg
        if cfg.layer is not None:
            rows = at_depth(cfg.layer, layer.block[0] if layer.block else "")
            if rows.shape != layer.lora_own.shape:
                raise ConfigError(
                    f"layer={cfg.layer}: its directions are {tuple(rows.shape)}, and {layer.path} wants "
                    f"{tuple(layer.lora_own.shape)}\n  one layer's directions suit targets of one width"
                )
        active.append((layer, rows, cfg.strength * _kernel_weight(layer)))
    return active


def _kernel_weight(layer: Layer) -> float:
    """The weight by the one kernel whose regex is found in the layer's path; 1 without kernels."""
    kernels = layer.cfg.kernels
    if not kernels:
        return 1.0
    matching = [kernel for pattern, kernel in kernels if re.search(pattern, layer.path)]
    if len(matching) != 1 or layer.block is None:
        raise ConfigError(
            f"kernels: {len(matching)} of {[pattern for pattern, _ in kernels]} match {layer.path}\n"
            f"  every target wants exactly one, and to be in a block; leave others out with exclude_names"
        )
    return matching[0].at(layer.block[1])
