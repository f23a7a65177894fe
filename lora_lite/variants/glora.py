"""GLoRA: one form for changes of weights, of biases and of what feeds them (Chavan et al. 2023, arXiv:2306.07967, 3.2).

    y = (W + W ∘ A + B) x + b + b ∘ D + E + W C       A, B (o, i)   C (i, 1)   D, E (o,)
    A, B   "lora", Xd (o, r) Xu (r, i);  "vector" (o, 1);  "constant" (1,);  "none"        C, D, E: with a bias alone
    C      "lora", Xd (i, r) Xu (r, 1);  "vector" (i, 1);  "none"       D, E   "vector";  "constant" (1,);  "none"

Identity   each Xd and each X is 0, bit-exact
Base       read; never with A and B a vector or a constant and no C. On convolutions and embeddings as "lora" alone
Departs    from nothing. An expert's bias is added elsewhere, so C, D and E leave experts out
Checked    against PEFT GloraConfig, with and without a bias: outputs, gradients, three AdamW steps
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.targets import Target
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..errors import ConfigError
from ..families.dense import as_low_rank, with_delta
from ..ops.recompute import recomputed

__all__ = ["GLoRA", "GLoRAConfig"]


@dataclass(frozen=True, kw_only=True)
class GLoRAConfig(AdapterConfig):
    """The forms of A and B, of C, and of D and E."""

    variant: str = "glora"
    a_b: str = "lora"
    c: str = "lora"
    d_e: str = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        forms = ("lora", "vector", "constant", "none")
        for name, wanted in (("a_b", forms), ("c", ("lora", "vector", "none")), ("d_e", forms[1:])):
            self.require(getattr(self, name) in wanted, name, f"one of {wanted}")
        self.require({self.a_b, self.c, self.d_e} != {"none"}, "a_b", "a form for one of the parts")


@register
class GLoRA:
    name, config = "glora", GLoRAConfig
    handles_scale = True

    @staticmethod
    def base_weight(cfg: GLoRAConfig) -> str:
        return "read" if cfg.a_b == "lora" or cfg.c != "none" else "unused"

    @staticmethod
    def layer_specs(target: Target, cfg: GLoRAConfig) -> dict[str, ParamSpec]:
        o, i, specs = target.d_out, target.d_in, dict[str, ParamSpec]()
        parts: dict[str, Any] = dict.fromkeys("AB", (cfg.a_b, (o, i), (o, 1)))  # form, shape, shape of a vector
        if target.has_bias and not target.experts:
            parts |= {"C": (cfg.c, (i, 1), (i, 1)), **dict.fromkeys("DE", (cfg.d_e, (o, 1), (o,)))}
        for part, (form, (rows, columns), vector) in parts.items():
            pair: dict[str, Any] = {"Xd": (rows, cfg.r), "Xu": (cfg.r, columns)}
            for name, shape in {"lora": pair, "vector": {"X": vector}, "constant": {"X": (1,)}}.get(form, {}).items():
                init = "kaiming" if name == "Xu" else "zeros"
                specs[f"lora_{part}_{name}"] = ParamSpec(shape, init, keep_dtype=True, is_shift=part in "CDE")
        if not specs:
            raise ConfigError(f"{target.path}: without a bias, nothing is trained there at a_b='none'\n  leave it out")
        return specs

    @staticmethod
    def low_rank(layer: Layer) -> LowRank | None:
        form, shift = as_low_rank(layer, *_delta(layer)) if layer.cfg.a_b == "lora" else None, _shift(layer)
        return form if form is None or shift is None else form._replace(shift=layer.scale * shift)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        out, c, shift = y, layer.scale, _shift(layer)
        if layer.cfg.a_b == "lora":
            out = with_delta(layer, x, y, *_delta(layer))
        elif layer.cfg.a_b != "none":
            wx = y if layer.bias is None else y - layer.bias
            a, b = (c * value.flatten() for value in (layer.lora_A_X, layer.lora_B_X))  # (o,) or (1,)
            out = y + a.to(y.dtype) * wx + b.to(y.dtype) * x.sum(-1, keepdim=True)
        return out if shift is None else out + (c * shift).to(y.dtype)


def _delta(layer: Layer) -> tuple[Any, ...]:
    tensors = layer.lora_A_Xd, layer.lora_A_Xu, layer.lora_B_Xd, layer.lora_B_Xu
    return lambda ad, au, bd, bu: torch.addcmul(bd @ bu, layer.matrix(), ad @ au), *tensors


def _shift(layer: Layer) -> Float[Tensor, "#o"] | None:
    cfg, bias, terms, has_bias = layer.cfg, layer.bias, [], layer.has_bias and not layer.experts
    if has_bias and cfg.d_e != "none":
        terms = [layer.lora_E_X] if bias is None else [bias * layer.lora_D_X, layer.lora_E_X]
    if has_bias and cfg.c != "none":
        column = layer.lora_C_X if cfg.c == "vector" else layer.lora_C_Xd @ layer.lora_C_Xu  # (i, 1)
        terms.append(recomputed(lambda c: layer.linear(c.mT)[0], column))  # (o,); a cast of W isn't kept
    return sum(terms[1:], terms[0]) if terms else None
