"""One file per method; importing this package registers them all."""

from .abliteration import Abliteration, AbliterationConfig, Normalization
from .antipasto import AntiPaSTO, AntiPaSTOConfig
from .dora import DoRA, DoRAConfig
from .history import History, HistoryConfig
from .ia3 import IA3, IA3Config
from .ia3_ff import IA3FF, IA3FFConfig
from .lora import LoRA, LoRAConfig
from .pissa import PiSSA, PiSSAConfig
from .ssteer import SSteer, SSteerConfig
from .steer import Steer, SteerConfig, Unit

__all__ = [
    "IA3",
    "IA3FF",
    "Abliteration",
    "AbliterationConfig",
    "AntiPaSTO",
    "AntiPaSTOConfig",
    "DoRA",
    "DoRAConfig",
    "History",
    "HistoryConfig",
    "IA3Config",
    "IA3FFConfig",
    "LoRA",
    "LoRAConfig",
    "Normalization",
    "PiSSA",
    "PiSSAConfig",
    "SSteer",
    "SSteerConfig",
    "Steer",
    "SteerConfig",
    "Unit",
]
