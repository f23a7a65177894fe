"""MiSS: one small block of numbers, repeated over the weight (Kang & Yin 2024, arXiv:2409.15371, section 3).

    y = W x + b + Dᵀ Σ_k x_k              x_k (r,): x in chunks, the last one filled up with zeros     D (r, o)
    mini   the same, D repeated along the outputs                                                      D (r, m)
    bat    y_a += Σ_k (W_ak + I) D_a x_k     W_ak (r, r): W in blocks                                  D (o/r, r, r)

Identity   D = 0, bit-exact
Base       never read: any layer kind. bat reads it, dequantised numbers too, in each forward that trains
Departs    from nothing. The paper's r is 64; a layer with fewer inputs than r, or one that the blocks of mini and bat
           don't divide, is an error
Checked    against PEFT MissConfig in its three forms: outputs, gradients, three AdamW steps
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..errors import ConfigError
from ..families.dense import as_low_rank, with_delta
from ..ops.few import few_wide, plus
from ..ops.low_rank import is_traced_or_transformed
from ..ops.recompute import add_dense

__all__ = ["MiSS", "MissConfig"]


@dataclass(frozen=True, kw_only=True)
class MissConfig(AdapterConfig):
    """form: "miss", "mini" or "bat". mini_r: the m of mini, which divides d_out. dropout: of the branch."""

    variant: str = "miss"
    r: int = 64
    form: str = "miss"
    mini_r: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.form in ("miss", "mini", "bat"), "form", '"miss", "mini" or "bat"')
        self.require(type(self.mini_r) is int and self.mini_r > 0, "mini_r", "a number of outputs, at least 1")
        self.require(not (self.dropout and self.form == "bat"), "dropout", "0 in the form bat, which has none")


@register
class MiSS:
    name, config = "miss", MissConfig
    handles_scale = True

    @staticmethod
    def base_weight(cfg: MissConfig) -> str:
        return "read" if cfg.form == "bat" else "unused"

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: MissConfig) -> dict[str, ParamSpec]:
        r, m = cfg.r, cfg.mini_r
        shapes = {"miss": (r, d_out), "mini": (r, m), "bat": (d_out // r, r, r)}
        divides = {"miss": True, "mini": d_out % m == 0, "bat": not (d_in % r or d_out % r)}
        if r > d_in or not divides[cfg.form]:
            wanted = {"miss": "r", "mini": "r, and a mini_r that divides d_out", "bat": "an r that divides both sides"}
            problem = f"MissConfig(form={cfg.form!r}, r={r}, mini_r={m}): can't part a ({d_out}, {d_in}) weight"
            raise ConfigError(
                f"{problem}\n  wanted at most d_in for {wanted[cfg.form]}; per_layer sets it for one layer"
            )
        return {"lora_block": ParamSpec(shapes[cfg.form], keep_dtype=True)}

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        block, cfg = layer.lora_block, layer.cfg
        if cfg.form == "bat":
            return as_low_rank(layer, partial(_bat, layer), block)
        places = torch.arange(layer.in_features, device=block.device) % cfg.r
        sums = F.one_hot(places, cfg.r).mT.to(block.dtype)  # (r, i)
        b = block.tile(layer.out_features // block.shape[1]).mT  # (o, r)
        return LowRank(sums, b, layer.scale, cfg.dropout if layer.training else 0.0)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        block, r = layer.lora_block, layer.cfg.r
        if layer.cfg.form == "bat":
            return with_delta(layer, x, y, partial(_bat, layer), block)
        x = F.dropout(x, layer.cfg.dropout, layer.training) if layer.cfg.dropout else x
        x = F.pad(x, (0, -x.shape[-1] % r)) if x.shape[-1] % r else x
        h = few_wide(x).view(*x.shape[:-1], x.shape[-1] // r, r).sum(-2)  # (*b, r): all that is kept
        copies = layer.out_features // block.shape[1]
        if torch.is_grad_enabled() or is_traced_or_transformed():
            return add_dense(y, h, lambda t: (t if copies == 1 else t.tile(copies)).mT, block, s=layer.scale)
        change = h @ block.to(h.dtype)
        return plus(y, change if copies == 1 else change.repeat(*[1] * (y.dim() - 1), copies), layer.scale)


def _bat(layer: Layer, block: Float[Tensor, "a r r"]) -> Float[Tensor, "o i"]:
    w, (n, r, _) = layer.matrix().to(block.dtype), block.shape  # (o, i)
    product = (w.reshape(n, -1, r) @ block).view(n, r, -1, r)  # W_ak D_a, (a, r, k, r)
    return (product + block[:, :, None]).view(w.shape)
