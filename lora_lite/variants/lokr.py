"""LoKr: an update that is a Kronecker product (LyCORIS: Yeh et al. 2023, arXiv:2309.14859, section 3.2).

    y = W x + b + s (W1 ⊗ W2) x      W1 (l, m)   W2 (k, n)   o = l k   i = m n   s = α/r
    W2 = B2 A2 where r < max(k, n)/2, else whole;  decompose_both: W1 = B1 A1 where r < max(l, m)/2
    a convolution is split over its channels: W2 (k, n, *kernel), or by its core, Σ_jk T_jk a_j b_k    T (r, r, *kernel)

Identity   W1 = 0 (its first factor), or with init "lycoris" W2 = 0 (its last): bit-exact
Base       never read: any layer kind
Departs    from PEFT on nn.Conv1d with a whole W2 of more than one row or column: PEFT aligns the wrong axes there, and
           its product isn't one of Kronecker's
Checked    against PEFT LoKrConfig: outputs, gradients, three AdamW steps; all shapes of W1 and W2; convolutions
"""

from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.targets import Target
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.dense import as_low_rank
from ..families.lycoris import LycorisConfig, dropped_rows
from ..ops.kronecker import kronecker_product, shapes, sides
from ..ops.recompute import recomputed

__all__ = ["LoKr", "LoKrConfig"]


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(LycorisConfig):
    """decompose_factor: l and m, where it divides their side; -1: of all splits the most even. init: "default" or
    "lycoris". rank_dropout_scale: what rank_dropout leaves counts more, by the share that it leaves."""

    variant: str = "lokr"
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init: str = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = self.decompose_factor
        self.require(type(factor) is int and (factor > 0 or factor == -1), "decompose_factor", "a size, or -1")
        self.require(self.init in ("default", "lycoris"), "init", '"default" or "lycoris"')


@register
class LoKr:
    name = "lokr"
    config = LoKrConfig
    handles_scale = True

    @staticmethod
    def layer_specs(target: Target, cfg: LoKrConfig) -> dict[str, ParamSpec]:
        zero = ("w1", "w1_a") if cfg.init == "default" else ("w2", "w2_b")
        sizes = _shapes(target.d_in, target.d_out, target.kernel, cfg)
        inits = {name: "zeros" if name in zero else "kaiming" for name in sizes}
        return {f"lora_{name}": ParamSpec(shape, inits[name], keep_dtype=True) for name, shape in sizes.items()}

    @staticmethod
    def low_rank(layer: Layer) -> LowRank:
        names, tensors, rows = _parts(layer)

        def delta(*values: Tensor) -> Tensor:
            w1, w2 = sides(dict(zip(names, values, strict=True)))
            product = torch.kron(reduce(torch.matmul, w1), reduce(torch.matmul, w2)) * layer.cfg.scaling
            return product if rows is None else product * rows[:, None]

        return as_low_rank(layer, delta, *tensors)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        names, tensors, rows = _parts(layer)

        def branch(x: Tensor, *values: Tensor) -> Tensor:
            w1, w2 = sides({name: value.to(x.dtype) for name, value in zip(names, values, strict=True)})
            product = kronecker_product(x, w1, w2)
            return product if rows is None else product * rows.to(x.dtype)

        return y + layer.scale * layer.cfg.scaling * recomputed(branch, x, *tensors)


def _shapes(d_in: int, d_out: int, kernel: tuple[int, ...], cfg: LoKrConfig) -> dict[str, tuple[int, ...]]:
    return shapes(d_in, d_out, kernel, cfg.r, cfg.decompose_factor, cfg.decompose_both, cfg.has_core(kernel))


def _parts(layer: Layer) -> tuple[list[str], list[Tensor], Float[Tensor, "o"] | None]:
    """The names of the tensors, the tensors, and what training drops of the rows of ΔW."""
    names = list(_shapes(layer.in_features, layer.out_features, layer.kernel, layer.cfg))
    tensors = [getattr(layer, f"lora_{name}") for name in names]
    return names, tensors, dropped_rows(layer, tensors[0], layer.cfg.rank_dropout_scale)
