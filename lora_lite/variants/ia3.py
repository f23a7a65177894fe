"""IA3: scale the keys and the values (Liu et al. 2022, arXiv:2205.05638, section 3.3).

    y = l ⊙ (W x + b)         l (o,)

Identity   l = 1, bit-exact
Base       never read: any layer kind
Departs    formed as y + (l - 1) ⊙ y with l - 1 in the storage dtype: bfloat16 has steps of 2^-7 above 1, coarser than
           a trained l. The paper's third vector, on the feed-forward's inner activation, is the variant ia3_ff
Checked    against PEFT IA3Config: outputs, gradients, three AdamW steps
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.variant import Layer, ParamSpec, register

__all__ = ["IA3", "IA3Config"]


@dataclass(frozen=True, kw_only=True)
class IA3Config(BaseConfig):
    """Targets the key and value projections by default; of one that makes queries too, all of its output, as PEFT."""

    variant: str = "ia3"
    target_names: Sequence[str] = (
        r"\.(k|v)(_proj)?$",
        r"\.(key|value)s?(_proj)?$",
        r"\.((k|v)(_lin|_head|_proj\.linear)|(project|linear)_(k|v)|W(k|v))$",  # XLM, Funnel, Moshi, CPM-Ant, CTRL
        r"\.kv(_b)?_proj$",  # DeepSeek, JetMoE
        r"\.(query_key(_value)?|qkv(_proj)?|Wqkv|c_attn|att_proj|self\.in_proj)$",  # GPT-NeoX, Phi-3, MPT, GPT-2, Bark
    )
    WITHOUT_MATRIX: ClassVar[tuple[str, ...]] = ("norm",)


@register
class IA3:
    name = "ia3"
    config = IA3Config
    handles_scale = True
    reads_input = False

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: IA3Config) -> dict[str, ParamSpec]:
        return {"lora_l": ParamSpec((d_out,), init="ones", keep_dtype=True)}

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        return torch.addcmul(y, y, (layer.scale * (layer.lora_l - 1)).to(y))
