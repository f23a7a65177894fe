"""Adapters out of raw tensors: a model's whole state dict, as ZeRO-3 and FSDP consolidation write it.

Raw tensors say neither the method nor its settings, so the config comes from the caller. Every key is accounted for:

    <path>.lora_A, <path>.lora_A__fr    an adapter's (fr's), by our names or PEFT's: taken, whole or not at all
    a key of the model's state_dict     a base tensor: compared with the live one, never taken
    anything else                       an error

What wrappers put before and within a path is resolved as in keys.py.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from ..base import sharding
from ..base.fingerprint import BY_VALUES, tell_other_base
from ..base.layer import BaseLayer, layer_of
from ..base.stacks import Stacks, find_stacks
from ..base.storage import DENSE, Storage, spread
from ..core.adapter import Adapter, adapters
from ..core.attach import installed
from ..core.config import BaseConfig
from ..core.names import check_shapes, file_key
from ..core.resolve import checked_config, make_sites, overrides_at, specs_at
from ..core.state import Site
from ..core.targets import Target
from ..core.variant import REGISTRY, config_for
from ..dtypes import dtype_name
from ..errors import CheckpointError, LoraLiteError, brief
from .keys import core, plain_key, resolve
from .safetensors import DTYPES, Entry, Header, check_numbers

Layers = dict[str, dict[str, str]]
"""Path of a layer in the file -> name of a tensor of the adapter there -> its key in the file."""


@dataclass(frozen=True)
class _Raw:
    """What the keys of a file or a folder are; nothing but headers has been read."""

    path: Path
    held: dict[str, Header]
    """Key -> the file with its tensor."""
    layers: dict[str, Layers] = field(default_factory=lambda: defaultdict(lambda: defaultdict(dict)))
    """By the adapter's name."""
    base: dict[str, str] = field(default_factory=dict)
    """Key of a base tensor, in our naming -> in the file's."""

    def entry(self, key: str) -> Entry:
        return self.held[key].entries[key]

    def read(self, key: str) -> Tensor:
        return self.held[key].read([key])[key]


@dataclass(frozen=True)
class _Base:
    """The base tensors of the file against the live ones, by live key."""

    equal: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """Those that can't be compared: codes on one side and numbers on the other."""
    fingerprints: dict[str, list[Any]] = field(default_factory=dict)
    """Path of a target -> the fingerprint of the file's weight, where that isn't the live one's."""

    def __str__(self) -> str:
        return (
            f"{len(self.equal)} base tensors equal to this model's, {len(self.different)} different, "
            f"{len(self.unknown)} that can't be compared"
        )


def load_raw(
    root: nn.Module, path: Path, headers: Iterable[Header], cfg: BaseConfig | None, name: str, verify_base: bool
) -> Adapter:
    """`load` of raw tensors. Without a cfg, the CheckpointError says what the tensors look like."""
    live = _base_tensors(root)
    raw = _sorted_keys(path, {key: header for header in headers for key in header.entries}, live)
    chosen = _chosen(raw, name)
    layers = raw.layers[chosen]
    in_model, stacks = _layers(root, path, layers), find_stacks(dict(root.named_modules()))
    if cfg is None:
        raise CheckpointError(_description(raw, layers, {p: Target.of(layer) for p, layer in in_model.items()}))
    sites = _sites(checked_config(cfg), in_model, stacks)
    _check_complete(raw, layers, sites)
    mapping = resolve(path, raw.base, set(live), type(root).__name__, "base tensors")
    keys = {site.key(tensor): key for p, site in sites.items() for tensor, key in layers[p].items()}
    tensors = {key: raw.read(in_file) for key, in_file in keys.items()}
    check_numbers({keys[key]: tensor for key, tensor in tensors.items()}, str(path), "save the adapter again")
    order = {module: i for i, module in enumerate(root.modules())}
    with installed(root, cfg, name, sorted(sites.values(), key=lambda site: order[site.module]), tensors) as adapter:
        found = _compared(root, raw, {mapping[at]: key for at, key in raw.base.items()}, live, adapter)
        _check_base(path, adapter, found, verify_base)
    others = [f"adapter {who!r} ({sum(map(len, at.values()))})" for who, at in raw.layers.items() if who != chosen]
    left = f"; left there: {brief(', '.join(others), 400)}" if others else ""
    logger.info(f"loaded {adapter} from {path}: {len(keys)} tensors of adapter {chosen!r}, {found}{left}")
    return adapter


# ---- what each key is ---------------------------------------------------------------------------


def _base_tensors(root: nn.Module) -> dict[str, Tensor]:
    """The model's state_dict without what adapters have put there."""
    ours = {
        file_key(site.path, site.attribute(tensor))
        for adapter in adapters(root).values()
        for site in adapter.sites()
        for tensor in site.specs
    }
    return {key: t for key, t in root.state_dict().items() if isinstance(t, Tensor) and key not in ours}


