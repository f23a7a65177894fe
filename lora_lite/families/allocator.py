"""AdaLoRA's allocator: which ranks stay, by their importance so far (Zhang et al. 2023, arXiv:2303.10512, 3.2-3.3).

of a number w      I = |w ∇w|    Ī ← β1 Ī + (1 - β1) I    Ū ← β2 Ū + (1 - β2) |I - Ī|    s(w) = Ī Ū
of a rank k        S_k = s(E_k) + mean_i s(A_ki) + mean_o s(B_ok)          A (r, i)   B (o, r)   E (r, 1)
ranks at step t    all until tinit; then B1 + (B0 - B1) (1 - (t - tinit) / (total_step - tfinal - tinit))³; then B1
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..base import sharding
from ..core.layer import Layer
from ..errors import ConfigError, TargetError

__all__ = ["FACTORS", "allocate", "budget"]

FACTORS = ("lora_A", "lora_B", "lora_E")


def allocate(targets: Mapping[str, Layer], cfg: Any, step: int) -> None:
    """An `on_step`: follow Ī and Ū until tfinal begins, and set E to 0 outside of the ranks that S is the highest of.

    From there on S stands still. So each later step masks the same ranks, which the optimizer has moved meanwhile.

    Raises:
        ConfigError: without a total_step.
        TargetError: where no layer has had a gradient, and under FSDP2 and ZeRO-3.
    """
    if cfg.total_step is None:
        problem = f"{type(cfg).__name__}(total_step=None) is for inference: a step of its schedule was asked for"
        raise ConfigError(f"{problem}\n  attach with total_step=, the number of the optimizer's steps")
    last, layers = cfg.total_step - cfg.tfinal, list(targets.values())
    if any(sharding.is_sharded(getattr(layer, name)) for layer in layers for name in FACTORS):
        raise TargetError(f"{cfg.variant!r} chooses ranks by whole tensors, and these are sharded\n  train it by DDP")
    if step < last:
        for layer in layers:
            for name in FACTORS:
                _follow(layer, name, cfg.beta1, cfg.beta2)
    if step >= last or step % cfg.deltaT == 0:
        device = layers[0].lora_E.device
        scores = torch.cat([_scores(layer).to(device) for layer in layers])  # (ranks of all layers,)
        # Before the first change of E, as in a warmup from a rate of 0, all scores are 0, and so is what is masked.
        if not scores.any() and any(layer.lora_E.any() for layer in layers):
            problem = (
                f"step {step} of {cfg.variant!r}: none of its layers has had a gradient, by which it chooses ranks"
            )
            raise TargetError(f"{problem}\n  call adapter.step() after optimizer.step() and before zero_grad()")
        most = budget(cfg, step, len(scores), len(layers))
        masked = torch.zeros_like(scores, dtype=torch.bool)
        masked[scores.argsort(stable=True)[: max(len(scores) - most, 0)]] = True
        for layer, mask in zip(layers, masked.split([layer.cfg.r for layer in layers]), strict=True):
            layer.lora_E.masked_fill_(mask.to(layer.lora_E.device)[:, None], 0)


def budget(cfg: Any, step: int, ranks: int, layers: int) -> int:
    """How many ranks stay at a step, of the ranks that all layers have."""
    first, last, least = cfg.tinit, cfg.total_step - cfg.tfinal, cfg.target_r * layers
    left = min(max(1 - (step - first) / (last - first), 0), 1)
    return int((ranks - least) * left**3 + least)


def _follow(layer: Layer, name: str, beta1: float, beta2: float) -> None:
    """Ī and Ū of one tensor after a step; where the layer took no part in it, its gradient is 0."""
    weight, ipt, unc = (getattr(layer, f"{name}{part}") for part in ("", "_ipt", "_unc"))
    gradient = layer.grad(name)
    importance = torch.zeros_like(weight) if gradient is None else (weight * gradient).abs()
    ipt.mul_(beta1).add_((1 - beta1) * importance)
    unc.mul_(beta2).add_((1 - beta2) * (importance - ipt).abs())


def _scores(layer: Layer) -> Float[Tensor, "r"]:
    a, b, e = (getattr(layer, f"{name}_ipt") * getattr(layer, f"{name}_unc") for name in FACTORS)
    return e[:, 0] + (a.mean(1) + b.mean(0))
