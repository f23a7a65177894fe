"""Full: a change of a layer's whole weight and bias, as in training the layer itself.

    y = W x + b + ΔW x + Δb          ΔW (o, i)   Δb (o,), where the layer has a bias

Identity   ΔW = 0, Δb = 0, bit-exact
Base       never read: any layer kind, quantised ones too. Of a norm ΔW is a vector (d,), of an embedding (d, tokens)
Departs    what is trained is the difference, so weight decay pulls to the base, and float32 differences train a 16-bit
           base. PEFT's modules_to_save holds W + ΔW
Checked    against the layer itself, unfrozen: outputs, gradients, three SGD steps; and PEFT's modules_to_save
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.targets import Target
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..ops.recompute import add_dense

__all__ = ["Full", "FullConfig"]


@dataclass(frozen=True, kw_only=True)
class FullConfig(BaseConfig):
    """For a head that is trained beside an adapter: `[LoRAConfig(...), FullConfig(target_names="score")]`."""

    variant: str = "full"
    kinds: Sequence[str] = ("linear", "conv", "embedding", "norm")
    WITHOUT_MATRIX: ClassVar[tuple[str, ...]] = ("norm",)


@register
class Full:
    name = "full"
    config = FullConfig
    handles_scale = True

    @staticmethod
    def layer_specs(target: Target, cfg: FullConfig) -> dict[str, ParamSpec]:
        shape = (target.d_out,) if target.is_diagonal else (target.d_out, target.d_in)
        specs = {"lora_weight": ParamSpec(shape, keep_dtype=True)}
        return specs | ({"lora_bias": ParamSpec((target.d_out,), is_shift=True)} if target.has_bias else {})

    @staticmethod
    def low_rank(layer: Layer) -> LowRank | None:
        if layer.is_diagonal:
            return None
        shift = layer.scale * layer.lora_bias if layer.has_bias else None
        return LowRank(None, layer.lora_weight, layer.scale, shift=shift)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        if layer.is_diagonal:
            y = y + layer.scale * layer.diagonal(layer.lora_weight, x)
        else:  # of a cast ΔW nothing is kept for the backward
            y = add_dense(y, x, lambda weight: weight, layer.lora_weight, s=layer.scale)
        return y + layer.scale * layer.lora_bias if layer.has_bias else y
