"""PVeRA: VeRA whose low-rank features are sampled in training (Fillioux et al. 2025, arXiv:2512.07703).

    y = W x + b + λ_b ⊙ B_o z           z = μ + ε ⊙ σ, ε ~ N(0, 1) at each token in training;  z = μ else
    [μ, log σ²] = λ_d ⊙ (A_i drop(x))   A (2r, max i), B (max o, r) once, frozen: first i columns, o rows
    λ_d (2r,), λ_b (o,) at each layer, trained

Identity   λ_b = 0, bit-exact
Base       never read: any layer kind. In training, layers that are called with their input: a weight holds no sample
Departs    no KL term, as in PEFT. A and B are PEFT's of the same seed, and drawn again at load, as VeRA's. Samples come
           from torch's generator, which gradient checkpointing sets back; PEFT may seed one at each layer
Checked    against PEFT PveraConfig: A and B bit for bit, outputs, gradients, three AdamW steps; samples, with its ε
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.targets import Target
from ..core.variant import Layer, LowRank, ParamSpec, register
from ..families.projections import projection_specs
from ..ops.few import few_wide
from ..ops.recompute import frozen_linear, recomputed
from .vera import VeRAConfig

__all__ = ["PVeRA", "PVeRAConfig"]


@dataclass(frozen=True, kw_only=True)
class PVeRAConfig(VeRAConfig):
    """As VeRA's. sample_at_inference: sample in eval mode, too; then no weight stands for it."""

    variant: str = "pvera"
    sample_at_inference: bool = False


@register
class PVeRA:
    name = "pvera"
    config = PVeRAConfig
    handles_scale = True

    @staticmethod
    def not_capturable(cfg: PVeRAConfig) -> str:
        return "each call draws numbers, which a graph would repeat" if cfg.sample_at_inference else ""

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: PVeRAConfig) -> dict[str, ParamSpec]:
        return {
            "lora_d": ParamSpec((2 * cfg.r,), lambda t: t.fill_(cfg.d_initial), keep_dtype=True),
            "lora_b": ParamSpec((d_out,), keep_dtype=True),
        }

    @staticmethod
    def shared_specs(targets: Sequence[Target], cfg: PVeRAConfig) -> dict[str, ParamSpec]:
        return projection_specs(targets, 2 * cfg.r, cfg.r, cfg.seed, cfg.save_projection)

    @staticmethod
    def low_rank(layer: Layer) -> LowRank | None:
        if layer.training or layer.cfg.sample_at_inference:
            return None
        r = layer.cfg.r
        a, b = layer.lora_A[:r, : layer.in_features], layer.lora_B[: layer.out_features]  # (r, i), (o, r)
        return LowRank(a, layer.lora_b[:, None].to(b.dtype) * b, layer.scale * layer.lora_d[:r])

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b i"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        r, s = layer.cfg.r, layer.scale
        is_sampled = layer.training or layer.cfg.sample_at_inference
        a, b = layer.lora_A[: 2 * r if is_sampled else r, : layer.in_features], layer.lora_B[: layer.out_features]
        x = few_wide(F.dropout(x, layer.cfg.dropout, layer.training) if layer.cfg.dropout else x)
        drawn = layer.generator(x) if is_sampled else None  # None in a graph of torch.compile, too
        seed = None if drawn is None else drawn.initial_seed()

        def branch(z: Tensor, d: Tensor, lambda_b: Tensor, b: Tensor) -> Tensor:
            dtype, z = z.dtype, z * d[: z.shape[-1]]  # μ (*b, r), or both (*b, 2r)
            if is_sampled:
                mean, log_variance = z.chunk(2, -1)  # (*b, r)
                generator = None if seed is None else torch.Generator(z.device).manual_seed(seed)
                noise = torch.randn(mean.shape, dtype=z.dtype, device=z.device, generator=generator)
                z = mean + noise * (log_variance / 2).exp()
            return F.linear(z.to(dtype), b.to(dtype)) * (s * lambda_b)

        # A x is kept in x's place
        return y + recomputed(branch, frozen_linear(x, a), layer.lora_d, layer.lora_b, b).to(y.dtype)
