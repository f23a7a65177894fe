"""HRA: a chain of Householder reflections of the input (Yuan et al. 2024, arXiv:2405.17484).

    y = W (H x) + b          H = H_1 H_2 ... H_r,  H_k = I - 2 û_k û_kᵀ,  û_k = u_k / ‖u_k‖          u (i, r)
    x' = x + c x M Lᵀ        on rows, at scale c: H - I = L Mᵀ, L and M (i, r), by pairs of reflections
    apply_GS                 H = (I - 2 P)(I - 2 P0), P the projection on the columns of u, P0 on those of u0 (i, r)

Identity   u_1 = u_2, u_3 = u_4, ..., bit-exact: L Mᵀ has a factor u_2 - u_1 in each term. apply_GS: u = u0
Base       never read: any layer kind. On a convolution its patches are reflected
Departs    PEFT forms H (i, i) and W H in each forward, and cancels to about 1e-7. An odd r is never the identity: such
           an adapter loads, and none is attached. apply_GS is the paper's I - 2 P, which no start makes the identity;
           so what it starts from is divided out, by the frozen u0. PEFT's, without it, loads with u0 = 0
Checked    against PEFT HRAConfig: outputs, gradients, three AdamW steps
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..core.variant import Layer, ParamSpec, register
from ..errors import ConfigError
from ..families.factors import check_directions, with_factors
from ..ops.householder import reflections, subspace_reflections

__all__ = ["HRA", "HRAConfig"]


@dataclass(frozen=True, kw_only=True)
class HRAConfig(AdapterConfig):
    """r: the number of reflections, even. apply_GS: make them orthogonal to each other, by Gram-Schmidt."""

    variant: str = "hra"
    apply_GS: bool = False  # noqa: N815  as PEFT calls it


@register
class HRA:
    name = "hra"
    config = HRAConfig
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: HRAConfig) -> dict[str, ParamSpec]:
        if not cfg.apply_GS:
            return {"lora_u": ParamSpec((d_in, cfg.r), init=_in_pairs, keep_dtype=True)}
        check_directions(cfg, d_in, d_in)
        u = ParamSpec((d_in, cfg.r), init="kaiming", keep_dtype=True)
        return {"lora_u": u, "lora_u0": ParamSpec((d_in, cfg.r), trainable=False, keep_dtype=True)}

    @staticmethod
    def init(layer: Layer, cfg: HRAConfig) -> None:
        if cfg.apply_GS:
            layer.lora_u0.copy_(layer.lora_u)

    @staticmethod
    def forward_input(layer: Layer, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b i"]:
        tensors = [layer.lora_u, layer.lora_u0.to(layer.lora_u.dtype)] if layer.cfg.apply_GS else [layer.lora_u]
        return with_factors(layer, x, x, _factors, *tensors)


def _in_pairs(u: Float[Tensor, "i r"]) -> None:
    """Kaiming's uniform numbers for the half of the columns, each of which is there twice, as PEFT has it."""
    if u.shape[-1] % 2:
        raise ConfigError(
            f"HRAConfig(r={u.shape[-1]}): an odd number of reflections is never the identity\n  choose an even r"
        )
    half = u.new_empty(*u.shape[:-1], u.shape[-1] // 2)
    nn.init.kaiming_uniform_(half, a=5**0.5)
    u.copy_(half.repeat_interleave(2, dim=-1))


def _factors(u: Float[Tensor, "i r"], *start: Float[Tensor, "i r"]) -> tuple[Tensor, Tensor]:
    """Mᵀ (k, i) and L (i, k), of numbers in float32 at least."""
    u, *others = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (u, *start))
    left, right = subspace_reflections(u, *others) if others else reflections(u)
    return right.mT, left
