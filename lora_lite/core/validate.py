"""Questions that configs ask of their fields."""

import re
from typing import Any

LARGEST = 2.0**63
MOST_REPETITIONS, LONGEST_REGEX = 3, 200  # in a regex that can't take long


def is_safe_regex(pattern: Any) -> bool:
    """Does a regex compile, and can it be searched in a path in no time, whoever wrote it?

    It has at most MOST_REPETITIONS, and none of a group: a search takes at most the path's length to that power.
    """
    if not (isinstance(pattern, str) and len(pattern) <= LONGEST_REGEX):
        return False
    bare = re.sub(r"\(\?(?:[aims]+\)|<?[=!]|:)", "(", re.sub(r"(?s)\\.", "x", pattern))
    wild = "(?" in bare or re.search(r"\)[*+?{]", bare) or len(re.findall(r"[*+?{]", bare)) > MOST_REPETITIONS
    return not wild and compiles(pattern)


def is_number(value: Any) -> bool:
    """True for a finite int or float of a size that times another one, as alpha times a scale, float32 still holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST  # no nan


def is_token(value: Any) -> bool:
    """True for what can be the id of a token, in a table of int32 too."""
    return type(value) is int and 0 <= value < 2**31


def is_name(value: Any) -> bool:
    """True for what can name an adapter or a round: letters and digits, with single '_' or '-' between them."""
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9]+([_-][A-Za-z0-9]+)*", value) is not None


def positive_or_none(value: Any) -> bool:
    """True for None and for a finite number above 0."""
    return value is None or (is_number(value) and value > 0)


def compiles(pattern: Any) -> bool:
    try:
        return isinstance(pattern, str) and re.compile(pattern) is not None
    except (re.error, RecursionError, OverflowError):  # of a file, a pattern may be nested or repeated without end
        return False
