"""Super-Tuning: the largest entries of the weight, and a LoRA beside them if asked for (arXiv:2607.09287).

    y = (W + ΔW) x + b + s B A drop(x)       ΔW[p_k, q_k] = v_k at the n largest |W|, zero elsewhere     v (n,)
                                             A (r, i)   B (o, r)   s = α/r, with r ("Supra")
    n = ⌊o i (1 - sparsity)⌋

Identity   v = 0 and B = 0, bit-exact
Base       read once, at init, for the places; 4-bit and 8-bit too. They are in the file: a load needs no W
Departs    from nothing. α defaults to 2r, as in PEFT
Checked    against PEFT SupertuningConfig: places bit for bit, outputs, gradients, three AdamW steps
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ..core.config import BaseConfig
from ..core.validate import is_number, positive_or_none
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.sparse import entries_as_low_rank, table, with_entries
from ..ops.low_rank import add_low_rank

__all__ = ["SuperTuning", "SuperTuningConfig"]


@dataclass(frozen=True, kw_only=True)
class SuperTuningConfig(BaseConfig):
    """sparsity: the part of the weight that stays. select_top: False takes the smallest |W|. r: of the LoRA beside, or
    None; alpha, dropout: of it. alpha None means 2r."""

    variant: str = "supertuning"
    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_number(self.sparsity) and 0 <= self.sparsity < 1, "sparsity", "a number from 0 to below 1")
        self.require(self.r is None or (type(self.r) is int and self.r > 0), "r", "a rank of at least 1, or None")
        self.require(positive_or_none(self.alpha), "alpha", "a number above 0, or None for 2r")

    @property
    def scaling(self) -> float:
        """The factor s."""
        return 2.0 if self.alpha is None or self.r is None else self.alpha / self.r


@register
class SuperTuning:
    name = "supertuning"
    config = SuperTuningConfig
    base_weight = "read"
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: SuperTuningConfig) -> dict[str, ParamSpec]:
        n = int(d_out * d_in * (1 - cfg.sparsity))  # of a float product, as PEFT rounds it
        places = table(d_in, d_out, n, f"SuperTuningConfig(sparsity={cfg.sparsity})")
        specs = {"lora_values": ParamSpec((n,), keep_dtype=True), "lora_indices": places}
        if cfg.r is not None:
            specs["lora_A"] = ParamSpec((cfg.r, d_in), init="kaiming", keep_dtype=True)
            specs["lora_B"] = ParamSpec((d_out, cfg.r), keep_dtype=True)
        return specs

    @staticmethod
    def init(layer: Layer, cfg: SuperTuningConfig) -> None:
        sizes = layer.dense_weight().abs().flatten()
        layer.lora_indices.copy_(sizes.topk(len(layer.lora_indices), largest=cfg.select_top).indices)

    @staticmethod
    def low_rank(layer: Layer) -> LowRank | None:
        sparse = entries_as_low_rank(layer, layer.lora_values, layer.lora_indices)
        if layer.cfg.r is None:
            return sparse
        if layer.cfg.dropout and layer.training:  # of the LoRA alone, which one pair of factors can't say
            return None
        return sparse._replace(b=sparse.b + layer.cfg.scaling * layer.lora_B @ layer.lora_A)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        y, cfg = with_entries(layer, x, y, layer.lora_values, layer.lora_indices), layer.cfg
        if cfg.r is None:
            return y
        dropout = cfg.dropout if layer.training else 0.0
        return add_low_rank(y, x, layer.lora_A, layer.lora_B, layer.scale * cfg.scaling, dropout)
