"""Starts of LoRA that take a part s B0 A0 out of W. The base stays, and what acts is the difference from that part.

    y = (W - s B0 A0) x + b + s B A x       A, A0 (r, i)   B, B0 (o, r)   s = α/r
      = y_base + s [B ΔB] [ΔA; A0] x        ΔA = A - A0   ΔB = B - B0

A0 and B0 are frozen buffers in the file, so a load needs no SVD and no data. The differences are formed in their
storage dtype: they are exactly 0 at the start, and nothing cancels in bfloat16.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.layer import Layer
from ..core.validate import positive_or_none
from ..core.variant import ParamSpec
from .factors import check_directions, with_factors

__all__ = ["ResidualConfig", "forward", "from_svd", "is_trained", "low_rank", "param_specs", "start"]


@dataclass(frozen=True, kw_only=True)
class ResidualConfig(AdapterConfig):
    """alpha: None means r."""

    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(positive_or_none(self.alpha), "alpha", "a number above 0, or None for r")

    @property
    def scaling(self) -> float:
        """The factor s."""
        return 1.0 if self.alpha is None else self.alpha / self.r


def param_specs(d_in: int, d_out: int, cfg: ResidualConfig) -> dict[str, ParamSpec]:
    """A, B, A0 and B0. Raises ConfigError where the weight has fewer directions than r."""
    check_directions(cfg, d_in, d_out)
    a, b = (cfg.r, d_in), (d_out, cfg.r)
    return {
        "lora_A": ParamSpec(a, keep_dtype=True),
        "lora_B": ParamSpec(b, keep_dtype=True),
        "lora_A0": ParamSpec(a, trainable=False, keep_dtype=True),
        "lora_B0": ParamSpec(b, trainable=False, keep_dtype=True),
    }


def is_trained(layer: Layer) -> bool:
    """Have A or B left their start?"""
    return not (torch.equal(layer.lora_A, layer.lora_A0) and torch.equal(layer.lora_B, layer.lora_B0))


def start(layer: Layer, a: Float[Tensor, "r i"], b: Float[Tensor, "o r"]) -> None:
    """Let A and B start at these factors of the part that is taken out."""
    layer.lora_A0.copy_(a)
    layer.lora_B0.copy_(b)
    layer.lora_A.copy_(layer.lora_A0)  # as stored, so that ΔA is 0 in every dtype
    layer.lora_B.copy_(layer.lora_B0)


def from_svd(layer: Layer, u: Float[Tensor, "o r"], s: Float[Tensor, "r"], v: Float[Tensor, "i r"]) -> None:
    """Take U S Vᵀ out: A0 = √(S/s) Vᵀ, B0 = U √(S/s)."""
    root = (s / layer.cfg.scaling).sqrt()  # (r,)
    start(layer, root[:, None] * v.mT, u * root)


def low_rank(layer: Layer) -> tuple[Float[Tensor, "k i"], Float[Tensor, "o k"], float]:
    """The change as one product of rank 2r."""
    return *_factors(1.0, *_tensors(layer)), layer.scale * layer.cfg.scaling


def _tensors(layer: Layer) -> tuple[Tensor, ...]:
    return layer.lora_A, layer.lora_B, layer.lora_A0, layer.lora_B0


def _factors(s: float, a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """[ΔA; A0] (2r, i) and s [B ΔB] (o, 2r): B ΔA + ΔB A0 = B A - B0 A0, and exactly 0 at the start."""
    a0, b0 = a0.to(a.dtype), b0.to(b.dtype)  # a cast of parameters alone must not part them
    return torch.cat([a - a0, a0]), torch.cat([b, b - b0], dim=1) * s


def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
    return with_factors(layer, x, y, partial(_factors, layer.cfg.scaling), *_tensors(layer))
