"""IA3 on the feed-forward: scale the inner activation (Liu et al. 2022, arXiv:2205.05638, section 3.3).

    y = W (l ⊙ x) + b         l (i,)

Identity   l = 1, bit-exact
Base       never read: any layer kind
Departs    formed as x + (l - 1) ⊙ x, as in ia3
Checked    against PEFT IA3Config(feedforward_modules=...): outputs, gradients, three AdamW steps
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.variant import Layer, ParamSpec, register

__all__ = ["IA3FF", "IA3FFConfig"]


@dataclass(frozen=True, kw_only=True)
class IA3FFConfig(BaseConfig):
    """Targets the feed-forward's second layer by default, whose input is the inner activation."""

    variant: str = "ia3_ff"
    target_names: Sequence[str] = (
        r"\.(down_proj|w2|fc2|DenseReluDense\.wo|dense_4h_to_h|fc_out)$",  # Llama, Mixtral, OPT, T5, GPT-NeoX, GPT-J
        r"\.mlp\.c_proj$",  # GPT-2
        r"\d\.output\.dense$",  # BERT, ViT
    )


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
