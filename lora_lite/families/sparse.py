"""Methods that train n numbers at n places of the weight, or of a transform of it.

Where the places are is a table (n,) of row-major indices into (o, i).
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.variant import Layer, LowRank, ParamSpec
from ..errors import ConfigError
from ..ops.low_rank import WIDE, is_traced_or_transformed
from ..ops.recompute import add_dense, recomputed
from ..ops.sparse import Rows, add_sparse, by_rows, is_sparse_enough
from .dense import Delta, as_low_rank

Branch = Callable[..., Float[Tensor, "n o"]]
GATHERED = 8
"""The cost of a number that is gathered and scattered, in products of a matrix (measured on a CPU: 5 to 10)."""


def table(d_in: int, d_out: int, n: int, what: str, **options: Any) -> ParamSpec:
    """The table of n places at a layer (d_out, d_in).

    what        the fields of the config that n comes from, for the error where the layer has fewer places
    options     the rest of its spec
    """
    size = d_out * d_in
    if not 0 < n <= size:
        raise ConfigError(
            f"{what}: {n} places of a ({d_out}, {d_in}) weight, which has {size}\n"
            f"  choose another number, there alone with per_layer, or leave the layer out with exclude_names"
        )
    return ParamSpec((n,), dtype=torch.int32 if size < 2**31 else torch.int64, below=size, **options)


def seeded_table(d_in: int, d_out: int, n: int, what: str, seed: int) -> ParamSpec:
    """The table of `random_places`, which no file holds: the seed gives them again."""

    def fill(places: Tensor) -> None:
        places.copy_(random_places(d_out * d_in, n, seed))

    return table(d_in, d_out, n, what, init=fill, saved="never")


@lru_cache(maxsize=16)
def random_places(size: int, n: int, seed: int) -> Int[Tensor, "n"]:
    """The first n of a seeded permutation of `size`, as PEFT draws them; layers of one shape share them."""
    return torch.randperm(size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:n].clone()


def with_branch(
    layer: Layer,
    x: Float[Tensor, "*b i"],
    y: Float[Tensor, "*b o"],
    f: Delta,
    branch: Branch,
    cost: int,
    *tensors: Tensor,
) -> Float[Tensor, "*b o"]:
    """y + c x f(*tensors)ᵀ at the layer's scale c; ΔW = f(*tensors) (o, i) is never kept, and x is.

    branch      the same product of rows (n, i) without ΔW, for so few of them that it's the smaller work
    cost        of a row of it, where a product with ΔW costs o i, and ΔW as much again, whatever the rows
    """
    rows, (o, i) = x.numel() // x.shape[-1], (layer.out_features, layer.in_features)
    if rows * cost > o * i or not rows or is_traced_or_transformed():  # no Fourier transform takes no rows
        return add_dense(y, x, f, *tensors, s=layer.scale)
    change = recomputed(branch, wide(x).reshape(rows, i), *tensors)  # (n, o)
    return y + (change * layer.scale).to(y.dtype).view(y.shape)


def with_entries(
    layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"], values: Tensor, places: Tensor
) -> Float[Tensor, "*b o"]:
    """`with_branch` of a ΔW that is `values` (n,) at `places` (n,) and zero elsewhere."""
    o, i = layer.out_features, layer.in_features
    if not layer.in_graph and is_sparse_enough(x, len(values), o, i):
        return add_sparse(y, x, values, rows_of(layer, places, o, i), layer.scale)
    cost = GATHERED * len(values)
    return with_branch(layer, x, y, partial(scattered, o, i), partial(gathered, o), cost, values, places)


def rows_of(layer: Layer, places: Int[Tensor, "*two n"], o: int, i: int) -> Rows:
    """The places of (o, i) row by row; remembered at inference."""
    if layer.training or torch.is_grad_enabled():
        return by_rows(places, o, i)
    return Rows(*layer.constant("rows", partial(by_rows, o=o, i=i), places))


def entries_as_low_rank(layer: Layer, values: Tensor, places: Tensor) -> LowRank:
    """The same for `low_rank`."""
    return as_low_rank(layer, partial(scattered, layer.out_features, layer.in_features), values, places)


def scattered(o: int, i: int, values: Float[Tensor, "n"], places: Int[Tensor, "n"]) -> Float[Tensor, "o i"]:
    """ΔW; numbers at one place add up."""
    add = Tensor.scatter_add if is_traced_or_transformed() else Tensor.scatter_add_  # in place, or vmap could not
    return add(values.new_zeros(o * i), 0, places.long(), values).view(o, i)


def gathered(
    o: int, x: Float[Tensor, "m i"], values: Float[Tensor, "n"], places: Int[Tensor, "n"]
) -> Float[Tensor, "m o"]:
    """x ΔWᵀ, by n products a row."""
    places, i = places.long(), x.shape[1]
    rows = (places // i).expand(len(x), -1)  # (m, n)
    return x.new_zeros(len(x), o).scatter_add(1, rows, x[:, places % i] * values.to(x.dtype))


def wide(t: Tensor) -> Tensor:
    """t in float32, or in float64 as it is: Fourier transforms know no 16 bits, and sums of many terms want more."""
    return t if t.dtype in WIDE else t.float()
