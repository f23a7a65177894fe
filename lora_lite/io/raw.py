"""Adapters out of raw tensors: a model's whole state dict, as ZeRO-3 and FSDP consolidation write it.

Raw tensors say neither the method nor its settings, so the config comes from the caller. Every key is accounted for:

    <path>.lora_A, <path>.lora_A__fr    an adapter's (fr's), by our names or PEFT's: taken, whole or not at all
    a key of the model's state_dict     a base tensor: compared with the live one, never taken
    anything else                       an error

What wrappers put before and within a path is resolved as in keys.py.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from ..base import sharding
from ..base.fingerprint import tell_other_base
from ..base.layer import layer_of
from ..base.storage import DENSE, Storage, spread
from ..core.adapter import Adapter, adapters
from ..core.attach import installed
from ..core.config import BaseConfig
from ..core.names import check_shapes, file_key
from ..core.resolve import checked_config, make_sites, overrides_at, specs_at
from ..core.shared import PLACE, Shared
from ..core.state import Method, Site
from ..core.targets import Target
from ..core.variant import REGISTRY, ParamSpec, config_for, lookup
from ..dtypes import dtype_name
from ..errors import CheckpointError, LoraLiteError, brief
from .keys import core, layers_of, plain_key, resolve
from .peft.folder import DIFFUSERS
from .safetensors import DTYPES, Entry, Header, check_numbers

COMPONENTS = {"unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3"}
Layers = dict[str, dict[str, str]]  # path of a layer in the file -> name of a tensor there -> its key in the file
Comparison = dict[
    str, tuple[str, bool | None]
]  # live key of a base tensor -> (the file's, is it equal?), None: unknown


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


def load_raw(
    root: nn.Module, path: Path, headers: Iterable[Header], cfg: BaseConfig | None, name: str, verify_base: bool
) -> Adapter:
    """`load` of raw tensors. Without a cfg, the CheckpointError says what the tensors look like."""
    cfg = None if cfg is None else checked_config(cfg)
    live = base_tensors(root)
    headers = _of_component(root, path, list(headers), cfg)
    by_key = {key: header for header in headers for key in header.entries}
    raw = _sorted_keys(path, by_key, live)
    chosen = _chosen(raw, name)
    keys = raw.layers.pop(chosen)
    shared = keys.pop(PLACE, {})
    targets, layers = layers_of(root, path, keys, () if cfg is None else cfg.kinds)
    if cfg is None:
        raise CheckpointError(_description(raw, keys, targets))
    overrides = overrides_at(cfg, [target.path for target in layers])
    order = {module: i for i, module in enumerate(root.modules())}  # attach's: files are sorted by key, 10 before 2
    pairs = zip(targets, make_sites(layers, cfg, overrides), strict=True)
    sites = dict(sorted(pairs, key=lambda item: order[item[1].module]))
    specs = _check_complete(raw, {**keys, PLACE: shared}, sites, cfg)
    mapping = resolve(path, raw.base, set(live), type(root).__name__, "base tensors")
    stored = {key: raw.read(key) for at_layer in (*keys.values(), shared) for key in at_layer.values()}
    check_numbers(stored, str(path), "save the adapter again", specs)
    tensors = {site.key(tensor): stored[key] for p, site in sites.items() for tensor, key in keys[p].items()}
    tensors |= {file_key(PLACE, tensor): stored[key] for tensor, key in shared.items()}
    with installed(root, [Method(cfg, list(sites.values()))], name, tensors) as adapter:
        comparison = _compared(root, raw, {mapping[plain]: key for plain, key in raw.base.items()}, live)
        _check_base(raw, adapter, comparison, verify_base)
    others = [f"adapter {other!r} ({sum(map(len, rest.values()))})" for other, rest in raw.layers.items()]
    left = f"; left there: {brief(', '.join(others), 400)}" if others else ""
    counts = f"{len(stored)} tensors of adapter {chosen!r}, {_counts(comparison)}"
    logger.info(f"loaded {adapter} from {path}: {counts}{left}")
    return adapter


def _of_component(root: nn.Module, path: Path, headers: list[Header], cfg: BaseConfig | None) -> list[Header]:
    """The headers; of a pipeline of diffusers, whose keys begin with its name of a model, without that.

    Raises:
        CheckpointError: for a pipeline's file without a cfg, or with several models.
    """
    starts = sorted({key.partition(".")[0] for header in headers for key in header.entries})
    if not starts or not COMPONENTS.difference(name for name, _ in root.named_children()).issuperset(starts):
        return headers
    if cfg is None or len(starts) > 1:
        cure = "write the one that is this model into a file of its own, and " * (len(starts) > 1)
        raise CheckpointError(
            f"{path} is of a pipeline's {', '.join(starts)}, without the settings that newer files have\n"
            f"  diffusers takes alpha = r for it: {cure}give cfg=LoRAConfig(r=...)"
        )
    named = [{key.partition(".")[2]: entry for key, entry in header.entries.items()} for header in headers]
    return [replace(header, entries=entries) for header, entries in zip(headers, named, strict=True)]


# ---- what each key is ---------------------------------------------------------------------------


def base_tensors(root: nn.Module) -> dict[str, Tensor]:
    """The model's state_dict without what adapters have put there."""
    ours = {
        file_key(site.module_path, site.attribute(tensor))
        for adapter in adapters(root).values()
        for site in adapter.sites()
        for tensor in site.specs
    }
    shared = tuple(f"{path}." for path, module in root.named_modules() if isinstance(module, Shared))
    # A module's get_extra_state may put anything there.
    return {
        key: t
        for key, t in root.state_dict().items()
        if isinstance(t, Tensor) and key not in ours and not key.startswith(shared)
    }


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
        elif (parent := layer.rpartition(".")[2]).partition("__")[0] == PLACE:
            place, slot = raw.layers[parent.partition("__")[2] or "default"][PLACE], leaf
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


