"""The formats of other programs, by name."""

from . import mlx
from .format import Format

FORMATS: dict[str, Format] = {known.name: known for known in (mlx.FORMAT,)}
