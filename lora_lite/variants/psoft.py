"""PSOFT: turn the weight's principal subspace (Wu et al. 2026, openreview.net/forum?id=FSHrinMArK).

    y = W x + b + U (M - I) V drop(x)      U V = the top r of W's SVD      U (o, r)   V (r, i)   frozen
    M = diag(β) C diag(a)      C = (I + Q)(I - Q)⁻¹ or its series, as in oft, Q skew with R (r (r - 1) / 2,) above
    mag_b, mag_a = False       without β (r,), without a (r,)
    orth = False               C = R itself (r, r)

Identity   R = 0, or I without orth, and a = β = 1, bit-exact: M - I = diag(β) (C - I) diag(a) + diag((β - 1) a + a - 1)
Base       read once, at init, for its SVD; dequantised values too. U and V are in the file, so a load needs no SVD
Departs    PEFT's file has neither U nor V: it makes them again from the base that it is loaded on, where a singular
           pair of the other sign is another adapter. No α: PEFT divides U by the α/r that it multiplies by
Checked    against PEFT PsoftConfig: outputs, gradients, three AdamW steps
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.validate import is_number
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.factors import with_core
from ..families.orthogonal import check_cayley, series_terms
from ..families.principal import PrincipalConfig, factor_specs, fit_factors
from ..ops.cayley import bounded, rotation_less_identity, skew

__all__ = ["PSOFT", "PSOFTConfig"]


@dataclass(frozen=True, kw_only=True)
class PSOFTConfig(PrincipalConfig):
    """use_cayley_neumann: C by num_cayley_neumann_terms, with ‖Q‖ up to cayley_neumann_eps, and not exact."""

    variant: str = "psoft"
    dropout: float = 0.0
    orth: bool = True
    mag_b: bool = True
    mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        eps = self.cayley_neumann_eps
        self.require(eps is None or (is_number(eps) and 0 < eps < 1), "cayley_neumann_eps", "between 0 and 1, or None")
        check_cayley(self)


@register
class PSOFT:
    name = "psoft"
    config = PSOFTConfig
    base_weight = "read"
    handles_scale = True
    init = staticmethod(fit_factors)

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: PSOFTConfig) -> dict[str, ParamSpec]:
        r, one = cfg.r, ParamSpec((cfg.r,), init="ones", keep_dtype=True)
        angles, square = (r * (r - 1) // 2,), ParamSpec((r, r), init=nn.init.eye_, keep_dtype=True)
        specs = {"lora_R": ParamSpec(angles, keep_dtype=True) if cfg.orth else square}
        specs |= {"lora_vector_b": one} if cfg.mag_b else {}
        specs |= {"lora_vector_a": one} if cfg.mag_a else {}
        return specs | factor_specs(d_in, d_out, cfg)

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        up = layer.lora_U @ _core(layer.cfg, *_trained(layer)).to(layer.lora_U.dtype)  # U (M - I) (o, r)
        return LowRank(layer.lora_V, up, layer.scale, layer.cfg.dropout if layer.training else 0.0)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        core, factors = partial(_core, layer.cfg), (layer.lora_V, layer.lora_U)
        return with_core(layer, x, y, factors, core, *_trained(layer), dropout=layer.cfg.dropout)


def _trained(layer: Layer) -> list[Tensor]:
    ones = layer.lora_R.new_ones(layer.cfg.r)
    b, a = layer.lora_vector_b if layer.cfg.mag_b else ones, layer.lora_vector_a if layer.cfg.mag_a else ones
    return [layer.lora_R, b, a]


def _core(cfg: PSOFTConfig, r: Tensor, b: Float[Tensor, "r"], a: Float[Tensor, "r"]) -> Float[Tensor, "r r"]:
    """M - I, of numbers in float32 at least."""
    r, b, a = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (r, b, a))
    q = bounded(skew(r, cfg.r), cfg.cayley_neumann_eps if cfg.use_cayley_neumann else None) if cfg.orth else None
    turn = r - torch.eye(cfg.r).to(r) if q is None else rotation_less_identity(q, series_terms(cfg))  # C - I
    return b[:, None] * turn * a + ((b - 1) * a + (a - 1)).diag()
