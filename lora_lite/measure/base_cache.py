"""remembered: results of the base, kept on the model by the content that they were computed from."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base import sharding
from ..core.adapter import adapters
from ..core.state import session_of

MEMO_BYTES = 1 << 30
"""Limit of the results that a model with adapters keeps of its base; the oldest goes first."""


def remembered(model: nn.Module, key: Sequence[Any], compute: Callable[[], Tensor]) -> Tensor:
    """compute(), or its earlier result for the same key, while every adapter is off and the base is untouched."""
    root, session = session_of(model)
    adapter_ids = {id(tensor) for adapter in adapters(model).values() for _, tensor in adapter.named_tensors()}
    base = [tensor for tensor in (*root.parameters(), *root.buffers()) if id(tensor) not in adapter_ids]
    is_on = any(state.scale for state in session.adapters.values())
    # a base without adapters may be in training, and all processes of a sharded model must run the same forwards
    if not session.adapters or is_on or any(map(sharding.is_sharded, base)):
        return compute()
    hasher = hashlib.sha256()
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    for part in (*key, autocast, *map(_version, base)):
        _digest(hasher, part)
    digest = hasher.digest()
    if digest in session.memo:
        return session.memo[digest]
    value = session.memo[digest] = compute().cpu()
    while sum(result.nbytes for result in session.memo.values()) > MEMO_BYTES:
        del session.memo[next(iter(session.memo))]  # a dict goes by insertion, so this is the oldest
    return value


def _version(tensor: Tensor) -> tuple[Any, ...]:
    """A value that changes when a tensor of the base is cast, swapped or edited. Its bytes would take long to hash."""
    return str(tensor.dtype), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _digest(hasher: Any, part: Any) -> None:
    """Feed a tensor's type, shape and bytes, or a structure of plain values, to a hash."""
    if isinstance(part, Tensor):
        hasher.update(f"{part.dtype}{tuple(part.shape)}".encode())
        hasher.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(part, Mapping):
        for key in sorted(part):
            hasher.update(f"{key}:".encode())
            _digest(hasher, part[key])
    else:
        hasher.update(f"{part!r};".encode())
