"""BD-LoRA: a LoRA with one factor in blocks, for servers that split layers (2025, arXiv:2510.23346).

    y = W x + b + s B A drop(x)       A (r, i)   B (o, r)   s = α/r, or α/√r with rslora
    blocks = "A": A = diag(A_1 .. A_n), A_k (r/n, i/n), stored one above the other as (r, i/n)
    blocks = "B": B = diag(B_1 .. B_n), B_k (o/n, r/n), stored as (o, r/n)

Identity   B = 0, bit-exact
Base       never read: any layer kind
Departs    n is 2 by default, where PEFT's 1 is LoRA itself. PEFT names the layers of each kind in two lists; here all
           have B's blocks, as what is split by columns (q, k, v, gate, up), and what is split by rows (o, down) gets
           A's by per_layer={"o_proj|down_proj": {"blocks": "A"}}. "none" is LoRA there
Checked    against PEFT LoraConfig(use_bdlora=BdLoraConfig()): outputs, gradients, three AdamW steps
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.variant import Layer, LowRank, ParamSpec, register
from ..errors import ConfigError
from ..families.factors import FactorsConfig, with_factors

__all__ = ["BDLoRA", "BDLoRAConfig"]


@dataclass(frozen=True, kw_only=True)
class BDLoRAConfig(FactorsConfig):
    """nblocks: n, the number of devices that a layer is split over. blocks: the factor that has them, "A", "B" or
    "none"."""

    variant: str = "bdlora"
    nblocks: int = 2
    blocks: str = "B"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(type(self.nblocks) is int and self.nblocks > 0, "nblocks", "a number of blocks, at least 1")
        self.require(self.blocks in ("A", "B", "none"), "blocks", '"A", "B" or "none"')


@register
class BDLoRA:
    name = "bdlora"
    config = BDLoRAConfig
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: BDLoRAConfig) -> dict[str, ParamSpec]:
        n = {factor: cfg.nblocks if factor == cfg.blocks else 1 for factor in ("A", "B")}
        side = {"A": d_in, "B": d_out}.get(cfg.blocks, 0)
        if side % cfg.nblocks or cfg.r % max(n.values()):
            raise ConfigError(
                f"BDLoRAConfig(nblocks={cfg.nblocks}, r={cfg.r}, blocks={cfg.blocks!r}): they don't divide a "
                f"({d_out}, {d_in}) weight\n  nblocks divides r and the side that is split; other layers take "
                f"others with per_layer"
            )
        return {
            "lora_A": ParamSpec((cfg.r, d_in // n["A"]), _kaiming if n["A"] > 1 else "kaiming", keep_dtype=True),
            "lora_B": ParamSpec((d_out, cfg.r // n["B"]), keep_dtype=True),
        }

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        a, b = _factors(layer.cfg, layer.lora_A, layer.lora_B)
        return LowRank(a, b, layer.scale, layer.cfg.dropout if layer.training else 0.0)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        cfg = layer.cfg
        return with_factors(
            layer, x, y, lambda a, b: _factors(cfg, a, b), layer.lora_A, layer.lora_B, dropout=cfg.dropout
        )


def _factors(cfg: BDLoRAConfig, a: Float[Tensor, "r m"], b: Float[Tensor, "o k"]) -> tuple[Tensor, Tensor]:
    """s A (r, i) and B (o, r), of zeros outside of the blocks."""
    if cfg.blocks == "A":
        a = torch.block_diag(*a.chunk(cfg.nblocks))
    elif cfg.blocks == "B":
        b = torch.block_diag(*b.chunk(cfg.nblocks))
    return cfg.scaling * a, b


def _kaiming(blocks: Tensor) -> None:
    nn.init.kaiming_uniform_(blocks, a=0)  # PEFT's for blocks: ±√6/√(i/n)
