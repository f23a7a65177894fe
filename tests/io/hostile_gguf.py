"""Damage to GGUF files, from the file's own numbers: each count, size, type and offset is made to lie."""

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Damage = Callable[[Path, random.Random], Any]
Case = tuple[str, Damage, str]
"""Name, damage, and what is right, as in test_hostile.py."""

SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
HUGE = (0, 1, 2, 3, 5, 31, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


class Info(NamedTuple):
    """A tensor, as the file describes it."""

    name: bytes
    sizes: tuple[int, ...]
    kind: int
    offset: int


class Parts(NamedTuple):
    """A GGUF file, in pieces that can be put together again."""

    fields: list[tuple[bytes, int, bytes]]  # key, type, the value's bytes
    infos: list[Info]
    data: bytes
    counts: tuple[int, int] | None = None  # tensors and fields, where these lie
    version: int = 3


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def joined(parts: Parts) -> bytes:
    tensors, fields = parts.counts or (len(parts.infos), len(parts.fields))
    out = bytearray(b"GGUF" + struct.pack("<IQQ", parts.version, tensors, fields))
    out += b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in parts.fields)
    for info in parts.infos:
        sizes = struct.pack(f"<I{len(info.sizes)}Q", len(info.sizes), *info.sizes)
        out += text(info.name) + sizes + struct.pack("<IQ", info.kind, info.offset)
    return bytes(out + bytes(-len(out) % 32) + parts.data)


def numbers(raw: bytes) -> list[tuple[str, int, int]]:
    """What each number of a header is, its place and its width, but for the values of fields."""
    places, place = [("version", 4, 4), ("tensors", 8, 8), ("fields", 16, 8)], 24

    def take(what: str, width: int) -> int:
        """A number; the place is after it, and after the bytes that it counts, of a text."""
        nonlocal place
        places.append((what, place, width))
        value = int.from_bytes(raw[place : place + width], "little")
        place += width + (value if what in ("key", "text", "name") else 0)
        return value

    tensors, fields = (int.from_bytes(raw[start : start + 8], "little") for start in (8, 16))
    for _ in range(fields):
        take("key", 8)
        if (kind := take("type", 4)) == 8:
            take("text", 8)
        else:
            place += struct.calcsize(SCALARS[kind])
    for _ in range(tensors):
        take("name", 8)
        for _ in range(take("dimensions", 4)):
            take("size", 8)
        take("kind", 4)
        take("offset", 8)
    return [*places, ("end", place, 0)]


def parted(raw: bytes) -> Parts:
    fields, infos, (*places, (_, end, _)) = [], [], numbers(raw)
    values = [(what, start, int.from_bytes(raw[start : start + width], "little")) for what, start, width in places]
    for number, (what, start, value) in enumerate(values):
        after = values[number + 1 :]
        if what == "key":
            kind = after[0][2]
            stop = after[1][1] + 8 + after[1][2] if kind == 8 else after[0][1] + 4 + struct.calcsize(SCALARS[kind])
            fields.append((raw[start + 8 : start + 8 + value], kind, raw[after[0][1] + 4 : stop]))
        if what == "name":
            count = after[0][2]
            sizes = tuple(entry[2] for entry in after[1 : 1 + count])
            infos.append(Info(raw[start + 8 : start + 8 + value], sizes, after[1 + count][2], after[2 + count][2]))
    return Parts(fields, infos, raw[end + -end % 32 :])


def edited(change: Callable[[Parts], Parts]) -> Damage:
    return lambda file, rng: file.write_bytes(joined(change(parted(file.read_bytes()))))


def info(number: int, **changes: Any) -> Damage:
    """Change what the file says of a tensor."""

    def change(parts: Parts) -> Parts:
        infos = list(parts.infos)
        infos[number] = infos[number]._replace(**changes)
        return parts._replace(infos=infos)

    return edited(change)


def field(key: bytes, kind: int, value: bytes) -> Damage:
    """Another value, or one field more."""

    def change(parts: Parts) -> Parts:
        rest = [entry for entry in parts.fields if entry[0] != key]
        return parts._replace(fields=[*rest, (key, kind, value)])

    return edited(change)


