"""Merging on disk: a checkpoint folder and an adapter file become a checkpoint folder, one tensor at a time.

No model is built. Memory: the adapter, and the largest merged tensor as it is stored with a few blocks of its columns,
whatever the size of model or shards. All is planned from headers: every tensor of the adapter has its place before the
first byte is written. Shards are written to `<out>.partial`, each whole or not at all, so that a run that was killed
goes on where it stopped; the folder takes its name when everything is in it.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from . import record
from .adapter import check_shapes, file_key
from .affine import Affine, exactly, fits
from .base_folder import BaseFolder, Place, Stored, refuse_tied, untied_key
from .checkpoint import AdapterFile, read_file
from .config import dtype_name
from .errors import BaseModelError, CheckpointError, ConfigError, LoraLiteError
from .files import DTYPES, read_json, replacing, sync_folder, write_json
from .layer import AdapterState, Slot
from .packed import as_trained, unpack
from .preflight import is_stacked, specs_at
from .variant import weight_use
from .version import __version__

CHOICES = ("original", "as_trained")
INDEX, _LOCK = "model.safetensors.index.json", ".lock"
MARKER = "lora_lite_merge.json"
"""In every folder that a merge makes: what it was made of, and its files."""
COPY = 8 << 20
"""Bytes that are copied at a time."""
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data"),
    *(".ot", ".tflite", ".mlmodel", ".npz", ".pkl", ".index.json"),
)
_FOLDERS = ("additional_chat_templates",)

Progress = Callable[[int, int], None]
"""(bytes written, bytes in all)"""


@dataclass(frozen=True)
class Merged:
    """What `merge_checkpoint` has done."""

    folder: Path
    layers: int
    tensors: int
    size: int
    """Bytes of the checkpoint's tensors."""
    base_weights: str
    resumed: int
    """Bytes that were there already."""
    seconds: float

    def __str__(self) -> str:
        return (
            f"merged {self.layers} layers ({self.tensors} tensors) into {self.folder}\n"
            f"  base weights {self.base_weights}, {self.size / 1e9:.2f} GB in {self.seconds:.1f} s"
            f"{f', {self.resumed / 1e9:.2f} GB of it from an earlier run' if self.resumed else ''}"
        )


@dataclass
class _Tensor:
    """One tensor of the output: copied, or computed by `make` as its matrices in order."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    """Bytes"""
    make: Callable[[], Iterator[Tensor]] | None = None


@dataclass
class _Shard:
    name: str
    tensors: list[_Tensor] = field(default_factory=list)

    def header(self) -> bytes:
        """8 bytes of length, and the JSON, padded to a multiple of 8."""
        at, entries = 0, {}
        for tensor in self.tensors:
            entries[tensor.key] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [at, at := at + tensor.size],
            }
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        return len(self.header()) + sum(tensor.size for tensor in self.tensors)


class _StandIn(nn.Module):
    """A layer of the checkpoint for the adapter's hooks; its weight is read from disk when one asks for it."""

    def __init__(self, d_in: int, d_out: int, load: Callable[[], Tensor]) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.reads, self.sealed = 0, False
        self._load = load

    @property
    def weight(self) -> Tensor:
        assert not self.sealed, "its memory holds merged numbers by now"
        self.reads += 1
        return self._load()


