"""FRoD: all of the weight, in directions that layers of one kind share (2025, AAAI 2026, arXiv:2512.23485).

    y = U (diag(λ) + S) Vᵀ x + b        W = U diag(λ0) Vᵀ    V (i, i) once for all layers of one name    U (o, i)
      = W (x + V⁻ᵀ Λ0⁻¹ (S + diag(λ - λ0)) Vᵀ drop(x)) + b   without U; λ (i,) trained, λ0 the norms of W V⁻ᵀ's columns
    S (i, i) of i² sparse_rate trained numbers beside the diagonal, at places that layers of one name share

Identity   λ = λ0 and S = 0, bit-exact
Base       read once, at init, for V and λ0; dequantised numbers do. V, V⁻¹, λ0 and the places stay in the file
Departs    PEFT multiplies by U, which is as large as W at each layer, and rounds at the start. It also takes directions
           that W hasn't, whose λ0 is rounding, as of fewer rows than columns in all: here they take no part (λ0 = 0),
           but in its own folders, where V⁻¹ is on W's rows alone
Checked    against PEFT FrodConfig: V and the places, outputs, gradients, three AdamW steps
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.validate import is_number
from ..core.variant import Layer, ParamSpec, register
from ..errors import ConfigError
from ..families.joint import fit_joint, joint_specs, joint_tensors, places_of
from ..families.sparse import rows_of
from ..ops.few import few_wide
from ..ops.joint import joint_change
from ..ops.sparse import is_sparse_enough

__all__ = ["FRoD", "FRoDConfig"]

ALIKE = ("sparse_rate", "regularization_alpha", "seed")


@dataclass(frozen=True, kw_only=True)
class FRoDConfig(BaseConfig):
    """sparse_rate: the share of S that is trained. regularization_alpha: the ridge in V's making. seed: of the places.
    dropout: of what is added to x."""

    variant: str = "frod"
    sparse_rate: float = 0.01
    regularization_alpha: float = 1e-3
    seed: int = 0
    dropout: float = 0.0
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (*BaseConfig.SAME_AT_ALL_LAYERS, *ALIKE)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_number(self.sparse_rate) and 0 < self.sparse_rate <= 1, "sparse_rate", "above 0, at most 1")
        alpha = self.regularization_alpha
        self.require(is_number(alpha) and alpha > 0, "regularization_alpha", "a number above 0")


@register
class FRoD:
    name = "frod"
    config = FRoDConfig
    base_weight = "read"
    handles_scale = True
    shared_specs = staticmethod(joint_specs)
    group_init = staticmethod(fit_joint)

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: FRoDConfig) -> dict[str, ParamSpec]:
        if d_in < 2:
            raise ConfigError(f"FRoD: a ({d_out}, {d_in}) weight has no S\n  leave the layer out with exclude_names")
        return {
            "lora_l": ParamSpec((d_in,), keep_dtype=True),
            "lora_s": ParamSpec((places_of(d_in, cfg),), keep_dtype=True),
            "lora_l0": ParamSpec((d_in,), trainable=False, keep_dtype=True),
        }

    @staticmethod
    def forward_input(layer: Layer, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b i"]:
        (v, inverse, places), cfg, i = joint_tensors(layer), layer.cfg, layer.in_features
        is_sparse = not layer.in_graph and is_sparse_enough(x, places.shape[1], i, i)
        rows = rows_of(layer, places, i, i) if is_sparse else None
        z = few_wide(F.dropout(x, cfg.dropout, layer.training) if cfg.dropout else x)
        change = joint_change(z, layer.lora_l, layer.lora_s, layer.lora_l0, v, inverse, places, rows)
        return x + layer.scaled(change).to(x.dtype)
