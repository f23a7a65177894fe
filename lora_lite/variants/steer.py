"""Steering: add a vector to what a block puts out (Rimsky et al. 2023, arXiv:2312.06681, section 3).

    y = W x + b + c v       v (o,) = strength · kernel(depth) · d       d (o,): between two sides of prompts

Identity   never: it is computed, and nothing is trained
Base       never read: any layer kind, fused experts too
Departs    by default c v is added on the MLP's last layer, where it can be merged: that is the block's output wherever
           it is the sum of its input and what its layers write. A norm or a factor in between (Gemma 2 and 3, OLMo 2,
           Granite) makes another vector of it: a fit on prompts tries one block, and warns. kinds="block" adds at the
           block's output itself, on any model. `unit` "norm" isn't the paper's, "difference" is
Checked    against adding the vector at the block's output
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.targets import MLP, MLP_OUT
from ..core.variant import Layer, ParamSpec, register
from ..errors import ConfigError
from ..families.directions import Unit, VectorConfig, active_directions, fit_vector

__all__ = ["Steer", "SteerConfig", "Unit"]


@dataclass(frozen=True, kw_only=True)
class SteerConfig(VectorConfig):
    """Targets the MLP's last layer of every block; with kinds="block", its output. Choose some with `layers`: each adds
    to the earlier ones. unit, method and what are those of its family.

    start    add from this column of the batch on, counted from 0; None: everywhere. A forward of one position is taken
             for a step of decoding, beyond start, one of several to begin at 0: so with a cache and without are the
             same if the prompt has `start` columns at least. Not on fused experts
    """

    variant: str = "steer"
    target_names: Sequence[str] = (
        # A block's shared MLP beside the experts (shared_mlp) would add the vector a second time.
        MLP.replace("|shared_mlp", "") + MLP_OUT,
        r"\.(mlp|ffn|feed_forward|block_sparse_moe)\.experts$",
        # OPT, BERT, MobileBERT, BLIP-2, ALBERT, CTRL, XLNet
        r"\.\d+\.(fc2|output(\.bottleneck)?\.dense|output_query\.dense|ffn_output|ffn\.2|ff\.layer_2)$",
        r"\.\d+\.mixer\.(out_proj|down_proj|o_proj)$",  # the only part of a block: Mamba, Nemotron-H
    )
    start: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = self.start is None or (type(self.start) is int and self.start >= 0)
        self.require(valid, "start", "a position from 0, or None")


@register
class Steer:
    name = "steer"
    reads_input = False
    config = SteerConfig
    has_identity_init, handles_scale, needs_calibration = False, True, True
    live = ("strength", "unit", "layer", "kernels")
    group_init = staticmethod(fit_vector)

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: SteerConfig) -> dict[str, ParamSpec]:
        shapes = {"own": (d_out,), "v": (d_out,), "norm": ()}
        return {
            f"lora_{n}": ParamSpec(s, trainable=False, keep_dtype=True, is_shift=n == "v") for n, s in shapes.items()
        }

    @staticmethod
    def refresh(targets: Mapping[str, Layer], cfg: SteerConfig) -> None:
        for layer, direction, weight in active_directions(targets, torch.lerp):
            if layer.cfg.start is not None and layer.experts:
                raise ConfigError(f"{layer.path}: start={layer.cfg.start}: fused experts see tokens without a position")
            if layer.cfg.unit == "norm" and not layer.lora_norm:
                raise ConfigError(f"{layer.path}: unit='norm': given directions say nothing of the activations")
            if layer.cfg.unit == "norm":
                direction = F.normalize(direction, dim=0) * layer.lora_norm
            v = weight * direction.double()  # (o,)
            if not v.to(layer.lora_v.dtype).isfinite().all():
                raise ConfigError(f"{layer.path}: strength={layer.cfg.strength:g} makes a vector that is not finite")
            layer.lora_v.copy_(v)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b d"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        v, start = (layer.scale * layer.lora_v).to(y.dtype), layer.cfg.start
        if start and y.ndim < 3:
            raise ConfigError(
                f"{layer.path}: start={start}: wanted (batch, positions, d), got {tuple(y.shape)}\n"
                f"  what acts by position can't go on a layer that sees a flattened batch, nor into a weight"
            )
        if not start or y.shape[1] == 1:  # everywhere, or a step of decoding
            return y + v
        return torch.cat([y[:, :start], y[:, start:] + v], dim=1)
