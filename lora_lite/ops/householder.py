"""Products of Householder reflections as H = I + L Mᵀ, where L Mᵀ is 0 exactly where the reflections cancel.

A pair of reflections along unit vectors a and b, with d = b - a, so that a·b = 1 - d·d / 2, is

    (I - 2 a aᵀ)(I - 2 b bᵀ) = I + 2 a dᵀ - 2 (d + (d·d) a) bᵀ = I + L_k M_kᵀ
    L_k = [2a, -2 (d + (d·d) a)]      M_k = [d, b]

in which each term has d, so equal vectors give the identity, bit for bit. The product of all pairs is

    Π_k (I + L_k M_kᵀ) = I + L (I - N)⁻¹ Mᵀ     N = Mᵀ L above its diagonal of pairs, else 0

(Bischof and Van Loan 1987, "The WY representation for products of Householder matrices").
"""

import torch
from jaxtyping import Float
from torch import Tensor

Factors = tuple[Float[Tensor, "i k"], Float[Tensor, "i k"]]


def reflections(u: Float[Tensor, "i r"]) -> Factors:
    """L, M (i, r) of H_1 H_2 ... H_r, one reflection along each column; an odd last one is alone in its pair."""
    r = u.shape[1]
    unit = u / torch.linalg.vector_norm(u, dim=0)
    a, b = unit[:, 0 : r - 1 : 2], unit[:, 1::2]  # (i, r // 2)
    d = b - a
    left = torch.stack([2 * a, -2 * (d + d.square().sum(0) * a)], dim=2).flatten(1)  # (i, r), pair after pair
    right = torch.stack([d, b], dim=2).flatten(1)
    if r % 2:
        left, right = torch.cat([left, -2 * unit[:, -1:]], dim=1), torch.cat([right, unit[:, -1:]], dim=1)
    pair = torch.arange(r, device=u.device) // 2
    n = (right.mT @ left) * (pair[:, None] < pair)  # (r, r)
    eye = torch.eye(r, dtype=u.dtype, device=u.device)
    return torch.linalg.solve_triangular(eye - n, left, upper=True, left=False, unitriangular=True), right


def subspace_reflections(u: Float[Tensor, "i r"], start: Float[Tensor, "i r"]) -> Factors:
    """L, M (i, 2r) of (I - 2 P)(I - 2 P0), P and P0 the projections on the columns of u and of `start`.

    With bases Q and Q0 of the two, D = Q - Q0 and Qᵀ Q0 = I + Dᵀ Q0, it is

        I - 2 Q Dᵀ + 2 D Q0ᵀ + 4 Q (Dᵀ Q0) Q0ᵀ

    A `start` of zeros stands for P0 = 0.
    """
    q, q0 = torch.linalg.qr(u).Q, torch.linalg.qr(start).Q * start.any()
    d = q - q0
    return torch.cat([-2 * q, 2 * d + 4 * q @ (d.mT @ q0)], dim=1), torch.cat([d, q0], dim=1)
