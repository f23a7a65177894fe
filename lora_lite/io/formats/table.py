"""The formats of other programs, by name."""

from . import control_vector, gguf, mlx
from .format import Format

FORMATS: dict[str, Format] = {known.name: known for known in (mlx.FORMAT, gguf.FORMAT, control_vector.FORMAT)}
