"""An adapter file as untrusted input: its format, and its metadata checked before any tensor is read.

Keys are full `state_dict()` paths with the plain names (`model.layers.0.mlp.up_proj.lora_A`), for an adapter of
any name. Metadata key `lora_lite`, JSON:

    {"format": 1, "variant", "config", "scale", "targets": {path: [d_in, d_out]}, "base": {class, name_or_path, dtype,
     quantization: null | {method, quant_type, blocksize, double_quant, compute_dtype, weight_dtype, modules},
     fingerprint}, "library": version}

Of an adapter of several methods the format is 2, and "methods" is a list of objects with "variant", "config", "targets"
and "per_layer", in the place of these fields. Where a path is in several, the second's tensors are `<path>.lora_2_A`.
"biased" and "diagonal" list the targets with a bias, and the norms, for methods whose tensors depend on that; "tied",
with tied_weights="as_base", those that were adapted together with what shares their weight, and "untied" the others.

"scale" is the adapter's coefficient c; a file without it has 1. "never_ran" lists the targets that no forward had
called when it was saved, although one had called others: a merge on disk refuses them. "on" holds a digest of each
history that it was trained on top of. "per_layer", where the config differs by layer, holds {path: {field: value}} as
attach resolved it: a load runs no regex of a file. "steps", in a file for a resume, counts those of `Adapter.step`.
"""

import os
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base.fingerprint import BaseRecord
from ..core.attach import make_shared
from ..core.config import BaseConfig
from ..core.names import file_key, numbered
from ..core.resolve import MOST_METHODS
from ..core.shared import Shared
from ..core.state import Tensors
from ..core.targets import Target
from ..core.validate import is_number
from ..core.variant import ParamSpec, lookup
from ..errors import CheckpointError, LoraLiteError, brief
from ..version import __version__
from .safetensors import Header, check_names, check_numbers, parse_json, read_header

FORMAT = 1
SEVERAL = 2  # the format of an adapter of several methods
METADATA = "lora_lite"
DIGEST = 16  # characters

LayerSpecs = Mapping[str, tuple[Target, Mapping[str, ParamSpec]]]
"""The layers of a method by their paths in a file, in its order, with the ParamSpecs there by the tensors' names."""


@dataclass(frozen=True)
class FileMethod:
    """One method of an adapter in a file."""

    cfg: BaseConfig
    targets: dict[str, tuple[int, int]]  # path -> (d_in, d_out)
    per_layer: dict[str, dict[str, Any]]  # path -> the config fields that differ there
    numbers: Mapping[str, int]  # path -> which of the file's methods there it is
    biased: frozenset[str] = frozenset()  # those with a bias, and
    diagonal: frozenset[str] = frozenset()  # the norms, where the method's tensors depend on it
    tied: frozenset[str] = frozenset()  # those that were adapted with what shares their weight, and
    untied: frozenset[str] = frozenset()  # the others, with tied_weights="as_base"

    def key(self, path: str, tensor: str) -> str:
        """The key of a tensor at a layer."""
        return file_key(path, numbered(tensor, self.numbers[path]))

    def cfg_at(self, path: str) -> BaseConfig:
        """The config at a layer."""
        return self.cfg.with_overrides(self.per_layer.get(path, {}))

    def as_in_file(self, target: Target) -> Target:
        """The target with what the file says of it, where no model does."""
        has_bias, is_diagonal = target.path in self.biased, target.path in self.diagonal
        return replace(target, has_bias=has_bias or target.has_bias, is_diagonal=is_diagonal or target.is_diagonal)


