"""The directions of the residual stream in which two sets of prompts differ."""

import enum
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from loguru import logger
from torch import Tensor, nn

from .calibrate import Positions, Statistics, capture
from .config import BaseConfig, is_number, is_tame
from .errors import BaseModelError, ConfigError
from .layer import Layer


T = TypeVar("T")


class Center(enum.StrEnum):
    """The mean, or the geometric median, which a few odd prompts move little."""

    MEAN, MEDIAN = "mean", "median"


class Method(enum.StrEnum):
    """How a direction is found between two sides: see `contrast`."""

    DIFFERENCE, PCA, PROBE = "difference", "pca", "probe"


SAME = 1e-5
"""Of a centre's size: a difference below it is float32's rounding."""
WEISZFELD_STEPS, WEISZFELD_TOLERANCE = 200, 1e-10
MOST_KERNELS = 100
PROBE_STEPS = 1000
REACH = 0.1
"""Of a vector: how far off a block's output may move when it is added to what a layer of the block writes."""


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
    if not _is_quantile(winsorize):
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


def _is_quantile(value: Any) -> bool:
    return value is None or (is_number(value) and 0 < value <= 1)


def check_sides(data: Any) -> None:
    """ConfigError unless data has two sides that can be gone through again."""
    if not isinstance(data, Mapping) or set(data) != {"positive", "negative"}:
        got = sorted(data) if isinstance(data, Mapping) else type(data).__name__
        raise ConfigError(f'calibration_data: got {got}; wanted {{"positive": batches, "negative": batches}}')
    for side, batches in data.items():
        if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
            raise ConfigError(f"calibration_data[{side!r}] is a {type(batches).__name__}: wanted a list of batches")
        if iter(batches) is batches:
            raise ConfigError(
                f"calibration_data[{side!r}] is an iterator, which can be read once: what a call that fails has read "
                f"of it would be lost\n  use list(...)"
            )


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
    layer       whose directions: None each block's own; 18 those of block 18, everywhere; 18.5 between two blocks'. A
                block has directions if one of its layers is a target
    kernels     {regex: Kernel}, or pairs: the weight over depth of the layers whose path the regex is found in. A file
                may bring it, so it must be one that is searched in no time (`config.is_tame`)
    center, winsorize, projected    as in `contrast`
    """

    strength: float = 1.0
    layer: int | float | None = None
    kernels: Any = ()
    center: Center | str = Center.MEAN
    winsorize: float | None = None
    projected: bool = False
    SHARED: ClassVar[tuple[str, ...]] = (*BaseConfig.SHARED, "center", "winsorize", "projected")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(is_number(self.strength), "strength", "a finite number")
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
        wanted = "{regex: Kernel(four finite numbers, the distance above 0)}, with three repetitions at most"
        self._require(ok, "kernels", wanted)
        object.__setattr__(self, "kernels", kernels)


@dataclass(frozen=True, kw_only=True)
class SubspaceConfig(DirectionConfig):
    """rank: k, how many directions."""

    rank: int = 1
    SHARED: ClassVar[tuple[str, ...]] = (*DirectionConfig.SHARED, "rank")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(type(self.rank) is int and self.rank > 0, "rank", "a number of directions, at least 1")


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
    options = {"center": cfg.center, "winsorize": cfg.winsorize, "projected": cfg.projected}
    return contrast(model, data, where, what=what, **options, **how)


def at_layer(layer: Layer, found: Mapping[str, T]) -> T | None:
    """What is found for a layer, by its own path or that of its block."""
    stack, block = layer.block or ("", None)
    return found.get(layer.path, found.get(f"{stack}{block}"))


def rows_for(layer: Layer, given: Any, rank: int) -> Float[Tensor, "k o"]:
    """A layer's own of what is given: a tensor (d,) or (k, d) for all layers, (n_blocks, k, d) by block, or {path of a
    layer or of its block: (d,) or (k, d)}. Raises ConfigError."""
    block = layer.block[1] if layer.block else None
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
    """Each layer with what acts on it, its own `lora_own` or another's, and its weight, by its config; `between(a, b, t)`
    is what lies between two blocks'. Raises ConfigError."""
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
