"""History: trained rounds, kept at fixed coefficients.

    y_0 = W x + b        y_k = f_k(x, y_{k-1}) at the coefficient c_k, for the rounds k = 1 ... n in the order kept
    of consecutive low-rank rounds at once:  y + B (c ⊙ s ⊙ A x)       A (R, i)   B (o, R)   s (R,)   c (R,)
        A = [A_1; ...; A_n]   B = [B_1 ... B_n]   s = [s_1 ... s_n]   c = [c_1 ... c_n], as often as each round's rank
    x is what the layer sees once all rounds and adapters have done with its input

Identity   never: nothing is trained
Base       low-rank rounds: not read. Others as their own methods use it
Departs    layer.scale multiplies every c_k: for one round, or low-rank ones alone, that blends base and history
Checked    against the explicit sum of the rounds, and against the rounds attached side by side
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.adapt import adapt_input, adapt_output
from ..core.layer import Layer
from ..core.targets import Target
from ..core.variant import ParamSpec, lookup, register, weight_use
from ..errors import ConfigError
from .rounds import HistoryConfig, OwnMethod


@register
class History:
    name = "history"
    config = HistoryConfig
    has_identity_init = False
    handles_scale = True
    leads = True
    not_capturable = "each call brings the rounds' coefficients from the host"

    @staticmethod
    def base_weight(cfg: HistoryConfig) -> str:
        return "unused" if all(weight_use(step.cfg) == "unused" for step in cfg.own_methods) else "read"

    @staticmethod
    def layer_specs(target: Target, cfg: HistoryConfig) -> dict[str, ParamSpec]:
        d_in, d_out, r = target.d_in, target.d_out, cfg.rank
        pair = {"A": (r, d_in), "B": (d_out, r), "s": (r,)} if r or not cfg.own_methods else {}
        specs = {f"lora_{name}": ParamSpec(pair[name], trainable=False, keep_dtype=name == "s") for name in pair}
        for step in cfg.own_methods:
            for name, spec in lookup(step.cfg.variant).layer_specs(target, step.cfg).items():
                specs[f"lora_{step.prefix}_{name.removeprefix('lora_')}"] = replace(spec, trainable=False)
        return specs

    @staticmethod
    def init(layer: Layer, cfg: HistoryConfig) -> None:
        raise ConfigError("a history is made of rounds that were trained\n  use lora_lite.freeze_into(model, name)")

    @staticmethod
    def forward_input(layer: Layer, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b i"]:
        for step in layer.cfg.own_methods:
            x = adapt_input(layer.part(*step), x)
        return x

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b d"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        h = _coordinates(layer, x) if layer.cfg.rank else x  # (*b, R), for all rounds at once: each reads x alone
        for step in layer.cfg.steps:
            if isinstance(step, OwnMethod):
                y = adapt_output(layer.part(*step), x, y)
            else:
                y = y + h[..., step] @ layer.lora_B[:, step].mT  # (*b, o)
        return y


def _coordinates(layer: Layer, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b R"]:
    """c s ⊙ A x, with c s in float32 at least, as a Python number has it in a product with a tensor."""
    h, dtype = x @ layer.lora_A.mT, torch.promote_types(x.dtype, torch.float32)  # (*b, R)
    c = torch.tensor(layer.cfg.coefficients, dtype=dtype, device=x.device)  # (R,)
    return (h * (layer.scale * c * layer.lora_s.to(dtype))).to(h.dtype)
