"""RandLoRA: full-rank sums of random matrices, scaled by small ones (Albert et al. 2025, arXiv:2502.00987).

    y = W x + b + (α/r) D drop(x)       D = B̂ Â (p, q), transposed where o < i     q = min(o, i), p = max(o, i)
    Â (r N, q)  the r N slices λ[k, n] A[k] ⊙ γ[n];  B̂ (p, r N)  the first N of B's     N = ⌈q/r⌉
    A (r, 1, Q) and B (P, ⌈Q/r⌉, r) once, frozen, of the largest layer;  λ (r, N), γ (N, q) at each, trained

Identity   λ = 0, bit-exact
Base       never read: any layer kind
Departs    as PEFT's code: Â counts its slices k first and B̂ n first, so slice (k, n) of one meets another of the other.
           A and B are drawn as there in bfloat16, so a seed gives PEFT's where its machine has that; again at load, or
           with save_projection=True they are in the file
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
from ..families.factors import SeededConfig, as_low_rank, at_inference, with_factors
from ..families.projections import draw_bases, ordered_factors, scaled_slices
from ..ops.low_rank import add_low_rank

__all__ = ["RandLoRA", "RandLoRAConfig"]

_OF_DRAWS = "save_projection", "sparse", "very_sparse"


@dataclass(frozen=True, kw_only=True)
class RandLoRAConfig(SeededConfig):
    """alpha: s = alpha/r. sparse: A and B of -1, 0 and 1, as 1 : 4 : 1; very_sparse: as 1 : 2(√Q - 1) : 1."""

    variant: str = "randlora"
    r: int = 32
    alpha: float = 640.0
    save_projection: bool = False
    sparse: bool = False
    very_sparse: bool = False
    SAME_AT_ALL_LAYERS: ClassVar[Any] = (*SeededConfig.SAME_AT_ALL_LAYERS, "r", "seed", *_OF_DRAWS)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_number(self.alpha) and self.alpha > 0, "alpha", "a number above 0")


@register
class RandLoRA:
    name, config = "randlora", RandLoRAConfig
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
        f, _, *tensors = _parts(layer, layer.lora_lambda.dtype)
        return as_low_rank(layer, f, *tensors, dropout=layer.cfg.dropout)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        f, s, *tensors = _parts(layer, x.dtype)
        if not at_inference(layer):
            return with_factors(layer, x, y, f, *tensors, dropout=layer.cfg.dropout)
        *small, wide = tensors  # B̂ is shared: no layer keeps a copy
        narrow = layer.constant("narrow", partial(scaled_slices, s), *small, x.new_empty(0))
        return add_low_rank(y, x, *ordered_factors(layer.in_features, narrow, wide), layer.scale)


def _parts(layer: Layer, dtype: torch.dtype) -> tuple[Any, ...]:
    """The function that gives A and B, s, and the function's tensors: λ, γ, and what is taken of the shared A and B."""
    (q, p), i, cfg = sorted((layer.in_features, layer.out_features)), layer.in_features, layer.cfg
    s, like = cfg.alpha / cfg.r, torch.empty(0, dtype=dtype)

    def factors(scales: Tensor, gamma: Tensor, a: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
        return ordered_factors(i, scaled_slices(s, scales, gamma, a, like), wide)

    shared = layer.lora_A[..., :q], layer.lora_B[:p, : math.ceil(q / cfg.r)]
    return factors, s, layer.lora_lambda, layer.lora_gamma, *shared
