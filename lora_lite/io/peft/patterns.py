"""r and lora_alpha of a PEFT folder's layers, by rank_pattern and alpha_pattern; no regex of a file is run."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from loguru import logger

from ...errors import brief
from .folder import PeftFolder
from .settings import number_of

# A regex that is plain text: an escaped sign is itself, and a dot any character.
_LITERAL = re.compile(r"(\^?)((?:\\\W|[^\\^$*+?{}\[\]()|])+)\$?")
_CHARACTER = re.compile(r"\\.|.", re.DOTALL)
LONGEST_PATTERN, MOST_PATTERNS = 1000, 10_000  # each is compared with each layer's path


def check_rank(source: PeftFolder, path: str, r: int) -> None:
    """The rank of the tensors must be one that the settings name, since the scaling rests on it."""
    patterns = source.settings.get("rank_pattern") or {}
    ranks = [source.settings.get("r", 8), *(patterns.values() if isinstance(patterns, dict) else ())]
    if r not in ranks:
        raise source.error(f"{path} has tensors of rank {r}, and r and rank_pattern name {brief(ranks, 80)}")


def alphas_of(source: PeftFolder, paths: Iterable[str]) -> dict[str, float]:
    """Each layer's lora_alpha: the first of alpha_pattern whose regex finds the end of its path."""
    alphas, unsure = by_pattern(source, paths, "alpha_pattern", "lora_alpha")
    if unsure:
        logger.warning(
            f"{source.where}: several entries of alpha_pattern find {', '.join(unsure[:3])}; "
            f"took the first, as PEFT does\n  it sorts them when it saves, so in training another may have been first"
        )
    return alphas


def ranks_of(source: PeftFolder, paths: Iterable[str]) -> dict[str, float]:
    """Each layer's r as PEFT takes it from the settings, whatever the rank of its tensors."""
    ranks, _ = by_pattern(source, paths, "rank_pattern", "r")
    if wrong := [path for path, r in ranks.items() if r < 1]:
        raise source.error(f"{wrong[0]} has r={ranks[wrong[0]]:g}: wanted at least 1")
    return ranks


def by_pattern(
    source: PeftFolder, paths: Iterable[str], patterns: str, field: str, default: Any = 8, anchored: bool = True
) -> tuple[dict[str, float], list[str]]:
    """A setting at each layer, and the layers that several entries of its patterns find, with other values.

    anchored    does PEFT find what begins with "^"? Where it doesn't, such an entry is an error
    """
    entries, default, weights = _literal_patterns(source, patterns), source.settings.get(field, default), source.weights
    result, unsure = {}, []
    if not anchored and any(start for start, _, _ in entries):
        raise source.error(f"{patterns} has an entry that begins with ^, which PEFT finds nowhere")
    for path in paths:
        name = f"{path}.weight" if path in weights else path
        values = [value for start, text, value in entries if _ends(name, start, text)] or [default]
        unsure += [path] if any(value != values[0] for value in values) else []
        result[path] = number_of(source, field, values[0])
    return result, unsure


def _literal_patterns(source: PeftFolder, field: str) -> list[tuple[str, list[str], Any]]:
    """("^" or nothing, text by character, value) of each entry of such a setting; "" is any character."""
    patterns = source.settings.get(field) or {}
    if not isinstance(patterns, dict) or len(patterns) > MOST_PATTERNS:
        raise source.error(f"{field} is no object of at most {MOST_PATTERNS} entries")
    matches = {regex: _LITERAL.fullmatch(regex) if len(regex) <= LONGEST_PATTERN else None for regex in patterns}
    refused = [repr(brief(regex, 80)) for regex, match in matches.items() if match is None]
    if refused:
        names = ", ".join(refused[:3])
        raise source.error(f"{field} has {names}, and no regex of a file is run\n  write paths, or their ends")
    return [
        (match[1], ["" if sign == "." else sign[-1] for sign in _CHARACTER.findall(match[2])], patterns[regex])
        for regex, match in matches.items()
        if match
    ]


def _ends(path: str, start: str, text: Sequence[str]) -> bool:
    """Is `text` the end of the path from a dot on, or all of it after "^"?"""
    before, end = path[: max(len(path) - len(text), 0)], path[-len(text) :]
    if len(end) != len(text) or not all(char in ("", got) for char, got in zip(text, end, strict=True)):
        return False
    return not before or (before.endswith(".") and not start)  # PEFT's regex is rf"(.*\.)?({pattern})$"
