"""CorDA: LoRA that starts from W seen through its inputs' covariance (Yang et al. 2024, arXiv:2406.05223, section 3.2).

    y = (W - s B0 A0) x + b + s B A x       A (r, i)   B (o, r)   s = α/r
    W C = U S Vᵀ, C (i, i) = mean x xᵀ;     A0 = √(S_k/s) V_kᵀ C⁻¹,  B0 = U_k √(S_k/s)
    mode "ipm" (instruction-previewed): k the first r, of data like the task's
         "kpm" (knowledge-preserved): the last r, of data whose knowledge is to stay

Identity   the difference from A0 and B0 acts (families/residual.py): bit-exact
Base       read once, at init: dense layers that are called
Departs    the paper writes W - s B0 A0 into the layer. C is divided by its mean diagonal, so that the unit of x doesn't
           set how A0 and B0 are balanced; PEFT divides each call's x by its largest element, and weighs calls alike.
           As in the paper's code, a share of the mean, 0.01 or twice that so often as needed, is on C's diagonal
Checked    against the formula, and what PEFT takes out of one call
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.variant import Layer, register
from ..errors import BaseModelError
from ..families import residual
from ..families.calibration import check_fresh, moments, on_called_layers

__all__ = ["CorDA", "CorDAConfig"]


@dataclass(frozen=True, kw_only=True)
class CorDAConfig(residual.ResidualConfig):
    """calibration_data: a list of batches."""

    variant: str = "corda"
    mode: str = "ipm"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.mode in ("ipm", "kpm"), "mode", '"ipm" or "kpm"')
        on_called_layers(self)


@register
class CorDA:
    name, config = "corda", CorDAConfig
    base_weight, handles_scale, needs_calibration = "dense", True, True
    param_specs = staticmethod(residual.param_specs)
    low_rank = staticmethod(residual.low_rank)
    forward = staticmethod(residual.forward)

    @staticmethod
    def group_init(model: nn.Module, targets: Mapping[str, Layer], cfg: CorDAConfig, calibration_data: Any) -> None:
        check_fresh(targets, residual.is_trained)
        sizes = {path: (layer.in_features, layer.out_features) for path, layer in targets.items()}
        for path, statistics in moments(model, sizes, calibration_data):
            layer, r, c = targets[path], targets[path].cfg.r, statistics.second_moment
            if c is None or not c.any():
                raise BaseModelError(f"{path}: its inputs are 0 in all of the data\n  leave the layer out")
            c, inverse = invertible(c)
            u, s, vt = torch.linalg.svd(layer.dense_weight().to(c) @ c, full_matrices=False)  # float64
            k = slice(0, r) if layer.cfg.mode == "ipm" else slice(len(s) - r, len(s))
            residual.from_svd(layer, u[:, k], s[k], (vt[k] @ inverse).mT)


def invertible(c: Float[Tensor, "i i"]) -> tuple[Float[Tensor, "i i"], Float[Tensor, "i i"]]:
    """C over its mean diagonal, with as much more on the diagonal as an inverse needs, and the inverse."""
    c, eye, share = c / c.diagonal().mean(), torch.eye(len(c)).to(c), 0.01
    while True:
        damped = c + share * eye
        inverse = torch.linalg.inv(damped)
        if (damped @ inverse - eye).norm() < 0.05:  # the bound of the paper's code
            return damped, inverse
        share *= 2
