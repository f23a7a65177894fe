"""Settings of a PEFT folder, each read as what it has to be. They are untrusted: anything may stand there."""

from typing import TYPE_CHECKING, Any

import torch

from ...errors import brief

if TYPE_CHECKING:
    from .folder import PeftFolder


def flag_of(source: "PeftFolder", field: str, default: bool = False) -> bool:
    """A setting that is true or false. Raises CheckpointError."""
    value = source.settings.get(field, default)
    if not isinstance(value, bool):
        raise source.error(f"{field}={value!r}: wanted true or false")
    return value


def whole_of(source: "PeftFolder", field: str, default: int) -> int:
    """A setting that is an integer of at least 0. Raises CheckpointError."""
    value = source.settings.get(field, default)
    if type(value) is not int or value < 0:  # a bool is an int to isinstance
        raise source.error(f"{field}={brief(repr(value), 60)}: wanted an integer of at least 0")
    return value


def number_of(source: "PeftFolder", field: str, value: Any) -> float:
    """A setting that is a finite number. Raises CheckpointError."""
    if type(value) not in (int, float) or not abs(value) <= torch.finfo(torch.float64).max:  # NaN fails it, too
        raise source.error(f"{field} has {brief(value, 60)}: wanted a finite number")
    return float(value)


def text_of(source: "PeftFolder", field: str, default: str) -> str:
    """A setting that is a word. Raises CheckpointError."""
    value = source.settings.get(field, default)
    if not isinstance(value, str):
        raise source.error(f"{field}={brief(repr(value), 60)}: wanted a word")
    return value
