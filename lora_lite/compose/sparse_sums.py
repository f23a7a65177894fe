"""Sums of task vectors of which parts are left out: TIES, DARE and pruning by magnitude, on matrices of one layer.

    τ_t = weight of adapter t times its W' - W      k = density · number of elements
    magnitude   Σ_t  top_k(τ_t)                     the k elements of the greatest size, others 0
    dare        Σ_t  τ_t ⊙ m_t / density            m_t ~ Bernoulli(density)
                Yu et al. 2023, arXiv:2311.03099, section 3
    ties        mean of the top_k(τ_t) that have the sign of Σ_t top_k(τ_t), element by element
                Yadav et al. 2023, arXiv:2306.01708, section 4: trim, elect, disjoint merge; λ is the adapter's scale

Departs    from TIES: the k elements are those of a layer, as in PEFT and mergekit; the paper takes them from the whole
           model's, which then have to be in memory at once
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Rule = Callable[[Sequence[Tensor], float, torch.Generator], Tensor]


def trimmed(delta: Float[Tensor, "*s"], density: float) -> Float[Tensor, "*s"]:
    """The `density` part of the elements that are greatest in size, exactly as many, one at least; others are 0."""
    count = max(1, round(density * delta.numel()))
    flat = delta.flatten()
    largest = flat.abs().topk(count, sorted=False).indices
    return torch.zeros_like(flat).index_copy(0, largest, flat[largest]).view_as(delta)


def magnitude(deltas: Sequence[Float[Tensor, "*s"]], density: float, generator: torch.Generator) -> Tensor:
    """The sum of what is left of each."""
    return torch.stack([trimmed(delta, density) for delta in deltas]).sum(0)


def dare(deltas: Sequence[Float[Tensor, "*s"]], density: float, generator: torch.Generator) -> Tensor:
    """The sum of what chance has left of each, divided by the density: its expectation is the sum itself."""
    draws = (torch.rand(delta.shape, generator=generator).to(delta.device) < density for delta in deltas)
    terms = [delta * drawn / density for delta, drawn in zip(deltas, draws, strict=True)]
    return torch.stack(terms).sum(0)


def ties(deltas: Sequence[Float[Tensor, "*s"]], density: float, generator: torch.Generator) -> Tensor:
    """The mean, by element, over the trimmed ones that have the sign of their sum."""
    left = torch.stack([trimmed(delta, density) for delta in deltas])  # (t, *s)
    agrees = (left.sign() == left.sum(0).sign()) & (left != 0)  # (t, *s)
    return (left * agrees).sum(0) / agrees.sum(0).clamp_min(1)


RULES: dict[str, Rule] = {"ties": ties, "dare": dare, "magnitude": magnitude}
