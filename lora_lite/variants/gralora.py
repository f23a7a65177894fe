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
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.validate import is_number
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..errors import ConfigError
from ..ops.recompute import recomputed

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
        cfg, (a, b, *general) = layer.cfg, _tensors(layer)
        parts = b.unflatten(1, (cfg.k, -1)).permute(1, 0, 3, 2)  # (n, j, o/k, r/k)
        down = torch.block_diag(*a.mT)  # (k r, i), its rows as (n, j, r/k)
        up = torch.cat([torch.block_diag(*part) for part in parts], dim=1)  # (o, k r)
        if general:
            down, up = torch.cat([down, general[0]]), torch.cat([up, general[1]], dim=1)
        return LowRank(down, up, layer.scale * _scaling(cfg), cfg.dropout if layer.training else 0.0)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        cfg, x = layer.cfg, F.dropout(x, layer.cfg.dropout, layer.training)
        return y + layer.scale * _scaling(cfg) * recomputed(partial(_branch, cfg.k), x, *_tensors(layer))


def _scaling(cfg: GraLoRAConfig) -> float:
    return cfg.alpha / (cfg.r + cfg.hybrid_r)


def _tensors(layer: Layer) -> list[Tensor]:
    general = [layer.lora_general_a, layer.lora_general_b] if layer.cfg.hybrid_r else []
    return [layer.lora_a, layer.lora_b, *general]


def _branch(k: int, x: Float[Tensor, "*b i"], a: Tensor, b: Tensor, *general: Tensor) -> Float[Tensor, "*b o"]:
    h = torch.einsum("...ni,nir->...nr", x.unflatten(-1, (k, -1)), a.to(x.dtype))
    h, b = h.unflatten(-1, (k, -1)), b.to(x.dtype).unflatten(1, (k, -1))  # (*b, n, j, q), (j, n, q, o/k), q = r/k
    out = torch.einsum("...njq,jnqo->...jo", h, b).flatten(-2)  # (*b, o)
    for factor in general:
        x = F.linear(x, factor.to(x.dtype))
    return out + x if general else out
