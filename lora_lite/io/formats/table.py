"""The formats of other programs, by name."""

from . import control_vector, diffusers, gguf, kohya, mlx
from .format import Format

ALL = (gguf.FORMAT, control_vector.FORMAT, mlx.FORMAT, diffusers.FORMAT, kohya.FORMAT)
FORMATS: dict[str, Format] = {known.name: known for known in ALL}
