"""lora-lite: a hook-based adapter runtime for PyTorch, with every method in one file."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import errors, variants
from .compose.combine import Combined, combine
from .compose.history import Round, drop_round, freeze_into, history
from .compose.history_variant import HistoryConfig
from .compose.rows import rows
from .core.adapter import Adapter, adapters
from .core.attach import attach, detach
from .core.capturable import capturable
from .core.config import AdapterConfig, BaseConfig
from .core.idle import bring_back, unload_to
from .core.layer import Layer
from .core.plan import Plan, plan
from .core.scaled import disabled, scaled
from .core.targets import Target
from .core.variant import REGISTRY, ParamSpec, Variant, config_for, register
from .errors import *
from .families.directions import Kernel
from .measure.audit import Audit, Audited
from .measure.capture import Statistics, capture
from .measure.contrast import Center, Contrast, Method, contrast
from .merging.audit import audit
from .merging.in_memory import merge, merged, unmerge
from .variants import *
from .version import __version__

if TYPE_CHECKING:
    from .base.load import load_base
    from .io.checkpoint import load, restore, save
    from .io.formats.save import save_as
    from .io.peft.load import load_peft
    from .io.peft.save import save_peft
    from .measure.answers import greedy_answers, marker_rate
    from .measure.calibrate_scale import Calibrated, calibrate_scale
    from .measure.evaluate import kl_divergence, logit_gap
    from .measure.prompts import prompt_batches
    from .merging.on_disk import Merged, merge_checkpoint
    from .merging.residual import LayerErrors, Quantized, quantize_residual, residual_errors
    from .training import Suggestion, correct_gradients, param_groups, suggest

_ON_FIRST_USE = {
    "base.load": ("load_base",),
    "io.checkpoint": ("load", "restore", "save"),
    "io.formats.save": ("save_as",),
    "io.peft.load": ("load_peft",),
    "io.peft.save": ("save_peft",),
    "measure.answers": ("greedy_answers", "marker_rate"),
    "measure.calibrate_scale": ("Calibrated", "calibrate_scale"),
    "measure.evaluate": ("kl_divergence", "logit_gap"),
    "measure.prompts": ("prompt_batches",),
    "merging.on_disk": ("Merged", "merge_checkpoint"),
    "merging.residual": ("LayerErrors", "Quantized", "quantize_residual", "residual_errors"),
    "training": ("Suggestion", "correct_gradients", "param_groups", "suggest"),
}
"""Modules that are imported when one of their names is asked for: half of the library's own import time."""


def __getattr__(name: str) -> Any:
    for module, names in _ON_FIRST_USE.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f".{module}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# fmt: off
__all__ = [
    "REGISTRY", "Adapter", "AdapterConfig", "Audit", "Audited", "BaseConfig", "Calibrated", "Center", "Combined",
    "Contrast", "HistoryConfig", "Kernel", "Layer", "LayerErrors", "Merged", "Method", "ParamSpec", "Plan", "Quantized",
    "Round", "Statistics", "Suggestion", "Target", "Variant", "__version__", "adapters", "attach", "audit",
    "bring_back", "calibrate_scale", "capturable", "capture", "combine", "config_for", "contrast", "correct_gradients",
    "detach", "disabled", "drop_round", "freeze_into", "greedy_answers", "history", "kl_divergence", "load",
    "load_base", "load_peft", "logit_gap", "marker_rate", "merge", "merge_checkpoint", "merged", "param_groups", "plan",
    "prompt_batches", "quantize_residual", "register", "residual_errors", "restore", "rows", "save", "save_as",
    "save_peft", "scaled", "suggest", "unload_to", "unmerge",
]
# fmt: on
__all__ += errors.__all__
__all__ += variants.__all__
