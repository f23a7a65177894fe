"""WaveFT: a few wavelet coefficients of ΔW (Bilican et al. 2025, arXiv:2505.12532, section 3).

    y = (W + ΔW) x + b       ΔW = s IDWT(S), one level in two dimensions, cut to (o, i); or s S without use_idwt
    S[u_k, v_k] = c_k at n random places of (o, i), zero elsewhere        c (n,)

    Each coefficient adds c_k f ⊗ g, L rows by L columns: of the four quarters of S, f or g is the scaling filter or the
    wavelet's. S has L - 2 more rows and columns than W, half of them on each side, and an even number

Identity   c = 0, bit-exact
Base       never read: any layer kind
Departs    coif4 and coif5 are the true ones; PEFT's table has wrong numbers for the first, and too many for the second
Checked    against PEFT WaveFTConfig: places bit for bit, outputs, gradients, three AdamW steps
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from ..core.config import BaseConfig
from ..core.validate import is_number, positive_or_none
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.dense import as_low_rank
from ..families.sparse import GATHERED, gathered, scattered, seeded_table, wide, with_branch
from ..ops.wavelets import DIGITS, inverse, scaling_filter, times_inverse

__all__ = ["WaveFT", "WaveFTConfig"]


@dataclass(frozen=True, kw_only=True)
class WaveFTConfig(BaseConfig):
    """n_frequency: n. density: n is this part of o i in its place, so that it grows with the layer (PEFT's
    proportional_parameters). scaling: s. wavelet_family: db1 to 10, sym2 to 10, coif1 to 5. seed: of the places."""

    variant: str = "waveft"
    n_frequency: int = 2592
    density: float | None = None
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    seed: int = 777

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(type(self.n_frequency) is int and self.n_frequency > 0, "n_frequency", "a number of at least 1")
        valid = positive_or_none(self.density) and (self.density or 0) <= 1
        self.require(valid, "density", "a number above 0 and up to 1, or None")
        self.require(is_number(self.scaling) and self.scaling != 0, "scaling", "a number other than 0")
        self.require(self.wavelet_family in DIGITS, "wavelet_family", f"one of {', '.join(DIGITS)}")
        # no field: computed here, so that a graph of torch.compile finds numbers
        object.__setattr__(self, "filter", scaling_filter(self.wavelet_family))


@register
class WaveFT:
    name = "waveft"
    config = WaveFTConfig
    handles_scale = True
    not_capturable = "each call makes the filter of its wavelet on the host"

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: WaveFTConfig) -> dict[str, ParamSpec]:
        n, what = cfg.n_frequency, f"WaveFTConfig(n_frequency={cfg.n_frequency})"
        if cfg.density is not None:
            n, what = max(1, round(cfg.density * d_out * d_in)), f"WaveFTConfig(density={cfg.density})"
        return {
            "lora_spectrum": ParamSpec((n,), keep_dtype=True),
            "lora_places": seeded_table(d_in, d_out, n, what, cfg.seed),
        }

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        return as_low_rank(layer, _delta(layer), layer.lora_spectrum, layer.lora_places)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        cfg, c = layer.cfg, layer.lora_spectrum
        branch = partial(_branch, layer.out_features, cfg)
        cost = GATHERED * len(c) * (2 * len(cfg.filter) if cfg.use_idwt else 1)
        return with_branch(layer, x, y, _delta(layer), branch, cost, c, layer.lora_places)


def _delta(layer: Layer) -> partial[Tensor]:
    return partial(_inverse, layer.out_features, layer.in_features, layer.cfg)


def _inverse(o: int, i: int, cfg: Any, c: Float[Tensor, "n"], places: Int[Tensor, "n"]) -> Float[Tensor, "o i"]:
    c = wide(c) * cfg.scaling
    return inverse(o, i, cfg.filter, c, places) if cfg.use_idwt else scattered(o, i, c, places)


def _branch(
    o: int, cfg: Any, x: Float[Tensor, "m i"], c: Float[Tensor, "n"], places: Int[Tensor, "n"]
) -> Float[Tensor, "m o"]:
    c = c.to(x.dtype) * cfg.scaling
    return times_inverse(o, x, cfg.filter, c, places) if cfg.use_idwt else gathered(o, x, c, places)
