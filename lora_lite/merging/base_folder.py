"""A base model as a folder on disk: which of its tensors is which layer's weight, read one tensor at a time.

A layer's path is not always its key: transformers renames and regroups as it loads (its conversion mapping), fuses the
experts of a block, and leaves out a head that is tied to the embedding. What the folder's config describes is built on
the meta device, without memory, and the keys are led to it as `from_pretrained` would.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.layer import BaseLayer, layer_of
from ..base.storage import spread_places
from ..core.names import file_key
from ..core.targets import Target
from ..dtypes import STORAGE_DTYPES, dtype_name
from ..errors import CheckpointError, QuantizedWeightError
from ..io.keys import resolve
from ..io.safetensors import DTYPES, INDEX, PICKLES, Header, read_json, read_shards
from .bnb_files import Packed, find_packed
from .skeleton import skeleton


@dataclass(frozen=True)
class TensorRef:
    """A weight or a bias of a layer on disk: a tensor of the layer, or of one of its experts."""

    key: str
    expert: int | None = None
    transposed: bool = False
    """Each matrix lies as (d_in, d_out)."""


@dataclass(frozen=True)
class LayerLocation:
    """The tensors of a layer on disk: several if its experts are stored one by one."""

    target: Target
    weight: list[TensorRef]
    bias: list[TensorRef]
    tied_to: str | None
    """The module key of what shares the weight, such as the embedding."""


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
            raise CheckpointError(
                f"{path} has both {single.name} and {index.name}, and they may be two models\n"
                f"  from_pretrained reads the single file: move the other away, or the other way round"
            )
        if not (index.exists() or single.exists()):
            pickles = sorted(file.name for file in path.iterdir() if file.name.endswith(PICKLES))
            raise CheckpointError(
                f"{path} has neither {single.name} nor {index.name}\n"
                f"  {'it has ' + pickles[0] + ', a pickle, which is never opened: ' if pickles else ''}"
                f"save the model with save_pretrained, which writes safetensors"
            )
        self.headers: dict[str, Header] = read_shards(path)  # by key: the header of its file
        has_config = (path / "config.json").exists()
        self.config: dict[str, Any] | None = read_json(path / "config.json") if has_config else None
        self.packed: dict[str, Packed] = find_packed(self.headers)
        self.model = None if self.config is None else skeleton(path, self.config, len(self.headers))
        self._name = path.name if self.model is None else type(self.model).__name__
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
            raise QuantizedWeightError(
                f"{self.path}: {key} is stored as {header.entries[key].dtype}, which isn't a plain weight\n"
                f"  use the original 16-bit checkpoint, or one that bitsandbytes quantised"
            )
        with header.path.open("rb", buffering=0) as file:
            return header.tensor(file, key, index)

    def chunks(self, key: str, size: int) -> Iterator[bytes]:
        """The bytes of a tensor, some at a time."""
        path, entry = self.headers[key].path, self.headers[key].entries[key]
        with path.open("rb") as file:
            file.seek(entry.start)
            for start in range(entry.start, entry.stop, size):
                chunk = file.read(min(size, entry.stop - start))
                if len(chunk) < min(size, entry.stop - start):
                    raise CheckpointError(f"{path} became shorter while it was read")
                yield chunk

    def samples(self, weight: Sequence[TensorRef]) -> list[Any]:
        """The fingerprint of an unquantised weight, as `base_record` takes it from a live layer: dtype, elements."""
        entries = [self.headers[ref.key].entries[ref.key] for ref in weight]
        dtype = DTYPES.get(entries[0].dtype, torch.uint8)
        numel = torch.Size(entries[0].shape).numel()  # of one expert where they are stored one by one
        values = []
        for place in spread_places(numel * len(weight)):  # experts that are stored one by one count as stacked
            header, entry = self.headers[weight[place // numel].key], entries[place // numel]
            with header.path.open("rb", buffering=0) as file:
                file.seek(entry.start + place % numel * dtype.itemsize)
                values.append(float(torch.frombuffer(bytearray(file.read(dtype.itemsize)), dtype=dtype)))
        return [dtype_name(dtype), *values]

    def find(self, file: Path, paths: Iterable[str]) -> dict[str, LayerLocation]:
        """The location of each of these paths in the file. Raises CheckpointError unless the folder has all."""
        modules = self._modules()
        mapping = resolve(file, paths, set(modules), self._name)
        return {file_path: self._locate(path, modules[path]) for file_path, path in mapping.items()}

    def locate(self, file: Path, targets: dict[str, tuple[int, int]]) -> dict[str, LayerLocation]:
        """The location of each layer of an adapter file. Raises CheckpointError unless all are here in their sizes."""
        locations = self.find(file, targets)
        for path, location in locations.items():
            shape = location.target.d_in, location.target.d_out
            if shape != targets[path]:
                raise CheckpointError(
                    f"{file}: {path} was saved from a layer with (d_in, d_out) = {targets[path]}, and "
                    f"{location.target.path} of {self.path} has {shape}\n  this is another base model"
                )
        return locations

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

    def _locate(self, path: str, module: nn.Module) -> LayerLocation:
        layer = layer_of(module, path)
        if layer is None:
            raise CheckpointError(f"{path} of {self._name} is no linear layer, and no experts: {type(module).__name__}")
        # Of tensors that are shared, a file holds one: the other owner's.
        tied = next((key for owner, key in self._owners.get(id(layer.stored), []) if owner is not module), None)
        weight = self._weight_refs(tied or file_key(path, layer.kind.weight), layer)
        bias = [] if layer.bias is None else self._refs(file_key(path, layer.kind.bias))
        return LayerLocation(Target.of(layer), weight, bias, tied)

    def _refs(self, key: str) -> list[TensorRef]:
        if key not in self._by_key:
            raise CheckpointError(
                f"{self.path} has no tensor for {key} of {self._name}, or one that is made of several in a way that "
                f"can't be taken apart\n  its own keys are like {', '.join(list(self.headers)[:3])}"
            )
        return self._by_key[key]

    def _weight_refs(self, key: str, layer: BaseLayer) -> list[TensorRef]:
        """The tensors of a weight, in the shapes that the layer has."""
        refs = self._refs(key)
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

    def _module_keys(self) -> dict[str, list[TensorRef]]:
        """Module key -> its tensors on disk; no entry for a parameter that is computed from several tensors."""
        if self.model is None:
            return {key: [TensorRef(key)] for key in self.headers}
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(self.model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        # Of all conversions, the stacking of experts alone leaves each file's tensor a matrix that can be merged.
        stacking = {
            converter.source_patterns[0]
            for converter in converters
            if len(converter.source_patterns) == len(converter.target_patterns) == 1
            and [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
            == [("MergeModulelist", 0)]
        }
        state = self.model.state_dict()
        refs: dict[str, list[TensorRef]] = defaultdict(list)
        for key in self.headers:
            name, pattern = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
            if pattern is None:
                refs[name].append(TensorRef(key))
            elif pattern in stacking:  # the last number in a key is the expert's, earlier ones are blocks'
                refs[name].append(TensorRef(key, int(re.findall(r"\.(\d+)(?=\.)", key)[-1])))
        return {name: sorted(experts, key=lambda ref: ref.expert or 0) for name, experts in refs.items()}