def merge_checkpoint(
    base_dir: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    base_weights: str = "original",
    *,
    untie: bool = False,
    verify_base: bool = True,
    progress: Progress | None = None,
) -> Merged:
    """Write the checkpoint folder `base_dir` with the adapter of a file folded in, at its scale, to `out_dir`.

    base_weights  "original": the folder's own weights plus the adapter. "as_trained": every layer that the adapter's
                  file records as quantised first goes through that quantiser, bit for bit, so that the merged model is
                  the one that was trained. A folder that is 4-bit or 8-bit itself is dequantised on the way, and is as
                  trained already
    untie         write a head that is tied to the embedding as a tensor of its own, instead of an error
    verify_base   False turns the error for a method that depends on its base weight (DoRA), on other weights than it
                  was trained on, into the warning that other methods give
    progress      called with (bytes written, bytes in all)

    Weights are merged in float32 and cast once, to the dtype that they have on disk. A run that was interrupted goes on
    from its last whole shard. A folder that this made before is replaced, any other that isn't empty is refused.

    Raises CheckpointError unless every tensor of the adapter has exactly one place (both sides are listed), for another
    base, a full disk or a damaged file; TargetError for a tied head; VariantError for a method that isn't affine;
    BaseModelError where a merged number is NaN or infinite. There is then no `out_dir`.
    """
    if base_weights not in CHOICES:
        raise ConfigError(f"base_weights={base_weights!r}: wanted one of {CHOICES}")
    started, out = time.monotonic(), Path(out_dir).resolve()
    file, base = read_file(adapter), BaseFolder(Path(base_dir).resolve())
    if out == base.path or out.is_mount():
        raise CheckpointError(
            f"{out} is {'the base itself' if out == base.path else 'a mount point'}\n  choose another folder"
        )
    with exactly(nn.Module()):
        plan = _Plan(file, base, base_weights, untie, verify_base)
    others = _others(base.path)
    job = {
        "adapter": _digest(file.path),
        "base": {str(p.relative_to(base.path)): _stamp(p) for p in (*base.files(), *others, *base.path.glob("*.json"))},
        "options": [base_weights, untie, verify_base],
        "library": __version__,
    }
    names = [shard.name for shard in plan.shards] + [str(p.relative_to(base.path)) for p in others]
    names += [INDEX, "config.json"]
    with exactly(nn.Module()), _partial(out, job, names) as partial:
        total = sum(shard.size for shard in plan.shards)
        there = {s.name for s in plan.shards if _size(partial / s.name) == s.size}
        resumed = sum(shard.size for shard in plan.shards if shard.name in there)
        needed = total - resumed + sum(p.stat().st_size for p in others)
        if needed > (free := shutil.disk_usage(partial).free):
            raise CheckpointError(
                f"{out.parent} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are to be written"
            )
        report = _Counter(total, resumed, progress)
        for shard in plan.shards:
            if shard.name not in there:
                _write_shard(partial / shard.name, shard, base, report)
        for path in others:
            with replacing(partial / path.relative_to(base.path)) as handle, path.open("rb") as source:
                shutil.copyfileobj(source, handle, COPY)
        plan.write_config(partial)
    done = Merged(out, len(plan.places), plan.merged, total, base_weights, resumed, time.monotonic() - started)
    logger.info(str(done).replace("\n ", ","))
    return done


def _others(folder: Path) -> list[Path]:
    """What goes along with the tensors; other weights, and folders that transformers doesn't read, stay behind."""
    everything = [path for path in sorted(folder.iterdir()) if path.name not in (MARKER, "config.json", INDEX)]
    everything += [path for name in _FOLDERS for path in sorted((folder / name).glob("*"))]
    others = [path for path in everything if path.is_file() and not path.name.endswith(_WEIGHTS)]
    left = [p.name for p in everything if p not in others and p.name not in _FOLDERS and p.suffix != ".safetensors"]
    if left:
        logger.info(f"left behind: {', '.join(left)}")
    return others


def _stamp(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]


@dataclass
class _Counter:
    total: int
    done: int
    tell: Progress | None

    def add(self, size: int) -> None:
        self.done += size
        if self.tell is not None:
            self.tell(self.done, self.total)


# ---- the plan -----------------------------------------------------------------------------------


