"""Products with W1 ⊗ W2, which is never formed, and how the sides of a weight are split for it.

    y = (W1 ⊗ W2) x:  with x as X (m, n), row by row,  y as Y = W1 X W2ᵀ (l, k)       W1 (l, m)   W2 (k, n)

That takes m n k + m l k products in the place of l m k n.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def kronecker_product(
    x: Float[Tensor, "*b i"], w1: Sequence[Float[Tensor, "_ _"]], w2: Sequence[Float[Tensor, "_ _"]]
) -> Float[Tensor, "*b o"]:
    """x (W1 ⊗ W2)ᵀ. Each of the two is one matrix, or two whose product it is."""
    m = w1[-1].shape[1]
    h = x.unflatten(-1, (m, x.shape[-1] // m))  # (*b, m, n)
    for factor in reversed(w2):
        h = F.linear(h, factor)
    h = h.mT  # (*b, k, m)
    for factor in reversed(w1):
        h = F.linear(h, factor)
    return h.mT.flatten(-2)  # (*b, l k)


def tucker(
    core: Float[Tensor, "r r *p"], out: Float[Tensor, "r o"], into: Float[Tensor, "r i"]
) -> Float[Tensor, "o i *p"]:
    """A kernel by its core: Σ_jk core_jk out_j into_k (FedPara, arXiv:2108.06098, proposition 3)."""
    return torch.einsum("jk...,jo,ki->oi...", core, out, into)


def split(side: int, factor: int = -1) -> tuple[int, int]:
    """(a, b) with a b = side and a ≤ b: the most alike of those with a ≤ factor, or of all for -1; where the factor
    divides the side, a is the factor."""
    if factor > 0 and side % factor == 0:
        return factor, side // factor
    most = math.isqrt(side) if factor < 0 else min(factor, math.isqrt(side))
    a = next(a for a in range(most, 0, -1) if side % a == 0)
    return a, side // a


@lru_cache  # a forward asks for it
def shapes(
    d_in: int, d_out: int, kernel: tuple[int, ...], r: int, factor: int, both: bool, core: bool
) -> dict[str, tuple[int, ...]]:
    """The tensors of a weight (d_out, d_in): W1, W2, or their factors w1_a, w1_b, w2_a, w2_b, and a kernel's core t2.

    kernel      of a convolution, over whose channels alone it is split; () of any other weight
    both, core  may W1 be of low rank, too; is a kernel that is given by a core
    """
    places = math.prod(kernel)
    (m, n), (low, k) = split(d_in // places, factor), split(d_out, factor)
    is_parted = both and 2 * r < max(low, m)
    sizes: dict[str, tuple[int, ...]] = {"w1_a": (low, r), "w1_b": (r, m)} if is_parted else {"w1": (low, m)}
    if 2 * r >= max(k, n):
        return sizes | {"w2": (k, n, *kernel)}
    if core:  # PEFT's has two places at least
        return sizes | {"w2_a": (r, k), "w2_b": (r, n), "t2": (r, r, *kernel, *[1] * (2 - len(kernel)))}
    return sizes | {"w2_a": (k, r), "w2_b": (r, n * places)}


def sides(tensors: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """W1 and W2 (k, n p) of tensors with these names, each as one matrix or as factors; p are a kernel's places."""
    w1 = [tensors[name] for name in ("w1", "w1_a", "w1_b") if name in tensors]
    w2 = [tensors[name] for name in ("w2", "w2_a", "w2_b") if name in tensors]
    return w1, [tucker(tensors["t2"], *w2).flatten(1)] if "t2" in tensors else [w.flatten(1) for w in w2]
