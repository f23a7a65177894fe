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

MARKS = "_is_hooked", "_distribute_module_applied"  # on each module of a tp_plan: transformers' mark, and torch's
FSDP2 = "torch.distributed.fsdp", "FSDPModule"  # the class of a module that fully_shard was given


def is_sharded(tensor: Tensor) -> bool:
    """True for a tensor of which each process holds a part, or that ZeRO-3 keeps a hold of."""
    return is_dtensor(tensor) or is_of_zero(tensor)


def is_dtensor(tensor: Tensor) -> bool:
    """True for a parameter of fully_shard or of tensor parallelism."""
    return is_instance(tensor, "torch.distributed.tensor", "DTensor")


def is_parallel(module: Any) -> bool:
    """Has tensor parallelism sharded this module, or hooked it?"""
    return not module.__dict__.keys().isdisjoint(MARKS)


def is_of_zero(tensor: Tensor) -> bool:
    """True for a parameter of ZeRO-3, whole or not: small ones stay whole, and each step writes its own copy there."""
    return hasattr(tensor, "ds_id")


def is_partitioned(tensor: Any) -> bool:
    """True for a parameter of ZeRO-3 of which this process holds a part at the moment."""
    return is_of_zero(tensor) and tensor.ds_status.name != "AVAILABLE"


def shape_of(tensor: Any) -> torch.Size:
    """The shape of the whole tensor; its own is (0,) while the other processes hold the rest."""
    return torch.Size(tensor.ds_shape if is_partitioned(tensor) else tensor.shape)


def whole(tensor: Any) -> Any:
    """The tensor itself; of a DTensor all shards, gathered by all processes together: a collective call."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def bounds(size: int, mesh: Any, rank: int | None = None) -> tuple[int, int]:
    """From where to where an axis of this size goes in a process of a mesh of one dimension: this one, or `rank`."""
    part = -(-size // mesh.size())  # as torch.chunk does it, so the last one may be shorter
    start = min(size, part * (mesh.get_local_rank() if rank is None else rank))
    return start, min(size, start + part)


def has_empty_part(tensor: Any) -> bool:
    """Has a process no number of this DTensor, which is sharded along one axis?"""
    start, stop = bounds(tensor.shape[tensor.placements[0].dim], tensor.device_mesh, tensor.device_mesh.size() - 1)
    return start == stop


def mesh_of(model: Any) -> Any:
    """The DeviceMesh of the processes that tensor parallelism has sharded a model over; None of any other model."""
    parameters = (p for module in model.modules() if is_parallel(module) for p in module.parameters(recurse=False))
    return next((parameter.device_mesh for parameter in parameters if is_dtensor(parameter)), None)


def elements(tensor: Any, places: list[int]) -> Tensor:
    """The elements at these places of a DTensor's whole tensor as a flat one. All processes ask together."""
    from torch.distributed.tensor import Shard

    indices = torch.tensor(places, device=tensor.device)
    if len(tensor.placements) > 1 or type(tensor.placements[0]) is not Shard:
        return whole(tensor).reshape(-1).index_select(0, indices)
    axis, local = tensor.placements[0].dim, tensor.to_local()
    start, stop = bounds(tensor.shape[axis], tensor.device_mesh)
    index = list(torch.unravel_index(indices, tensor.shape))
    is_mine = (start <= index[axis]) & (index[axis] < stop)
    index[axis] = index[axis].sub(start).clamp(0, max(0, stop - start - 1))
    values = torch.where(is_mine, local[tuple(index)], 0)
    torch.distributed.all_reduce(values, group=tensor.device_mesh.get_group())  # exact: one process has each
    return values


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
    # The same in all processes, as a parameter is partitioned in all or in none.
    if not (partitioned := [tensor for tensor in tensors if is_partitioned(tensor)]):
        return nullcontext()
    return sys.modules["deepspeed"].zero.GatheredParameters(partitioned, modifier_rank=modifier_rank)


def sharded_like(tensor: Tensor, value: Tensor) -> Tensor:
    """The value itself; where the tensor is a DTensor, this process's shard of it."""
    if not is_dtensor(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor  # a collective call: rank 0 scatters its values

    sharded: Any = tensor
    return distribute_tensor(value, sharded.device_mesh, sharded.placements)
