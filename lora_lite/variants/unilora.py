"""Uni-LoRA: all factors of all layers are entries of one trained vector (Li et al. 2025, arXiv:2506.00799).

    y = W x + b + B A drop(x)      A = (c ⊙ θ)[I_A] (r, i)     B = (c ⊙ θ)[I_B] (o, r)
    θ (D,) once, trained;  I_A, I_B tables of indices, frozen;  c_j = 1/√(how often j occurs, over all layers)

Identity   none: θ starts uniform within a small bound, so a fresh adapter moves the output by about its square
Base       never read: any layer kind
Departs    an index occurs about equally often at each layer, in PEFT over all. The seed and a layer's path give its
           tables, so another choice of layers changes none. They are in the file, in the smallest integers that hold
           them (one byte at the default D): PEFT's come from NumPy's generator, and are read and kept
Checked    against PEFT UniLoraConfig: outputs, θ's gradient, three AdamW steps
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from zlib import crc32

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.targets import Target
from ..core.validate import is_number
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.factors import Factors, SeededConfig, as_low_rank, with_factors
from ..families.projections import balanced_indices

__all__ = ["UniLoRA", "UniLoRAConfig"]


@dataclass(frozen=True, kw_only=True)
class UniLoRAConfig(SeededConfig):
    """theta_d_length: D. init_theta_d_bound: θ starts uniform within it. seed: of the tables."""

    variant: str = "unilora"
    r: int = 4
    theta_d_length: int = 256
    init_theta_d_bound: float = 0.02
    seed: int = 42
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (
        *SeededConfig.SAME_AT_ALL_LAYERS,
        *("r", "theta_d_length", "init_theta_d_bound", "seed"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        bound = self.init_theta_d_bound
        self.require(type(self.theta_d_length) is int and self.theta_d_length > 0, "theta_d_length", "at least 1")
        self.require(is_number(bound) and bound > 0, "init_theta_d_bound", "a number above 0")


@register
class UniLoRA:
    name = "unilora"
    config = UniLoRAConfig
    has_identity_init = False
    handles_scale = True

    @staticmethod
    def layer_specs(target: Target, cfg: UniLoRAConfig) -> dict[str, ParamSpec]:
        n, length = cfg.r * target.d_in, cfg.theta_d_length
        small = torch.uint8 if length <= 256 else torch.int16 if length <= 1 << 15 else torch.int32
        table: Any = {"dtype": small, "below": length}
        a = ParamSpec((cfg.r, target.d_in), lambda t: t.copy_(_indices(target, cfg)[:n].view_as(t)), **table)
        b = ParamSpec((target.d_out, cfg.r), lambda t: t.copy_(_indices(target, cfg)[n:].view_as(t)), **table)
        return {"lora_indices_A": a, "lora_indices_B": b}

    @staticmethod
    def shared_specs(targets: Sequence[Target], cfg: UniLoRAConfig) -> dict[str, ParamSpec]:
        shape, bound = (cfg.theta_d_length,), cfg.init_theta_d_bound

        def norms(tensor: Tensor) -> None:
            every = torch.cat([_indices(t, cfg).repeat(max(1, t.experts)) for t in targets])
            tensor.copy_(every.bincount(minlength=len(tensor)).clamp_min(1).double().rsqrt())

        theta = ParamSpec(shape, lambda t: t.uniform_(-bound, bound), keep_dtype=True)
        return {"theta": theta, "norms": ParamSpec(shape, norms, trainable=False, keep_dtype=True)}

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        return as_low_rank(layer, *_parts(layer), dropout=layer.cfg.dropout)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        return with_factors(layer, x, y, *_parts(layer), dropout=layer.cfg.dropout)


def _parts(layer: Layer) -> tuple[Factors, Tensor, Tensor, Tensor, Tensor]:
    def factors(theta: Tensor, norms: Tensor, *tables: Tensor) -> Any:
        return tuple((norms * theta).index_select(0, table.flatten().int()).view(table.shape) for table in tables)

    return factors, layer.lora_theta, layer.lora_norms, layer.lora_indices_A, layer.lora_indices_B


def _indices(target: Target, cfg: UniLoRAConfig) -> Tensor:
    n, seed = cfg.r * (target.d_in + target.d_out), cfg.seed << 32 | crc32(target.path.encode())
    return balanced_indices(n, cfg.theta_d_length, seed)  # (n,), those of A first