def _sorted_keys(path: Path, held: dict[str, Header], live: Mapping[str, Tensor]) -> _Raw:
    """Each key by what it is. Raises CheckpointError for one that is neither an adapter's nor a base tensor's."""
    raw, cores, unknown, twice = _Raw(path, held), set(map(core, live)), [], []
    for key in held:
        plain = key if core(key) in cores else plain_key(key)
        at, _, leaf = plain.rpartition(".")
        tensor, _, who = leaf.partition("__")
        if core(plain) in cores:
            place, slot = raw.base, plain
        elif leaf.startswith("lora_"):
            place, slot = raw.layers[who or "default"][at], tensor
        else:
            unknown.append(key)
            continue
        if slot in place:
            twice += [place[slot], key]
        place[slot] = key
    if not raw.layers:
        raise CheckpointError(
            f"{path} has no adapter tensors: none of its {len(held)} keys ends in lora_*\n"
            f"  such as {brief('; '.join(list(held)[:3]), 600)}\n"
            f"  ZeRO-3 and FSDP write all tensors only where they are told to gather them"
        )
    for keys, problem in ((unknown, "are neither an adapter's nor this model's"), (twice, "are one tensor twice")):
        if keys:
            raise CheckpointError(
                f"{path}: {len(keys)} of its {len(held)} keys {problem}\n"
                f"  such as {brief('; '.join(keys[:3]), 1200)}\n"
                f"  nothing is left out in silence: take them out of the file, or load it on its own model"
            )
    return raw


def _chosen(raw: _Raw, name: str) -> str:
    """Which adapter of the file is meant: that of this name, the one with plain names, or the only one."""
    names = list(raw.layers)
    for each in (name, "default"):
        if each in names:
            return each
    if len(names) > 1:
        raise CheckpointError(
            f"{raw.path} holds the tensors of {len(names)} adapters: {brief(', '.join(names), 600)}\n"
            f"  take one by its name: lora_lite.load(model, path, name={brief(names[0])!r}, cfg=...)"
        )
    return names[0]


def _layers(root: nn.Module, path: Path, layers: Layers) -> dict[str, BaseLayer]:
    """The model's layer for each path with adapter tensors. Raises CheckpointError."""
    modules = dict(root.named_modules())
    mapping = resolve(path, layers, set(modules), type(root).__name__)
    targets = {}
    for in_file, tensors in layers.items():
        module = modules[mapping[in_file]]
        layer = layer_of(module, mapping[in_file])
        if layer is None:
            raise CheckpointError(
                f"{path}: {in_file} has adapter tensors ({brief(', '.join(tensors))}), and in this "
                f"{type(root).__name__} it is no linear layer but {type(module).__name__}\n  load it on its own model"
            )
        targets[in_file] = layer
    return targets


def _sites(cfg: BaseConfig, layers: Mapping[str, BaseLayer], stacks: Stacks) -> dict[str, Site]:
    """A site for each path of the file, with the overrides that the config's regexes give it."""
    targets = {Target.of(layer, stacks): layer for layer in layers.values()}
    overrides = overrides_at(cfg, [target.path for target in targets])
    return dict(zip(layers, make_sites(targets, cfg, overrides), strict=True))


def _check_complete(raw: _Raw, layers: Layers, sites: Mapping[str, Site]) -> None:
    """CheckpointError unless each layer has exactly the variant's tensors, each of its shape."""
    got = {file_key(path, tensor): raw.entry(key) for path, keys in layers.items() for tensor, key in keys.items()}
    specs = {file_key(path, tensor): spec for path, site in sites.items() for tensor, spec in site.specs.items()}
    missing = [key for key in specs if key not in got]
    if missing and not any(specs[key].trainable for key in missing):
        raise CheckpointError(
            f"{raw.path}: {len(missing)} of its buffers are missing, such as {missing[0]}\n"
            f"  a checkpoint of PEFT's has none; its adapter folder is read by lora_lite.load_peft(model, folder)"
        )
    empty = [key for key, entry in got.items() if entry.shape == (0,)]
    if empty:
        raise CheckpointError(
            f"{raw.path}: {len(empty)} adapter tensors are empty, such as {empty[0]}, as ZeRO-3 leaves them outside of "
            f"a gather\n  consolidate the checkpoint again (stage3_gather_16bit_weights_on_model_save, zero_to_fp32)"
        )
    check_shapes(got, specs, str(raw.path))


def _description(raw: _Raw, layers: Layers, targets: Mapping[str, Target]) -> str:
    """What the tensors look like, for a caller who has to say what they are."""
    shapes = {at: {tensor: raw.entry(key).shape for tensor, key in held.items()} for at, held in layers.items()}
    at, first = next(iter(shapes.items()))
    ranks = sorted({n for shape in first.values() for n in shape if n > 0})
    lacks = [(cfg, [_lacking(targets[at], shapes[at], cfg) for at in shapes]) for cfg in _candidates(ranks)]
    fitting = [(cfg, sorted({t for at in lack for t in at or ()})) for cfg, lack in lacks if None not in lack]
    whole = [cfg for cfg, lack in fitting if not lack]
    said = [_call(cfg) for cfg in whole] or [f"{_call(cfg)}, but for {', '.join(lack)}" for cfg, lack in fitting]
    return (
        f"{raw.path} has no lora_lite metadata: raw tensors say neither the method nor its settings, such as alpha\n"
        f"  {sum(map(len, shapes.values()))} tensors at {len(shapes)} layers, such as {at}: "
        f"{brief(', '.join(f'{tensor} {shape}' for tensor, shape in first.items()), 400)}\n"
        f"  their names and shapes fit {' or '.join(said) or 'no registered variant at one rank'}\n"
        f"  give the config that they were trained with: lora_lite.load(model, path, cfg=...)"
    )


