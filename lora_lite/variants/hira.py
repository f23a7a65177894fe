"""HiRA: a low-rank Hadamard factor on the weight itself (Huang et al. 2025, ICLR, openreview TwJrTz9cRS, section 3.2).

    y = W x + b + [W ∘ (B A)] drop(x)       A (r, i)   B (o, r): of a rank as high as W's

Identity   B = 0, bit-exact
Base       read: its numbers, dequantised ones too, in each forward that trains; any layer kind
Departs    from nothing: there is no α. The backward keeps x, A and B; W ∘ (B A) is formed again. An embedding starts
           with B = 0 as any layer does, where PEFT's has A = 0
Checked    against PEFT HiraConfig: outputs, gradients, three AdamW steps; convolutions and embeddings
"""

from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.dense import as_low_rank, with_delta

__all__ = ["HiRA", "HiRAConfig"]


@dataclass(frozen=True, kw_only=True)
class HiRAConfig(AdapterConfig):
    """dropout: of the branch. init: what A is drawn from, "kaiming" or "gaussian" of standard deviation 1/r."""

    variant: str = "hira"
    r: int = 32
    dropout: float = 0.0
    init: str = "kaiming"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.init in ("kaiming", "gaussian"), "init", '"kaiming" or "gaussian"')


@register
class HiRA:
    name = "hira"
    config = HiRAConfig
    base_weight = "read"
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: HiRAConfig) -> dict[str, ParamSpec]:
        init = "kaiming" if cfg.init == "kaiming" else lambda t: t.normal_(std=1 / cfg.r)
        return {
            "lora_A": ParamSpec((cfg.r, d_in), init, keep_dtype=True),
            "lora_B": ParamSpec((d_out, cfg.r), keep_dtype=True),
        }

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        return as_low_rank(layer, partial(_delta, layer), layer.lora_A, layer.lora_B, dropout=layer.cfg.dropout)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        dropout = layer.cfg.dropout
        return with_delta(layer, x, y, partial(_delta, layer), layer.lora_A, layer.lora_B, dropout=dropout)


def _delta(layer: Layer, a: Float[Tensor, "r i"], b: Float[Tensor, "o r"]) -> Float[Tensor, "o i"]:
    return layer.matrix() * (b @ a)
