"""The formats of other programs, by name."""

from . import diffusers, kohya, mlx
from .format import Format

FORMATS: dict[str, Format] = {known.name: known for known in (mlx.FORMAT, diffusers.FORMAT, kohya.FORMAT)}
