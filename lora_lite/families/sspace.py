"""S-space: the singular directions of a layer's weight, W = U diag(S) Vᵀ, and which of them an adapter works in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from loguru import logger
from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..core.layer import Layer
from ..core.variant import ParamSpec, lookup
from ..errors import ConfigError
from ..measure.batches import check_batches, check_sides
from ..measure.capture import capture
from ..ops.svd import Svd, top_svd
from .calibration import lots

SELECT = ("top_s", "wanda", "act", "min_std")
SVD_BYTES = 2 << 30
"""Bytes of singular vectors that are in memory at a time, while the calibration batches run."""


@dataclass(frozen=True, kw_only=True)
class SSpaceConfig(AdapterConfig):
    """A rank in S-space, and which directions of the weight they are.

    r         how many, at most: a layer has k = min(d_in, d_out) directions, and takes all of them where that is less
    select    by which score the highest are taken, from the layer's inputs x at all tokens of the calibration data:
              "top_s"     S. Needs no data, and takes none
              "wanda"     S · mean |Vᵀx|
              "act"       mean |Vᵀx|
              "min_std"   the lesser of std(Vᵀx) on two sides, {"positive": batches, "negative": batches}: directions
                          that are alive on both. The other two take a list of batches, or both sides together
    svd_of    "base", or "history", the base with the rounds that are kept on it (`lora_lite.freeze_into`)
    """

    r: int = 64
    select: str = "top_s"
    svd_of: str = "base"
    SAME_AT_ALL_LAYERS: ClassVar[tuple[str, ...]] = (*AdapterConfig.SAME_AT_ALL_LAYERS, "select")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.select in SELECT, "select", f"one of {SELECT}")
        self.require(self.svd_of in ("base", "history"), "svd_of", '"base" or "history"')


def needs_data(cfg: SSpaceConfig) -> bool:
    """Is the choice of directions made from activations?"""
    return cfg.select != "top_s"


def basis_specs(d_in: int, d_out: int, cfg: SSpaceConfig) -> dict[str, ParamSpec]:
    """The tensors that `fit_basis` fills: U (o, r), S (r,), V (i, r) of the chosen directions, in the weight's order,
    and a mask (k,) of which of the k they are: ones and zeros, which no cast to another dtype can round."""
    k = min(d_in, d_out)
    r = min(cfg.r, k)
    return {
        "lora_U": ParamSpec((d_out, r), trainable=False),
        "lora_S": ParamSpec((r,), trainable=False, keep_dtype=True),
        "lora_V": ParamSpec((d_in, r), trainable=False),
        "lora_chosen": ParamSpec((k,), trainable=False, keep_dtype=True),
    }


def fit_basis(model: nn.Module, targets: Mapping[str, Layer], cfg: SSpaceConfig, calibration_data: Any) -> None:
    """A `group_init`: choose each layer's directions, and keep them in its `lora_U`, `lora_S`, `lora_V`, `lora_chosen`.

    The batches run once for every SVD_BYTES of singular vectors: for most models once. Raises ConfigError for data that
    doesn't fit `select`, or an adapter that was trained in the directions it has, and what `capture` raises.
    """
    trained = [layer.path for layer in targets.values() if _is_trained(layer)]
    if trained:
        raise ConfigError(
            f"{trained[0]}: it was trained in the directions that it has, so they can't be chosen anew\n"
            f"  detach, and attach a fresh adapter with the new calibration_data"
        )
    sides = _sides(cfg.select, calibration_data)
    depths: dict[str, float] = {}
    for group in lots(targets.values(), _size, SVD_BYTES if sides else 0):
        svds = {layer.path: top_svd(layer.dense_weight(cfg.svd_of), len(layer.lora_chosen)) for layer in group}
        scores = _scores(model, svds, cfg.select, sides)
        for layer in group:
            u, s, v = svds.pop(layer.path)  # (o, k), (k,), (i, k)
            chosen = top(scores[layer.path], len(layer.lora_S))
            layer.lora_U.copy_(u[:, chosen])
            layer.lora_S.copy_(s[chosen])
            layer.lora_V.copy_(v[:, chosen])
            layer.lora_chosen.copy_(chosen)
            depths[layer.path] = tail_depth(chosen)
            logger.debug(
                f"{layer.path}: {len(layer.lora_S)} of {len(s)} directions by {cfg.select}, "
                f"tail depth {depths[layer.path]:.2f}"
            )
    if sides:
        deepest = max(depths, key=depths.__getitem__)
        logger.info(
            f"directions by {cfg.select}: tail depth {sum(depths.values()) / len(depths):.2f} on average, "
            f"{depths[deepest]:.2f} in {deepest}, where 0 is the first of the spectrum and 1 the last"
        )
    narrow = [layer.path for layer in targets.values() if len(layer.lora_S) < layer.cfg.r]
    if narrow:
        logger.info(
            f"{len(narrow)} of {len(targets)} layers have fewer directions than r, such as {narrow[0]}: all are used"
        )


def _is_trained(layer: Layer) -> bool:
    """Has a trainable tensor moved? All of them start at 0."""
    specs = lookup(layer.cfg.variant).param_specs(layer.in_features, layer.out_features, layer.cfg)
    return any(bool(getattr(layer, name).any()) for name, spec in specs.items() if spec.trainable)


def top(scores: Float[Tensor, "k"], r: int) -> Bool[Tensor, "k"]:
    """A mask of the r highest scores. Of equal ones the first are taken, so that the choice is the same everywhere."""
    mask = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    mask[scores.argsort(descending=True, stable=True)[:r]] = True
    return mask


def tail_depth(chosen: Bool[Tensor, "k"]) -> float:
    """The place of the chosen directions: 0 the first of the spectrum, 1 the last of it; 0 if they are all of it."""
    k, r = len(chosen), int(chosen.sum())  # the first r have the mean index (r - 1)/2, the last r k - r more
    return 0.0 if r == k else (float(chosen.nonzero().double().mean()) - (r - 1) / 2) / (k - r)


def _sides(select: str, data: Any) -> list[Sequence[Any]]:
    """The sets of batches whose activations are reduced apart: none, one or two. Raises ConfigError."""
    if select == "top_s":
        return []
    if isinstance(data, Mapping):
        check_sides(data)
        sides = [data["positive"], data["negative"]]
        return sides if select == "min_std" else [[*sides[0], *sides[1]]]
    check_batches(data)
    if select == "min_std":
        raise ConfigError(
            "select='min_std' looks for directions that are alive in two sets of activations, and got one\n"
            '  give calibration_data={"positive": batches, "negative": batches}, or use "wanda" or "act"'
        )
    return [data]


def _size(layer: Layer) -> int:
    """Bytes of U (o, k) and V (i, k) in float32."""
    return 4 * min(layer.in_features, layer.out_features) * (layer.in_features + layer.out_features)


def _scores(
    model: nn.Module, svds: Mapping[str, Svd], select: str, sides: Sequence[Sequence[Any]]
) -> dict[str, Float[Tensor, "k"]]:
    """The score of every direction of a layer's weight, by the layer's path."""
    if select == "top_s":
        return {path: s for path, (_, s, _) in svds.items()}

    def project(x: Float[Tensor, "n i"], v: Float[Tensor, "i k"]) -> Float[Tensor, "n k"]:
        coordinates = x.to(v) @ v
        return coordinates if select == "min_std" else coordinates.abs()

    transforms = {path: partial(project, v=v) for path, (_, _, v) in svds.items()}
    reduce = "std" if select == "min_std" else "mean"
    statistics = [
        capture(model, batches, list(svds), what="input", positions="all", reduce=reduce, transform=transforms)
        for batches in sides
    ]
    if select != "min_std":  # one side
        means = {path: side.mean for path, side in statistics[0].items()}  # (k,) each
        return {path: means[path] * s if select == "wanda" else means[path] for path, (_, s, _) in svds.items()}
    if min(value.count for side in statistics for value in side.values()) < 2:
        raise ConfigError("select='min_std': one side has a single token, which has no spread\n  give it more")
    stds = {path: [std for side in statistics if (std := side[path].std) is not None] for path in svds}
    return {path: torch.stack(values).amin(0) for path, values in stds.items()}
