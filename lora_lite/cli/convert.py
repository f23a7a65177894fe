"""Adapters from one format to the other: a file of this library, a PEFT folder, and any method as a plain LoRA."""

from pathlib import Path
from typing import Any

from ..base.load import load_as_recorded
from ..core.adapter import Adapter
from ..errors import ConfigError
from ..io.checkpoint import load, save
from ..io.peft.load import load_peft
from ..io.peft.save import save_peft
from .stored import OURS, PEFT, is_peft, read_adapter


def load_any(model: Any, path: Path, verify_base: bool = True) -> Adapter:
    """Attach an adapter of either format. Raises what load and load_peft raise."""
    return load_peft(model, path) if is_peft(path) else load(model, path, verify_base=verify_base)


def convert(
    source: Path,
    target: Path,
    base_dir: Path,
    rank: int | None = None,
    max_error: float | None = None,
    per_expert: bool = False,
) -> str:
    """A file of ours becomes a PEFT folder, a PEFT folder a file of ours; with a rank or per expert, either a PEFT
    folder of a LoRA.

    The base is opened on the CPU as the adapter's file records it, quantised if it was. Returns what was written, as a
    line or two for a person.

    Raises:
        ConfigError: for a target that exists or a max_error without a rank.
        CheckpointError: for tensors without a config; and what load_base, load, load_peft, save and save_peft raise.
    """
    if target.exists():
        raise ConfigError(f"{target} exists\n  name a new place, or remove it")
    if rank is None and max_error is not None:  # known before the base takes its minute to load
        raise ConfigError("max_error is of a conversion to a LoRA of some rank: give that too")
    record = None if is_peft(source) else read_adapter(source).record  # a PEFT folder has none
    model = load_as_recorded(str(base_dir), record, device_map="cpu")
    adapter = load_any(model, source)
    layers = len(adapter.targets)
    if is_peft(source) and rank is None and not per_expert:
        save(model, target)
        return f"{target}: {OURS}, {adapter.variant}, {layers} layers"
    error = save_peft(model, target, rank=rank, max_error=max_error, per_expert=per_expert)
    if error is None:
        return f"{target}: {PEFT}, {adapter.variant}, {layers} layers"
    return f"{target}: {PEFT}, lora, {layers} layers\nof rank {rank}: relative error at most {error:.1e} in a layer"
