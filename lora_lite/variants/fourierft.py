"""FourierFT: a few Fourier coefficients of ΔW (Gao et al. 2024, arXiv:2405.03003, section 3.1).

    y = (W + ΔW) x + b       ΔW = s Re(F⁻¹ S)        S[u_k, v_k] = c_k at n random places of (o, i), zero elsewhere
    ΔW[p, q] = s/(o i) Σ_k c_k cos 2π(p u_k/o + q v_k/i)                c (n,)

Identity   no: c starts as a normal, as in the paper. init="zeros" starts from the identity, bit-exact
Base       never read: any layer kind
Departs    of few tokens ΔW is never formed: it is a Fourier transform of x, n numbers of it, and one back
Checked    against PEFT FourierFTConfig: places bit for bit, outputs, gradients, three AdamW steps. PEFT works in
           float32 whatever the dtype
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.config import BaseConfig
from ..core.validate import is_number
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.dense import as_low_rank
from ..families.sparse import scattered, seeded_table, wide, with_branch

__all__ = ["FourierFT", "FourierFTConfig"]


@dataclass(frozen=True, kw_only=True)
class FourierFTConfig(BaseConfig):
    """n_frequency: n. scaling: s. seed: of the places (PEFT's random_loc_seed), which layers of one shape share.
    init: "normal" or "zeros", of c."""

    variant: str = "fourierft"
    n_frequency: int = 1000
    scaling: float = 150.0
    seed: int = 777
    init: str = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(type(self.n_frequency) is int and self.n_frequency > 0, "n_frequency", "a number of at least 1")
        self.require(is_number(self.scaling) and self.scaling != 0, "scaling", "a number other than 0")
        self.require(self.init in ("normal", "zeros"), "init", '"normal" or "zeros"')


@register
class FourierFT:
    name = "fourierft"
    config = FourierFTConfig
    has_identity_init = False
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: FourierFTConfig) -> dict[str, ParamSpec]:
        n, start = cfg.n_frequency, torch.nn.init.normal_ if cfg.init == "normal" else "zeros"
        places = seeded_table(d_in, d_out, n, f"FourierFTConfig(n_frequency={n})", cfg.seed)
        return {"lora_spectrum": ParamSpec((n,), start, keep_dtype=True), "lora_places": places}

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        return as_low_rank(layer, _delta(layer), layer.lora_spectrum, layer.lora_places)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        branch = partial(_branch, layer.out_features, layer.cfg.scaling)
        cost = layer.in_features + layer.cfg.n_frequency + layer.out_features
        return with_branch(layer, x, y, _delta(layer), branch, cost, layer.lora_spectrum, layer.lora_places)


def _delta(layer: Layer) -> partial[Tensor]:
    return partial(_inverse, layer.out_features, layer.in_features, layer.cfg.scaling)


def _inverse(o: int, i: int, s: float, c: Float[Tensor, "n"], places: Int[Tensor, "n"]) -> Float[Tensor, "o i"]:
    """ΔW, through half of the spectrum: its real part is the transform of [S(u, v) + S(-u, -v)]/2."""
    places = places.long()
    mirrored = (-(places // i)) % o * i + (-(places % i)) % i
    both = scattered(o, i, torch.cat([wide(c), wide(c)]) * (s / 2), torch.cat([places, mirrored]))
    return torch.fft.irfft2(both[:, : i // 2 + 1] + 0j, s=(o, i))


def _branch(
    o: int, s: float, x: Float[Tensor, "m i"], c: Float[Tensor, "n"], places: Int[Tensor, "n"]
) -> Float[Tensor, "m o"]:
    """x ΔWᵀ: with X = Σ_q x_q e^{2πi q v/i}, the transform back of Z[u] = Σ_{k: u_k = u} c_k X[v_k]."""
    i, places = x.shape[1], places.long()
    terms = torch.view_as_real(torch.fft.fft(x)[:, (-(places % i)) % i] * c.to(x.dtype))  # (m, n, 2)
    rows = (places // i)[None, :, None].expand_as(terms)
    z = terms.new_zeros(len(x), o, 2).scatter_add(1, rows, terms)
    return torch.fft.ifft(torch.view_as_complex(z)).real * (s / i)
