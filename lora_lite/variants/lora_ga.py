"""LoRA-GA: LoRA whose first step is nearest to full fine-tuning's (Wang et al. 2024, arXiv:2407.05000, section 3.3).

    y = W x + b + s (B A - B0 A0) x         A (r, i)   B (o, r)   s = α/r
    G = dL/dW = U S Vᵀ on the data;         A0 = c V_kᵀ,  B0 = c U_l
    direction   "ArB2r": k the first r, l the next r;  "A2rBr": k the next, l the first;  "ArBr": l even, k odd
    scale       "stable": c = o^¼/√γ, the paper's, which keeps outputs' size at any width;  "gd": 1/s;  "unit": 1

Identity   the difference from A0 and B0 acts (families/residual.py): bit-exact
Base       never read: layers that are called, quantised too, since G comes of inputs and outputs' gradients
Departs    the paper writes W - s B0 A0 into the layer. PEFT multiplies B0 by S too, and scales B0 alone ("stable");
           its "weight_svd" and its unseeded "random" directions are left out
Checked    G against autograd's; the formula
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.validate import is_number
from ..core.variant import Layer, ParamSpec, register
from ..errors import ConfigError
from ..families import residual
from ..families.calibration import check_fresh, gradients, on_called_layers
from ..ops.svd import leading_svd

__all__ = ["LoRAGA", "LoRAGAConfig"]


@dataclass(frozen=True, kw_only=True)
class LoRAGAConfig(residual.ResidualConfig):
    """calibration_data: a list of batches, whose loss is that of the model's output (with labels, or else of the next
    token); or {"batches": batches, "loss": f(model, inputs) -> scalar}. gamma: of the scale "stable"."""

    variant: str = "lora_ga"
    direction: str = "ArB2r"
    scale: str = "stable"
    gamma: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.direction in ("ArBr", "A2rBr", "ArB2r"), "direction", '"ArB2r", "A2rBr" or "ArBr"')
        self.require(self.scale in ("stable", "gd", "unit"), "scale", '"stable", "gd" or "unit"')
        self.require(is_number(self.gamma) and self.gamma > 0, "gamma", "a number above 0")
        on_called_layers(self)


@register
class LoRAGA:
    name, config = "lora_ga", LoRAGAConfig
    handles_scale, needs_calibration = True, True
    low_rank = staticmethod(residual.low_rank)
    forward = staticmethod(residual.forward)

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: LoRAGAConfig) -> dict[str, ParamSpec]:
        if 2 * cfg.r > min(d_in, d_out):
            problem = f"LoRAGAConfig(r={cfg.r}): it takes 2r of the {min(d_in, d_out)} directions of the gradient"
            raise ConfigError(f"{problem}\n  lower r, there alone with per_layer, or use exclude_names")
        return residual.param_specs(d_in, d_out, cfg)

    @staticmethod
    def group_init(model: nn.Module, targets: Mapping[str, Layer], cfg: LoRAGAConfig, calibration_data: Any) -> None:
        check_fresh(targets, residual.is_trained)
        sizes = {path: (layer.in_features, layer.out_features) for path, layer in targets.items()}
        for path, gradient in gradients(model, sizes, calibration_data):
            layer, r, at_layer = targets[path], targets[path].cfg.r, targets[path].cfg
            u, _, v = leading_svd(gradient, 2 * r)  # (o, 2r), (i, 2r)
            k, other = {
                "ArB2r": (slice(0, r), slice(r, 2 * r)),
                "A2rBr": (slice(r, 2 * r), slice(0, r)),
                "ArBr": (slice(1, None, 2), slice(0, None, 2)),
            }[at_layer.direction]
            factors = {"stable": layer.out_features**0.25 / at_layer.gamma**0.5, "gd": 1 / at_layer.scaling}
            c = factors.get(at_layer.scale, 1.0)
            residual.start(layer, c * v[:, k].mT, c * u[:, other])
