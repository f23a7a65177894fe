"""Ways in which a weight that lost some directions keeps the norms of its rows or columns.

With V (k, o) taken out at strength λ, the squared norm of what is left is n² = 1 - 2λp + λ²q of what was there: of each
row (FULL), p, q (o,), or of each column (COLUMN), p, q (i,). `lora_lite.variants.abliteration` has the equations.
"""

import enum

import torch
from torch import Tensor

from ..core.layer import Layer
from ..errors import BaseModelError

SMALLEST = 1e-3  # the least n² over all λ: below it too little of a row or column is left to say where it points


class Normalization(enum.StrEnum):
    NONE, PRE, FULL, COLUMN = "none", "pre", "full", "column"


def read_weight(layer: Layer) -> None:
    """p and q, which change with V. Raises BaseModelError where n² comes near 0 for some λ."""
    w = layer.dense_weight()
    v, tiny = layer.lora_v.to(w.dtype), torch.finfo(w.dtype).tiny
    if layer.cfg.normalization == "column":
        p = q = (v @ w).square().sum(0) / w.square().sum(0).clamp_min(tiny)
    else:
        inverse = 1 / layer.lora_d.to(w.dtype).where(layer.lora_d > 0, torch.inf)
        u = (v * inverse) @ w  # U = V Ŵ (k, i), with no copy of W for Ŵ
        p = ((w @ u.mT) * inverse[:, None] * v.mT).sum(1)  # (o,)
        q = (v.mT @ (u @ u.mT) * v.mT).sum(1)  # (o,)
    if (p.square() / q.clamp_min(tiny)).max() > 1 - SMALLEST:  # over λ, n² is least at p/q: 1 - p²/q
        raise BaseModelError(f"{layer.path}: almost nothing of a row or column is left to normalise\n  use 'pre'")
    layer.lora_p.copy_(p)
    layer.lora_q.copy_(q)


def gain(layer: Layer) -> Tensor:
    """1/n, of rows in FULL and of columns in COLUMN."""
    s = layer.scale * layer.lora_strength
    return (1 - 2 * s * layer.lora_p + s * s * layer.lora_q).rsqrt()
