"""remembered: results of the base, kept on the model by the content that they were computed from."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..base import sharding
from ..core.adapter import adapters
from ..core.state import session_of

MEMO_BYTES = 1 << 30  # limit of the results that a model with adapters keeps of its base; the oldest goes first


def remembered(model: nn.Module, key: Sequence[Any], compute: Callable[[], Tensor]) -> Tensor:
    """compute(), or its earlier result for the same key, while every adapter is off and the base is untouched."""
    root, session = session_of(model)
    adapter_ids = {id(tensor) for adapter in adapters(model).values() for _, tensor in adapter.named_tensors()}
    base = [tensor for tensor in (*root.parameters(), *root.buffers()) if id(tensor) not in adapter_ids]
    is_on = any(state.scale for state in session.adapters.values())
    # a base without adapters may be in training, and all processes of a sharded model must run the same forwards
    if not session.adapters or is_on or any(map(sharding.is_sharded, base)):
        return compute()
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    # the base's bytes would take long to hash: its versions tell that a tensor was cast, swapped or edited
    versions = [(t.dtype, t.data_ptr(), 0 if t.is_inference() else t._version) for t in base]
    leaves, structure = tree_flatten(key)
    hasher: Any = hashlib.sha256(repr((autocast, versions, structure)).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            hasher.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            hasher.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            hasher.update(f"{leaf!r};".encode())
    digest = hasher.digest()
    if digest in session.memo:
        return session.memo[digest]
    value = session.memo[digest] = compute().cpu()
    while sum(result.nbytes for result in session.memo.values()) > MEMO_BYTES:
        del session.memo[next(iter(session.memo))]  # a dict goes by insertion, so this is the oldest
    return value
