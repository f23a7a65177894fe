"""Results of the base, remembered by what they were computed from."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base import sharding
from ..core.adapter import adapters
from ..core.state import session_of

MEMO_BYTES = 1 << 30
"""Of base-side results that a model with adapters keeps; the oldest goes first."""


def remembered(model: nn.Module, key: Sequence[Any], compute: Callable[[], Tensor]) -> Tensor:
    """compute(), or what it gave before for the same content, while every adapter is off and the base is untouched."""
    root, session = session_of(model)
    own = {id(tensor) for adapter in adapters(model).values() for _, tensor in adapter.named_tensors()}
    base = [t for t in (*root.parameters(), *root.buffers()) if id(t) not in own]
    on = not session.adapters or any(state.scale for state in session.adapters.values())
    if on or any(map(sharding.is_sharded, base)):  # of a sharded model, all processes must run the same forwards
        return compute()
    hashed = hashlib.sha256()
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    for part in (*key, autocast, *map(_mark, base)):
        _digest(hashed, part)
    digest = hashed.digest()
    if digest in session.memo:
        return session.memo[digest]
    value = session.memo[digest] = compute().cpu()
    while sum(kept.nbytes for kept in session.memo.values()) > MEMO_BYTES:
        del session.memo[next(iter(session.memo))]
    return value


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor of the base is cast, swapped or edited (as nobody should while adapters are on)."""
    return str(tensor.dtype), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _digest(hashed: Any, part: Any) -> None:
    """Feed a tensor's type, shape and bytes, or a structure of plain values, to a hash."""
    if isinstance(part, Tensor):
        hashed.update(f"{part.dtype}{tuple(part.shape)}".encode())
        hashed.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(part, Mapping):
        for key in sorted(part):
            hashed.update(f"{key}:".encode())
            _digest(hashed, part[key])
    else:
        hashed.update(f"{part!r};".encode())
