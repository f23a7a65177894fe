"""What a merge on disk will write: every tensor of the output, copied or computed, in the shards of the base.

All is planned from headers, so that what can't be is known before the first byte is written.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..base.fingerprint import same_weight, tell_other_base
from ..base.storage import Quantization
from ..core.effective import Affine
from ..core.names import check_shapes, file_key
from ..core.resolve import make_stand_in
from ..core.state import Site
from ..core.variant import ParamSpec
from ..dtypes import dtype_name, fits
from ..errors import BaseModelError, CheckpointError
from ..io.adapter_file import AdapterFile
from ..io.safetensors import DTYPES, write_json
from .base_folder import BaseFolder, LayerLocation, TensorRef, refuse_tied, untied_key
from .bnb_files import as_trained, unpack

INDEX = "model.safetensors.index.json"


@dataclass
class OutputTensor:
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
    tensors: list[OutputTensor] = field(default_factory=list)

    def header(self) -> bytes:
        """8 bytes of length, and the JSON, padded to a multiple of 8."""
        offset, entries = 0, {}
        for tensor in self.tensors:
            entries[tensor.key] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset := offset + tensor.size],
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
        self._tensors: Mapping[str, Tensor] = {}
        self._check_tensors()
        tied = [place for place in self.places.values() if place.tied_to is not None]
        if tied and not untie:
            raise refuse_tied(tied[0])
        self._untied = {place.weight[0].key: untied_key(place) for place in tied}
        self._quantization = file.base.quantization or Quantization("unknown", "")
        self._quantize: set[str] = set()  # keys of what goes through the quantiser as it is read
        self._check_base(base_weights)
        # The layers that were quantised while the adapter was trained.
        modules = self._quantization.modules if base_weights == "as_trained" else []
        quantized = [tensor for place in base.find(file.path, modules).values() for tensor in place.weight]
        self._quantize = {tensor.key for tensor in quantized} - base.packed.keys()
        planned: dict[str, OutputTensor] = {}
        for path, place in self.places.items():
            for tensor in place.weight:
                key = self._untied.get(tensor.key, tensor.key)
                self._put(planned, key, tensor, self._weights(path, place, tensor))
            for tensor in () if self._site(path).stacked else place.bias:
                self._put(planned, tensor.key, tensor, self._biases(path, place, tensor))
        self.merged = len(planned)
        for tensor in quantized:
            if tensor.key not in planned:
                self._put(planned, tensor.key, tensor, self._plain(tensor))
        self.shards = self._make_shards(planned)
        self._tensors = file.tensors()

    def _site(self, path: str, load: Callable[[], Tensor] | None = None) -> Site:
        """The adapter at one layer, on a stand-in that asks `load` for the weight."""
        file, target = self._file, self.places[path].target
        module = _StandIn(target.d_in, target.d_out, load or torch.Tensor)
        site = make_stand_in(target, file.cfg, module, {}, file.scale, file.per_layer.get(path, {}))
        for name in site.specs if self._tensors else ():
            setattr(module, name, self._tensors[file_key(path, name)])
        return site

    def _check_tensors(self) -> None:
        """CheckpointError unless the file holds exactly its tensors."""
        specs: dict[str, ParamSpec] = {}
        for path, place in self.places.items():
            site = self._site(path)
            if place.target.experts and not site.cfg.FUSED_EXPERTS:
                variant = site.cfg.variant
                raise CheckpointError(f"{path}: {variant!r} can't go on fused experts\n  this is another base model")
            specs |= {file_key(path, name): spec for name, spec in site.specs.items()}
        check_shapes(self._file.header.entries, specs, str(self._file.path))

    def _check_base(self, base_weights: str) -> None:
        """Is this the base that the adapter belongs to? What was quantised can be compared only when it is read."""
        file, base, quantized = self._file, self._base, set(self._quantization.modules)
        dense = {path: place for path, place in self.places.items() if place.weight[0].key not in base.packed}
        for path, place in dense.items():
            if path not in quantized and not same_weight(base.samples(place.weight), file.base.fingerprint[path]):
                self._other_base(path)
        if base_weights == "as_trained" or not (comparable := dense.keys() & quantized):
            return
        if self._reads():
            self._other_base(min(comparable))
        elif self._quantization.method != "unknown":
            # One layer is quantised to be compared: the smallest.
            path = min(sorted(comparable), key=lambda path: dense[path].target.d_in * dense[path].target.d_out)
            self._quantize = {tensor.key for tensor in dense[path].weight}
            self._read(dense[path].weight[0], None, path)

    def _reads(self) -> bool:
        """Does the method depend on the values of the base weight?"""
        return any(self._site(path).base_weight != "unused" for path in self.places)

    def _other_base(self, path: str) -> None:
        """Raise or warn: the weight of this layer is not the one that the adapter was trained on."""
        file = self._file
        reads = self._reads() and self._verify
        if reads or not self._warned:
            self._warned = True
            message = (
                f"{path} of {file.path} was trained on another weight than that in {self._base.path}\n"
                f"  file: {file.base}"
            )
            cure = 'use base_weights="as_trained", the folder it was trained on, or verify_base=False'
            tell_other_base(message, file.cfg.variant, reads, self._verify, cure)

    def _put(
        self, planned: dict[str, OutputTensor], key: str, tensor: TensorRef, make: Callable[[], Iterator[Tensor]]
    ) -> None:
        if key in planned:
            raise CheckpointError(
                f"{self._file.path}: two of its layers go into the one tensor {key} of {self._base.path}\n"
                f"  is this the base that it was trained on?"
            )
        planned[key] = self._computed(key, tensor.key, make)

    def _computed(self, key: str, source: str, make: Callable[[], Iterator[Tensor]]) -> OutputTensor:
        dtype, shape = self._base.dtype(source), self._base.shape(source)
        return OutputTensor(key, dtype, shape, torch.Size(shape).numel() * DTYPES[dtype].itemsize, make)

    def _make_shards(self, planned: Mapping[str, OutputTensor]) -> list[Shard]:
        base, new = self._base, set(self._untied.values())
        parts = {part for packed in base.packed.values() for part in packed.parts.values()}
        shards: dict[str, Shard] = {}
        for key, header in base.headers.items():
            shard = shards.setdefault(header.path.name, Shard(header.path.name))
            if key in planned and key not in new:
                shard.tensors.append(planned[key])
            elif key in base.packed:
                shard.tensors.append(self._computed(key, key, self._plain(TensorRef(key))))
            elif key not in parts and key not in new:
                entry = header.entries[key]
                shard.tensors.append(OutputTensor(key, entry.dtype, entry.shape, entry.stop - entry.start))
            if key in self._untied:
                shard.tensors.append(planned[self._untied[key]])
        return list(shards.values())

    # ---- what is computed

    def _weights(self, path: str, place: LayerLocation, tensor: TensorRef) -> Callable[[], Iterator[Tensor]]:
        def compute() -> Iterator[Tensor]:
            fused = tensor.expert is None and place.target.experts
            for i in range(place.target.experts) if fused else [tensor.expert]:
                yield self._fold(path, place, tensor, self._read(tensor, i if fused else None, path), i)

        return compute

    def _fold(
        self, path: str, place: LayerLocation, tensor: TensorRef, weight: Float[Tensor, "o i"], expert: int | None
    ) -> Tensor:
        """W' as it lies on disk."""
        site = self._site(path, lambda: weight)
        affine = Affine([site], torch.promote_types(weight.dtype, torch.float32), weight.device, expert)
        fused = place.target.experts
        if (fused or not place.bias) and affine.bias(None, lambda: weight) is not None:
            why = (
                "an expert's bias would be weighted as its output is\n  keep the adapter"
                if fused
                else "this model has no bias to "
                "hold it\n  from_pretrained would drop one in silence: keep the adapter, or merge in memory"
            )
            raise CheckpointError(f"{place.target.path}: {site.cfg.variant!r} adds a constant there, and {why}")
        reads = site.module.reads
        affine.prepare()
        dtype = DTYPES[self._base.dtype(tensor.key)]
        # Where a column of W' needs that column of W alone, and nobody reads W again, the result takes W's own memory.
        in_place = affine.is_columnwise() and site.module.reads == reads and weight.dtype == dtype
        site.module.sealed = in_place
        out = weight if in_place else torch.empty_like(weight, dtype=dtype)

        def check(columns: Tensor) -> None:
            if not fits(columns, dtype):
                raise BaseModelError(
                    f"{place.target.path}: merged numbers are NaN or infinite in {dtype_name(dtype)}\n"
                    f"  check the adapter's values and those of {tensor.key}"
                )

        affine.write(weight, out, check)
        return out.mT.contiguous() if tensor.transposed else out

    def _biases(self, path: str, place: LayerLocation, tensor: TensorRef) -> Callable[[], Iterator[Tensor]]:
        def compute() -> Iterator[Tensor]:
            weight = place.weight[0 if tensor.expert is None else tensor.expert]
            bias = self._read(tensor, None, path)  # (o,), or (experts, o)
            site = self._site(path, lambda: self._read(weight, 0 if place.target.experts else None, path))
            for row in bias if bias.ndim == 2 else [bias]:
                site.module.bias = None if place.target.experts else row  # experts' are outside of what a variant sees
                affine = Affine([site], torch.promote_types(row.dtype, torch.float32), row.device)
                new = affine.bias(row, lambda: site.module.weight)
                assert new is not None
                if not fits(new, bias.dtype):
                    raise BaseModelError(
                        f"{place.target.path}: the merged bias holds a NaN or an infinity\n"
                        f"  does it in the base? Else take a smaller scale, or an earlier file of the adapter"
                    )
                yield new.to(bias.dtype)

        return compute

    def _plain(self, tensor: TensorRef) -> Callable[[], Iterator[Tensor]]:
        """A weight that no adapter is on, dequantised or as the adapter's base computes with it."""

        def compute() -> Iterator[Tensor]:
            weight = self._read(tensor, None, None).to(DTYPES[self._base.dtype(tensor.key)])
            yield weight.mT.contiguous() if tensor.transposed else weight

        return compute

    def _read(self, tensor: TensorRef, index: int | None, path: str | None) -> Tensor:
        """A matrix (d_out, d_in) or a bias as the merge starts from it, in memory of its own."""
        base, file = self._base, self._file
        if tensor.key in base.packed:
            weight, fingerprint = unpack(base.headers, base.packed[tensor.key])
        else:
            weight = base.read(tensor.key, index)
            weight = weight.mT if tensor.transposed else weight
            if tensor.key not in self._quantize:
                return weight
            dtype = getattr(torch, self._quantization.weight_dtype or file.base.dtype)
            weight, fingerprint = as_trained(weight, self._quantization, dtype)
        # The codes' dtype may differ (quant_storage), their elements and the scales' may not.
        if path is not None and fingerprint[1:] != file.base.fingerprint[path][1:]:
            self._other_base(path)
        return weight

    # ---- the files beside the tensors

    def write_config(self, folder: Path) -> None:
        """config.json without what isn't true any more, and the index."""
        config = self._base.config
        if config is not None:
            config = {
                key: value for key, value in config.items() if key != "quantization_config" or not self._base.packed
            }
            if self._untied:
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
