"""LoftQ: LoRA that starts at what quantisation took from W (Li et al. 2023, arXiv:2310.08659, section 3).

    y = Q x + b + s B A drop(x)             A (r, i)   B (o, r)   s as in LoRA
    s B A = U_r S_r V_rᵀ, the top r of W - Q = U S Vᵀ;  A = √(S_r/s) V_rᵀ,  B = U_r √(S_r/s)

Identity   no, by design: it moves the quantised model's outputs towards those of the dense one
Base       Q is read once, dequantised; W is the data: calibration_data = the dense model, its folder, or {path: W}
Departs    the paper quantises W - s B A again, and so on; the base is not written here, so this is one round of it
           (T = 1), on a base that was quantised as it was loaded. lora_lite.quantize_residual takes all rounds, from a
           folder, and its adapter is one of this variant. Where W and Q are equal, it starts as LoRA does. Trained, it
           is a plain LoRA
Checked    against the full SVD; outputs come nearer to the dense model's
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.variant import Layer, register
from ..families.calibration import check_fresh, dense_weights, on_called_layers
from ..ops.svd import leading_svd
from .lora import LoRA, LoRAConfig

__all__ = ["LoftQ", "LoftQConfig"]


@dataclass(frozen=True, kw_only=True)
class LoftQConfig(LoRAConfig):
    """The fields are LoRA's, but for a bias and tokens. calibration_data: the model before quantisation, its folder,
    or {path: W (o, i)}."""

    variant: str = "loftq"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(not self.bias, "bias", "False: the paper's method has none")
        self.require(self.invocation_tokens is None, "invocation_tokens", "None: they are LoRA's")
        on_called_layers(self)


@register
class LoftQ(LoRA):
    name, config = "loftq", LoftQConfig
    base_weight, has_identity_init, needs_calibration = "read", False, True

    @staticmethod
    def group_init(model: nn.Module, targets: Mapping[str, Layer], cfg: LoftQConfig, calibration_data: Any) -> None:
        check_fresh(targets, lambda layer: bool(layer.lora_B.any()))
        dense = dense_weights(calibration_data)
        for path, layer in targets.items():
            difference = dense(path, layer) - layer.dense_weight()  # W - Q (o, i)
            if difference.any():
                u, s, v = leading_svd(difference, layer.cfg.r)
                root = (s / layer.cfg.scaling).sqrt()  # (r,)
                layer.lora_A.copy_(root[:, None] * v.mT)
                layer.lora_B.copy_(u * root)
