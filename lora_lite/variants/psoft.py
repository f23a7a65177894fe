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
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..core.validate import is_number
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.orthogonal import change_by, check_cayley, check_rank, series_terms
from ..ops.cayley import bounded, rotation_less_identity, skew
from ..ops.svd import principal_factors

__all__ = ["PSOFT", "PSOFTConfig"]


@dataclass(frozen=True, kw_only=True)
class PSOFTConfig(AdapterConfig):
    """ab_svd_init: "psoft_init", all singular values in U, or "pissa_init", their roots in U and in V. svd: "full", or
    "lowrank" with svd_lowrank_niter and random_seed. cayley_neumann_eps: a bound on ‖Q‖ for the series."""

    variant: str = "psoft"
    r: int = 32
    dropout: float = 0.0
    ab_svd_init: str = "psoft_init"
    svd: str = "full"
    svd_lowrank_niter: int = 10
    random_seed: int = 0
    orth: bool = True
    mag_b: bool = True
    mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        eps, inits = self.cayley_neumann_eps, ("psoft_init", "pissa_init")
        self.require(is_number(self.dropout) and 0 <= self.dropout < 1, "dropout", "a probability below 1")
        self.require(self.ab_svd_init in inits, "ab_svd_init", f"one of {inits}")
        self.require(self.svd in ("full", "lowrank"), "svd", '"full" or "lowrank"')
        self.require(eps is None or (is_number(eps) and 0 < eps < 1), "cayley_neumann_eps", "between 0 and 1, or None")
        for name in ("svd_lowrank_niter", "random_seed"):
            self.require(type(getattr(self, name)) is int and getattr(self, name) >= 0, name, "0 or more")
        for name in ("orth", "mag_b", "mag_a"):
            self.require(isinstance(getattr(self, name), bool), name, "True or False")
        check_cayley(self)

    @property
    def factors(self) -> tuple[int, bool, int | None, int]:
        """How U and V come from W: the arguments of `principal_factors`."""
        niter = self.svd_lowrank_niter if self.svd == "lowrank" else None
        return self.r, self.ab_svd_init == "pissa_init", niter, self.random_seed


@register
class PSOFT:
    name = "psoft"
    config = PSOFTConfig
    base_weight = "read"
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: PSOFTConfig) -> dict[str, ParamSpec]:
        r = cfg.r
        check_rank(cfg, d_in, d_out)
        square = ParamSpec((r, r), init=nn.init.eye_, keep_dtype=True)
        specs = {"lora_R": ParamSpec((r * (r - 1) // 2,), keep_dtype=True) if cfg.orth else square}
        specs |= dict.fromkeys(_magnitudes(cfg), ParamSpec((r,), init="ones", keep_dtype=True))
        specs["lora_U"] = ParamSpec((d_out, r), trainable=False, keep_dtype=True)
        return specs | {"lora_V": ParamSpec((r, d_in), trainable=False, keep_dtype=True)}

    @staticmethod
    def init(layer: Layer, cfg: PSOFTConfig) -> None:
        u, v = principal_factors(layer.dense_weight(), *cfg.factors)
        layer.lora_U.copy_(u)
        layer.lora_V.copy_(v)

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        up = layer.lora_U @ _core(layer.cfg, *_trained(layer)).to(layer.lora_U.dtype)  # U (M - I) (o, r)
        return LowRank(layer.lora_V, up, layer.scale, layer.cfg.dropout if layer.training else 0.0)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        def product(x: Tensor, core: Tensor) -> Tensor:
            return F.linear(F.linear(F.linear(x, v.to(x.dtype)), core.to(x.dtype)), u.to(x.dtype))

        u, v, cfg = layer.lora_U, layer.lora_V, layer.cfg
        return y + change_by(layer, x, partial(_core, cfg), product, *_trained(layer), dropout=cfg.dropout)


def _magnitudes(cfg: PSOFTConfig) -> list[str]:
    return ["lora_vector_b"] * cfg.mag_b + ["lora_vector_a"] * cfg.mag_a


def _trained(layer: Layer) -> list[Tensor]:
    return [getattr(layer, name) for name in ("lora_R", *_magnitudes(layer.cfg))]


def _core(cfg: PSOFTConfig, r: Tensor, *magnitudes: Float[Tensor, "r"]) -> Float[Tensor, "r r"]:
    """M - I."""
    if cfg.orth:
        q = bounded(skew(r, cfg.r), cfg.cayley_neumann_eps if cfg.use_cayley_neumann else None)
        turn = rotation_less_identity(q, series_terms(cfg))  # C - I
    else:
        turn = r - torch.eye(cfg.r, dtype=r.dtype, device=r.device)
    given, ones = dict(zip(_magnitudes(cfg), magnitudes, strict=True)), turn.new_ones(cfg.r)
    b, a = given.get("lora_vector_b", ones), given.get("lora_vector_a", ones)
    return b[:, None] * turn * a + ((b - 1) * a + (a - 1)).diag()
