"""What a merge on disk will write: every tensor of the output, copied or computed, in the shards of the base.

All is planned from headers, so that what can't be is known before the first byte is written.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from ..base import fingerprint
from ..core.effective import Affine
from ..core.layer import AdapterState, Slot
from ..core.names import check_shapes, file_key
from ..core.plan import is_stacked, specs_at
from ..core.variant import weight_use
from ..dtypes import dtype_name, fits
from ..errors import BaseModelError, CheckpointError
from ..io.checkpoint import AdapterFile
from ..io.safetensors import DTYPES, write_json
from .base_folder import BaseFolder, Place, Stored, refuse_tied, untied_key
from .bnb_files import as_trained, unpack

INDEX = "model.safetensors.index.json"


@dataclass
class Piece:
    """One tensor of the output: copied, or computed by `make` as its matrices in order."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    """Bytes"""
    make: Callable[[], Iterator[Tensor]] | None = None


@dataclass
class Shard:
    name: str
    tensors: list[Piece] = field(default_factory=list)

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


class MergePlan:
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
        made: dict[str, Piece] = {}
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
            cfg = file.cfg.with_overrides(file.per_layer.get(at, {}))
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
            if at not in trained_on and not fingerprint.same_weight(
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
            f"  file: {fingerprint.base_line(file.base)}"
        )
        if self._reads() and self._verify:
            raise CheckpointError(
                f"{message}\n  {file.cfg.variant!r} depends on the values of its base weight: use "
                f'base_weights="as_trained", the folder it was trained on, or verify_base=False'
            )
        if not self._warned:
            self._warned = True
            logger.warning(f"{message}\n  its outputs will not be those that it was trained for")

    def _put(self, made: dict[str, Piece], key: str, stored: Stored, make: Callable[[], Iterator[Tensor]]) -> None:
        if key in made:
            raise CheckpointError(
                f"{self._file.path}: two of its layers go into the one tensor {key} of {self._base.path}\n"
                f"  is this the base that it was trained on?"
            )
        made[key] = self._computed(key, stored.key, make)

    def _computed(self, key: str, source: str, make: Callable[[], Iterator[Tensor]]) -> Piece:
        dtype, shape = self._base.dtype(source), self._base.shape(source)
        return Piece(key, dtype, shape, torch.Size(shape).numel() * DTYPES[dtype].itemsize, make)

    def _make_shards(self, made: Mapping[str, Piece]) -> list[Shard]:
        base, new = self._base, set(self._beside.values())
        parts = {part for packed in base.packed.values() for part in packed.parts.values()}
        shards: dict[str, Shard] = {}
        for key, header in base.headers.items():
            shard = shards.setdefault(header.path.name, Shard(header.path.name))
            if key in made and key not in new:
                shard.tensors.append(made[key])
            elif key in base.packed:
                shard.tensors.append(self._computed(key, key, self._plain(Stored(key))))
            elif key not in parts and key not in new:
                entry = header.entries[key]
                shard.tensors.append(Piece(key, entry.dtype, entry.shape, entry.stop - entry.start))
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
                    raise BaseModelError(
                        f"{place.target.path}: the merged bias holds a NaN or an infinity\n"
                        f"  does it in the base? Else take a smaller scale, or an earlier file of the adapter"
                    )
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
