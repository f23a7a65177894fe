"""What a model's activations are on given inputs, as statistics that are kept up batch by batch."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..base.stacks import find_stacks
from ..base.still import still
from ..core.config import BaseConfig
from ..core.targets import find_targets
from ..errors import BaseModelError, ConfigError, TargetError, brief
from .batches import Positions, as_inputs, check_several, select, with_progress

Transform = Callable[[Tensor], Tensor]

REDUCTIONS = ("mean", "std", "second_moment", "samples")
KINDS = ("input", "output", "residual")
MAX_BYTES = 1 << 30


@dataclass
class Statistics:
    """Of the vectors (n, d) seen at one place. What was not asked for is None.

    count           n
    mean            (d,) float64
    std             (d,) float64, of the population: the root of the mean squared distance from the mean
    second_moment   (d, d) float64, the mean of x xᵀ; `covariance` is that of x - mean
    samples         (n, d) float32, in the order of the batches
    """

    count: int
    mean: Float[Tensor, "d"]
    std: Float[Tensor, "d"] | None = None
    second_moment: Float[Tensor, "d d"] | None = None
    samples: Float[Tensor, "n d"] | None = None

    def kept_samples(self) -> Float[Tensor, "n d"]:
        """The samples. Raises ConfigError unless they were asked for."""
        if self.samples is None:
            raise ConfigError('no samples were kept\n  use capture(..., reduce=("samples",))')
        return self.samples

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Raises ConfigError unless "second_moment" was asked for."""
        if self.second_moment is None:
            raise ConfigError('no second moment was kept\n  use capture(..., reduce=("second_moment",))')
        return self.second_moment - self.mean[:, None] * self.mean


def capture(
    model: nn.Module,
    batches: Iterable[Any],
    where: BaseConfig | Iterable[str] | None = None,
    *,
    what: str = "residual",
    positions: Positions = "last",
    reduce: str | Iterable[str] = ("mean",),
    transform: Transform | Mapping[str, Transform] | None = None,
    max_bytes: int = MAX_BYTES,
    progress: bool = True,
) -> dict[str, Statistics]:
    """Run the batches through the model and reduce the activations at some places as they pass.

    batches     each a mapping of the model's arguments (input_ids (b, t), attention_mask, ...) or a tensor of ids
    where       paths of modules; a config, for the layers that it targets; None for all blocks
    what        "input" of the module (its first argument), "output", or "residual": the stream as it leaves the block
                that the module is, or is in. From hooks on blocks: transformers' last hidden state is after the norm
    positions   "last": of each row, the last token that attention_mask keeps, with padding on either side; "all" that
                it keeps; or a mask (b, t), true where to look, or a function of the batch that gives one
    reduce      any of "mean", "std", "second_moment" (d² numbers a place) and "samples"; the mean always comes along
    transform   (n, d) float32 -> (n, k), applied to the vectors before they are reduced; or one for each path of a
                module that is looked at
    max_bytes   for the samples of all places together
    progress    show a bar, where tqdm is installed (it comes with the extra hf)

    Only one batch of activations is held at a time, unless samples are asked for. Sums are kept in float64, about the
    running mean (Chan et al. 1983). The model runs in eval mode without gradients; mode, hooks, the RNG and the layout
    of 4-bit weights are afterwards as they were, on error too. Of a model sharded over processes, every process must
    call this, and has the statistics of the batches that it gave.

    Returns {path: Statistics}. Raises ConfigError for bad arguments, no batches, no tokens or samples over max_bytes;
    TargetError for an unknown path, or a place that sees other tokens than the model; BaseModelError for NaN.
    """
    reductions = {reduce} if isinstance(reduce, str) else set(reduce)
    for name, got, wanted in (("reduce", reductions, REDUCTIONS), ("what", {what}, KINDS)):
        if not got or not got <= set(wanted):
            raise ConfigError(f"{name}={sorted(got)}: wanted any of {wanted}")
    places = _places(model, where, what)
    check_several(batches)
    budget = _Budget(max_bytes)
    sums = {path: _Sums(path, reductions, budget) for path in places.values()}
    transforms = transform if isinstance(transform, Mapping) else dict.fromkeys(sums, transform)
    if transforms.keys() != sums.keys():
        raise ConfigError(
            f"transform: got some for {brief(sorted(transforms))}; wanted one for each of {brief(sorted(sums))}"
        )
    with still(model), ExitStack() as hooks:
        reader = _Reader(sums, transforms)
        modules = dict(model.named_modules())
        for path in sums:
            hooks.callback(reader.hook(modules[path], path, before=what == "input").remove)
        for batch in with_progress(batches, progress, "calibration"):
            inputs = as_inputs(batch, model)
            reader.mask = select(inputs, positions)
            model(**inputs)
            reader.check_all_seen()
    found = {path: each.result() for path, each in sums.items()}
    return {at: found[path] for at, path in places.items()}


# ---- places and sums ----------------------------------------------------------------------------


