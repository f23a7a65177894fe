"""Clusters of points, by Lloyd's iteration (Lloyd 1982), and a low-rank update of each cluster of outputs."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def kmeans(points: Float[Tensor, "n d"], k: int, seed: int, steps: int = 10) -> Int64[Tensor, "n"]:
    """The cluster of each point, of k <= n that all have some: the centres start at points that the seed draws."""
    drawn = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))
    centres = points[drawn[:k].to(points.device)]  # (k, d)
    for _ in range(steps):
        distances, labels = torch.cdist(points, centres).min(1)  # (n,)
        sizes = torch.bincount(labels, minlength=k)
        for empty in (sizes == 0).nonzero()[:, 0]:  # it takes the point that lies furthest from its centre
            furthest = distances.masked_fill(sizes[labels] == 1, -1).argmax()
            sizes[labels[furthest]] -= 1
            labels[furthest], sizes[empty] = empty, 1
        centres = torch.zeros_like(centres).index_add_(0, labels, points) / sizes[:, None]
    return labels


def clustered_factors(
    a: Float[Tensor, "K k R"], b: Float[Tensor, "o k"], cluster: Tensor
) -> tuple[Float[Tensor, "q R"], Float[Tensor, "o q"]]:
    """A (K k, R) and B (o, K k) of ΔW, whose row of cluster c is its row of b times A_c. cluster (o,): integers."""
    stacked, k = a.flatten(0, 1), a.shape[1]
    columns = cluster.long()[:, None] * k + torch.arange(k, device=b.device)  # (o, k)
    return stacked, b.new_zeros(len(b), len(stacked)).scatter(1, columns, b)