@dataclass(frozen=True)
class AdapterFile:
    """A validated adapter file: nothing in it has been matched to a model yet, and no tensor read."""

    header: Header
    methods: list[FileMethod]
    scale: float
    base: BaseRecord
    on: list[str]  # digests of the histories that it was on top of when it was saved
    never_ran: list[str]  # targets whose layers no forward had called then, although one had called others
    steps: int | None = None  # of the training that it was saved in, if that was for a resume

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of each layer that a method is on."""
        return {path: sizes for method in self.methods for path, sizes in method.targets.items()}

    def check_ties(self, tied: Iterable[set[str]]) -> None:
        """CheckpointError unless the weights of these targets, of each method, are shared, as they were in training."""
        for path in (p for m, ps in zip(self.methods, tied, strict=True) for p in (m.tied - ps) | (m.untied & ps)):
            is_tied = any(path in method.tied for method in self.methods)
            trained, live = ("tied", "untied") if is_tied else ("untied", "tied")
            raise CheckpointError(
                f"{self.path}: {path} was trained where its weight is {trained}, and in this model it is {live}\n"
                f"  its outputs would be others: load the base with tie_word_embeddings={is_tied}"
            )

    def specs(self, layers: Sequence[LayerSpecs]) -> dict[str, ParamSpec]:
        """The ParamSpec of each tensor that the file should have, by its key, for the layers of each method.

        What only a resume needs may be missing, and what is made again.
        """
        pairs = [
            (m, path, known) for m, ls in zip(self.methods, layers, strict=True) for path, (_, known) in ls.items()
        ]
        specs = {method.key(path, name): spec for method, path, known in pairs for name, spec in known.items()}
        for shared in filter(None, self.shared(layers)):
            specs |= {shared.key(name): spec for name, spec in shared.specs.items()}
        return {key: s for key, s in specs.items() if s.saved == "always" or key in self.header.entries}

    def shared(self, layers: Sequence[LayerSpecs], tensors: Tensors | None = None) -> list[Shared | None]:
        """For each method the tensors that it has once, with the file's values if they are given; None where it has
        none."""
        pairs = list(zip(self.methods, layers, strict=True))
        all_specs = [lookup(m.cfg.variant).shared_specs([t for t, _ in known.values()], m.cfg) for m, known in pairs]
        result: list[Shared | None] = [None] * len(pairs)
        numbered = enumerate((i for i, specs in enumerate(all_specs) if specs), 1)
        for number, i in numbered:
            specs, cfg = all_specs[i], self.methods[i].cfg
            result[i] = Shared(specs, number) if tensors is None else make_shared(specs, cfg, tensors, number=number)
        return result

    def tensors(self, specs: Mapping[str, ParamSpec]) -> dict[str, Tensor]:
        """All tensors, once their shapes have been found right.

        specs   the `ParamSpec` of each, by its key

        Raises:
            CheckpointError: for a NaN, an infinity, or a table of another dtype than its spec's.
        """
        return check_numbers(self.header.read(), str(self.path), "save the adapter again", specs)


def read_file(path: str | os.PathLike[str]) -> AdapterFile:
    """An adapter file without a model: its header and metadata, no tensor yet.

    Raises:
        CheckpointError: for a file that lora_lite.save did not write, or that is damaged.
        VariantError: for a variant that isn't registered.
    """
    return checked(read_header(path))


def checked(header: Header) -> AdapterFile:
    """The file with this header, its metadata found to be of the format. Raises as `read_file`."""
    path, meta = header.path, _metadata(header)
    scale, steps = meta.get("scale", 1.0), meta.get("steps")
    if not is_number(scale) or not (steps is None or (type(steps) is int and steps >= 0)):
        problem = f"the scale {brief(scale)} and {brief(steps)} steps; wanted a finite number, and a count"
        raise CheckpointError(f"{path}: its metadata names {problem}")
    targets: Counter[str] = Counter()
    methods = [_method(path, entry, targets) for entry in (meta["methods"] if meta["format"] == SEVERAL else [meta])]
    base = BaseRecord.from_json(meta["base"], targets)
    if base is None:
        raise CheckpointError(f"{path}: its metadata has no targets, or a bad base record\n  save the adapter again")
    on, never_ran = meta.get("on", []), meta.get("never_ran", [])
    if not (isinstance(on, list) and all(isinstance(digest, str) and len(digest) == DIGEST for digest in on)):
        raise CheckpointError(f'{path}: its metadata has "on": {brief(on)}; wanted digests of histories')
    if not _are_targets(never_ran, targets):
        raise CheckpointError(f'{path}: its metadata has "never_ran": {brief(never_ran)}; wanted some of its targets')
    return AdapterFile(header, methods, float(scale), base, on, never_ran, steps)


def _method(path: Path, entry: Mapping[str, Any], counts: Counter[str]) -> FileMethod:
    """One method, whose targets are added to those of the methods before it. Raises as `read_file`."""
    if not isinstance(entry["variant"], str):
        raise CheckpointError(f"{path}: its metadata names the variant {brief(entry['variant'])}; wanted a string")
    variant = lookup(entry["variant"])
    try:
        cfg = variant.config.from_dict(entry["config"])
        if cfg.variant != entry["variant"]:
            raise CheckpointError(f"a config of {brief(cfg.variant)!r}, and the variant {entry['variant']!r}")
        targets = _targets(entry["targets"])
        per_layer = _per_layer(entry.get("per_layer", {}), cfg, targets)
    except (LoraLiteError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata has a bad config or targets: {brief(error, 600)}") from error
    if not targets:
        raise CheckpointError(f"{path}: its metadata has no targets, or a bad base record\n  save the adapter again")
    facts = [entry.get(field, []) for field in ("biased", "diagonal", "tied", "untied")]
    if not all(_are_targets(paths, targets) for paths in facts):
        raise CheckpointError(f"{path}: its metadata names {brief(facts)}; wanted some of its targets")
    counts.update(targets.keys())
    return FileMethod(cfg, targets, per_layer, {t: counts[t] for t in targets}, *map(frozenset, facts))


def _are_targets(paths: Any, targets: Container[str]) -> bool:
    return isinstance(paths, list) and all(isinstance(path, str) and path in targets for path in paths)


def _metadata(header: Header) -> dict[str, Any]:
    """The JSON that `save` wrote, with all fields that a file must have. Raises CheckpointError."""
    path, metadata = header.path, header.metadata
    if METADATA not in metadata:
        raise CheckpointError(
            f"{path} has no lora_lite metadata, so it was not written by lora_lite.save\n"
            f"  its metadata has {brief(sorted(metadata)) if metadata else 'nothing'}"
        )
    meta = parse_json(metadata[METADATA], f"{path}: its lora_lite metadata")
    number = meta.get("format")
    if type(number) is not int or number not in (FORMAT, SEVERAL):  # in JSON, true and 1.0 would equal 1
        raise CheckpointError(
            f"{path} has format {brief(repr(number))}, and lora_lite {__version__} reads {FORMAT} and {SEVERAL}\n"
            f"  read it with the version that wrote it: {brief(meta.get('library'))}"
        )
    entries: Any = meta.get("methods") if number == SEVERAL else [meta]
    are_objects = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    if not (are_objects and 0 < len(entries) <= MOST_METHODS):
        raise CheckpointError(f'{path}: its metadata has "methods": {brief(entries)}; wanted a list of objects')
    missing = {key for entry in entries for key in {"variant", "config", "targets"} - entry.keys()}
    if missing := missing | ({"base"} - meta.keys()):
        raise CheckpointError(f"{path}: its lora_lite metadata lacks {sorted(missing)}")
    return meta


def _targets(targets: Any) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of each target. Raises CheckpointError."""
    if not isinstance(targets, dict):
        raise CheckpointError(f"targets are {brief(targets)!r}; wanted {{path: [d_in, d_out]}}")
    check_names(targets, "the metadata")
    for path, shape in targets.items():
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in shape)):
            raise CheckpointError(f"target {path!r} is {brief(shape)!r}; wanted [d_in, d_out]")
    return {path: (d_in, d_out) for path, (d_in, d_out) in targets.items()}


def _per_layer(overrides: Any, cfg: BaseConfig, targets: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields that differ at some of the targets. Raises CheckpointError."""
    if not (isinstance(overrides, dict) and all(isinstance(fields, dict) for fields in overrides.values())):
        raise CheckpointError(f"per_layer is {brief(overrides)!r}; wanted {{path: {{field: value}}}}")
    # The config's own per_layer maps regexes to fields. They are not run here, so what they gave must be in the file.
    if not overrides.keys() <= targets.keys() or bool(overrides) < bool(cfg.per_layer):
        raise CheckpointError(
            f"settings by layer for {brief(sorted(overrides)[:3])}; wanted them for some of its targets, as the "
            f"config has a per_layer"
        )
    return {path: cfg.checked_overrides(fields) for path, fields in overrides.items()}
