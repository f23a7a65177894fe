"""BEFT: a trained shift of what the value projections give (Huang et al. 2025, arXiv:2509.15974, section 3).

    y = W x + b + v          v (o,)

Identity   v = 0, bit-exact
Base       never read: any layer kind
Departs    from nothing. The paper picks one of the biases of queries, keys and values, and finds that of the values
           the best; a layer without a bias gets one, which is what parts it from the variant bias
Checked    against PEFT BeftConfig: outputs, gradients, three AdamW steps
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.variant import Layer, ParamSpec, register

__all__ = ["BEFT", "BeftConfig"]


@dataclass(frozen=True, kw_only=True)
class BeftConfig(BaseConfig):
    """Targets the value projections by default."""

    variant: str = "beft"
    target_names: Sequence[str] = (r"\.(v|values?)(_proj|_lin|_head)?$",)


@register
class BEFT:
    name = "beft"
    config = BeftConfig
    handles_scale = True
    reads_input = False

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: BeftConfig) -> dict[str, ParamSpec]:
        return {"lora_shift": ParamSpec((d_out,), is_shift=True, keep_dtype=True)}

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        shift = layer.lora_shift
        return y + layer.scaled(shift).to(y.dtype)
