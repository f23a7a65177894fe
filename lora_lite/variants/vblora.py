"""VB-LoRA: factors put together from a bank of vectors, which layers share (Li et al. 2024, arXiv:2405.15179).

    y = W x + b + B A drop(x)      A (r, i) and B (o, r) in pieces of v numbers, of a row of A, of a column of B
    piece = Σ_k softmax(top k of its logits)_k bank[k]       bank (n, v) once;  logits (n,) for each piece
    logits_A (r, i/v, n)   logits_B (o/v, r, n)

Identity   none: a fresh adapter moves the output a little
Base       never read: any layer kind whose sides v divides
Departs    v is 64, where PEFT's 256 divides few widths. PEFT's files of the top k are read: other logits become too low
Checked    against PEFT VBLoRAConfig: outputs, gradients, three AdamW steps
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.targets import Target
from ..core.validate import is_number
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..errors import ConfigError
from ..families.factors import Factors, as_low_rank, with_factors

__all__ = ["VBLoRA", "VBLoRAConfig"]


@dataclass(frozen=True, kw_only=True)
class VBLoRAConfig(AdapterConfig):
    """num_vectors, vector_length: n and v of the bank. topk: vectors in a piece. dropout: of the branch.
    init_vector_bank_bound, init_logits_std: the bank starts uniform within this bound, the logits normal."""

    variant: str = "vblora"
    r: int = 4
    num_vectors: int = 256
    vector_length: int = 64
    topk: int = 2
    dropout: float = 0.0
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (
        *AdapterConfig.SAME_AT_ALL_LAYERS,
        *("num_vectors", "vector_length", "init_vector_bank_bound"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_vectors", "vector_length", "topk"):
            self.require(type(getattr(self, name)) is int and getattr(self, name) > 0, name, "at least 1")
        self.require(self.topk <= self.num_vectors, "topk", f"at most num_vectors, {self.num_vectors}")
        for name in ("init_vector_bank_bound", "init_logits_std"):
            self.require(is_number(getattr(self, name)) and getattr(self, name) > 0, name, "a number above 0")


@register
class VBLoRA:
    name = "vblora"
    config = VBLoRAConfig
    has_identity_init = False
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: VBLoRAConfig) -> dict[str, ParamSpec]:
        v, n = cfg.vector_length, cfg.num_vectors
        if d_in % v or d_out % v:
            cure = "choose one that does, or leave the layer out with exclude_names"
            raise ConfigError(f"vector_length {v} divides not both of its sides, {d_in} and {d_out}\n  {cure}")

        shapes, std = {"A": (cfg.r, d_in // v, n), "B": (d_out // v, cfg.r, n)}, cfg.init_logits_std
        return {
            f"lora_logits_{k}": ParamSpec(s, lambda t: t.normal_(0, std), keep_dtype=True) for k, s in shapes.items()
        }

    @staticmethod
    def shared_specs(targets: Sequence[Target], cfg: VBLoRAConfig) -> dict[str, ParamSpec]:
        bound, shape = cfg.init_vector_bank_bound, (cfg.num_vectors, cfg.vector_length)
        return {"bank": ParamSpec(shape, lambda t: t.uniform_(-bound, bound), keep_dtype=True)}

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        return as_low_rank(layer, *_parts(layer), dropout=layer.cfg.dropout)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        return with_factors(layer, x, y, *_parts(layer), dropout=layer.cfg.dropout)


def _parts(layer: Layer) -> tuple[Factors, Tensor, Tensor, Tensor]:
    def pieces(logits: Tensor, bank: Tensor) -> Tensor:
        top, rows = logits.topk(layer.cfg.topk)  # (m, l, k)
        return (top.softmax(-1)[..., None] * bank[rows]).sum(-2)  # (m, l, v)

    def factors(logits_a: Tensor, logits_b: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
        return pieces(logits_a, bank).flatten(1), pieces(logits_b, bank).mT.flatten(0, 1)  # (r, i), (o, r)

    return factors, layer.lora_logits_A, layer.lora_logits_B, layer.lora_bank
