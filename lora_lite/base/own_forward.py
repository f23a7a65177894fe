"""A layer's own forward, run on a few rows without a trace: no hooks, and modes and random numbers as they were."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import brief
from .bitsandbytes import is_bitsandbytes
from .kinds import is_bypassed
from .sharding import is_sharded
from .still import full_precision, still

if TYPE_CHECKING:
    from .layer import BaseLayer

Run = Callable[[Tensor], Tensor]  # from rows (n, d_in) to rows (n, d_out); raises NotRunError


class NotRunError(Exception):
    """A layer's own forward gives no rows (n, d_out) for rows (n, d_in)."""


class NoAnswerError(NotRunError):
    """The forward didn't run, which tells nothing of the layer: it needs more than rows, or memory ran out."""


def is_asked(layer: "BaseLayer") -> bool:
    """False where the class says what is computed, or nothing can be run: bitsandbytes, meta, shards, experts."""
    return not layer.is_plain and not layer.experts and layer.kind.has_matrix and can_run(layer.module, layer.stored)


def can_run(module: nn.Module, weight: Tensor) -> bool:
    """Can this module with this weight be run on rows, as far as its tensors say?"""
    # A shard's forward is a collective call; that of bitsandbytes, in eval mode, may repack the weight for good.
    if is_bypassed(module) or is_lazy(weight) or weight.is_meta or is_sharded(weight):
        return False
    return bool(weight.numel()) and weight.dim() != 3 and not any(map(is_bitsandbytes, module.modules()))


@contextmanager
def own_forward(layer: "BaseLayer") -> Iterator[Run]:
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

    # A forward may draw random numbers even in eval mode; the user's next ones must not depend on a probe.
    with full_precision(module), still(module):
        yield run


@contextmanager
def unbiased(layer: "BaseLayer") -> Iterator[Run]:
    """The layer's own forward without its bias: a small weight would be lost in the rounding of a sum with it.

    It is the forward of a shallow copy, so a call of the layer in another thread keeps its bias and its mode; but a
    forward that was put on the instance knows that one alone.
    """
    module = layer.module
    if "forward" not in vars(module):
        module = copy.copy(module)
        module.__dict__ |= {name: dict(module.__dict__[name]) for name in ("_parameters", "_buffers", "_modules")}
    bias: Any = getattr(module, "bias", None)
    places: list[Any] = [module._parameters, module._buffers, vars(module)]
    place = next((place for place in places if isinstance(bias, Tensor) and place.get("bias") is bias), None)
    if place is not None:
        zeros = torch.zeros_like(bias)
        place["bias"] = nn.Parameter(zeros, requires_grad=False) if place is module._parameters else zeros
    try:
        with own_forward(replace(layer, module=module)) as run:
            yield run
    finally:
        if place is not None:
            place["bias"] = bias


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
