"""Adapters out of raw tensors: a model's whole state dict, as ZeRO-3 and FSDP consolidation write it.

Raw tensors say neither the method nor its settings, so the config comes from the caller. Every key is accounted for:

    <path>.lora_A, <path>.lora_A__fr    an adapter's (fr's), by our names or PEFT's: taken, whole or not at all
    a key of the model's state_dict     a base tensor: compared with the live one, never taken
    anything else                       an error

What wrappers put before and within a path is resolved as in keys.py.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from ..base import sharding
from ..base.fingerprint import BY_VALUES, tell_other_base
from ..base.layer import BaseLayer, layer_of
from ..base.stacks import find_stacks
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

Layers = dict[str, dict[str, str]]  # path of a layer in the file -> name of a tensor there -> its key in the file


@dataclass(frozen=True)
class _Raw:
    """The keys of a file or a folder, sorted by what they are; nothing but headers has been read."""

    path: Path
    headers: dict[str, Header]  # key -> the file with its tensor
    layers: dict[str, Layers] = field(default_factory=lambda: defaultdict(lambda: defaultdict(dict)))  # by adapter
    base: dict[str, str] = field(default_factory=dict)  # key of a base tensor, in our naming -> in the file's

    def entry(self, key: str) -> Entry:
        return self.headers[key].entries[key]

    def read(self, key: str) -> Tensor:
        return self.headers[key].read([key])[key]


@dataclass(frozen=True)
class _Comparison:
    """The base tensors of the file against the live ones, by live key."""

    equal: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # codes on one side and numbers on the other
    fingerprints: dict[str, list[Any]] = field(default_factory=dict)  # path -> the file's, where it isn't the live one

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
    keys = raw.layers[chosen]
    layers = _layers(root, path, keys)
    if cfg is None:
        raise CheckpointError(_description(raw, keys, layers))
    sites = _sites(root, checked_config(cfg), layers)
    _check_complete(raw, keys, sites)
    mapping = resolve(path, raw.base, set(live), type(root).__name__, "base tensors")
    stored = {key: raw.read(key) for at_layer in keys.values() for key in at_layer.values()}
    check_numbers(stored, str(path), "save the adapter again")
    tensors = {site.key(tensor): stored[key] for p, site in sites.items() for tensor, key in keys[p].items()}
    order = {module: i for i, module in enumerate(root.modules())}  # attach's: files are sorted by key, 10 before 2
    with installed(root, cfg, name, sorted(sites.values(), key=lambda site: order[site.module]), tensors) as adapter:
        comparison = _compared(root, raw, {mapping[plain]: key for plain, key in raw.base.items()}, live, adapter)
        _check_base(path, adapter, comparison, verify_base)
    others = [
        f"adapter {other!r} ({sum(map(len, in_file.values()))})"
        for other, in_file in raw.layers.items()
        if other != chosen
    ]
    left = f"; left there: {brief(', '.join(others), 400)}" if others else ""
    logger.info(f"loaded {adapter} from {path}: {len(stored)} tensors of adapter {chosen!r}, {comparison}{left}")
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
    # A module's get_extra_state may put anything there.
    return {key: t for key, t in root.state_dict().items() if isinstance(t, Tensor) and key not in ours}


def _sorted_keys(path: Path, headers: dict[str, Header], live: Mapping[str, Tensor]) -> _Raw:
    """Each key by what it is. Raises CheckpointError for one that is neither an adapter's nor a base tensor's."""
    raw, cores, unknown, twice = _Raw(path, headers), set(map(core, live)), [], []
    for key in headers:
        plain = key if core(key) in cores else plain_key(key)  # a base tensor may be called lora_A, too
        layer, _, leaf = plain.rpartition(".")
        tensor, _, adapter = leaf.partition("__")
        if core(plain) in cores:
            place, slot = raw.base, plain
        elif leaf.startswith("lora_"):
            place, slot = raw.layers[adapter or "default"][layer], tensor
        else:
            unknown.append(key)
            continue
        if slot in place:
            twice += [place[slot], key]
        place[slot] = key
    if not raw.layers:
        raise CheckpointError(
            f"{path} has no adapter tensors: none of its {len(headers)} keys ends in lora_*\n"
            f"  such as {brief('; '.join(list(headers)[:3]), 600)}\n"
            f"  ZeRO-3 and FSDP write all tensors only where they are told to gather them"
        )
    for keys, problem in ((unknown, "are neither an adapter's nor this model's"), (twice, "are one tensor twice")):
        if keys:
            raise CheckpointError(
                f"{path}: {len(keys)} of its {len(headers)} keys {problem}\n"
                f"  such as {brief('; '.join(keys[:3]), 1200)}\n"
                f"  nothing is left out in silence: take them out of the file, or load it on its own model"
            )
    return raw


def _chosen(raw: _Raw, name: str) -> str:
    """The adapter of the file that is meant: that of this name, the one with plain names, or the only one."""
    names = list(raw.layers)
    chosen = next(adapter for adapter in (name, "default", *names) if adapter in names)
    if chosen not in (name, "default") and len(names) > 1:
        raise CheckpointError(
            f"{raw.path} holds the tensors of {len(names)} adapters: {brief(', '.join(names), 600)}\n"
            f"  take one by its name: lora_lite.load(model, path, name={brief(names[0])!r}, cfg=...)"
        )
    return chosen


def _layers(root: nn.Module, path: Path, keys: Layers) -> dict[str, BaseLayer]:
    """The model's layer for each path with adapter tensors. Raises CheckpointError."""
    modules, layers = dict(root.named_modules()), {}
    for in_file, in_model in resolve(path, keys, set(modules), type(root).__name__).items():
        layer = layer_of(modules[in_model], in_model)
        if layer is None:
            raise CheckpointError(
                f"{path}: {in_file} has adapter tensors ({brief(', '.join(keys[in_file]))}), and in this "
                f"{type(root).__name__} it is no linear layer but {type(modules[in_model]).__name__}\n"
                f"  load it on its own model"
            )
        layers[in_file] = layer
    return layers


