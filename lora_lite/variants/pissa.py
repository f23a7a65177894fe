"""PiSSA: LoRA that starts from the principal singular vectors (Meng et al. 2024, arXiv:2404.02948, section 3).

    y = (W - s B0 A0) x + b + s B A x       A (r, i)   B (o, r)   s = α/r
    s B0 A0 = U_r S_r V_rᵀ, the top r of W = U S Vᵀ;  A0 = √(S_r/s) V_rᵀ,  B0 = U_r √(S_r/s)

Identity   the difference from A0 and B0 acts (families/residual.py): bit-exact
Base       read once, at init: dense layers only, since the point of a residual is to be quantised afterwards, which
           lora_lite.quantize_residual does from a folder (QPiSSA)
Departs    the paper writes the residual W - s B0 A0 into the layer. Here A0 and B0 stay as frozen buffers.
           niter: the paper's fast SVD (section 4), PEFT's pissa_niter_N, but seeded
Checked    against PEFT LoraConfig(init_lora_weights="pissa"): outputs, gradients, three AdamW steps
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loguru import logger

from ..core.config import AdapterConfig
from ..core.variant import Layer, register
from ..families import residual
from ..ops.svd import iterated_svd, leading_svd, top_svd

__all__ = ["PiSSA", "PiSSAConfig"]


@dataclass(frozen=True, kw_only=True)
class PiSSAConfig(residual.ResidualConfig):
    """svd: "exact", or "fast", a seeded randomised SVD that logs its error. niter: of "fast", take so many rounds of
    subspace iteration, as the paper does, in place of a block Krylov space, which is nearer and dearer. svd_of: "base",
    or "history", the base with the rounds that are kept on it (`lora_lite.freeze_into`); read at attach only."""

    variant: str = "pissa"
    svd: str = "exact"
    svd_of: str = "base"
    niter: int | None = None
    ADDED_LATER: ClassVar[tuple[str, ...]] = (*AdapterConfig.ADDED_LATER, "svd_of")
    UNSAID: ClassVar[Mapping[str, Any]] = {**AdapterConfig.UNSAID, "niter": None}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.svd in ("exact", "fast"), "svd", '"exact" or "fast"')
        self.require(self.svd_of in ("base", "history"), "svd_of", '"base" or "history"')
        counts = type(self.niter) is int and self.niter >= 0 and self.svd == "fast"
        self.require(self.niter is None or counts, "niter", 'a number of rounds with svd="fast", or None')


@register
class PiSSA:
    name, config = "pissa", PiSSAConfig
    base_weight, handles_scale = "dense", True
    param_specs = staticmethod(residual.param_specs)
    low_rank = staticmethod(residual.low_rank)
    forward = staticmethod(residual.forward)

    @staticmethod
    def init(layer: Layer, cfg: PiSSAConfig) -> None:
        w = layer.dense_weight(cfg.svd_of)  # float32 (o, i)
        if cfg.svd == "exact":
            u, s, v = top_svd(w, cfg.r)
        else:
            u, s, v = leading_svd(w, cfg.r) if cfg.niter is None else iterated_svd(w, cfg.r, cfg.niter)
            error = float(max((w @ v - u * s).norm(), (w.mT @ u - v * s).norm()) / s.norm())  # 0 if they are true
            logger.debug(f"{layer.path}: randomised SVD, max(‖WV - US‖, ‖WᵀU - VS‖)/‖S‖ = {error:.1e}")
        residual.from_svd(layer, u, s, v)
