"""Files of one record a line: how they are read, and errors that say which file and line."""

import json
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """A data file that can't be used: says which file, which line, and what was found there."""


def lines_of(path: Path, wanted: str) -> list[tuple[str, str]]:
    """(where it is, the line) for each that isn't blank. Raises DataError for no file, no text, or an empty one."""
    if not path.is_file():
        raise DataError(f"{path} is not a file\n  wanted {wanted}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    records = [(f"{path}, line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise DataError(f"{path} is empty\n  wanted {wanted}")
    return records


def record_of(line: str, where: str, wanted: str) -> dict[str, Any]:
    """The JSON object that a line is. Raises DataError."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error})\n  found: {_short(line)}") from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: a JSON {type(record).__name__}, wanted an object of {wanted}\n  found: {_short(line)}"
        )
    return record


def text_of(record: dict[str, Any], key: str, where: str) -> str:
    """The text under a key, stripped. Raises DataError."""
    text = record[key]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: {key!r} is not text\n  found: {_short(json.dumps(text))}")
    return text.strip()


def keys_of(record: dict[str, Any]) -> str:
    """The keys, for messages."""
    return ", ".join(map(repr, record)) or "no key"


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 100 else f"{text[:100]}…"
