"""The directions of the residual stream in which two sets of prompts differ."""

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.validate import is_number
from ..errors import BaseModelError, ConfigError
from .batches import Positions, check_sides
from .capture import Statistics, capture


class Center(enum.StrEnum):
    """The mean, or the geometric median, which a few odd prompts move little."""

    MEAN, MEDIAN = "mean", "median"


class Method(enum.StrEnum):
    """How a direction is found between two sides: see `contrast`."""

    DIFFERENCE, PCA, PROBE = "difference", "pca", "probe"


SAME = 1e-5
"""Of a centre's size: a difference below it is float32's rounding."""
WEISZFELD_STEPS, WEISZFELD_TOLERANCE = 200, 1e-10
PROBE_STEPS = 1000


@dataclass(frozen=True)
class Contrast:
    """At one block: orthonormal directions (k, d) float32, the centres (d,) float64 of the two sides, and how long the
    vectors of both are, the root of their mean square."""

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
    method      of the first direction. "difference" of the centres; "pca", the leading principal direction of the
                differences of the pairs, about 0 (Zou et al. 2023, arXiv:2310.01405, section 3.1, with each pair in
                both orders); "probe", the normal of a logistic regression between the sides (Li et al. 2023,
                arXiv:2306.03341, section 3.1), which needs the extra probe. The last two are turned towards the
                positive side, and are of rank 1
    where       paths of blocks; None for all
    what        "residual", or "output" for what the modules at `where` put out, whatever they are
    center      "mean" or "median", the geometric one; of the "difference"
    winsorize   q: each prompt's vector is clamped to ± the q-quantile of its own components' sizes (the axis is the
                component axis), which tames the few huge components that language models have. None: not clamped
    projected   take the negative side's centre out of the directions, so that ablating spares what both sides share

    Raises ConfigError for a missing, empty or too small side, or an iterator, and what `capture` raises.
    """
    check_sides(data)
    if not is_quantile(winsorize):
        raise ConfigError(f"winsorize={winsorize!r}: wanted a quantile above 0, at most 1, or None")
    for field, got, choices in (("center", center, Center), ("method", method, Method)):
        if got not in list(choices):
            raise ConfigError(f"{field}={got!r}: wanted {' or '.join(repr(choice.value) for choice in choices)}")
    if method != "difference" and (rank > 1 or center != "mean"):
        raise ConfigError(f"method={method!r} finds one direction, by no centres; got rank={rank}, center={center!r}")
    wanted = max(2, rank)

    def clamped(vectors: Tensor) -> Tensor:
        limit = vectors.abs().quantile(winsorize or 1.0, dim=1, keepdim=True)
        return vectors.clamp(-limit, limit)

    sides = {}
    for side in ("positive", "negative"):
        seen = capture(
            model,
            data[side],
            where,
            what=what,
            positions=positions,
            reduce=("samples",) if center == "median" or rank > 1 or method != "difference" else ("std",),
            transform=None if winsorize is None else clamped,
            progress=progress,
        )
        count = next(iter(seen.values())).count
        if count < wanted:
            raise ConfigError(
                f"calibration_data[{side!r}] has {count} vectors: wanted {wanted} at least for rank {rank}\n"
                f"  one prompt gives one vector at positions='last'"
            )
        sides[side] = seen
    counts = {side: next(iter(seen.values())).count for side, seen in sides.items()}
    if (rank > 1 or method == "pca") and len(set(counts.values())) > 1:
        taken = "method 'pca'" if method == "pca" else f"rank {rank}"
        raise ConfigError(f"calibration_data has {counts} vectors: {taken} is taken of pairs, so wanted equal numbers")
    out = {}
    for path, here in sides["positive"].items():
        there = sides["negative"][path]
        p, n = (each.mean if center == "mean" else geometric_median(each.kept_samples()) for each in (here, there))
        if (p - n).norm() <= SAME * max(p.norm(), n.norm()):
            raise BaseModelError(f"{path}: both sides have the same centre, so no direction\n  give sides that differ")
        directions = [p - n]
        if method != "difference":
            found = _principal(here, there) if method == "pca" else _probe(here, there)
            directions = [found * (found @ (p - n)).sign()]
        if rank > 1:
            rest = here.kept_samples().double() - there.kept_samples().double()
            rest = rest - rest.mean(0)
            rest = rest - (rest @ directions[0])[:, None] * directions[0] / directions[0].square().sum()
            directions += list(torch.linalg.svd(rest, full_matrices=False)[2][: rank - 1])
        found = torch.stack(directions)
        if projected:
            found = found - (found @ n)[:, None] * n / n.square().sum()
        out[path] = Contrast(orthonormal(found, path).float(), p, n, _length(here, there))
    return out


def _principal(positive: Statistics, negative: Statistics) -> Float[Tensor, "d"]:
    pairs = positive.kept_samples().double() - negative.kept_samples().double()
    first: Tensor = torch.linalg.svd(pairs, full_matrices=False)[2][0]
    return first


def _probe(positive: Statistics, negative: Statistics) -> Float[Tensor, "d"]:
    """The normal of the plane between the sides, at one scale for all components: it is one of the residual stream."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as error:
        raise ConfigError("method='probe' needs scikit-learn\n  pip install 'lora-lite[probe]'") from error
    sides = [positive.kept_samples().double().cpu(), negative.kept_samples().double().cpu()]
    x = torch.cat(sides)
    x = (x - x.mean(0)) / x.std(0).norm()
    labels = [1] * len(sides[0]) + [0] * len(sides[1])
    fitted = LogisticRegression(max_iter=PROBE_STEPS).fit(x.numpy(), labels)
    return torch.from_numpy(fitted.coef_[0]).to(positive.mean)


def _length(*sides: Statistics) -> float:
    squares = 0.0
    for side in sides:
        if side.std is None:
            squares += float(side.kept_samples().double().square().sum())
        else:
            squares += side.count * float(side.std.square().sum() + side.mean.square().sum())
    return math.sqrt(squares / sum(side.count for side in sides))


def is_quantile(value: Any) -> bool:
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
