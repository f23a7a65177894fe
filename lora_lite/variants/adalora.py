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

from ..core.validate import is_number
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.allocator import AllocatorConfig, allocate
from ..ops.low_rank import add_low_rank
from ..ops.recompute import recomputed

__all__ = ["AdaLoRA", "AdaLoRAConfig"]


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(AllocatorConfig):
    """alpha: s is alpha / (init_r + 1e-5). dropout: of the branch. The others are of the schedule, in its family."""

    variant: str = "adalora"
    alpha: float = 8.0
    dropout: float = 0.0
    orth_reg_weight: float = 0.5
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (*AllocatorConfig.SAME_AT_ALL_LAYERS, "orth_reg_weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_number(self.alpha) and self.alpha > 0, "alpha", "a number above 0")
        self.require(is_number(self.orth_reg_weight) and self.orth_reg_weight >= 0, "orth_reg_weight", "0 or more")


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
        dtype = torch.promote_types(x.dtype, layer.lora_A.dtype)
        a = recomputed(lambda a, e: a.to(dtype) * (s * e), layer.lora_A, layer.lora_E)  # (r, i)
        return add_low_rank(y, x, a, layer.lora_B, 1.0, dropout)
