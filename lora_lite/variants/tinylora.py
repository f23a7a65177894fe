"""TinyLoRA: a few numbers, which layers may share, in the weight's directions (Morris et al. 2026, arXiv:2602.04118).

    y = W x + b + U' R V' drop(x)     R = Σ_u v_u P_u (r, r)    V' = √S Vᵀ (r, i), U' = U √S (o, r), W ≈ U S Vᵀ
    P (u, r, r) at each layer, random, frozen;  v (groups, u) once, trained: layers in order, G groups of equal size

Identity   v = 0, bit-exact
Base       read at attach alone, dequantised too: U' and V' are in the file
Departs    P is always in the file. A layer's rank is its smaller side's at most; U and V are of a block Krylov space
Checked    against PEFT TinyLoraConfig: P bit for bit, outputs, v's gradient, three AdamW steps
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.targets import Target
from ..core.validate import is_number
from ..core.variant import Layer, LowRank, ParamSpec, register, seeded
from ..families.factors import SeededConfig, with_core
from ..ops.recompute import recomputed
from ..ops.svd import leading_svd

__all__ = ["TinyLoRA", "TinyLoRAConfig"]


@dataclass(frozen=True, kw_only=True)
class TinyLoRAConfig(SeededConfig):
    """u: numbers in a group's v. weight_tying: 0 gives each layer a v of its own, 1 one to all. seed: of P."""

    variant: str = "tinylora"
    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    seed: int = 42
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (*SeededConfig.SAME_AT_ALL_LAYERS, "u", "weight_tying", "seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(type(self.u) is int and self.u > 0, "u", "a number of at least 1")
        self.require(is_number(self.weight_tying) and 0 <= self.weight_tying <= 1, "weight_tying", "from 0 to 1")

    def group(self, index: int, layers: int) -> int:
        """The group of the layer of this index, of so many."""
        groups = max(1, round(layers * (1 - self.weight_tying)))
        return min(index // max(1, layers // groups), groups - 1)


@register
class TinyLoRA:
    name, config = "tinylora", TinyLoRAConfig
    base_weight = "read"
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: TinyLoRAConfig) -> dict[str, ParamSpec]:
        r = min(cfg.r, d_in, d_out)
        shapes = {"lora_V": (r, d_in), "lora_U": (d_out, r), "lora_P": (cfg.u, r, r)}
        frozen = {name: ParamSpec(shape, trainable=False, keep_dtype=True) for name, shape in shapes.items()}
        return frozen | {"lora_group": ParamSpec((1,), dtype=torch.int32)}

    @staticmethod
    def shared_specs(targets: Sequence[Target], cfg: TinyLoRAConfig) -> dict[str, ParamSpec]:
        return {"v": ParamSpec((1 + cfg.group(len(targets) - 1, len(targets)), cfg.u), keep_dtype=True)}

    @staticmethod
    def init(layer: Layer, cfg: TinyLoRAConfig) -> None:
        u, s, v = leading_svd(layer.dense_weight(), len(layer.lora_V))
        layer.lora_V.copy_(s.sqrt()[:, None] * v.mT)
        layer.lora_U.copy_(u * s.sqrt())

    @staticmethod
    def group_init(model: nn.Module, targets: Mapping[str, Layer], cfg: TinyLoRAConfig, calibration_data: Any) -> None:
        paths = list(dict.fromkeys(layer.path for layer in targets.values()))  # of experts one, which share a v
        for index, layer in enumerate(targets.values()):
            layer.lora_group.fill_(cfg.group(paths.index(layer.path), len(paths)))
            seeded(lambda t, g: t.normal_(0, t.shape[-1] ** -0.5, generator=g), cfg.seed + index)(layer.lora_P)

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        dropout = layer.cfg.dropout if layer.training else 0.0
        r = recomputed(_r, *_tensors(layer)).to(layer.lora_U.dtype)
        return LowRank(layer.lora_V, layer.lora_U @ r, layer.scale, dropout)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        factors = layer.lora_V, layer.lora_U
        return with_core(layer, x, y, factors, _r, *_tensors(layer), dropout=layer.cfg.dropout)


def _tensors(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    return layer.lora_v, layer.lora_P, layer.lora_group


def _r(v: Float[Tensor, "groups u"], p: Float[Tensor, "u r r"], group: Tensor) -> Float[Tensor, "r r"]:
    row = v.index_select(0, group.clamp(0, len(v) - 1))[0]  # (u,), whatever a file says
    return torch.einsum("u,urs->rs", row.to(p.dtype), p)
