"""One safetensors file per adapter: save, load, and restore into an attached one.

Keys are full `state_dict()` paths with the plain names (`model.layers.0.mlp.up_proj.lora_A`), for an adapter of
any name. Metadata key `lora_lite`, JSON:

    {"format": 1, "variant", "config", "scale", "targets": {path: [d_in, d_out]}, "base": {class, name_or_path, dtype,
     quantization: null | {method, quant_type, blocksize, double_quant, compute_dtype, weight_dtype, modules},
     fingerprint}, "library": version}

"scale" is the adapter's coefficient c; a file without it has 1. "never_ran" lists the targets that no forward had
called when it was saved, although one had called others: a merge on disk refuses them. "on" holds a digest of each
history that it was trained on top of. "per_layer", where the config differs by layer, holds {path: {field: value}} as
attach resolved it: a load runs no regex of a file.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from ..base import sharding
from ..base.fingerprint import BaseRecord, check_same_base, other_base, same_base
from ..base.layer import layer_of
from ..base.stacks import find_stacks
from ..core.adapter import Adapter, adapters, get_adapter
from ..core.attach import installed
from ..core.config import BaseConfig, to_json
from ..core.names import check_shapes, file_key
from ..core.ran import uncalled
from ..core.resolve import attachable, make_sites
from ..core.state import Site
from ..core.targets import Target
from ..core.validate import is_number
from ..core.variant import lookup
from ..errors import CheckpointError, ConfigError, LoraLiteError, brief
from ..version import __version__
from . import raw
from .keys import resolve
from .peft.folder import DIFFUSERS_SETTINGS
from .peft.load import load_peft
from .safetensors import Header, check_names, check_numbers, parse_json, read_any, read_header, write_tensors

FORMAT = 1
METADATA = "lora_lite"
DIGEST = 16
"""Characters"""


@dataclass(frozen=True)
class AdapterFile:
    """A validated adapter file: nothing in it has been matched to a model yet, and no tensor read."""

    header: Header
    cfg: BaseConfig
    scale: float
    targets: dict[str, tuple[int, int]]
    per_layer: dict[str, dict[str, Any]]
    base: BaseRecord
    on: list[str]
    """Digests of the histories that it was on top of when it was saved."""
    never_ran: list[str]
    """The targets whose layers no forward had called then, although one had called others."""

    @property
    def path(self) -> Path:
        return self.header.path

    def tensors(self) -> dict[str, Tensor]:
        """All of them, once their shapes have been found right. Raises CheckpointError for a NaN or an infinity."""
        tensors = self.header.read()
        check_numbers(tensors, str(self.path), "save the adapter again")
        return tensors


def save(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> None:
    """Write one adapter to a safetensors file, with the scale that it has now.

    A crash leaves the old file or the new one, never a part. Under FSDP2 and ZeRO-3 every process must call this:
    shards are gathered, and the first process writes.

    Raises TargetError for an unknown name, CheckpointError if path is a folder, if a tensor holds NaN or an infinity or
    has lost its shape, as under a partitioning that this library doesn't know (gather it first); where it is sharded in
    every process, also when the first one could not write.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; an adapter is one file, such as {path / 'adapter.safetensors'}")
    adapter = get_adapter(model, name)
    is_sharded = adapter.is_sharded
    with sharding.gathered(tensor for other in adapters(model).values() for _, tensor in other.named_tensors()):
        tensors = {
            key: sharding.whole(tensor).cpu().clone().contiguous() for key, tensor in adapter.state_dict().items()
        }
        on = _histories(model, name)
    check_shapes(tensors, adapter.specs(), f"adapter {name!r} in memory")
    cure = "nothing was written; go back to an earlier file, with a lower learning rate"
    check_numbers(tensors, f"adapter {name!r} in memory", cure)
    check_names(tensors, f"adapter {name!r} in memory")
    meta = {
        "format": FORMAT,
        "variant": adapter.variant,
        "config": adapter.config.to_dict(),
        "scale": adapter.scale,
        "targets": {target: list(shape) for target, shape in adapter.targets.items()},
        "base": adapter.base,
        "library": __version__,
    }
    if adapter.per_layer:
        meta["per_layer"] = to_json(adapter.per_layer)
    if on:
        meta["on"] = on
    if not all(site.ran for site in adapter.sites()):
        never_ran = sorted(uncalled(model) & adapter.targets.keys())
        meta |= {"never_ran": never_ran} if never_ran else {}
    with _together(path) if is_sharded else nullcontext(True) as first:
        if first:
            write_tensors(path, tensors, {"format": "pt", METADATA: json.dumps(meta)})
            logger.info(f"saved {adapter} to {path} ({path.stat().st_size / 1e6:.1f} MB)")


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    verify_base: bool = True,
    cfg: BaseConfig | None = None,
) -> Adapter:
    """Attach the adapter of a file: no init, no SVD, no data; tensors, scale and outputs are bit-equal.

    verify_base=False turns the error for a method that depends on its base weight (PiSSA, DoRA) on another base
    into the warning that other methods give.

    The path may also be a file or a folder of raw tensors, as ZeRO-3 and FSDP consolidation write them: with a
    wrapper's prefix, in shards, base weights mixed in (lora_lite/io/raw.py). They don't say how they were trained, so
    `cfg` does; its filters aren't needed. Of several adapters in it, `name` takes the one of that name. A file of
    diffusers says it in its metadata, and is read as load_peft reads it.

    Raises CheckpointError unless every key and shape fits, ConfigError for a cfg beside the one in a file, and what
    attach raises; the model is then as it was.
    """
    headers, root = read_any(path), attachable(model)
    if cfg is None and len(headers) == 1 and DIFFUSERS_SETTINGS in headers[0].metadata:
        return load_peft(model, headers[0].path, name)
    if len(headers) > 1 or METADATA not in headers[0].metadata:
        return raw.load_raw(root, Path(path), headers, cfg, name, verify_base)
    if cfg is not None:
        raise ConfigError(f"{headers[0].path} holds the config of its adapter\n  leave cfg= out: it is for raw tensors")
    file = _from_header(headers[0])
    mapping, sites = _match(root, file)
    stored = file.tensors()
    tensors = {site.key(t): stored[file_key(in_file, t)] for in_file, site in sites.items() for t in site.specs}
    with installed(root, file.cfg, name, list(sites.values()), tensors, file.scale) as adapter:
        reads = any(site.base_weight != "unused" for site in sites.values())
        recorded, live = file.base.renamed(mapping), adapter.base_record
        adapter.set_base_record(check_same_base(str(file.path), recorded, live, adapter.variant, reads, verify_base))
        for in_file, site in sites.items():
            site.never_ran = in_file in file.never_ran
    if file.on != _histories(root, name):
        logger.warning(_other_histories(file))
    logger.info(f"loaded {adapter} from {path}")
    return adapter


