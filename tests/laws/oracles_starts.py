"""The starts of LoRA: their equations, and the data that those are computed from which need some."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn


def lora(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    alpha = cfg.alpha or cfg.r
    s = alpha / cfg.r**0.5 if cfg.rslora else alpha / cfg.r
    return x @ (W + s * t["lora_B"] @ t["lora_A"]).T + b


def residual(W: Tensor, b: Tensor, cfg: Any, t: dict[str, Tensor], x: Tensor) -> Tensor:
    s = (cfg.alpha or cfg.r) / cfg.r
    rest = W - s * t["lora_B0"] @ t["lora_A0"]
    return x @ (rest + s * t["lora_B"] @ t["lora_A"]).T + b


ORACLES = {
    "eva": lora,
    "loftq": lora,
    "orthogonal": residual,
    "olora": residual,
    "milora": residual,
    "corda": residual,
    "lora_ga": residual,
}


def batches(model: Any, sizes: Mapping[str, tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Two batches of the model's input: ids, or vectors for its first target."""
    name = next(iter(signature(model.forward).parameters))
    generator = torch.Generator().manual_seed(3)
    if name == "input_ids":
        ids = torch.arange(48).reshape(2, 2, 12)
        return [{name: ids[0]}, {name: ids[1]}]
    d_in = next(iter(sizes.values()))[0]
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())  # codes of a quantised weight aside
    return [{name: torch.randn(2, 12, d_in, generator=generator).to(dtype)} for _ in "ab"]


def with_loss(model: Any, sizes: Mapping[str, tuple[int, int]]) -> Any:
    """Batches, and a loss where the model has none of its own."""
    data = batches(model, sizes)
    return data if "input_ids" in data[0] else {"batches": data, "loss": lambda m, x: m(**x).square().mean()}


def weights(model: nn.Module, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Dense weights (o, i), of a model that is not this one."""
    generator = torch.Generator().manual_seed(3)
    return {path: torch.randn(o, i, generator=generator) / i**0.5 for path, (i, o) in sizes.items()}


DATA = {"eva": batches, "corda": batches, "lora_ga": with_loss, "loftq": weights}
"""calibration_data of a model and the sizes (d_in, d_out) of the layers that a config targets, by path."""
