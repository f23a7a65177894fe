"""Rotations near the identity: R = I + T, where T is formed by itself and is 0 exactly where Q is.

    exact      R = (I + Q)(I - Q)⁻¹                         T = 2 (I - Q)⁻¹ Q                  orthogonal
    n terms    R = (I + Q)(I + Q + ... + Qⁿ⁻²)              T = 2Q + 2Q² + ... + 2Qⁿ⁻² + Qⁿ⁻¹    nearly so for a small Q

Both turn the same way for a skew Q = -Qᵀ. A difference R - I would lose the digits of a small turn, T keeps them.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def skew(v: Float[Tensor, "*n p"], s: int) -> Float[Tensor, "*n s s"]:
    """Q = -Qᵀ with the p = s (s - 1) / 2 numbers of each row above its diagonal, row by row."""
    rows, columns = torch.triu_indices(s, s, 1, device=v.device)
    upper = v.new_zeros(*v.shape[:-1], s, s)
    upper[..., rows, columns] = v
    return upper - upper.mT


def bounded(q: Float[Tensor, "*n s s"], eps: float | None) -> Float[Tensor, "*n s s"]:
    """Q, shrunk to ‖Q‖ = eps where it is larger; Q itself without a bound."""
    if eps is None:
        return q
    norm = torch.linalg.vector_norm(q, dim=(-2, -1), keepdim=True)
    return q * torch.where(norm > eps, eps / (norm + 1e-12), 1)


def rotation_less_identity(q: Float[Tensor, "*n s s"], terms: int | None = None) -> Float[Tensor, "*n s s"]:
    """T, exact or of so many terms; in the dtype of Q, float32 at least."""
    if terms is None:
        eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        turn: Tensor = torch.linalg.solve_ex(eye - q, 2 * q).result  # never singular: Q's eigenvalues are imaginary
        return turn
    turn = q
    for _ in range(terms - 2):  # Horner's scheme: Q (2 + Q (2 + ... Q))
        turn = 2 * q + q @ turn
    return turn


def turned_by(x: Float[Tensor, "*b i"], turn: Float[Tensor, "n s s"]) -> Float[Tensor, "*b i"]:
    """x T of each block of s neighbours with its own T, or with the one T of all blocks: what x R adds to x."""
    blocks = x.unflatten(-1, (-1, turn.shape[-1]))  # (*b, i / s, s)
    turn = turn.to(x.dtype)
    if len(turn) == 1:
        return (blocks @ turn[0]).flatten(-2)
    return torch.einsum("...nk,nkc->...nc", blocks, turn).flatten(-2)
