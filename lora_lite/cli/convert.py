"""Adapters from one program's format to another's; any method as a plain LoRA."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.fingerprint import BaseRecord
from ..base.load import load_as_recorded
from ..errors import BaseModelError, ConfigError
from ..io.checkpoint import load
from ..io.formats.load import loader_of
from ..io.formats.save import OURS, PEFT, save_as
from ..io.formats.table import FORMATS
from ..io.peft.save import save_peft
from ..io.safetensors import read_json
from . import stored
from .stored import read_adapter

NAMES = (OURS, PEFT, *FORMATS)


def convert(
    source: Path,
    target: Path,
    base_dir: Path,
    to: str | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    energy: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """An adapter of any format that `load` knows becomes one of the format `to`, with the proof of `save_as`.

    Without `to`, a file of ours becomes a PEFT folder, and anything else a file of ours; with a rank or an energy, a
    PEFT folder of a LoRA. The base is opened on the CPU as the adapter's file records it, quantised if it was. Returns
    what was written, as lines for a person.

    Raises:
        ConfigError: for a target that exists, a rank and an energy, or a max_error without one of them.
        CheckpointError: for tensors without a config; and what load_base, load and save_as raise.
    """
    options = options or {}
    if target.exists():
        raise ConfigError(f"{target} exists\n  name a new place, or remove it")
    # Known before the base takes its minute to load.
    is_cut = rank is not None or energy is not None
    if not is_cut and max_error is not None:
        raise ConfigError("max_error is of a conversion to a LoRA of some rank: give that, or an energy, too")
    if energy is not None and (rank is not None or not 0 < energy <= 1):
        raise ConfigError(f"energy={energy} with rank={rank}: wanted a share above 0, at most 1, without a rank")
    record = None  # another program's file has none
    if is_ours := loader_of(source) is None:
        record = read_adapter(source).record
    to = to or (PEFT if is_ours or is_cut or options else OURS)
    model = _base(base_dir, record)
    adapter = load(model, source)
    layers = len(adapter.targets)
    cut: dict[str, Any] = {"rank": rank, "energy": energy, "max_error": max_error}
    line = f"{target}: {{}}, {'lora' if is_cut else adapter.variant}, {layers} layers"
    if to == PEFT and is_cut:
        error = save_peft(model, target, **cut, **options)
        form = f"of rank {rank}" if energy is None else f"with {energy:g} of the energy"
        return f"{line.format(stored.PEFT)}\n{form}: relative error at most {error:.1e} in a layer"
    error = save_as(model, target, to, **cut, **options)
    says = {OURS: stored.OURS, PEFT: stored.PEFT} | {name: known.says for name, known in FORMATS.items()}
    proof = f"\nread back: its ΔW differs from the adapter's by {error:.1e} at most in a layer" if to in FORMATS else ""
    return line.format(says[to]) + proof


def _base(folder: Path, record: BaseRecord | None) -> Any:
    """The model of a folder that transformers or diffusers has written."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if (name := config.get("_class_name")) is None:
        if (folder / "model_index.json").is_file():
            raise BaseModelError(f"{folder} is a pipeline\n  name the folder of the component that the adapter is on")
        return load_as_recorded(str(folder), record, device_map="cpu")
    import diffusers

    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):  # a folder may name anything
        raise BaseModelError(f"{folder}: {name!r} is no model of diffusers")
    return kind.from_pretrained(folder)
