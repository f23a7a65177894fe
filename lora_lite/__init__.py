"""lora-lite: a hook-based adapter runtime for PyTorch, with every method in one file."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .adapter import Adapter, adapters, disabled, scaled
from .audit import Audit, Audited, audit
from .calibrate import Statistics, capture
from .config import AdapterConfig, BaseConfig
from .directions import Kernel
from .errors import (
    BaseModelError,
    CheckpointError,
    ConfigError,
    LoraLiteError,
    QuantizedWeightError,
    TargetError,
    VariantError,
)
from .history import Round, drop_round, freeze_into, history
from .layer import Layer
from .merge import merge, unmerge
from .preflight import Plan, plan
from .runtime import attach, detach
from .sides import Center, Contrast, Method, contrast
from .targets import Target
from .variant import REGISTRY, ParamSpec, Variant, config_for, register
from .variants import (
    AbliterationConfig,
    AntiPaSTOConfig,
    DoRAConfig,
    HistoryConfig,
    IA3Config,
    IA3FFConfig,
    LoRAConfig,
    Normalization,
    PiSSAConfig,
    SSteerConfig,
    SteerConfig,
    Unit,
)
from .version import __version__

if TYPE_CHECKING:
    from .base import load_base
    from .budget import Calibrated, calibrate_scale
    from .checkpoint import load, restore, save
    from .evaluate import greedy_answers, kl_divergence, logit_gap, marker_rate
    from .merge_disk import Merged, merge_checkpoint
    from .peft_load import load_peft
    from .peft_save import save_peft
    from .prompts import prompt_batches

_LATER = {
    "base": ("load_base",),
    "budget": ("Calibrated", "calibrate_scale"),
    "checkpoint": ("load", "restore", "save"),
    "evaluate": ("greedy_answers", "kl_divergence", "logit_gap", "marker_rate"),
    "merge_disk": ("Merged", "merge_checkpoint"),
    "peft_load": ("load_peft",),
    "peft_save": ("save_peft",),
    "prompts": ("prompt_batches",),
}
"""Modules that are imported when one of their names is asked for: half of the library's own time."""


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f".{module}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "REGISTRY",
    "AbliterationConfig",
    "Adapter",
    "AdapterConfig",
    "AntiPaSTOConfig",
    "Audit",
    "Audited",
    "BaseConfig",
    "BaseModelError",
    "Calibrated",
    "Center",
    "CheckpointError",
    "ConfigError",
    "Contrast",
    "DoRAConfig",
    "HistoryConfig",
    "IA3Config",
    "IA3FFConfig",
    "Kernel",
    "Layer",
    "LoRAConfig",
    "LoraLiteError",
    "Merged",
    "Method",
    "Normalization",
    "ParamSpec",
    "PiSSAConfig",
    "Plan",
    "QuantizedWeightError",
    "Round",
    "SSteerConfig",
    "Statistics",
    "SteerConfig",
    "Target",
    "TargetError",
    "Unit",
    "Variant",
    "VariantError",
    "__version__",
    "adapters",
    "attach",
    "audit",
    "calibrate_scale",
    "capture",
    "config_for",
    "contrast",
    "detach",
    "disabled",
    "drop_round",
    "freeze_into",
    "greedy_answers",
    "history",
    "kl_divergence",
    "load",
    "load_base",
    "load_peft",
    "logit_gap",
    "marker_rate",
    "merge",
    "merge_checkpoint",
    "plan",
    "prompt_batches",
    "register",
    "restore",
    "save",
    "save_peft",
    "scaled",
    "unmerge",
]
