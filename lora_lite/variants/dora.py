"""DoRA: the magnitude of each output row apart from its direction (Liu et al. 2024, arXiv:2402.09353, 4.1 and 4.3).

    y = g ⊙ (W x + s B A drop(x)) + b       g = m / n,  n = ‖W + s B A‖ by row      A (r, i)   B (o, r)   m (o,)
    n² = n0² + 2s Σ_r (W Aᵀ) ⊙ B + s² Σ_r (B (A Aᵀ)) ⊙ B       n0 = ‖W‖ by row

Identity   B = 0 and m = n0, bit-exact: n/n0 = √(1 + 0)
Base       read: n0 from the dequantised values at init, W Aᵀ through the layer's own kernel; 4-bit and 8-bit too
Departs    n is a constant to the gradient (the paper's section 4.3). Dropout acts on the branch alone, where PEFT's
           makes a second product of W with the dropped x. s = α/r as in LoRA
Checked    against PEFT LoraConfig(use_dora=True): outputs, gradients, three AdamW steps
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.variant import Layer, LowRank, ParamSpec, register
from ..errors import BaseModelError
from ..ops.low_rank import add_low_rank
from .lora import LoRA, LoRAConfig

__all__ = ["DoRA", "DoRAConfig"]

CANCELLED = 1e-3  # below this n²/n0² the factored form, right to about 1e-6 of n0², leaves too few digits


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(LoRAConfig):
    """The fields are LoRA's, but for a bias."""

    variant: str = "dora"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(not self.bias, "bias", "False: the paper's method has none")


@register
class DoRA:
    name, config = "dora", DoRAConfig
    base_weight = "read"
    handles_scale = True
    positions = LoRA.positions

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: DoRAConfig) -> dict[str, ParamSpec]:
        return {
            **LoRA.param_specs(d_in, d_out, cfg),
            "lora_m": ParamSpec((d_out,), keep_dtype=True),
            "lora_n0": ParamSpec((d_out,), trainable=False, keep_dtype=True),
        }

    @staticmethod
    def init(layer: Layer, cfg: DoRAConfig) -> None:
        base_norm = layer.dense_weight().norm(dim=1)  # (o,)
        if not base_norm.all():
            raise BaseModelError(
                f"{layer.path}: {int((base_norm == 0).sum())} rows of the weight are zero, so they have no direction\n"
                f"  leave the layer out with exclude_names, or use lora"
            )
        layer.lora_n0.copy_(base_norm)
        layer.lora_m.copy_(layer.lora_n0)

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        a, b, cfg = layer.lora_A, layer.lora_B, layer.cfg
        return LowRank(a, b, cfg.scaling, cfg.dropout if layer.training else 0.0, _gain(layer, a, b), layer.scale)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        a, b, cfg = layer.lora_A, layer.lora_B, layer.cfg
        dropout = cfg.dropout if cfg.dropout and layer.training else 0.0
        return add_low_rank(y, x, a, b, cfg.scaling, dropout, _gain(layer, a, b), layer.scale, layer.bias)


def _gain(layer: Layer, a: Float[Tensor, "r i"], b: Float[Tensor, "o r"]) -> Float[Tensor, "o"]:
    magnitude = layer.lora_m
    base_norm = layer.lora_n0.to(magnitude.dtype)  # a cast of parameters alone must not part n0 from m
    return magnitude.float() / layer.constant("n", partial(_weight_norm, layer), a, b, base_norm)  # no gradient: 4.3


def _weight_norm(
    layer: Layer, a: Float[Tensor, "r i"], b: Float[Tensor, "o r"], base_norm: Float[Tensor, "o"]
) -> Float[Tensor, "o"]:
    """n in float32, with no (o, i) matrix unless terms cancel; n0 itself at B = 0."""
    a, b, base_norm, s = a.float(), b.float(), base_norm.float(), layer.cfg.scaling
    wa = layer.linear(a).mT  # W Aᵀ (o, r)
    gram = a @ a.mT  # A Aᵀ (r, r)
    inner = torch.addmm(wa, b, gram, beta=2 * s, alpha=s * s)  # 2s W Aᵀ + s² B A Aᵀ (o, r)
    ratio = 1 + torch.linalg.vecdot(inner, b) / base_norm.square()  # n²/n0² (o,)
    if layer.in_graph:  # it can't choose by values, but it can refuse
        # one line, or generated C++ breaks; no path, or equal blocks would not share a graph
        text = "DoRA: a row of W + s B A all but vanishes; run it without a graph, or train at a lower learning rate"
        torch._assert_async(~(ratio < CANCELLED).any(), text)
    elif ratio.amin() < CANCELLED:
        return (layer.dense_weight() + s * b @ a).norm(dim=1)
    return base_norm * ratio.sqrt()
