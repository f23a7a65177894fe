"""Recipes of training: groups of parameters (LoRA+), corrected gradients (LoRA-FA), and a rank and a learning rate."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .core.adapter import Adapter
from .core.layer import Layer
from .core.plan import plan
from .core.validate import is_number
from .core.variant import LowRank, config_for, lookup
from .errors import ConfigError

__all__ = ["Suggestion", "correct_gradients", "param_groups", "suggest"]

FITTED = {"llama": 0.781, "qwen": 0.0775}
"""The exponent of the width, by family of models, as tinker-cookbook's hyperparam_utils.py has it."""
MOST_RANK = 256


def param_groups(adapter: Adapter, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """LoRA+: groups for an optimiser, in which B learns `ratio` times as fast as all else (Hayou et al. 2024,
    arXiv:2402.12354, section 5: 16 and more, at a learning rate below LoRA's).

    Every trained tensor is in exactly one group. B is what a method calls lora_B: the factor on the output's side, by
    the contract, of LoRA and its kin. Other methods have no such factor, and all of their tensors learn at lr.

    Raises:
        ConfigError: for a learning rate or a ratio that is no number above 0.
    """
    for name, value in (("lr", lr), ("ratio", ratio)):
        if not is_number(value) or value <= 0:
            raise ConfigError(f"{name}={value!r}: wanted a number above 0")
    is_b = {id(tensor) for site in adapter.sites() for name, tensor in site.tensors() if name == "lora_B"}
    trained = list(adapter.parameters())
    groups = [
        {"params": [p for p in trained if id(p) not in is_b], "lr": lr},
        {"params": [p for p in trained if id(p) in is_b], "lr": lr * ratio},
    ]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def correct_gradients(adapter: Adapter) -> None:
    """LoRA-FA's gradient of B where A is frozen: dB (A Aᵀ)⁻¹/s², after backward() and before the optimiser's step.

    A step of gradient descent on it changes W by the nearest to full fine-tuning's change that this A allows (Zhang et
    al. 2026, arXiv:2308.03303v2). In a loop of someone else's: `optimizer.register_step_pre_hook`.

    Raises:
        ConfigError: for an adapter without a frozen A, as LoRAConfig(freeze_a=True) has it, or with a gain (DoRA).
    """
    sites = [site for site in adapter.sites() if {"lora_A", "lora_B"} <= site.specs.keys()]
    frozen = [site for site in sites if site.specs["lora_B"].trainable and not site.specs["lora_A"].trainable]
    for site in frozen:
        gradient, a = site.tensor("lora_B").grad, site.tensor("lora_A").double()  # (*e, o, r), (*e, r, i)
        low_rank = lookup(site.cfg.variant).low_rank(Layer(site.module, site, expert=0 if site.stacked else None))
        factors = None if low_rank is None else LowRank(*low_rank)
        if factors is None or factors.gain is not None:
            raise ConfigError(f"{site.path}: LoRA-FA's correction is of s B A alone, not of {site.cfg.variant!r}")
        if gradient is not None:
            gradient.copy_(torch.linalg.solve(a @ a.mT, gradient.double().mT).mT / float(factors.s) ** 2)
    if not frozen:
        raise ConfigError(f"adapter {adapter.name!r}: no A of it is frozen\n  use LoRAConfig(freeze_a=True)")


@dataclass(frozen=True)
class Suggestion:
    """Where to start, and why: `print` it."""

    rank: int
    alpha: float
    lr: float  # of AdamW
    parameters: int  # trained, at this rank on the default targets
    text: str

    def __str__(self) -> str:
        return self.text


def suggest(model: nn.Module, task: str = "sft", tokens: int | None = None, steps: int | None = None) -> Suggestion:
    """A rank and a learning rate for LoRAConfig(r=rank, alpha=alpha) by the rules of "LoRA Without Regret" (Schulman
    et al. 2025) and tinker-cookbook's code of them. It is where a sweep starts: docs/decisions.md has one.

    task      "sft", or "rl" (policy gradients)
    tokens    trained on, of all epochs' different ones: what the rank has to hold. None: it isn't checked
    steps     of the optimiser; in runs under 100 of them the best rate is higher

    lr        5e-5 · 10 (15 in short runs) · (2000/width)^p, at s = 32/r, which makes it independent of the rank
    rank      sft: 32, doubled while 2 bits a parameter are fewer than 1 bit a token. rl: 8, since an episode tells
              about one bit, and 1 was enough there

    Raises:
        ConfigError: for another task, a number that is none, or a model whose config has no width.
    """
    if task not in ("sft", "rl"):
        raise ConfigError(f"task={task!r}: wanted 'sft' or 'rl'")
    for name, value in (("tokens", tokens), ("steps", steps)):
        if not (value is None or (type(value) is int and value > 0)):
            raise ConfigError(f"{name}={value!r}: wanted a number above 0, or None")
    cfg: Any = config_for("lora")
    layers = plan(model, cfg(r=1))  # parameters at rank 1
    if layers.d_model is None:
        raise ConfigError(f"{type(model).__name__} has no config with a hidden size, which the rule is of")
    family = str(getattr(getattr(model, "config", None), "model_type", ""))
    fitted = next((name for name in FITTED if family.startswith(name)), None)
    exponent = FITTED[fitted or "qwen"]
    factor = 15 if steps is not None and steps < 100 else 10
    lr = 5e-5 * factor * (2000 / layers.d_model) ** exponent
    rank = 32 if task == "sft" else 8
    while task == "sft" and 2 * rank * layers.parameters < (tokens or 0) and rank < MOST_RANK:
        rank *= 2
    parameters = rank * layers.parameters
    of = f"fitted on {fitted}" if fitted else f"not fitted for {family or 'this model'}: Qwen's, which is nearly flat"
    lines = [
        f"LoRAConfig(r={rank}, alpha=32), AdamW at lr {lr:.1e}, constant, on all linear layers of the blocks",
        f"  lr: 5e-5 x {factor} x (2000/{layers.d_model})^{exponent:g}, {of}",
        f"  rank: {_capacity(task, parameters, tokens, rank)}",
        "  source: LoRA Without Regret (Schulman et al. 2025, thinkingmachines.ai/blog/lora), tinker-cookbook",
    ]
    return Suggestion(rank, 32.0, lr, parameters, "\n".join(lines))


def _capacity(task: str, parameters: int, tokens: int | None, rank: int) -> str:
    """The reason for a rank, in one line."""
    if task == "rl":
        return "an episode tells about a bit, so capacity is no limit; rank 1 was enough in the source's runs"
    if tokens is None:
        return f"its default; {parameters:,} parameters hold about {2 * parameters:,} bits, a token tells about one"
    if 2 * parameters < tokens:
        return f"{2 * parameters:,} bits for {tokens:,} tokens, about a bit each: too few, so full fine-tuning may win"
    return f"{parameters:,} parameters hold about {2 * parameters:,} bits, {tokens:,} tokens tell about one each"
