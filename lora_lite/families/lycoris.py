"""The part that LoHa and LoKr share: their config, and how training drops rows of ΔW, or all of it.

LyCORIS (Yeh et al. 2023, arXiv:2309.14859), as PEFT has it.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.validate import is_number
from ..core.variant import Layer

__all__ = ["LycorisConfig", "dropped_rows"]


@dataclass(frozen=True, kw_only=True)
class LycorisConfig(AdapterConfig):
    """rank_dropout: of an output's row of ΔW. module_dropout: of ΔW as a whole.

    use_effective_conv2d    a convolution of more than one place is given by a small core and two factors
    """

    alpha: float = 8.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_number(self.alpha) and self.alpha > 0, "alpha", "a number above 0")
        for name in ("rank_dropout", "module_dropout"):
            value = getattr(self, name)
            self.require(is_number(value) and 0 <= value < 1, name, "a probability below 1")

    @property
    def scaling(self) -> float:
        """The factor s."""
        return self.alpha / self.r

    def has_core(self, kernel: tuple[int, ...]) -> bool:
        """Is a layer with this kernel, () of one that is no convolution, given by a core?"""
        return self.use_effective_conv2d and math.prod(kernel) > 1


def dropped_rows(layer: Layer, like: Tensor, rescale: bool) -> Float[Tensor, "o"] | None:
    """By how much each row of ΔW counts in this forward: 0 where it is dropped; None where nothing is.

    rescale     by the share of rows that this draw keeps
    """
    rank, module = layer.cfg.rank_dropout, layer.cfg.module_dropout
    if not layer.training or not (rank or module):
        return None
    drawn = torch.rand(layer.out_features + 1, generator=layer.generator(like), device=like.device)
    rows = (drawn[1:] > rank).to(like.dtype)  # (o,)
    if rank and rescale:
        rows = rows / rows.mean().clamp(min=1 / len(rows))  # a draw that keeps none gives zeros, and no NaN
    return rows * (drawn[0] > module) if module else rows
