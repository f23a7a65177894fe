"""The leading singular triplets of a matrix alone (Musco and Musco 2015, arXiv:1504.05477, algorithm 2)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

OVERSAMPLE, DEPTH, SEED = 8, 10, 0
LOW_RANK = 1e-9
"""The share of a matrix's norm up to which what lies outside of some directions is float64's rounding."""

Svd = tuple[Float[Tensor, "o r"], Float[Tensor, "r"], Float[Tensor, "i r"]]


def top_svd(w: Float[Tensor, "o i"], r: int) -> Svd:
    """U, S, V of the top r of W = U S Vᵀ, all of which is computed."""
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    return u[:, :r], s[:r], vt[:r].mT


def leading_svd(w: Float[Tensor, "o i"], r: int) -> Svd:
    """U, S, V of the top r of W = U S Vᵀ: the best in a block Krylov space of 10 (r + 8) dimensions, seeded.

    Plain power iteration of the same cost keeps only the last block, and is fifty times further off where the singular
    values lie close, as a weight's do. Where the space would be half of all, the full SVD is cheaper and is taken.
    """
    block = r + OVERSAMPLE
    if 2 * block * DEPTH > min(w.shape):
        return top_svd(w, r)
    generator = torch.Generator().manual_seed(SEED)
    power = w @ torch.randn(w.shape[1], block, generator=generator).to(w)  # (o, block): W G, then W Wᵀ W G ...
    basis = w.new_empty(w.shape[0], block * DEPTH)
    for start in range(0, block * DEPTH, block):
        earlier = basis[:, :start]
        power = torch.linalg.qr(power - earlier @ (earlier.mT @ power)).Q
        basis[:, start : start + block] = power
        power = w @ (w.mT @ power)
    basis = torch.linalg.qr(basis).Q  # (o, q): of a matrix of low rank the last blocks are rounding, and overlap
    projected = basis.mT @ w  # (q, i)
    squares, vectors = torch.linalg.eigh(projected @ projected.mT)  # ascending, of a (q, q) matrix: cheaper than an SVD
    u = basis @ vectors[:, -r:].flip(1)
    return u, squares[-r:].flip(0).clamp_min(0).sqrt(), F.normalize(w.mT @ u, dim=0)


def iterated_svd(w: Float[Tensor, "o i"], r: int, rounds: int) -> Svd:
    """U, S, V of the top r of W = U S Vᵀ by subspace iteration of r dimensions, seeded (Halko et al. 2011,
    arXiv:0909.4061, algorithm 4.4): torch.svd_lowrank(w, q=r, niter=rounds), but for what is drawn."""
    basis = torch.randn(w.shape[1], r, generator=torch.Generator().manual_seed(SEED)).to(w)  # (i, r)
    for _ in range(rounds):
        basis = torch.linalg.qr(w.mT @ torch.linalg.qr(w @ basis).Q).Q
    basis = torch.linalg.qr(w @ basis).Q  # (o, r)
    u, s, v = top_svd(basis.mT @ w, r)
    return basis @ u, s, v


def principal_factors(
    w: Float[Tensor, "o i"], r: int, in_both: bool, niter: int | None = None, seed: int = 0
) -> tuple[Float[Tensor, "o r"], Float[Tensor, "r i"]]:
    """U, V with U V = the top r of W's SVD: the singular values in U, or their roots in both.

    niter       of torch's randomised SVD, seeded, which leaves torch's generators as they were; None: the exact one
    """
    if niter is None:
        u, s, v = top_svd(w, r)
    else:
        on_cpu = w.device.type == "cpu"
        with torch.random.fork_rng([] if on_cpu else [w.device], device_type="cuda" if on_cpu else w.device.type):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(w, q=r, niter=niter)
    root = s.sqrt()
    return (u * root, root[:, None] * v.mT) if in_both else (u * s, v.mT)


def low_rank_factors(delta: Float[Tensor, "o i"], rank: int) -> tuple[Float[Tensor, "k i"], Float[Tensor, "o k"]]:
    """The A, B with the least ‖delta - B A‖: U S Vᵀ to this rank at most, A = √S Vᵀ, B = U √S."""
    q = min(rank + OVERSAMPLE, *delta.shape)
    probe = torch.randn(delta.shape[1], q, dtype=delta.dtype, generator=torch.Generator().manual_seed(SEED))
    basis = torch.linalg.qr(delta @ probe.to(delta.device))[0]  # (o, q): all of a range of up to q dimensions
    projected = basis.mT @ delta  # (q, i)
    if (delta - basis @ projected).norm() > LOW_RANK * delta.norm():
        u, s, v = top_svd(delta, rank)
    else:
        u, s, v = top_svd(projected, rank)
        u = basis @ u
    return balanced_factors((u, s, v), rank)


def product_svd(
    b: Float[Tensor, "o r"], a: Float[Tensor, "r i"]
) -> tuple[Float[Tensor, "o k"], Float[Tensor, "k"], Float[Tensor, "i k"]]:
    """U, S, V of B A by those of a small matrix: B = Q_b R_b, Aᵀ = Q_a R_a, and R_b R_aᵀ has the same values."""
    q_b, r_b = torch.linalg.qr(b)  # (o, k), (k, r) with k = min(o, r)
    q_a, r_a = torch.linalg.qr(a.mT)  # (i, l), (l, r)
    u, s, v = top_svd(r_b @ r_a.mT, min(len(r_b), len(r_a)))
    return q_b @ u, s, q_a @ v


def product_norm(b: Float[Tensor, "o r"], a: Float[Tensor, "r i"]) -> float:
    """‖B A‖, Frobenius, in O((o + i) r²): the product is never formed."""
    return float((torch.linalg.qr(b).R @ torch.linalg.qr(a.mT).R.mT).norm())


def energy_rank(s: Float[Tensor, "n"], energy: float) -> int:
    """The least rank, 1 at least, whose singular values hold this share of Σ s², which is ‖W‖² of Frobenius; of a share
    of 1, all but float64's rounding."""
    # By what is left out: sums from the top would round the last small values away.
    rest = s.double().square().flip(0).cumsum(0).flip(0)  # rest[k]: all that a rank of k leaves out
    return max(1, int((rest > max(1 - energy, LOW_RANK**2) * rest[:1]).sum()))


def balanced_factors(svd: Svd, rank: int) -> tuple[Float[Tensor, "k i"], Float[Tensor, "o k"]]:
    """A = √S Vᵀ and B = U √S of the top `rank` triplets."""
    u, s, v = svd
    root = s[:rank].sqrt()
    return root[:, None] * v[:, :rank].mT, u[:, :rank] * root
