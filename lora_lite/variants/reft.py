"""LoReFT: a low-rank edit of the residual stream at some tokens of the prompt (Wu et al. 2024, arXiv:2404.03592, 3.2).

    h + Rᵀ (W h + b − R h)      R (r, d) with orthonormal rows, W (r, d), b (r,)
    at the first f and the last l tokens of the prompt, at the outputs of blocks

Identity   never: W, b and R start at random, as pyreft's do
Base       never read: any block, or another output
Departs    R is what Gram-Schmidt makes of a trained matrix's rows; pyreft's is a product of reflections. One edit is
           for both ends (pyreft's share_weights). A prompt of fewer than f + l tokens is edited whole, its middle too
Checked    against the formula above, and pyreft's LoreftIntervention written anew: outputs and gradients
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..core.positions import Prompt
from ..core.variant import Layer, ParamSpec, register
from ..errors import ConfigError
from ..families.positions import at_the_ends
from ..ops.low_rank import is_transformed

__all__ = ["ReFT", "ReFTConfig"]


@dataclass(frozen=True, kw_only=True)
class ReFTConfig(AdapterConfig):
    """first, last: tokens at each end of the prompt, f and l. In training it ends before the first label that counts
    (not -100); without labels, or where all count, it is the whole row. dropout: of the edited stream."""

    variant: str = "reft"
    kinds: Sequence[str] = ("block",)
    first: int = 7
    last: int = 7
    dropout: float = 0.0
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (*AdapterConfig.SAME_AT_ALL_LAYERS, "first", "last")
    WITHOUT_MATRIX: ClassVar[tuple[str, ...]] = ("block",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("first", "last"):
            self.require(type(n := getattr(self, name)) is int and n >= 0, name, "a number of tokens, 0 or more")
        self.require(self.first + self.last > 0, "first", "a token or more at one of the ends")


@register
class ReFT:
    name, config = "reft", ReFTConfig
    has_identity_init, reads_input, handles_scale = False, False, True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: ReFTConfig) -> dict[str, ParamSpec]:
        if cfg.r > d_out:
            raise ConfigError(f"ReFTConfig(r={cfg.r}): {d_out} channels have no more orthonormal rows\n  lower r")
        uniform = partial(nn.init.uniform_, a=-(d_out**-0.5), b=d_out**-0.5)  # as nn.Linear draws both
        return {
            "lora_R": ParamSpec((cfg.r, d_out), nn.init.orthogonal_, keep_dtype=True),
            "lora_W": ParamSpec((cfg.r, d_out), uniform, keep_dtype=True),
            "lora_b": ParamSpec((cfg.r,), uniform, keep_dtype=True),
        }

    @staticmethod
    def positions(cfg: ReFTConfig) -> Callable[[Prompt], Tensor]:
        return partial(at_the_ends, cfg.first, cfg.last)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b d"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        cfg = layer.cfg
        has_tangents = torch.is_grad_enabled() or is_transformed()  # a constant has none
        R = orthonormal(layer.lora_R) if has_tangents else layer.constant("R", orthonormal, layer.lora_R)
        change = (layer.lora_W - R).to(y.dtype)  # (r, o): R h is never rounded by itself
        edit = (F.linear(y, change) + layer.lora_b.to(y.dtype)) @ R.to(y.dtype)  # (*b, o)
        if cfg.dropout and layer.training:  # pyreft drops out channels of the stream itself
            edit = F.dropout(y + edit, cfg.dropout) - y
        return y + layer.scale * edit


def orthonormal(rows: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
    """Gram-Schmidt of the rows, in float32 at least: their own span, whatever an optimizer makes of them."""
    q, r = torch.linalg.qr(rows.to(torch.promote_types(rows.dtype, torch.float32)).mT)  # (d, r), (r, r)
    return (q * r.diagonal().sign()).mT
