"""A linear layer that tensor parallelism has sharded: each process multiplies by a part of W, and adds a part of B A.

    over outputs   W (o/n, i): x is whole, y a part     A whole        B (o/n, r)
    over inputs    W (o, i/n): x is a part, y whole     A (r, i/n)     B whole        h = Σ_processes A x

Over inputs, r numbers a token are summed in the forward, where the layer sums o; the gradients of h, B and y are whole
then. Over outputs, h = A x is whole, and its gradient a sum of parts: r numbers a token in the backward, which dA and
dx are made of. These are the operators g and f of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053, section 3),
between the two small products.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import TargetError
from ..ops.dropout import dropout_seed, dropped
from ..ops.low_rank import no_autocast
from .kinds import BLOCK, LINEAR
from .layer import BaseLayer
from .sharding import bounds, has_empty_part, is_dtensor, is_parallel

CURE = "leave it out with exclude_names, or load the model without tp_plan and shard it by fully_shard"


@dataclass(frozen=True)
class Split:
    """How a layer's weight (d_out, d_in) is sharded. It holds no tensor, and no process group."""

    over_outputs: bool
    d_in: int
    d_out: int

    def shard(self, value: Tensor, mesh: Any, axis: int | None) -> Tensor:
        """A tensor as a DTensor, sharded along an axis, or for None replicated.

        All processes call it together, and get the numbers of the first: their random generators may differ.
        """
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        if is_dtensor(value):
            return value
        sharded = distribute_tensor(value.detach(), mesh, [Replicate() if axis is None else Shard(axis)])
        return nn.Parameter(sharded, value.requires_grad) if isinstance(value, nn.Parameter) else sharded

    def local(self, path: str, mesh: Any, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        """The input and the output of a call, as this process has them.

        Raises:
            TargetError: unless each is the whole or this process's part of its features, for the same tokens.
        """
        if is_dtensor(x) and not x.placements[0].is_partial() and not is_dtensor(y):
            x = x.to_local()
        sizes = [{d, stop - start} for d in (self.d_in, self.d_out) for start, stop in [bounds(d, mesh)]]
        is_plain = not is_dtensor(x) and not is_dtensor(y)
        if not is_plain or x.shape[:-1] != y.shape[:-1] or x.shape[-1] not in sizes[0] or y.shape[-1] not in sizes[1]:
            got = " and ".join(f"{tuple(t.shape)}{' in parts' * is_dtensor(t)}" for t in (x, y))
            problem = f"{path}: a tensor-parallel layer of {self.d_in} -> {self.d_out} was called with, and gave, {got}"
            raise TargetError(
                f"{problem}\n  wanted the same tokens in both (no sequence parallelism), as plain tensors"
            )
        return x, y

    def add(
        self,
        y: Float[Tensor, "*b _"],
        x: Float[Tensor, "*b _"],
        a: Float[Tensor, "r _"],
        b: Float[Tensor, "_ r"],
        mesh: Any,
        s: Any = 1.0,
        dropout: float = 0.0,
        shift: Float[Tensor, "_"] | None = None,
    ) -> Float[Tensor, "*b _"]:
        """y + s B A drop(x) + shift in y's dtype, for x and y as `local` gives them, and this process's parts of A, B
        and shift. All processes call it together."""
        from torch.distributed.tensor import Replicate, Shard

        group, replicate, shard = mesh.get_group(), Replicate(), Shard(x.ndim - 1)
        with no_autocast(x) or nullcontext():
            if dropout:
                x = self._dropped(x, dropout, mesh)
            if not self.over_outputs and x.shape[-1] == self.d_in:  # a layer that shards its input itself
                x = _redistributed(x, mesh, self.d_in, replicate, shard)
            h = F.linear(x, a.to(x.dtype))  # (*b, r)
            h = _SumOfGradients.apply(h, group) if self.over_outputs else _Sum.apply(h, group)
            change = F.linear((h * s).to(h.dtype), b.to(h.dtype))
            change = change if shift is None else change + shift.to(change.dtype)
            if self.over_outputs and y.shape[-1] == self.d_out:  # one that gathers its output, as a head does
                change = _redistributed(change, mesh, self.d_out, shard, replicate)
            return y + change

    def _dropped(self, x: Tensor, p: float, mesh: Any) -> Tensor:
        """drop(x) by the mask of one process that has the whole of x."""
        seed = torch.tensor(dropout_seed(), device=x.device)
        dist.broadcast(seed, group_src=0, group=mesh.get_group())  # by other masks, dA would be of another function
        if x.shape[-1] == self.d_in:
            return dropped(x, p, int(seed))
        mask = dropped(x.new_ones(*x.shape[:-1], self.d_in), p, int(seed))  # (*b, i)
        start, stop = bounds(self.d_in, mesh)
        return x * mask[..., start:stop]


def shows_part(module: nn.Module, before: bool) -> bool:
    """Does a process see a part of a module's features alone: of its input, if before, else of its output?"""
    if not is_parallel(module):
        return False
    weight: Any = getattr(module, "weight", None)
    is_split = is_dtensor(weight) and isinstance(module, nn.Linear)
    return not is_split or before == (weight.placements[0].dim == 1)


def is_block_of_parts(layer: BaseLayer) -> bool:
    """Is it the residual stream of a block that has sharded layers in it, and is sharded in no other way?"""
    if layer.kind is not BLOCK or not is_dtensor(layer.stored):
        return False
    parameters: Any = [p for p in layer.module.parameters() if is_dtensor(p)]
    marked = any(map(is_parallel, layer.module.modules()))
    return marked and all(len(p.placements) == 1 for p in parameters)


def split_of(layer: BaseLayer) -> Split:
    """How the weight of a layer is sharded, whose module is_parallel.

    Raises:
        TargetError: for a layer that isn't sharded over its outputs or its inputs, in equal shards but for the last.
    """
    from torch.distributed.tensor import Shard

    weight: Any = layer.stored
    if not is_dtensor(weight):  # a norm of the heads of one process, a projection that all share
        problem = "each process has the whole layer, and a part of its gradients alone"
    elif layer.kind is not LINEAR or layer.by_weight:
        category = layer.kind.category
        name = type(layer.module).__name__ if category == LINEAR.category else category  # such as Conv1D
        problem = f"tensor parallelism has sharded this {name}, and adapters go on its linear layers"
    elif len(weight.placements) > 1 or type(weight.placements[0]) is not Shard:
        problem = f"its weight is placed as {weight.placements}, and factors follow shards of its rows or columns alone"
    elif has_empty_part(weight):
        problem = f"it is too small for {weight.device_mesh.size()} processes: the last has no shard of it"
    else:
        return Split(weight.placements[0].dim == 0, layer.d_in, layer.d_out)
    raise TargetError(f"{layer.path}: {problem}\n  {CURE}")


def _redistributed(local: Tensor, mesh: Any, size: int, placement: Any, target: Any) -> Tensor:
    """This process's local tensor of one whose last axis has this size, from one placement to the other; the gradient
    goes back."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((*local.shape[:-1], size))
    stride = torch.empty(shape, device="meta").stride()
    placed = DTensor.from_local(local.contiguous(), mesh, [placement], run_check=False, shape=shape, stride=stride)
    return placed.redistribute(placements=[target]).to_local()


class _Sum(torch.autograd.Function):
    """Σ of all processes' tensors, in each; whose gradient is whole in each."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        part, group = operands
        whole: Tensor = part.contiguous().clone()
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _SumOfGradients(torch.autograd.Function):
    """The tensor itself, which is whole in each process; its gradient is the Σ of all processes' parts."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        whole, ctx.group = operands
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        whole = grads[0].contiguous().clone()
        dist.all_reduce(whole, group=ctx.group)
        return whole, None
