"""The methods of PEFT's that are tables, one file for each family of them."""

from collections.abc import Mapping
from typing import Any

from . import products, rotations, shared, spectral, sspace
from .table import Format

FORMATS: tuple[Format, ...] = (
    *products.FORMATS,
    *rotations.FORMATS,
    *shared.FORMATS,
    *spectral.FORMATS,
    *sspace.FORMATS,
)


def format_of(settings: Mapping[str, Any]) -> Format | None:
    """The table of the method that a folder's settings are of; None for one with a file of its own, or an unknown."""
    kind = settings.get("peft_type")
    return next((table for table in FORMATS if table.peft_type == kind and table.when(settings)), None)
