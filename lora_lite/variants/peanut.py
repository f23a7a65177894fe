"""PEANuT: an update that a small network makes of the weight (Zhong et al. 2024, arXiv:2410.01870, section 3.2).

    y = W x + b + s Q A_out x        P (r, o)   Q (o, r);  σ by element
    A_0 = σ(P W) (r, i),  A_n = σ(E_n A_{n-1});  then A ← σ(D_n A) + A_{depth-n},  n = 1 ... depth      E_n, D_n (r, r)

Identity   Q = 0, bit-exact
Base       read: P W in each forward that trains, from dequantised numbers too; any layer kind
Departs    from nothing. ΔW has rank r at most, so it is a product of two factors here; the backward keeps x, x Aᵀ (r
           numbers a token), A and the parameters, where PEFT's keeps ΔW
Checked    against PEFT PeanutConfig, with depth and other functions: outputs, gradients, three AdamW steps
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.validate import is_number
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..ops.activations import ACTIVATIONS
from ..ops.low_rank import add_low_rank, is_traced_or_transformed
from ..ops.recompute import recomputed

__all__ = ["PEANuT", "PeanutConfig"]


@dataclass(frozen=True, kw_only=True)
class PeanutConfig(AdapterConfig):
    """depth: pairs of hidden layers. act_fn: σ, by transformers' name. scaling: s."""

    variant: str = "peanut"
    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(type(self.depth) is int and 0 <= self.depth <= 64, "depth", "a number of layers, at most 64")
        self.require(self.act_fn in ACTIVATIONS, "act_fn", f"one of {', '.join(ACTIVATIONS)}")
        self.require(is_number(self.scaling) and self.scaling != 0, "scaling", "a number other than 0")


@register
class PEANuT:
    name = "peanut"
    config = PeanutConfig
    base_weight = "read"
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: PeanutConfig) -> dict[str, ParamSpec]:
        square = ParamSpec((cfg.r, cfg.r), "kaiming", keep_dtype=True)
        return {
            "lora_P": ParamSpec((cfg.r, d_out), "kaiming", keep_dtype=True),
            "lora_Q": ParamSpec((d_out, cfg.r), keep_dtype=True),
            **dict.fromkeys(_hidden(cfg.depth), square),
        }

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        return LowRank(_factor(layer), layer.lora_Q, layer.scale * layer.cfg.scaling)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        return add_low_rank(y, x, _factor(layer), layer.lora_Q, layer.scale * layer.cfg.scaling)


def _hidden(depth: int) -> list[str]:
    return [f"lora_{kind}_{n}" for kind in ("encoder", "decoder") for n in range(depth)]


def _factor(layer: Layer) -> Float[Tensor, "r i"]:
    """A_out; at inference it is remembered."""
    tensors = [layer.lora_P, *(getattr(layer, name) for name in _hidden(layer.cfg.depth))]
    network = partial(_network, layer)
    if torch.is_grad_enabled() or is_traced_or_transformed():
        return recomputed(network, *tensors)
    return layer.constant("A", network, *tensors)


def _network(layer: Layer, p: Float[Tensor, "r o"], *hidden: Float[Tensor, "r r"]) -> Float[Tensor, "r i"]:
    act, depth = ACTIVATIONS[layer.cfg.act_fn], layer.cfg.depth
    states = [act(p @ layer.matrix().to(p.dtype))]  # A_0 ... A_depth
    for encoder in hidden[:depth]:
        states.append(act(encoder @ states[-1]))
    a = states.pop()
    for decoder in hidden[depth:]:
        a = act(decoder @ a) + states.pop()
    return a
