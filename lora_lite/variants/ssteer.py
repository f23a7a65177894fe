"""S-steer: new singular values for some of the weight's own directions (c as the steering coefficient).

    y = W x + b + c U (Δs ⊙ Vᵀ x)       W = U_k diag(S_k) V_kᵀ, k = min(i, o)
    U (o, r), V (i, r)  r of the k directions, frozen;  Δs (r,)  trained
  so for r = k and c = 1 W' = U diag(S + Δs) Vᵀ: Δs_j = -S_j takes a direction out, a sign turns it over

Identity   Δs = 0, bit-exact; c and -c change the output by opposite amounts
Base       read once, at init, for its SVD: dense layers only. U, S, V and which of the k they are stay in the file, so
           a load needs neither an SVD nor the data that they were chosen by
Departs    no paper: the practice is of SVD adapters that take U_r diag(S_r) V_rᵀ out of the weight, and start Δs at a
           small random value, for then ±c differ at once. Here the base is never written, and Δs starts at 0
Checked    against the formula above
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.variant import Layer, ParamSpec, register
from ..families.sspace import SSpaceConfig, basis_specs, fit_basis, needs_data

__all__ = ["SSteer", "SSteerConfig"]


@dataclass(frozen=True, kw_only=True)
class SSteerConfig(SSpaceConfig):
    variant: str = "ssteer"


@register
class SSteer:
    name = "ssteer"
    config = SSteerConfig
    base_weight = "dense"
    handles_scale = True
    needs_calibration = staticmethod(needs_data)
    group_init = staticmethod(fit_basis)

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: SSteerConfig) -> dict[str, ParamSpec]:
        specs = basis_specs(d_in, d_out, cfg)
        return {**specs, "lora_ds": ParamSpec(specs["lora_S"].shape, keep_dtype=True)}

    @staticmethod
    def low_rank(layer: Layer) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"], Float[Tensor, "r"]]:
        return layer.lora_V.mT, layer.lora_U, layer.scale * layer.lora_ds

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        ds = layer.lora_ds.to(torch.promote_types(x.dtype, layer.lora_ds.dtype))
        coordinates = x @ layer.lora_V  # Vᵀ x (*b, r)
        return y + (coordinates * (layer.scale * ds).to(x)) @ layer.lora_U.mT
