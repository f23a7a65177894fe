"""Directions V that layers of one name share, in whatever block, with W_l = U_l diag(λ0_l) Vᵀ for all of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.layer import Layer
from ..core.names import shared_name
from ..core.targets import Target
from ..core.variant import ParamSpec
from ..ops.joint import LEAST, joint_columns, joint_directions, off_diagonal
from .projections import add_shared

__all__ = ["fit_joint", "joint_specs", "joint_tensors", "places_of"]


def places_of(d_in: int, cfg: Any) -> int:
    """How many numbers beside the diagonal of a (d_in, d_in) matrix are trained."""
    return max(1, min(int(d_in * d_in * cfg.sparse_rate), d_in * d_in - d_in))


def joint_specs(targets: Sequence[Target], cfg: Any) -> dict[str, ParamSpec]:
    """A `shared_specs`: V (i, i), its inverse, and the rows and columns of S's trained numbers, for each name."""
    specs: dict[str, ParamSpec] = {}
    for target in targets:
        name, i = shared_name(target.path), target.d_in
        v = ParamSpec((i, i), trainable=False, keep_dtype=True)
        places = ParamSpec((2, places_of(i, cfg)), dtype=torch.int64, below=i)
        more = {f"V_{name}": v, f"inverse_{name}": v, f"places_{name}": places}
        add_shared(specs, more, target.path, "V")
    return specs


def joint_tensors(layer: Layer) -> list[Tensor]:
    """The tensors that `joint_specs` gave the layer's name."""
    return [getattr(layer, f"lora_{part}_{shared_name(layer.path)}") for part in ("V", "inverse", "places")]


def fit_joint(model: nn.Module, targets: Mapping[str, Layer], cfg: Any, calibration_data: Any) -> None:
    """A `group_init`: V of all layers of a name, and each layer's λ0, the norms of W V⁻ᵀ's columns, as `lora_l0`."""
    generator = torch.Generator().manual_seed(cfg.seed)  # one for all, in the order of names, as PEFT's
    groups: dict[str, list[Layer]] = {}
    for layer in targets.values():  # experts of one layer have its path, and so share V
        groups.setdefault(shared_name(layer.path), []).append(layer)
    for _, layers in sorted(groups.items()):
        weights = [layer.dense_weight() for layer in layers]
        v = joint_directions(weights, cfg.regularization_alpha).double()
        values = v, v.inverse(), off_diagonal(len(v), places_of(len(v), cfg), generator)
        for tensor, value in zip(joint_tensors(layers[0]), values, strict=True):
            tensor.copy_(value)
        for layer, w in zip(layers, weights, strict=True):
            norms = joint_columns(w, v).norm(dim=1)
            layer.lora_l0.copy_(norms.where(norms > LEAST * norms.amax(), 0))
            layer.lora_l.copy_(layer.lora_l0)
