"""Bias: the biases of layers, trained (BitFit: Ben Zaken et al. 2022, arXiv:2106.10199, section 3).

    y = W x + b + Δb          Δb (o,), at layers with a bias

Identity   Δb = 0, bit-exact
Base       never read: any layer kind
Departs    what is trained is the difference: weight decay pulls to the base
Checked    against PEFT's bias="all" and "lora_only", and the biases themselves, unfrozen
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.variant import Layer, ParamSpec, register

__all__ = ["Bias", "BiasConfig"]


@dataclass(frozen=True, kw_only=True)
class BiasConfig(BaseConfig):
    """Targets every layer that has a bias by default, norms included."""

    variant: str = "bias"
    kinds: Sequence[str] = ("linear", "conv", "norm")
    target_names: Sequence[str] = ("",)
    WITHOUT_MATRIX: ClassVar[tuple[str, ...]] = ("norm",)
    NEEDS_BIAS: ClassVar[bool] = True


@register
class Bias:
    name = "bias"
    config = BiasConfig
    handles_scale = True
    reads_input = False

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: BiasConfig) -> dict[str, ParamSpec]:
        return {"lora_bias": ParamSpec((d_out,), is_shift=True)}

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        return y + layer.scale * layer.lora_bias
