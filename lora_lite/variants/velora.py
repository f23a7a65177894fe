"""VeLoRA: a LoRA that keeps a compressed x for its backward (Miles et al. 2024, arXiv:2405.17991, section 3).

    y = W x + b + s B A drop(x)       A (r, i)   B (o, r)   s = α/r, or α/√r with rslora
    in training ∇A is of x̃ in place of x: its groups x_g (w,), g < G, become s_x (x_g · e) e, for an e of length 1
    "batch_average"  e is the mean direction of this batch's groups        "random"  drawn once

Identity   B = 0, bit-exact
Base       never read: any layer kind. On others than linear layers x is kept, and ∇A is exact
Departs    e of a batch is made anew at each step, and isn't kept. PEFT's "batch_average_once" isn't here: a file
           doesn't say if e was made, so that such a folder becomes "batch_average"
Checked    against PEFT LoraConfig(velora_config=VeloraConfig()): outputs, gradients, three AdamW steps
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.validate import is_number
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.factors import FactorsConfig
from ..ops.compressed import compressed_product, group_width, mean_direction
from ..ops.dropout import dropout_seed, dropped
from ..ops.low_rank import add_low_rank, is_traced_or_transformed
from ..ops.recompute import recomputed

__all__ = ["VeLoRA", "VeLoRAConfig"]


@dataclass(frozen=True, kw_only=True)
class VeLoRAConfig(FactorsConfig):
    """num_groups: G. compression_scale: s_x. init_type: of e, "batch_average" or "random"."""

    variant: str = "velora"
    num_groups: int = 64
    compression_scale: float = 1.0
    init_type: str = "batch_average"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(type(self.num_groups) is int and self.num_groups > 0, "num_groups", "a number of at least 1")
        self.require(is_number(self.compression_scale), "compression_scale", "a number")
        self.require(self.init_type in ("batch_average", "random"), "init_type", '"batch_average" or "random"')


@register
class VeLoRA:
    name = "velora"
    config = VeLoRAConfig
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: VeLoRAConfig) -> dict[str, ParamSpec]:
        def unit(e: Tensor) -> None:
            e.copy_(F.normalize(torch.randn(e.shape), dim=0))

        start = unit if cfg.init_type == "random" else "zeros"
        return {
            "lora_A": ParamSpec((cfg.r, d_in), init="kaiming", keep_dtype=True),
            "lora_B": ParamSpec((d_out, cfg.r), keep_dtype=True),
            "lora_e": ParamSpec((group_width(d_in, cfg.num_groups),), start, trainable=False, keep_dtype=True),
        }

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        dropout = layer.cfg.dropout if layer.training else 0.0
        return LowRank(layer.lora_A, layer.lora_B, layer.scale * layer.cfg.scaling, dropout)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        cfg, a, b, s = layer.cfg, layer.lora_A, layer.lora_B, layer.scale * layer.cfg.scaling
        p = cfg.dropout if layer.training else 0.0
        if is_traced_or_transformed() or not (layer.training and torch.is_grad_enabled()):
            return add_low_rank(y, x, a, b, s, p)  # a graph keeps what it likes
        seed, e = dropout_seed() if p else 0, layer.lora_e
        if cfg.init_type == "batch_average":
            e = mean_direction(dropped(x, p, seed) if p else x, cfg.num_groups)
        h = compressed_product(x, a, e, cfg.num_groups, cfg.compression_scale, p, seed)  # (*b, r)
        return y + recomputed(lambda h, b: F.linear(h, b.to(h.dtype)) * s, h, b)
