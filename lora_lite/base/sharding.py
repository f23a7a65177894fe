"""Tensors of which each process holds a part: DTensors (fully_shard, tensor parallelism), and those of ZeRO-3.

A DTensor says its whole shape; a parameter of ZeRO-3 is an empty tensor with the shape beside it.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """True for a tensor of which this process holds a part."""
    return is_dtensor(tensor) or is_partitioned(tensor)


def is_dtensor(tensor: Tensor) -> bool:
    """True for a parameter of fully_shard or of tensor parallelism."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_partitioned(tensor: Tensor) -> bool:
    """True for a parameter of ZeRO-3, except while it is gathered."""
    module = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if module is None:  # nothing has imported it, so nothing is partitioned
        return False
    available = module.ZeroParamStatus.AVAILABLE
    return getattr(tensor, "ds_status", available) is not available


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor."""
    partitioned: Any = tensor
    return torch.Size(partitioned.ds_shape) if is_partitioned(tensor) else tensor.shape


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of a DTensor all shards, gathered by all processes together."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_dtensor(tensor) else tensor


def any_process(is_so: bool, device: torch.device) -> bool:
    """Is it so in any process of those that train together? All of them ask, each with a tensor on its device."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return is_so
    count = torch.tensor(int(is_so), device=device)
    torch.distributed.all_reduce(count)
    return bool(count)


def has_master(tensor: Tensor) -> bool:
    """True for a parameter of which ZeRO-3's optimizer keeps the copy that each step goes on from."""
    return hasattr(tensor, "_z3_optimizer")


@contextmanager
def gathered(tensors: Iterable[Tensor], modifier_rank: int | None = None) -> Iterator[None]:
    """Within the block, the parameters of ZeRO-3 among these are whole; all processes enter it together. With a
    modifier_rank, what that process writes into them is afterwards so in all."""
    partitioned = [tensor for tensor in tensors if is_partitioned(tensor)]
    if not partitioned:
        yield
        return
    with sys.modules["deepspeed"].zero.GatheredParameters(partitioned, modifier_rank=modifier_rank):
        yield


def sharded_like(tensor: Tensor, value: Tensor) -> Tensor:
    """The value itself; where the tensor is a DTensor, this process's shard of it."""
    if not is_dtensor(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = tensor
    return distribute_tensor(value, sharded.device_mesh, sharded.placements)
