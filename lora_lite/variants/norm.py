"""Norm: the weights and biases of norms, trained (LayerNorm tuning: Zhao et al. 2023, arXiv:2312.11420, section 3).

    y = (w + Δw) ⊙ n(x) + b + Δb          Δw (d,)   Δb (d,), where the norm has a bias

Identity   Δw = 0, Δb = 0, bit-exact
Base       never read: n(x) is what the norm itself makes with a weight of ones, so w may be 0
Departs    what is trained is the difference: weight decay pulls to the base
Checked    against PEFT LNTuningConfig: outputs, gradients, three SGD steps
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.targets import Target
from ..core.variant import Layer, ParamSpec, register

__all__ = ["Norm", "NormConfig"]


@dataclass(frozen=True, kw_only=True)
class NormConfig(BaseConfig):
    """Targets every norm by default, also the one before the output head."""

    variant: str = "norm"
    kinds: Sequence[str] = ("norm",)
    target_names: Sequence[str] = ("",)
    WITHOUT_MATRIX: ClassVar[tuple[str, ...]] = ("norm",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.kinds == ("norm",), "kinds", "('norm',): other layers are the variant full's")


@register
class Norm:
    name = "norm"
    config = NormConfig
    handles_scale = True

    @staticmethod
    def layer_specs(target: Target, cfg: NormConfig) -> dict[str, ParamSpec]:
        specs = {"lora_weight": ParamSpec((target.d_out,), keep_dtype=True)}
        return specs | ({"lora_bias": ParamSpec((target.d_out,))} if target.has_bias else {})

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b d"], y: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        new = layer.diagonal(layer.lora_weight, x)  # x is n(x)
        return y + layer.scale * (new + layer.lora_bias if layer.has_bias else new)
