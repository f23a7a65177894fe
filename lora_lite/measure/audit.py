"""Which adapted layers run in one forward, and which parameters get a gradient: an audit, without its merge."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..base import probe, sharding
from ..base.kinds import Conv1D, Linear
from ..base.layer import BaseLayer, layer_of
from ..base.stacks import starred
from ..base.still import random_kept
from ..core.adapter import adapters
from ..core.ran import Layers, adapted, grouped, in_graphs, trained
from ..core.state import check_unmerged, session_of, sites_at
from ..errors import TargetError
from .calls import Calls, watching

Batch = Mapping[str, Any] | Tensor
WIDTH = 80  # columns of the table


@dataclass(frozen=True)
class Audited:
    """One adapted layer."""

    path: str
    ran: bool
    gradients: int  # how many of its adapters' parameters got a gradient, be it exactly 0, as that of A is while B = 0
    parameters: int  # how many are to be trained: none of a method that is computed


@dataclass(frozen=True)
class Audit:
    """The adapted layers in one forward and backward. Prints as a table."""

    model: str
    layers: tuple[Audited, ...]
    unadapted: tuple[str, ...] = ()
    """The linear layers without an adapter that PEFT's `all-linear` would train one on: all but the output head."""
    merged: float | None = None
    """By how much the outputs differ once merged, as a share of what the adapters change; None if it wasn't asked."""

    def __str__(self) -> str:
        """One row for all layers that differ in the block index only."""
        groups: dict[str, list[Audited]] = {}
        for layer in self.layers:
            groups.setdefault(starred(layer.path), []).append(layer)
        rows = [("layer", "n", "ran", "gradient")]
        for path, layers in groups.items():
            parameters = sum(layer.parameters for layer in layers)
            gradient = f"{sum(layer.gradients for layer in layers)} of {parameters}" if parameters else "-"
            rows.append((path, str(len(layers)), str(sum(layer.ran for layer in layers)), gradient))
        longest, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
        width = min(longest, WIDTH - sum(widths) - 2 * len(widths))
        lines = []
        for path, *cells in rows:
            if len(path) > width:  # dots for its middle
                path = f"{path[: width // 3]}...{path[width // 3 + 3 - width :]}"
            lines.append("  ".join([path.ljust(width), *map(str.rjust, cells, widths)]))
        title = f"{self.model}: {sum(layer.ran for layer in self.layers)} of {len(self.layers)} adapted layers ran"
        if self.unadapted:
            text = f"PEFT's all-linear would adapt {len(self.unadapted)} more: {grouped(self.unadapted)}"
            lines += wrap(text, WIDTH, subsequent_indent="  ", max_lines=3, placeholder=" ...", break_on_hyphens=False)
        if self.merged is not None:
            lines.append(f"merged, the outputs differ by {self.merged:.1g} of what the adapters change")
        return "\n".join([title, *lines])


def parts_taken(model: nn.Module, batch: Batch) -> Audit:
    """`lora_lite.audit` without the merge."""
    root, layers = _working(model)
    with unchanged(root), watching(root, layers) as calls:
        loss = _scalar(outputs(root, batch))
        if loss.requires_grad:
            loss.backward()
    name, problems = type(root).__name__, [*_faults(layers, calls), *_uncalled(layers, calls)]
    with sharding.all_or_none(any(adapter.is_sharded for adapter in adapters(root).values())):
        if problems:
            raise TargetError("\n".join([f"{name}: not every adapter takes part in this forward", *problems]))
    counts = {path: len(trained({path: layer})) for path, layer in layers.items()}
    audited = tuple(Audited(path, True, n, n) for path, n in counts.items())  # all others have raised
    return Audit(name, audited, tuple(_unadapted(root)) if any(counts.values()) else ())


@contextmanager
def watched_step(model: nn.Module) -> Iterator[Calls]:
    """Within the block runs a training step, up to its backward, of a model that may be wrapped. Where it generates
    first, `forget_calls` of what this gives, before the loss: a head that generation calls, the loss may read.

    Layers that this batch didn't call, which others may, are a warning; so is what isn't known since it is compiled.

    Raises:
        TargetError: for layers whose weight is read without a call and for parameters without a gradient.
        LoraLiteError: of several processes in the others, with that.
        QuantizedWeightError: as attach, where training would get wrong gradients or none.
    """
    root, layers = _working(model)
    compiled = in_graphs(model)
    plain = {path: layer for path, layer in layers.items() if id(layer.module) not in compiled}
    parameters = trained({path: layer for path, layer in layers.items() if id(layer.module) in compiled})
    fresh = [key for key, parameter in parameters.items() if parameter.grad is None]
    with watching(root, plain, reads=not compiled) as calls:
        yield calls
    name = type(root).__name__
    _raise_together(root, "the first training step", list(_faults(plain, calls)))
    doubts = list(_uncalled(plain, calls))  # another batch may call them
    if none := [key for key in fresh if parameters[key].grad is None]:
        doubts.append(f"  no gradient in compiled parts, after the first step: {grouped(none)}")
    if doubts:
        logger.warning("\n".join([f"{name}: not every adapter took part in the first training step", *doubts]))


