"""Adapters that are attached and not in use: their tensors on another device, without hooks."""

from collections.abc import Sequence

import torch
from loguru import logger
from torch import Tensor, nn

from ..errors import ConfigError, TargetError
from .adapter import get_adapter
from .exchange import reorder
from .graphs import forget_graphs
from .positions import watch_calls
from .state import AdapterState, check_unmerged, session_of


def unload_to(model: nn.Module, device: torch.device | str, names: str | Sequence[str]) -> None:
    """Move the tensors of these adapters to a device, and take their hooks off: they cost no memory on the layers'
    device and no time. They stay attached, at no layer at work, until `bring_back`; `save` writes them as before.

    Raises:
        ConfigError: for the meta device.
        TargetError: for an unknown name, an adapter that is merged or sharded, and within a block of `rows`.
    """
    if torch.device(device).type == "meta":
        raise ConfigError("unload_to('meta') would lose the numbers\n  give a device that has memory, such as 'cpu'")
    states = _states(model, names, "unload")
    for state in states:
        _move(state, torch.device(device))
        state.unloaded = True
        while state.watches:
            state.watches.pop().remove()
        for site in state.sites:
            while site.handles:
                site.handles.pop().remove()
    forget_graphs()
    logger.info(f"unloaded {', '.join(state.name for state in states)} to {device}")


def bring_back(model: nn.Module, names: str | Sequence[str]) -> None:
    """Put adapters that were unloaded to work again, on their layers' devices, in their place in the order.

    Raises:
        TargetError: for an unknown name.
    """
    states = [state for state in _states(model, names, "bring back") if state.unloaded]
    root, session = session_of(model)
    for state in states:
        _move(state, None)
        state.unloaded = False
        watch_calls(root, state)
    reorder(session, list(session.adapters))
    forget_graphs()
    logger.info(f"brought back {', '.join(state.name for state in states)}")


def _states(model: nn.Module, names: str | Sequence[str], action: str) -> list[AdapterState]:
    session = session_of(model)[1]
    check_unmerged(session, action)
    adapters = [get_adapter(model, name) for name in ([names] if isinstance(names, str) else names)]
    if sharded := next((adapter for adapter in adapters if adapter.is_sharded), None):
        problem = f"can't {action} {sharded.name!r}: it is sharded by {sharded.sharded_by}"
        raise TargetError(f"{problem}\n  keep it where it is, within lora_lite.disabled(model)")
    return [session.adapters[adapter.name] for adapter in adapters]


@torch.no_grad()
def _move(state: AdapterState, device: torch.device | None) -> None:
    """The same parameters, which an optimizer may know, with their numbers on a device; None: that of the layers."""
    for method in state.methods:
        for site in method.sites:
            for _, tensor in site.tensors():
                _to(tensor, site.base.stored.device if device is None else device)
            site.memo.clear()
        if method.shared is not None:
            for _, tensor in method.shared.tensors():
                _to(tensor, method.sites[0].base.stored.device if device is None else device)


def _to(tensor: Tensor, device: torch.device) -> None:
    gradient, tensor.grad = tensor.grad, None
    tensor.data = tensor.data.to(device)
    tensor.grad = None if gradient is None else gradient.to(device)
