"""contrast: the directions of the residual stream in which two sets of prompts differ."""

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.validate import is_number
from ..errors import BaseModelError, ConfigError
from .batches import Positions, check_sides
from .capture import Statistics, capture


class Center(enum.StrEnum):
    """The centre of a side: the mean, or the geometric median, which a few unusual prompts move little."""

    MEAN, MEDIAN = "mean", "median"


class Method(enum.StrEnum):
    """The way to find a direction between two sides: see `contrast`."""

    DIFFERENCE, PCA, PROBE = "difference", "pca", "probe"


ROUNDING = 1e-5  # a difference of two centres below this fraction of their size is float32's rounding
WEISZFELD_STEPS, WEISZFELD_TOLERANCE = 200, 1e-10
PROBE_STEPS = 1000


@dataclass(frozen=True)
class Contrast:
    """The difference of two sides at one block: orthonormal directions (k, d) float32, the centres (d,) float64 of the
    sides, and the length of the vectors of both, the root of their mean square."""

    directions: Float[Tensor, "k d"]
    positive: Float[Tensor, "d"]
    negative: Float[Tensor, "d"]
    length: float

    @property
    def step(self) -> Float[Tensor, "d"]:
        """The first direction, as far as the positive centre lies from the negative one along it."""
        first = self.directions[0].double()
        return first * (first @ (self.positive - self.negative))


def contrast(
    model: nn.Module,
    data: Any,
    where: Iterable[str] | None = None,
    *,
    rank: int = 1,
    method: str = "difference",
    center: str = "mean",
    winsorize: float | None = None,
    projected: bool = False,
    what: str = "residual",
    positions: Positions = "last",
    progress: bool = True,
) -> dict[str, Contrast]:
    """The directions of the residual stream in which two sets of prompts differ, by the path of the block.

    data        {"positive": batches, "negative": batches}, as `capture` takes them, that can be gone through again
    rank        the first direction is the difference of centres (Arditi et al. 2024, arXiv:2406.11717, section 2.3);
                further ones are the leading principal directions, orthogonal to it, of the differences of the pairs:
                then both sides are the same prompts in the same order, as one asks for each side's manner
    method      how the first direction is found: "difference" of the centres; "pca", the leading principal direction
                of the differences of the pairs, about 0 (Zou et al. 2023, arXiv:2310.01405, section 3.1, with each pair
                in both orders); "probe", the normal of a logistic regression between the sides (Li et al. 2023,
                arXiv:2306.03341, section 3.1), which needs the extra probe. The last two are turned towards the
                positive side, and are of rank 1
    where       paths of blocks; None for all
    what        "residual", or "output" for the outputs of the modules at `where`, whatever they are
    center      "mean" or "median", the geometric one; for the method "difference"
    winsorize   q: each prompt's vector is clamped to ± the q-quantile of its own components' sizes (the axis is the
                component axis), which tames the few huge components that language models have. None: not clamped
    projected   take the negative side's centre out of the directions, so that ablating spares what both sides share

    Raises:
        ConfigError: for bad arguments, an iterator, or a side that is missing, empty or too small.
        BaseModelError: where both sides have the same centre, or too few independent directions.
        And all that `capture` raises.
    """
    check_sides(data)
    _check_options(rank, method, center, winsorize)
    options: dict[str, Any] = {"where": where, "what": what, "positions": positions, "progress": progress}
    is_plain = center == "mean" and rank == 1 and method == "difference"  # so no vector has to be kept
    options["reduce"] = "std" if is_plain else ("std", "samples")
    options["transform"] = None if winsorize is None else partial(_clamped, quantile=winsorize)
    sides = {side: capture(model, data[side], **options) for side in ("positive", "negative")}
    return contrast_of(sides, rank=rank, method=method, center=center, projected=projected)


def contrast_of(
    captured: Mapping[str, Mapping[str, Statistics]],
    *,
    rank: int = 1,
    method: str = "difference",
    center: str = "mean",
    projected: bool = False,
) -> dict[str, Contrast]:
    """`contrast` of two sides that were captured already: {"positive": {path: Statistics}, "negative": ...}, with "std"
    and, but for the difference of means, "samples".

    Raises:
        ConfigError, BaseModelError: as `contrast`.
    """
    _check_options(rank, method, center, None)
    _check_counts(captured, rank, method)
    contrasts = {}
    for path, positive in captured["positive"].items():
        sides = (positive, captured["negative"][path])
        p, n = (side.mean if center == "mean" else geometric_median(side.kept_samples()) for side in sides)  # (d,)
        if (p - n).norm() <= ROUNDING * max(p.norm(), n.norm()):
            raise BaseModelError(f"{path}: both sides have the same centre, so no direction\n  give sides that differ")
        directions = _directions(method, rank, *sides, p - n)  # (k, d)
        if projected:
            directions = directions - (directions @ n)[:, None] * n / n.square().sum()
        contrasts[path] = Contrast(orthonormal(directions, path).float(), p, n, _root_mean_square(*sides))
    return contrasts


def is_quantile(value: Any) -> bool:
    """Is it None, or above 0 and at most 1, as `winsorize` may be?"""
    return value is None or (is_number(value) and 0 < value <= 1)


