"""PiSSA: LoRA that starts from the principal singular vectors (Meng et al. 2024, arXiv:2404.02948, section 3).

    y = (W - s B0 A0) x + b + s B A x       A (r, i)   B (o, r)   s = α/r
      = y_base + s [B ΔB] [ΔA; A0] x        ΔA = A - A0   ΔB = B - B0
    s B0 A0 = U_r S_r V_rᵀ, the top r of W = U S Vᵀ;  A0 = √(S_r/s) V_rᵀ,  B0 = U_r √(S_r/s)

Identity   ΔA = ΔB = 0, bit-exact
Base       read once, at init: dense layers only, since the point of a residual is to be quantised afterwards
Departs    the paper writes the residual W - s B0 A0 into the layer. Here A0 and B0 stay as frozen buffers: a load needs
           no SVD. The differences are formed in their storage dtype, so nothing cancels in bfloat16
Checked    against PEFT LoraConfig(init_lora_weights="pissa"): outputs, gradients, three AdamW steps
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from loguru import logger
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.validate import positive_or_none
from ..core.variant import Layer, ParamSpec, register
from ..errors import ConfigError
from ..ops.low_rank import add_low_rank
from ..ops.svd import leading_svd, top_svd

__all__ = ["PiSSA", "PiSSAConfig"]


@dataclass(frozen=True, kw_only=True)
class PiSSAConfig(AdapterConfig):
    """alpha: None means r. svd: "exact", or "fast", a seeded randomised SVD that logs its error. svd_of: "base", or
    "history", the base with the rounds that are kept on it (`lora_lite.freeze_into`); read at attach only."""

    variant: str = "pissa"
    alpha: float | None = None
    svd: str = "exact"
    svd_of: str = "base"
    ADDED_LATER: ClassVar[tuple[str, ...]] = (*AdapterConfig.ADDED_LATER, "svd_of")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(positive_or_none(self.alpha), "alpha", "a number above 0, or None for r")
        self.require(self.svd in ("exact", "fast"), "svd", '"exact" or "fast"')
        self.require(self.svd_of in ("base", "history"), "svd_of", '"base" or "history"')

    @property
    def scaling(self) -> float:
        """The factor s."""
        return 1.0 if self.alpha is None else self.alpha / self.r


@register
class PiSSA:
    name = "pissa"
    config = PiSSAConfig
    base_weight = "dense"
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: PiSSAConfig) -> dict[str, ParamSpec]:
        if cfg.r > min(d_in, d_out):
            raise ConfigError(
                f"PiSSAConfig(r={cfg.r}): a ({d_out}, {d_in}) weight has {min(d_in, d_out)} directions\n"
                f"  lower r, there alone with per_layer, or leave the layer out with exclude_names"
            )
        a, b = (cfg.r, d_in), (d_out, cfg.r)
        return {
            "lora_A": ParamSpec(a, keep_dtype=True),
            "lora_B": ParamSpec(b, keep_dtype=True),
            "lora_A0": ParamSpec(a, trainable=False, keep_dtype=True),
            "lora_B0": ParamSpec(b, trainable=False, keep_dtype=True),
        }

    @staticmethod
    def init(layer: Layer, cfg: PiSSAConfig) -> None:
        w = layer.dense_weight(cfg.svd_of)  # float32 (o, i)
        u, s, v = leading_svd(w, cfg.r) if cfg.svd == "fast" else top_svd(w, cfg.r)
        if cfg.svd == "fast":
            error = float(max((w @ v - u * s).norm(), (w.mT @ u - v * s).norm()) / s.norm())  # 0 if they are true
            logger.debug(f"{layer.path}: randomised SVD, max(‖WV - US‖, ‖WᵀU - VS‖)/‖S‖ = {error:.1e}")
        root = (s / cfg.scaling).sqrt()  # (r,)
        layer.lora_A0.copy_(root[:, None] * v.mT)
        layer.lora_B0.copy_(u * root)
        layer.lora_A.copy_(layer.lora_A0)  # as stored, so that ΔA is 0 in every dtype
        layer.lora_B.copy_(layer.lora_B0)

    @staticmethod
    def low_rank(layer: Layer) -> tuple[Float[Tensor, "k i"], Float[Tensor, "o k"], float]:
        a, b = layer.lora_A, layer.lora_B
        a0, b0 = layer.lora_A0.to(a.dtype), layer.lora_B0.to(b.dtype)  # a cast of parameters alone must not part them
        # [ΔA; A0] (2r, i) and [B ΔB] (o, 2r): B ΔA + ΔB A0 = B A - B0 A0, and exactly 0 at the start
        return torch.cat([a - a0, a0]), torch.cat([b, b - b0], dim=1), layer.scale * layer.cfg.scaling

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        a, b, s = PiSSA.low_rank(layer)
        if torch.is_grad_enabled():  # the backward keeps them: no parameters, so they take memory of their own
            a, b = a.to(x.dtype), b.to(x.dtype)
        return add_low_rank(y, x, a, b, s)