def _check_complete(raw: _Raw, layers: Layers, sites: Mapping[str, Site], cfg: BaseConfig) -> dict[str, ParamSpec]:
    """The ParamSpec of each tensor by its key in the file. CheckpointError unless each layer has exactly the variant's
    tensors, each of its shape, and so has the model."""
    entries = {file_key(path, tensor): raw.entry(key) for path, keys in layers.items() for tensor, key in keys.items()}
    specs = {file_key(path, tensor): spec for path, site in sites.items() for tensor, spec in site.specs.items()}
    shared = lookup(cfg.variant).shared_specs([site.target for site in sites.values()], cfg)
    specs |= {file_key(PLACE, name): spec for name, spec in shared.items()}
    specs = {key: spec for key, spec in specs.items() if spec.saved == "always" or key in entries}
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
    return {key: specs[file_key(path, tensor)] for path, keys in layers.items() for tensor, key in keys.items()}


def _description(raw: _Raw, layers: Layers, targets: Mapping[str, Target]) -> str:
    """The look of the tensors, for a caller who has to say what they are."""
    shapes = {path: {tensor: raw.entry(key).shape for tensor, key in keys.items()} for path, keys in layers.items()}
    path, example = next(iter(shapes.items()))
    ranks = {n for shape in example.values() for n in shape if n > 0}  # the rank is a side of a tensor, not known which
    fits: dict[str, set[str]] = {}  # call of a config -> the buffers that its variant would have beside these tensors
    for cfg in _candidates(sorted(ranks)):
        lacking = [_lacking(targets[p], shapes[p], cfg) for p in shapes]
        if None not in lacking:
            rank = f"r={cfg.r}, " if "r" in cfg.to_dict() else ""
            fits[f"lora_lite.config_for({cfg.variant!r})({rank}...)"] = set().union(*filter(None, lacking))
    whole = [call for call, buffers in fits.items() if not buffers]
    calls = whole or [f"{call}, but for {', '.join(sorted(buffers))}" for call, buffers in fits.items()]
    is_diffusers = any(header.path.name == DIFFUSERS for header in raw.headers.values())
    return (
        f"{raw.path} has no lora_lite metadata: raw tensors say neither the method nor its settings, such as alpha\n"
        f"  {sum(map(len, shapes.values()))} tensors at {len(shapes)} layers, such as {path}: "
        f"{brief(', '.join(f'{tensor} {shape}' for tensor, shape in example.items()), 400)}\n"
        f"  their names and shapes fit {' or '.join(calls) or 'no registered variant at one rank'}\n"
        f"  give the config that they were trained with: lora_lite.load(model, path, cfg=...)"
        + "\n  it is a file of diffusers without settings, for which diffusers takes alpha = r"
        * is_diffusers
    )