def orthonormal(rows: Float[Tensor, "k d"], where: str) -> Float[Tensor, "k d"]:
    """The rows made orthonormal in their order (Gram-Schmidt), none of them turned round. Raises BaseModelError if one
    is zero, not finite, or in the span of those before it."""
    q, r = torch.linalg.qr(rows.double().mT)  # (d, k), (k, k)
    sizes = r.diagonal().abs()  # (k,): the part of each row that is not in the span of those before it
    if not (rows.isfinite().all() and (sizes > 1e-6 * rows.double().norm(dim=1)).all() and sizes.all()):
        raise BaseModelError(
            f"{where}: {rows.shape[0]} directions of which some are zero, not finite, or in the span of others\n"
            f"  give sides that differ there, or a smaller rank"
        )
    return (q * r.diagonal().sign()).mT  # QR is free to turn a column round; the sign turns it back


def geometric_median(x: Float[Tensor, "n d"]) -> Float[Tensor, "d"]:
    """The point with the least sum of distances, float64 (Weiszfeld's iteration, started at the mean)."""
    x = x.double()
    median = x.mean(0)
    for _ in range(WEISZFELD_STEPS):
        weights = 1 / (x - median).norm(dim=1).clamp_min(1e-12)  # (n,); the iteration may land on one of the points
        previous, median = median, (weights[:, None] * x).sum(0) / weights.sum()
        if (median - previous).norm() <= WEISZFELD_TOLERANCE * (1 + median.norm()):
            break
    return median


def _check_options(rank: int, method: str, center: str, winsorize: float | None) -> None:
    if not is_quantile(winsorize):
        raise ConfigError(f"winsorize={winsorize!r}: wanted a quantile above 0, at most 1, or None")
    for field, got, choices in (("center", center, Center), ("method", method, Method)):
        if got not in list(choices):
            raise ConfigError(f"{field}={got!r}: wanted {' or '.join(repr(choice.value) for choice in choices)}")
    if method != "difference" and (rank > 1 or center != "mean"):
        raise ConfigError(f"method={method!r} finds one direction, by no centres; got rank={rank}, center={center!r}")


def _check_counts(sides: Mapping[str, Mapping[str, Statistics]], rank: int, method: str) -> None:
    """Raises ConfigError for too few vectors, or no pairs."""
    counts = {name: next(iter(side.values())).count for name, side in sides.items()}  # the same at all modules
    for name, count in counts.items():
        if count < max(2, rank):
            raise ConfigError(
                f"calibration_data[{name!r}] has {count} vectors: wanted {max(2, rank)} at least for rank {rank}\n"
                f"  one prompt gives one vector at positions='last'"
            )
    if (rank > 1 or method == "pca") and counts["positive"] != counts["negative"]:
        taken = "method 'pca'" if method == "pca" else f"rank {rank}"
        raise ConfigError(f"calibration_data has {counts} vectors: {taken} is taken of pairs, so wanted equal numbers")


def _clamped(vectors: Float[Tensor, "n d"], quantile: float) -> Float[Tensor, "n d"]:
    limits = vectors.abs().quantile(quantile, dim=1, keepdim=True)  # (n, 1)
    return vectors.clamp(-limits, limits)


def _directions(
    method: str, rank: int, positive: Statistics, negative: Statistics, difference: Float[Tensor, "d"]
) -> Float[Tensor, "k d"]:
    """The directions by a method, of any length, the first on the side of the difference of centres.

    Further ones are the leading principal directions of the pairs' differences, about their mean and orthogonal to it.
    """
    if method == "probe":
        first = _probe_normal(positive, negative)
    elif method == "pca":
        first = torch.linalg.svd(_pair_differences(positive, negative), full_matrices=False)[2][0]
    else:
        first = difference
    first = first * (first @ difference).sign()  # the sign of a principal direction means nothing
    if rank == 1:
        return first[None]
    rest = _pair_differences(positive, negative)  # (n, d)
    rest = rest - rest.mean(0)
    rest = rest - (rest @ first)[:, None] * first / first.square().sum()
    return torch.cat([first[None], torch.linalg.svd(rest, full_matrices=False)[2][: rank - 1]])


def _pair_differences(positive: Statistics, negative: Statistics) -> Float[Tensor, "n d"]:
    return positive.kept_samples().double() - negative.kept_samples().double()


def _probe_normal(positive: Statistics, negative: Statistics) -> Float[Tensor, "d"]:
    """The normal of the plane between the sides. Raises ConfigError without scikit-learn."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as error:
        raise ConfigError("method='probe' needs scikit-learn\n  pip install 'lora-lite[probe]'") from error
    sides = [positive.kept_samples().double().cpu(), negative.kept_samples().double().cpu()]
    x = torch.cat(sides)  # (n, d)
    x = (x - x.mean(0)) / x.std(0).norm()  # one scale for all components: the normal is to be one of the stream itself
    labels = [1] * len(sides[0]) + [0] * len(sides[1])
    fitted = LogisticRegression(max_iter=PROBE_STEPS).fit(x.numpy(), labels)
    return torch.from_numpy(fitted.coef_[0]).to(positive.mean)


def _root_mean_square(*sides: Statistics) -> float:
    """The length of the vectors of all sides together: the root of the mean of |x|² = Σ std² + |mean|²."""
    spreads = [side.count * (side.std.square() + side.mean.square()).sum() for side in sides if side.std is not None]
    return math.sqrt(float(sum(spreads)) / sum(side.count for side in sides))