def _sites(root: nn.Module, cfg: BaseConfig, layers: Mapping[str, BaseLayer]) -> dict[str, Site]:
    """A site for each path of the file, with the overrides that the config's regexes give it."""
    stacks = find_stacks(dict(root.named_modules()))
    targets = {Target.of(layer, stacks): layer for layer in layers.values()}
    overrides = overrides_at(cfg, [target.path for target in targets])
    return dict(zip(layers, make_sites(targets, cfg, overrides), strict=True))


def _check_complete(raw: _Raw, layers: Layers, sites: Mapping[str, Site]) -> None:
    """CheckpointError unless each layer has exactly the variant's tensors, each of its shape."""
    entries = {file_key(path, tensor): raw.entry(key) for path, keys in layers.items() for tensor, key in keys.items()}
    specs = {file_key(path, tensor): spec for path, site in sites.items() for tensor, spec in site.specs.items()}
    # PEFT computes what is a buffer here, such as DoRA's norms n0, anew in each forward, so its files lack it.
    missing = [key for key in specs if key not in entries]
    if missing and not any(specs[key].trainable for key in missing):
        raise CheckpointError(
            f"{raw.path}: {len(missing)} of its buffers are missing, such as {missing[0]}\n"
            f"  a checkpoint of PEFT's has none; its adapter folder is read by lora_lite.load_peft(model, folder)"
        )
    empty = [key for key, entry in entries.items() if entry.shape == (0,)]
    if empty:
        raise CheckpointError(
            f"{raw.path}: {len(empty)} adapter tensors are empty, such as {empty[0]}, as ZeRO-3 leaves them outside of "
            f"a gather\n  consolidate the checkpoint again (stage3_gather_16bit_weights_on_model_save, zero_to_fp32)"
        )
    check_shapes(entries, specs, str(raw.path))


def _description(raw: _Raw, layers: Layers, in_model: Mapping[str, BaseLayer]) -> str:
    """The look of the tensors, for a caller who has to say what they are."""
    shapes = {path: {tensor: raw.entry(key).shape for tensor, key in keys.items()} for path, keys in layers.items()}
    path, example = next(iter(shapes.items()))
    ranks = {n for shape in example.values() for n in shape if n > 0}  # the rank is a side of a tensor, not known which
    fits = []
    for cfg in _candidates(sorted(ranks)):
        lacking = [_lacking(Target.of(in_model[p]), shapes[p], cfg) for p in shapes]
        if None not in lacking:
            fits.append((_call(cfg), sorted({tensor for names in lacking for tensor in names or ()})))
    whole = [call for call, lacking in fits if not lacking]
    calls = whole or [f"{call}, but for {', '.join(lacking)}" for call, lacking in fits]
    return (
        f"{raw.path} has no lora_lite metadata: raw tensors say neither the method nor its settings, such as alpha\n"
        f"  {sum(map(len, shapes.values()))} tensors at {len(shapes)} layers, such as {path}: "
        f"{brief(', '.join(f'{tensor} {shape}' for tensor, shape in example.items()), 400)}\n"
        f"  their names and shapes fit {' or '.join(calls) or 'no registered variant at one rank'}\n"
        f"  give the config that they were trained with: lora_lite.load(model, path, cfg=...)"
    )


