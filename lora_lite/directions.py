"""The directions of the residual stream in which two sets of prompts differ."""

import enum
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .calibrate import Positions, capture, check_sides
from .config import BaseConfig, is_number, is_tame
from .errors import BaseModelError, ConfigError
from .layer import Layer


class Center(enum.StrEnum):
    """The mean, or the geometric median, which a few odd prompts move little."""

    MEAN, MEDIAN = "mean", "median"


SAME = 1e-5
"""Of a centre's size: a difference below it is float32's rounding."""
WEISZFELD_STEPS, WEISZFELD_TOLERANCE = 200, 1e-10
MOST_KERNELS = 100


@dataclass(frozen=True)
class Contrast:
    """At one block: orthonormal directions (k, d) float32, and the centres (d,) float64 of the two sides."""

    directions: Float[Tensor, "k d"]
    positive: Float[Tensor, "d"]
    negative: Float[Tensor, "d"]


def contrast(
    model: nn.Module,
    data: Any,
    where: Iterable[str] | None = None,
    *,
    rank: int = 1,
    center: str = "mean",
    winsorize: float | None = None,
    projected: bool = False,
    positions: Positions = "last",
    progress: bool = True,
) -> dict[str, Contrast]:
    """The directions of the residual stream in which two sets of prompts differ, by the path of the block.

    data        {"positive": batches, "negative": batches}, as `capture` takes them, that can be gone through again
    rank        the first direction is the difference of centres (Arditi et al. 2024, arXiv:2406.11717, section 2.3);
                further ones are the leading principal directions, orthogonal to it, of the differences of the pairs:
                then both sides are the same prompts in the same order, as one asks for each side's manner
    where       paths of blocks; None for all
    center      "mean" or "median", the geometric one
    winsorize   q: each prompt's vector is clamped to ± the q-quantile of its own components' sizes (the axis is the
                component axis), which tames the few huge components that language models have. None: not clamped
    projected   take the negative side's centre out of the directions, so that ablating spares what both sides share

    Raises ConfigError for a missing, empty or too small side, or an iterator, and what `capture` raises.
    """
    check_sides(data)
    if not _is_quantile(winsorize):
        raise ConfigError(f"winsorize={winsorize!r}: wanted a quantile above 0, at most 1, or None")
    if center not in ("mean", "median"):
        raise ConfigError(f"center={center!r}: wanted 'mean' or 'median'")

    def clamped(vectors: Tensor) -> Tensor:
        limit = vectors.abs().quantile(winsorize or 1.0, dim=1, keepdim=True)
        return vectors.clamp(-limit, limit)

    sides = {}
    for side in ("positive", "negative"):
        seen = capture(
            model,
            data[side],
            where,
            positions=positions,
            reduce=("samples",) if center == "median" or rank > 1 else ("mean",),
            transform=None if winsorize is None else clamped,
            progress=progress,
        )
        count = next(iter(seen.values())).count
        if count < max(2, rank):
            raise ConfigError(
                f"calibration_data[{side!r}] has {count} vectors: wanted {max(2, rank)} at least for rank {rank}\n"
                f"  one prompt gives one vector at positions='last'"
            )
        sides[side] = seen
    counts = {side: next(iter(seen.values())).count for side, seen in sides.items()}
    if rank > 1 and len(set(counts.values())) > 1:
        raise ConfigError(
            f"calibration_data has {counts} vectors: rank {rank} is taken of pairs, so wanted equal numbers"
        )
    out = {}
    for path, here in sides["positive"].items():
        there = sides["negative"][path]
        p, n = (each.mean if center == "mean" else geometric_median(each.kept_samples()) for each in (here, there))
        if (p - n).norm() <= SAME * max(p.norm(), n.norm()):
            raise BaseModelError(f"{path}: both sides have the same centre, so no direction\n  give sides that differ")
        directions = [p - n]
        if rank > 1:
            rest = here.kept_samples().double() - there.kept_samples().double()
            rest = rest - rest.mean(0)
            rest = rest - (rest @ directions[0])[:, None] * directions[0] / directions[0].square().sum()
            directions += list(torch.linalg.svd(rest, full_matrices=False)[2][: rank - 1])
        found = torch.stack(directions)
        if projected:
            found = found - (found @ n)[:, None] * n / n.square().sum()
        out[path] = Contrast(orthonormal(found, path).float(), p, n)
    return out


def _is_quantile(value: Any) -> bool:
    return value is None or (is_number(value) and 0 < value <= 1)


def orthonormal(rows: Float[Tensor, "k d"], where: str) -> Float[Tensor, "k d"]:
    """The rows made orthonormal in their order (Gram-Schmidt), each on its own side. Raises BaseModelError."""
    q, r = torch.linalg.qr(rows.double().mT)
    sizes = r.diagonal().abs()
    if not (rows.isfinite().all() and (sizes > 1e-6 * rows.double().norm(dim=1)).all() and sizes.all()):
        raise BaseModelError(
            f"{where}: {rows.shape[0]} directions of which some are zero, not finite, or in the span of others\n"
            f"  give sides that differ there, or a smaller rank"
        )
    return (q * r.diagonal().sign()).mT


def geometric_median(x: Float[Tensor, "n d"]) -> Float[Tensor, "d"]:
    """The point with the least sum of distances, float64 (Weiszfeld's iteration, started at the mean)."""
    x = x.double()
    at = x.mean(0)
    for _ in range(WEISZFELD_STEPS):
        weights = 1 / (x - at).norm(dim=1).clamp_min(1e-12)
        new = (weights[:, None] * x).sum(0) / weights.sum()
        done = (new - at).norm() <= WEISZFELD_TOLERANCE * (1 + new.norm())
        at = new
        if done:
            break
    return at


