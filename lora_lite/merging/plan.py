"""The plan of a merge on disk: every tensor of the output, copied or computed, in the shards of the base.

All is planned from headers, so that what can't be is known before the first byte is written.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
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
from ..errors import BaseModelError, CheckpointError, TargetError
from ..io.adapter_file import AdapterFile
from ..io.safetensors import DTYPES, INDEX, write_json
from .base_folder import BaseFolder, TensorRef
from .bnb_files import as_trained, unpack


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
    """One file of the output, named as the base's."""

    name: str
    tensors: list[OutputTensor] = field(default_factory=list)

    def header(self) -> bytes:
        """8 bytes of length, and the JSON, padded to a multiple of 8."""
        offset, entries = 0, {}
        for tensor in self.tensors:
            offsets = [offset, offset := offset + tensor.size]
            entries[tensor.key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # or the tensors' bytes would start unaligned
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        return len(self.header()) + sum(tensor.size for tensor in self.tensors)


class _StandIn(nn.Module):
    """A layer of the checkpoint for the adapter's hooks; whenever one asks for its weight, `load` gives it."""

    def __init__(self, d_in: int, d_out: int, load: Callable[[], Tensor]) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.reads, self.sealed, self._load = 0, False, load

    @property
    def weight(self) -> Tensor:
        assert not self.sealed, "its memory holds merged numbers by now"
        self.reads += 1
        return self._load()


class MergePlan:
    """Every tensor of the output, in the shards of the base. Raises all that can be told from headers."""

    def __init__(self, file: AdapterFile, base: BaseFolder, base_weights: str, untie: bool, verify: bool) -> None:
        self._file, self._base, self._verify, self._warned = file, base, verify, False
        self._tensors: Mapping[str, Tensor] = {}
        self._planned: dict[str, OutputTensor] = {}
        # The order is that of the errors, and of the cost: first what headers tell of the file, then of the base.
        self.locations = base.locate(file.path, file.targets)
        self._check_tensors()
        self._untied = self._untied_keys(untie)
        self._reads = any(self._site(path).base_weight != "unused" for path in self.locations)
        # A few bytes of each weight: a wrong base is told before the first large tensor is read.
        self._quantization = file.base.quantization or Quantization("unknown", "")
        self._check_base(base_weights)
        # Layers that were quantised in training go through the quantiser as they are read, adapted or not. The adapted
        # ones are planned first: of the others, all that is left is written without an adapter.
        modules = self._quantization.modules if base_weights == "as_trained" else []
        quantized = [ref for location in base.find(file.path, modules).values() for ref in location.weight]
        self._quantized = {ref.key for ref in quantized} - base.packed.keys()
        self._plan_layers()
        self.merged = len(self._planned)
        for ref in (*quantized, *map(TensorRef, base.packed)):
            if ref.key not in self._planned:
                self._plan(ref.key, ref, partial(self._unadapted, ref))
        self.shards = self._make_shards()
        # Last, as it reads the whole file; until here the sites have no tensors.
        self._tensors = file.tensors()

    def _site(self, path: str, load: Callable[[], Tensor] = torch.Tensor) -> Site:
        """The adapter at one layer, on a stand-in that asks `load` for the weight."""
        file, target = self._file, self.locations[path].target
        module = _StandIn(target.d_in, target.d_out, load)
        site = make_stand_in(target, file.cfg, module, {}, file.scale, file.per_layer.get(path, {}))
        for name in site.specs if self._tensors else ():
            setattr(module, name, self._tensors[file_key(path, name)])
        return site

    def _check_tensors(self) -> None:
        """CheckpointError unless the file holds exactly its tensors."""
        specs: dict[str, ParamSpec] = {}
        for path, location in self.locations.items():
            site = self._site(path)
            if location.target.experts and not site.cfg.FUSED_EXPERTS:
                variant = site.cfg.variant
                raise CheckpointError(f"{path}: {variant!r} can't go on fused experts\n  this is another base model")
            specs |= {file_key(path, name): spec for name, spec in site.specs.items()}
        check_shapes(self._file.header.entries, specs, str(self._file.path))

    def _untied_keys(self, untie: bool) -> dict[str, str]:
        """Key of the embedding -> key of the head that it was tied to. Raises TargetError if it is to stay tied."""
        tied = [location for location in self.locations.values() if location.tied_to is not None]
        if tied and not untie:
            raise TargetError(
                f"{tied[0].target.path}: its weight is also {tied[0].tied_to}, which would change with it\n"
                f"  use untie=True (both are written, and tie_word_embeddings is set to false), or leave the layer out"
            )
        return {location.weight[0].key: file_key(location.target.path, "weight") for location in tied}

    # ---- is it the base that the adapter was trained on?

    def _check_base(self, base_weights: str) -> None:
        """Compare what can be compared before it is read. A packed weight is compared in `_read`, as it is unpacked."""
        file, base, quantized = self._file, self._base, set(self._quantization.modules)
        dense = {path: loc for path, loc in self.locations.items() if loc.weight[0].key not in base.packed}
        for path, location in dense.items():
            if path not in quantized and not same_weight(base.samples(location.weight), file.base.fingerprint[path]):
                self._tell_other_base(path)
        if base_weights == "as_trained" or not (comparable := dense.keys() & quantized):
            return
        if self._reads:
            self._tell_other_base(min(comparable))  # the original weights are not those that the method has seen
        elif self._quantization.method != "unknown":
            # Quantising takes time, so one layer stands for all: the smallest.
            path = min(sorted(comparable), key=lambda path: dense[path].target.d_in * dense[path].target.d_out)
            self._read(dense[path].weight[0], None, path, quantize=True)

    def _tell_other_base(self, path: str) -> None:
        """Raise or warn (once): the weight of this layer is not the one that the adapter was trained on."""
        file = self._file
        if self._warned and not (self._reads and self._verify):
            return
        self._warned = True
        message = f"{path} of {file.path} was trained on another weight than that in {self._base.path}"
        cure = 'use base_weights="as_trained", the folder it was trained on, or verify_base=False'
        tell_other_base(f"{message}\n  file: {file.base}", file.cfg.variant, self._reads, self._verify, cure)

    # ---- what is written, and where

    def _plan_layers(self) -> None:
        for path, location in self.locations.items():
            for ref in location.weight:
                self._plan(self._untied.get(ref.key, ref.key), ref, partial(self._merged, path, ref))
            # An adapter on each expert's matrix leaves the biases, which come after the product, as they are.
            for ref in () if self._site(path).stacked else location.bias:
                self._plan(ref.key, ref, partial(self._merged_bias, path, ref))

    def _plan(self, key: str, ref: TensorRef, make: Callable[[], Iterator[Tensor]]) -> None:
        if key in self._planned:
            raise CheckpointError(
                f"{self._file.path}: two of its layers go into the one tensor {key} of {self._base.path}\n"
                f"  is this the base that it was trained on?"
            )
        dtype, shape = self._base.dtype(ref.key), self._base.shape(ref.key)
        size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        self._planned[key] = OutputTensor(key, dtype, shape, size, make)

    def _make_shards(self) -> list[Shard]:
        """Each tensor stays in its shard; an untied head comes after its embedding, whether a file had it or not."""
        base, heads = self._base, set(self._untied.values())
        parts = {part for packed in base.packed.values() for part in packed.parts.values()}
        shards: dict[str, Shard] = {}
        for key, header in base.headers.items():
            shard = shards.setdefault(header.path.name, Shard(header.path.name))
            if key in self._planned and key not in heads:
                shard.tensors.append(self._planned[key])
            elif key not in parts and key not in heads:
                entry = header.entries[key]
                shard.tensors.append(OutputTensor(key, entry.dtype, entry.shape, entry.stop - entry.start))
            if key in self._untied:
                shard.tensors.append(self._planned[self._untied[key]])
        return list(shards.values())

    # ---- what is computed

    def _merged(self, path: str, ref: TensorRef) -> Iterator[Tensor]:
        """W' of a layer, or of each of its experts, as it lies on disk."""
        experts = self.locations[path].target.experts
        if experts and ref.expert is None:
            for i in range(experts):  # one matrix in memory at a time, whatever their number
                yield self._fold(path, ref, self._read(ref, i, path), i)
        else:
            yield self._fold(path, ref, self._read(ref, None, path), ref.expert)

    def _fold(self, path: str, ref: TensorRef, weight: Float[Tensor, "o i"], expert: int | None) -> Tensor:
        location, site = self.locations[path], self._site(path, lambda: weight)
        affine = Affine([site], torch.promote_types(weight.dtype, torch.float32), weight.device, expert)
        fused = location.target.experts
        if (fused or not location.bias) and affine.bias(None, lambda: weight) is not None:
            why = "this model has no bias to hold it\n  from_pretrained would drop one in silence: keep the adapter"
            why += ", or merge in memory"
            if fused:
                why = "an expert's bias would be weighted as its output is\n  keep the adapter"
            raise CheckpointError(f"{location.target.path}: {site.cfg.variant!r} adds a constant there, and {why}")
        reads = site.module.reads
        affine.prepare()
        dtype = DTYPES[self._base.dtype(ref.key)]
        # Where a column of W' needs that column of W alone, and nobody reads W again, the result takes W's own memory.
        in_place = affine.is_columnwise() and site.module.reads == reads and weight.dtype == dtype
        site.module.sealed = in_place
        out = weight if in_place else torch.empty_like(weight, dtype=dtype)  # (d_out, d_in)

        def check(columns: Tensor) -> None:
            if not fits(columns, dtype):
                raise BaseModelError(
                    f"{location.target.path}: merged numbers are NaN or infinite in {dtype_name(dtype)}\n"
                    f"  check the adapter's values and those of {ref.key}"
                )

        affine.write(weight, out, check)
        return out.mT.contiguous() if ref.transposed else out

    def _merged_bias(self, path: str, ref: TensorRef) -> Iterator[Tensor]:
        location, fused = self.locations[path], bool(self.locations[path].target.experts)
        weight_ref = location.weight[ref.expert or 0]
        bias = self._read(ref, None, path)  # (d_out,), or (experts, d_out)
        site = self._site(path, lambda: self._read(weight_ref, 0 if fused else None, path))
        for row in bias if bias.ndim == 2 else [bias]:
            site.module.bias = None if fused else row  # experts' are outside of what a variant sees
            affine = Affine([site], torch.promote_types(row.dtype, torch.float32), row.device)
            new = affine.bias(row, lambda: site.module.weight)
            assert new is not None
            if not fits(new, bias.dtype):
                raise BaseModelError(
                    f"{location.target.path}: the merged bias holds a NaN or an infinity\n"
                    f"  does it in the base? Else take a smaller scale, or an earlier file of the adapter"
                )
            yield new.to(bias.dtype)

    def _unadapted(self, ref: TensorRef) -> Iterator[Tensor]:
        """A weight that no adapter is on, dequantised or as the adapter's base computes with it."""
        weight = self._read(ref, None, None).to(DTYPES[self._base.dtype(ref.key)])
        yield weight.mT.contiguous() if ref.transposed else weight

    def _read(self, ref: TensorRef, index: int | None, path: str | None, quantize: bool = False) -> Tensor:
        """A matrix (d_out, d_in) or a bias as the merge starts from it, in memory of its own."""
        if ref.key in self._base.packed:
            weight, fingerprint = unpack(self._base.headers, self._base.packed[ref.key])
        else:
            weight = self._base.read(ref.key, index)
            weight = weight.mT if ref.transposed else weight
            if not (quantize or ref.key in self._quantized):
                return weight
            dtype = getattr(torch, self._quantization.weight_dtype or self._file.base.dtype)
            weight, fingerprint = as_trained(weight, self._quantization, dtype)
        # The codes' dtype may differ (quant_storage), their elements and the scales' may not.
        if path is not None and fingerprint[1:] != self._file.base.fingerprint[path][1:]:
            self._tell_other_base(path)
        return weight

    # ---- the files beside the tensors

    def write_config(self, folder: Path) -> None:
        """config.json without what isn't true any more, and the index."""
        config = self._base.config
        if config is not None:
            if self._base.packed:  # they are written dense
                config = {key: value for key, value in config.items() if key != "quantization_config"}
            if self._untied:
                nested = {k: {**v, "tie_word_embeddings": False} for k, v in config.items() if k == "text_config"}
                config |= {**nested, "tie_word_embeddings": False}
            write_json(folder / "config.json", config)
        if (self._base.path / INDEX).exists():
            tensors = [(tensor, shard.name) for shard in self.shards for tensor in shard.tensors]
            parameters = sum(torch.Size(tensor.shape).numel() for tensor, _ in tensors)
            sizes = {"total_parameters": parameters, "total_size": sum(tensor.size for tensor, _ in tensors)}
            names = {tensor.key: name for tensor, name in sorted(tensors, key=lambda pair: pair[0].key)}
            write_json(folder / INDEX, {"metadata": sizes, "weight_map": names})
