"""An adapter file as untrusted input: its format, and its metadata checked before any tensor is read.

Keys are full `state_dict()` paths with the plain names (`model.layers.0.mlp.up_proj.lora_A`), for an adapter of
any name. Metadata key `lora_lite`, JSON:

    {"format": 1, "variant", "config", "scale", "targets": {path: [d_in, d_out]}, "base": {class, name_or_path, dtype,
     quantization: null | {method, quant_type, blocksize, double_quant, compute_dtype, weight_dtype, modules},
     fingerprint}, "library": version}

"scale" is the adapter's coefficient c; a file without it has 1. "never_ran" lists the targets that no forward had
called when it was saved, although one had called others: a merge on disk refuses them. "on" holds a digest of each
history that it was trained on top of. "per_layer", where the config differs by layer, holds {path: {field: value}} as
attach resolved it: a load runs no regex of a file. "steps", in a file for a resume, counts those of `Adapter.step`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base.fingerprint import BaseRecord
from ..core.config import BaseConfig
from ..core.names import file_key
from ..core.shared import PLACE
from ..core.targets import Target
from ..core.validate import is_number
from ..core.variant import ParamSpec, lookup
from ..errors import CheckpointError, LoraLiteError, brief
from ..version import __version__
from .safetensors import Header, check_names, check_numbers, parse_json, read_header

FORMAT = 1
METADATA = "lora_lite"
DIGEST = 16  # characters


@dataclass(frozen=True)
class AdapterFile:
    """A validated adapter file: nothing in it has been matched to a model yet, and no tensor read."""

    header: Header
    cfg: BaseConfig
    scale: float
    targets: dict[str, tuple[int, int]]  # path -> (d_in, d_out)
    per_layer: dict[str, dict[str, Any]]  # path -> the config fields that differ there
    base: BaseRecord
    on: list[str]  # digests of the histories that it was on top of when it was saved
    never_ran: list[str]  # targets whose layers no forward had called then, although one had called others
    steps: int | None = None  # of the training that it was saved in, if that was for a resume

    @property
    def path(self) -> Path:
        return self.header.path

    def specs(self, targets: Sequence[Target], at_layers: Mapping[str, ParamSpec]) -> dict[str, ParamSpec]:
        """The ParamSpec of each tensor that the file should have, by its key: those at layers, which are given, and
        those that the adapter has once. What only a resume needs may be missing, and what is made again.

        targets     all its layers, in the file's order
        """
        shared = {file_key(PLACE, t): s for t, s in lookup(self.cfg.variant).shared_specs(targets, self.cfg).items()}
        return {k: s for k, s in {**at_layers, **shared}.items() if s.saved == "always" or k in self.header.entries}

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
    if not isinstance(meta["variant"], str):
        raise CheckpointError(f"{path}: its metadata names the variant {brief(meta['variant'])}; wanted a string")
    scale, steps = meta.get("scale", 1.0), meta.get("steps")
    if not is_number(scale) or not (steps is None or (type(steps) is int and steps >= 0)):
        problem = f"the scale {brief(scale)} and {brief(steps)} steps; wanted a finite number, and a count"
        raise CheckpointError(f"{path}: its metadata names {problem}")
    variant = lookup(meta["variant"])
    try:
        cfg = variant.config.from_dict(meta["config"])
        if cfg.variant != meta["variant"]:
            raise CheckpointError(f"a config of {brief(cfg.variant)!r}, and the variant {meta['variant']!r}")
        targets = _targets(meta["targets"])
        per_layer = _per_layer(meta.get("per_layer", {}), cfg, targets)
    except (LoraLiteError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata has a bad config or targets: {brief(error, 600)}") from error
    base = BaseRecord.from_json(meta["base"], targets)
    if not targets or base is None:
        raise CheckpointError(f"{path}: its metadata has no targets, or a bad base record\n  save the adapter again")
    on, never_ran = meta.get("on", []), meta.get("never_ran", [])
    if not (isinstance(on, list) and all(isinstance(digest, str) and len(digest) == DIGEST for digest in on)):
        raise CheckpointError(f'{path}: its metadata has "on": {brief(on)}; wanted digests of histories')
    if not (isinstance(never_ran, list) and all(isinstance(target, str) and target in targets for target in never_ran)):
        raise CheckpointError(f'{path}: its metadata has "never_ran": {brief(never_ran)}; wanted some of its targets')
    return AdapterFile(header, cfg, float(scale), targets, per_layer, base, on, never_ran, steps)


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
    if type(number) is not int or number != FORMAT:  # in JSON, true and 1.0 would equal 1
        raise CheckpointError(
            f"{path} has format {brief(repr(number))}, and lora_lite {__version__} reads format {FORMAT}\n"
            f"  read it with the version that wrote it: {brief(meta.get('library'))}"
        )
    missing = {"variant", "config", "targets", "base"} - meta.keys()
    if missing:
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
