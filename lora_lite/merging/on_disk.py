"""Merging on disk: a checkpoint folder and an adapter become a checkpoint folder, one tensor at a time.

Memory: the adapter, and the largest merged tensor as it is stored with a few blocks of its columns, whatever the size
of model or shards. Shards are written to `<out>.partial`, each whole or not at all, so that a run that was killed goes
on where it stopped; the folder takes its name when everything is in it.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from loguru import logger
from torch import nn

from ..base.still import full_precision
from ..errors import CheckpointError, ConfigError, LoraLiteError, TargetError
from ..io.safetensors import INDEX, PICKLES, read_json, replacing, sync_folder, write_json
from ..measure.calls import check_choice, refusal
from ..version import __version__
from .adapter_source import open_adapter
from .base_folder import BaseFolder
from .plan import MergePlan
from .shards import Shard

CHOICES = ("original", "as_trained")
_LOCK = ".lock"
MARKER = "lora_lite_merge.json"  # in every folder that a merge makes: what it was made of, and its files
_WEIGHTS: tuple[str, ...] = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data")
_WEIGHTS += (".ot", ".tflite", ".mlmodel", ".npz", ".index.json")
_TEMPLATES = "additional_chat_templates"  # the one folder that transformers reads

Progress = Callable[[int, int], None]  # (bytes written, bytes in all)


@dataclass(frozen=True)
class Merged:
    """The result of `merge_checkpoint`."""

    folder: Path
    layers: int
    tensors: int
    size: int  # bytes of the checkpoint's files of tensors
    base_weights: str
    resumed: int  # bytes that were there already
    seconds: float

    def __str__(self) -> str:
        resumed = f", {self.resumed / 1e9:.2f} GB of it from an earlier run" if self.resumed else ""
        return (
            f"merged {self.layers} layers ({self.tensors} tensors) into {self.folder}\n"
            f"  base weights {self.base_weights}, {self.size / 1e9:.2f} GB in {self.seconds:.1f} s{resumed}"
        )


def merge_checkpoint(
    base_dir: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    base_weights: str = "original",
    *,
    untie: bool = False,
    verify_base: bool = True,
    never_ran: str = "raise",
    progress: Progress | None = None,
) -> Merged:
    """Write the checkpoint folder `base_dir` with the adapter of a file folded in, at its scale, to `out_dir`.

    adapter       a file of this library, or a PEFT folder as `load_peft` reads it (LoRA, DoRA, IA3)
    base_weights  "original": the folder's own weights plus the adapter. "as_trained": every layer that was quantised in
                  training goes through that quantiser first, bit for bit, so that the merged model is the one that was
                  trained. A folder that is 4-bit or 8-bit itself is dequantised, and as trained already
    untie         write a head that is tied to the embedding as a tensor of its own, instead of an error
    verify_base   False: a method that depends on its base weight (DoRA) warns on another one, as others do
    never_ran     layers that no forward had called when the adapter was saved, although one had called others: "raise",
                  or "merge" where other inputs reach them (an image, another expert)
    progress      called with (bytes written, bytes in all)

    Weights are merged in float32 and cast once, to the dtype that they have on disk. A run that was interrupted goes on
    from its last whole shard. A folder that this made before is replaced, any other that isn't empty is refused.

    Raises:
        CheckpointError: unless each tensor of the adapter has one place, for another base, a full disk, a damaged file.
        TargetError: for a tied head and for layers that never ran.
        VariantError: for a method that isn't affine.
        BaseModelError: where a merged number is NaN or infinite. After any of these there is no `out_dir`.
    """
    if base_weights not in CHOICES:
        raise ConfigError(f"base_weights={base_weights!r}: wanted one of {CHOICES}")
    started, out = time.monotonic(), Path(out_dir).resolve()
    check_choice(never_ran)  # before anything large is read
    base = BaseFolder(Path(base_dir).resolve())
    file = open_adapter(Path(adapter), base.model)
    if file.base is None and base_weights == "as_trained":
        problem = f"{file.path}: PEFT's format does not say how the base was quantised in training"
        raise CheckpointError(f'{problem}\n  use base_weights="original"')
    if file.never_ran and never_ran == "raise":
        raise TargetError(f"{file.path}: {refusal(file.never_ran, len(file.targets))}")
    if out == base.path or out.is_mount():
        kind = "the base itself" if out == base.path else "a mount point"
        raise CheckpointError(f"{out} is {kind}\n  choose another folder")
    with full_precision(nn.Module()):  # which is global: no module is asked
        plan = MergePlan(file, base, base_weights, untie, verify_base)
        files, others = {header.path for header in base.headers.values()}, other_files(base.path)
        digests = [_digest(path) for path in file.files]  # a PEFT folder has two files
        job = {
            "adapter": digests[0] if len(digests) == 1 else digests,
            "base": {str(p.relative_to(base.path)): _stamp(p) for p in (*files, *others, *base.path.glob("*.json"))},
            "options": [base_weights, untie, verify_base],
            "library": __version__,
        }
        names = [*(s.name for s in plan.shards), *(str(p.relative_to(base.path)) for p in others), INDEX, "config.json"]
        with _partial(out, job, names) as partial:
            resumed = write_folder(partial, plan.shards, base.path, others, progress)
            plan.write_config(partial)
    size, seconds = sum(shard.size for shard in plan.shards), time.monotonic() - started
    result = Merged(out, len(plan.locations), plan.merged, size, base_weights, resumed, seconds)
    logger.info(str(result).replace("\n ", ","))
    return result


def other_files(folder: Path) -> list[Path]:
    """The files that go with the tensors. Other weights, and folders that transformers doesn't read, stay behind."""
    everything = [path for path in sorted(folder.iterdir()) if path.name not in (MARKER, "config.json", INDEX)]
    everything += sorted((folder / _TEMPLATES).glob("*"))
    others = [path for path in everything if path.is_file() and not path.name.endswith(_WEIGHTS)]
    behind = [p.name for p in everything if p not in others and p.name != _TEMPLATES and p.suffix != ".safetensors"]
    if behind:
        logger.info(f"left behind: {', '.join(behind)}")
    return others


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _stamp(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]


