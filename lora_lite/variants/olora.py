"""OLoRA: LoRA that starts from an orthonormal basis of W (Büyükakyüz 2024, arXiv:2406.01775, section 3).

    y = (W - s B0 A0) x + b + s B A x       A (r, i)   B (o, r)   s = α/r
    W = Q R;  A0 = R_r, the first r rows of R,  B0 = Q_r, the first r columns of Q

Identity   the difference from A0 and B0 acts (families/residual.py): bit-exact
Base       read once, at init: dense layers only, as PiSSA
Departs    the paper writes W - s B0 A0 into the layer; here A0 and B0 stay as frozen buffers
Checked    against PEFT LoraConfig(init_lora_weights="olora"): start, outputs, gradients, folders of it
"""

from dataclasses import dataclass

import torch

from ..core.variant import Layer, register
from ..families import residual

__all__ = ["OLoRA", "OLoRAConfig"]


@dataclass(frozen=True, kw_only=True)
class OLoRAConfig(residual.ResidualConfig):
    variant: str = "olora"


@register
class OLoRA:
    name, config = "olora", OLoRAConfig
    base_weight, handles_scale = "dense", True
    param_specs = staticmethod(residual.param_specs)
    low_rank = staticmethod(residual.low_rank)
    forward = staticmethod(residual.forward)

    @staticmethod
    def init(layer: Layer, cfg: OLoRAConfig) -> None:
        q, rest = torch.linalg.qr(layer.dense_weight())  # (o, k), (k, i) with k = min(o, i)
        residual.start(layer, rest[: cfg.r], q[:, : cfg.r])
