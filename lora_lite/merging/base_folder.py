"""A base model as a folder on disk: which of its tensors is which layer's weight, read one tensor at a time.

A layer's path is not always its key: transformers renames and regroups as it loads (its conversion mapping), fuses the
experts of a block, and leaves out a head that is tied to the embedding. What the folder's config describes is built on
the meta device, without memory, and the keys are led to it as `from_pretrained` would.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.layer import layer_of
from ..base.storage import spread_places
from ..core.names import file_key
from ..core.targets import Target
from ..dtypes import STORAGE_DTYPES, dtype_name
from ..errors import CheckpointError, QuantizedWeightError, TargetError
from ..io.keys import resolve
from ..io.safetensors import DTYPES, Header, read_json, read_shards
from .bnb_files import Packed, find_packed
from .skeleton import skeleton

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorRef:
    """A weight or a bias of a layer on disk: a tensor of its own, or of one expert alone."""

    key: str
    expert: int | None = None
    transposed: bool = False
    """Each matrix lies as (d_in, d_out)."""


@dataclass(frozen=True)
class LayerLocation:
    """Where a layer is: its weight, of experts that are stored one by one several, and its biases."""

    target: Target
    weight: list[TensorRef]
    bias: list[TensorRef] = field(default_factory=list)
    tied_to: str | None = None
    """The module key of what shares the weight, such as the embedding."""


class BaseFolder:
    """A folder with safetensors files, and a config if it is a transformers model.

    Raises CheckpointError for a folder that isn't one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder\n  a base is a folder with config and safetensors files")
        index, single = path / "model.safetensors.index.json", path / "model.safetensors"
        if index.exists() and single.exists():
            raise CheckpointError(
                f"{path} has both {single.name} and {index.name}, and they may be two models\n"
                f"  from_pretrained reads the single file: move the other away, or the other way round"
            )
        if not (index.exists() or single.exists()):
            pickles = [found.name for pattern in _PICKLES for found in path.glob(pattern)]
            raise CheckpointError(
                f"{path} has neither {single.name} nor {index.name}\n"
                f"  {'it has ' + pickles[0] + ', a pickle, which is never opened: ' if pickles else ''}"
                f"save the model with save_pretrained, which writes safetensors"
            )
        self.headers: dict[str, Header] = read_shards(path)
        self.config: dict[str, Any] | None = (
            read_json(path / "config.json") if (path / "config.json").exists() else None
        )
        self.packed: dict[str, Packed] = find_packed(self.headers)
        self.model = None if self.config is None else skeleton(path, self.config, len(self.headers))
        self._by_key = self._module_keys()
        self._owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
        for at, module in [] if self.model is None else self.model.named_modules():
            for name, each in module.named_parameters(recurse=False):
                self._owners[id(each)].append((module, file_key(at, name)))

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor; of a quantised one, of the weight that it stands for."""
        return self.packed[key].shape if key in self.packed else self.headers[key].entries[key].shape

    def dtype(self, key: str) -> str:
        """In which a tensor is stored, by its name in a header; of a quantised one, in which it is written dense."""
        if key not in self.packed:
            return self.headers[key].entries[key].dtype
        wanted = self.packed[key].dtype or self._floating()
        return next(name for name, dtype in DTYPES.items() if dtype == wanted)

    def _floating(self) -> torch.dtype:
        """Of the tensors that aren't quantised: of the first matrix, such as the embedding."""
        stored = (DTYPES.get(h.entries[k].dtype) for k, h in self.headers.items() if len(h.entries[k].shape) == 2)
        return next((dtype for dtype in stored if dtype in STORAGE_DTYPES), torch.float32)

    @property
    def is_sharded(self) -> bool:
        """Has it an index?"""
        return (self.path / "model.safetensors.index.json").exists()

    def files(self) -> list[Path]:
        """Those that hold its tensors."""
        return sorted({header.path for header in self.headers.values()})

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
        entry = self.headers[key].entries[key]
        with self.headers[key].path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            left = entry.stop - entry.start
            while left:
                chunk = file.read(min(size, left))
                if not chunk:
                    raise CheckpointError(f"{self.headers[key].path} became shorter while it was read")
                left -= len(chunk)
                yield chunk

    def samples(self, weight: Sequence[TensorRef]) -> list[Any]:
        """The print of an unquantised weight, as `base_record` takes it from a live layer: dtype, elements."""
        entries = [self.headers[each.key].entries[each.key] for each in weight]
        dtype = DTYPES.get(entries[0].dtype, torch.uint8)
        numel = torch.Size(entries[0].shape).numel()
        values = []
        for place in spread_places(numel * len(weight)):
            header, entry = self.headers[weight[place // numel].key], entries[place // numel]
            with header.path.open("rb", buffering=0) as file:
                file.seek(entry.start + place % numel * dtype.itemsize)
                values.append(float(torch.frombuffer(bytearray(file.read(dtype.itemsize)), dtype=dtype)))
        return [dtype_name(dtype), *values]

    def find(self, file: Path, paths: Iterable[str]) -> dict[str, LayerLocation]:
        """Where layers are. CheckpointError unless all are here."""
        modules = self._modules()
        mapping = resolve(file, paths, set(modules), self._name())
        return {at: self._place(path, modules[path]) for at, path in mapping.items()}

    def places(self, file: Path, targets: dict[str, tuple[int, int]]) -> dict[str, LayerLocation]:
        """Where each layer of an adapter file is. CheckpointError unless all are here in their sizes."""
        found = self.find(file, targets)
        for at, place in found.items():
            shape = place.target.d_in, place.target.d_out
            if shape != targets[at]:
                raise CheckpointError(
                    f"{file}: {at} was saved from a layer with (d_in, d_out) = {targets[at]}, and "
                    f"{place.target.path} of {self.path} has {shape}\n  this is another base model"
                )
        return found

    def _modules(self) -> dict[str, nn.Module]:
        """The layers; without a config each matrix `<path>.weight` is taken for a linear layer's (d_out, d_in)."""
        if self.model is not None:
            return dict(self.model.named_modules())
        out: dict[str, nn.Module] = {}
        for key in self.headers:
            if key.endswith(".weight") and len(self.shape(key)) == 2:
                d_out, d_in = self.shape(key)
                bias = key.removesuffix("weight") + "bias" in self.headers
                out[key.removesuffix(".weight")] = nn.Linear(d_in, d_out, bias, device="meta")
        return out

    def _place(self, path: str, module: nn.Module) -> LayerLocation:
        layer = layer_of(module, path)
        if layer is None:
            raise CheckpointError(
                f"{path} of {self._name()} is no linear layer, and no experts: {type(module).__name__}"
            )
        target, name = Target.of(layer), layer.kind.weight
        parameter = layer.stored
        tied = next((key for owner, key in self._owners.get(id(parameter), []) if owner is not module), None)
        weight = self._stored(file_key(path, name) if tied is None else tied, target, layer.transposed)
        biases = [] if layer.bias is None else self._stored(file_key(path, layer.kind.bias), None, False)
        return LayerLocation(target, weight, biases, tied)

    def _stored(self, key: str, target: Target | None, transposed: bool) -> list[TensorRef]:
        found = self._by_key.get(key, [])
        if not found:
            raise CheckpointError(
                f"{self.path} has no tensor for {key} of {self._name()}, or one that is made of several in a way that "
                f"can't be taken apart\n  its own keys are like {', '.join(list(self.headers)[:3])}"
            )
        if target is None:
            return found
        if [each.expert for each in found] not in ([None], list(range(target.experts))):
            raise CheckpointError(f"{self.path}: {key} has {len(found)} experts there; wanted {target.experts}")
        fused = (target.experts,) if target.experts and found[0].expert is None else ()
        lies = transposed and found[0].expert is None
        matrix = (target.d_in, target.d_out) if lies else (target.d_out, target.d_in)
        for each in found:
            if self.shape(each.key) != (*fused, *matrix):
                raise CheckpointError(f"{self.path}: {each.key} is {self.shape(each.key)}; wanted {(*fused, *matrix)}")
        return [TensorRef(each.key, each.expert, lies) for each in found]

    def _module_keys(self) -> dict[str, list[TensorRef]]:
        """Module key -> what it is on disk; nothing for a parameter that is computed from several tensors."""
        plain = [key for key in self.headers if key not in {aux for p in self.packed.values() for aux in p.parts}]
        if self.model is None:
            return {key: [TensorRef(key)] for key in plain}
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(self.model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        one_each = {
            pattern
            for converter in converters
            for pattern in converter.source_patterns
            if len(converter.source_patterns) == len(converter.target_patterns) == 1
            and [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
            == [("MergeModulelist", 0)]
        }
        state = self.model.state_dict()
        found: dict[str, list[TensorRef]] = {}
        for key in plain:
            name, pattern = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
            if pattern is None:
                found.setdefault(name, []).append(TensorRef(key))
            elif pattern in one_each:
                found.setdefault(name, []).append(TensorRef(key, int(re.findall(r"\.(\d+)(?=\.)", key)[-1])))
        return {name: sorted(each, key=lambda stored: stored.expert or 0) for name, each in found.items()}

    def _name(self) -> str:
        return self.path.name if self.model is None else type(self.model).__name__


def untied_key(place: LayerLocation) -> str:
    """The key under which a head that was tied is stored."""
    return file_key(place.target.path, "weight")


def refuse_tied(place: LayerLocation) -> TargetError:
    """The error for a layer whose weight is another module's as well."""
    return TargetError(
        f"{place.target.path}: its weight is also {place.tied_to}, which would change with it\n"
        f"  use untie=True (both are written, and tie_word_embeddings is set to false), or leave the layer out"
    )
