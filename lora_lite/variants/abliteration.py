"""Abliteration: take directions out of what a layer writes (Arditi et al. 2024, arXiv:2406.11717, section 2.4).

    NONE    W' = W - λ Vᵀ V W           V (k, o), rows orthonormal;  λ = strength · kernel(depth)
    PRE     W' = D ⊙ M                  D (o,) = ‖W‖ by row,  Ŵ = W / D (0 where D is),  M = Ŵ - λ Vᵀ V Ŵ
    FULL    W' = D ⊙ M / n              n² (o,) = ‖M‖² by row = 1 - 2λp + λ²q,  U = V Ŵ,
                                        p = Σ_k Vᵀ ⊙ Ŵ Uᵀ,  q = Σ_k Vᵀ ⊙ Vᵀ U Uᵀ
    COLUMN  W' = (W - λ Vᵀ V W) / n     n² (i,) = 1 - 2λp + λ²q,  p = q = ‖V W‖² / ‖W‖² by column
  on y = W x:  NONE y - λ (y Vᵀ) V    PRE y - λ (y (V/D)ᵀ) (V D)    FULL that over n    COLUMN x / n, then NONE

Identity   never: it is computed, and nothing is trained
Base       NONE: not read, any layer kind. Others: read once, dequantised; again when V changes
Departs    the bias stays, but NONE takes V out of fused experts' biases too. PRE and FULL leave a part of V W at λ = 1
           (7 to 37 % on real layers): D VᵀV D⁻¹ is no projection along V. layer.scale multiplies λ
Checked    against the weight forms above
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.variant import Layer, ParamSpec, register
from ..families.directions import SubspaceConfig, active_directions, fit_subspace
from ..families.normalization import Normalization, gain, read_weight

__all__ = ["Abliteration", "AbliterationConfig", "Normalization"]


@dataclass(frozen=True, kw_only=True)
class AbliterationConfig(SubspaceConfig):
    """Targets all that writes to the residual stream; strength is λ before the kernels. With kinds="block", in the mode
    NONE, the stream itself as each block puts it out: not the embedding's, and a later block may write it again."""

    variant: str = "abliteration"
    normalization: Normalization | str = Normalization.NONE

    def __post_init__(self) -> None:
        super().__post_init__()
        reads = self.normalization != "none" and not {*self.WITHOUT_MATRIX}.isdisjoint(self.kinds)
        self.require(not reads, "normalization", "'none' on blocks and on norms")


@register
class Abliteration:
    name, config = "abliteration", AbliterationConfig
    has_identity_init, handles_scale, needs_calibration, reads_input = False, True, True, False
    live = ("strength", "layer", "kernels")
    group_init = staticmethod(fit_subspace)

    @staticmethod
    def base_weight(cfg: AbliterationConfig) -> str:
        return "unused" if cfg.normalization == "none" else "read"

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: AbliterationConfig) -> dict[str, ParamSpec]:
        o, i, rows = (d_out,), (d_in,), (cfg.rank, d_out)
        norms = {"none": {}, "pre": {"d": o}, "full": {"d": o, "p": o, "q": o}, "column": {"p": i, "q": i}}
        shapes = {"own": rows, "v": rows, "strength": (), **norms[cfg.normalization]}
        return {f"lora_{name}": ParamSpec(shape, trainable=False, keep_dtype=True) for name, shape in shapes.items()}

    @staticmethod
    def init(layer: Layer, cfg: AbliterationConfig) -> None:
        if cfg.normalization in ("pre", "full"):
            layer.lora_d.copy_(layer.dense_weight().norm(dim=1))

    @staticmethod
    def refresh(targets: Mapping[str, Layer], cfg: AbliterationConfig) -> None:
        for layer, v, strength in active_directions(targets):
            layer.lora_strength.fill_(strength)
            if not torch.equal(layer.lora_v, v):
                layer.lora_v.copy_(v)
                if layer.cfg.normalization in ("full", "column"):
                    read_weight(layer)

    @staticmethod
    def forward_input(layer: Layer, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b i"]:
        return x * gain(layer).to(x.dtype) if layer.cfg.normalization == "column" else x

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b d"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        reads = writes = layer.lora_v  # (k, o)
        if layer.cfg.normalization in ("pre", "full"):
            reads, writes = reads / layer.lora_d.where(layer.lora_d > 0, torch.inf), writes * layer.lora_d
        wx = y if layer.bias is None else y - layer.bias
        removed = (wx @ reads.to(y.dtype).mT) @ (layer.scale * layer.lora_strength * writes).to(y.dtype)  # (*b, o)
        if layer.cfg.normalization != "full":
            return y - removed
        return y - removed + (gain(layer) - 1).to(y.dtype) * (wx - removed)  # over n, and the bias is left alone
