"""capture: statistics of a model's activations, updated batch by batch, so that no activation has to be kept."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..base.split import shows_part
from ..base.stacks import find_stacks
from ..base.still import still
from ..core.config import BaseConfig
from ..core.targets import select as select_targets
from ..errors import BaseModelError, ConfigError, TargetError, brief
from .batches import Positions, inputs_of, select

Transform = Callable[[Tensor], Tensor]

REDUCTIONS = ("mean", "std", "second_moment", "samples")
KINDS = ("input", "output", "residual")


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
    max_bytes: int = 1 << 30,
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
    for name, values, choices in (("reduce", reductions, REDUCTIONS), ("what", {what}, KINDS)):
        if not values or not values <= set(choices):
            raise ConfigError(f"{name}={sorted(values)}: wanted any of {choices}")
    hooked = _hooked_paths(model, where, what)
    modules = set(hooked.values())  # layers of one block share its sums
    transforms = transform if isinstance(transform, Mapping) else dict.fromkeys(modules, transform)
    if transforms.keys() != modules:
        got, wanted = brief(sorted(transforms)), brief(sorted(modules))
        raise ConfigError(f"transform: got some for {got}; wanted one for each of {wanted}")
    sums = {path: _Sums(path, reductions, function) for path, function in transforms.items()}
    reader = _Reader(max_bytes)
    with still(model), ExitStack() as hooks:
        for path in modules:
            hooks.enter_context(reader.hook(model.get_submodule(path), sums[path], before=what == "input"))
        for inputs in inputs_of(model, batches, progress, "calibrate"):
            reader.mask = select(inputs, positions)
            model(**inputs)
            if missed := modules - reader.seen:
                raise TargetError(
                    f"{min(missed)}: the model's forward never called it, so it has no activations\n"
                    f"  leave it out of what is captured"
                )
            reader.seen.clear()  # each batch is checked by itself: a router may skip a module in one
    statistics = {path: running.statistics() for path, running in sums.items()}
    return {path: statistics[module_path] for path, module_path in hooked.items()}


def _hooked_paths(model: nn.Module, where: BaseConfig | Iterable[str] | None, what: str) -> dict[str, str]:
    """{path asked for: path of the module to hook}. Raises TargetError for an unknown path, or one outside blocks."""
    modules = dict(model.named_modules())
    stacks = find_stacks(modules)
    blocks = list(stacks.blocks(modules))
    if where is None:
        paths = blocks
    elif isinstance(where, BaseConfig):
        paths = [target.path for target in select_targets(model, where).targets]
    else:
        paths = [where] if isinstance(where, str) else list(where)
    unknown = sorted(set(paths) - modules.keys())
    if unknown or not paths:
        raise TargetError(
            f"nowhere to look in this {type(model).__name__}: {', '.join(unknown) or 'no block, no path'}\n"
            f"  its blocks are {', '.join(blocks[:2]) or 'none'}...; any module's path will do"
        )
    if what != "residual":
        if parts := [path for path in paths if shows_part(modules[path], what == "input")]:
            problem = f"{parts[0]}: tensor parallelism has parted it: each process sees a part of its {what}, if any"
            raise TargetError(f"{problem}\n  capture a block's residual, or load the model without tp_plan")
        return {path: path for path in paths}
    hooked = {}
    for path in paths:
        stack, index = stacks.place(path)
        hooked[path] = f"{stack}{index}"
        if stack is None:
            raise TargetError(
                f"what='residual': {path} is in no block of this {type(model).__name__}\n"
                f"  ask for its input or output, or for a block"
            )
    return hooked


class _Sums:
    """Running count, mean and sums of squares about the mean, at one module.

    A batch of n vectors with mean m joins N vectors with mean M by Chan et al. 1983: with δ = m - M, the mean becomes
    M + δ n/(N + n), and the sums of squares add up, plus δ² N n/(N + n). Σx² - (Σx)²/n would lose digits.
    """

    def __init__(self, path: str, reductions: set[str], transform: Transform | None) -> None:
        self.path, self.reductions, self.transform = path, reductions, transform
        self.count = 0
        self.mean: Any = 0.0  # grows to (d,), and so do the sums: (d,), (d, d)
        self.squares: Any = 0.0
        self.scatter: Any = 0.0
        self.samples: list[Tensor] = []

    def add(self, vectors: Float[Tensor, "n i"]) -> int:
        """Returns the bytes of the samples that are kept of these."""
        vectors = vectors if self.transform is None else self.transform(vectors)  # (n, d)
        x = vectors.double()
        if not x.isfinite().all():
            raise BaseModelError(f"{self.path}: an activation is NaN or infinite\n  try another dtype for the base")
        n, mean = len(x), x.mean(0)
        centred, delta, total = x - mean, mean - self.mean, self.count + n  # (n, d), (d,), N + n
        weight = self.count * n / total
        if "std" in self.reductions:
            self.squares += centred.square().sum(0) + weight * delta.square()
        if "second_moment" in self.reductions:
            self.scatter += centred.mT @ centred + weight * delta[:, None] * delta
        self.mean += delta * (n / total)
        self.count = total
        if "samples" not in self.reductions:
            return 0
        self.samples.append(vectors)
        return vectors.nbytes

    def statistics(self) -> Statistics:
        mean, n = self.mean, self.count
        std = (self.squares / n).sqrt() if "std" in self.reductions else None
        second_moment = self.scatter / n + mean[:, None] * mean if "second_moment" in self.reductions else None
        return Statistics(n, mean, std, second_moment, torch.cat(self.samples) if self.samples else None)


@dataclass
class _Reader:
    """The state that the hooks share: the positions of the running batch, and the modules that it has reached."""

    max_bytes: int
    sample_bytes: int = 0
    mask: Any = None  # (b, t)
    seen: set[str] = field(default_factory=set)

    def hook(self, module: nn.Module, sums: _Sums, before: bool) -> RemovableHandle:
        """Read the module's first argument, whether it has a name or not, or its output, of a tuple the first."""
        if before:
            return module.register_forward_pre_hook(
                lambda _, args, kwargs: self.read(sums, (*args, *kwargs.values())[0]), with_kwargs=True
            )
        return module.register_forward_hook(lambda _, args, y: self.read(sums, y if isinstance(y, Tensor) else y[0]))

    def read(self, sums: _Sums, x: Tensor) -> None:
        b, t = self.mask.shape
        if x.shape[:2] != (b, t) and x.shape[0] != b * t:  # (b, t, d), or (b t, d) as fused experts see it
            raise TargetError(
                f"{sums.path}: it sees activations {tuple(x.shape)}, not one for each of the {b} x {t} tokens\n"
                f"  capture its block, or the layer before a router"
            )
        self.sample_bytes += sums.add(x.reshape(b, t, -1)[self.mask.to(x.device)].float())
        if self.sample_bytes > self.max_bytes:
            raise ConfigError(
                f"samples need more than max_bytes={self.max_bytes:,}\n"
                f"  give fewer batches or places, another reduction, or a larger max_bytes"
            )
        self.seen.add(sums.path)
