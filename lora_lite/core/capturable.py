"""Blocks whose calls a graph may record: the scale is a tensor on the adapter's device, and nothing asks for its value.

A CUDA graph records kernels with the addresses of their tensors, and each number as it is. So a number that is to
change has to be a tensor that is filled in place. PyTorch's optimizers call that `capturable=True`, hence the name.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import nan

import torch
from torch import nn

from ..errors import ConfigError, TargetError
from .adapter import get_adapter
from .names import IN_EXPERT
from .scale import Changes, Scale
from .state import AdapterState, check_unmerged, session_of
from .variant import reason_for_no_graph


class InferenceOnly(Changes[Scale]):
    """In the place of an adapter's `changes`: what a call has to be for a graph to stay right. It keeps no history, so
    a part of a forward that gradient checkpointing runs again could not know its scale."""

    def __init__(self, root: nn.Module, state: AdapterState, value: Scale) -> None:
        super().__init__(value)
        self.root, self.state, self.address = root, state, _address(state)

    def of_this_call(self, value: Scale) -> Scale:
        problem = ""
        if torch.is_grad_enabled():
            problem = "a call with gradients\n  call the model under torch.no_grad()"
        elif self.root.training or any(site.module.training for site in self.state.sites):
            problem = "a call in training mode, whose random numbers a graph would repeat\n  model.eval() first"
        elif _device(self.state) != value.value.device:
            problem = f"the model has left {value.value.device}\n  move it first, then enter the block"
        elif _address(self.state) != self.address:
            problem = "its tensors have moved in memory\n  cast the model first, then enter the block"
        if problem:
            raise ConfigError(f"adapter {self.state.name!r}, within `capturable`: {problem}")
        return value


@contextmanager
def capturable(model: nn.Module) -> Iterator[None]:
    """Within the block, a CUDA graph that is captured of the model goes on with what is set later, without a new
    capture: `adapter.scale = c`, `scaled(model, c)` around a replay, and the values of `adapter.load_state_dict`,
    `restore`, and `load(..., replace=True)` into room for them (`max_rank=`).

        with ll.capturable(model), torch.no_grad():
            step()                                  # warm up, on a side stream
            with torch.cuda.graph(graph):
                step()
            ll.adapters(model)["default"].scale = 0.5
            graph.replay()                          # at 0.5

    The scale of each adapter is a tensor () in float64 on its layers' device, filled on the current stream: replay on
    that one. Scale 0 and 1 take the products of any other scale, and what eval remembers elsewhere, such as DoRA's
    norm, is computed in each call. What would leave a graph with the tensors of before (attach, detach, merge, unload,
    rows, configure) raises. After the block the scale that graphs read is NaN, so a replay can't pass for a result.

    Raises:
        TargetError: without an adapter that is at work; for one that is merged, sharded, or on several devices; for a
            method or a layer that a graph can't follow.
        ConfigError: in a call with gradients, in training mode, or on another device.
    """
    root, session = session_of(model)
    if any(state.in_place for state in session.adapters.values()):
        raise TargetError("the model is in a block of `capturable` already\n  capture within that one")
    check_unmerged(session, "capture")
    states = [state for state in session.adapters.values() if not state.unloaded]
    if not states:
        raise TargetError(
            f"no adapter at work on this {type(root).__name__}, so a graph needs no block\n  attach first"
        )
    for state in states:
        _check(state, get_adapter(root, state.name).sharded_by)
    if len(devices := {site.base.stored.device for state in states for site in state.sites}) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise TargetError(f"the adapted layers are on {names}\n  a CUDA graph is of one device: keep the model on it")
    with ExitStack() as undo:
        for state in states:
            undo.enter_context(_in_place(root, state))
        yield


@contextmanager
def _in_place(root: nn.Module, state: AdapterState) -> Iterator[None]:
    """Within the block, the adapter's scale is a tensor."""
    changes, before = state.changes, state.scale
    with torch.inference_mode(False):
        value = torch.tensor(before, dtype=torch.float64, device=_device(state))  # (): it casts nothing up
    state.plain = state.traced = state.in_place = Scale(value, False, False)
    state.changes = InferenceOnly(root, state, state.in_place)
    try:
        yield
    finally:
        value.fill_(nan)
        now, state.in_place, state.changes = state.scale, None, None
        state.set_scale(before)  # and its history as it was: a graph of autograd may be pending
        state.changes = changes
        if now != before:
            state.set_scale(now)


def _check(state: AdapterState, sharded_by: str) -> None:
    """TargetError for an adapter that a graph can't follow."""
    if sharded_by:
        problem = f"adapter {state.name!r} is sharded by {sharded_by}, which moves numbers"
        raise TargetError(f"{problem}\n  run it without a graph")
    for site in state.sites:
        method = f"method {site.cfg.variant!r}"
        if reason := reason_for_no_graph(site.cfg):
            problem = f"{method}: {reason}"
        elif site.positions is not None:
            problem = f"{method} acts at positions, which each call works out"
        elif site.through_weight:
            problem = "its module reads the weight, and the hooks there are no part of a graph"
        elif IN_EXPERT.search(site.path):
            problem = "an expert is called where a token is routed to it, and else not"
        else:
            continue
        raise TargetError(f"{site.path}: can't be captured: {problem}\n  merge the adapter, or run it without a graph")


def _address(state: AdapterState) -> int:
    """Where its first tensor lies: a cast of the model gives all of them other memory."""
    return next(tensor.data_ptr() for site in state.sites for _, tensor in site.tensors())


def _device(state: AdapterState) -> torch.device:
    return state.sites[0].base.stored.device
