"""BOFT: turn the input by butterfly factors of blocks (Liu et al. 2023, arXiv:2311.06243).

    y = s ⊙ (W x') + b       x' = x B_m-1 ... B_1 B_0 on rows      R (m, D, k, k) for D = i / k blocks      s (o, 1)
    B_j  = P_j blockdiag(C_j,1 ... C_j,D) P_jᵀ      C = (I - K)(I + K)⁻¹, K = (R - Rᵀ) / 2 of each (k, k)
    P_j    the blocks of B_j are of two half-blocks that lie 2ʲ half-blocks apart; of B_0 of neighbours, P_0 = I

Identity   R = 0 and s = 1, bit-exact: C - I is formed by itself, s ⊙ as y + (s - 1) ⊙ (y - b)
Base       never read: any layer kind. On a convolution its patches turn
Departs    the factors act on x one after the other, where PEFT multiplies them out to (i, i) and, without its CUDA
           extension, takes m = 1 whatever is asked for. At scale c: x + c (x' - x), and 1 + c (s - 1) for s
Checked    against PEFT BOFTConfig: outputs, gradients, three AdamW steps; m > 1 with its extension's op in torch
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.variant import Layer, ParamSpec, register
from ..families.orthogonal import change_by, check_divides
from ..ops.cayley import rotation_less_identity, turned_by
from ..ops.recompute import recomputed

__all__ = ["BOFT", "BOFTConfig"]


@dataclass(frozen=True, kw_only=True)
class BOFTConfig(BaseConfig):
    """block_size: k. n_butterfly_factor: m. dropout: in training, the share of the D blocks of one of the factors that
    don't turn, drawn anew in each forward."""

    variant: str = "boft"
    block_size: int = 4
    n_butterfly_factor: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        m, k = self.n_butterfly_factor, self.block_size
        self.require(type(m) is int and 0 < m < 32, "n_butterfly_factor", "the number of factors, 1 or more")
        self.require(type(k) is int and k > 1 and (m == 1 or k % 2 == 0), "block_size", "2 or more; even for m > 1")


@register
class BOFT:
    name = "boft"
    config = BOFTConfig
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: BOFTConfig) -> dict[str, ParamSpec]:
        m, k = cfg.n_butterfly_factor, cfg.block_size
        check_divides(cfg, "block_size", d_in, times=2 ** (m - 1))
        s = ParamSpec((d_out, 1), init="ones", keep_dtype=True)
        return {"lora_R": ParamSpec((m, d_in // k, k, k), keep_dtype=True), "lora_s": s}

    @staticmethod
    def forward_input(layer: Layer, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b i"]:
        return x + change_by(layer, x, partial(_turns, _kept_blocks(layer, x)), _product, layer.lora_R)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        def change(y: Tensor, s: Tensor, *bias: Tensor) -> Tensor:
            return (s - 1)[:, 0].to(y.dtype) * (y - bias[0] if bias else y)

        bias = () if layer.bias is None else (layer.bias,)
        return y + layer.scale * recomputed(change, y, layer.lora_s, *bias)


def _kept_blocks(layer: Layer, x: Tensor) -> Float[Tensor, "m d 1 1"] | None:
    """1 for each block that turns, 0 for those that are dropped."""
    m, d, *_ = layer.lora_R.shape
    if not (layer.training and (dropped := int(layer.cfg.dropout * d))):
        return None
    generator, kept = layer.generator(x), torch.ones(m, d, 1, 1, device=x.device)
    factor = torch.randint(m, (1,), generator=generator, device=x.device)
    kept[factor, torch.randperm(d, generator=generator, device=x.device)[:dropped]] = 0
    return kept


def _turns(kept: Tensor | None, r: Float[Tensor, "m d k k"]) -> Float[Tensor, "m d k k"]:
    turns = rotation_less_identity((r.mT - r) / 2)  # C - I
    return turns if kept is None else turns * kept.to(r.dtype)


def _product(x: Float[Tensor, "*b i"], turns: Float[Tensor, "m d k k"]) -> Float[Tensor, "*b i"]:
    change = torch.zeros_like(x)
    half = turns.shape[-1] // 2
    for j in reversed(range(len(turns))):
        now = x + change
        if j:  # half-blocks that are 2ʲ apart side by side
            now = now.unflatten(-1, (-1, 2, 2**j, half)).transpose(-3, -2).flatten(-4)
        now = turned_by(now, turns[j])
        change = change + (now.unflatten(-1, (-1, 2**j, 2, half)).transpose(-3, -2).flatten(-4) if j else now)
    return change