def restore(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> Adapter:
    """Copy a file's values and scale into an adapter that is attached: training goes on with the same parameters.

    Under FSDP2 and ZeRO-3 each process takes its shards. Raises CheckpointError unless config, base, keys and shapes
    are the same, and once ZeRO-3's optimizer has copies of the values; TargetError for an unknown name; nothing has
    changed then.
    """
    file, adapter = read_file(path), get_adapter(model, name)
    mapping = resolve(file.path, file.targets, set(adapter.targets), adapter.base["class"])
    differ = {
        field: (value, adapter.config.to_dict().get(field))
        for field, value in file.cfg.to_dict().items()
        if field not in (*file.cfg.FILTERS, "dtype", "per_layer") and value != adapter.config.to_dict().get(field)
    }
    by_layer = {mapping[at]: fields for at, fields in file.per_layer.items()}, adapter.per_layer
    if by_layer[0] != by_layer[1]:
        differ["per_layer"] = by_layer
    if differ:
        raise CheckpointError(
            f"{file.path} and adapter {name!r} are not of one config\n"
            f"  (file, adapter): {brief(differ, 600)}\n"
            f"  detach it and use lora_lite.load"
        )
    recorded = file.base.renamed(mapping)
    if not same_base(recorded, adapter.base_record):
        raise CheckpointError(
            f"{other_base(str(file.path), recorded, adapter.base_record)}\n"
            f"  training goes on on its own base: load that, or detach and use lora_lite.load"
        )
    if file.on != _histories(model, name):
        raise CheckpointError(_other_histories(file))
    specs = {site.path: site.specs for site in adapter.sites()}
    keys = {file_key(path, t): file_key(mapping[path], t) for path in file.targets for t in specs[mapping[path]]}
    in_model = {keys.get(key, key): entry for key, entry in file.header.entries.items()}
    check_shapes(in_model, adapter.specs(), str(file.path))
    adapter.load_state_dict({keys.get(key, key): tensor for key, tensor in file.tensors().items()})
    adapter.scale = file.scale
    logger.info(f"restored {adapter} from {path}")
    return adapter


def _histories(model: nn.Module, name: str) -> list[str]:
    """A digest of each adapter that comes before all others, other than this one: its config, scale and tensors."""
    if lookup(get_adapter(model, name).variant).leads:
        return []
    found = []
    for each in adapters(model).values():
        if lookup(each.variant).leads:
            digest = hashlib.sha256(json.dumps([each.config.to_dict(), to_json(each.per_layer), each.scale]).encode())
            for key, tensor in each.state_dict().items():
                digest.update(key.encode())
                digest.update(sharding.whole(tensor).detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            found.append(digest.hexdigest()[:DIGEST])
    return found


def _other_histories(file: AdapterFile) -> str:
    return (
        f"{file.path} was trained on top of {'another history' if file.on else 'no history'} than this model has\n"
        f"  its outputs will not be those that it was trained for: load the history first, as it was then"
    )


# ---- writing ------------------------------------------------------------------------------------


@contextmanager
def _together(path: Path) -> Iterator[bool]:
    """True in the first process. All leave the block once that one has, or all raise CheckpointError if it failed."""
    error = None
    try:
        yield torch.distributed.get_rank() == 0
    except Exception as caught:
        error = caught
    outcome = [error and f"{type(error).__name__}: {error}"]
    torch.distributed.broadcast_object_list(outcome)
    if outcome[0]:
        raise CheckpointError(
            f"{path} was not written: {outcome[0]}\n  by the first process, for all of them"
        ) from error


# ---- reading ------------------------------------------------------------------------------------


def read_file(path: str | os.PathLike[str]) -> AdapterFile:
    """An adapter file without a model: its header and metadata, no tensor yet. Raises CheckpointError, VariantError."""
    return _from_header(read_header(path))


def _from_header(header: Header) -> AdapterFile:
    path = header.path
    meta = _metadata(path, header.metadata)
    if not isinstance(meta["variant"], str):
        raise CheckpointError(f"{path}: its metadata names the variant {brief(meta['variant'])}; wanted a string")
    scale = meta.get("scale", 1.0)
    if not is_number(scale):
        raise CheckpointError(f"{path}: its metadata names the scale {brief(scale)}; wanted a finite number")
    variant = lookup(meta["variant"])
    try:
        cfg = variant.config.from_dict(meta["config"])
        if cfg.variant != meta["variant"]:
            raise CheckpointError(f"a config of {brief(cfg.variant)!r}, and the variant {meta['variant']!r}")
        targets = _shapes_of(meta["targets"])
        per_layer = _per_layer_of(meta.get("per_layer", {}), cfg, targets)
    except (LoraLiteError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata has a bad config or targets: {brief(error, 600)}") from error
    base = BaseRecord.from_json(meta["base"], targets)
    if not targets or base is None:
        raise CheckpointError(f"{path}: its metadata has no targets, or a bad base record\n  save the adapter again")
    on = meta.get("on", [])
    if not (isinstance(on, list) and all(isinstance(each, str) and len(each) == DIGEST for each in on)):
        raise CheckpointError(f'{path}: its metadata has "on": {brief(on)}; wanted digests of histories')
    never_ran = meta.get("never_ran", [])
    if not (isinstance(never_ran, list) and all(isinstance(at, str) and at in targets for at in never_ran)):
        raise CheckpointError(f'{path}: its metadata has "never_ran": {brief(never_ran)}; wanted some of its targets')
    return AdapterFile(header, cfg, float(scale), targets, per_layer, base, on, never_ran)


def _per_layer_of(entries: Any, cfg: BaseConfig, targets: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields that differ at some of the targets. Raises CheckpointError."""
    if not (isinstance(entries, dict) and all(isinstance(fields, dict) for fields in entries.values())):
        raise CheckpointError(f"per_layer is {brief(entries)!r}; wanted {{path: {{field: value}}}}")
    if not entries.keys() <= targets.keys() or bool(entries) < bool(cfg.per_layer):
        raise CheckpointError(
            f"settings by layer for {brief(sorted(entries)[:3])}; wanted them for some of its targets, as the "
            f"config has a per_layer"
        )
    return {at: cfg.checked_overrides(fields) for at, fields in entries.items()}


def _shapes_of(targets: Any) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of each target. Raises CheckpointError."""
    if not isinstance(targets, dict):
        raise CheckpointError(f"targets are {brief(targets)!r}; wanted {{path: [d_in, d_out]}}")
    check_names(targets, "the metadata")
    for path, shape in targets.items():
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in shape)):
            raise CheckpointError(f"target {path!r} is {brief(shape)!r}; wanted [d_in, d_out]")
    return {path: (shape[0], shape[1]) for path, shape in targets.items()}


def _metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if METADATA not in metadata:
        raise CheckpointError(
            f"{path} has no lora_lite metadata, so it was not written by lora_lite.save\n"
            f"  its metadata has {brief(sorted(metadata)) if metadata else 'nothing'}"
        )
    meta = parse_json(metadata[METADATA], f"{path}: its lora_lite metadata")
    found = meta.get("format")
    if type(found) is not int or found != FORMAT:
        raise CheckpointError(
            f"{path} has format {brief(repr(found))}, and lora_lite {__version__} reads format {FORMAT}\n"
            f"  read it with the version that wrote it: {brief(meta.get('library'))}"
        )
    missing = {"variant", "config", "targets", "base"} - meta.keys()
    if missing:
        raise CheckpointError(f"{path}: its lora_lite metadata lacks {sorted(missing)}")
    return meta


# ---- from a file to a model ---------------------------------------------------------------------


def _match(root: nn.Module, file: AdapterFile) -> tuple[dict[str, str], dict[str, Site]]:
    """The model's path and a site for each path of the file; CheckpointError unless all fit."""
    modules = dict(root.named_modules())
    mapping = resolve(file.path, file.targets, set(modules), type(root).__name__)
    targets, stacks = {}, find_stacks(modules)
    for path, size in file.targets.items():
        layer = layer_of(modules[mapping[path]], mapping[path])
        if layer is None or (layer.d_in, layer.d_out) != size:
            there = None if layer is None else (layer.d_in, layer.d_out)
            raise CheckpointError(
                f"{file.path}: {path} was saved from a layer with (d_in, d_out) = {size}, and {mapping[path]} of "
                f"this {type(root).__name__} has {there}\n  this is another base model"
            )
        targets[Target.of(layer, stacks)] = layer
    overrides = {mapping[path]: fields for path, fields in file.per_layer.items()}
    sites = dict(zip(file.targets, make_sites(targets, file.cfg, overrides), strict=True))
    specs = {file_key(path, name): spec for path, site in sites.items() for name, spec in site.specs.items()}
    check_shapes(file.header.entries, specs, str(file.path))
    return mapping, sites
