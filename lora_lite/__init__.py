"""lora-lite: a hook-based adapter runtime for PyTorch, with every method in one file."""

from .adapter import Adapter, adapters, disabled, scaled
from .base import load_base
from .checkpoint import load, restore, save
from .config import AdapterConfig, BaseConfig
from .errors import (
    BaseModelError,
    CheckpointError,
    ConfigError,
    LoraLiteError,
    QuantizedWeightError,
    TargetError,
    VariantError,
)
from .layer import Layer
from .preflight import Plan, plan
from .runtime import attach, detach
from .targets import Target
from .variant import REGISTRY, ParamSpec, Variant, config_for, register
from .variants import DoRAConfig, IA3Config, IA3FFConfig, LoRAConfig, PiSSAConfig
from .version import __version__

__all__ = [
    "REGISTRY",
    "Adapter",
    "AdapterConfig",
    "BaseConfig",
    "BaseModelError",
    "CheckpointError",
    "ConfigError",
    "DoRAConfig",
    "IA3Config",
    "IA3FFConfig",
    "Layer",
    "LoRAConfig",
    "LoraLiteError",
    "ParamSpec",
    "PiSSAConfig",
    "Plan",
    "QuantizedWeightError",
    "Target",
    "TargetError",
    "Variant",
    "VariantError",
    "__version__",
    "adapters",
    "attach",
    "config_for",
    "detach",
    "disabled",
    "load",
    "load_base",
    "plan",
    "register",
    "restore",
    "save",
    "scaled",
]
