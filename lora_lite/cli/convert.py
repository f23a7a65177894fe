"""Adapters from one format to the other: a file of this library, a PEFT folder, and any method as a plain LoRA."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.load import load_as_recorded
from ..core.adapter import Adapter, adapters
from ..errors import ConfigError
from ..io.checkpoint import load, save
from ..io.peft.load import load_peft
from ..io.peft.save import save_peft
from .stored import OURS, PEFT, is_peft, read_adapter


def load_any(model: Any, path: str | os.PathLike[str], verify_base: bool = True) -> Adapter:
    """Attach an adapter of either format. Raises what load and load_peft raise."""
    return load_peft(model, path) if is_peft(path) else load(model, path, verify_base=verify_base)


@dataclass(frozen=True)
class Converted:
    """The result of a conversion."""

    paths: list[Path]
    format: str
    variants: list[str]
    layers: int
    rank: int | None
    error: float | None
    """The greatest relative error of a layer, where a LoRA of that rank was made of another method."""

    def __str__(self) -> str:
        paths = " and ".join(map(str, self.paths))
        lines = [f"{paths}: {self.format}, {' + '.join(self.variants)}, {self.layers} layers"]
        if self.error is not None:
            lines.append(f"of rank {self.rank}: relative error at most {self.error:.1e} in a layer")
        return "\n".join(lines)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    base_dir: str | os.PathLike[str],
    rank: int | None = None,
    max_error: float | None = None,
) -> Converted:
    """A file of ours becomes a PEFT folder, a PEFT folder a file of ours; with a rank, either a PEFT folder of a LoRA.

    A PEFT folder of IA3 on outputs and inputs becomes two files, the second `<target>_ff`. The base is opened on the
    CPU as the adapter's file records it, quantised if it was.

    Raises:
        ConfigError: for a target that exists or a max_error without a rank.
        CheckpointError: for tensors without a config; and what load_base, load, load_peft, save and save_peft raise.
    """
    target = Path(target)
    second = target.with_stem(f"{target.stem}_ff")
    if existing := [path for path in (target, second) if path.exists()]:
        raise ConfigError(f"{existing[0]} exists\n  name a new place, or remove it")
    if rank is None and max_error is not None:
        raise ConfigError("max_error is of a conversion to a LoRA of some rank: give that too")
    model = load_as_recorded(str(base_dir), read_adapter(source).base, device_map="cpu")
    load_any(model, source)
    loaded = adapters(model)
    layers, variants = sum(len(a.targets) for a in loaded.values()), [a.variant for a in loaded.values()]
    if is_peft(source) and rank is None:
        paths = [target, second][: len(loaded)]
        for path, name in zip(paths, loaded, strict=True):
            save(model, path, name)
        return Converted(paths, OURS, variants, layers, None, None)
    error = save_peft(model, target, list(loaded), rank=rank, max_error=max_error)
    return Converted([target], PEFT, variants if rank is None else ["lora"], layers, rank, error)
