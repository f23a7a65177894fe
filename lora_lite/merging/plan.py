"""The plan of a merge on disk: every tensor of the output, copied or computed, in the shards of the base. It is made
from headers, so that what can't be is known before the first byte is written."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..base.fingerprint import same_weight, tell_other_base
from ..base.storage import DENSE, Quantization
from ..core.effective import Affine, in_order
from ..core.names import file_key
from ..core.resolve import make_stand_in
from ..core.state import Site
from ..errors import CheckpointError, TargetError, brief
from ..io.raw import same_tensor
from ..io.safetensors import DTYPES, INDEX, write_json
from .adapter_source import AdapterSource, AdapterTensors
from .base_folder import BaseFolder, TensorRef, as_slice
from .bnb_files import as_trained, unpack
from .merged_weights import check_fits, fold_norm
from .shards import OutputTensor, Shard, bytes_of, write_index


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


Rows = tuple[TensorRef, Callable[[Tensor, int | None], Tensor]]
"""Some rows of a tensor, and what becomes of them; of a stack, of the matrix at an index."""


class MergePlan:
    """Every tensor of the output, in the shards of the base. Raises all that can be told from headers."""

    def __init__(self, file: AdapterSource, base: BaseFolder, base_weights: str, untie: bool, verify: bool) -> None:
        self._file, self._base, self._verify, self._warned = file, base, verify, False
        self._tensors: AdapterTensors | None = None
        self._planned: dict[str, OutputTensor] = {}
        self._whole: dict[tuple[str, int | None], Tensor] = {}  # W' of the last layer or expert that lies in parts
        self._rows: dict[str, list[Rows]] = {}  # key of a tensor that holds rows of several layers -> those that change
        # The order is that of the errors, and of the cost: first what headers tell of the file, then of the base.
        self.locations = base.find(file.path, file.targets)
        self._configs = file.configs(self.locations, base.path)
        together = [path for path in self.locations if self._is_together(path)]
        if together and not any(self.locations[path].tied_to for path in together):
            problem = f"its adapter acts on all that share the weight of {together[0]}: in {base.path} nothing does"
            raise TargetError(f"{file.path}: {problem}\n  merge it into a base whose embedding and head are tied")
        self._check_ties()
        self._untied = self._untied_keys(untie)
        self._reads = any(s.base_weight != "unused" for path in self.locations for s in self._sites(path))
        # A few bytes of each weight: a wrong base is told before the first large tensor is read.
        self._quantization = (file.base and file.base.quantization) or Quantization("unknown", "")
        self._check_base(base_weights)
        # Layers that were quantised in training go through the quantiser as they are read, adapted or not. The adapted
        # ones are planned first: of the others, all that is left is written without an adapter.
        modules = self._quantization.modules if base_weights == "as_trained" else []
        quantized = [ref for location in base.find(file.path, modules).values() for ref in location.weight]
        self._quantized = {ref for ref in quantized if ref.key not in base.packed}
        if split := [ref.key for ref in quantized if ref.positions is not None]:
            problem = f"a layer that was quantised in training lies in several tensors, such as {split[0]}"
            raise CheckpointError(f'{base.path}: {problem}\n  use base_weights="original", or merge in memory')
        for path, location in self.locations.items():
            for ref in location.weight:
                key = location.module_key if location.module_key in self._untied.get(ref.key, ()) else ref.key
                # What shares the adapter has the same tensor; a file may hold that twice.
                alike = [base.keys_of(other) for other in location.tied_to] if self._is_together(path) else []
                for name in dict.fromkeys((key, *chain(*alike))):
                    self._plan(name, ref, partial(self._merged, path, ref), partial(self._merged_rows, path, ref))
            # An adapter on each expert's matrix leaves the biases, which come after the product, as they are.
            for ref in () if all(site.stacked for site in self._sites(path)) else location.bias:
                self._plan(ref.key, ref, partial(self._merged_bias, path, ref), partial(self._bias_rows, path, ref))
        self.merged = len(self._planned) + len(self._rows)
        for ref in (*quantized, *map(TensorRef, base.packed)):
            if ref.key not in self._planned and ref not in (known for known, _ in self._rows.get(ref.key, ())):
                self._plan(ref.key, ref, partial(self._unadapted, ref), partial(self._unadapted_rows, ref))
        for ref in [location.weight[0] for location in self.locations.values() if location.tied_to]:
            for key in self._untied.get(ref.key, ()):
                if key not in self._planned:
                    self._plan(key, ref, partial(self._unadapted, ref))
        for key, parts in self._rows.items():
            self._plan(key, TensorRef(key), partial(self._composed, key, parts))
        self.shards = self._make_shards()
        # Last, as it reads the whole file; until here the sites have no tensors.
        self._tensors = file.read(self.locations)

    def _sites(self, path: str, load: Callable[[], Tensor] = torch.Tensor) -> list[Site]:
        """The adapter at one layer, a site for each method, on a stand-in that asks `load` for the weight."""
        target, scale, tensors = self.locations[path].target, self._file.scale, self._tensors
        module, sites = _StandIn(target.d_in, target.d_out, load), []
        for number, cfg in enumerate(self._configs[path], 1):
            site = make_stand_in(target, cfg, module, {}, scale, number=number)
            if tensors is not None:
                # An expert's is outside of what a variant sees; a difference from the base's is of this one.
                biases = [] if target.experts else self.locations[path].bias
                if biases:
                    module.bias = self._bias(path, biases[0])
                values, shared = tensors.at(path, site), tensors.shared(path, number)
                _release([site])
                site = make_stand_in(target, cfg, module, values, scale, shared=shared, number=number)
            sites.append(site)
        return in_order(sites)

    def _is_together(self, path: str) -> bool:
        choices = {cfg.tied_weights for cfg in self._configs[path]}
        is_tied = bool(self.locations[path].tied_to)
        return choices <= {"together", "as_base"} and (is_tied or "as_base" not in choices)

    def _check_ties(self) -> None:
        """TargetError where one method acts on all that share a weight, and another on one of them alone."""
        keys = {location.module_key for location in self.locations.values()}
        for path, location in self.locations.items():
            choices = {cfg.tied_weights in ("together", "as_base") for cfg in self._configs[path]}
            if location.tied_to and True in choices and (False in choices or keys & set(location.tied_to)):
                problem = f"one method acts on all that share the weight of {path}, and another on a part of them"
                raise TargetError(f"{self._file.path}: {problem}\n  keep the adapter attached")

    def _untied_keys(self, untie: bool) -> dict[str, list[str]]:
        """Key of a tensor that several modules share -> the keys under which it is written for the others, too.

        Raises TargetError if it is to stay tied, or can't be untied.
        """
        untied: dict[str, list[str]] = {}
        for in_file, location in self.locations.items():
            if not location.tied_to or self._is_together(in_file):
                continue
            path, base = location.target.path, self._base
            problem = f"{path}: its weight is also {brief(', '.join(location.tied_to))}, which would change with it"
            missing = [key for key in (location.module_key, *location.tied_to) if not base.is_stored(key)]
            if not untie:
                raise TargetError(f"{problem}\n  use untie=True, and both are written untied, or leave the layer out")
            if location.weight[0].rows is not None or not all(map(base.is_read_as, missing)):
                raise TargetError(f"{problem}\n  it can't be written untied: leave the layer out, or keep the adapter")
            untied[location.weight[0].key] = missing
        return untied

    # ---- is it the base that the adapter was trained on?

    def _check_base(self, base_weights: str) -> None:
        """Compare what can be compared before it is read. A packed weight is compared in `_read`, as it is unpacked."""
        file, base, quantized = self._file, self._base, set(self._quantization.modules)
        self._check_copies()
        if file.base is None:
            return
        dense = {path: loc for path, loc in self.locations.items() if loc.weight[0].key not in base.packed}
        for path, location in dense.items():
            if path not in quantized and not same_weight(base.samples(location), file.base.fingerprint[path]):
                self._tell_other_base(path)
        trained_on = {path for path in dense.keys() & quantized if dense[path].weight[0].positions is None}
        if base_weights == "as_trained" or not trained_on:
            return
        # Experts are quantised as a stack, and may lie one by one.
        comparable = sorted(path for path in trained_on if not dense[path].target.experts)
        if self._reads:
            self._tell_other_base(min(trained_on))  # the original weights are not those that the method has seen
        elif self._quantization.method != "unknown" and comparable:
            # Quantising takes time, so one layer stands for all: the smallest.
            path = min(comparable, key=lambda path: dense[path].target.d_in * dense[path].target.d_out)
            self._read(dense[path].weight[0], None, path, quantize=True)

    def _check_copies(self) -> None:
        """CheckpointError for a tensor of the base in a PEFT folder that isn't this base's."""
        file, base = self._file, self._base
        for ours, key in file.copies.items():
            in_file, _, name = ours.rpartition(".")
            location = self.locations[in_file]
            refs = {"weight": location.weight, "bias": location.bias}.get(name, [])
            known = len(refs) == 1 and refs[0].rows is None and refs[0].key not in base.packed
            if not (known and same_tensor(base.read(refs[0].key), file.header, key, DENSE)):
                relation = "is not" if known else "can not be compared with"
                raise CheckpointError(
                    f"{file.path}: {key} {relation} {file_key(location.target.path, name)} of {base.path}\n"
                    f"  the adapter belongs to another base, or one trained with it: merge it there"
                )

    def _tell_other_base(self, path: str) -> None:
        """Raise or warn (once): the weight of this layer is not the one that the adapter was trained on."""
        file = self._file
        if not self._warned or (self._reads and self._verify):
            self._warned = True
            message = f"{path} of {file.path} was trained on another weight than that in {self._base.path}"
            cure = 'use base_weights="as_trained", the folder it was trained on, or verify_base=False'
            message += f"\n  file: {file.base}"
            variants = " + ".join(cfg.variant for cfg in self._configs[path])
            tell_other_base(message, variants, self._reads, self._verify, cure)

    def _plan(
        self,
        key: str,
        ref: TensorRef,
        matrices: Callable[[], Iterator[Tensor]],
        rows: Callable[[Tensor, int | None], Tensor] | None = None,
    ) -> None:
        if ref.rows is not None and rows is not None:
            self._rows.setdefault(key, []).append((ref, rows))
            return
        if key in self._planned:
            problem = f"two of its layers go into the one tensor {key} of {self._base.path}"
            raise CheckpointError(f"{self._file.path}: {problem}\n  is this the base that it was trained on?")
        dtype, shape = self._base.dtype(ref.key), self._base.shape(ref.key)
        size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        self._planned[key] = OutputTensor(key, dtype, shape, size, lambda: map(bytes_of, matrices()))

    def _make_shards(self) -> list[Shard]:
        """Each tensor stays in its shard; an untied head comes after its embedding."""
        base = self._base
        parts = {part for packed in base.packed.values() for part in packed.parts.values()}
        shards: dict[str, Shard] = {}
        for key, header in base.headers.items():
            shard = shards.setdefault(header.path.name, Shard(header.path.name))
            if key in self._planned:
                shard.tensors.append(self._planned[key])
            elif key not in parts:
                shard.tensors.append(base.copied(key))
            shard.tensors += [self._planned[name] for name in self._untied.get(key, ())]
        written = {tensor.key for shard in shards.values() for tensor in shard.tensors}
        assert self._planned.keys() <= written, "a merged tensor is in no shard"
        return list(shards.values())

    # ---- what is computed

    def _merged(self, path: str, ref: TensorRef) -> Iterator[Tensor]:
        """W' of a layer, or of each of its experts, as it lies on disk."""
        if (offset := self.locations[path].offset) is not None:
            weight = self._read(ref, None, path)
            has_bias = bool(self.locations[path].bias)
            sites = self._sites(path, lambda: weight)
            new, _ = fold_norm(sites, weight.double() + offset, None, has_bias)  # (d,)
            yield check_fits(path, (new - offset).to(weight.dtype))
            return
        experts = self.locations[path].target.experts if ref.expert is None else 0  # those that the tensor stacks
        for i in range(experts) if experts else [None]:  # one matrix in memory at a time, whatever their number
            yield self._fold(path, ref, self._read(ref, i, path), ref.expert if i is None else i)

    def _composed(self, key: str, parts: list[Rows]) -> Iterator[Tensor]:
        """A tensor that holds rows of several layers, each computed by itself."""
        shape = self._base.shape(key)
        for index in range(shape[0]) if len(shape) == 3 else [None]:
            tensor = self._base.read(key, index)
            for ref, compute in parts:
                assert ref.rows is not None
                rows = tensor[as_slice(ref.rows)]
                rows.copy_(compute(rows, index))
            yield tensor

    def _merged_rows(self, path: str, ref: TensorRef, rows: Tensor, index: int | None) -> Tensor:
        """W' of a layer whose W are these rows; of one that lies in several tensors, the part that goes here."""
        expert = ref.expert if index is None else index
        if ref.positions is None:
            return self._fold(path, ref, self._read(ref, None, path, rows=rows), expert)
        if (part := (path, expert)) not in self._whole:
            self._whole.clear()  # one at a time; an expert's gate and up mostly follow each other in the file
            whole = self._base.assembled(self.locations[path].weight, ref.expert, index)
            self._whole[part] = self._fold(path, ref, whole, expert)
        return self._whole[part][as_slice(ref.positions)]

    def _bias_rows(self, path: str, ref: TensorRef, rows: Tensor, index: int | None) -> Tensor:
        new = next(self._merged_bias(path, ref))
        return new if ref.positions is None else new[as_slice(ref.positions)]

    def _unadapted_rows(self, ref: TensorRef, rows: Tensor, index: int | None) -> Tensor:
        return self._read(ref, None, None, rows=rows)

    def _fold(self, path: str, ref: TensorRef, weight: Float[Tensor, "o i"], expert: int | None) -> Tensor:
        location = self.locations[path]
        # A view asks for its expert's matrix: whichever that is, it gets this one.
        sites = self._sites(path, lambda: weight if expert is None else weight.expand(expert + 1, *weight.shape))
        module = sites[0].module
        affine = Affine(sites, torch.promote_types(weight.dtype, torch.float32), weight.device, expert)
        fused = location.target.experts
        if (fused or not location.bias) and affine.bias(None, lambda: weight) is not None:
            problem = f"{location.target.path}: {' + '.join(s.cfg.variant for s in sites)!r} adds a constant there"
            why, cure = "this model has no bias to hold it", "keep the adapter, or merge in memory"
            if fused:  # elsewhere from_pretrained would drop a new bias in silence
                why, cure = "an expert's bias would be weighted as its output is", "keep the adapter"
            raise CheckpointError(f"{problem}, and {why}\n  {cure}")
        affine.prepare()
        reads = module.reads
        affine.prepare()  # what a method remembers by now it doesn't read again
        dtype = DTYPES[self._base.dtype(ref.key)]
        # Where a column of W' needs that column of W alone, and nobody reads W again, the result takes W's own memory.
        in_place = affine.is_columnwise() and module.reads == reads and weight.dtype == dtype
        module.sealed = in_place
        out = weight if in_place else torch.empty_like(weight, dtype=dtype)  # (d_out, d_in)
        check_fits(location.target.path, affine.write(weight, out))
        _release(sites)
        return out.mT.contiguous() if ref.transposed else out

    def _merged_bias(self, path: str, ref: TensorRef) -> Iterator[Tensor]:
        location, fused = self.locations[path], bool(self.locations[path].target.experts)
        weight_ref = location.weight[ref.expert or 0]
        bias = self._bias(path, ref)  # (*experts, d_out)

        def weight() -> Tensor:
            if weight_ref.positions is not None:
                return self._base.assembled(location.weight)
            return self._read(weight_ref, 0 if fused else None, path)

        sites = [site for site in self._sites(path, weight) if not site.stacked]
        module = sites[0].module
        for row in bias if bias.ndim == 2 else [bias]:
            module.bias = None if fused else row  # experts' are outside of what a variant sees
            affine = Affine(sites, torch.promote_types(row.dtype, torch.float32), row.device)
            new = affine.bias(row, lambda: module.weight)
            assert new is not None
            yield check_fits(location.target.path, new.to(bias.dtype))

    def _bias(self, path: str, ref: TensorRef) -> Tensor:
        """A layer's bias as the merge starts from it, or those of its experts that lie here."""
        return self._read(ref, None, path) if ref.positions is None else self._base.assembled(self.locations[path].bias)

    def _unadapted(self, ref: TensorRef) -> Iterator[Tensor]:
        """A weight that no adapter is on, dequantised or as the adapter's base computes with it."""
        weight = self._read(ref, None, None).to(DTYPES[self._base.dtype(ref.key)])
        yield weight.mT.contiguous() if ref.transposed else weight

    def _read(
        self, ref: TensorRef, index: int | None, path: str | None, quantize: bool = False, rows: Tensor | None = None
    ) -> Tensor:
        """A matrix (d_out, d_in) or a bias as the merge starts from it, in memory of its own; or these rows as such."""
        if ref.key in self._base.packed:
            weight, fingerprint = unpack(self._base.headers, self._base.packed[ref.key])
        else:
            weight = self._base.matrix(ref, index) if rows is None else rows
            if not (quantize or ref in self._quantized):
                return weight
            assert self._file.base is not None, "no record names a quantised layer"
            dtype = getattr(torch, self._quantization.weight_dtype or self._file.base.dtype)
            weight, fingerprint = as_trained(weight, self._quantization, dtype)
        record = self._file.base
        # The codes' dtype may differ (quant_storage), their elements and the scales' may not.
        if path is not None and record is not None and fingerprint[1:] != record.fingerprint[path][1:]:
            self._tell_other_base(path)
        return weight

    def write_config(self, folder: Path) -> None:
        """config.json without what isn't true any more, and the index."""
        base, config = self._base, self._base.config
        if config is not None:
            if self._base.packed:  # they are written dense
                config = {key: value for key, value in config.items() if key != "quantization_config"}
            # Where that would untie what a file holds once, from_pretrained tells untied weights by their numbers.
            stored = all(base.is_stored(key) or key in self._planned for keys in base.shared() for key in keys)
            if stored and any(location.tied_to for location in self.locations.values()):
                nested = {k: {**v, "tie_word_embeddings": False} for k, v in config.items() if k == "text_config"}
                config |= {**nested, "tie_word_embeddings": False}
            write_json(folder / "config.json", config)
        if (self._base.path / INDEX).exists():
            parameters = sum(torch.Size(tensor.shape).numel() for shard in self.shards for tensor in shard.tensors)
            write_index(folder, self.shards, parameters)


def _release(sites: Iterable[Site]) -> None:
    """Sites and their methods know each other: until Python looks for such rings of references, and a dozen of the
    largest tensors pass by then, they would hold their weight and what a method remembers of it."""
    for site in sites:
        site.method.sites.clear()