def _candidates(ranks: Iterable[int]) -> Iterator[BaseConfig]:
    """A config of each variant by its defaults; at each of these ranks, of one that has a rank."""
    for name in sorted(REGISTRY):
        make: Any = config_for(name)
        needed = {f.name for f in fields(make) if f.default is MISSING and f.default_factory is MISSING}
        if needed <= {"variant"}:  # any other field without a default can't be guessed
            has_rank = any(f.name == "r" for f in fields(make))
            yield from (make(variant=name, **rank) for rank in ([{"r": r} for r in ranks] if has_rank else [{}]))


def _lacking(target: Target, shapes: Mapping[str, tuple[int, ...]], cfg: BaseConfig) -> set[str] | None:
    """The buffers that aren't there, as in PEFT's; None if these aren't a layer's tensors of this variant."""
    try:
        specs = specs_at(target, cfg)
    except LoraLiteError:  # a rank that the variant can't have at this layer
        return None
    lacking = specs.keys() - shapes.keys()
    fits = all(tensor in specs and tuple(specs[tensor].shape) == shape for tensor, shape in shapes.items())
    return lacking if fits and not any(specs[tensor].trainable for tensor in lacking) else None


def _call(cfg: Any) -> str:
    return f"lora_lite.config_for({cfg.variant!r})({f'r={cfg.r}, ' if 'r' in cfg.to_dict() else ''}...)"


# ---- the base weights in between ----------------------------------------------------------------


def _compared(
    root: nn.Module, raw: _Raw, keys: Mapping[str, str], live: Mapping[str, Tensor], adapter: Adapter
) -> _Comparison:
    """The file's tensors, by live key, against the live ones; one at a time is in memory."""
    layers = {file_key(p, "weight"): layer for p, m in root.named_modules() if (layer := layer_of(m, p)) is not None}
    weights = {file_key(site.path, site.base.kind.weight): site.path for site in adapter.sites()}
    comparison = _Comparison()
    for key, in_file in keys.items():
        storage, entry = layers[key].storage if key in layers else DENSE, raw.entry(in_file)
        same = same_tensor(live[key], raw.headers[in_file], in_file, storage)
        (comparison.unknown if same is None else comparison.equal if same else comparison.different).append(key)
        if key in weights and not same and entry.dtype in DTYPES:
            comparison.fingerprints[weights[key]] = [dtype_name(DTYPES[entry.dtype]), *spread(raw.read(in_file))]
    return comparison


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
    live = live.as_subclass(Tensor)  # without the operations of a subclass such as Params4bit
    stored = header.read([key])[key].to(live.device)
    if alike:
        return torch.equal(stored, live)
    wide, coarse = torch.promote_types(dtype, live.dtype), max(dtype, live.dtype, key=lambda d: torch.finfo(d).eps)
    if wide in (dtype, live.dtype):  # one holds the other's numbers, so that one was rounded from it, or could be
        return torch.equal(stored.to(coarse), live.to(coarse))
    # float16 and bfloat16, each a rounding of what neither can hold: within both roundings, and float16's smallest step
    a, b = stored.to(wide), live.to(wide)
    half_steps = sum(torch.finfo(d).eps for d in (dtype, live.dtype)) / 2
    step = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    return bool(((a - b).abs() <= half_steps * torch.maximum(a.abs(), b.abs()) + step).all())


def _check_base(path: Path, adapter: Adapter, comparison: _Comparison, verify_base: bool) -> None:
    """CheckpointError for a method that depends on its base weight, where that isn't known to be this one."""
    reads = any(site.base_weight != "unused" for site in adapter.sites())
    if not comparison.different and not (reads and comparison.fingerprints):
        return
    base, doubtful = adapter.base_record, comparison.different or comparison.unknown
    message = (
        f"{path} holds another base than this {base.class_name}: {comparison}\n"
        f"  such as {brief('; '.join(doubtful[:3]), 1200)}"
    )
    tell_other_base(message, adapter.variant, reads, verify_base, BY_VALUES)
    if reads and comparison.fingerprints:
        # The values belong to the file's base, so a later save must name that one.
        fingerprint = base.fingerprint | comparison.fingerprints
        adapter.set_base_record(replace(base, quantization=None, fingerprint=fingerprint))
