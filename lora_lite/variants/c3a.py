"""C³A: circular convolutions in place of a matrix (Chen et al. 2024, arXiv:2407.19342, section 3).

    y = (W + ΔW) x + b       ΔW of circulant blocks (g, g): block (m, n) has w[m, n, (q - p) mod g] / i at [p, q]
    block m of ΔW x = 1/i Σ_n F⁻¹(F x_n ⊙ conj F w_mn)                    w (o/g, i/g, g), o i/g numbers

Identity   no: w starts uniform in Xavier's bounds, as in the paper. init="zeros" starts from the identity, bit-exact
Base       never read: any layer kind
Departs    PEFT's default g = 256 divides few layers (not 576): here g is by default the largest number up to 256 that
           divides both sides. The gradient of x is ΔWᵀ u; PEFT 0.21.2 has u reversed there in each block, a mistake
Checked    against PEFT C3AConfig: outputs, gradient of w, three AdamW steps of one layer. PEFT works in float32 alone
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..errors import ConfigError
from ..families.dense import as_low_rank
from ..families.sparse import wide
from ..ops.recompute import recomputed

__all__ = ["C3A", "C3AConfig"]

STARTS = ("xavier_uniform", "kaiming_uniform", "gaussian", "zeros")
LARGEST = 256


@dataclass(frozen=True, kw_only=True)
class C3AConfig(BaseConfig):
    """block_size: g, a divisor of both sides; None for the largest up to 256. init: of w, one of STARTS."""

    variant: str = "c3a"
    block_size: int | None = None
    init: str = "xavier_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        g = self.block_size
        self.require(g is None or (type(g) is int and g > 0), "block_size", "a size of at least 1, or None")
        self.require(self.init in STARTS, "init", f"one of {STARTS}")


@register
class C3A:
    name = "c3a"
    config = C3AConfig
    has_identity_init = False
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: C3AConfig) -> dict[str, ParamSpec]:
        common = math.gcd(d_in, d_out)
        g = cfg.block_size or max(n for n in range(1, LARGEST + 1) if common % n == 0)
        if common % g or (g == 1 and cfg.block_size is None):
            raise ConfigError(
                f"C3AConfig(block_size={cfg.block_size}): wanted a divisor of both sides of ({d_out}, {d_in}), "
                f"that is of {common}\n  choose one, there alone with per_layer, or leave the layer out"
            )
        xavier, kaiming = math.sqrt(6 / (d_in + d_out)), math.sqrt(1 / d_in)
        fills = {
            "xavier_uniform": lambda t: t.uniform_(-xavier, xavier),
            "kaiming_uniform": lambda t: t.uniform_(-kaiming, kaiming),
            "gaussian": torch.nn.init.normal_,
            "zeros": torch.nn.init.zeros_,
        }
        return {"lora_kernel": ParamSpec((d_out // g, d_in // g, g), fills[cfg.init], keep_dtype=True)}

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        return as_low_rank(layer, _circulant, layer.lora_kernel)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        return y + (recomputed(_convolved, x, layer.lora_kernel) * layer.scale).to(y.dtype)


def _circulant(w: Float[Tensor, "m n g"]) -> Float[Tensor, "o i"]:
    """ΔW itself."""
    m, n, g = w.shape
    place = torch.arange(g, device=w.device)
    blocks = w[:, :, (place - place[:, None]) % g]  # (m, n, g, g), [p, q] = w[q - p]
    return blocks.transpose(1, 2).reshape(m * g, n * g) / (n * g)


def _convolved(x: Float[Tensor, "*b i"], w: Float[Tensor, "m n g"]) -> Float[Tensor, "*b o"]:
    """ΔW x, with no ΔW."""
    x, w = wide(x), wide(w)
    if not x.numel():  # no Fourier transform takes no rows
        return x @ _circulant(w).to(x.dtype).mT
    g = w.shape[2]
    blocks = torch.fft.rfft(x.unflatten(-1, (-1, g)))  # (*b, n, g/2 + 1)
    out = torch.einsum("...nf,mnf->...mf", blocks, torch.fft.rfft(w).conj().to(blocks.dtype))
    return torch.fft.irfft(out, n=g).flatten(-2) / x.shape[-1]
