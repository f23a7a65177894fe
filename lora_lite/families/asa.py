"""AdaMSS's schedule: which subspaces go on training, by their importance (Zheng et al. 2025, adaptive subspaces, ASA).

of a number w      I = |w ∇w|    Ū ← β2 Ū + (1 - β2) |I - Ī|    Ī ← β1 Ī + (1 - β1) I    s(w) = Ī Ū
of a subspace      the mean of s over its A, and over its B
left at step t     int(T + (all - T) f^exponent), f = 1 - (t - init_warmup) / (final_warmup - init_warmup)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..base import sharding
from ..core.config import AdapterConfig
from ..core.layer import Layer
from ..core.validate import is_number
from ..core.variant import ParamSpec
from ..errors import TargetError

__all__ = ["ASAConfig", "asa_specs", "freeze_subspaces"]

TENSORS = ("lora_As", "lora_Bs")


@dataclass(frozen=True, kw_only=True)
class ASAConfig(AdapterConfig):
    """asa_target_subspaces: T, how many of all layers' subspaces train on at step final_warmup. From init_warmup to
    there, every mask_interval steps, the others are frozen."""

    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (
        *(*AdapterConfig.SAME_AT_ALL_LAYERS, "use_asa", "asa_target_subspaces", "init_warmup", "final_warmup"),
        *("mask_interval", "asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {"asa_target_subspaces": 1, "init_warmup": 0, "mask_interval": 1}.items():
            value = getattr(self, name)
            self.require(type(value) is int and value >= least, name, f"a whole number, {least} or more")
        is_later = type(self.final_warmup) is int and self.final_warmup > self.init_warmup
        self.require(is_later, "final_warmup", f"a step after init_warmup = {self.init_warmup}")
        for name in ("asa_importance_beta", "asa_uncertainty_beta"):
            value = getattr(self, name)
            self.require(is_number(value) and 0 <= value < 1, name, "a number from 0 to below 1")
        exponent = self.asa_schedule_exponent
        self.require(is_number(exponent) and exponent > 0, "asa_schedule_exponent", "a number above 0")


def asa_specs(clusters: int, k: int, rank: int, d_out: int) -> dict[str, ParamSpec]:
    """The schedule's memory: Ī, Ū and what a frozen subspace stays at, of each tensor, and which are frozen."""
    shapes = {"lora_As": (clusters, k, rank), "lora_Bs": (d_out, k)}
    memory = {
        f"{name}_{part}": ParamSpec(shape, trainable=False, keep_dtype=True, saved="resume")
        for name, shape in shapes.items()
        for part in ("ipt", "unc", "stay")
    }
    return memory | {"lora_frozen": ParamSpec((clusters,), dtype=torch.uint8, saved="resume", below=2)}


def freeze_subspaces(targets: Mapping[str, Layer], cfg: Any, step: int) -> None:
    """An `on_step`. A frozen subspace stays as it was, whatever the optimizer's momentum does, and never comes back.

    Raises:
        TargetError: where no layer has had a gradient, and under FSDP2 and ZeRO-3.
    """
    layers = list(targets.values())
    if not cfg.use_asa:
        return
    if any(sharding.is_sharded(getattr(layer, name)) for layer in layers for name in TENSORS):
        raise TargetError(
            f"{cfg.variant!r} freezes subspaces of whole tensors, and these are sharded\n  train it by DDP"
        )
    for layer in layers:
        _put_back(layer)
    if not cfg.init_warmup <= step <= cfg.final_warmup:
        return
    for layer in layers:
        _follow(layer, cfg)
    if step % cfg.mask_interval:
        return
    device = layers[0].lora_As.device
    frozen = torch.cat([layer.lora_frozen.to(device) for layer in layers]).bool()  # (subspaces of all layers,)
    scores = torch.cat([_scores(layer).to(device) for layer in layers])
    if not scores.any() and any(layer.lora_Bs.any() for layer in layers):
        problem = (
            f"step {step} of {cfg.variant!r}: none of its layers has had a gradient, by which it chooses subspaces"
        )
        raise TargetError(f"{problem}\n  call adapter.step() after optimizer.step() and before zero_grad()")
    left = 1 - (step - cfg.init_warmup) / (cfg.final_warmup - cfg.init_warmup)
    target = cfg.asa_target_subspaces
    most = int(target + (len(scores) - target) * left**cfg.asa_schedule_exponent)
    ranked = scores.masked_fill(frozen, -1).argsort(descending=True, stable=True)
    frozen[ranked[max(most, 0) :]] = True
    for layer, mask in zip(layers, frozen.split([len(layer.lora_As) for layer in layers]), strict=True):
        layer.lora_frozen.copy_(mask)
        for name in TENSORS:
            getattr(layer, f"{name}_stay").copy_(getattr(layer, name))
            getattr(layer, f"{name}_ipt").zero_()
            getattr(layer, f"{name}_unc").zero_()


def _rows(layer: Layer, name: str) -> Tensor:
    """Where in a tensor frozen subspaces are: (K,) of A's stack, (o,) of B's rows."""
    frozen = layer.lora_frozen.bool()
    return frozen if name == "lora_As" else frozen[layer.lora_cluster.long()]


def _put_back(layer: Layer) -> None:
    for name in TENSORS:
        tensor, rows = getattr(layer, name), _rows(layer, name)
        tensor[rows] = getattr(layer, f"{name}_stay")[rows].to(tensor.dtype)


def _follow(layer: Layer, cfg: Any) -> None:
    for name in TENSORS:
        weight, ipt, unc = (getattr(layer, f"{name}{part}") for part in ("", "_ipt", "_unc"))
        gradient = layer.grad(name)
        importance = torch.zeros_like(weight) if gradient is None else (weight * gradient).abs()
        # Ū first: its |I - Ī| is of the mean so far, other than AdaLoRA's.
        unc.lerp_((importance - ipt).abs().to(unc.dtype), 1 - cfg.asa_uncertainty_beta)
        ipt.lerp_(importance.to(ipt.dtype), 1 - cfg.asa_importance_beta)


def _scores(layer: Layer) -> Float[Tensor, "K"]:
    a, b = (getattr(layer, f"{name}_ipt") * getattr(layer, f"{name}_unc") for name in TENSORS)  # (K, k, R), (o, k)
    ranks = layer.lora_As.any(2).sum(1).clamp_min(1)  # (K,): the others of the k are 0
    cluster = layer.lora_cluster.long()
    sizes = torch.bincount(cluster, minlength=len(a))
    of_b = b.new_zeros(len(a)).index_add_(0, cluster, b.sum(1))
    return a.mean(2).sum(1) / ranks + of_b / (sizes * ranks)
