"""GraLoRA: a low-rank update for each block of the weight (Jung et al. 2025, arXiv:2505.20355, section 3).

    y_j = (W x + b)_j + s Σ_n B_jn A_nj x_n        x_n (i/k,)   y_j (o/k,): x and y in k parts   s = α/(r + h)
    A_nj (r/k, i/k)   B_jn (o/k, r/k);   hybrid: + s B_g A_g x    A_g (h, i)   B_g (o, h)

Identity   the B are 0, bit-exact
Base       never read: any layer kind
Departs    with a hybrid rank, PEFT draws dropout twice; here one mask is for both. The backward keeps x and the factors
Checked    against PEFT GraloraConfig, hybrid too: outputs, gradients, three AdamW steps
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.validate import is_number
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..errors import ConfigError
from ..families.factors import as_low_rank, with_factors

__all__ = ["GraLoRA", "GraLoRAConfig"]


@dataclass(frozen=True, kw_only=True)
class GraLoRAConfig(AdapterConfig):
    """k: into how many parts each side goes; it divides r too. hybrid_r: h, of a LoRA beside it. dropout: of both."""

    variant: str = "gralora"
    r: int = 32
    alpha: float = 64.0
    k: int = 2
    hybrid_r: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_number(self.alpha) and self.alpha > 0, "alpha", "a number above 0")
        self.require(type(self.k) is int and self.k > 0 and self.r % self.k == 0, "k", "a number that divides r")
        self.require(type(self.hybrid_r) is int and self.hybrid_r >= 0, "hybrid_r", "a rank, or 0")


@register
class GraLoRA:
    name = "gralora"
    config = GraLoRAConfig
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: GraLoRAConfig) -> dict[str, ParamSpec]:
        k, r, h = cfg.k, cfg.r, cfg.hybrid_r
        if d_in % k or d_out % k:
            problem = f"GraLoRAConfig(k={k}): doesn't divide the sides of a ({d_out}, {d_in}) weight"
            raise ConfigError(f"{problem}\n  choose another k, there alone with per_layer, or leave the layer out")
        bound = (k / d_in) ** 0.5  # kaiming's, of each part's (r, i/k)
        specs = {
            "lora_a": ParamSpec((k, d_in // k, r), lambda t: t.uniform_(-bound, bound), keep_dtype=True),
            "lora_b": ParamSpec((k, r, d_out // k), keep_dtype=True),
        }
        general = {"lora_general_a": ParamSpec((h, d_in), "kaiming", keep_dtype=True)}
        general |= {"lora_general_b": ParamSpec((d_out, h), keep_dtype=True)}
        return specs | (general if h else {})

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        return as_low_rank(layer, partial(_factors, layer.cfg), *_tensors(layer), dropout=layer.cfg.dropout)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        return with_factors(layer, x, y, partial(_factors, layer.cfg), *_tensors(layer), dropout=layer.cfg.dropout)


def _tensors(layer: Layer) -> list[Tensor]:
    general = [layer.lora_general_a, layer.lora_general_b] if layer.cfg.hybrid_r else []
    return [layer.lora_a, layer.lora_b, *general]


def _factors(
    cfg: GraLoRAConfig, a: Float[Tensor, "k m r"], b: Float[Tensor, "k r n"], *general: Tensor
) -> tuple[Tensor, Tensor]:
    """s A (k r + h, i) and B (o, k r + h), of zeros outside of the blocks: two products in place of k + k²."""
    parts = b.unflatten(1, (cfg.k, -1)).permute(1, 0, 3, 2)  # (n, j, o/k, r/k)
    down = torch.block_diag(*a.mT)  # (k r, i), its rows as (n, j, r/k)
    up = torch.cat([torch.block_diag(*part) for part in parts], dim=1)  # (o, k r)
    if general:
        down, up = torch.cat([down, general[0]]), torch.cat([up, general[1]], dim=1)
    return cfg.alpha / (cfg.r + cfg.hybrid_r) * down, up