def _places(model: nn.Module, where: BaseConfig | Iterable[str] | None, what: str) -> dict[str, str]:
    """The path asked for -> the path of the module whose input or output it is."""
    modules = dict(model.named_modules())
    stack = find_stacks(modules).blocks(modules)
    if where is None:
        paths = list(stack)
    elif isinstance(where, BaseConfig):
        paths = [target.path for target in find_targets(model, where)]
    else:
        paths = [where] if isinstance(where, str) else list(where)
    unknown = sorted(set(paths) - modules.keys())
    if unknown or not paths:
        raise TargetError(
            f"nowhere to look in this {type(model).__name__}: {', '.join(unknown) or 'no block, no path'}\n"
            f"  its blocks are {', '.join(list(stack)[:2]) or 'none'}...; any module's path will do"
        )
    if what != "residual":
        return {path: path for path in paths}
    around = {path: next((b for b in stack if f"{path}.".startswith(f"{b}.")), None) for path in paths}
    outside = [path for path, block in around.items() if block is None]
    if outside:
        raise TargetError(
            f"what='residual': {outside[0]} is in no block of this {type(model).__name__}\n"
            f"  ask for its input or output, or for a block"
        )
    return {path: block for path, block in around.items() if block is not None}


@dataclass
class _Reader:
    """The hooks' common state: where to look in the batch that is running."""

    sums: dict[str, "_Sums"]
    transforms: Mapping[str, Transform | None]
    mask: Tensor = field(default_factory=lambda: torch.ones(1, 1, dtype=torch.bool))
    seen: set[str] = field(default_factory=set)

    def hook(self, module: nn.Module, path: str, before: bool) -> Any:
        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.read(path, args[0] if args else next(iter(kwargs.values())))

        def on_output(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            self.read(path, y if isinstance(y, Tensor) else y[0])

        if before:
            return module.register_forward_pre_hook(on_input, with_kwargs=True)
        return module.register_forward_hook(on_output)

    def read(self, path: str, x: Tensor) -> None:
        b, t = self.mask.shape
        if x.shape[:2] != (b, t) and x.shape[0] != b * t:
            raise TargetError(
                f"{path}: it sees activations {tuple(x.shape)}, not one for each of the {b} x {t} tokens\n"
                f"  capture its block, or the layer before a router"
            )
        vectors = x.reshape(b, t, -1)[self.mask.to(x.device)].float()
        transform = self.transforms[path]
        self.sums[path].add(vectors if transform is None else transform(vectors))
        self.seen.add(path)

    def check_all_seen(self) -> None:
        missed = self.sums.keys() - self.seen
        if missed:
            raise TargetError(
                f"{sorted(missed)[0]}: the model's forward never called it, so it has no activations\n"
                f"  leave it out of what is captured"
            )
        self.seen.clear()


@dataclass
class _Budget:
    limit: int
    used: int = 0

    def spend(self, n: int) -> None:
        self.used += n
        if self.used > self.limit:
            raise ConfigError(
                f"samples need more than max_bytes={self.limit:,}\n"
                f"  give fewer batches or places, another reduction, or a larger max_bytes"
            )


class _Sums:
    """Count, mean and squares about the mean, merged batch by batch."""

    def __init__(self, path: str, reductions: set[str], budget: _Budget) -> None:
        self.path, self.reductions, self.budget = path, reductions, budget
        self.count = 0
        self.mean = self.squares = self.scatter = torch.zeros((), dtype=torch.float64)
        self.samples: list[Tensor] = []

    def add(self, vectors: Float[Tensor, "n d"]) -> None:
        x = vectors.double()
        if not x.isfinite().all():
            raise BaseModelError(f"{self.path}: an activation is NaN or infinite\n  try another dtype for the base")
        n, mean = x.shape[0], x.mean(0)
        delta, total = mean - self.mean.to(x.device), self.count + n
        weight = self.count * n / total
        if "std" in self.reductions:
            self.squares = self.squares.to(x.device) + (x - mean).square().sum(0) + weight * delta.square()
        if "second_moment" in self.reductions:
            centred = x - mean
            self.scatter = self.scatter.to(x.device) + centred.mT @ centred + weight * delta[:, None] * delta
        if "samples" in self.reductions:
            self.budget.spend(vectors.numel() * vectors.element_size())
            self.samples.append(vectors)
        self.mean = self.mean.to(x.device) + delta * (n / total)
        self.count = total

    def result(self) -> Statistics:
        if not self.count:
            raise ConfigError("there are no batches to calibrate on\n  a generator gives its batches only once")
        found = Statistics(self.count, self.mean)
        if "std" in self.reductions:
            found.std = (self.squares / self.count).sqrt()
        if "second_moment" in self.reductions:
            found.second_moment = self.scatter / self.count + self.mean[:, None] * self.mean
        if "samples" in self.reductions:
            found.samples = torch.cat(self.samples)
        return found
