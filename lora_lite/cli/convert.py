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


def load_any(model: Any, path: Path, verify_base: bool = True, name: str = "default") -> Adapter:
    """Attach an adapter of either format. Raises what load and load_peft raise."""
    return load_peft(model, path, name) if is_peft(path) else load(model, path, name, verify_base)


def convert(
    source: Path,
    target: Path,
    base_dir: Path,
    rank: int | None = None,
    max_error: float | None = None,
    energy: float | None = None,
    per_expert: bool = False,
) -> str:
    """A file of ours becomes a PEFT folder, a PEFT folder a file of ours; with a rank, an energy or per expert, either
    becomes a PEFT folder of a LoRA.

    The base is opened on the CPU as the adapter's file records it, quantised if it was. Returns what was written, as a
    line or two for a person.

    Raises:
        ConfigError: for a target that exists, a rank and an energy, or a max_error without one of them.
        CheckpointError: for tensors without a config; and what load_base, load, load_peft, save and save_peft raise.
    """
    if target.exists():
        raise ConfigError(f"{target} exists\n  name a new place, or remove it")
    # Known before the base takes its minute to load.
    if rank is None and energy is None and max_error is not None:
        raise ConfigError("max_error is of a conversion to a LoRA of some rank: give that, or an energy, too")
    if energy is not None and (rank is not None or not 0 < energy <= 1):
        raise ConfigError(f"energy={energy} with rank={rank}: wanted a share above 0, at most 1, without a rank")
    record = None if is_peft(source) else read_adapter(source).record  # a PEFT folder has none
    model = load_as_recorded(str(base_dir), record, device_map="cpu")
    adapter = load_any(model, source)
    layers = len(adapter.targets)
    if is_peft(source) and rank is None and energy is None and not per_expert:
        save(model, target)
        return f"{target}: {OURS}, {adapter.variant}, {layers} layers"
    error = save_peft(model, target, rank=rank, max_error=max_error, energy=energy, per_expert=per_expert)
    if error is None:
        return f"{target}: {PEFT}, {adapter.variant}, {layers} layers"
    form = f"of rank {rank}" if energy is None else f"with {energy:g} of the energy"
    return f"{target}: {PEFT}, lora, {layers} layers\n{form}: relative error at most {error:.1e} in a layer"
