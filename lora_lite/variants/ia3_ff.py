"""IA3 on the feed-forward: scale the inner activation (Liu et al. 2022, arXiv:2205.05638, section 3.3).

    y = W (l ⊙ x) + b         l (i,)

Identity   l = 1, bit-exact
Base       never read: any layer kind
Departs    formed as x + (l - 1) ⊙ x, as in ia3
Checked    against PEFT IA3Config(feedforward_modules=...): outputs, gradients, three AdamW steps
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.targets import MLP, MLP_OUT
from ..core.variant import Layer, ParamSpec, register

__all__ = ["IA3FF", "IA3FFConfig"]


@dataclass(frozen=True, kw_only=True)
class IA3FFConfig(BaseConfig):
    """Targets the feed-forward's second layer by default, whose input is the inner activation; of fused experts each
    expert's."""

    variant: str = "ia3_ff"
    target_names: Sequence[str] = (
        MLP + MLP_OUT,  # Llama, GPT-2, GPT-NeoX, ModernBERT, T5
        r"\.(down_proj|w2|fc2|fc_out|lin2|DenseReluDense\.wo)$",  # OPT, XLM; Mixtral's experts
        r"\d\.(output\.dense|ffn_output|ffn\.2|ff\.layer_2)$",  # BERT, ViT, ALBERT, CTRL, XLNet
        r"\.mlp\.(output_linear\.weight|experts\.expert_\d+\.wo)$",  # JetMoE, Switch Transformers
    )
    kinds: Sequence[str] = ("linear", "experts")
    WITHOUT_MATRIX: ClassVar[tuple[str, ...]] = ("norm",)


@register
class IA3FF:
    name = "ia3_ff"
    config = IA3FFConfig
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: IA3FFConfig) -> dict[str, ParamSpec]:
        return {"lora_l": ParamSpec((d_in,), init="ones", keep_dtype=True)}

    @staticmethod
    def forward_input(layer: Layer, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b i"]:
        return torch.addcmul(x, x, (layer.scale * (layer.lora_l - 1)).to(x))
