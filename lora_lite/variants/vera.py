"""VeRA: two trained vectors around random matrices that all layers share (Kopiczko et al. 2023, arXiv:2310.11454, 3.2).

    y = W x + b + λ_b ⊙ B_o (λ_d ⊙ A_i drop(x))      A (r, max i), B (max o, r) once, frozen
    A_i, B_o  their first i columns, and o rows;  λ_d (r,), λ_b (o,) at each layer, trained

Identity   λ_b = 0, bit-exact
Base       never read: any layer kind
Departs    A and B are uniform with PEFT's bounds and generator, so one seed gives PEFT's. Their sizes are those of the
           largest target, so another choice of layers draws others. They are drawn again at load, from the seed; with
           save_projection=True they are in the file
Checked    against PEFT VeraConfig: A and B bit for bit, outputs, gradients, three AdamW steps
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.targets import Target
from ..core.validate import is_number
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.factors import at_inference
from ..families.projections import projection_specs
from ..ops.few import few_wide, plus
from ..ops.recompute import frozen_linear, recomputed

__all__ = ["VeRA", "VeRAConfig"]


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(AdapterConfig):
    """d_initial: what λ_d starts at. seed: of A and B. dropout: of the branch."""

    variant: str = "vera"
    r: int = 256
    d_initial: float = 0.1
    seed: int = 0
    save_projection: bool = False
    dropout: float = 0.0
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (
        *AdapterConfig.SAME_AT_ALL_LAYERS,
        *("r", "seed", "save_projection"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_number(self.d_initial) and self.d_initial != 0, "d_initial", "a number other than 0")


@register
class VeRA:
    name = "vera"
    config = VeRAConfig
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: VeRAConfig) -> dict[str, ParamSpec]:
        return {
            "lora_d": ParamSpec((cfg.r,), lambda t: t.fill_(cfg.d_initial), keep_dtype=True),
            "lora_b": ParamSpec((d_out,), keep_dtype=True),
        }

    @staticmethod
    def shared_specs(targets: Sequence[Target], cfg: VeRAConfig) -> dict[str, ParamSpec]:
        return projection_specs(targets, cfg.r, cfg.r, cfg.seed, cfg.save_projection)

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        a, b = layer.lora_A[:, : layer.in_features], layer.lora_B[: layer.out_features]
        dropout = layer.cfg.dropout if layer.training else 0.0
        return LowRank(a, layer.lora_b[:, None].to(b.dtype) * b, layer.scale * layer.lora_d, dropout)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        x = few_wide(F.dropout(x, layer.cfg.dropout, layer.training) if layer.cfg.dropout else x)
        # z is kept in x's place. Of A and B, cast for each layer, nothing is: they are 256 ranks wide.
        z = frozen_linear(x, layer.lora_A[:, : layer.in_features])
        d, scales, b = layer.lora_d, layer.lora_b, layer.lora_B[: layer.out_features]
        if at_inference(layer):
            return plus(y, _rows(z, d, b), layer.scale, scales)
        scales = layer.scaled(scales)
        return y + recomputed(lambda z, d, scales, b: _rows(z, d, b) * scales, z, d, scales, b).to(y.dtype)


def _rows(z: Float[Tensor, "*b r"], d: Float[Tensor, "r"], b: Float[Tensor, "o r"]) -> Float[Tensor, "*b o"]:
    return F.linear((z * d).to(z.dtype), b.to(z.dtype))  # rounded from the wider dtype of the two