def _candidates(ranks: Iterable[int]) -> list[BaseConfig]:
    """A config of each variant by its defaults; at each of these ranks, of one that has a rank."""
    out = []
    for name in sorted(REGISTRY):
        make: Any = config_for(name)
        known = {each.name: each for each in fields(make)}
        given = [{"r": r} for r in ranks] if "r" in known else [{}]
        needed = [each for each in known.values() if each.default is MISSING and each.default_factory is MISSING]
        if all(each.name == "variant" for each in needed):
            out += [make(variant=name, **each) for each in given]
    return out


def _lacking(target: Target, shapes: Mapping[str, tuple[int, ...]], cfg: BaseConfig) -> set[str] | None:
    """The buffers that aren't there, as in PEFT's; None if these aren't a layer's tensors of this variant."""
    try:
        specs = specs_at(target, cfg)
    except LoraLiteError:
        return None
    lacking = specs.keys() - shapes.keys()
    fits = all(tensor in specs and tuple(specs[tensor].shape) == shape for tensor, shape in shapes.items())
    return lacking if fits and not any(specs[tensor].trainable for tensor in lacking) else None


def _call(cfg: Any) -> str:
    return f"lora_lite.config_for({cfg.variant!r})({f'r={cfg.r}, ' if 'r' in cfg.to_dict() else ''}...)"


# ---- the base weights in between ----------------------------------------------------------------


def _compared(
    root: nn.Module, raw: _Raw, keys: Mapping[str, str], live: Mapping[str, Tensor], adapter: Adapter
) -> _Base:
    """The file's tensors, by live key, against the live ones; one at a time is in memory."""
    layers = {file_key(p, "weight"): layer for p, m in root.named_modules() if (layer := layer_of(m, p)) is not None}
    weights = {file_key(site.path, site.base.kind.weight): site.path for site in adapter.sites()}
    found = _Base()
    for key, in_file in keys.items():
        storage = layers[key].storage if key in layers else DENSE
        same = same_tensor(live[key], raw.held[in_file], in_file, storage)
        (found.unknown if same is None else found.equal if same else found.different).append(key)
        entry = raw.entry(in_file)
        if key in weights and not same and entry.dtype in DTYPES:
            found.fingerprints[weights[key]] = [dtype_name(DTYPES[entry.dtype]), *spread(raw.read(in_file))]
    return found


def same_tensor(live: Tensor, header: Header, key: str, storage: Storage) -> bool | None:
    """Are they equal: bit for bit in one dtype, of two float dtypes to the coarser one's rounding? None: can't tell.

    storage    that of the layer whose weight it is; dense for any other tensor
    """
    entry = header.entries[key]
    dtype = DTYPES.get(entry.dtype)
    alike = dtype == live.dtype and entry.shape == tuple(live.shape)
    if dtype is None or live.is_meta or sharding.is_sharded(live) or not storage.is_known:
        return None
    if not alike and (not storage.is_dense or dtype.is_floating_point != live.is_floating_point()):
        return None
    if entry.shape != tuple(live.shape) or not (alike or dtype.is_floating_point):
        return False
    live = live.as_subclass(Tensor)
    held = header.read([key])[key].to(live.device)
    if alike:
        return torch.equal(held, live)
    wide, coarse = torch.promote_types(dtype, live.dtype), max(dtype, live.dtype, key=lambda d: torch.finfo(d).eps)
    if wide in (dtype, live.dtype):
        return torch.equal(held.to(coarse), live.to(coarse))
    # float16 and bfloat16, each a rounding of what neither can hold: within both roundings, and float16's smallest step
    a, b = held.to(wide), live.to(wide)
    half_steps = sum(torch.finfo(d).eps for d in (dtype, live.dtype)) / 2
    step = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    return bool(((a - b).abs() <= half_steps * torch.maximum(a.abs(), b.abs()) + step).all())


def _check_base(path: Path, adapter: Adapter, found: _Base, verify_base: bool) -> None:
    """CheckpointError for a method that depends on its base weight, where that isn't known to be this one."""
    reads = any(site.base_weight != "unused" for site in adapter.sites())
    if not found.different and not (reads and found.fingerprints):
        return
    base, doubtful = adapter.base_record, found.different or found.unknown
    message = (
        f"{path} holds another base than this {base.class_name}: {found}\n"
        f"  such as {brief('; '.join(doubtful[:3]), 1200)}"
    )
    tell_other_base(message, adapter.variant, reads, verify_base, BY_VALUES)
    if reads and found.fingerprints:
        fingerprint = base.fingerprint | found.fingerprints
        adapter.set_base_record(replace(base, quantization=None, fingerprint=fingerprint))
