"""An adapter as a download: written by the library into a temporary folder, and read back from there."""

import io
import re
import tempfile
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

from ..core.adapter import get_adapter
from ..errors import LoraLiteError
from ..io.formats.save import save_as

SUFFIXES = {"lora-lite": ".safetensors", "peft": ".zip", "gguf-control-vector": ".gguf", "gguf": ".gguf"}
"""The formats that the page offers, with the ending of their files; a folder goes as a ZIP archive."""


def saved(model: Any, name: str, label: str, c: float, format: str, rank: int | None) -> tuple[str, bytes]:
    """(file name, contents) of an adapter at scale c; `rank` makes a plain LoRA of it, of any method.

    Raises:
        CheckpointError: for what the format can't hold.
        ConfigError: for a rank with a format that has none.
    """
    stem, adapter = slug(label), get_adapter(model, name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (stem if format == "peft" else stem + SUFFIXES[format])
        adapter.scale = c
        try:
            save_as(model, path, format, name, rank)
        except LoraLiteError as error:  # it names the adapter as the model does
            raise type(error)(str(error).replace(repr(name), repr(label))) from error
        finally:
            adapter.scale = 0.0
        contents = _zipped(path) if path.is_dir() else path.read_bytes()
    return stem + SUFFIXES[format], contents


def slug(label: str) -> str:
    """A name for a file: plain letters, digits and dashes."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:40] or "adapter"


def _zipped(folder: Path) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as entries:
        for file in sorted(folder.rglob("*")):
            entries.write(file, Path(folder.name) / file.relative_to(folder))
    return archive.getvalue()
