"""The errors of lora_lite: one base class, and a subclass for each part of the library.

Every message says what went wrong and where, what was found, and what to do next.
"""

__all__ = [
    "BaseModelError",
    "CheckpointError",
    "ConfigError",
    "LoraLiteError",
    "QuantizedWeightError",
    "TargetError",
    "VariantError",
]


class LoraLiteError(Exception):
    """Base of all errors of this library. A call that changes a model leaves it as it was when it raises one."""


class ConfigError(LoraLiteError, ValueError):
    """An adapter config, or an argument next to it, is not valid."""


class VariantError(LoraLiteError, ValueError):
    """A variant class breaks the contract, is unknown, or is registered twice."""


class TargetError(LoraLiteError, ValueError):
    """Target layers are missing, ambiguous, or can't carry this adapter."""


class QuantizedWeightError(LoraLiteError, RuntimeError):
    """A quantised weight was about to be read as if it were numbers, or can't be read at all."""


class CheckpointError(LoraLiteError, ValueError):
    """An adapter file is broken, from elsewhere, or doesn't fit this model."""


class BaseModelError(LoraLiteError, RuntimeError):
    """A base model could not be loaded, or has a weight that makes an exact result impossible."""


def brief(value: object, longest: int = 200) -> str:
    """Text from elsewhere as a message may show it: one printable line, cut in the middle where it is too long."""
    text, half = str(value), longest // 2
    text = text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"
    return "".join(c if c.isprintable() else "?" for c in text)
