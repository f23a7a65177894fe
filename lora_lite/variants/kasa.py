"""KaSA: a LoRA with singular values, on a weight without its noise (Wang et al. 2024, arXiv:2412.06071, 3.2-3.4).

    y = (W - U_t S_t V_tᵀ) x + b + s B diag(d) A drop(x)       A (r, i)   B (o, r)   d (r,)   s = α/r
    U_t (o, r), S_t, V_t (i, r): the last r singular triplets of W, of r < min(i, o); all frozen
    penalty    Σ over layers of β ‖d‖² + γ (‖BᵀB - I‖ + ‖A Aᵀ - I‖)

Identity   not at the start: there y is that of the truncated weight
Base       read once, at init, for its SVD; dequantised numbers do. U_t S_t and V_t stay in the file
Departs    the paper and PEFT write the truncated weight into the layer, for good; here the base is never written.
           On convolutions and embeddings `dropout` is of what the truncated part sees, too
Checked    against PEFT LoraConfig(kasa_config=KasaConfig()): outputs, gradients, penalty, three AdamW steps
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.validate import is_number
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.factors import FactorsConfig, as_low_rank, at_inference, check_directions, with_factors
from ..ops.few import few_wide, plus
from ..ops.low_rank import add_low_rank

__all__ = ["KaSA", "KaSAConfig"]
_TENSORS = "lora_A", "lora_B", "lora_d", "lora_Vt", "lora_Ut"


@dataclass(frozen=True, kw_only=True)
class KaSAConfig(FactorsConfig):
    """beta, gamma: the weights of the penalty's parts."""

    variant: str = "kasa"
    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "gamma"):
            self.require(is_number(getattr(self, name)) and getattr(self, name) >= 0, name, "a number, 0 or more")


@register
class KaSA:
    name, config = "kasa", KaSAConfig
    base_weight, has_identity_init, handles_scale = "read", False, True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: KaSAConfig) -> dict[str, ParamSpec]:
        check_directions(cfg, d_in, d_out, min(d_in, d_out) - 1)
        return {
            "lora_A": ParamSpec((cfg.r, d_in), init="kaiming", keep_dtype=True),
            "lora_B": ParamSpec((d_out, cfg.r), keep_dtype=True),
            "lora_d": ParamSpec((cfg.r,), lambda t: t.normal_(), keep_dtype=True),
            "lora_Ut": ParamSpec((d_out, cfg.r), trainable=False, keep_dtype=True),  # U_t S_t
            "lora_Vt": ParamSpec((cfg.r, d_in), trainable=False, keep_dtype=True),
        }

    @staticmethod
    def init(layer: Layer, cfg: KaSAConfig) -> None:
        u, s, vt = torch.linalg.svd(layer.dense_weight(), full_matrices=False)
        layer.lora_Ut.copy_(u[:, -cfg.r :] * s[-cfg.r :])
        layer.lora_Vt.copy_(vt[-cfg.r :])

    @staticmethod
    def penalty(targets: Mapping[str, Layer], cfg: KaSAConfig) -> Tensor:
        terms = []
        for layer in targets.values():
            a, b, d = layer.lora_A, layer.lora_B, layer.lora_d
            eye = torch.eye(len(d), dtype=d.dtype, device=d.device)
            orthogonal = (b.mT @ b - eye).norm() + (a @ a.mT - eye).norm()
            terms.append(layer.cfg.beta * d.square().sum() + layer.cfg.gamma * orthogonal)
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        tensors = [getattr(layer, name) for name in _TENSORS]
        return as_low_rank(layer, partial(_factors, layer.cfg.scaling), *tensors, dropout=layer.cfg.dropout)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        s, tensors = layer.cfg.scaling, [getattr(layer, name) for name in _TENSORS]
        if at_inference(layer):
            (a, b, d, vt, ut), x = tensors, few_wide(x)
            a, b, vt, ut = (t.to(x.dtype) for t in (a, b, vt, ut))  # four products: a copy as one pair takes longer
            lora = F.linear(F.linear(x, a) * (s * d).to(x.dtype), b)
            return plus(y, lora - F.linear(F.linear(x, vt), ut), layer.scale)
        if layer.training and layer.cfg.dropout:  # of the LoRA alone
            y, tensors = add_low_rank(y, x, layer.lora_Vt, layer.lora_Ut, -layer.scale), tensors[:3]
        return with_factors(layer, x, y, partial(_factors, s), *tensors, dropout=layer.cfg.dropout)


def _factors(s: float, a: Tensor, b: Tensor, d: Float[Tensor, "r"], *truncated: Tensor) -> tuple[Tensor, Tensor]:
    """s diag(d) A and B; with what is taken out, [s diag(d) A; V_tᵀ] (2r, i) and [B, -U_t S_t] (o, 2r)."""
    a, (vt, ut) = (s * d)[:, None] * a, truncated or (a[:0], b[:, :0])
    return torch.cat([a, vt.to(a.dtype)]), torch.cat([b, -ut.to(b.dtype)], 1)
