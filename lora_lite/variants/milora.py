"""MiLoRA: LoRA that starts from the minor singular vectors (Wang et al. 2024, arXiv:2406.09044, section 3).

    y = (W - s B0 A0) x + b + s B A x       A (r, i)   B (o, r)   s = α/r
    s B0 A0 = U_m S_m V_mᵀ, the last r of W = U S Vᵀ;  A0 = √(S_m/s) V_mᵀ,  B0 = U_m √(S_m/s)

Identity   the difference from A0 and B0 acts (families/residual.py): bit-exact
Base       read once, at init: dense layers only, as PiSSA
Departs    the paper writes the principal part W - s B0 A0 into the layer; here A0 and B0 stay as frozen buffers
Checked    against the full SVD; PEFT has no MiLoRA
"""

from dataclasses import dataclass

import torch

from ..core.variant import Layer, register
from ..families import residual

__all__ = ["MiLoRA", "MiLoRAConfig"]


@dataclass(frozen=True, kw_only=True)
class MiLoRAConfig(residual.ResidualConfig):
    variant: str = "milora"


@register
class MiLoRA:
    name, config = "milora", MiLoRAConfig
    base_weight, handles_scale = "dense", True
    param_specs = staticmethod(residual.param_specs)
    low_rank = staticmethod(residual.low_rank)
    forward = staticmethod(residual.forward)

    @staticmethod
    def init(layer: Layer, cfg: MiLoRAConfig) -> None:
        u, s, vt = torch.linalg.svd(layer.dense_weight(), full_matrices=False)  # of k = min(o, i) directions
        residual.from_svd(layer, u[:, -cfg.r :], s[-cfg.r :], vt[-cfg.r :].mT)
