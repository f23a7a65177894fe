"""DEFT: take a subspace out of what W writes, put trained rows in its place (Kumar et al. 2025, arXiv:2509.22793, 3).

    y = [W - Q Eᵀ W + s Q R] x + b            R (r, i)   P (o, r)    Q (o, r), E (o, r) by the decomposition:
        "relu"  Q = P, E = relu(P)            "qr"  Q = E, the orthonormal basis of P's columns
      = W x + b + Q [s (R - R0) drop(x) - (E - E0)ᵀ W x]               s = α/r, or 1 without α;  r at most o

Identity   P = P0 and R = R0 = E0ᵀ W/s, bit-exact. With para (PaRa, ICLR 2025) there is no R, and no identity
Base       read once, at init, for R0; 4-bit and 8-bit too
Departs    PEFT has no P0 and R0, or 0 for them: its start is the identity to rounding alone (1.6e-2 in bfloat16)
Checked    against PEFT DeftConfig: outputs, gradients, three AdamW steps. PEFT works in float32 whatever the dtype
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.validate import positive_or_none
from ..core.variant import Layer, ParamSpec, register
from ..families.factors import at_inference
from ..families.sparse import wide
from ..ops.few import plus
from ..ops.recompute import recomputed

__all__ = ["DEFT", "DEFTConfig"]


@dataclass(frozen=True, kw_only=True)
class DEFTConfig(AdapterConfig):
    """decomposition: "relu" or "qr". alpha: None for s = 1. para: take out only. dropout: of R's x."""

    variant: str = "deft"
    decomposition: str = "relu"
    alpha: float | None = None
    para: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.decomposition in ("relu", "qr"), "decomposition", '"relu" or "qr"')
        self.require(positive_or_none(self.alpha), "alpha", "a number above 0, or None for s = 1")


@register
class DEFT:
    name, config = "deft", DEFTConfig
    base_weight, handles_scale = "read", True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: DEFTConfig) -> dict[str, ParamSpec]:
        k = min(cfg.r, d_out)  # the layer writes no more directions
        p, r = ParamSpec((d_out, k), "normal", keep_dtype=True), ParamSpec((k, d_in), keep_dtype=True)
        starts = {"lora_P0": replace(p, trainable=False), "lora_R0": replace(r, trainable=False)}
        return {"lora_P": p} if cfg.para else {"lora_P": p, "lora_R": r, **starts}

    @staticmethod
    def init(layer: Layer, cfg: DEFTConfig) -> None:
        if not cfg.para:
            w, (_, e) = layer.dense_weight(), _projection(layer.lora_P, cfg.decomposition)
            layer.lora_P0.copy_(layer.lora_P)
            layer.lora_R0.copy_(e.to(w.dtype).mT @ w / _scaling(layer))
            layer.lora_R.copy_(layer.lora_R0)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        cfg, wx = layer.cfg, y if layer.bias is None else y - layer.bias
        factors = partial(_factors, cfg.decomposition, _scaling(layer))
        tensors = [getattr(layer, f"lora_{name}") for name in ("P", *([] if cfg.para else ("P0", "R", "R0")))]
        x = y.new_zeros(()) if cfg.para else torch.dropout(x, cfg.dropout, layer.training)  # kept where it's used
        if at_inference(layer):
            return plus(y, _product(x, wx, *layer.constant("factors", factors, *tensors)), layer.scale)
        change = recomputed(lambda x, wx, *tensors: _product(x, wx, *factors(*tensors)), x, wx, *tensors)
        return y + layer.scaled(change).to(y.dtype)


def _scaling(layer: Layer) -> float:
    return 1.0 if layer.cfg.alpha is None else layer.cfg.alpha / layer.lora_P.shape[1]


def _projection(p: Float[Tensor, "o r"], kind: str) -> tuple[Float[Tensor, "o r"], Float[Tensor, "o r"]]:
    q = wide(p) if kind == "relu" else torch.linalg.qr(wide(p)).Q * p.any(dim=0)  # of P = 0 both are 0
    return q, q.relu() if kind == "relu" else q


def _factors(kind: str, s: float, p: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
    """Q and E of PaRa; Q, E - E0 and s (R - R0)."""
    q, e = _projection(p, kind)
    if not more:
        return q, e
    p0, r, r0 = (t.to(p.dtype) for t in more)  # a cast of parameters alone must not part them
    return q, e - _projection(p0, kind)[1], s * (r - r0)


def _product(x: Tensor, wx: Float[Tensor, "*b o"], q: Tensor, e: Tensor, *r: Tensor) -> Float[Tensor, "*b o"]:
    wx = wide(wx)
    h = wx @ e.to(wx.dtype)  # (*b, r)
    return (wide(x) @ r[0].mT.to(wx.dtype) - h if r else -h) @ q.mT.to(wx.dtype)
