"""LoHa: the Hadamard product of two low-rank updates (FedPara: Hyeon-Woo et al. 2022, arXiv:2108.06098, section 2.1).

    y = W x + b + s [(A1 B1) ∘ (A2 B2)] x      A1, A2 (o, r)   B1, B2 (r, i)   s = α/r: of rank r² at most
    a convolution by its core, K1 ∘ K2 with    K = Σ_jk T_jk a_j b_k      T (r, r, *kernel)   a (r, o)   b (r, i)

Identity   B2 = 0, bit-exact
Base       never read: any layer kind
Departs    from PEFT where rank_dropout keeps no row: 0, and no NaN. With a core, PEFT's backward takes the other core
           for the gradients of both a; here they are those of the equation
Checked    against PEFT LoHaConfig: outputs, gradients, three AdamW steps; convolutions with groups and with a core
"""

import math
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..core.targets import Target
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.dense import as_low_rank, with_delta
from ..families.lycoris import LycorisConfig, dropped_rows
from ..ops.kronecker import tucker

__all__ = ["LoHa", "LoHaConfig"]


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(LycorisConfig):
    """The fields are those of its family: alpha, rank_dropout, module_dropout, use_effective_conv2d."""

    variant: str = "loha"


@register
class LoHa:
    name = "loha"
    config = LoHaConfig
    handles_scale = True

    @staticmethod
    def layer_specs(target: Target, cfg: LoHaConfig) -> dict[str, ParamSpec]:
        o, i, r, kernel = target.d_out, target.d_in, cfg.r, target.kernel
        a, b, specs = (o, r), (r, i), {}
        if cfg.has_core(kernel):
            a, b = (r, o), (r, i // math.prod(kernel))
            core = (r, r, *kernel, *[1] * (2 - len(kernel)))  # PEFT's has two places at least
            specs = {name: ParamSpec(core, "kaiming", keep_dtype=True) for name in ("lora_t1", "lora_t2")}
        shapes = {"lora_w1_a": a, "lora_w1_b": b, "lora_w2_a": a, "lora_w2_b": b}
        inits = {name: "zeros" if name == "lora_w2_b" else "kaiming" for name in shapes}
        return {name: ParamSpec(shape, inits[name], keep_dtype=True) for name, shape in shapes.items()} | specs

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        return as_low_rank(layer, *_delta(layer))

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        return with_delta(layer, x, y, *_delta(layer))


def _delta(layer: Layer) -> tuple[Any, ...]:
    """The function that gives ΔW, and its tensors."""
    pairs = layer.lora_w1_a, layer.lora_w1_b, layer.lora_w2_a, layer.lora_w2_b
    rows, s = dropped_rows(layer, pairs[0], rescale=True), layer.cfg.scaling

    def delta(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, *cores: Tensor) -> Tensor:
        one, two = (tucker(cores[0], a1, b1), tucker(cores[1], a2, b2)) if cores else (a1 @ b1, a2 @ b2)
        product = (one * two).flatten(1)  # (o, i)
        return product * s if rows is None else product * (s * rows[:, None])

    cores = (layer.lora_t1, layer.lora_t2) if layer.cfg.has_core(layer.kernel) else ()
    return delta, *pairs, *cores
