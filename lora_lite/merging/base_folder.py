"""A base model as a folder on disk: which of its tensors is which layer's weight, read one tensor at a time.

A layer's path is not always its key: transformers renames and regroups as it loads (its conversion mapping), fuses the
experts of a block, splits and joins tensors by rows, and leaves out a head that is tied to the embedding. What the
folder's config describes is built on the meta device, without memory, and the keys are led to it as `from_pretrained`
would.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.layer import BaseLayer, find_layers, layer_of
from ..base.load import of_adapters
from ..base.probe import norm_offset
from ..base.storage import spread_places
from ..core.names import file_key
from ..core.targets import Target
from ..dtypes import STORAGE_DTYPES, dtype_name
from ..errors import CheckpointError, QuantizedWeightError
from ..io.keys import resolve
from ..io.safetensors import DTYPES, INDEX, PICKLES, Header, read_json, read_shards
from .bnb_files import Packed, find_packed
from .shards import OutputTensor
from .skeleton import skeleton

# Conversions of transformers that move whole rows and change no number.
_MOVE_ROWS = ("Chunk", "Split", "Concatenate", "Interleave", "MergeModulelist", "ErnieFuseAndSplitTextVisionExperts")
COPY = 8 << 20  # bytes that are copied at a time


@dataclass(frozen=True)
class TensorRef:
    """A weight or a bias of a layer on disk, or a part: a tensor of the layer, of one of its experts, or some rows."""

    key: str
    expert: int | None = None  # None where the tensor stacks all of them, too: then the rows are those of each
    transposed: bool = False  # each matrix lies as (d_in, d_out)
    rows: range | None = None  # of the tensor, those that are this layer's: it may hold several layers
    positions: range | None = None  # the rows of the layer's weight that they are, where it lies in several tensors


@dataclass(frozen=True)
class LayerLocation:
    """The tensors of a layer on disk: several if its experts are stored one by one, or its rows in parts."""

    target: Target
    layer: BaseLayer  # on the meta device
    weight: list[TensorRef]
    bias: list[TensorRef]
    module_key: str  # the module key of the weight
    tied_to: list[str]  # the module keys of what shares the weight, such as the embedding
    offset: float | None = None  # c of a norm y = (w + c) ⊙ n(x) + b; None of a layer with a matrix


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
        named = set() if self.model is None else {*self.model.state_dict()}
        if (buried := of_adapters(self.headers)) and not of_adapters(named):
            problem = f"{path} holds {len(buried)} tensors of an adapter beside the base, such as {buried[0]}"
            cure = "give the folder of the base; load(model, path, cfg=...) and save make a file of that adapter"
            raise CheckpointError(f"{problem}\n  {cure}")
        self._name = path.name if self.model is None else type(self.model).__name__
        self._conversions()
        self._grouped: dict[
            str, list[tuple[str, str]]
        ] = {}  # module key -> (pattern, key) of what its conversion takes
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
        tensor = tensor.flatten(1) if tensor.ndim > 2 else tensor  # a kernel (o, i, *k)
        tensor = tensor if ref.rows is None else tensor[as_slice(ref.rows)]
        return tensor.mT if ref.transposed else tensor

    def assembled(self, refs: Sequence[TensorRef], expert: int | None = None, index: int | None = None) -> Tensor:
        """A weight or a bias that lies in several tensors, as one; that of an expert, or at an index of its stacks."""
        parts = [ref for ref in refs if ref.expert == expert]
        order = torch.tensor([row for ref in parts for row in ref.positions or ()])
        return torch.cat([self.matrix(ref, index) for ref in parts])[order.argsort()]

    def is_stored(self, key: str) -> bool:
        """True if the folder has the tensor of this module key, under whatever name."""
        return bool(self._stored(key))

    def keys_of(self, key: str) -> list[str]:
        """The folder's keys of a module key."""
        return [ref.key for ref in self._stored(key)]

    def _stored(self, key: str) -> list[TensorRef]:
        """The tensors of a module key; none for a parameter that is computed from several tensors."""
        if key in self._grouped:
            self._by_key |= self._converted(key, self._grouped.pop(key))
        return self._by_key.get(key, [])

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

    def copied(self, key: str) -> OutputTensor:
        """The tensor as it is, for another folder."""
        entry = self.headers[key].entries[key]
        return OutputTensor(key, entry.dtype, entry.shape, entry.stop - entry.start, partial(self.chunks, key))

    def samples(self, location: LayerLocation) -> list[Any]:
        """The fingerprint of an unquantised weight, as `base_record` takes it from a live layer: dtype, elements."""
        shape, weight = tuple(location.layer.stored.shape), location.weight
        numel = torch.Size(shape).numel()
        size = numel // (location.target.experts or 1)  # elements of a matrix
        dtype = DTYPES.get(self.headers[weight[0].key].entries[weight[0].key].dtype, torch.uint8)
        values = []
        for place in spread_places(numel):
            expert, (row, column) = place // size, divmod(place % size, shape[-1])
            ref = next(r for r in weight if r.expert in (None, expert) and (r.positions is None or row in r.positions))
            if ref.rows is not None:
                row = ref.rows[row if ref.positions is None else ref.positions.index(row)]
            if ref.transposed != location.layer.transposed:  # not as the layer's own tensor lies
                row, column = column, row
            header = self.headers[ref.key]
            entry = header.entries[ref.key]
            stacked = 0 if ref.expert is not None else expert * torch.Size(entry.shape[-2:]).numel()
            with header.path.open("rb", buffering=0) as file:
                file.seek(entry.start + (stacked + row * entry.shape[-1] + column) * dtype.itemsize)
                values.append(float(torch.frombuffer(bytearray(file.read(dtype.itemsize)), dtype=dtype)))
        return [dtype_name(dtype), *values]

    def find(self, file: Path, paths: Iterable[str]) -> dict[str, LayerLocation]:
        """The location of each of these paths in the file. Raises CheckpointError unless the folder has all."""
        modules = self._modules()
        layers = {} if self.model is None else find_layers(modules)
        return {
            file_path: self._locate(path, layers.get(path) or layer_of(modules[path], path), modules.get(path))
            for file_path, path in resolve(file, paths, {*modules, *layers}, self._name).items()
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
        key = path if layer.kind.prefix else file_key(path, layer.kind.weight)
        tied = [other for owner, other in self._owners.get(id(layer.stored), []) if owner is not layer.module]
        stored = next(filter(self.is_stored, (key, *tied)), key)  # of tensors that are shared, a file holds one
        bias = [] if layer.bias is None else self._refs(file_key(path, layer.kind.bias))
        # A norm is so small that its own forward can be run: its numbers don't matter here.
        run = None if layer.kind.has_matrix else layer_of(deepcopy(layer.module).to_empty(device="cpu"), path)
        offset = None if run is None else norm_offset(run)
        return LayerLocation(Target.of(layer), layer, self._weight_refs(stored, layer), bias, key, tied, offset)

    def _refs(self, key: str) -> list[TensorRef]:
        if not (refs := self._stored(key)):
            problem = f"{self.path} has no tensor for {key} of {self._name} by itself"
            raise CheckpointError(f"{problem}\n  its own keys are like {', '.join(list(self.headers)[:3])}")
        return refs

    def _weight_refs(self, key: str, layer: BaseLayer) -> list[TensorRef]:
        """The tensors of a weight, in the shapes that the layer has."""
        refs, wanted = self._refs(key), tuple(layer.stored.shape)
        experts = list(dict.fromkeys(ref.expert for ref in refs))
        if experts not in ([None], list(range(layer.experts))):
            raise CheckpointError(f"{self.path}: {key} has {len(experts)} experts there; wanted {layer.experts}")
        is_stack = bool(layer.experts) and refs[0].expert is None
        wanted = wanted[1:] if layer.experts and not is_stack else wanted
        for expert in experts if refs[0].rows is not None else []:
            parts = [ref for ref in refs if ref.expert == expert]
            d_out, shapes = sum(len(ref.rows or ()) for ref in parts), {self.shape(ref.key) for ref in parts}
            fits = {(*shape[:-2], d_out, *shape[-1:]) for shape in shapes} == {wanted}
            if layer.transposed or not fits:
                names, widths = ", ".join(ref.key for ref in parts), " ".join(str(shape[1:]) for shape in shapes)
                problem = f"{key} is {d_out} rows of {names} {widths}"
                raise CheckpointError(f"{self.path}: {problem}; wanted {(layer.d_out, layer.d_in)}")
        for ref in refs if refs[0].rows is None else []:
            shape = (*wanted[:-2], *reversed(wanted[-2:])) if ref.transposed else wanted
            shape = (layer.d_out, layer.d_in) if ref.key in self.packed else shape
            if self.shape(ref.key) != shape:
                raise CheckpointError(f"{self.path}: {ref.key} is {self.shape(ref.key)}; wanted {shape}")
        return [replace(ref, transposed=layer.transposed != ref.transposed) for ref in refs]

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
        """Module key -> its tensors on disk, but for those that a conversion groups: it runs when one is asked for."""
        if self.model is None:
            return {key: [TensorRef(key)] for key in self.headers}
        from transformers.core_model_loading import dot_natural_key

        refs: dict[str, list[TensorRef]] = defaultdict(list)
        sources: dict[str, list[tuple[str, str]]] = defaultdict(list)  # of a conversion's first target: (pattern, key)
        for key in sorted(self.headers, key=dot_natural_key):
            name, pattern = self._rename(key)
            if pattern is None:
                refs[name].append(TensorRef(key))
            elif name in self._state:
                sources[name].append((pattern, key))
        several = [c for c in self._converters if len(c.target_patterns) > 1 or "*" in c.target_patterns[0]]
        patterns = {pattern for conversion in several for pattern in conversion.source_patterns}
        for name, keys in sources.items():
            if keys[0][0] in patterns:  # the names of its other targets are its own to tell
                refs |= self._converted(name, keys)
            else:  # as of experts, which may be many
                self._grouped[name] = keys
        return dict(refs)

    def _rename(self, key: str) -> tuple[str, str | None]:
        """The module key of a file's key, as from_pretrained has it, and the pattern of its conversion, if any."""
        from transformers.core_model_loading import rename_source_key

        model: Any = self.model
        prefix, state = model.base_model_prefix, self._state
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, state)
        if name not in state and key in state:  # it has its name already
            name, pattern = rename_source_key(key, [], [], prefix, state)
        return name, pattern

    def _converted(self, name: str, sources: Sequence[tuple[str, str]]) -> dict[str, list[TensorRef]]:
        """Module key -> the file's tensors that it is made of; nothing where a conversion computes new numbers.

        transformers' own conversion is run, on the rows' numbers in place of the rows.
        """
        conversion: Any = {pattern: c for c in self._converters for pattern in c.source_patterns}[sources[0][0]]
        shapes = {key: self.shape(key) for _, key in sources}
        if [type(op).__name__ for op in conversion.operations] == ["Transpose"]:
            (op,), ((key, shape), *others) = conversion.operations, shapes.items()
            if others or {op.dim0, op.dim1} != {len(shape) - 2, len(shape) - 1}:
                return {}
            return {name: [TensorRef(key, transposed=not (op.check_dims and shape == self._state[name].shape))]}
        moves_rows = all(type(op).__name__ in _MOVE_ROWS and getattr(op, "dim", 0) >= 0 for op in conversion.operations)
        # 0 columns: any number of rows. Of more dimensions, the rows are no matrices'.
        if not (moves_rows and all(0 < len(shape) < 4 and 0 not in shape for shape in shapes.values())):
            return {}
        model: Any = self.model
        converter: Any = deepcopy(conversion)
        numbered = 0
        for pattern, key in sources:
            rows = torch.Size(shapes[key][:-1] or shapes[key])  # (*experts, n)
            numbers = torch.arange(numbered, numbered := numbered + rows.numel())
            converter.add_tensor(name, key, pattern, numbers.view(rows))
        try:
            moved = converter.convert(name, model=model, config=model.config)
        except Exception:  # of any kind: the file's tensors may be other ones than the conversion's
            return {}
        targets = {target: (rows[0] if isinstance(rows, list) else rows) for target, rows in moved.items()}
        targets = {target: numbers for target, numbers in targets.items() if numbers.numel()}
        every = torch.cat([numbers.flatten() for numbers in targets.values()])
        if len(every.unique()) < len(every):  # a row of two layers can't be merged into
            return {}
        refs = {target: self._parts(numbers, shapes) for target, numbers in targets.items()}
        return {target: parts for target, parts in refs.items() if parts}

    def _parts(self, numbers: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> list[TensorRef]:
        """The file's tensors that have these rows (*experts, n), expert by expert; none if they lie at no equal steps.

        numbers     of the rows of all these tensors, one tensor after the other
        """
        d_out, flat, keys = numbers.shape[-1], numbers.flatten(), list(shapes)
        starts = torch.tensor([0, *(torch.Size(shape[:-1] or shape).numel() for shape in shapes.values())]).cumsum(0)
        tensor = torch.bucketize(flat, starts, right=True) - 1  # (experts n,), the index of each row's own
        group = torch.arange(len(flat)) // d_out * len(keys) + tensor
        groups, counts = group.sort().values.unique_consecutive(return_counts=True)
        refs: dict[TensorRef, None] = {}
        for label, places in zip(groups.tolist(), group.argsort(stable=True).split(counts.tolist()), strict=True):
            expert, i = divmod(label, len(keys))
            *stack, height = shapes[keys[i]][:-1] or shapes[keys[i]]
            if stack not in ([], [len(numbers)]):  # of another number of experts
                return []
            lines = torch.stack([flat[places] - starts[i] - (expert * height if stack else 0), places - expert * d_out])
            steps = lines.diff()  # (2, n - 1), of rows and of positions: each run of equal ones is a part
            for run in lines.tensor_split((steps != steps[:, :1]).any(0).nonzero().flatten() + 1, dim=1):
                rows, positions = map(_as_range, run)
                if not (rows and positions and rows.start >= 0 and rows.stop <= height):
                    return []
                is_whole = len(positions) == d_out
                alone = None if stack or numbers.ndim == 1 else expert
                some = None if is_whole and len(rows) == height else rows
                refs[TensorRef(keys[i], alone, rows=some, positions=None if is_whole else positions)] = None
        if any(ref.key in self.packed and ref.rows for ref in refs):  # rows of what is quantised as a whole
            return []
        return list(refs)


def as_slice(rows: range) -> slice:
    """The rows of a tensor, as an index."""
    return slice(rows.start, rows.stop, rows.step)


def _as_range(numbers: Tensor) -> range | None:
    """Numbers at equal steps upwards; None for others."""
    first, last = int(numbers[0]), int(numbers[-1])
    step = int(numbers[1]) - first if len(numbers) > 1 else 1
    rows = range(first, last + 1, step) if step > 0 else range(0)
    return rows if len(rows) == len(numbers) and bool((numbers.diff() == step).all()) else None
