"""MiCA: LoRA from the weight's minor directions, of which A alone is trained (2026, arXiv:2604.01694).

    y = W x + b + s B A drop(x)       A (r, i)   B (o, r), frozen   s = α/r, or α/√r with rslora
    B = the last r columns of U, in the SVD W = U S Vᵀ: what W writes least of

Identity   A = 0, bit-exact
Base       read once, at init, for its SVD; dequantised numbers do. B stays in the file, so a load needs no SVD
Departs    from nothing. PEFT refuses a 4-bit base. The sign of B's columns is LAPACK's, and is in the file
Checked    against PEFT LoraConfig(init_lora_weights="mica"): B, outputs, gradients, three AdamW steps
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.factors import FactorsConfig, check_directions
from ..ops.low_rank import add_low_rank

__all__ = ["MiCA", "MiCAConfig"]


@dataclass(frozen=True, kw_only=True)
class MiCAConfig(FactorsConfig):
    """The fields are a rank and LoRA's scale and dropout."""

    variant: str = "mica"


@register
class MiCA:
    name = "mica"
    config = MiCAConfig
    base_weight = "read"
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: MiCAConfig) -> dict[str, ParamSpec]:
        check_directions(cfg, d_in, d_out)
        return {
            "lora_A": ParamSpec((cfg.r, d_in), keep_dtype=True),
            "lora_B": ParamSpec((d_out, cfg.r), trainable=False, keep_dtype=True),
        }

    @staticmethod
    def init(layer: Layer, cfg: MiCAConfig) -> None:
        u = torch.linalg.svd(layer.dense_weight(), full_matrices=False).U  # (o, min(o, i)), largest first
        layer.lora_B.copy_(u[:, -cfg.r :])

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        dropout = layer.cfg.dropout if layer.training else 0.0
        return LowRank(layer.lora_A, layer.lora_B, layer.scale * layer.cfg.scaling, dropout)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        dropout = layer.cfg.dropout if layer.training else 0.0
        return add_low_rank(y, x, layer.lora_A, layer.lora_B, layer.scale * layer.cfg.scaling, dropout)