@contextmanager
def watched_evaluation(model: nn.Module) -> Iterator[None]:
    """Within the block runs a step of an evaluation, of a model that may be wrapped.

    Raises:
        TargetError: in every process if there are several, for layers whose weight is read without a call.
    """
    root, _ = session_of(model)
    compiled = in_graphs(model)
    layers = {path: layer for path, layer in in_effect(root).items() if id(layer.module) not in compiled}
    with watching(root, layers, reads=not compiled) as calls:
        yield
    _raise_together(root, "the first step of the evaluation", list(_bypassed(layers, calls)))


def in_effect(model: nn.Module) -> dict[str, BaseLayer]:
    """Each layer with an adapter that isn't off, by its path."""
    layers = adapted(session_of(model)[0]).items()
    return {path: layer for path, layer in layers if any(not site.state.is_idle for site in sites_at(layer))}


def _raise_together(root: nn.Module, where: str, problems: list[str]) -> None:
    """TargetError if there are problems; LoraLiteError with them in the other processes."""
    with sharding.all_or_none(True):
        if problems:
            first = f"{type(root).__name__}: not every adapter takes part in {where}"
            raise TargetError("\n".join([first, *problems]))


def _working(model: nn.Module) -> tuple[nn.Module, dict[str, BaseLayer]]:
    """The module that adapters were attached to, and each layer with an adapter that isn't off. Raises TargetError, and
    QuantizedWeightError for weights that adapters can't train on."""
    root, session = session_of(model)
    check_unmerged(session, "audit")
    layers = in_effect(root)
    if not layers:
        reason, cure = ("every adapter is at scale 0", "set a scale") if adapted(root) else ("no adapter", "attach one")
        raise TargetError(f"nothing to audit on this {type(root).__name__}: {reason}\n  {cure} first")
    if trained(layers):  # attach has checked this; load hasn't, since what it loads may be for inference
        probe.check_gradients(root, layers)
    return root, layers


def _unadapted(root: nn.Module) -> list[str]:
    """The linear layers without an adapter, as PEFT counts them: every one that is not the output head."""
    find: Any = getattr(root, "get_output_embeddings", None)
    layers, head = adapted(root), None if find is None else find()
    others = ((path, layer_of(module, path)) for path, module in root.named_modules() if module is not head)
    linear = {path for path, layer in others if layer and isinstance(layer.kind, Linear | Conv1D)}
    # Another library's adapter, or a quantiser's wrapper, may have a linear layer inside.
    within = {path for path in linear if any(path.startswith(f"{other}.") for other in layers)}
    return [path for path, _ in root.named_modules() if path in linear - within - layers.keys()]


def _faults(layers: Layers, calls: Calls) -> Iterator[str]:
    """Lines of a message on layers whose weight was read without a call, and on parameters of layers that were called
    whose gradient is None."""
    yield from _bypassed(layers, calls)
    ran = {path: layer for path, layer in layers.items() if path in calls.called}
    if none := trained(ran).keys() - calls.gradients:
        yield f"  no gradient, although the layer ran: {grouped(none)}"
        yield (
            "    the loss doesn't depend on them: are the inputs of a reentrant checkpoint without gradients "
            "(model.enable_input_require_grads()), or does a part run under no_grad?"
        )


def _bypassed(layers: Layers, calls: Calls) -> Iterator[str]:
    """Lines of a message on layers whose weight was read without a call."""
    if read := (layers.keys() - calls.called) & calls.read:
        yield f"  never called, while the model reads the weight itself: {grouped(read)}"
        yield "    no adapter on them can have an effect: leave them out with exclude_names"


def _uncalled(layers: Layers, calls: Calls) -> Iterator[str]:
    """Lines on layers that were neither called nor read, first where the module around them was called."""
    uncalled = layers.keys() - calls.called - calls.read
    if unused := uncalled & calls.reached:
        yield f"  not called in this forward, although the module around it was: {grouped(unused)}"
        yield "    leave them out with exclude_names, or give a batch that calls them (an image, another expert)"
    if unreached := uncalled - calls.reached:
        yield f"  not reached by this batch: {grouped(unreached)}"
        yield "    give a batch that takes every path (an image, another expert), or leave them out with exclude_names"


def outputs(model: nn.Module, batch: Batch) -> Any:
    """A mapping goes in as keywords, a tensor as it is."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _scalar(output: Any) -> Tensor:
    """The loss, or a number that depends on every floating-point output."""
    values = dict(output) if isinstance(output, Mapping) else output
    loss = values.get("loss") if isinstance(values, dict) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss.mean()
    tensors = numbers_in(values)
    if not tensors:
        raise TargetError(f"the model gave {type(output).__name__}, without a floating-point tensor to differentiate")
    return torch.stack([t.float().square().mean() for t in tensors]).sum()


def numbers_in(output: Any) -> list[Tensor]:
    """Every floating-point tensor of a model's output."""
    values = dict(output) if isinstance(output, Mapping) else output
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
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
