"""An audit tells if adapters would train: which layers ran in one forward, and which parameters got a gradient.

print(ll.audit(model, batch))
"""

from collections.abc import Iterator, Mapping
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
    """The adapted layers in one forward and backward. Prints as a table."""

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
        title = f"{self.model}: {sum(layer.ran for layer in self.layers)} of {len(self.layers)} adapted layers ran"
        return "\n".join([title, *lines])


def audit(model: nn.Module, batch: Mapping[str, Any] | Tensor) -> Audit:
    """Run one forward and backward on a batch, and see that every adapter takes part in it.

    The batch goes in as `model(**batch)`, a tensor as `model(batch)`. What is differentiated is the output's `loss`,
    or, without one, the mean square of each floating-point output. The model runs in the mode that it is in: call
    `model.train()` first to see what training does. Gradients, statistics of normalisations and random states are
    afterwards as they were. Of a model inside DistributedDataParallel or torch.compile the inner one runs.

    Raises:
        TargetError: naming them, for layers that were never called, so that their adapters have no effect (the model
            reads the weight without calling the layer, or doesn't use it, or nothing in this batch reaches that part of
            it), and for adapter parameters without a gradient. Also where there is nothing to audit: no adapter, a
            merged one, or all at scale 0.
        QuantizedWeightError: as attach, where training would get wrong gradients or none; and what the model raises.
    """
    root, layers = _working(model)
    with _unchanged(root), watching(root, layers) as calls, reading(layers, calls):
        loss = _scalar(root(**batch) if isinstance(batch, Mapping) else root(batch))
        if loss.requires_grad:
            loss.backward()
    problems = [*_bypassed(layers, calls), *_uncalled(layers, calls), *_without_gradient(layers, calls)]
    if problems:
        raise TargetError(_message(root, "not every adapter takes part in this forward", problems))
    return Audit(type(root).__name__, tuple(_audited(path, layer, calls) for path, layer in layers.items()))


@contextmanager
def watched_step(model: nn.Module) -> Iterator[None]:
    """Within the block runs a training step, up to its backward, of a model that may be wrapped.

    Layers that this batch didn't call, which others may, are a warning; so is what isn't known since it is compiled.

    Raises:
        TargetError: in every process if there are several, for layers whose weight is read without a call and for
            parameters without a gradient.
        QuantizedWeightError: as attach, where training would get wrong gradients or none.
    """
    root, layers = _working(model)
    compiled = in_graphs(model)
    plain = {path: layer for path, layer in layers.items() if id(layer) not in compiled}
    parameters = trained({path: layer for path, layer in layers.items() if id(layer) in compiled})
    fresh = [key for key, parameter in parameters.items() if parameter.grad is None]
    with watching(root, plain) as calls, nullcontext() if compiled else reading(plain, calls):
        yield
    problems = [*_bypassed(plain, calls), *_without_gradient(plain, calls)]
    if sharding.any_process(bool(problems), next(root.parameters()).device):
        title = "not every adapter takes part in the first training step"
        raise TargetError(_message(root, title, problems or ["  another process says which"]))
    doubts = list(_uncalled(plain, calls))  # another batch may call them
    if none := [key for key in fresh if parameters[key].grad is None]:
        doubts.append(f"  no gradient in compiled parts, after the first step: {grouped(none)}")
    if doubts:
        logger.warning(_message(root, "not every adapter took part in the first training step", doubts))


def _working(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The module that adapters were attached to, and each layer with an adapter that isn't off. Raises TargetError, and
    QuantizedWeightError for weights that adapters can't train on."""
    root, session = session_of(model)
    check_unmerged(session, "audit")
    every = adapted(root)
    layers = {
        path: layer for path, layer in every.items() if any(not s.state.is_idle for s in sites_of(layer).values())
    }
    if not layers:
        reason, cure = ("every adapter is at scale 0", "set a scale") if every else ("no adapter", "attach one")
        raise TargetError(f"nothing to audit on this {type(root).__name__}: {reason}\n  {cure} first")
    if trained(layers):  # attach has checked this; load hasn't, since what it loads may be for inference
        probe.check_gradients(root, layers)
    return root, layers


def _message(root: nn.Module, title: str, lines: list[str]) -> str:
    return "\n".join([f"{type(root).__name__}: {title}", *lines])


def _bypassed(layers: Mapping[str, nn.Module], calls: Calls) -> Iterator[str]:
    """Lines of a message on layers that were not called although their weight was read."""
    if read := (layers.keys() - calls.called) & calls.read:
        yield f"  never called, while the model reads the weight itself: {grouped(read)}"
        yield "    no adapter on them can have an effect: leave them out with exclude_names"


def _uncalled(layers: Mapping[str, nn.Module], calls: Calls) -> Iterator[str]:
    """Lines on layers that were neither called nor read, first where the module around them was called."""
    uncalled = layers.keys() - calls.called - calls.read
    if unused := uncalled & calls.reached:
        yield f"  not called in this forward, although the module around it was: {grouped(unused)}"
        yield "    leave them out with exclude_names, or give a batch that calls them (an image, another expert)"
    if unreached := uncalled - calls.reached:
        yield f"  not reached by this batch: {grouped(unreached)}"
        yield "    give a batch that takes every path (an image, another expert), or leave them out with exclude_names"


def _without_gradient(layers: Mapping[str, nn.Module], calls: Calls) -> Iterator[str]:
    """Lines on parameters of layers that were called, and whose gradient is None."""
    ran = {path: layer for path, layer in layers.items() if path in calls.called}
    if none := trained(ran).keys() - calls.gradients:
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
    """The path in `width` columns, with dots for its middle where it is longer."""
    if len(path) > width:
        tail = width - 3 - width // 3
        path = f"{path[: width // 3]}...{path[-tail:]}"
    return path.ljust(width)


def _scalar(output: Any) -> Tensor:
    """The loss, or a number that depends on every floating-point output."""
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
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Within the block autograd is on; gradients, buffers and random states are afterwards as they were."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        # a forward averages in floats and counts in single integers; other integers are codes of packed weights
        if not buffer.is_meta and (buffer.is_floating_point() or buffer.numel() == 1)
    ]
    try:
        model.zero_grad()
        with random_kept(model), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                setattr(module, name, buffer)  # the model may have put another tensor in its place
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
