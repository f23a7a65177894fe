"""SHiRA: a few entries of the weight, at random places (Bhardwaj et al. 2024, arXiv:2406.13175, section 3.1).

    y = (W + ΔW) x + b       ΔW[p_k, q_k] = v_k, zero elsewhere       v (n,)   n = r (i + o), as many as LoRA's

Identity   v = 0, bit-exact
Base       never read: any layer kind
Departs    the mask is PEFT's "random" one; the paper's others (by weight, by gradient) are other indices, and a file
           holds the indices. The seed is fixed, so layers of one shape have one mask, as with PEFT's random_seed.
           No product with W is made a second time, and no (o, i) matrix is kept
Checked    against PEFT ShiraConfig: mask bit for bit, outputs, gradients, three AdamW steps
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.sparse import entries_as_low_rank, random_places, table, with_entries

__all__ = ["SHiRA", "SHiRAConfig"]


@dataclass(frozen=True, kw_only=True)
class SHiRAConfig(AdapterConfig):
    """r: of the LoRA with as many numbers. seed: of the mask; read at attach only."""

    variant: str = "shira"
    r: int = 32
    seed: int = 0


@register
class SHiRA:
    name = "shira"
    config = SHiRAConfig
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: SHiRAConfig) -> dict[str, ParamSpec]:
        n = cfg.r * (d_in + d_out)

        def fill(places: Tensor) -> None:
            places.copy_(random_places(d_out * d_in, n, cfg.seed).sort().values)

        places = table(d_in, d_out, n, f"SHiRAConfig(r={cfg.r})", init=fill, is_sorted=True)
        return {"lora_weight": ParamSpec((n,), keep_dtype=True), "lora_indices": places}

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        return entries_as_low_rank(layer, layer.lora_weight, layer.lora_indices)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        return with_entries(layer, x, y, layer.lora_weight, layer.lora_indices)
