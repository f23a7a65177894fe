"""Orthogonal LoRA: A and B start large, their product at 0 (a blog, datta0.github.io/posts/rethink-lora-init).

    y = W x + b + s (B A - B0 A0) x         A (r, i)   B (o, r)   s = α/r
    A0 = (G Q_a)ᵀ/10,  B0 = H Q_b/10   Q (r, r) orthogonal, Q_a and Q_b its even and its odd rows
                                            G (i, ⌈r/2⌉), H (o, ⌊r/2⌋) normal:  B0 A0 = H Q_b Q_aᵀ Gᵀ/100 = 0

Identity   bit-exact: B0 A0 is 0 but for rounding, and that is taken away (families/residual.py)
Base       never read: any layer kind
Departs    PEFT has y = W x + b + s B A x, the identity to 1e-7 alone, and even ranks
Checked    against PEFT LoraConfig(init_lora_weights="orthogonal"): the start's law, folders both ways
"""

from dataclasses import dataclass

import torch

from ..core.variant import Layer, register
from ..families import residual

__all__ = ["OrthogonalLoRA", "OrthogonalLoRAConfig"]


@dataclass(frozen=True, kw_only=True)
class OrthogonalLoRAConfig(residual.ResidualConfig):
    variant: str = "orthogonal"


@register
class OrthogonalLoRA:
    name, config = "orthogonal", OrthogonalLoRAConfig
    handles_scale = True
    param_specs = staticmethod(residual.param_specs)
    low_rank = staticmethod(residual.low_rank)
    forward = staticmethod(residual.forward)

    @staticmethod
    def init(layer: Layer, cfg: OrthogonalLoRAConfig) -> None:
        device = layer.lora_A.device
        q = torch.linalg.qr(torch.randn(cfg.r, cfg.r, device=device)).Q
        q_a, q_b = q[0::2], q[1::2]  # (⌈r/2⌉, r), (⌊r/2⌋, r)
        g = torch.randn(layer.in_features, len(q_a), device=device)
        h = torch.randn(layer.out_features, len(q_b), device=device)
        residual.start(layer, (g @ q_a).mT / 10, h @ q_b / 10)
