"""Inputs that are nearly whole: by changes of JSON's values, and of bytes."""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

from readers import MARK

ODD = (
    None,
    True,
    -1,
    0,
    1,
    2,
    8,
    2**31,
    2**63,
    1e308,
    float("nan"),
    "",
    "F32",
    "I64",
    "q_proj",
    ".*",
    [],
    {},
    [0, 0],
    [1, 8],
)


def mutated(data: bytes, random: Random) -> bytes | None:
    """Mostly one value of a JSON part, or some, is another, gone, there twice, or a part of its own, as changed bytes
    alone are rarely JSON; else None."""
    parts = data.split(MARK)
    index = random.randrange(len(parts))
    try:
        whole = json.loads(parts[index])
    except (ValueError, RecursionError):
        return None
    places = [
        (outer, key) for outer in nodes(whole) for key in (outer if isinstance(outer, dict) else range(len(outer)))
    ]
    if not places or random.random() < 0.3:
        return None
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        outer, key = random.choice(places)
        other, its = random.choice(places)
        try:
            value, theirs = outer[key], other[its]
        except (KeyError, IndexError):  # gone by the change before
            continue
        kind = random.randrange(5)
        if kind == 0:
            outer[key] = random.choice(ODD)
        elif kind == 1 and isinstance(value, int | float):
            outer[key] = random.choice((value + 1, value - 1, -value, value * 2, value * 1.5))
        elif kind == 2:
            outer.pop(key)
        elif kind == 3 and isinstance(outer, dict):
            outer[f"{its}" if random.random() < 0.5 else f"{key}{random.choice(('', '2', '.weight', '__fr'))}"] = value
        else:
            outer[key] = json.loads(json.dumps(theirs))
    parts[index] = json.dumps(whole).encode()
    return MARK.join(parts)


def damaged(data: bytes, random: Random) -> bytes:
    """As `mutated`, or with some bytes changed, cut out, put in or moved."""
    other = mutated(data, random)
    if other is not None:
        return other
    raw = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        place, n = random.randrange(len(raw) + 1), random.choice((1, 1, 2, 4, 8, 64))
        kind = random.randrange(5)
        if kind == 0 and place < len(raw):
            raw[place] ^= 1 << random.randrange(8)
        elif kind == 1:
            raw[place : place + n] = random.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * n
        elif kind == 2:
            del raw[place : place + n]
        elif kind == 3:
            raw[place:place] = random.randbytes(n)
        else:
            raw[place : place + n] = raw[(start := random.randrange(len(raw) + 1)) : start + n]
    return bytes(raw[: random.randrange(len(raw) + 1)] if random.random() < 0.05 else raw)


def nodes(value: Any) -> Iterator[Any]:
    """Every object and list in a JSON value."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from nodes(inner)
