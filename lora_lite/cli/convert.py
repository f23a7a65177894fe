"""Adapters from one format to the other: a file of this library, a PEFT folder, and any method as a plain LoRA."""

from pathlib import Path
from typing import Any

from ..base.load import load_as_recorded
from ..core.adapter import Adapter, adapters
from ..errors import ConfigError
from ..io.checkpoint import load, save
from ..io.peft.load import load_peft
from ..io.peft.save import save_peft
from .stored import OURS, PEFT, is_peft, read_adapter


def load_any(model: Any, path: Path, verify_base: bool = True) -> Adapter:
    """Attach an adapter of either format. Raises what load and load_peft raise."""
    return load_peft(model, path) if is_peft(path) else load(model, path, verify_base=verify_base)


def convert(source: Path, target: Path, base_dir: Path, rank: int | None = None, max_error: float | None = None) -> str:
    """A file of ours becomes a PEFT folder, a PEFT folder a file of ours; with a rank, either a PEFT folder of a LoRA.

    A PEFT folder of IA3 on outputs and inputs becomes two files, the second `<target>_ff`. The base is opened on the
    CPU as the adapter's file records it, quantised if it was. Returns what was written, as a line or two for a person.

    Raises:
        ConfigError: for a target that exists or a max_error without a rank.
        CheckpointError: for tensors without a config; and what load_base, load, load_peft, save and save_peft raise.
    """
    paths = [target, target.with_stem(f"{target.stem}_ff")]
    if existing := [path for path in paths if path.exists()]:
        raise ConfigError(f"{existing[0]} exists\n  name a new place, or remove it")
    if rank is None and max_error is not None:  # known before the base takes its minute to load
        raise ConfigError("max_error is of a conversion to a LoRA of some rank: give that too")
    model = load_as_recorded(str(base_dir), read_adapter(source).record, device_map="cpu")
    load_any(model, source)
    loaded = adapters(model)
    variants, layers = " + ".join(a.variant for a in loaded.values()), sum(len(a.targets) for a in loaded.values())
    if is_peft(source) and rank is None:
        paths = paths[: len(loaded)]
        for path, name in zip(paths, loaded, strict=True):
            save(model, path, name)
        return f"{' and '.join(map(str, paths))}: {OURS}, {variants}, {layers} layers"
    error = save_peft(model, target, list(loaded), rank=rank, max_error=max_error)
    if error is None:
        return f"{target}: {PEFT}, {variants}, {layers} layers"
    return f"{target}: {PEFT}, lora, {layers} layers\nof rank {rank}: relative error at most {error:.1e} in a layer"
