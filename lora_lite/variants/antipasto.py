"""AntiPaSTO: rotate and rescale some of the weight's own directions (Clark 2026, arXiv:2601.07473).

    y = W x + b + U M Vᵀ x        W = U_k diag(S_k) V_kᵀ, k = min(i, o);  U (o, r), S (r,), V (i, r)  r of them, frozen
    U M Vᵀ = U_rot diag(S + c Δs) V_rotᵀ - U diag(S) Vᵀ                   Δs (r,), θ  trained
      rotate = V   U_rot = U       V_rot = V R     M = c diag(Δs) + diag(S + c Δs) (R - I)ᵀ
      rotate = U   U_rot = U R     V_rot = V       M = c diag(Δs) + (R - I) diag(S + c Δs)
    R = Cayley(c A) = (I - cA/2)(I + cA/2)⁻¹, so R - I = -(I + cA/2)⁻¹ cA
    A = -Aᵀ (r, r) in blocks (b, b), with θ above the diagonal of each

Identity   Δs = 0 and θ = 0, bit-exact: no term of M is a difference. R(-c) = R(c)⁻¹ = R(c)ᵀ; c is no blend of outputs
Base       read once, at init, for its SVD: dense layers only; a load needs neither an SVD nor data
Departs    the paper's code writes W - U diag(S) Vᵀ into the layer, starts Δs and θ at small random values so that the
           two poles differ from the first step, bounds A's entries by a tanh, and rotates all r directions together.
           Here no base is written, both start at 0, A is unbounded (Cayley turns by less than π), and blocks are small;
           r mod b directions are in no block
Checked    against the formula on explicit matrices, R built with an inverse
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.variant import Layer, ParamSpec, register
from ..families.sspace import SSpaceConfig, basis_specs, fit_basis, needs_data
from ..ops.cayley import rotation_less_identity, skew

__all__ = ["AntiPaSTO", "AntiPaSTOConfig"]


@dataclass(frozen=True, kw_only=True)
class AntiPaSTOConfig(SSpaceConfig):
    """rotate: the basis that turns, "V" (of inputs), "U" (of outputs) or "none". block: b, of directions."""

    variant: str = "antipasto"
    rotate: str = "V"
    block: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.rotate in ("V", "U", "none"), "rotate", '"V", "U" or "none"')
        self.require(type(self.block) is int and self.block > 1, "block", "at least 2 directions")


@register
class AntiPaSTO:
    name = "antipasto"
    config = AntiPaSTOConfig
    base_weight = "dense"
    handles_scale = True
    needs_calibration = staticmethod(needs_data)
    group_init = staticmethod(fit_basis)

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: AntiPaSTOConfig) -> dict[str, ParamSpec]:
        specs = basis_specs(d_in, d_out, cfg)
        (r,) = specs["lora_S"].shape
        specs["lora_ds"] = ParamSpec((r,), keep_dtype=True)
        b = min(cfg.block, r)
        if cfg.rotate != "none" and b > 1:
            specs["lora_theta"] = ParamSpec((r // b, b * (b - 1) // 2), keep_dtype=True)
        return specs

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        coordinates = x @ layer.lora_V  # Vᵀ x (*b, r)
        return y + (coordinates @ _core(layer).to(x).mT) @ layer.lora_U.mT


def _core(layer: Layer) -> Float[Tensor, "r r"]:
    """M, in float32 at least."""
    dtype = torch.promote_types(layer.lora_ds.dtype, torch.float32)
    ds = layer.scale * layer.lora_ds.to(dtype)
    r, b, s = len(ds), min(layer.cfg.block, len(ds)), layer.lora_S.to(dtype) + ds
    if layer.cfg.rotate == "none" or b == 1:
        return ds.diag()
    # R - I, and not R: so that no term of M is a difference of two that are almost equal
    turn = cayley_less_identity(layer.scale * layer.lora_theta.to(dtype), b, r)
    return ds.diag() + (s[:, None] * turn.mT if layer.cfg.rotate == "V" else turn * s)


def cayley_less_identity(theta: Float[Tensor, "n p"], b: int, r: int) -> Float[Tensor, "r r"]:
    """Cayley(A) - I, of the block-diagonal skew A with theta above its diagonal."""
    turns = rotation_less_identity(-skew(theta, b) / 2)  # (n, b, b)
    rest = r - b * len(theta)  # directions in no block, which do not turn
    return torch.block_diag(*turns, theta.new_zeros(rest, rest))
