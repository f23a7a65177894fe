"""An adapter as PEFT's folders have it and as we do: what every method's file needs for both ways."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ...base.layer import BaseLayer
from ...core.config import BaseConfig
from ...core.names import file_key
from ...core.resolve import Overrides
from ...core.state import Site, Tensors
from ...core.targets import Target
from ...core.variant import ParamSpec, config_for
from ...dtypes import STORAGE_DTYPES
from ...errors import CheckpointError, ConfigError
from ..factors import Layers
from ..keys import THEIRS
from ..safetensors import DTYPES, check_numbers
from . import forms
from .folder import PeftFolder
from .ties import mirrored

Written = tuple[dict[str, Tensor], dict[str, Any]]  # tensors by PEFT's key, settings


Values = Callable[[Tensors, str, BaseLayer | None, BaseLayer | None], dict[str, Tensor]]


def as_stored(
    stored: Tensors, path: str, layer: BaseLayer | None = None, base: BaseLayer | None = None
) -> dict[str, Tensor]:
    """The tensors of a layer as the file has them, in our shapes."""
    names = {name: stored[key] for name in THEIRS if (key := file_key(path, name)) in stored}
    return names if layer is None else {name: forms.ours(layer, name, tensor) for name, tensor in names.items()}


def stored_as(source: PeftFolder, spec: ParamSpec, cfg: BaseConfig, name: str, tensor: Tensor) -> Tensor:
    """A tensor in the dtype that its parameter has here: a table's own, or the config's. Raises CheckpointError for
    indices out of a table's range."""
    if spec.dtype is not None and not torch.equal(tensor, tensor.to(spec.dtype).to(tensor.dtype)):
        raise source.error(f"{name} has indices that no {spec.dtype} holds\n  save the adapter again")
    tensor = tensor.to(spec.dtype or cfg.dtype)
    if spec.dtype is not None:
        check_numbers({name: tensor}, str(source.header.path), "save the adapter again", {name: spec})
    return tensor


@dataclass(frozen=True)
class Part:
    """One method of the adapter in a folder."""

    cfg: BaseConfig
    targets: dict[str, Target]  # by the path in the file
    overrides: Overrides  # by the path in the model
    values: Values = as_stored
    """The tensors of a layer by name: of the file's tensors, its path there, the layer, and the one whose weight they
    are relative to, which is the layer itself or stands for it. Both are None without a model."""
    of_base: bool = False  # are the tensors relative to the base's own, so that without one there are none?


def config_of(
    source: PeftFolder,
    variant: str,
    targets: Mapping[str, Target],
    layers: Mapping[str, BaseLayer],
    overrides: Overrides,
    reads: bool,
    tensors: Mapping[str, str] | None = None,
    **values: Any,
) -> BaseConfig:
    """Our config, with regexes of its own that find these layers exactly. `reads`: its maths reads the base weight.

    tensors     its keys in the file by ours; None: those of the folder's method itself
    """
    dtype = _dtype(source, targets, reads, source.keys | source.shared if tensors is None else tensors)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path, fields in overrides.items():
        groups.setdefault(tuple(fields.items()), []).append(path)
    per_layer = {_exactly(paths): dict(fields) for fields, paths in groups.items()}  # a regex for each pair of values
    names = (_exactly(target.path for target in targets.values()),)
    values |= {"kinds": tuple(dict.fromkeys(layers[path].kind.category for path in targets))} if layers else {}
    try:
        return config_for(variant)(variant=variant, target_names=names, dtype=dtype, per_layer=per_layer, **values)
    except ConfigError as error:
        raise source.error(str(error)) from error


def _exactly(paths: Iterable[str]) -> str:
    return f"^({'|'.join(map(re.escape, paths))})$"


def _dtype(source: PeftFolder, targets: Mapping[str, Target], reads: bool, tensors: Mapping[str, str]) -> torch.dtype:
    """One dtype that holds the numbers of all these layers' tensors, and of those that they share. Raises
    CheckpointError."""
    keys = [key for ours, key in tensors.items() if ours in source.shared or ours.rpartition(".")[0] in targets]
    names = {source.header.entries[key].dtype: key for key in keys}
    for dtype, key in names.items():
        if DTYPES.get(dtype) not in STORAGE_DTYPES:
            raise CheckpointError(f"{source.header.path}: {key} is stored as {dtype}; wanted floats")
    return reduce(torch.promote_types, [*([torch.float32] if reads else []), *(DTYPES[dtype] for dtype in names)])


def names_of(root: nn.Module, layers: Sequence[str], inner: Sequence[str]) -> tuple[Any, Any]:
    """target_modules, and feedforward_modules, that PEFT resolves to exactly these layers.

    A list reaches what ends with one of its entries, a string is a regex for the full path. Last names, where they
    reach nothing else, are what most tools know best; then full paths; then a regex.
    """
    paths = [path for path, _ in root.named_modules()]
    for last in (True, False):
        names, inner_names = (sorted({p.rpartition(".")[2] if last else p for p in side}) for side in (layers, inner))
        ends = tuple(f".{name}" for name in names)
        reached = [path for path in paths if path in names or path.endswith(ends)]
        reached_inner = [path for path in layers if path.endswith(tuple(inner_names))]
        if set(reached) == set(layers) and set(reached_inner) == set(inner):
            return names, inner_names
    return "|".join(map(re.escape, layers)), "|".join(map(re.escape, inner)) if inner else []


def same_everywhere(layers: Layers, *fields: str) -> tuple[Any, ...]:
    """The fields of a config that PEFT has once. Raises CheckpointError where they differ by layer."""
    values = {tuple(getattr(sites[0].cfg, field) for field in fields) for sites in layers.values()}
    if len(values) > 1:
        names = f"{', '.join(fields[:-1])} and {fields[-1]}" if fields[1:] else fields[0]
        raise CheckpointError(f"{names} differ by layer: {sorted(values)}\n  PEFT has one of each for all layers")
    return values.pop()


def written_at(root: nn.Module, layers: Layers, site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one layer by PEFT's keys, in its shapes."""
    names = forms.nested(site.module)
    others = [sites[0] for sites in layers.values() if sites[0].module is site.module and sites[0].prefix]
    on_module = sorted(others, key=lambda other: names.index(other.prefix))
    result = {forms.key_of(site, name, on_module): forms.theirs(site, name, tensor) for name, tensor in tensors.items()}
    return result | mirrored(root, site, tensors)
