"""One safetensors file per adapter: save, load, and restore into an attached one. adapter_file.py has its format."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import nn

from ..base import sharding
from ..base.fingerprint import BaseRecord, other_base, same_base, tell_other_base
from ..base.layer import on_all_channels
from ..core.adapter import Adapter, adapters, get_adapter
from ..core.attach import installed
from ..core.config import BaseConfig, to_json
from ..core.exchange import replaced
from ..core.names import check_shapes
from ..core.ran import uncalled
from ..core.resolve import attachable, make_sites
from ..core.room import has_at_most, padded, takes
from ..core.scaled import check_in_use
from ..core.state import Method, Site, number_sites, session_at, session_of
from ..core.variant import ParamSpec, Variant, lookup
from ..errors import CheckpointError, ConfigError, brief
from ..version import __version__
from .adapter_file import DIGEST, FORMAT, METADATA, SEVERAL, AdapterFile, FileMethod, checked, read_file
from .formats.load import by_header, by_path
from .keys import layers_of, resolve
from .raw import load_raw
from .safetensors import check_names, check_numbers, read_any, write_tensors

_GO_BACK = "nothing was written; go back to an earlier file, with a lower learning rate"


def save(model: nn.Module, path: str | os.PathLike[str], name: str = "default", resume: bool = False) -> None:
    """Write one adapter to a safetensors file, with the scale that it has now.

    resume      with what only a training needs that goes on from here, such as the state of a schedule

    A crash leaves the old file or the new one, never a part. Under FSDP2, ZeRO-3 and tensor parallelism every process
    must call this: shards are gathered, and the first process writes. If one of them can't, all raise.

    Raises:
        TargetError: for an unknown name.
        CheckpointError: if path is a folder, if a tensor holds NaN or an infinity or has lost its shape, as under a
            partitioning that this library doesn't know (gather it first); where it is sharded, also when the first
            process could not write.
        LoraLiteError: where it is sharded, for what another process raised.
    """
    path = Path(path)
    adapter, memory = get_adapter(model, name), f"adapter {name!r} in memory"
    # The digests read the tensors of the adapters that come first, so all are gathered at once, not this one alone.
    with sharding.gathered(tensor for other in adapters(model).values() for _, tensor in other.named_tensors()):
        # A clone each: views of one storage would be written as the whole of it.
        specs, live = adapter.specs(resume), adapter.state_dict(resume)
        tensors = {key: sharding.whole(value).cpu().clone().contiguous() for key, value in live.items()}
        digests = _digests_of_first(model, name)
    with sharding.all_or_none(adapter.is_sharded):
        check_shapes(tensors, specs, memory)
        check_numbers(tensors, memory, _GO_BACK, specs)
        check_names(tensors, memory)
        metadata = _metadata(model, adapter, digests, resume)
    with sharding.all_or_none(adapter.is_sharded):  # one process may have a NaN that the first, which writes, has not
        if not adapter.is_sharded or torch.distributed.get_rank() == 0:
            _write(path, adapter, tensors, metadata)


def _write(path: Path, adapter: Adapter, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; an adapter is one file, such as {path / 'adapter.safetensors'}")
    try:
        write_tensors(path, tensors, metadata)
    except OSError as error:
        if not adapter.is_sharded:
            raise
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} was not written: {reason}\n  the first process writes for all") from error
    logger.info(f"saved {adapter} to {path} ({path.stat().st_size / 1e6:.1f} MB)")
    schedules = [v for v in adapter.variant.split(" + ") if lookup(v).on_step is not Variant.on_step]
    if schedules and adapter.never_stepped:
        problem = f"{path}: {schedules[0]!r} has a schedule, and no step of it was taken"
        logger.warning(f"{problem}\n  call adapter.step() after optimizer.step(), or train by AdapterTrainer")


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    verify_base: bool = True,
    cfg: BaseConfig | None = None,
    replace: bool = False,
    max_rank: int | None = None,
) -> Adapter:
    """Attach the adapter of a file: no init, no SVD, no data; tensors, scale and outputs are bit-equal.

    verify_base=False turns the error for a method that depends on its base weight (PiSSA, DoRA) on another base
    into the warning that other methods give.

    The path may also be a file or a folder of raw tensors, as ZeRO-3 and FSDP consolidation write them: with a
    wrapper's prefix, in shards, base weights mixed in (lora_lite/io/raw.py). They don't say how they were trained, so
    `cfg` does; its filters aren't needed. Of several adapters in it, `name` takes the one of that name. A folder of
    PEFT's, a file of diffusers and other programs' formats (docs/formats.md) say it, and are known by what is in them.

    replace     put it in the place of the attached adapter of that name, whatever that is: method, rank, layers. If it
                fails, that one is as it was
    max_rank    of a LoRA: fill its factors up with zeros to this rank, with the scaling in B (bit-equal no more, where
                that isn't a power of 2). With replace=True, a LoRA that has room takes the values of another one of at
                most that rank on some of its layers: the same parameters and hooks, and a compiled model goes on with
                its graph. Where it doesn't fit, it is replaced

    Raises:
        CheckpointError: unless every key and shape fits.
        ConfigError: for a cfg beside the one in a file.

    It raises what attach raises, too; the model is then as it was. On a model that is sharded already (tensor
    parallelism, zero.Init) all processes call it, and a file that one of them can't read none of them loads.
    """
    with sharding.all_or_none(any(map(sharding.is_sharded, model.parameters()))):  # one process may lack the file
        # Only what can't be a file of ours is looked at more closely.
        may_be_ours = Path(path).suffix == ".safetensors" and not Path(path).is_dir()
        load_other = None if may_be_ours else by_path(Path(path), cfg)
        headers = read_any(path) if load_other is None else []
    if load_other is not None:
        _check_plain(path, replace, max_rank)
        return load_other(model, Path(path), name)
    (header, *others), root = headers, attachable(model)
    if others or METADATA not in header.metadata:
        _check_plain(path, replace, max_rank)
        if not others and (load_other := by_header(header, cfg)) is not None:
            return load_other(root, header.path, name)
        return load_raw(root, Path(path), [header, *others], cfg, name, verify_base)
    if cfg is not None:
        raise ConfigError(f"{header.path} holds the config of its adapter\n  leave cfg= out: it is for raw tensors")

    with _attached(root, file := checked(header), name, replace, max_rank) as (adapter, recorded):
        # Of the file's layers: an adapter with room may have more.
        if not same_base(recorded, adapter.base_record.at(recorded.fingerprint)):
            reads = any(site.base_weight != "unused" for site in adapter.sites())
            message = other_base(str(file.path), recorded, adapter.base_record)
            tell_other_base(message, adapter.variant, reads, verify_base)
            if reads:  # the values belong to the recorded base, so a later save must name that
                adapter.set_base_record(recorded)
    if file.on != _digests_of_first(root, name):
        logger.warning(_other_histories(file))
    logger.info(f"loaded {adapter} from {path}")
    return adapter


def load_onto_stand_in(root: nn.Module, path: str | os.PathLike[str], name: str) -> Adapter:
    """Attach the adapter of a file to a module that has layers of its sizes and no weights of its base, whose record it
    keeps. For what needs the adapter's own tensors alone. Raises what load raises."""
    with _attached(root, read_file(path), name) as (adapter, recorded):
        adapter.set_base_record(recorded)
    return adapter


@contextmanager
def _attached(
    root: nn.Module, file: AdapterFile, name: str, replace: bool = False, max_rank: int | None = None
) -> Iterator[tuple[Adapter, BaseRecord]]:
    """A file's adapter on a model, taken off again if the block raises, and the file's record of its base, at the paths
    of the model. `load` says what replace and max_rank are."""
    by_path = [_sites(root, file, method) for method in file.methods]
    methods = [Method(m.cfg, list(sites.values())) for m, sites in zip(file.methods, by_path, strict=True)]
    number_sites(methods)
    specs, names = _specs(file, by_path)
    check_shapes(file.header.entries, specs, str(file.path))  # no tensor has been read so far
    tensors = {names[key]: tensor for key, tensor in file.tensors(specs).items()}
    if replace:
        get_adapter(root, name)
    known = session_at(root).adapters[name] if replace else None
    room = max_rank if known is None or max_rank is not None else known.max_rank
    if room is not None and (max_rank is not None or has_at_most(methods, room)):
        has_room = known is not None and known.max_rank == room
        alpha = known.methods[0].cfg.alpha if known is not None and has_room else None
        method, tensors = padded(methods, tensors, room, alpha)
        methods, by_path = [method], [dict(zip(by_path[0], method.sites, strict=True))]
        if known is not None and has_room and takes(known, method):
            _fill(root, file, by_path[0], name, tensors)
            yield get_adapter(root, name), file.base.renamed({p: site.path for p, site in by_path[0].items()})
            return
    else:
        room = None
    put = partial(installed, owned=True) if known is None else replaced  # the tensors were read for it alone
    with put(root, methods, name, tensors, file.scale, file.steps) as adapter:
        session_at(root).adapters[name].max_rank = room
        file.check_ties({p for p, site in sites.items() if site.base.ties} for sites in by_path)
        yield adapter, file.base.renamed({p: site.path for sites in by_path for p, site in sites.items()})
        for site in [site for sites in by_path for in_file, site in sites.items() if in_file in file.never_ran]:
            site.never_ran = True


def _fill(
    root: nn.Module, file: AdapterFile, sites: Mapping[str, Site], name: str, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put the values of a file into an adapter that has room for them; zeros where the file has no layer."""
    adapter, state = get_adapter(root, name), session_at(root).adapters[name]
    adapter.load_state_dict({key: torch.zeros_like(t) for key, t in adapter.state_dict().items()} | dict(tensors))
    adapter.scale, state.steps = file.scale, file.steps
    never = {sites[path].path for path in file.never_ran if path in sites}
    for site in state.sites:
        site.never_ran = site.path in never


def _check_plain(path: str | os.PathLike[str], replace: bool, max_rank: int | None) -> None:
    if replace or max_rank is not None:
        raise ConfigError(f"{path}: replace and max_rank are for files of this library\n  load it, then save it as one")


def restore(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> Adapter:
    """Copy a file's values and scale into an adapter that is attached: training goes on with the same parameters.

    Under FSDP2 and ZeRO-3 each process takes its shards, and if one of them can't, all raise. Nothing has changed where
    it raises.

    Raises:
        CheckpointError: unless config, base, keys and shapes are the same; once ZeRO-3's optimizer has copies of the
            values.
        TargetError: for an unknown name.
        LoraLiteError: where it is sharded, for what another process raised.
    """
    adapter = get_adapter(model, name)
    first = [other for other in adapters(model).values() if other.leads]
    with sharding.gathered(tensor for other in first for _, tensor in other.named_tensors()):
        digests = _digests_of_first(model, name)
    with sharding.all_or_none(adapter.is_sharded):  # one process may lack the file
        file = read_file(path)
        tensors = _values(model, file, adapter, digests)
    adapter.load_state_dict(tensors)
    adapter.scale = file.scale
    if file.steps is not None:
        adapter.steps = file.steps
    logger.info(f"restored {adapter} from {path}")
    return adapter


def _values(model: nn.Module, file: AdapterFile, adapter: Adapter, digests: list[str]) -> dict[str, torch.Tensor]:
    """The adapter's tensors with a file's values, by their keys. CheckpointError where it isn't of this adapter."""
    name = adapter.name
    check_in_use([session_of(model)[1].adapters[name]])
    mapping = resolve(file.path, file.targets, set(adapter.targets), adapter.base["class"])
    differ: dict[str, Any] = {}
    methods = list(zip(file.methods, adapter.methods, strict=len(file.methods) == len(adapter.methods)))
    if len(file.methods) != len(adapter.methods):
        differ["methods"] = [method.cfg.variant for method in file.methods], adapter.variant.split(" + ")
    for in_file, live in methods:
        differ |= _differing(in_file, live, mapping)
    if differ:
        raise CheckpointError(
            f"{file.path} and adapter {name!r} are not of one config\n  (file, adapter): {brief(differ, 600)}\n"
            f"  detach it and use lora_lite.load"
        )
    recorded = file.base.renamed(mapping)
    if not same_base(recorded, adapter.base_record):
        raise CheckpointError(
            f"{other_base(str(file.path), recorded, adapter.base_record)}\n"
            f"  training goes on on its own base: load that, or detach and use lora_lite.load"
        )
    if file.on != digests:
        raise CheckpointError(_other_histories(file))
    by_path = [{site.path: site for site in live.sites} for _, live in methods]
    wanted = [{path: mapping[path] for path in in_file.targets} for in_file, _ in methods]
    if any({*paths.values()} != sites.keys() for paths, sites in zip(wanted, by_path, strict=True)):
        raise CheckpointError(f"{file.path} and adapter {name!r} are not on the same layers\n  use lora_lite.load")
    pairs = zip(wanted, by_path, strict=True)
    in_file_by_path = [{p: sites[path] for p, path in paths.items()} for paths, sites in pairs]
    file.check_ties({p for p, site in sites.items() if site.base.ties} for sites in in_file_by_path)
    specs, keys = _specs(file, in_file_by_path)
    shapes = adapter.shapes()
    check_shapes(file.header.entries, {in_file: shapes[keys[in_file]] for in_file in specs}, str(file.path))
    state = adapter.state_dict()  # what the file leaves to a resume stays as it is
    return state | {keys[key]: tensor for key, tensor in file.tensors(specs).items()}


def _differing(in_file: FileMethod, live: Method, mapping: Mapping[str, str]) -> dict[str, Any]:
    """The settings in which a file's method isn't the attached one, with both values."""
    stored, attached = in_file.cfg.to_dict(), live.cfg.to_dict()
    # The filters have done their work, and values are cast to the live dtype. per_layer counts as it was resolved.
    for field in (*in_file.cfg.FILTERS, "dtype", "per_layer"):
        stored.pop(field, None)
    differ = {field: (value, attached.get(field)) for field, value in stored.items() if value != attached.get(field)}
    per_layer = {mapping[path]: overrides for path, overrides in in_file.per_layer.items()}
    overrides = {site.path: dict(site.overrides) for site in live.sites if site.overrides}
    return differ if per_layer == overrides else differ | {"per_layer": (per_layer, overrides)}


def _metadata(model: nn.Module, adapter: Adapter, digests: list[str], resume: bool) -> dict[str, str]:
    never = set() if all(site.ran for site in adapter.sites()) else uncalled(model) & adapter.targets.keys()
    optional: dict[str, Any] = {"on": digests, "never_ran": sorted(never)}
    if resume and (adapter.steps or adapter.never_stepped):  # else its own file didn't say how many there were
        optional["steps"] = adapter.steps
    return file_metadata(adapter.methods, adapter.scale, adapter.base, **optional)


def file_metadata(methods: Sequence[Method], scale: float, base: Mapping[str, Any], **optional: Any) -> dict[str, str]:
    """The metadata of an adapter's file, in the format of adapter_file.py; what is empty is left out."""
    entries = [_method_metadata(method) for method in methods]
    fields = {
        **({"format": SEVERAL, "methods": entries} if len(entries) > 1 else {"format": FORMAT, **entries[0]}),
        "scale": scale,
        "base": base,
        "library": __version__,
    } | {key: value for key, value in optional.items() if value or key == "steps"}
    return {"format": "pt", METADATA: json.dumps(fields)}


def _method_metadata(method: Method) -> dict[str, Any]:
    variant, targets = lookup(method.cfg.variant), [site.target for site in method.sites]
    optional: dict[str, Any] = {"per_layer": {s.path: to_json(s.overrides) for s in method.sites if s.overrides}}
    if variant.layer_specs is not Variant.layer_specs:
        optional["biased"] = [target.path for target in targets if target.has_bias]
        optional["diagonal"] = [target.path for target in targets if target.is_diagonal]
    if method.cfg.tied_weights == "as_base":
        optional["tied"] = [site.path for site in method.sites if site.base.ties]
        optional["untied"] = [site.path for site in method.sites if not site.base.ties]
    return {
        "variant": method.cfg.variant,
        "config": method.cfg.to_dict(),
        "targets": {target.path: (target.d_in, target.d_out) for target in targets},
    } | {key: value for key, value in optional.items() if value}


def _digests_of_first(model: nn.Module, name: str) -> list[str]:
    """A digest of each adapter that comes before all others, other than this one: its config, scale and tensors."""
    if get_adapter(model, name).leads:
        return []
    digests = []
    for adapter in (other for other in adapters(model).values() if other.leads):
        settings = [adapter.config.to_dict(), to_json(adapter.per_layer), adapter.scale]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for key, tensor in adapter.state_dict().items():
            digest.update(key.encode())
            # As bytes, since numpy has no bfloat16.
            digest.update(sharding.whole(tensor).detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        digests.append(digest.hexdigest()[:DIGEST])
    return digests


def _other_histories(file: AdapterFile) -> str:
    return (
        f"{file.path} was trained on top of {'another history' if file.on else 'no history'} than this model has\n"
        f"  its outputs will not be those that it was trained for: load the history first, as it was then"
    )


def _sites(root: nn.Module, file: AdapterFile, method: FileMethod) -> dict[str, Site]:
    """A site for each path of a file's method; CheckpointError unless their sizes fit the model's."""
    targets, layers = layers_of(root, file.path, method.targets, method.cfg.kinds)
    for in_file, target in targets.items():
        if method.targets[in_file] != (target.d_in, target.d_out):
            size, live_size = method.targets[in_file], (target.d_in, target.d_out)
            whole = on_all_channels(layers[target]) if method.cfg.variant == "lora" else None
            if whole is None or (whole.d_in, whole.d_out) != size:
                raise CheckpointError(
                    f"{file.path}: {in_file} was saved from a layer with (d_in, d_out) = {size}, and {target.path} of "
                    f"this {type(root).__name__} has {live_size}\n  this is another base model"
                )
            targets[in_file] = target.on(whole)
            layers = {targets[in_file] if t is target else t: whole if t is target else v for t, v in layers.items()}
    overrides = {targets[path].path: fields for path, fields in method.per_layer.items()}
    return dict(zip(targets, make_sites(layers, method.cfg, overrides), strict=True))


def _specs(file: AdapterFile, by_path: Sequence[Mapping[str, Site]]) -> tuple[dict[str, ParamSpec], dict[str, str]]:
    """The ParamSpec of each tensor that the file should have, and its key in the model, by its key in the file.

    by_path     for each method its sites, by their paths in the file, in its order
    """
    layers = [{path: (site.target, site.specs) for path, site in sites.items()} for sites in by_path]
    places = [(m, p, site) for m, sites in zip(file.methods, by_path, strict=True) for p, site in sites.items()]
    names = {method.key(path, tensor): site.key(tensor) for method, path, site in places for tensor in site.specs}
    specs = file.specs(layers)
    return specs, {key: names.get(key, key) for key in specs}
