"""Adapters from one program's format to another's; any method as a plain LoRA."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..io.checkpoint import load
from ..io.formats.load import loader_of
from ..io.formats.save import OURS, PEFT, check_wishes, save_as
from ..io.formats.table import FORMATS
from ..io.peft.save import save_peft
from . import stored
from .bases import open_base
from .stored import read_record

NAMES = (OURS, PEFT, *FORMATS)
FILES = (".safetensors", ".gguf")  # no folder is called so


def convert(
    source: Path,
    target: Path,
    base_dir: Path,
    to: str | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    energy: float | None = None,
    options: Mapping[str, str] | None = None,
    per_expert: bool = False,
) -> str:
    """An adapter of any format that `load` knows becomes one of the format `to`, with the proof of `save_as`.

    Without `to`, a file of ours becomes a PEFT folder, and anything else a file of ours; with a rank or an energy, a
    PEFT folder of a LoRA. `options` are the format's own, `per_expert` is of save_peft. The base is opened on the CPU
    as the adapter's file records it, quantised if it was. Returns what was written, as lines for a person.

    Raises:
        ConfigError: for a target that exists, or whose name isn't of what would be made; and for all that
            `check_wishes` refuses, before the base is opened.
        CheckpointError: for tensors without a config; and what load_base, load and save_as raise.
    """
    options = options or {}
    if target.exists():
        raise ConfigError(f"{target} exists\n  name a new place, or remove it")
    is_cut, is_ours = rank is not None or energy is not None, loader_of(source) is None
    record = read_record(source) if is_ours else None  # another program's file has none
    if to is None:
        to = PEFT if is_ours or is_cut or per_expert else OURS
        if target.suffix in FILES and (to == PEFT or target.suffix == ".gguf"):
            kind = "folder of PEFT's" if to == PEFT else "file of ours"
            raise ConfigError(f"{target} would be a {kind}\n  say what it is to be, --to {' or '.join(NAMES)}")
    # Known before the base takes its minute to load.
    texts = set(FORMATS[to].options) if to in FORMATS else set()
    if unknown := sorted(options.keys() - texts) if to in NAMES else []:
        wanted = f"wanted one of {sorted(texts) or 'none'}"
        cure = "\n  say it as --per-expert" if unknown[0] == "per_expert" else ""
        raise ConfigError(f"--set {unknown[0]}: format={to!r} has no such option: {wanted}{cure}")
    further: dict[str, Any] = {**options, **({"per_expert": True} if per_expert else {})}
    check_wishes(to, further, rank, energy, max_error)
    model = open_base(base_dir, record)
    adapter = load(model, source)
    layers = len(adapter.targets)
    cut: dict[str, Any] = {"rank": rank, "energy": energy, "max_error": max_error}
    line = f"{target}: {{}}, {'lora' if is_cut else adapter.variant}, {layers} layers"
    if to == PEFT and is_cut:
        error = save_peft(model, target, **cut, **further)
        form = f"of rank {rank}" if energy is None else f"with {energy:g} of the energy"
        return f"{line.format(stored.PEFT)}\n{form}: relative error at most {error:.1e} in a layer"
    error = save_as(model, target, to, **cut, **further)
    says = {OURS: stored.OURS, PEFT: stored.PEFT} | {name: known.says for name, known in FORMATS.items()}
    proof = f"\nread back: its ΔW differs from the adapter's by {error:.1e} at most in a layer" if to in FORMATS else ""
    return line.format(says[to]) + proof
