"""RandLoRA: full-rank sums of random matrices, scaled by small ones (Albert et al. 2025, arXiv:2502.00987).

    y = W x + b + (α/r) D drop(x)       D = B̂ Â (p, q), transposed where o < i     q = min(o, i), p = max(o, i)
    Â (r N, q)  the r N slices λ[k, n] A[k] ⊙ γ[n];  B̂ (p, r N)  the first N of B's     N = ⌈q/r⌉
    A (r, 1, Q) and B (P, ⌈Q/r⌉, r) once, frozen, of the largest layer;  λ (r, N), γ (N, q) at each, trained

Identity   λ = 0, bit-exact
Base       never read: any layer kind
Departs    as PEFT's code: Â counts its slices k first and B̂ n first, so slice (k, n) of one meets another of the other.
           A and B are drawn as there in bfloat16, so a seed gives PEFT's where its machine has that. They are drawn
           again at load; with save_projection=True they are in the file
Checked    against PEFT RandLoraConfig: A and B, dense and sparse, outputs, gradients, three AdamW steps
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.targets import Target
from ..core.validate import is_number
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.factors import SeededConfig, as_low_rank, with_factors
from ..families.projections import draw_bases
from ..ops.low_rank import add_low_rank, is_traced_or_transformed

__all__ = ["RandLoRA", "RandLoRAConfig"]


@dataclass(frozen=True, kw_only=True)
class RandLoRAConfig(SeededConfig):
    """alpha: s = alpha/r. sparse: A and B of -1, 0 and 1, as 1 : 4 : 1; very_sparse: as 1 : 2(√Q - 1) : 1."""

    variant: str = "randlora"
    r: int = 32
    alpha: float = 640.0
    save_projection: bool = False
    sparse: bool = False
    very_sparse: bool = False
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (
        *SeededConfig.SAME_AT_ALL_LAYERS,
        *("r", "seed", "save_projection", "sparse", "very_sparse"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_number(self.alpha) and self.alpha > 0, "alpha", "a number above 0")


@register
class RandLoRA:
    name = "randlora"
    config = RandLoRAConfig
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: RandLoRAConfig) -> dict[str, ParamSpec]:
        q = min(d_in, d_out)
        n = math.ceil(q / cfg.r)
        gamma = ParamSpec((n, q), lambda t: t.fill_(1 / max(n, q)), keep_dtype=True)
        return {"lora_lambda": ParamSpec((cfg.r, n), keep_dtype=True), "lora_gamma": gamma}

    @staticmethod
    def shared_specs(targets: Sequence[Target], cfg: RandLoRAConfig) -> dict[str, ParamSpec]:
        q, p = sorted((max(t.d_in for t in targets), max(t.d_out for t in targets)))
        a, b = (cfg.r, 1, q), (p, math.ceil(q / cfg.r), cfg.r)
        rarity = math.sqrt(q) if cfg.very_sparse else 3.0 if cfg.sparse else None
        fixed: Any = {"trainable": False, "keep_dtype": True, "saved": "always" if cfg.save_projection else "never"}
        first, second = draw_bases(cfg.seed, rarity), draw_bases(cfg.seed, rarity, after=a)
        return {"A": ParamSpec(a, first, **fixed), "B": ParamSpec(b, second, **fixed)}

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        return as_low_rank(layer, *_parts(layer), dropout=layer.cfg.dropout)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        f, *small, wide = _parts(layer)
        if layer.training or torch.is_grad_enabled() or is_traced_or_transformed():
            return with_factors(layer, x, y, f, *small, wide, dropout=layer.cfg.dropout)
        # At inference Â is remembered. Of B̂, which all layers share, no layer keeps a copy.
        narrow = layer.constant("narrow", partial(_narrow, layer.cfg), *small)
        return add_low_rank(y, x, *_in_order(layer, narrow, wide.flatten(1)), layer.scale)


def _parts(layer: Layer) -> tuple[Any, ...]:
    """The function that gives A and B, and its tensors: λ, γ, and of the shared A and B what this layer takes."""
    q, p = sorted((layer.in_features, layer.out_features))

    def factors(scales: Tensor, gamma: Tensor, a: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
        return _in_order(layer, _narrow(layer.cfg, scales, gamma, a), wide.flatten(1))

    n = math.ceil(q / layer.cfg.r)
    return factors, layer.lora_lambda, layer.lora_gamma, layer.lora_A[..., :q], layer.lora_B[:p, :n]


def _narrow(cfg: Any, scales: Tensor, gamma: Tensor, a: Float[Tensor, "r 1 q"]) -> Float[Tensor, "m q"]:
    """s Â, with m = r N."""
    return (cfg.alpha / cfg.r * scales[..., None] * a * gamma).flatten(0, 1)


def _in_order(layer: Layer, narrow: Float[Tensor, "m q"], wide: Float[Tensor, "p m"]) -> tuple[Tensor, Tensor]:
    """A and B of x Aᵀ Bᵀ."""
    return (narrow, wide) if narrow.shape[1] == layer.in_features else (wide.mT, narrow.mT)
