"""RoAd: turn and stretch pairs of outputs (Liao and Monz 2024, arXiv:2409.00119, equation 4).

    y' = c1 ⊙ y + c2 ⊙ J y       y = W x + b      J (y_1, y_2) = (-y_2, y_1), the halves of each group of g outputs
    c1 = α cos θ,  c2 = α sin θ

    form 1    θ, α (o / 2,)    one for both outputs of a pair
    form 2    θ, α (o,)        one for each output
    form 4    θ, α (2o,)       by group (2, g): the first row makes c1, the second c2

Identity   θ = 0 and α = 1, bit-exact: formed as y + (c1 - 1) ⊙ y + c2 ⊙ J y
Base       never read: any layer kind, fused experts as a whole
Departs    c1 - 1 = (α - 1) cos θ - 2 sin²(θ / 2), so that a small turn keeps its digits
Checked    against PEFT RoadConfig: outputs, gradients, three AdamW steps
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.variant import Layer, ParamSpec, register
from ..families.factors import at_inference
from ..families.orthogonal import check_divides
from ..ops.pairs import mix_halves

__all__ = ["RoAd", "RoAdConfig"]


@dataclass(frozen=True, kw_only=True)
class RoAdConfig(BaseConfig):
    """form: 1, 2 or 4, as PEFT's variant "road_1", "road_2", "road_4". group_size: g, even."""

    variant: str = "road"
    form: int = 1
    group_size: int = 64
    FUSED_EXPERTS: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(type(self.form) is int and self.form in (1, 2, 4), "form", "1, 2 or 4")
        g = self.group_size
        self.require(type(g) is int and g > 0 and g % 2 == 0, "group_size", "an even number of outputs")


@register
class RoAd:
    name = "road"
    config = RoAdConfig
    handles_scale = True
    reads_input = False

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: RoAdConfig) -> dict[str, ParamSpec]:
        check_divides(cfg, "group_size", d_out)
        size = (d_out * cfg.form // 2,)
        return {"lora_theta": ParamSpec(size, keep_dtype=True), "lora_alpha": ParamSpec(size, "ones", keep_dtype=True)}

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        cfg, tensors = layer.cfg, (layer.lora_theta, layer.lora_alpha)
        half, f = cfg.group_size // 2, partial(_coefficients, cfg)
        if not at_inference(layer):
            return mix_halves(y, half, f, *tensors, s=layer.scale)
        return mix_halves(y, half, lambda c: c, layer.constant("p, q", f, *tensors), s=layer.scale)


def _coefficients(cfg: RoAdConfig, theta: Float[Tensor, "p"], alpha: Float[Tensor, "p"]) -> Float[Tensor, "2 o"]:
    """p = c1 - 1 and q = ∓c2, in float32 at least: J y is -y_2 in the first half of a group, and y_1 in the second."""
    shape = (-1, {1: 1, 2: 2, 4: 4}[cfg.form], cfg.group_size // 2)  # by group and half; 1 for both halves alike
    theta, alpha = (t.to(torch.promote_types(t.dtype, torch.float32)).view(shape) for t in (theta, alpha))
    t1, t2 = (theta[:, :2], theta[:, 2:]) if cfg.form == 4 else (theta, theta)
    a1, a2 = (alpha[:, :2], alpha[:, 2:]) if cfg.form == 4 else (alpha, alpha)
    p, c2 = (a1 - 1) * t1.cos() - 2 * (t1 / 2).sin().square(), a2 * t2.sin()
    p, q = p.expand(-1, 2, -1), torch.cat([-c2[:, :1], c2[:, -1:]], 1)
    return torch.stack([p.flatten(), q.flatten()])
