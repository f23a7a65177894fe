"""Directions that the weights of several layers share, and places of a sparse matrix, as in FRoD (arXiv:2512.23485)."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


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
