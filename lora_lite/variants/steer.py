"""Steering: add a vector to what a block puts out (Rimsky et al. 2023, arXiv:2312.06681, section 3).

    y = W x + b + c v       v (o,) = strength · kernel(depth) · d       d (o,): between two sides of prompts

On the MLP's last layer that is adding c v at the block's output, wherever a block puts out the sum of its input and
what its layers write (on the attention's last layer it would pass through the MLP as well). A norm or a factor in
between (Gemma 2 and 3, OLMo 2, Granite) makes another vector of it; a fit on prompts tries it on one block, and warns.

Identity   never: it is computed, and nothing is trained
Base       never read: any layer kind, fused experts too
Departs    `unit` "difference" is the paper's, "norm" a share of the activations' length
Checked    against adding the vector at the block's output
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..core.variant import Layer, ParamSpec, register
from ..errors import ConfigError
from ..families.directions import DirectionConfig, Method, active_directions, fit_vector

__all__ = ["Steer", "SteerConfig", "Unit"]


class Unit(enum.StrEnum):
    DIFFERENCE, NORM = "difference", "norm"


@dataclass(frozen=True, kw_only=True)
class SteerConfig(DirectionConfig):
    """Targets the MLP's last layer of every block. Choose some with `layers`: each adds to the earlier ones.

    unit     of strength. "difference": the distance of the sides along the direction; of given directions their own
             length. "norm": the length of the activations of the layer's own block, as the fit measured it
    method   "difference" of the sides' centres, "pca" or "probe", as in `contrast`
    what     "residual": the direction is of the stream as it leaves the block. "output": of what the layer puts out
    start    add from this position on, counted in columns of the batch from 0; None: everywhere. A forward of one
             position is taken for a step of decoding, beyond start: so with a cache and without are the same if the
             prompt has `start` columns at least. One of several is taken to begin at 0. Not on fused experts
    """

    variant: str = "steer"
    target_names: Sequence[str] = (
        r"\.(mlp|ffn|feed_forward)\.(down_proj|experts|c_proj|dense_4h_to_h|fc2|w2|fc_out)$",
        r"\.\d+\.fc2$",  # OPT
    )
    target_roles: Sequence[str] = ("writer",)
    unit: Unit | str = Unit.DIFFERENCE
    method: Method | str = Method.DIFFERENCE
    what: str = "residual"
    start: int | None = None
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (*DirectionConfig.SAME_AT_ALL_LAYERS, "method", "what")
    FUSED_EXPERTS: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.what in ("residual", "output"), "what", '"residual" or "output"')
        self.require(self.what == "residual" or self.layer is None, "layer", "None with what='output'")
        self.require(self.method == "difference" or self.center == "mean", "center", f"'mean' for {self.method!r}")
        valid = self.start is None or (type(self.start) is int and self.start >= 0)
        self.require(valid, "start", "a position from 0, or None")


@register
class Steer:
    name = "steer"
    config = SteerConfig
    has_identity_init, handles_scale, needs_calibration = False, True, True
    live = ("strength", "unit", "layer", "kernels")
    group_init = staticmethod(fit_vector)

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: SteerConfig) -> dict[str, ParamSpec]:
        shapes = {"own": (d_out,), "v": (d_out,), "norm": ()}
        return {f"lora_{name}": ParamSpec(shape, trainable=False, keep_dtype=True) for name, shape in shapes.items()}

    @staticmethod
    def refresh(targets: Mapping[str, Layer], cfg: SteerConfig) -> None:
        for layer, direction, weight in active_directions(targets, torch.lerp):
            if layer.cfg.start is not None and layer.experts:
                raise ConfigError(f"{layer.path}: start={layer.cfg.start}: fused experts see tokens without a position")
            if layer.cfg.unit == "norm":
                if not layer.lora_norm:
                    raise ConfigError(f"{layer.path}: unit='norm': given directions say nothing of the activations")
                direction = F.normalize(direction, dim=0) * layer.lora_norm
            v = weight * direction.double()  # (o,)
            if not v.to(layer.lora_v.dtype).isfinite().all():
                raise ConfigError(f"{layer.path}: strength={layer.cfg.strength:g} makes a vector that is not finite")
            layer.lora_v.copy_(v)

    @staticmethod
    def forward(layer: Layer, x: Float[Tensor, "*b d"], y: Float[Tensor, "*b o"]) -> Float[Tensor, "*b o"]:
        v, start = (layer.scale * layer.lora_v).to(y.dtype), layer.cfg.start
        if not start:  # None or 0
            return y + v
        if y.ndim < 3:
            raise ConfigError(
                f"{layer.path}: start={start}: wanted (batch, positions, d), got {tuple(y.shape)}\n"
                f"  what acts by position can't go on a layer that sees a flattened batch, nor into a weight"
            )
        if y.shape[1] == 1:  # a step of decoding
            return y + v
        return torch.cat([y[:, :start], y[:, start:] + v], dim=1)
