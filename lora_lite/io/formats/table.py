"""The formats of other programs, by name."""

from pathlib import Path

from ..safetensors import Header
from . import mlx
from .format import Format

FORMATS: dict[str, Format] = {known.name: known for known in (mlx.FORMAT,)}


def of_path(path: Path) -> Format | None:
    """The format of a file or folder, where its first bytes or its names tell."""
    return next((known for known in FORMATS.values() if known.is_path(path)), None)


def of_header(header: Header) -> Format | None:
    """The format of a safetensors file, where its keys tell."""
    return next((known for known in FORMATS.values() if known.is_header(header)), None)
