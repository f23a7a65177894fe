"""Would these adapters train? One forward and backward tells: which layers ran, and which parameters got a gradient.

print(ll.audit(model, batch))
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..base import probe, sharding
from ..base.stacks import starred
from ..base.still import random_kept
from ..core.ran import adapted, grouped, in_graphs, trained
from ..core.state import check_unmerged, session_of, sites_of
from ..errors import TargetError
from .calls import Calls, reading, watching

WIDTH = 80
"""Columns of the table."""


@dataclass(frozen=True)
class Audited:
    """One adapted layer."""

    path: str
    ran: bool
    gradients: int
    """How many of its adapters' parameters got a gradient, be it exactly 0, as that of A is while B = 0."""
    parameters: int
    """How many are to be trained: none of a method that is computed."""


@dataclass(frozen=True)
class Audit:
    """What one forward and backward did with the adapted layers. Prints as a table."""

    model: str
    layers: tuple[Audited, ...]

    def __str__(self) -> str:
        """One row for all layers that differ in the block index only."""
        groups: dict[str, list[Audited]] = {}
        for layer in self.layers:
            groups.setdefault(starred(layer.path), []).append(layer)
        rows = [("layer", "n", "ran", "gradient"), *(_row(path, layers) for path, layers in groups.items())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))
        lines = ["  ".join([_cut(row[0], widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        ran = sum(layer.ran for layer in self.layers)
        title = f"{self.model}: {ran} of {len(self.layers)} adapted layers ran"
        return "\n".join([title, *lines])


def audit(model: nn.Module, batch: Mapping[str, Any] | Tensor) -> Audit:
    """Run one forward and backward on a batch, and see that every adapter takes part in it.

    The batch goes in as `model(**batch)`, a tensor as `model(batch)`. What is differentiated is the output's `loss`,
    or, without one, the mean square of each floating-point output. The model runs in the mode that it is in: call
    `model.train()` first to see what training does. Gradients, statistics of normalisations and random states are
    afterwards as they were. Of a model inside DistributedDataParallel or torch.compile the inner one runs.

    Raises TargetError, naming them, for layers that were never called, so that their adapters have no effect: the model
    reads the weight without calling the layer, or doesn't use it, or nothing in this batch reaches that part of it; and
    for adapter parameters without a gradient. Raises TargetError, too, where there is nothing to audit: no adapter, a
    merged one, or all at scale 0. Raises QuantizedWeightError, as attach does, where training would get wrong gradients
    or none. What the model itself raises on the batch goes through.
    """
    root, on = _at_work(model)
    _check_gradients(root, on)
    with _kept(root), watching(root, on) as calls, reading(on, calls), torch.inference_mode(False), torch.enable_grad():
        output = root(**batch) if isinstance(batch, Mapping) else root(batch)
        loss = _scalar(output)
        if loss.requires_grad:
            loss.backward()
    problems = [*bypassed(on, calls), *unused(on, calls), *unreached(on, calls), *without_gradient(on, calls)]
    if problems:
        raise TargetError(
            "\n".join([f"{type(root).__name__}: not every adapter takes part in this forward", *problems])
        )
    return Audit(type(root).__name__, tuple(_audited(path, layer, calls) for path, layer in on.items()))


@contextmanager
def watched_step(model: nn.Module) -> Iterator[None]:
    """The block is a training step, up to its backward, of a model that may be wrapped.

    Raises TargetError, in every process if there are several, for layers whose weight is read without a call and for
    parameters without a gradient. Warns of layers that this batch didn't call, which others may, and of what isn't
    known since it is compiled.
    """
    root, on = _at_work(model)
    _check_gradients(root, on)
    compiled = in_graphs(model)
    plain = {path: layer for path, layer in on.items() if id(layer) not in compiled}
    fresh = [p for p in trained({path: on[path] for path in on.keys() - plain.keys()}).items() if p[1].grad is None]
    with watching(root, plain) as calls, nullcontext() if compiled else reading(plain, calls):
        yield
    problems = [*bypassed(plain, calls), *without_gradient(plain, calls)]
    if sharding.any_process(bool(problems), next(root.parameters()).device):
        message = f"{type(root).__name__}: not every adapter takes part in the first training step"
        raise TargetError("\n".join([message, *(problems or ["  another process says which"])]))
    doubts = [*unused(plain, calls), *unreached(plain, calls)]
    if none := [key for key, parameter in fresh if parameter.grad is None]:
        doubts.append(f"  no gradient in compiled parts, after the first step: {grouped(none)}")
    if doubts:
        logger.warning(
            "\n".join([f"{type(root).__name__}: not every adapter took part in the first training step", *doubts])
        )


def _at_work(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The module that adapters were attached to, and each layer with an adapter that isn't off. Raises TargetError."""
    root, session = session_of(model)
    check_unmerged(session, "audit")
    layers = adapted(root)
    on = {path: layer for path, layer in layers.items() if any(not s.state.is_idle for s in sites_of(layer).values())}
    if not on:
        why, cure = ("every adapter is at scale 0", "set a scale") if layers else ("no adapter", "attach one")
        raise TargetError(f"nothing to audit on this {type(root).__name__}: {why}\n  {cure} first")
    return root, on


def _check_gradients(root: nn.Module, on: Mapping[str, nn.Module]) -> None:
    """As attach does, since load doesn't: what is loaded may be for inference."""
    if trained(on):
        probe.check_gradients(root, on)


def bypassed(layers: Mapping[str, nn.Module], calls: Calls) -> Iterator[str]:
    """Lines of a message on layers that were not called although their weight was read."""
    if read := (layers.keys() - calls.called) & calls.read:
        yield f"  never called, while the model reads the weight itself: {grouped(read)}"
        yield "    no adapter on them can have an effect: leave them out with exclude_names"


def unused(layers: Mapping[str, nn.Module], calls: Calls) -> Iterator[str]:
    """Lines on layers that were not called although the module around them was."""
    if never := (layers.keys() - calls.called - calls.read) & calls.reached:
        yield f"  not called in this forward, although the module around it was: {grouped(never)}"
        yield "    leave them out with exclude_names, or give a batch that calls them (an image, another expert)"


def unreached(layers: Mapping[str, nn.Module], calls: Calls) -> Iterator[str]:
    """Lines on layers in parts of the model that were not called at all."""
    never = layers.keys() - calls.called - calls.reached - calls.read
    if never:
        yield f"  not reached by this batch: {grouped(never)}"
        yield "    give a batch that takes every path (an image, another expert), or leave them out with exclude_names"


def without_gradient(layers: Mapping[str, nn.Module], calls: Calls) -> Iterator[str]:
    """Lines on parameters of layers that were called, and whose gradient is None."""
    ran = {path: layer for path, layer in layers.items() if path in calls.called}
    none = trained(ran).keys() - calls.gradients
    if none:
        yield f"  no gradient, although the layer ran: {grouped(none)}"
        yield (
            "    the loss doesn't depend on them: are the inputs of a reentrant checkpoint without gradients "
            "(model.enable_input_require_grads()), or does a part run under no_grad?"
        )


def _audited(path: str, layer: nn.Module, calls: Calls) -> Audited:
    keys = trained({path: layer}).keys()
    return Audited(path, path in calls.called, len(keys & calls.gradients), len(keys))


def _row(path: str, layers: list[Audited]) -> tuple[str, str, str, str]:
    parameters = sum(layer.parameters for layer in layers)
    gradient = f"{sum(layer.gradients for layer in layers)} of {parameters}" if parameters else "-"
    return path, str(len(layers)), str(sum(layer.ran for layer in layers)), gradient


def _cut(path: str, width: int) -> str:
    """The path in so many columns, with dots for its middle where it is longer."""
    if len(path) > width:
        tail = width - 3 - width // 3
        path = f"{path[: width // 3]}...{path[-tail:]}"
    return path.ljust(width)


def _scalar(output: Any) -> Tensor:
    """What is differentiated: the loss, or a number that depends on every floating-point output."""
    loss = getattr(output, "loss", None)
    if loss is None and isinstance(output, Mapping):
        loss = output.get("loss")
    if isinstance(loss, Tensor):
        return loss.mean()
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    outputs = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
    if not outputs:
        raise TargetError(f"the model gave {type(output).__name__}, without a floating-point tensor to differentiate")
    return torch.stack([t.float().square().mean() for t in outputs]).sum()


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Gradients, buffers and random states are afterwards as they were."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = list(_statistics(model))
    with random_kept(model):
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    setattr(module, name, buffer)  # the model may have put another tensor in its place
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


def _statistics(model: nn.Module) -> Iterable[tuple[nn.Module, str, Tensor, Tensor]]:
    """Every buffer that a forward may count or average in, with a copy of it; codes of packed weights are integers."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta and (buffer.is_floating_point() or buffer.numel() == 1):
                yield module, name, buffer, buffer.clone()