def lying(number: int, value: int) -> Damage:
    """Another value of some number in the header."""

    def damage(file: Path, rng: random.Random) -> None:
        raw = bytearray(file.read_bytes())
        *places, _ = numbers(bytes(raw))
        _, start, width = places[number % len(places)]
        raw[start : start + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
        file.write_bytes(raw)

    return damage


def flipped(file: Path, rng: random.Random) -> None:
    """A bit of the header, outside of a scalar field's value: alpha may be any number."""
    raw = bytearray(file.read_bytes())
    *_, (_, end, _) = numbers(bytes(raw))
    scalars = [value for _, kind, value in parted(bytes(raw)).fields if kind != 8]
    values = {start + i for value in scalars for start in [bytes(raw).index(value, 24)] for i in range(len(value))}
    raw[rng.choice([i for i in range(end) if i not in values])] ^= 1 << rng.randrange(8)
    file.write_bytes(raw)


def noisy(file: Path, rng: random.Random) -> None:
    """A few bytes of the header are random."""
    raw = bytearray(file.read_bytes())
    *_, (_, end, _) = numbers(bytes(raw))
    start = rng.randrange(4, end - 8)
    raw[start : start + 8] = rng.randbytes(8)
    file.write_bytes(raw)


def truncated(file: Path, rng: random.Random) -> None:
    raw = file.read_bytes()
    parts = parted(raw)
    last = len(raw) - len(parts.data) + parts.infos[-1].offset
    file.write_bytes(raw[: rng.randrange(last + 1)])


def swapped(file: Path, rng: random.Random) -> None:
    """The first tensor's bytes are all those of the second, and so on: offsets overlap."""
    edited(lambda p: p._replace(infos=[entry._replace(offset=0) for entry in p.infos]))(file, rng)


def nan(file: Path, rng: random.Random) -> None:
    edited(lambda p: p._replace(data=struct.pack("<f", rng.choice([float("nan"), float("inf")])) + p.data[4:]))(
        file, rng
    )


def many(what: str) -> Damage:
    """A hundred thousand fields, or tensors without bytes."""

    def change(parts: Parts) -> Parts:
        if what == "fields":
            return parts._replace(fields=[(b"a.%d" % i, 0, b"\0") for i in range(100_000)])
        if what == "texts":
            texts = struct.pack("<IQ", 8, 400_000) + text(b"") * 400_000
            return parts._replace(fields=[*parts.fields, (b"general.tags", 9, texts)])
        last = parts.infos[0].name.rpartition(b".")[2]
        return parts._replace(
            infos=[Info(b"blk.%d.attn_q.weight.%s" % (i, last), (1,), 0, 32 * i) for i in range(60_000)]
        )

    return edited(change)


def twice(parts: Parts) -> Parts:
    """The first tensor a second time, with the bytes to go with it."""
    data = parts.data + bytes(-len(parts.data) % 32)
    return parts._replace(infos=[*parts.infos, parts.infos[0]._replace(offset=len(data))], data=data + parts.data)


NAMES = [
    b"",
    b".",
    b"..",
    b"../../etc/passwd",
    b"\0",
    b"\x1b[2J",
    b"a\nb",
    b"\xff\xfe",
    b"x" * 63,
    b"x" * 64,
    b"x" * 10**6,
]
NAMES += [b"blk.99999999999.attn_q.weight.lora_a", b"blk.-1.attn_q.weight.lora_a", b"blk.0.attn_q.weight", b"direction"]
NAMES += [b"direction.", b"direction.-1", b"direction.01", b"direction.1.5", b"direction.999999999999999", b"lora_a"]
NAMES += [b"direction.0", b"direction.\xd9\xa1", b".lora_a", b"token_embd.weight.lora_a", b"blk.0.attn_norm.weight"]
NAMES += [b"output_norm.weight", b"blk.0.ffn_gate_inp.weight.lora_a", b"blk.0.ffn_up_exps.weight.lora_a", b"rope_freqs"]
SIZES = [(), (1,), (0,), (64, 0), (2**62,), (2**40, 2**40), (2**32, 2**32), (2**63,), (1, 1, 1), (1,) * 4, (1,) * 5]
SIZES += [(64, 2, 1), (2, 64), (64, 3), (63, 2), (128,), (64, 64), (2**64 - 1, 2), (1,) * 1000]
LISTS = [
    struct.pack("<IQ", kind, count) for kind in (0, 4, 6, 8, 9, 12, 13, 255) for count in (1, 2**20, 2**40, 2**64 - 1)
]
TEXTS = [b"", b"llama\0", b"LLAMA", b"\xff", b"\x1b[2J", b"x" * 10**6, b"model", b"mmproj", b"controlvector2"]


def cases(fields: tuple[bytes, ...], mostly: str) -> list[Case]:
    """The cases of a format: `fields` are texts that it wants as they are."""
    return [
        *((f"gguf-cut-{i}", truncated, "error") for i in range(100)),
        *((f"gguf-flip-{i}", flipped, "either") for i in range(250)),
        *((f"gguf-noise-{i}", noisy, "either") for i in range(100)),
        *((f"gguf-number-{n}-{v}", lying(n, v), "either") for n in range(27) for v in HUGE),
        *(
            (f"gguf-count-{a}-{b}", edited(lambda p, a=a, b=b: p._replace(counts=(a, b))), "error")  # type: ignore[misc]
            for a in (0, 1, 2**20, 2**63)
            for b in (0, 2**16, 2**20, 2**64 - 1)
        ),
        *((f"gguf-version-{v}", edited(lambda p, v=v: p._replace(version=v)), "error") for v in (0, 1, 4, 3 << 24)),  # type: ignore[misc]
        *((f"gguf-name-{i}", info(0, name=name), "error") for i, name in enumerate(NAMES)),
        *((f"gguf-size-{i}", info(0, sizes=sizes), "error") for i, sizes in enumerate(SIZES)),
        *((f"gguf-kind-{kind}", info(0, kind=kind), "error") for kind in [*range(1, 45), 2**31, 2**32 - 1]),
        *((f"gguf-offset-{i}", info(0, offset=o), "error") for i, o in enumerate((1, 4, 32, 2**31, 2**62, 2**64 - 32))),
        *((f"gguf-list-{i}", field(b"general.tags", 9, value), "error") for i, value in enumerate(LISTS)),
        *(
            (f"gguf-{key.decode()}-{i}", field(key, 8, text(value)), "error")
            for key in fields
            for i, value in enumerate(TEXTS)
        ),
        *(
            (f"gguf-{key.decode()}-is-{kind}", field(key, kind, bytes(8)[: struct.calcsize(code)]), "error")
            for key in fields
            for kind, code in SCALARS.items()
        ),
        *(
            (f"gguf-alignment-{v}", field(b"general.alignment", 4, struct.pack("<I", v)), "error")
            for v in (0, 1, 3, 4, 31, 33, 2**17, 2**31, 2**32 - 1)
        ),
        ("gguf-alignment-text", field(b"general.alignment", 8, text(b"32")), "error"),
        ("gguf-alignment-32", field(b"general.alignment", 4, struct.pack("<I", 32)), "same"),
        ("gguf-field-twice", edited(lambda p: p._replace(fields=[*p.fields, p.fields[0]])), "error"),
        ("gguf-field-more", field(b"general.name", 8, text("é".encode() * 10_000)), "same"),
        ("gguf-field-unprintable", field(b"general.\x1bname", 8, text(b"x")), "error"),
        ("gguf-field-long", field(b"k" * 60_000, 8, text(b"x")), "error"),
        ("gguf-texts", field(b"general.tags", 9, struct.pack("<IQ", 8, 2) + text(b"a") + text(b"b")), "same"),
        ("gguf-numbers", field(b"a.b", 9, struct.pack("<IQ3I", 4, 3, 1, 2, 3)), "same"),
        ("gguf-tensor-twice", edited(twice), "error"),
        ("gguf-tensor-gone", edited(lambda p: p._replace(infos=p.infos[:-1])), "error"),
        ("gguf-tensors-gone", edited(lambda p: p._replace(infos=[], data=b"")), "error"),
        *((f"gguf-overlap-{i}", swapped, mostly) for i in range(1)),
        *((f"gguf-nan-{i}", nan, "error") for i in range(4)),
        ("gguf-longer", lambda file, rng: file.write_bytes(file.read_bytes() + bytes(64)), "error"),
        *((f"gguf-many-{what}", many(what), "error") for what in ("fields", "texts", "tensors")),
    ]
