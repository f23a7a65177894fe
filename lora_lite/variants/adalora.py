"""AdaLoRA: a LoRA in SVD form whose ranks go to the layers that need them (Zhang et al. 2023, arXiv:2303.10512).

    y = W x + b + s B Λ A drop(x)       A (r, i)   B (o, r)   Λ = diag(E), E (r, 1)   s = α / (init_r + 1e-5)
    penalty    orth_reg_weight · mean of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖ over all layers; section 3.1
    on_step    E_k ← 0 for all ranks but the most important ones of all layers, whose number falls from init_r a layer,
               after tinit steps, to target_r, tfinal steps before the end; section 3.2, in families/allocator.py

Identity   E = 0, bit-exact
Base       never read: any layer kind
Departs    as PEFT does: the norms aren't squared, and the number is target_r as soon as tfinal begins. From there on
           the ranks stay. Of equally important ranks the first are masked, where PEFT masks all of them
Checked    against PEFT AdaLoraConfig: outputs, gradients, penalty, masks at every step, three AdamW steps
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.validate import is_number
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.allocator import allocate
from ..ops.low_rank import add_low_rank

__all__ = ["AdaLoRA", "AdaLoRAConfig"]


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(BaseConfig):
    """init_r: ranks at the start, 12 by default. r: of a layer that has lost some, as in a file of PEFT's; init_r by
    default, and of r alone it is the default. total_step: of the optimizer in the whole training; None for inference.
    deltaT: steps from one mask to the next. dropout: of the branch."""

    variant: str = "adalora"
    r: int = None  # type: ignore[assignment]  # a number once the config is made, and so is init_r
    init_r: int = None  # type: ignore[assignment]
    target_r: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815  as PEFT calls it
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (
        *BaseConfig.SAME_AT_ALL_LAYERS,
        *("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
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
        self.require(is_number(self.alpha) and self.alpha > 0, "alpha", "a number above 0")
        for name in ("dropout", "beta1", "beta2"):
            value = getattr(self, name)
            self.require(is_number(value) and 0 <= value < 1, name, "a number from 0 to below 1")
        self.require(is_number(self.orth_reg_weight) and self.orth_reg_weight >= 0, "orth_reg_weight", "0 or more")
        steps, least = self.total_step, self.tinit + self.tfinal + 1
        ok = steps is None or (type(steps) is int and steps >= least)
        self.require(ok, "total_step", f"the steps of the training, at least tinit + tfinal + 1 = {least}, or None")


@register
class AdaLoRA:
    name = "adalora"
    config = AdaLoRAConfig
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: AdaLoRAConfig) -> dict[str, ParamSpec]:
        shapes = {"lora_A": (cfg.r, d_in), "lora_B": (d_out, cfg.r), "lora_E": (cfg.r, 1)}
        fills = {"lora_A": "normal", "lora_B": "normal", "lora_E": "zeros"}
        specs = {name: ParamSpec(shape, fills[name], keep_dtype=True) for name, shape in shapes.items()}
        for name, shape in shapes.items() if cfg.total_step else ():  # Ī and Ū, which inference has no need of
            specs |= dict.fromkeys((f"{name}_ipt", f"{name}_unc"), ParamSpec(shape, trainable=False, saved="resume"))
        return specs

    on_step = staticmethod(allocate)

    @staticmethod
    def penalty(targets: Mapping[str, Layer], cfg: AdaLoRAConfig) -> Tensor:
        rows = [p for layer in targets.values() for p in (layer.lora_A, layer.lora_B.mT)]  # (r, i), (r, o)
        norms = [(p @ p.mT - torch.eye(len(p), dtype=p.dtype, device=p.device)).norm().to(rows[0].device) for p in rows]
        return cfg.orth_reg_weight * torch.stack(norms).mean()

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        s = layer.scale * layer.cfg.alpha / (layer.cfg.init_r + 1e-5)
        dropout = layer.cfg.dropout if layer.training else 0.0
        return LowRank(layer.lora_A, layer.lora_B, s * layer.lora_E[:, 0], dropout)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        s = layer.scale * layer.cfg.alpha / (layer.cfg.init_r + 1e-5)
        dropout = layer.cfg.dropout if layer.training else 0.0
        a = layer.lora_A.to(torch.promote_types(x.dtype, layer.lora_A.dtype)) * (s * layer.lora_E)  # (r, i)
        return add_low_rank(y, x, a, layer.lora_B, 1.0, dropout)
