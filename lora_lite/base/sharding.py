"""Tensors of which each process holds a part: DTensors (fully_shard, tensor parallelism), and those of ZeRO-3.

A DTensor says its whole shape; a parameter of ZeRO-3 is an empty tensor with the shape beside it.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraLiteError
from .kinds import is_instance

FSDP2 = "torch.distributed.fsdp", "FSDPModule"  # the class of a module that fully_shard was given


def is_sharded(tensor: Tensor) -> bool:
    """True for a tensor of which this process holds a part."""
    return is_dtensor(tensor) or is_partitioned(tensor)


def is_dtensor(tensor: Tensor) -> bool:
    """True for a parameter of fully_shard or of tensor parallelism."""
    return is_instance(tensor, "torch.distributed.tensor", "DTensor")


def is_partitioned(tensor: Tensor) -> bool:
    """True for a parameter of ZeRO-3, except while it is gathered."""
    status = getattr(tensor, "ds_status", None)  # a ZeroParamStatus, on DeepSpeed's parameters alone
    return status is not None and status.name != "AVAILABLE"


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor."""
    partitioned: Any = tensor  # its own shape is (0,) while the other processes hold the rest
    return torch.Size(partitioned.ds_shape) if is_partitioned(tensor) else tensor.shape


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of a DTensor all shards, gathered by all processes together."""
    sharded: Any = tensor  # full_tensor() is a collective call: without one process the others wait forever
    return sharded.full_tensor() if is_dtensor(tensor) else tensor


def any_process(is_true: bool, device: torch.device) -> bool:
    """Is it true in any of the processes that train together? All of them ask, each with a tensor on its device."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return is_true
    count = torch.tensor(int(is_true), device=device)  # NCCL reduces tensors on the GPU alone
    torch.distributed.all_reduce(count)  # without it one process would raise, and the others wait in their next step
    return bool(count)


@contextmanager
def all_or_none(together: bool) -> Iterator[None]:
    """All processes leave the block, or all raise: one that raised alone would leave the others waiting for it.

    together    all processes enter the block; if not, this does nothing. The block makes no collective call that some
                of them might not reach

    Raises:
        LoraLiteError: in a process that has not failed itself, with the error of the first one that has.
    """
    if not (together and torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    outcomes: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, error and f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, outcome in enumerate(outcomes):
        if outcome is not None:
            raise LoraLiteError(f"process {rank} failed, so no process goes on\n  {outcome}")


def has_master(tensor: Tensor) -> bool:
    """True for a parameter of which ZeRO-3's optimizer keeps the copy that each step goes on from."""
    return hasattr(tensor, "_z3_optimizer")


def gathered(tensors: Iterable[Tensor], modifier_rank: int | None = None) -> AbstractContextManager[Any]:
    """Within the block, the parameters of ZeRO-3 among these are whole. All processes enter and leave it together.

    What the process modifier_rank writes into them reaches all others at the end; without one, writes are lost.
    """
    partitioned = [tensor for tensor in tensors if is_partitioned(tensor)]
    if not partitioned:  # the same in all processes, as a parameter is partitioned in all or in none
        return nullcontext()
    return sys.modules["deepspeed"].zero.GatheredParameters(partitioned, modifier_rank=modifier_rank)


def sharded_like(tensor: Tensor, value: Tensor) -> Tensor:
    """The value itself; where the tensor is a DTensor, this process's shard of it."""
    if not is_dtensor(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor  # a collective call: rank 0 scatters its values

    sharded: Any = tensor
    return distribute_tensor(value, sharded.device_mesh, sharded.placements)