class _Plan:
    """Every tensor of the output, in the shards of the base. Raises all that can be told from headers."""

    def __init__(self, file: AdapterFile, base: BaseFolder, base_weights: str, untie: bool, verify: bool) -> None:
        self._file, self._base, self._verify, self._warned = file, base, verify, False
        self.places = base.places(file.path, file.targets)
        self._slots = self._make_slots()
        tied = [place for place in self.places.values() if place.tied_to is not None]
        if tied and not untie:
            raise refuse_tied(tied[0])
        self._beside = {place.weight[0].key: untied_key(place) for place in tied}
        self._how = file.base["quantization"] or {}
        self._check_base(base_weights)
        recorded = self._recorded() if base_weights == "as_trained" else []
        self._quantise = {stored.key for place in recorded for stored in place.weight} - base.packed.keys()
        made: dict[str, _Tensor] = {}
        for at, place in self.places.items():
            for stored in place.weight:
                self._put(made, self._beside.get(stored.key, stored.key), stored, self._weights(at, place, stored))
            for stored in place.bias:
                if not self._slots[at].stacked:
                    self._put(made, stored.key, stored, self._biases(at, place, stored))
        self.merged = len(made)
        for stored in (stored for place in recorded for stored in place.weight):
            if stored.key not in made:
                self._put(made, stored.key, stored, self._plain(stored))
        self.shards = self._make_shards(made)
        self._tensors = file.tensors()

    def _make_slots(self) -> dict[str, Slot]:
        """What the variant sees of each layer. CheckpointError unless the file holds exactly its tensors."""
        file = self._file
        targets = [place.target for place in self.places.values()]
        state = AdapterState("default", file.cfg, targets, file.base, file.scale, per_layer=file.per_layer)
        slots: dict[str, Slot] = {}
        wanted: dict[str, tuple[int, ...]] = {}
        for at, place in self.places.items():
            cfg = file.cfg.at(file.per_layer.get(at, {}))
            if place.target.experts and not cfg.FUSED_EXPERTS:
                raise CheckpointError(f"{at}: {cfg.variant!r} can't go on fused experts\n  this is another base model")
            specs = specs_at(place.target, cfg)
            wanted |= {file_key(at, name): tuple(spec.shape) for name, spec in specs.items()}
            tensors = {name: spec.keep_dtype for name, spec in specs.items()}
            slots[at] = Slot(state, place.target, cfg, weight_use(cfg), is_stacked(place.target, cfg), tensors)
        check_shapes(file.header.shapes(), wanted, str(file.path))
        return slots

    def _recorded(self) -> list[Place]:
        """The layers that were quantised while the adapter was trained."""
        modules = self._how.get("modules", [])
        if not (isinstance(modules, list) and all(isinstance(path, str) for path in modules)):
            raise CheckpointError(f"{self._file.path}: its record of quantised modules is no list of paths")
        return list(self._base.find(self._file.path, modules).values())

    def _check_base(self, base_weights: str) -> None:
        """Is this the base that the adapter belongs to? What was quantised can be compared only when it is read."""
        file, base, trained_on = self._file, self._base, set(self._how.get("modules", []))
        dense = {at: place for at, place in self.places.items() if place.weight[0].key not in base.packed}
        for at, place in dense.items():
            if at not in trained_on and not record.same_weight(
                base.samples(place.weight), file.base["fingerprint"][at]
            ):
                self._other_base(at)
        if base_weights == "as_trained" or not (quantised := dense.keys() & trained_on):
            return
        if self._reads():
            self._other_base(min(quantised))
        elif self._how["method"] != "unknown":
            at = min(sorted(quantised), key=lambda at: dense[at].target.d_in * dense[at].target.d_out)
            self._quantise = {stored.key for stored in dense[at].weight}
            self._read(dense[at].weight[0], None, at)  # compares the one layer

    def _reads(self) -> bool:
        """Does the method depend on the values of the base weight?"""
        return any(slot.base_weight != "unused" for slot in self._slots.values())

    def _other_base(self, at: str) -> None:
        """Raise or warn: the weight of this layer is not the one that the adapter was trained on."""
        file = self._file
        message = (
            f"{at} of {file.path} was trained on another weight than that in {self._base.path}\n"
            f"  file: {record.base_line(file.base)}"
        )
        if self._reads() and self._verify:
            raise CheckpointError(
                f"{message}\n  {file.cfg.variant!r} depends on the values of its base weight: use "
                f'base_weights="as_trained", the folder it was trained on, or verify_base=False'
            )
        if not self._warned:
            self._warned = True
            logger.warning(f"{message}\n  its outputs will not be those that it was trained for")

    def _put(self, made: dict[str, _Tensor], key: str, stored: Stored, make: Callable[[], Iterator[Tensor]]) -> None:
        if key in made:
            raise CheckpointError(
                f"{self._file.path}: two of its layers go into the one tensor {key} of {self._base.path}"
            )
        made[key] = self._computed(key, stored.key, make)

    def _computed(self, key: str, source: str, make: Callable[[], Iterator[Tensor]]) -> _Tensor:
        dtype, shape = self._base.dtype(source), self._base.shape(source)
        return _Tensor(key, dtype, shape, torch.Size(shape).numel() * DTYPES[dtype].itemsize, make)

    def _make_shards(self, made: Mapping[str, _Tensor]) -> list[_Shard]:
        base, new = self._base, set(self._beside.values())
        parts = {part for packed in base.packed.values() for part in packed.parts.values()}
        shards: dict[str, _Shard] = {}
        for key, header in base.headers.items():
            shard = shards.setdefault(header.path.name, _Shard(header.path.name))
            if key in made and key not in new:
                shard.tensors.append(made[key])
            elif key in base.packed:
                shard.tensors.append(self._computed(key, key, self._plain(Stored(key))))
            elif key not in parts and key not in new:
                entry = header.entries[key]
                shard.tensors.append(_Tensor(key, entry.dtype, entry.shape, entry.stop - entry.start))
            if key in self._beside:
                shard.tensors.append(made[self._beside[key]])
        return list(shards.values())

    # ---- what is computed

    def _weights(self, at: str, place: Place, stored: Stored) -> Callable[[], Iterator[Tensor]]:
        def make() -> Iterator[Tensor]:
            many = stored.expert is None and place.target.experts
            for i in range(place.target.experts) if many else [stored.expert]:
                yield self._fold(at, place, stored, self._read(stored, i if many else None, at), i)

        return make

    def _fold(self, at: str, place: Place, stored: Stored, weight: Tensor, expert: int | None) -> Tensor:
        """W' as it lies on disk."""
        module = self._stand_in(at, place, lambda: weight)
        slot = self._slots[at]
        affine = Affine(module, [slot], torch.promote_types(weight.dtype, torch.float32), weight.device, expert)
        fused = place.target.experts
        if (fused or not place.bias) and affine.bias(None, lambda: weight) is not None:
            why = (
                "an expert's bias would be weighted as its output is\n  keep the adapter"
                if fused
                else "this model has no bias to "
                "hold it\n  from_pretrained would drop one in silence: keep the adapter, or merge in memory"
            )
            raise CheckpointError(f"{place.target.path}: {slot.state.cfg.variant!r} adds a constant there, and {why}")
        reads = module.reads
        affine.prepare()
        dtype = DTYPES[self._base.dtype(stored.key)]
        own = affine.is_local() and module.reads == reads and weight.dtype == dtype
        if own:
            module.sealed = True  # from here on its memory takes the result
        out = weight if own else torch.empty_like(weight, dtype=dtype)
        for start, stop, columns in affine.columns(weight):
            if not fits(columns, dtype):
                raise BaseModelError(
                    f"{place.target.path}: merged numbers are NaN or infinite in {dtype_name(dtype)}\n"
                    f"  check the adapter's values and those of {stored.key}"
                )
            out[:, start:stop] = columns
        return out.mT.contiguous() if stored.transposed else out

    def _biases(self, at: str, place: Place, stored: Stored) -> Callable[[], Iterator[Tensor]]:
        def make() -> Iterator[Tensor]:
            weight = place.weight[0 if stored.expert is None else stored.expert]
            bias = self._read(stored, None, at)
            module = self._stand_in(at, place, lambda: self._read(weight, 0 if place.target.experts else None, at))
            for row in bias if bias.ndim == 2 else [bias]:
                module.bias = None if place.target.experts else row  # experts' are outside of what a variant sees
                affine = Affine(module, [self._slots[at]], torch.promote_types(row.dtype, torch.float32), row.device)
                new = affine.bias(row, lambda: module.weight)
                assert new is not None
                if not fits(new, bias.dtype):
                    raise BaseModelError(f"{place.target.path}: the merged bias holds a NaN or an infinity")
                yield new.to(bias.dtype)

        return make

    def _plain(self, stored: Stored) -> Callable[[], Iterator[Tensor]]:
        """A weight that no adapter is on, dequantised or as the adapter's base computes with it."""

        def make() -> Iterator[Tensor]:
            weight = self._read(stored, None, None).to(DTYPES[self._base.dtype(stored.key)])
            yield weight.mT.contiguous() if stored.transposed else weight

        return make

    def _stand_in(self, at: str, place: Place, load: Callable[[], Tensor]) -> Any:
        module = _StandIn(place.target.d_in, place.target.d_out, load)
        for name in self._slots[at].tensors:
            setattr(module, name, self._tensors[file_key(at, name)])
        return module

    def _read(self, stored: Stored, index: int | None, at: str | None) -> Tensor:
        """A matrix (d_out, d_in) or a bias as the merge starts from it, in memory of its own."""
        base, file = self._base, self._file
        if stored.key in base.packed:
            weight, found = unpack(base.headers, base.packed[stored.key])
            if at is not None and found[1:] != file.base["fingerprint"][at][1:]:
                self._other_base(at)
            return weight
        weight = base.read(stored.key, index)
        weight = weight.mT if stored.transposed else weight
        if stored.key not in self._quantise:
            return weight
        weight, found = as_trained(
            weight, self._how, getattr(torch, self._how.get("weight_dtype") or file.base["dtype"])
        )
        if at is not None and found[1:] != file.base["fingerprint"][at][1:]:
            self._other_base(at)
        return weight

    # ---- the files beside the tensors

    def write_config(self, folder: Path) -> None:
        """config.json without what isn't true any more, and the index."""
        config = self._base.config
        if config is not None:
            config = {
                key: value for key, value in config.items() if key != "quantization_config" or not self._base.packed
            }
            if self._beside:
                nested = {k: {**v, "tie_word_embeddings": False} for k, v in config.items() if k == "text_config"}
                config |= {**nested, "tie_word_embeddings": False}
            write_json(folder / "config.json", config)
        if self._base.is_sharded:
            tensors = [(tensor, shard.name) for shard in self.shards for tensor in shard.tensors]
            sizes = {
                "total_parameters": sum(torch.Size(tensor.shape).numel() for tensor, _ in tensors),
                "total_size": sum(tensor.size for tensor, _ in tensors),
            }
            names = {tensor.key: name for tensor, name in sorted(tensors, key=lambda pair: pair[0].key)}
            write_json(folder / INDEX, {"metadata": sizes, "weight_map": names})


