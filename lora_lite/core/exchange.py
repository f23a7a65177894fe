"""Another adapter in the place of an attached one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ..errors import TargetError
from .adapter import Adapter, get_adapter
from .attach import hold, installed, uninstall
from .hooks import register_hooks
from .names import SITES
from .positions import watch_calls
from .state import AdapterState, Method, Session, Tensors, check_unmerged, session_at, sites_of


@contextmanager
def replaced(
    root: nn.Module, methods: list[Method], name: str, tensors: Tensors, scale: float, steps: int | None
) -> Iterator[Adapter]:
    """The transaction under load(replace=True): `installed`, where an adapter of that name is attached. The new one has
    its place in the order. If the block raises, the old one is there again, with the very tensors that it had.

    root        what `attachable` gave
    tensors     nobody else's: they are taken without a copy
    """
    session, adapter = session_at(root), get_adapter(root, name)
    check_unmerged(session, f"replace {name!r}")
    if adapter.is_sharded:
        problem = f"adapter {name!r} is sharded by {adapter.sharded_by}"
        raise TargetError(f"{problem}\n  use lora_lite.restore; on tensor-parallel layers detach it, then load")
    order, before = list(session.adapters), session.adapters[name]
    values = [dict(site.tensors()) for site in before.sites]
    try:
        for site in before.sites:
            uninstall(site.module, site.slot)
        _leave(root, session, before)
        with installed(root, methods, name, tensors, scale, steps, freeze=False, owned=True) as adapter:
            yield adapter
    except BaseException:
        _put_back(root, session, before, values)
        raise
    finally:
        reorder(session, order)


def _leave(root: nn.Module, session: Session, state: AdapterState) -> None:
    session.adapters.pop(state.name, None)
    while state.watches:
        state.watches.pop().remove()
    for method in state.methods:
        if method.shared is not None:
            del root._modules[method.shared.place + state.suffix]


def _put_back(root: nn.Module, session: Session, state: AdapterState, values: Sequence[dict[str, Tensor]]) -> None:
    for site, tensors in zip(state.sites, values, strict=True):
        site.add()
        for name, tensor in tensors.items():
            hold(site, name, tensor)
    for method in state.methods:
        if method.shared is not None:
            root.add_module(method.shared.place + state.suffix, method.shared)
    session.adapters[state.name] = state
    session.keep_at(root)
    watch_calls(root, state)


def reorder(session: Session, names: Sequence[str]) -> None:
    """The adapters and their hooks in this order."""
    states = sorted((session.adapters[name] for name in names), key=lambda state: not state.is_first)
    session.adapters.clear()
    session.adapters.update({state.name: state for state in states})
    places = {state.name: i for i, state in enumerate(states)}
    for module in {id(site.module): site.module for state in states for site in state.sites}.values():
        sites = sorted(sites_of(module).values(), key=lambda site: (places[site.state.name], site.number))
        module.__dict__[SITES] = {site.slot: site for site in sites}
        # Hooks run in the order of registering; each that is first goes before all others.
        for site in [*(s for s in sites if not s.is_first), *(s for s in sites[::-1] if s.is_first)]:
            register_hooks(site)
