"""A coverage-guided fuzzer on one reader of foreign files (pip install atheris; Linux).

    python tests/fuzz/fuzz.py mlx -max_total_time=600
    python tests/fuzz/fuzz.py mlx keep FOLDER    # what that run prints: the inputs that reach code no other does

It starts from whole files and from the corpus (corpus/<reader>.zip), and stops at the first input that is neither read
nor refused by an error of ours.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import atheris

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["lora_lite.io", "lora_lite.core", "lora_lite.base", "gguf"]):
    from readers import MARK, MOST, READERS, read, starts

CORPUS = Path(__file__).parent / "corpus"
LARGEST = 8192  # bytes of an input that is kept


def kept(name: str) -> dict[str, bytes]:
    """The corpus of a reader."""
    file = CORPUS / f"{name}.zip"
    if not file.is_file():
        return {}
    with zipfile.ZipFile(file) as archive:
        return {entry: archive.read(entry) for entry in archive.namelist()}


def keep(name: str, folder: str) -> None:
    """Write the few inputs of a run that reach all of its code as the corpus: the same file for the same inputs."""
    with tempfile.TemporaryDirectory() as least:
        subprocess.run([sys.executable, __file__, name, "-merge=1", least, folder], check=True)
        with zipfile.ZipFile(CORPUS / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(Path(least).iterdir()):
                if path.stat().st_size <= LARGEST:
                    archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes(), zipfile.ZIP_DEFLATED)


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


def mutated(data: bytes, most: int, seed: int) -> bytes:
    """Half of the inputs by changed bytes; in the others one value of a JSON part is another, gone, twice, or a part of
    its own: changed bytes alone are rarely JSON."""
    random = Random(seed)
    parts = data.split(MARK)
    index = random.randrange(len(parts))
    try:
        whole = json.loads(parts[index])
    except (ValueError, RecursionError):
        return bytes(atheris.Mutate(data, len(data)))
    places = [
        (outer, key) for outer in nodes(whole) for key in (outer if isinstance(outer, dict) else range(len(outer)))
    ]
    if not places or random.random() < 0.3:
        return bytes(atheris.Mutate(data, len(data)))
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
    result = MARK.join(parts)
    return result if len(result) <= most else data


def nodes(value: Any) -> Iterator[Any]:
    """Every object and list in a JSON value."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from nodes(inner)


def main() -> None:
    name, *options = sys.argv[1:]
    if options[:1] == ["keep"]:
        keep(name, options[1])
        return
    folders = [] if "-merge=1" in options else [tempfile.mkdtemp(prefix=f"fuzz-{name}-")]
    for folder in folders:
        for number, data in enumerate([*starts(name), *kept(name).values()]):
            Path(folder, f"start-{number:04}").write_bytes(data)
        print(f"inputs in {folder}", flush=True)
    limits = [f"-max_len={MOST}", "-timeout=20", "-rss_limit_mb=4000"]
    arguments = [sys.argv[0], *folders, *limits, *options]
    atheris.Setup(arguments, lambda data: read(READERS[name], data) and None, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
