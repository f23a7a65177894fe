"""A base model as a folder on disk: which of its tensors is which layer's weight, read one tensor at a time.

A layer's path is not always its key: transformers renames and regroups as it loads (its conversion mapping), fuses the
experts of a block, splits a fused tensor by rows, and leaves out a head that is tied to the embedding. What the
folder's config describes is built on the meta device, without memory, and the keys are led to it as `from_pretrained`
would.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.layer import BaseLayer, find_layers, layer_of
from ..base.storage import spread_places
from ..core.names import file_key
from ..core.targets import Target
from ..dtypes import STORAGE_DTYPES, dtype_name
from ..errors import CheckpointError, QuantizedWeightError
from ..io.keys import resolve
from ..io.safetensors import DTYPES, INDEX, PICKLES, Header, read_json, read_shards
from .bnb_files import Packed, find_packed
from .skeleton import skeleton

# Conversions of transformers that, along the first dimension, move rows and change no number.
_MOVE_ROWS = ("Chunk", "Split", "Concatenate", "Interleave")
COPY = 8 << 20  # bytes that are copied at a time


@dataclass(frozen=True)
class TensorRef:
    """A weight or a bias of a layer on disk, or a part: a tensor of the layer, of one of its experts, or some rows."""

    key: str
    expert: int | None = None
    transposed: bool = False  # each matrix lies as (d_in, d_out)
    rows: range | None = None  # of the tensor, those that are this layer's: it may hold several layers
    positions: range | None = None  # the rows of the layer's weight that they are, where it lies in several tensors


@dataclass(frozen=True)
class LayerLocation:
    """The tensors of a layer on disk: several if its experts are stored one by one, or its rows in parts."""

    target: Target
    weight: list[TensorRef]
    bias: list[TensorRef]
    module_key: str  # the module key of the weight
    tied_to: list[str]  # the module keys of what shares the weight, such as the embedding


class BaseFolder:
    """A folder with safetensors files, and a config if it is a transformers model.

    Raises:
        CheckpointError: for a folder that isn't one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder\n  a base is a folder with config and safetensors files")
        index, single = path / INDEX, path / "model.safetensors"
        if index.exists() and single.exists():
            problem = f"{path} has both {single.name} and {index.name}, and they may be two models"
            raise CheckpointError(f"{problem}\n  move one away; from_pretrained reads the single file")
        if not (index.exists() or single.exists()):
            pickles = sorted(file.name for file in path.iterdir() if file.name.endswith(PICKLES))
            pickled = f"it has {pickles[0]}, a pickle, which is never opened: " if pickles else ""
            problem = f"{path} has neither {single.name} nor {index.name}"
            raise CheckpointError(f"{problem}\n  {pickled}save the model with save_pretrained")
        self.headers: dict[str, Header] = read_shards(path)  # by key: the header of its file
        has_config = (path / "config.json").exists()
        self.config: dict[str, Any] | None = read_json(path / "config.json") if has_config else None
        self.packed: dict[str, Packed] = find_packed(self.headers)
        self.model = None if self.config is None else skeleton(path, self.config, len(self.headers))
        self._name = path.name if self.model is None else type(self.model).__name__
        self._conversions()
        self._by_key = self._module_keys()
        self._owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)  # several of a tied parameter
        for module_path, module in [] if self.model is None else self.model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                self._owners[id(parameter)].append((module, file_key(module_path, name)))

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor; for a quantised one, that of the weight that it stands for."""
        return self.packed[key].shape if key in self.packed else self.headers[key].entries[key].shape

    def dtype(self, key: str) -> str:
        """The dtype of a tensor, by its name in a header; for a quantised one, that in which it is written dense."""
        if key not in self.packed:
            return self.headers[key].entries[key].dtype
        # 8-bit files don't say theirs: it is that of the first floating matrix, such as the embedding.
        matrices = (h.entries[k].dtype for k, h in self.headers.items() if len(h.entries[k].shape) == 2)
        floating = (name for name in matrices if DTYPES.get(name) in STORAGE_DTYPES)
        dtype = self.packed[key].dtype
        return next(floating, "F32") if dtype is None else next(name for name in DTYPES if DTYPES[name] == dtype)

    def read(self, key: str, index: int | None = None) -> Tensor:
        """A floating tensor, or one matrix of those that it stacks, in memory of its own."""
        header = self.headers[key]
        if DTYPES.get(header.entries[key].dtype) not in STORAGE_DTYPES:
            problem = f"{self.path}: {key} is stored as {header.entries[key].dtype}, which isn't a plain weight"
            raise QuantizedWeightError(f"{problem}\n  use the 16-bit checkpoint, or one that bitsandbytes quantised")
        with header.path.open("rb", buffering=0) as file:
            return header.tensor(file, key, index)

    def matrix(self, ref: TensorRef, index: int | None = None) -> Tensor:
        """A floating weight (d_out, d_in) or bias (d_out,), those of its rows that `ref` has, or one of its experts."""
        tensor = self.read(ref.key, index)
        tensor = tensor if ref.rows is None else tensor[as_slice(ref.rows)]
        return tensor.mT if ref.transposed else tensor

    def assembled(self, refs: Sequence[TensorRef]) -> Tensor:
        """A weight or a bias that lies in several tensors, as one."""
        order = torch.tensor([row for ref in refs for row in ref.positions or ()])
        return torch.cat([self.matrix(ref) for ref in refs])[order.argsort()]

    def is_stored(self, key: str) -> bool:
        """True if the folder has the tensor of this module key, under whatever name."""
        return key in self._by_key

    def is_read_as(self, key: str) -> bool:
        """True if from_pretrained takes a tensor of this name for the module's of the same name."""
        return self.model is None or self._rename(key)[0] == key

    def shared(self) -> Iterator[list[str]]:
        """The module keys of each parameter that several modules share."""
        return ([key for _, key in owners] for owners in self._owners.values() if len(owners) > 1)

    def chunks(self, key: str) -> Iterator[bytes]:
        """The bytes of a tensor, COPY at a time."""
        path, entry = self.headers[key].path, self.headers[key].entries[key]
        with path.open("rb") as file:
            file.seek(entry.start)
            for start in range(entry.start, entry.stop, COPY):
                size = min(COPY, entry.stop - start)
                if len(chunk := file.read(size)) < size:
                    raise CheckpointError(f"{path} became shorter while it was read")
                yield chunk

    def samples(self, weight: Sequence[TensorRef]) -> list[Any]:
        """The fingerprint of an unquantised weight, as `base_record` takes it from a live layer: dtype, elements."""
        first = self.headers[weight[0].key].entries[weight[0].key]
        dtype, width = DTYPES.get(first.dtype, torch.uint8), first.shape[-1]
        in_rows = weight[0].rows is not None
        numel = torch.Size(first.shape).numel()  # of one expert where they are stored one by one
        total = sum(len(ref.rows or ()) for ref in weight) * width if in_rows else numel * len(weight)
        values = []
        for place in spread_places(total):  # experts that are stored one by one count as stacked
            if in_rows:
                row, column = divmod(place, width)
                ref = next(ref for ref in weight if ref.positions is None or row in ref.positions)
                assert ref.rows is not None
                offset = ref.rows[row if ref.positions is None else ref.positions.index(row)] * width + column
            else:
                ref, offset = weight[place // numel], place % numel
            header = self.headers[ref.key]
            with header.path.open("rb", buffering=0) as file:
                file.seek(header.entries[ref.key].start + offset * dtype.itemsize)
                values.append(float(torch.frombuffer(bytearray(file.read(dtype.itemsize)), dtype=dtype)))
        return [dtype_name(dtype), *values]

    def find(self, file: Path, paths: Iterable[str]) -> dict[str, LayerLocation]:
        """The location of each of these paths in the file. Raises CheckpointError unless the folder has all."""
        modules, paths = self._modules(), list(paths)
        bare: dict[str, BaseLayer] = {}  # matrices that are parameters of another module, as nn.MultiheadAttention's
        if not set(paths) <= modules.keys():
            bare = {path: layer for path, layer in find_layers(modules).items() if layer.kind.prefix}
        mapping = resolve(file, paths, {*modules, *bare}, self._name)
        return {
            file_path: self._locate(path, bare.get(path) or layer_of(modules[path], path), modules.get(path))
            for file_path, path in mapping.items()
        }

    def _modules(self) -> dict[str, nn.Module]:
        """The layers; without a config each matrix `<path>.weight` is taken for a linear layer's (d_out, d_in)."""
        if self.model is not None:
            return dict(self.model.named_modules())
        modules: dict[str, nn.Module] = {}
        for key in self.headers:
            if key.endswith(".weight") and len(self.shape(key)) == 2:
                d_out, d_in = self.shape(key)
                bias = key.removesuffix("weight") + "bias" in self.headers
                modules[key.removesuffix(".weight")] = nn.Linear(d_in, d_out, bias, device="meta")
        return modules

    def _locate(self, path: str, layer: BaseLayer | None, module: nn.Module | None) -> LayerLocation:
        if layer is None:
            raise CheckpointError(f"{path} of {self._name} is no linear layer, and no experts: {type(module).__name__}")
        if layer.kind.prefix and layer.experts:
            raise CheckpointError(
                f"{path} of {self._name} are experts' matrices: merge in memory, with lora_lite.merge"
            )
        key = path if layer.kind.prefix else file_key(path, layer.kind.weight)
        tied = [other for owner, other in self._owners.get(id(layer.stored), []) if owner is not layer.module]
        stored = next(filter(self.is_stored, (key, *tied)), key)  # of tensors that are shared, a file holds one
        bias = [] if layer.bias is None else self._refs(file_key(path, layer.kind.bias))
        return LayerLocation(Target.of(layer), self._weight_refs(stored, layer), bias, key, tied)

    def _refs(self, key: str) -> list[TensorRef]:
        if key not in self._by_key:
            problem = f"{self.path} has no tensor for {key} of {self._name} by itself"
            raise CheckpointError(f"{problem}\n  its own keys are like {', '.join(list(self.headers)[:3])}")
        return self._by_key[key]

    def _weight_refs(self, key: str, layer: BaseLayer) -> list[TensorRef]:
        """The tensors of a weight, in the shapes that the layer has."""
        refs = self._refs(key)
        if refs[0].rows is not None:
            d_out, widths = sum(len(ref.rows or ()) for ref in refs), {self.shape(ref.key)[1:] for ref in refs}
            if layer.experts or layer.transposed or (d_out, widths) != (layer.d_out, {(layer.d_in,)}):
                names = ", ".join(ref.key for ref in refs)
                problem = f"{key} is {d_out} rows of {names} {' '.join(map(str, widths))}"
                raise CheckpointError(f"{self.path}: {problem}; wanted {(layer.d_out, layer.d_in)}")
            return refs
        if [ref.expert for ref in refs] not in ([None], list(range(layer.experts))):
            raise CheckpointError(f"{self.path}: {key} has {len(refs)} experts there; wanted {layer.experts}")
        is_single = refs[0].expert is None  # experts that are stored one by one always lie as (d_out, d_in)
        transposed = layer.transposed and is_single
        stack = (layer.experts,) if layer.experts and is_single else ()
        wanted = (*stack, layer.d_in, layer.d_out) if transposed else (*stack, layer.d_out, layer.d_in)
        for ref in refs:
            if self.shape(ref.key) != wanted:
                raise CheckpointError(f"{self.path}: {ref.key} is {self.shape(ref.key)}; wanted {wanted}")
        return [TensorRef(ref.key, ref.expert, transposed) for ref in refs]

    def _conversions(self) -> None:
        """The renamings and conversions of transformers as it loads such a model, and the model's own tensors."""
        if self.model is None:
            return
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(self.model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._state = self.model.state_dict()

    def _module_keys(self) -> dict[str, list[TensorRef]]:
        """Module key -> its tensors on disk; no entry for a parameter that is computed from several tensors."""
        if self.model is None:
            return {key: [TensorRef(key)] for key in self.headers}
        from transformers.core_model_loading import dot_natural_key

        # Experts that are stacked leave each file's tensor a matrix that can be merged.
        stacking = {
            c.source_patterns[0]
            for c in self._converters
            if len(c.source_patterns) == len(c.target_patterns) == 1
            and [(type(op).__name__, getattr(op, "dim", None)) for op in c.operations] == [("MergeModulelist", 0)]
        }
        refs: dict[str, list[TensorRef]] = defaultdict(list)
        sources: dict[str, list[tuple[str, str]]] = defaultdict(list)  # of a conversion's first target: (pattern, key)
        for key in sorted(self.headers, key=dot_natural_key):
            name, pattern = self._rename(key)
            if pattern is None:
                refs[name].append(TensorRef(key))
            elif pattern in stacking:  # the last number in a key is the expert's, earlier ones are blocks'
                refs[name].append(TensorRef(key, int(re.findall(r"\.(\d+)(?=\.)", key)[-1])))
            elif name in self._state:
                sources[name].append((pattern, key))
        for name, keys in sources.items():
            refs.update(self._by_rows(name, keys))
        return {name: sorted(experts, key=lambda ref: ref.expert or 0) for name, experts in refs.items()}

    def _rename(self, key: str) -> tuple[str, str | None]:
        """The module key of a file's key, as from_pretrained has it, and the pattern of its conversion, if any."""
        from transformers.core_model_loading import rename_source_key

        model: Any = self.model
        prefix, state = model.base_model_prefix, self._state
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, state)
        if name not in state and key in state:  # it has its name already
            name, pattern = rename_source_key(key, [], [], prefix, state)
        return name, pattern

    def _by_rows(self, name: str, sources: Sequence[tuple[str, str]]) -> dict[str, list[TensorRef]]:
        """Module key -> the rows of the file's tensors that it is made of; nothing unless a conversion only moves rows.

        transformers' own conversion is run, on the rows' numbers in place of the rows.
        """
        conversion = {pattern: c for c in self._converters for pattern in c.source_patterns}[sources[0][0]]
        moves_rows = all(
            type(op).__name__ in _MOVE_ROWS and getattr(op, "dim", None) == 0 for op in conversion.operations
        )
        shapes = [self.shape(key) for _, key in sources]
        plain = all(len(shape) in (1, 2) and 0 not in shape for shape in shapes)  # 0 columns: any number of rows
        if not (moves_rows and plain) or any(key in self.packed for _, key in sources):
            return {}
        model: Any = self.model
        converter: Any = deepcopy(conversion)
        starts, numbered = {}, 0
        for pattern, key in sources:
            starts[key] = numbered
            converter.add_tensor(name, key, pattern, torch.arange(numbered, numbered := numbered + self.shape(key)[0]))
        try:
            moved = converter.convert(name, model=model, config=model.config)
        except Exception:  # of any kind: the file's tensors may be other ones than the conversion's
            return {}
        numbers = {target: (rows[0] if isinstance(rows, list) else rows) for target, rows in moved.items()}
        every = torch.cat(list(numbers.values()))
        if len(every.unique()) < len(every):  # a row of two layers can't be merged into
            return {}
        refs: dict[str, list[TensorRef]] = {}
        for target, rows in numbers.items():
            parts = []
            for key, start in starts.items():
                places = ((rows >= start) & (rows < start + self.shape(key)[0])).nonzero().flatten()
                if len(places):
                    parts.append((key, _as_range(rows[places] - start), _as_range(places), len(places) == len(rows)))
            if all(of and places for _, of, places, _ in parts):
                refs[target] = [
                    TensorRef(key, rows=of, positions=None if is_whole else places)
                    for key, of, places, is_whole in parts
                ]
        return refs


def as_slice(rows: range) -> slice:
    """The rows of a tensor, as an index."""
    return slice(rows.start, rows.stop, rows.step)


def _as_range(numbers: Tensor) -> range | None:
    """Numbers at equal steps upwards; None for others."""
    first, last = int(numbers[0]), int(numbers[-1])
    step = int(numbers[1]) - first if len(numbers) > 1 else 1
    rows = range(first, last + 1, step) if step > 0 else range(0)
    return rows if numbers.tolist() == list(rows) else None
