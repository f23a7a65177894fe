"""LoRA: low-rank additive update (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    y = W x + b + s (B A drop(x) + β)       A (r, i)   B (o, r)   s = α/r, or α/√r with rslora
                                            β (o,) with bias, else none

Identity   B = 0 and β = 0, bit-exact
Base       never read: any layer kind
Departs    A is uniform in ±1/√i, as in PEFT; the paper draws a normal. α defaults to r, so that s = 1 at every rank
           (at PEFT's own default rank 8 that is PEFT's default too). rslora: Kalajdzievski 2023, arXiv:2312.03732.
           β is PEFT's lora_bias, which no paper has. invocation_tokens, activated LoRA (Greenewald et al. 2025,
           arXiv:2504.12397): from where they start on. freeze_a: LoRA-FA (Zhang et al. 2023, arXiv:2308.03303);
           its second version's change of B's gradient is `lora_lite.correct_gradients`
Checked    against PEFT LoraConfig: outputs, gradients, three AdamW steps; aLoRA's tokens one by one
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.positions import Prompt
from ..core.validate import is_token, positive_or_none
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.positions import from_invocation
from ..ops.low_rank import add_low_rank

__all__ = ["LoRA", "LoRAConfig"]


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """alpha: None means r. rslora: s = alpha/√r, which keeps the update's size at high rank. dropout: of the branch.
    bias: train a constant β beside B, as PEFT's lora_bias. freeze_a: train B alone, and keep r numbers a token for the
    backward in place of the layer's input.

    invocation_tokens   act from the start of their last occurrence in a row on, and in what is generated after it;
                        never in a row without them, whatever the model itself generates. None: everywhere
    """

    variant: str = "lora"
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    bias: bool = False
    freeze_a: bool = False
    invocation_tokens: Sequence[int] | None = None
    UNSAID: ClassVar[Mapping[str, Any]] = dict(AdapterConfig.UNSAID, bias=False, freeze_a=False, invocation_tokens=None)
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (*AdapterConfig.SAME_AT_ALL_LAYERS, "invocation_tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(positive_or_none(self.alpha), "alpha", "a number above 0, or None for r")
        if (tokens := self.invocation_tokens) is not None:
            valid = isinstance(tokens, list | tuple) and tokens and all(map(is_token, tokens))
            self.require(bool(valid), "invocation_tokens", "one or more ids of tokens, or None")
            object.__setattr__(self, "invocation_tokens", tuple(tokens))  # the config is frozen

    @property
    def scaling(self) -> float:
        """The factor s."""
        return (self.alpha or self.r) / (math.sqrt(self.r) if self.rslora else self.r)


@register
class LoRA:
    name = "lora"
    config = LoRAConfig
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: LoRAConfig) -> dict[str, ParamSpec]:
        a = ParamSpec((cfg.r, d_in), init="kaiming", trainable=not cfg.freeze_a, keep_dtype=True)
        b, beta = ParamSpec((d_out, cfg.r), keep_dtype=True), ParamSpec((d_out,), keep_dtype=True, is_shift=True)
        return {"lora_A": a, "lora_B": b} | ({"lora_bias": beta} if cfg.bias else {})

    @staticmethod
    def positions(cfg: LoRAConfig) -> Callable[[Prompt], Tensor] | None:
        return None if cfg.invocation_tokens is None else partial(from_invocation, cfg.invocation_tokens)

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        dropout, s = layer.cfg.dropout if layer.training else 0.0, layer.scale * layer.cfg.scaling
        return LowRank(layer.lora_A, layer.lora_B, s, dropout, shift=s * layer.lora_bias if layer.cfg.bias else None)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        cfg = layer.cfg  # the factors are read here, not through low_rank: of one token the calls are what takes time
        dropout = cfg.dropout if cfg.dropout and layer.training else 0.0
        y = y + (layer.scale * cfg.scaling * layer.lora_bias).to(y.dtype) if cfg.bias else y
        return add_low_rank(y, x, layer.lora_A, layer.lora_B, layer.scale * cfg.scaling, dropout)
