"""Lily: factors shared across layers, mixed by a router (Zhong et al. 2024, arXiv:2407.09946).

    y = W x + b + s h B̄      h = A x (n, r)     B̄ = Σ_e p_e B_e (r, o)     p = mean over n tokens of softmax(R h) (E,)
    R (E, r) at each layer;  B (E r, o) once for the layers of one name in a stack of blocks;  A (r, i) once for
    stride_A of these in a row. With share=False each layer has its own

Identity   B = 0, bit-exact
Base       never read: layers that are called with their input, and experts; no convolution or embedding
Departs    p is of the whole batch, as in PEFT: a row's output depends on the others and on padding, decoding differs
           from one long forward, a merge is refused. A block's number says which layers share; PEFT counts layers
Checked    against PEFT LilyConfig: outputs, gradients, three AdamW steps
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.targets import Target
from ..core.validate import is_number
from ..core.variant import Layer, ParamSpec, register
from ..errors import ConfigError
from ..families.projections import add_shared, names_in_stack
from ..ops.few import few_wide
from ..ops.recompute import add_dense, recomputed

__all__ = ["Lily", "LilyConfig"]


@dataclass(frozen=True, kw_only=True)
class LilyConfig(AdapterConfig):
    """stride_A: layers in a row with one A. num_B: E. scaling: s. share: see above."""

    variant: str = "lily"
    r: int = 32
    stride_A: int = 1  # noqa: N815  PEFT's names
    num_B: int = 2  # noqa: N815
    scaling: float = 1.0
    share: bool = True
    SAME_AT_ALL_LAYERS: ClassVar[Any] = (*AdapterConfig.SAME_AT_ALL_LAYERS, "r", "stride_A", "num_B", "share")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(type(self.stride_A) is int and self.stride_A > 0, "stride_A", "a number of layers, at least 1")
        self.require(type(self.num_B) is int and self.num_B > 1, "num_B", "at least 2: one needs no router")
        self.require(is_number(self.scaling) and self.scaling != 0, "scaling", "a number other than 0")

    def names(self, path: str, place: tuple[str | None, int | None]) -> tuple[str, str]:
        """The layer's A and B; of shared ones they tell with whom."""
        a, b = names_in_stack(path, place, self.stride_A)
        return (f"A_{a}".strip("_"), f"B_{b}".strip("_")) if self.share else ("down", "up")


@register
class Lily:
    name, config = "lily", LilyConfig
    handles_scale = True

    @staticmethod
    def layer_specs(target: Target, cfg: LilyConfig) -> dict[str, ParamSpec]:
        if target.by_weight and not target.experts:
            raise ConfigError("no call shows the tokens that p is a mean over\n  leave it out with exclude_names")
        router = {"lora_router": ParamSpec((cfg.num_B, cfg.r), "kaiming", keep_dtype=True)}
        return router if cfg.share else router | _pair("lora_down", "lora_up", target.d_in, target.d_out, cfg)

    @staticmethod
    def shared_specs(targets: Sequence[Target], cfg: LilyConfig) -> dict[str, ParamSpec]:
        specs: dict[str, ParamSpec] = {}
        for target in targets if cfg.share else ():
            pair = _pair(*cfg.names(target.path, target.place), target.d_in, target.d_out, cfg)
            add_shared(specs, pair, target.path, "A and B", ", or use share=False")
        return specs

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        cfg, s = layer.cfg, layer.scale * layer.cfg.scaling
        a, b = (getattr(layer, f"lora_{name}") for name in cfg.names(layer.path, layer.block or (None, None)))
        x = few_wide(x)
        h = F.linear(x, a.to(x.dtype))  # (*b, r)
        return add_dense(y, h, _mixed, recomputed(_chances, h, layer.lora_router), b, s=s)


def _chances(h: Float[Tensor, "*b r"], router: Float[Tensor, "E r"]) -> Float[Tensor, "E"]:
    wide = torch.promote_types(h.dtype, router.dtype)
    every = F.linear(h.to(wide), router.to(wide)).softmax(-1).reshape(-1, len(router))  # (n, E)
    return every.sum(0) / max(1, len(every))  # of no tokens 0 and no NaN


def _mixed(p: Float[Tensor, "E"], b: Float[Tensor, "Er o"]) -> Float[Tensor, "o r"]:
    return (p @ b.to(p.dtype).view(len(p), -1)).view(-1, b.shape[1]).mT  # B̄ᵀ


def _pair(a: str, b: str, d_in: int, d_out: int, cfg: LilyConfig) -> dict[str, ParamSpec]:
    up = ParamSpec((cfg.num_B * cfg.r, d_out), keep_dtype=True)
    return {a: ParamSpec((cfg.r, d_in), "kaiming", keep_dtype=True), b: up}
