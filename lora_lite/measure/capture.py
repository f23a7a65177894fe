"""capture: statistics of a model's activations, updated batch by batch, so that no activation has to be kept."""

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
    """Statistics of the vectors (n, d) seen at one module. Those that were not asked for are None.

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
        """The samples (n, d), in the order seen.

        Raises:
            ConfigError: unless "samples" was asked for.
        """
        if self.samples is None:
            raise ConfigError('no samples were kept\n  use capture(..., reduce=("samples",))')
        return self.samples

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """The covariance (d, d) of the population, in the square of the activations' unit.

        Raises:
            ConfigError: unless "second_moment" was asked for.
        """
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
    """Run the batches through the model, and reduce the activations at some modules as they pass.

    batches     each a mapping of the model's arguments (input_ids (b, t), attention_mask, ...) or a tensor of ids
    where       paths of modules; a config, for the layers that it targets; None for all blocks
    what        "input" of the module (its first argument), "output", or "residual": the stream as it leaves the block
                that the module is, or is in. From hooks on blocks: transformers' last hidden state is after the norm
    positions   "last": the last token of each row that attention_mask keeps, with padding on either side; "all" that
                it keeps; or a mask (b, t), true where to look, or a function of the batch that gives one
    reduce      any of "mean", "std", "second_moment" (d² numbers a module) and "samples"; the mean is always there
    transform   (n, d) float32 -> (n, k), applied to the vectors before they are reduced; or a mapping with one for
                the path of each module that is looked at
    max_bytes   limit of the samples of all modules together
    progress    show a bar, where tqdm is installed (it comes with the extra hf)

    Only one batch of activations is in memory at a time, unless samples are asked for. Sums are float64, about the
    running mean (Chan et al. 1983). The model runs in eval mode without gradients; mode, hooks, the RNG and the layout
    of 4-bit weights are afterwards as they were, after an error too. If the model is sharded over processes, each must
    call this, and gets the statistics of its own batches.

    Returns {path: Statistics}.

    Raises:
        ConfigError: for bad arguments, no batches, no tokens, or samples over max_bytes.
        TargetError: for an unknown path, or a module that sees other tokens than the model, or that never runs.
        BaseModelError: for an activation that is NaN or infinite.
    """
    reductions = {reduce} if isinstance(reduce, str) else set(reduce)
    for name, got, wanted in (("reduce", reductions, REDUCTIONS), ("what", {what}, KINDS)):
        if not got or not got <= set(wanted):
            raise ConfigError(f"{name}={sorted(got)}: wanted any of {wanted}")
    hooked = _hooked_paths(model, where, what)
    check_several(batches)
    sums = {path: _Sums(path, reductions) for path in hooked.values()}  # layers of one block share its sums
    transforms = transform if isinstance(transform, Mapping) else dict.fromkeys(sums, transform)
    if transforms.keys() != sums.keys():
        raise ConfigError(
            f"transform: got some for {brief(sorted(transforms))}; wanted one for each of {brief(sorted(sums))}"
        )
    with still(model), ExitStack() as hooks:
        reader = _Reader(sums, transforms, max_bytes)
        modules = dict(model.named_modules())
        for path in sums:
            hooks.callback(reader.hook(modules[path], path, before=what == "input").remove)
        for batch in with_progress(batches, progress, "calibration"):
            inputs = as_inputs(batch, model)
            reader.mask = select(inputs, positions)
            model(**inputs)
            reader.check_all_seen()
    statistics = {path: running.statistics() for path, running in sums.items()}
    return {path: statistics[module_path] for path, module_path in hooked.items()}


def _hooked_paths(model: nn.Module, where: BaseConfig | Iterable[str] | None, what: str) -> dict[str, str]:
    """{path asked for: path of the module to hook}. Raises TargetError for an unknown path, or one outside blocks."""
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
    # the dot keeps layers.1 from being taken for the block of layers.10
    blocks = {path: next((block for block in stack if f"{path}.".startswith(f"{block}.")), None) for path in paths}
    outside = [path for path, block in blocks.items() if block is None]
    if outside:
        raise TargetError(
            f"what='residual': {outside[0]} is in no block of this {type(model).__name__}\n"
            f"  ask for its input or output, or for a block"
        )
    return {path: block for path, block in blocks.items() if block is not None}


@dataclass
class _Reader:
    """The state that the hooks share: the positions of the running batch, and the modules that it has reached."""

    sums: dict[str, "_Sums"]
    transforms: Mapping[str, Transform | None]
    max_bytes: int
    sample_bytes: int = 0
    mask: Tensor = field(default_factory=lambda: torch.ones(1, 1, dtype=torch.bool))
    seen: set[str] = field(default_factory=set)

    def hook(self, module: nn.Module, path: str, before: bool) -> Any:
        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.read(path, args[0] if args else next(iter(kwargs.values())))

        def on_output(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            self.read(path, y if isinstance(y, Tensor) else y[0])  # a tuple: the activations come first

        if before:
            return module.register_forward_pre_hook(on_input, with_kwargs=True)
        return module.register_forward_hook(on_output)

    def read(self, path: str, x: Tensor) -> None:
        b, t = self.mask.shape
        if x.shape[:2] != (b, t) and x.shape[0] != b * t:  # (b, t, d), or (b t, d) as fused experts see it
            raise TargetError(
                f"{path}: it sees activations {tuple(x.shape)}, not one for each of the {b} x {t} tokens\n"
                f"  capture its block, or the layer before a router"
            )
        vectors = x.reshape(b, t, -1)[self.mask.to(x.device)].float()  # (n, d)
        transform, sums = self.transforms[path], self.sums[path]
        sums.add(vectors if transform is None else transform(vectors))
        self.sample_bytes += sums.samples[-1].nbytes if sums.samples else 0
        if self.sample_bytes > self.max_bytes:
            raise ConfigError(
                f"samples need more than max_bytes={self.max_bytes:,}\n"
                f"  give fewer batches or places, another reduction, or a larger max_bytes"
            )
        self.seen.add(path)

    def check_all_seen(self) -> None:
        missed = self.sums.keys() - self.seen
        if missed:
            raise TargetError(
                f"{sorted(missed)[0]}: the model's forward never called it, so it has no activations\n"
                f"  leave it out of what is captured"
            )
        self.seen.clear()  # each batch is checked by itself: a router may skip a module in one


class _Sums:
    """Running count, mean and sums of squares about the mean, at one module.

    A batch of n vectors with mean m joins N vectors with mean M by Chan et al. 1983: with δ = m - M, the mean becomes
    M + δ n/(N + n), and the sums of squares add up, plus δ² N n/(N + n). Σx² - (Σx)²/n would lose digits.
    """

    def __init__(self, path: str, reductions: set[str]) -> None:
        self.path, self.reductions, self.count = path, reductions, 0
        self.mean = self.squares = self.scatter = torch.zeros((), dtype=torch.float64)  # grow to (d,), (d,), (d, d)
        self.samples: list[Tensor] = []

    def add(self, vectors: Float[Tensor, "n d"]) -> None:
        x = vectors.double()  # (n, d)
        if not x.isfinite().all():
            raise BaseModelError(f"{self.path}: an activation is NaN or infinite\n  try another dtype for the base")
        n, mean = x.shape[0], x.mean(0)
        delta, total = mean - self.mean.to(x.device), self.count + n  # (d,), N + n
        weight = self.count * n / total
        if "std" in self.reductions:
            self.squares = self.squares.to(x.device) + (x - mean).square().sum(0) + weight * delta.square()
        if "second_moment" in self.reductions:
            centred = x - mean  # (n, d)
            self.scatter = self.scatter.to(x.device) + centred.mT @ centred + weight * delta[:, None] * delta
        if "samples" in self.reductions:
            self.samples.append(vectors)
        self.mean = self.mean.to(x.device) + delta * (n / total)
        self.count = total

    def statistics(self) -> Statistics:
        if not self.count:
            raise ConfigError("there are no batches to calibrate on\n  a generator gives its batches only once")
        statistics = Statistics(self.count, self.mean)
        if "std" in self.reductions:
            statistics.std = (self.squares / self.count).sqrt()
        if "second_moment" in self.reductions:
            statistics.second_moment = self.scatter / self.count + self.mean[:, None] * self.mean
        if "samples" in self.reductions:
            statistics.samples = torch.cat(self.samples)
        return statistics