# ---- writing ------------------------------------------------------------------------------------


def write_folder(
    folder: Path, shards: Sequence[Shard], base: Path, others: Sequence[Path], progress: Progress | None
) -> int:
    """Write what the folder lacks, and return the bytes of the shards that an earlier run has finished."""
    total = sum(shard.size for shard in shards)
    # By size alone: a shard takes its name when it is whole, and the folder's marker says that it is of this merge.
    finished = [s for s in shards if (path := folder / s.name).is_file() and path.stat().st_size == s.size]
    written = resumed = sum(shard.size for shard in finished)
    needed = total - resumed + sum(path.stat().st_size for path in others)
    if needed > (free := shutil.disk_usage(folder).free):
        problem = f"{folder.parent} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are to be written"
        raise CheckpointError(f"{problem}\n  make room, or name another disk; what is written so far is kept")
    for shard in shards:
        if shard in finished:
            continue
        with replacing(folder / shard.name) as handle:
            for piece in shard.pieces():
                written += handle.write(piece)
                del piece  # or it would stay in memory while the next one is made
                if progress is not None:
                    progress(written, total)
    for path in others:
        with replacing(folder / path.relative_to(base)) as handle, path.open("rb") as source:
            shutil.copyfileobj(source, handle)
    return resumed


@contextmanager
def _partial(out: Path, job: dict[str, Any], names: Sequence[str]) -> Iterator[Path]:
    """The folder to write to, which takes the name of `out` when the block succeeds; only one process at a time."""
    partial, replaced = out.with_name(f"{out.name}.partial"), out.with_name(f".{out.name}.replaced")
    _check_ours(out)
    _check_ours(partial, begun=True)
    _check_ours(replaced)
    fresh = not partial.exists()
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{partial} can't be made: {error.strerror}") from error
    with (partial / _LOCK).open("a") as handle:
        _lock(handle, partial)
        keep = {MARKER, _LOCK, *(name.partition("/")[0] for name in names)}
        if (partial / MARKER).exists() and read_json(partial / MARKER).get("job") != job:
            logger.warning(f"{partial} was left by another merge, or one of other files: starting over")
            keep = {_LOCK}
        for path in partial.iterdir():
            if path.name not in keep:  # also what was being written when a run was killed
                _remove(path)
        write_json(partial / MARKER, {"job": job, "files": dict.fromkeys(names)})
        try:
            yield partial
        except LoraLiteError:
            if fresh:  # or what an earlier run has finished would be lost
                shutil.rmtree(partial)
            raise
        stamps = {name: _stamp(partial / name) for name in names if (partial / name).exists()}
        write_json(partial / MARKER, {"job": job, "files": stamps})
        (partial / _LOCK).unlink()  # while it is held: the folder takes its name without it
        if out.exists():
            _remove(replaced)  # of a run that was killed between the two renames
            os.replace(out, replaced)
        os.replace(partial, out)
        sync_folder(out.parent)  # or the rename may be lost in a power cut
        _remove(replaced)


def _check_ours(folder: Path, begun: bool = False) -> None:
    """CheckpointError for anything at that path but an empty folder, or one as a merge has left it (or just begun)."""
    if not os.path.lexists(folder):
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    ours: set[str] = set()
    if MARKER in names:
        files = read_json(folder / MARKER).get("files")
        stamps = files if isinstance(files, dict) else {}
        written = {name: stamp for name, stamp in stamps.items() if stamp is not None and (folder / name).is_file()}
        changed = [name for name, stamp in written.items() if _stamp(folder / name) != stamp]
        ours = {MARKER, _LOCK, *(n.partition("/")[0] for n in stamps)} - {n.partition("/")[0] for n in changed}
    foreign = sorted(name for name in names - ours if not (begun and name.startswith(".")))
    if foreign:
        problem = f"{folder} is there already and holds what no merge has written, such as {foreign[0]}"
        raise CheckpointError(f"{problem}\n  nothing is written over it: choose another folder")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _lock(handle: TextIO, folder: Path) -> None:
    """CheckpointError if another process works on the folder. The lock goes with the process, however that ends."""
    if os.name == "nt":
        return
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CheckpointError(f"{folder}: another merge is writing to it\n  wait for it, or stop it") from error
