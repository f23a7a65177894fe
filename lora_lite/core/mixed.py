"""Low-rank updates without gradients, each row by its own adapter: two products for all rows together.

    y_n + s_n B_n A_n x_n        x (n, t, i)   A (n, r, i)   B (n, o, r)

Row n has the factors of the adapter that it has at this layer; ranks that are smaller are filled up with zeros, as are
rows without one. The factors lie together for as long as the block does and their tensors stay as they are.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..ops.low_rank import FEW, is_transformed
from .layer import Layer
from .rows import Batch, Rows
from .scale import Scale
from .state import Site, sites_of
from .variant import LowRank, Variant, lookup


def is_mixed(module: nn.Module, rows: Rows, y: Any) -> bool:
    """Is y what `mixed` has made in this call, with the updates of all adapters at the layer?"""
    known = rows.batch.products.get(id(module))
    return known is not None and known.output() is y


def mixed(module: nn.Module, site: Site, rows: Rows, x: Tensor, y: Tensor) -> Tensor | None:
    """y with the updates of all adapters at the layer, where this is the first of them; y from the others, which have
    no more to do. None where each has to run on its rows."""
    batch = rows.batch
    if torch.is_grad_enabled() or is_compiling() or batch.tokens is not None or is_transformed():
        return None
    if torch.is_autocast_enabled(x.device.type) or x.ndim != 3 or len(x) != batch.size or x.shape[:-1] != y.shape[:-1]:
        return None
    known = batch.products.get(id(module))
    if known is not None and known.is_whole and known.is_of(batch, module) and site is not known.first:
        return y  # the first has looked at the rest
    if known is None or not (known.is_of(batch, module) and known.is_as_it_was(module, x)):
        known = batch.products[id(module)] = _products(module, batch, x)
    if not known.is_whole:
        return None
    if site is not known.first:
        return y
    batch.share(site.path, x.shape[:-1])
    # As one adapter does: few tokens in float32 throughout, rounded once, and many in their own dtype.
    is_few = x.shape[1] * len(x) <= FEW or x.dtype == known.wide[0].dtype
    if not is_few and (not known.narrow or known.narrow[0].dtype != x.dtype):
        known.narrow = known.wide[0].to(x.dtype), known.wide[1].to(x.dtype)
    a, b = known.wide if is_few else known.narrow
    h = torch.bmm(x.to(a.dtype), a)  # (n, t, r)
    out = torch.baddbmm(y.to(b.dtype), h, b).to(y.dtype)
    known.output = weakref.ref(out)
    return out


@dataclass(eq=False)
class Products:
    """The factors of each row at one layer, and the tensors that they were made of."""

    first: Site  # whose hook is the first at work
    version: int  # of the batch's scales
    training: bool  # is the layer in training?
    tensors: list[tuple[Any, str, Tensor, int, int]]  # where each lies, its address and its version, as they were
    configs: list[tuple[Site, Any]]
    hooks: int  # how many the layer has, those of others among them
    is_whole: bool = False  # does every adapter have such factors?
    wide: tuple[Tensor, ...] = ()  # Aᵀ (n, i, r) and s Bᵀ (n, r, o), in float32 or wider
    narrow: tuple[Tensor, ...] = ()  # the same in the dtype of the activations
    output: Callable[[], Tensor | None] = lambda: None  # of the last call

    def is_of(self, batch: Batch, module: nn.Module) -> bool:
        return self.version == batch.version and self.training == module.training

    def is_as_it_was(self, module: nn.Module, x: Tensor) -> bool:
        if len(module._forward_hooks) != self.hooks:
            return False
        for site, cfg in self.configs:
            if site.cfg is not cfg:
                return False
        for place, name, tensor, address, version in self.tensors:
            # Another one may be in its place (functional_call), or other numbers.
            if place.get(name) is not tensor or tensor._version != version or tensor.data_ptr() != address:
                return False
        return not self.wide or self.wide[0].device == x.device


def _products(module: nn.Module, batch: Batch, x: Tensor) -> Products:
    sites = [site for site in sites_of(module).values() if not site.state.plain.is_zero]
    places = [(site.module, site.attribute(name)) for site in sites for name in site.specs]
    places += [(shared, name) for site in sites if (shared := site.method.shared) for name in shared.specs]
    dicts = [(m._parameters if name in m._parameters else m._buffers, name) for m, name in places]
    tensors = [(place, name, place[name]) for place, name in dicts]
    if any(t is not None and t.is_inference() for _, _, t in tensors):  # these have no version
        return Products(sites[0], batch.version, module.training, [], [], len(module._forward_hooks))
    products = Products(
        sites[0],
        batch.version,
        module.training,
        [(place, name, t, t.data_ptr(), t._version) for place, name, t in tensors if t is not None],
        [(site, site.cfg) for site in sites],
        len(module._forward_hooks),
    )
    if not _are_neighbours(module):
        return products
    wide = torch.promote_types(x.dtype, torch.float32)
    factors: list[LowRank | None] = [None] * batch.size
    for site in sites:
        rows = site.state.plain.rows
        if site.through_weight or site.positions is not None or site.state.merged or rows is None:
            return products
        for c, places in rows.groups.items():
            if not c:
                continue
            view, variant = Layer(module, site, wide, scale=Scale(c, False, c == 1)), lookup(site.cfg.variant)
            low_rank = None if variant.low_rank is Variant.low_rank else variant.low_rank(view)
            update = None if low_rank is None else LowRank(*low_rank)
            # A gain or a second method in a row would have to come after the first one's update.
            if update is None or not update.is_dense or update.dropout or update.gain is not None:
                return products
            if update.shift is not None or any(factors[i] is not None for i in places):
                return products
            for i in places:
                factors[i] = update
    target, rank = sites[0].target, max(0 if update is None else update.b.shape[1] for update in factors)
    pairs = [_filled_up(update, rank, target.d_in, target.d_out, x) for update in factors]
    a, b = (torch.stack(side) for side in zip(*pairs, strict=True))  # (n, r, i), (n, o, r)
    # s Bᵀ with r rows in memory: a token's product with it takes less than half as long.
    products.wide, products.is_whole = (a.to(wide).mT, b.to(wide).mT.contiguous()), True
    return products


def _are_neighbours(module: nn.Module) -> bool:
    """Is no hook of anyone else between those of the adapters? It would see the updates of all of them at once."""
    ours = {handle.id for site in sites_of(module).values() for handle in site.handles}
    is_ours = [key in ours for key in module._forward_hooks]
    first, last = is_ours.index(True), len(is_ours) - is_ours[::-1].index(True)
    return all(is_ours[first:last])


def _filled_up(update: LowRank | None, rank: int, d_in: int, d_out: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """A and s B of a row, with zeros up to a rank."""
    if update is None or update.a is None:
        return x.new_zeros(rank, d_in), x.new_zeros(d_out, rank)
    b, empty = update.b if isinstance(update.s, float) and update.s == 1 else update.b * update.s, rank - len(update.a)
    return (F.pad(update.a, (0, 0, 0, empty)), F.pad(b, (0, empty))) if empty else (update.a, b)