# ---- which direction, and how much of it, at which layer ----------------------------------------


class Kernel(NamedTuple):
    """Weight over depth: the greatest at one block (a fraction lies between two), linear to the least at some blocks'
    distance from there, zero beyond."""

    max_weight: float
    max_weight_position: float
    min_weight: float
    min_weight_distance: float

    def at(self, block: int) -> float:
        d = abs(block - self.max_weight_position)
        if d > self.min_weight_distance:
            return 0.0
        return self.max_weight + d / self.min_weight_distance * (self.min_weight - self.max_weight)


@dataclass(frozen=True, kw_only=True)
class DirectionConfig(BaseConfig):
    """Directions of the residual stream, and where they act.

    strength    λ, or its counterpart, before the kernels
    rank        k, how many directions
    layer       whose directions: None each block's own; 18 those of block 18, everywhere; 18.5 between two blocks'. A
                block has directions if one of its layers is a target
    kernels     {regex: Kernel}, or pairs: the weight over depth of the layers whose path the regex is found in. A file
                may bring it, so it must be one that is searched in no time (`config.is_tame`)
    center, winsorize, projected    as in `contrast`
    """

    strength: float = 1.0
    rank: int = 1
    layer: int | float | None = None
    kernels: Any = ()
    center: Center | str = Center.MEAN
    winsorize: float | None = None
    projected: bool = False
    SHARED: ClassVar[tuple[str, ...]] = (*BaseConfig.SHARED, "rank", "center", "winsorize", "projected")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(is_number(self.strength), "strength", "a finite number")
        self._require(type(self.rank) is int and self.rank > 0, "rank", "a number of directions, at least 1")
        self._require(self.layer is None or (is_number(self.layer) and self.layer >= 0), "layer", "a depth, or None")
        self._require(_is_quantile(self.winsorize), "winsorize", "a quantile above 0, at most 1, or None")
        self._require(isinstance(self.projected, bool), "projected", "True or False")
        pairs = self.kernels.items() if isinstance(self.kernels, Mapping) else self.kernels
        try:
            kernels = tuple((pattern, Kernel(*map(float, kernel))) for pattern, kernel in pairs)
            ok = all(all(map(math.isfinite, kernel)) and kernel[3] > 0 for _, kernel in kernels)
            ok = ok and len(kernels) <= MOST_KERNELS and all(is_tame(pattern) for pattern, _ in kernels)
        except (TypeError, ValueError, OverflowError):
            kernels, ok = (), False
        wanted = "{regex: Kernel(four finite numbers, the distance above 0)}, with three groups and repetitions at most"
        self._require(ok, "kernels", wanted)
        object.__setattr__(self, "kernels", kernels)


def fit(model: nn.Module, targets: Mapping[str, Layer], cfg: DirectionConfig, calibration_data: Any) -> None:
    """Each layer's own directions into its `lora_own`: out of two sides of prompts, or as given.

    The data is {"positive": batches, "negative": batches}, or {"directions": given}: a tensor (d,) or (k, d) for all
    layers, (n_blocks, k, d) by block, or {path of a layer or of its block: (d,) or (k, d)}. Raises ConfigError.
    """
    if isinstance(calibration_data, Mapping) and set(calibration_data) == {"directions"}:
        given = calibration_data["directions"]
    else:
        around = {f"{layer.block[0]}{layer.block[1]}": None for layer in targets.values() if layer.block}
        sides = contrast(
            model,
            calibration_data,
            list(around),
            rank=cfg.rank,
            center=cfg.center,
            winsorize=cfg.winsorize,
            projected=cfg.projected,
        )
        given = {path: side.directions for path, side in sides.items()}
    for layer in targets.values():
        layer.lora_own.copy_(_rows_for(layer, given, cfg.rank))


def placed(layers: Mapping[str, Layer]) -> list[tuple[Layer, Float[Tensor, "k o"], float]]:
    """Each layer with the directions that act on it and their weight, by its config. Raises ConfigError."""
    own = {layer.block: layer.lora_own for layer in layers.values()}
    chosen: dict[tuple[str, float], Tensor] = {}
    out = []
    for layer in layers.values():
        rows, cfg = layer.lora_own, layer.cfg
        if cfg.layer is not None:
            at = (layer.block[0] if layer.block else "", cfg.layer)
            rows = chosen[at] if at in chosen else chosen.setdefault(at, _rows_at(cfg.layer, at[0], own))
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


def _rows_for(layer: Layer, given: Any, rank: int) -> Float[Tensor, "k o"]:
    stack, block = layer.block or ("", None)
    if isinstance(given, Mapping):
        rows = given.get(layer.path, given.get(f"{stack}{block}"))
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
    return orthonormal(rows.detach().reshape(rank, -1), layer.path)


def _rows_at(depth: int | float, stack: str, own: Mapping[tuple[str, int] | None, Tensor]) -> Float[Tensor, "k o"]:
    """The directions of one block of a stack; at a depth between two blocks, those between theirs."""
    low, high = math.floor(depth), math.ceil(depth)
    a, b = own.get((stack, low)), own.get((stack, high))
    if a is None or b is None:
        held = sorted(key[1] for key in own if key is not None and key[0] == stack)
        raise ConfigError(
            f"layer={depth}: no direction is kept for it\n"
            f"  blocks with one: {held or 'none'}; target that block too, a kernel can give it no weight"
        )
    if low == high:
        return a
    b = b * (a * b).sum(1, keepdim=True).sign()  # of a principal direction the sign means nothing
    return orthonormal((1 - (depth - low)) * a + (depth - low) * b, f"layer={depth}").to(a.dtype)
