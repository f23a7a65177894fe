"""A layer's own forward, run on a few rows without a trace: no hooks, and modes and random numbers as they were."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import brief
from .bitsandbytes import is_bitsandbytes
from .exact import full_precision
from .kinds import is_bypassed
from .layer import BaseLayer
from .sharding import is_sharded

Run = Callable[[Tensor], Tensor]  # from rows (n, d_in) to rows (n, d_out); raises NotRunError


class NotRunError(Exception):
    """A layer's own forward gives no rows (n, d_out) for rows (n, d_in)."""


class NoAnswerError(NotRunError):
    """The forward didn't run, which tells nothing of the layer: it needs more than rows, or memory ran out."""


def is_asked(layer: BaseLayer) -> bool:
    """False where the class says what is computed, or nothing can be run: bitsandbytes, meta, shards, experts."""
    # A shard's forward is a collective call; that of bitsandbytes, in eval mode, may repack the weight for good.
    if layer.is_plain or layer.experts or is_bypassed(layer.module):
        return False
    weight = layer.stored
    if layer.is_lazy or weight.is_meta or is_sharded(weight) or not weight.numel() or weight.dim() == 3:
        return False
    return not any(map(is_bitsandbytes, layer.module.modules()))


@contextmanager
def own_forward(layer: BaseLayer) -> Iterator[Run]:
    """The layer's forward in eval mode, without gradients unless the block enables them, and without autocast."""
    module = layer.module
    batches: list[tuple[int, ...]] = [(1,), ()]  # (1, n, d_in) as in a model; where that doesn't work, (n, d_in)

    def run(x: Float[Tensor, "n i"]) -> Float[Tensor, "n o"]:
        problems = []
        for batch in batches:
            try:
                y = _run(module, x.view(*batch, *x.shape), layer.d_out)
            except NoAnswerError:
                raise
            except NotRunError as problem:
                problems.append(problem)
            else:
                batches[:] = [batch]  # one block compares outputs, so its rows all go in alike
                return y[0] if batch else y
        raise problems[0]

    device = layer.stored.device
    # A forward may draw random numbers even in eval mode; the user's next ones must not depend on a probe.
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    modes = {inner: inner.training for inner in module.modules()}
    with full_precision(module), torch.random.fork_rng(devices, device_type=kind):
        try:
            for inner in modes:
                inner.training = False  # not eval(): a class may do more in that than this could undo
            yield run
        finally:
            for inner, mode in modes.items():
                inner.training = mode


def _run(module: Any, x: Float[Tensor, "*n i"], d_out: int) -> Float[Tensor, "*n o"]:
    try:
        inspect.signature(module.forward).bind(x)
    except TypeError as error:
        raise NoAnswerError(f"its forward can't be called with rows alone: {error}") from error
    except ValueError:  # it has no signature, as what is compiled has none
        pass
    shape = tuple(x.shape)
    try:
        y = module.forward(x)  # not module(x), which would fire hooks: adapters', or FSDP's
    except torch.OutOfMemoryError as error:
        raise NoAnswerError(f"no memory is left for an input {shape}") from error
    except Exception as error:  # of any kind: the forward is anyone's
        raise NotRunError(f"it takes no input {shape}: {type(error).__name__}: {brief(error)}") from error
    if not isinstance(y, Tensor):
        raise NotRunError(f"it gives a {type(y).__name__}, not a tensor")
    if y.shape != (*x.shape[:-1], d_out) or not y.is_floating_point():
        raise NotRunError(f"it gives {tuple(y.shape)} for {shape}, not {(*shape[:-1], d_out)}")
    return y
