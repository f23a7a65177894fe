"""AdaLoRA's allocator: which ranks stay, by their importance so far (Zhang et al. 2023, arXiv:2303.10512, 3.2-3.3).

of a number w      I = |w ∇w|    Ī ← β1 Ī + (1 - β1) I    Ū ← β2 Ū + (1 - β2) |I - Ī|    s(w) = Ī Ū
of a rank k        S_k = s(E_k) + mean_i s(A_ki) + mean_o s(B_ok)          A (r, i)   B (o, r)   E (r, 1)
ranks at step t    all until tinit; then B1 + (B0 - B1) (1 - (t - tinit) / (total_step - tfinal - tinit))³; then B1
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..base import sharding
from ..core.config import BaseConfig
from ..core.layer import Layer
from ..core.validate import is_number
from ..errors import ConfigError, TargetError

__all__ = ["FACTORS", "AllocatorConfig", "allocate", "budget"]

FACTORS = ("lora_A", "lora_B", "lora_E")


@dataclass(frozen=True, kw_only=True)
class AllocatorConfig(BaseConfig):
    """The ranks, and when which of them stay.

    init_r, r     ranks at the start, 12 by default; of a layer that has lost some, as in a file of PEFT's. Of r alone
                  it is init_r, too
    total_step    of the optimizer in the whole training; None for inference
    deltaT        steps from one mask to the next
    """

    r: int = None  # type: ignore[assignment]  # a number once the config is made, and so is init_r
    init_r: int = None  # type: ignore[assignment]
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815  as PEFT calls it
    beta1: float = 0.85
    beta2: float = 0.85
    total_step: int | None = None
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (
        *BaseConfig.SAME_AT_ALL_LAYERS,
        *("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step"),
    )

    def __post_init__(self) -> None:
        start = self.init_r if self.init_r is not None else 12 if self.r is None else self.r
        object.__setattr__(self, "init_r", start)
        object.__setattr__(self, "r", start if self.r is None else self.r)
        super().__post_init__()  # it checks per_layer, whose layers have this init_r
        for name, least in {"init_r": 1, "target_r": 1, "deltaT": 1, "tinit": 0, "tfinal": 0, "r": 0}.items():
            value = getattr(self, name)
            self.require(type(value) is int and value >= least, name, f"a whole number, {least} or more")
        self.require(self.r <= self.init_r, "r", f"at most init_r = {self.init_r}, the ranks to start with")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            self.require(is_number(value) and 0 <= value < 1, name, "a number from 0 to below 1")
        steps, least = self.total_step, self.tinit + self.tfinal + 1
        ok = steps is None or (type(steps) is int and steps >= least)
        self.require(ok, "total_step", f"the steps of the training, at least tinit + tfinal + 1 = {least}, or None")


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
