"""An adapter on a layer that tensor parallelism has sharded: which of its tensors are sharded, and its forward there.

A method goes there whose `low_rank` gives two of its own tensors as they are, A and B, at a number s: then a part of
them is that of a smaller layer, and nothing else has to be known of the method.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from ..base.kinds import BLOCK
from ..base.sharding import is_dtensor, is_parallel, mesh_of
from ..base.split import CURE, Split, split_of
from ..errors import TargetError
from .layer import Layer
from .scale import Scale
from .state import Site
from .variant import LowRank, Variant, lookup

MORE = "init", "group_init", "refresh", "shared_specs", "on_step", "penalty"  # of a method that needs more than x
ONE = Scale(1.0, False, True)


@dataclass(frozen=True)
class Parts:
    """The parts of an adapter at a sharded layer: the axis along which each of its tensors is sharded."""

    split: Split
    axes: dict[str, int | None]  # None of a tensor that each process has whole

    def part(self, site: Site, name: str, value: Tensor) -> Tensor:
        """This process's part of one of the site's tensors, as it goes on the layer."""
        stored: Any = site.base.stored
        return self.split.shard(value, stored.device_mesh, self.axes[name])

    def output(
        self, module: nn.Module, site: Site, scale: Scale, x: Float[Tensor, "*b _"], y: Float[Tensor, "*b _"]
    ) -> Tensor:
        """The layer's output with the adapter's change."""
        tensors: dict[str, Any] = {name: getattr(module, site.attribute(name)) for name in site.specs}
        mesh = next(iter(tensors.values())).device_mesh
        x, y = self.split.local(site.path, mesh, x, y)
        x = x.to(y.dtype)  # the layer's output says in which dtype it computes

        def method(c: Scale, y: Tensor, x: Tensor) -> Tensor:
            local = {name: tensor.to_local() for name, tensor in tensors.items()}
            factors: Any = lookup(site.cfg.variant).low_rank(Layer(module, site, y.dtype, c, instead=local))
            form: Any = LowRank(*factors)
            return self.split.add(y, x, form.a, form.b, mesh, form.s, form.dropout, form.shift)

        new: Tensor = method(scale, y, x) if scale.rows is None else scale.rows.run(site.path, method, y, x)
        return new


@torch.no_grad()
def share_whole(model: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Give all processes of a tensor-parallel model the first one's numbers of the tensors that each has whole: they
    may have drawn others."""
    mesh = mesh_of(model)
    for tensor in () if mesh is None else tensors:
        if not is_dtensor(tensor):
            dist.broadcast(tensor.detach(), group=mesh.get_group(), group_src=0)


def check_tokens_are_whole(model: nn.Module) -> None:
    """TargetError for sequence parallelism: on a whole layer, gradients would be those of a part of the tokens."""
    for path, module in model.named_modules():
        weight: Any = module._parameters.get("weight")
        if is_parallel(module) and is_dtensor(weight) and all(p.is_replicate() for p in weight.placements):
            problem = f"{path}: each process computes it for a part of the tokens (sequence parallelism)"
            raise TargetError(f"{problem}\n  leave it out of the plan, or shard the model by fully_shard")


def parts_of(site: Site) -> Parts | None:
    """How the tensors of a new site are sharded, whose module is_parallel; None of a block, whose stream is whole.

    Raises:
        TargetError: for a layer or a method that can't be sharded.
    """
    if site.base.kind is BLOCK:
        return None
    split = split_of(site.base)
    axes = _axes(site, split)
    if axes is None:
        problem = f"{site.cfg.variant!r} isn't two factors A and B alone, which could be sharded with this layer"
        raise TargetError(f"{site.path}: {problem} (tensor parallelism)\n  use lora, or {CURE}")
    return Parts(split, axes)


def _axes(site: Site, split: Split) -> dict[str, int | None] | None:
    """The axis of each tensor, by its name; None for a method whose tensors don't say theirs."""
    variant = lookup(site.cfg.variant)
    more = [part for part in MORE if getattr(variant, part) is not getattr(Variant, part)]
    if more or variant.forward_input is not None or variant.low_rank is Variant.low_rank:
        return None
    if site.base_weight != "unused" or any(spec.saved != "always" or spec.dtype for spec in site.specs.values()):
        return None
    tensors = {name: torch.empty(spec.shape, device="meta") for name, spec in site.specs.items()}
    if (factors := variant.low_rank(Layer(site.module, site, scale=ONE, instead=tensors))) is None:
        return None
    form, names = LowRank(*factors), {id(tensor): name for name, tensor in tensors.items()}
    a, b = names.get(id(form.a)), names.get(id(form.b))
    rest = [name for name in tensors if name not in (a, b) and not site.specs[name].is_shift]
    if a is None or b is None or rest or form.gain is not None or isinstance(form.s, Tensor):
        return None
    over = split.over_outputs
    return {name: (None if over else 1) if name == a else (0 if over else None) for name in tensors}
