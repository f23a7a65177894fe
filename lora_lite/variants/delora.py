"""DeLoRA: each rank-1 term has a direction, and all have one strength (Bini et al. 2025, arXiv:2503.18225, section 3).

    y = W x + b + B (s ⊙ A (n ⊙ drop(x)))      s_k = λ / (r max(‖A_k‖, ε) max(‖B_k‖, ε))     ε = 1e-4
    A (r, i), its rows A_k    B (o, r), its columns B_k    λ (1,)    n (i,), the norms of W's columns, frozen

Identity   B = 0, bit-exact
Base       read once, at init, for n; 4-bit and 8-bit too
Departs    B = 0 and ε are PEFT's start. The first step gives B all of its strength, and its first gradient is 1/ε times
           a usual one: fine for Adam, not for SGD or for clipping by the norm over all layers
Checked    against PEFT DeloraConfig: outputs, gradients, three AdamW steps
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.validate import is_number
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.factors import with_factors
from ..families.sparse import wide

__all__ = ["DeLoRA", "DeLoRAConfig"]

SMALLEST = 1e-4
"""ε, below which a row's or a column's length isn't divided out."""


@dataclass(frozen=True, kw_only=True)
class DeLoRAConfig(AdapterConfig):
    """strength: what λ starts at. dropout: of the branch (PEFT's module_dropout)."""

    variant: str = "delora"
    strength: float = 15.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_number(self.strength) and self.strength != 0, "strength", "a number other than 0")


@register
class DeLoRA:
    name = "delora"
    config = DeLoRAConfig
    base_weight = "read"
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: DeLoRAConfig) -> dict[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((cfg.r, d_in), init="kaiming", keep_dtype=True),
            "lora_B": ParamSpec((d_out, cfg.r), keep_dtype=True),
            "lora_lambda": ParamSpec((1,), lambda t: t.fill_(cfg.strength), keep_dtype=True),
            "lora_norm": ParamSpec((d_in,), trainable=False, keep_dtype=True),
        }

    @staticmethod
    def init(layer: Layer, cfg: DeLoRAConfig) -> None:
        layer.lora_norm.copy_(layer.dense_weight().norm(dim=0))

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        a, b = _factors(layer.lora_A, layer.lora_B, layer.lora_lambda, layer.lora_norm)
        return LowRank(a, b, layer.scale, layer.cfg.dropout if layer.training else 0.0)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        tensors = layer.lora_A, layer.lora_B, layer.lora_lambda, layer.lora_norm
        return with_factors(layer, x, y, _factors, *tensors, dropout=layer.cfg.dropout)


def _factors(a: Tensor, b: Tensor, strength: Tensor, norm: Tensor) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
    """A ⊙ n and B ⊙ s: without B, s is 1/ε, too much for 16 bits."""
    a, b = wide(a), wide(b)
    lengths = a.norm(dim=1).clamp(min=SMALLEST) * b.norm(dim=0).clamp(min=SMALLEST)  # (r,)
    return a * norm.to(a.dtype), b * (strength.to(b.dtype) / (len(a) * lengths))