def _candidates(ranks: Iterable[int]) -> Iterator[Any]:
    """A config of each variant by its defaults; at each of these ranks, of one that has a rank."""
    for name in sorted(REGISTRY):
        make: Any = config_for(name)
        needed = {f.name for f in fields(make) if f.default is MISSING and f.default_factory is MISSING}
        if needed <= {"variant"}:  # any other field without a default can't be guessed
            has_rank = any(f.name == "r" for f in fields(make))
            for rank in [{"r": r} for r in ranks] if has_rank else [{}]:
                with suppress(LoraLiteError):  # a rank that the variant can't have
                    yield make(variant=name, **rank)


def _lacking(target: Target, shapes: Mapping[str, tuple[int, ...]], cfg: BaseConfig) -> set[str] | None:
    """The buffers that aren't there, as in PEFT's; None if these aren't a layer's tensors of this variant."""
    try:
        specs = specs_at(target, cfg)
    except LoraLiteError:  # a rank that the variant can't have at this layer
        return None
    lacking = specs.keys() - shapes.keys()
    fits = all(tensor in specs and tuple(specs[tensor].shape) == shape for tensor, shape in shapes.items())
    return lacking if fits and not any(specs[tensor].trainable for tensor in lacking) else None


# ---- the base weights in between ----------------------------------------------------------------


def _compared(root: nn.Module, raw: _Raw, keys: Mapping[str, str], live: Mapping[str, Tensor]) -> Comparison:
    """The file's tensors, whose `keys` are by live key, against the live ones; one at a time is in memory."""
    layers = {file_key(p, "weight"): layer for p, m in root.named_modules() if (layer := layer_of(m, p)) is not None}
    storages = {key: layer.storage for key, layer in layers.items()}
    return {
        key: (in_file, same_tensor(live[key], raw.headers[in_file], in_file, storages.get(key, DENSE)))
        for key, in_file in keys.items()
    }


def _counts(comparison: Comparison) -> str:
    answers = [same for _, same in comparison.values()]
    equal, different, unknown = (answers.count(answer) for answer in (True, False, None))
    return f"{equal} base tensors equal to this model's, {different} different, {unknown} that can't be compared"


def same_tensor(live: Tensor, header: Header, key: str, storage: Storage) -> bool | None:
    """Are they equal: bit for bit in one dtype, of two float dtypes to the coarser one's rounding? None: can't tell.

    storage    that of the layer whose weight it is; dense for any other tensor
    """
    entry = header.entries[key]
    dtype = DTYPES.get(entry.dtype)
    alike = dtype == live.dtype and entry.shape == tuple(live.shape)
    if dtype is None or live.is_meta or sharding.is_sharded(live) or not storage.decodes:
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


def _check_base(raw: _Raw, adapter: Adapter, comparison: Comparison, verify_base: bool) -> None:
    """CheckpointError for a method that depends on its base weight, where that isn't known to be this one."""
    reads = any(site.base_weight != "unused" for site in adapter.sites())
    fingerprints: dict[str, list[Any]] = {}  # path of a target -> the file's, where it isn't known to be the live one
    for site in adapter.sites() if reads else ():
        in_file, same = comparison.get(file_key(site.path, site.base.kind.weight), ("", True))
        if not same and (dtype := DTYPES.get(raw.entry(in_file).dtype)) is not None:
            fingerprints[site.path] = [dtype_name(dtype), *spread(raw.read(in_file))]
    different = [key for key, (_, same) in comparison.items() if same is False]
    if different or fingerprints:
        base, doubtful = adapter.base_record, different or [key for key, (_, same) in comparison.items() if not same]
        message = f"{raw.path} holds another base than this {base.class_name}: {_counts(comparison)}"
        message += f"\n  such as {brief('; '.join(doubtful[:3]), 1200)}"
        tell_other_base(message, adapter.variant, reads, verify_base)
        if fingerprints:  # the values belong to the file's base, so a later save must name that one
            record = replace(base, quantization=None, fingerprint=base.fingerprint | fingerprints)
            adapter.set_base_record(record)
