"""Directions that the weights of several layers share, and places of a sparse matrix, as in FRoD (arXiv:2512.23485)."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from .recompute import frozen_linear, recomputed
from .sparse import Rows, add_sparse

LEAST = 1e-5
"""The share of the largest λ0 below which one is float32's rounding: the weight has no such direction."""


def joint_directions(weights: list[Float[Tensor, "_ i"]], alpha: float) -> Float[Tensor, "i i"]:
    """V of W_l = U_l Λ_l Vᵀ for all l, by the paper's hierarchical decomposition.

    All W_l above one another are Q R, with rows Q_l; the eigenvectors E of T = mean (Q_lᵀ Q_l + α I)⁻¹ give V = Rᵀ E.
    With fewer rows than columns, V are the right singular vectors.
    """
    stacked = torch.cat(weights)
    if len(stacked) < stacked.shape[1]:
        return torch.linalg.svd(stacked).Vh.mT
    q, r = torch.linalg.qr(stacked)
    ridge = alpha * torch.eye(len(r), dtype=r.dtype, device=r.device)
    inverses = [torch.linalg.inv(part.mT @ part + ridge) for part in q.split([len(w) for w in weights])]
    return r.mT @ torch.linalg.eigh(torch.stack(inverses).mean(0)).eigenvectors


def joint_columns(w: Float[Tensor, "o i"], v: Float[Tensor, "i i"]) -> Float[Tensor, "i o"]:
    """Λ0 Uᵀ of W = U Λ0 Vᵀ, in float64. λ0 are the lengths of its rows."""
    return torch.linalg.solve(v.double(), w.double().mT)


def off_diagonal(d: int, count: int, generator: torch.Generator) -> Int64[Tensor, "2 n"]:
    """The rows and columns of places in a (d, d) matrix beside its diagonal, drawn without replacement."""
    drawn = torch.randperm(d * d - d, generator=generator)[:count]
    rows, columns = drawn // (d - 1), drawn % (d - 1)
    return torch.stack([rows, columns + (columns >= rows)])


def sparse_product(z: Float[Tensor, "*b i"], values: Float[Tensor, "n"], places: Int64[Tensor, "2 n"]) -> Tensor:
    """z Sᵀ (*b, i), for S (i, i) with these values at these places and 0 elsewhere."""
    rows, columns = places
    d = z.shape[-1]
    if z.numel() // d * len(values) <= d * d:  # few tokens: no matrix
        return torch.zeros_like(z).index_add(-1, rows, z.index_select(-1, columns) * values)
    return z @ z.new_zeros(d, d).index_put((rows, columns), values).mT


def joint_change(
    x: Float[Tensor, "*b i"],
    l1: Float[Tensor, "i"],
    s: Float[Tensor, "n"],
    l0: Float[Tensor, "i"],
    v: Float[Tensor, "i i"],
    inverse: Float[Tensor, "i i"],
    places: Int64[Tensor, "2 n"],
    rows: Rows | None = None,
) -> Float[Tensor, "*b i"]:
    """V⁻ᵀ Λ0⁻¹ (S + diag(λ - λ0)) Vᵀ x: what W's input gains where W = U Λ0 Vᵀ becomes U (S + diag(λ)) Vᵀ.

    Directions with λ0 = 0 take no part. The backward keeps Vᵀ x in x's place, since V isn't trained.

    rows    the places by rows, where `is_sparse_enough` says yes
    """

    def mixed(z: Tensor, l1: Tensor, s: Tensor, l0: Tensor) -> Tensor:
        l0 = l0.to(l1.dtype)  # a cast of parameters alone must not part them
        unit = 1 / torch.where(l0 > 0, l0, torch.inf)  # Λ0⁻¹ (i,); no inverse of 0, whose gradient is NaN
        scaled = z * (l1 - l0).to(z.dtype)
        product = sparse_product(z, s.to(z.dtype), places) + scaled if rows is None else add_sparse(scaled, z, s, rows)
        return product * unit.to(z.dtype)

    z = frozen_linear(x, v.mT)  # Vᵀ x (*b, i)
    return frozen_linear(recomputed(mixed, z, l1, s, l0), inverse.mT)
