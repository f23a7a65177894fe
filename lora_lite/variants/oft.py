"""OFT: rotate the input in blocks (Qiu et al. 2023, arXiv:2306.07280; OFTv2, arXiv:2506.19847).

    y = W (R x) + b          R = blockdiag(R_1 ... R_n)ᵀ, each R_j (s, s) with n = i / s       v (n, s (s - 1) / 2)
    R_j = (I + Q_j)(I - Q_j)⁻¹, or its series I + 2Q_j + ... + 2Q_jᵏ⁻² + Q_jᵏ⁻¹ of k terms, Q_j skew with v_j above
    x' = x + c x (R - I)     on rows, at scale c

Identity   v = 0, bit-exact: R - I is formed by itself
Base       never read: any layer kind. On a convolution its patches turn
Departs    both forms turn the same way, where PEFT's exact one is the inverse. k terms are k, where PEFT's 3 are 4. A
           block size that doesn't divide is an error, where PEFT takes another. COFT's bound ‖Q_j‖ ≤ eps/√n is kept
           in each forward, and written into v by `Adapter.step`, where PEFT's forward writes. side="output" turns
           y - b, as PEFT does to embeddings. PEFT's module_dropout does nothing, so there is none
Checked    against PEFT OFTConfig: outputs, gradients, three AdamW steps
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.validate import is_number
from ..core.variant import Layer, ParamSpec, register
from ..families.orthogonal import check_cayley, check_divides, series_terms, with_turn
from ..ops.cayley import rotation_less_identity, skew

__all__ = ["OFT", "OFTConfig"]


@dataclass(frozen=True, kw_only=True)
class OFTConfig(BaseConfig):
    """block_size: s. block_share: one R_j for all blocks. coft, eps: bound the turn. side: "input", or "output" for an
    embedding. use_cayley_neumann: the series of num_cayley_neumann_terms, or the exact rotation."""

    variant: str = "oft"
    block_size: int = 32
    block_share: bool = False
    coft: bool = False
    eps: float = 6e-5
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    side: str = "input"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(type(self.block_size) is int and self.block_size > 1, "block_size", "at least 2")
        self.require(is_number(self.eps) and self.eps > 0, "eps", "a number above 0")
        self.require(self.side in ("input", "output"), "side", '"input" or "output"')
        check_cayley(self)


@register
class OFT:
    name = "oft"
    config = OFTConfig
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: OFTConfig) -> dict[str, ParamSpec]:
        d, s = d_in if cfg.side == "input" else d_out, cfg.block_size
        check_divides(cfg, "block_size", d)
        return {"lora_R": ParamSpec((1 if cfg.block_share else d // s, s * (s - 1) // 2), keep_dtype=True)}

    @staticmethod
    def forward_input(layer: Layer, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b i"]:
        return with_turn(layer, x, x, partial(_turn, layer.cfg), layer.lora_R) if layer.cfg.side == "input" else x

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        if layer.cfg.side == "input":
            return y
        wx = y if layer.bias is None else y - layer.bias
        return with_turn(layer, y, wx, partial(_turn, layer.cfg), layer.lora_R)

    @staticmethod
    @torch.no_grad()
    def on_step(targets: Mapping[str, Layer], cfg: OFTConfig, step: int) -> None:
        for layer in targets.values():
            layer.lora_R.copy_(_bounded(layer.lora_R, layer.cfg))


def _turn(cfg: OFTConfig, v: Float[Tensor, "n p"]) -> Float[Tensor, "n s s"]:
    return rotation_less_identity(skew(_bounded(v, cfg), cfg.block_size), series_terms(cfg))


def _bounded(v: Float[Tensor, "*e n p"], cfg: OFTConfig) -> Float[Tensor, "*e n p"]:
    """COFT's projection of each block, a constant factor to the gradient; v itself without coft."""
    if not cfg.coft:
        return v
    norm = (2 * v.detach().square().sum(-1, keepdim=True)).sqrt()  # ‖Q_j‖ (*e, n, 1)
    return v * (cfg.eps / v.shape[-2] ** 0.5 / norm).clamp(max=1)
