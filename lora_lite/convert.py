"""Adapters from one format to the other: a file of this library, a PEFT folder, and any method as a plain LoRA."""

import os
from pathlib import Path
from typing import Any

import lora_lite

from .adapter import Adapter
from .base import load_as_recorded
from .checkpoint import load, save
from .errors import ConfigError
from .stored import is_peft, read_adapter

_library: Any = lora_lite  # TODO(peft): import load_peft, save_peft from .peft_format


def load_any(model: Any, path: str | os.PathLike[str], verify_base: bool = True) -> Adapter:
    """Attach an adapter of either format. Raises what load and load_peft raise."""
    if is_peft(path):
        adapter: Adapter = _library.load_peft(model, path)
        return adapter
    return load(model, path, verify_base=verify_base)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    base_dir: str | os.PathLike[str],
    rank: int | None = None,
    max_error: float | None = None,
) -> str:
    """A file of ours becomes a PEFT folder, a PEFT folder a file of ours; with a rank, either a PEFT folder of a LoRA.

    The base is opened on the CPU as the adapter's file records it, quantised if it was. Returns a line that says what
    was made. Raises ConfigError for a target that exists or a max_error without a rank, and what load_base, load,
    load_peft, save and save_peft raise.
    """
    if Path(target).exists():
        raise ConfigError(f"{target} exists\n  name a new place, or remove it")
    if rank is None and max_error is not None:
        raise ConfigError("max_error is of a conversion to a LoRA of some rank: give that too")
    stored = read_adapter(source)
    model = load_as_recorded(str(base_dir), stored.base, device_map="cpu")
    adapter = load_any(model, source)
    if is_peft(source) and rank is None:
        save(model, target)
        return f"{target}: {adapter}, {adapter.counts()}"
    _library.save_peft(model, target, rank=rank, max_error=max_error)
    return f"{target}: a PEFT folder of {adapter}, {adapter.counts()}"
