"""LoRAs with room for a largest rank: their tensors are of that rank, filled up with zeros, and take others' values."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .adapter import Adapter
from .config import BaseConfig
from .resolve import make_site
from .state import AdapterState, Method, Tensors, number_sites

_FOLDED = {"r", "alpha", "rslora"}  # fields that go into the factors


def with_room(cfg: BaseConfig, max_rank: int) -> Any:
    """A LoRA's config at this rank, of the same scaling, in float32 or wider: 16 bits would round the scaling in B.

    Raises:
        ConfigError: for another method, a larger rank, or ranks that differ by layer.
    """
    config: Any = cfg
    problem = ""
    if cfg.variant != "lora":
        problem = f"variant {cfg.variant!r} has no rank that zeros could fill up; it is for 'lora'"
    elif isinstance(max_rank, bool) or not isinstance(max_rank, int) or max_rank < config.r:
        problem = f"wanted a whole number of at least the rank, {config.r}"
    elif any(fields.keys() & _FOLDED for fields in config.per_layer.values()):
        problem = "ranks that differ by layer (per_layer) are for a file: lora_lite.load(..., max_rank=)"
    if problem:
        raise ConfigError(f"max_rank={max_rank!r}: {problem}")
    dtype = torch.promote_types(config.dtype, torch.float32)
    return replace(config, r=max_rank, alpha=config.scaling * max_rank, rslora=False, dtype=dtype)


def has_at_most(methods: Sequence[Method], rank: int) -> bool:
    """Is it one LoRA of at most this rank at all of its layers, which differ in nothing else?"""
    if len(methods) > 1 or methods[0].cfg.variant != "lora":
        return False
    return all(site.cfg.r <= rank and site.overrides.keys() <= _FOLDED for site in methods[0].sites)


def padded(
    methods: Sequence[Method], tensors: Tensors, max_rank: int, alpha: float | None = None
) -> tuple[Method, dict[str, Tensor]]:
    """A file's LoRA with zeros up to this rank, and this alpha at all layers: what the scaling differs by goes into B.

    Raises:
        ConfigError: for another method, or a larger rank.
    """
    if len(methods) > 1:
        raise ConfigError(f"max_rank={max_rank!r}: the file has several methods; it is for one LoRA")
    (method,) = methods
    if others := sorted({field for site in method.sites for field in site.overrides} - _FOLDED):
        raise ConfigError(
            f"max_rank={max_rank!r}: {', '.join(others)} differ by layer, and room has one for all layers"
        )
    rank = max(site.cfg.r for site in method.sites) if method.cfg.variant == "lora" else 0
    plain = replace(method.cfg, r=rank, alpha=None, rslora=False, per_layer={}) if rank else method.cfg
    cfg = replace(with_room(plain, max_rank), alpha=alpha or float(max_rank))
    room = Method(cfg, [make_site(site.target, site.base, cfg, {}) for site in method.sites])
    values: dict[str, Tensor] = {}
    for site in method.sites:
        a, b = (tensors[site.key(name)].to(cfg.dtype) for name in ("lora_A", "lora_B"))
        empty, factor = max_rank - site.cfg.r, site.cfg.scaling / cfg.scaling
        values[site.key("lora_A")] = F.pad(a, (0, 0, 0, empty))  # (*experts, r, i)
        values[site.key("lora_B")] = F.pad(b * factor, (0, empty))  # (*experts, o, r)
        if cfg.bias:
            values[site.key("lora_bias")] = tensors[site.key("lora_bias")].to(cfg.dtype) * factor
    number_sites([room])
    return room, values


def takes(state: AdapterState, method: Method) -> bool:
    """Has an attached adapter room for this one of `padded`: on its layers, with its settings?"""
    mine, *others = state.methods
    settings = [m.cfg.to_dict() for m in (mine, method)]
    for fields in settings:
        for field in (*mine.cfg.FILTERS, "dtype", "per_layer"):
            fields.pop(field, None)
    paths, wanted = ({site.path for site in m.sites} for m in (mine, method))
    is_tied = any(site.base.ties or site.overrides for site in mine.sites)
    return not (others or is_tied or state.unloaded) and settings[0] == settings[1] and wanted <= paths


@torch.no_grad()
def empty_room(adapter: Adapter, rank: int) -> None:
    """Zeros beyond a rank: they stay so in training, as the gradient of each is a product with the other factor's."""
    for key, tensor in adapter.named_tensors():
        if key.endswith("lora_A"):
            tensor[..., rank:, :].zero_()
