"""A coverage-guided fuzzer on one reader of foreign files (pip install atheris; Linux).

    python tests/fuzz/fuzz.py mlx -max_total_time=600
    python tests/fuzz/fuzz.py mlx keep FOLDER    # what that run prints: the inputs that reach code no other does

It starts from whole files and from the corpus (corpus/<reader>.zip), and stops at the first input that is neither read
nor refused by an error of ours.
"""

import sys
import tempfile
import zipfile
from pathlib import Path
from random import Random

import atheris

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["lora_lite.io", "lora_lite.core", "lora_lite.base", "gguf"]):
    from mutate import mutated
    from readers import MOST, READERS, read, starts

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
    """Write the inputs of a run as the corpus: libFuzzer keeps those that reach code which no other does."""
    with zipfile.ZipFile(CORPUS / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(Path(folder).iterdir()):
            if path.stat().st_size <= LARGEST:
                archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes(), zipfile.ZIP_DEFLATED)


def changed(data: bytes, most: int, seed: int) -> bytes:
    """An input like this one: libFuzzer's own change of bytes, or one of JSON's values."""
    other = mutated(data, Random(seed))
    return other if other is not None and len(other) <= most else bytes(atheris.Mutate(data, len(data)))


def main() -> None:
    name, *options = sys.argv[1:]
    if options[:1] == ["keep"]:
        keep(name, options[1])
        return
    folder = tempfile.mkdtemp(prefix=f"fuzz-{name}-")
    for number, data in enumerate([*starts(name), *kept(name).values()]):
        Path(folder, f"start-{number:04}").write_bytes(data)
    print(f"inputs in {folder}", flush=True)
    limits = [f"-max_len={MOST}", "-timeout=20", "-rss_limit_mb=4000"]
    arguments = [sys.argv[0], folder, *limits, *options]
    atheris.Setup(arguments, lambda data: read(READERS[name], data) and None, custom_mutator=changed)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
