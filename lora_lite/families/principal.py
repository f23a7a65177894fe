"""Methods on the principal subspace of a weight: U V = the top r of its SVD, kept in the file."""

from dataclasses import dataclass
from typing import Any

from ..core.config import AdapterConfig
from ..core.variant import Layer, ParamSpec
from ..ops.svd import principal_factors
from .factors import check_directions


@dataclass(frozen=True, kw_only=True)
class PrincipalConfig(AdapterConfig):
    """ab_svd_init: "psoft_init", all singular values in U, or "pissa_init", their roots in U and in V. svd: "full", or
    "lowrank", torch's randomised one with svd_lowrank_niter and random_seed."""

    r: int = 32
    ab_svd_init: str = "psoft_init"
    svd: str = "full"
    svd_lowrank_niter: int = 10
    random_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        inits = ("psoft_init", "pissa_init")
        self.require(self.ab_svd_init in inits, "ab_svd_init", f"one of {inits}")
        self.require(self.svd in ("full", "lowrank"), "svd", '"full" or "lowrank"')
        niter, seed = self.svd_lowrank_niter, self.random_seed
        self.require(
            type(niter) is int and 0 <= niter <= 1000, "svd_lowrank_niter", "0 to 1000"
        )  # a folder's run at load
        self.require(type(seed) is int and 0 <= seed < 2**63, "random_seed", "0 or more, below 2^63")

    @property
    def factors(self) -> tuple[int, bool, int | None, int]:
        """How U and V come from the weight: the arguments of `principal_factors` after it."""
        niter = self.svd_lowrank_niter if self.svd == "lowrank" else None
        return self.r, self.ab_svd_init == "pissa_init", niter, self.random_seed


def factor_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ParamSpec]:
    """U (d_out, r) and V (r, d_in). Raises ConfigError if the weight has fewer directions."""
    check_directions(cfg, d_in, d_out)
    u = ParamSpec((d_out, cfg.r), trainable=False, keep_dtype=True)
    return {"lora_U": u, "lora_V": ParamSpec((cfg.r, d_in), trainable=False, keep_dtype=True)}


def fit_factors(layer: Layer, cfg: Any) -> None:
    """The `init` of such a method."""
    u, v = principal_factors(layer.dense_weight(), *cfg.factors)
    layer.lora_U.copy_(u)
    layer.lora_V.copy_(v)
