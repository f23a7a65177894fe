"""FRoD: all of the weight, in directions that layers of one kind share (2025, AAAI 2026, arXiv:2512.23485).

    y = U (diag(λ) + S) Vᵀ x + b        W = U diag(λ0) Vᵀ    V (i, i) once for all layers of one name    U (o, i)
      = W (x + V⁻ᵀ Λ0⁻¹ (S + diag(λ - λ0)) Vᵀ drop(x)) + b   without U; λ (i,) trained, λ0 the norms of W V⁻ᵀ's columns
    S (i, i) of i² sparse_rate trained numbers beside the diagonal, at places that layers of one name share

Identity   λ = λ0 and S = 0, bit-exact
Base       read once, at init, for V and λ0; dequantised numbers do. V, V⁻¹, λ0 and the places stay in the file
Departs    PEFT multiplies by U, which is as large as W at each layer, and rounds at the start. It also takes directions
           that W hasn't, whose λ0 is rounding, as of fewer rows than columns in all: here they take no part
Checked    against PEFT FrodConfig: V and the places, outputs, gradients, three AdamW steps
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.config import BaseConfig
from ..core.targets import Target
from ..core.validate import is_number
from ..core.variant import Layer, ParamSpec, register
from ..errors import ConfigError
from ..families.categories import category, shared_name
from ..families.factors import seeded_dropout
from ..ops.joint import joint_directions, off_diagonal, sparse_product
from ..ops.recompute import recomputed

__all__ = ["FRoD", "FRoDConfig"]

LEAST = 1e-5  # of the largest λ0: what is below is float32's rounding


@dataclass(frozen=True, kw_only=True)
class FRoDConfig(BaseConfig):
    """sparse_rate: the share of S that is trained. regularization_alpha: the ridge in V's making. seed: of the places.
    dropout: of what is added to x."""

    variant: str = "frod"
    sparse_rate: float = 0.01
    regularization_alpha: float = 1e-3
    seed: int = 0
    dropout: float = 0.0
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (
        *BaseConfig.SAME_AT_ALL_LAYERS,
        *("sparse_rate", "regularization_alpha", "seed"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(is_number(self.sparse_rate) and 0 < self.sparse_rate <= 1, "sparse_rate", "above 0, at most 1")
        alpha = self.regularization_alpha
        self.require(is_number(alpha) and alpha > 0, "regularization_alpha", "a number above 0")
        self.require(type(self.seed) is int and 0 <= self.seed < 2**63, "seed", "a seed of a torch.Generator")
        self.require(is_number(self.dropout) and 0 <= self.dropout < 1, "dropout", "a probability below 1")


@register
class FRoD:
    name = "frod"
    config = FRoDConfig
    base_weight = "read"
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: FRoDConfig) -> dict[str, ParamSpec]:
        if d_in < 2:
            raise ConfigError(f"FRoD: a ({d_out}, {d_in}) weight has no S\n  leave the layer out with exclude_names")
        return {
            "lora_l": ParamSpec((d_in,), keep_dtype=True),
            "lora_s": ParamSpec((_count(d_in, cfg),), keep_dtype=True),
            "lora_l0": ParamSpec((d_in,), trainable=False, keep_dtype=True),
        }

    @staticmethod
    def shared_specs(targets: Sequence[Target], cfg: FRoDConfig) -> dict[str, ParamSpec]:
        specs: dict[str, ParamSpec] = {}
        for target in targets:
            kind, i = shared_name(target.path), target.d_in
            v = ParamSpec((i, i), trainable=False, keep_dtype=True)
            if specs.setdefault(f"V_{kind}", v) != v:
                raise ConfigError(
                    f"FRoD: {target.path} and others of its name differ in width\n  leave one of them out"
                )
            specs |= {
                f"inverse_{kind}": v,
                f"places_{kind}": ParamSpec((2, _count(i, cfg)), dtype=torch.int64, below=i),
            }
        return specs

    @staticmethod
    def group_init(model: nn.Module, targets: Mapping[str, Layer], cfg: FRoDConfig, calibration_data: Any) -> None:
        generator = torch.Generator().manual_seed(cfg.seed)  # one for all, in the order of names
        for kind in sorted({category(path) for path in targets}):
            layers = [layer for path, layer in targets.items() if category(path) == kind]
            weights = [layer.dense_weight() for layer in layers]
            v = joint_directions(weights, cfg.regularization_alpha).double()
            for tensor, value in zip(_shared(layers[0]), (v, v.inverse()), strict=False):
                tensor.copy_(value)
            places = _shared(layers[0])[2]
            places.copy_(off_diagonal(len(v), places.shape[1], generator))
            for layer, w in zip(layers, weights, strict=True):
                layer.lora_l0.copy_(torch.linalg.solve(v, w.double().mT).norm(dim=1))  # of W V⁻ᵀ by column
                layer.lora_l.copy_(layer.lora_l0)

    @staticmethod
    def forward_input(layer: Layer, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b i"]:
        drop = seeded_dropout(layer, layer.cfg.dropout)

        def change(x: Tensor, l1: Tensor, s: Tensor, l0: Tensor, v: Tensor, inverse: Tensor, places: Tensor) -> Tensor:
            l0 = l0.to(l1.dtype)  # a cast of parameters alone must not part them
            z = drop(x) @ v.to(x.dtype)  # Vᵀ x (*b, i)
            mixed = sparse_product(z, s.to(z.dtype), places) + z * (l1 - l0).to(z.dtype)
            unit = torch.where(l0 > LEAST * l0.amax(), 1 / l0, 0)  # Λ0⁻¹ (i,)
            return (mixed * unit.to(z.dtype)) @ inverse.to(x.dtype)

        return x + layer.scale * recomputed(change, x, layer.lora_l, layer.lora_s, layer.lora_l0, *_shared(layer))


def _shared(layer: Layer) -> list[Tensor]:
    return [getattr(layer, f"lora_{name}_{shared_name(layer.path)}") for name in ("V", "inverse", "places")]


def _count(d: int, cfg: FRoDConfig) -> int:
    return max(1, min(int(d * d * cfg.sparse_rate), d * d - d))