# ---- writing ------------------------------------------------------------------------------------


def _write_shard(path: Path, shard: _Shard, base: BaseFolder, report: _Counter) -> None:
    with replacing(path) as handle:
        handle.write(shard.header())
        for tensor in shard.tensors:
            if tensor.make is None:
                for chunk in base.chunks(tensor.key, COPY):
                    handle.write(chunk)
                    report.add(len(chunk))
            else:
                matrices = tensor.make()
                while (matrix := next(matrices, None)) is not None:
                    raw: Any = matrix.contiguous().view(-1).view(torch.uint8).numpy()
                    handle.write(raw)
                    report.add(raw.nbytes)
                    del matrix, raw  # or it would stay in memory while the next one is made


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
    with _locked(partial):
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
        (partial / _LOCK).unlink()
        if out.exists():
            _remove(replaced)
            os.replace(out, replaced)
        os.replace(partial, out)
        sync_folder(out.parent)
        _remove(replaced)


def _check_ours(folder: Path, begun: bool = False) -> None:
    """CheckpointError for anything at that path but an empty folder, or one as a merge has left it (or just begun)."""
    if not folder.exists() and not folder.is_symlink():
        return
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    ours: set[str] = set()
    if MARKER in held:
        files = read_json(folder / MARKER).get("files")
        files = files if isinstance(files, dict) else {}
        same = {
            name: stamp is None or _size(folder / name) < 0 or _stamp(folder / name) == stamp
            for name, stamp in files.items()
        }
        changed = {name.partition("/")[0] for name, is_same in same.items() if not is_same}
        ours = {MARKER, _LOCK, *(name.partition("/")[0] for name in files)} - changed
    foreign = sorted(name for name in held - ours if not (begun and name.startswith(".")))
    if foreign:
        raise CheckpointError(
            f"{folder} is there already and holds what no merge has written, such as {foreign[0]}\n"
            f"  nothing is written over it: choose another folder"
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """CheckpointError if another process works on the folder. The lock goes with the process, however that ends."""
    with (folder / _LOCK).open("a") as handle:
        if os.name != "nt":
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CheckpointError(f"{folder}: another merge is writing to it\n  wait for it, or stop it") from error
        yield


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
