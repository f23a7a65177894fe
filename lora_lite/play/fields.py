"""The body of a request as untrusted input: every field has a type and limits, and nothing else is taken."""

import json
import math
from collections.abc import Collection
from typing import Any

from ..errors import ConfigError, brief
from .effect import SIDES, Lines

MOST_BYTES = 256 << 10
MOST_TEXT = 4000  # characters of a prompt or a system prompt
MOST_LINES, MOST_LINE = 200, 500
MOST_LABEL = 40
MOST_SCALE = 8.0


def parse(body: bytes) -> "Fields":
    """Raises ConfigError unless it is a JSON object."""
    try:
        values = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # of bytes that are no UTF-8 too
        raise ConfigError("the request is not JSON\n  load the page again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the request is a {type(values).__name__}: wanted an object")
    return Fields(values)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


class Fields:
    """The fields of one request. Each is taken once; `end` refuses what is left."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def _take(self, name: str, default: Any) -> Any:
        return self.values.pop(name, default)

    def end(self) -> None:
        """Raises ConfigError for a field that nobody asked for."""
        if self.values:
            raise ConfigError(f"the request has a field {brief(sorted(self.values)[0], 40)!r}, which is not known")

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number from low to high. Raises ConfigError for anything else."""
        value = self._take(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # An integer may be too long for a float.
        if not is_number or not (low <= value <= high) or not math.isfinite(value):
            raise ConfigError(f"{name}: wanted a number from {low:g} to {high:g}")
        return float(value)

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """An integer from low to high. Raises ConfigError for anything else."""
        value = self._take(name, default)
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(f"{name}: wanted a whole number from {low} to {high}")
        return value

    def whole_or_none(self, name: str, low: int, high: int) -> int | None:
        """An integer from low to high, or null. Raises ConfigError for anything else."""
        return self.whole(name, low, high) if self.values.get(name) is not None else self._take(name, None)

    def text(self, name: str, most: int = MOST_TEXT, *, empty: bool = False) -> str:
        """A text of so many characters at most. Raises ConfigError for anything else."""
        return _text(name, self._take(name, ""), most, empty)

    def label(self, name: str) -> str:
        """A short line, for people."""
        label = self.text(name, MOST_LABEL).strip()
        if not label or not label.isprintable():
            raise ConfigError(f"{name}: wanted some letters, in one line")
        return label

    def choice(self, name: str, choices: Collection[str]) -> str:
        """One of the choices. Raises ConfigError for anything else."""
        value = self._take(name, None)
        if not isinstance(value, str) or value not in choices:
            raise ConfigError(f"{name}: wanted one of {', '.join(choices)}")
        return value

    def scales(self, name: str = "scales") -> dict[str, float]:
        """The scale of each adapter, by its id. Raises ConfigError for anything else."""
        value = self._take(name, {})
        if not isinstance(value, dict) or len(value) > 8:
            raise ConfigError(f"{name}: wanted the scale of each adapter")
        return {key: Fields({"c": c}).number("c", -MOST_SCALE, MOST_SCALE) for key, c in value.items()}

    def numbers(self, name: str, most: int) -> list[float]:
        """Some scales, at most so many. Raises ConfigError for anything else."""
        value = self._take(name, None)
        if not isinstance(value, list) or not 0 < len(value) <= most:
            raise ConfigError(f"{name}: wanted 1 to {most} numbers")
        return [Fields({name: number}).number(name, -MOST_SCALE, MOST_SCALE) for number in value]

    def lines(self) -> Lines:
        """The two lists of sentences."""
        sides = {}
        for side in SIDES:
            value = self._take(side, None)
            if not isinstance(value, list) or not 2 <= len(value) <= MOST_LINES:
                got = len(value) if isinstance(value, list) else 0
                raise ConfigError(f"the {side} list has {got} sentences: wanted 2 to {MOST_LINES}, one on each line")
            sides[side] = tuple(_text(f"a {side} sentence", line, MOST_LINE, False) for line in value)
        return Lines(**sides)


def _text(name: str, value: Any, most: int, empty: bool) -> str:
    if not isinstance(value, str) or len(value) > most:
        raise ConfigError(f"{name}: wanted a text of at most {most} characters")
    if not (empty or value.strip()):
        raise ConfigError(f"{name} is empty\n  write something there")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a pair, which JSON can say
        raise ConfigError(f"{name}: a character of it is broken\n  write it again") from error
    return value
