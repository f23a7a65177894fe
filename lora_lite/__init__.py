"""lora-lite: a hook-based adapter runtime for PyTorch, with every method in one file."""

from .adapter import Adapter, adapters, disabled, scaled
from .base import load_base
from .budget import Calibrated, calibrate_scale
from .calibrate import Statistics, capture
from .checkpoint import load, restore, save
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
from .evaluate import greedy_answers, kl_divergence, logit_gap, marker_rate
from .history import Round, drop_round, freeze_into, history
from .layer import Layer
from .merge import merge, unmerge
from .merge_disk import Merged, merge_checkpoint
from .peft_format import load_peft, save_peft
from .preflight import Plan, plan
from .prompts import prompt_batches
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

__all__ = [
    "REGISTRY",
    "AbliterationConfig",
    "Adapter",
    "AdapterConfig",
    "AntiPaSTOConfig",
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
