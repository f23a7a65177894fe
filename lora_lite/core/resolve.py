"""From a config and a model to sites: everything that is checked before anything changes."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..base import sharding
from ..base.affine import check_affine
from ..base.kinds import Size
from ..base.layer import BaseLayer, stand_in
from ..base.probe import check_norm, not_linear
from ..base.split import is_block_of_parts
from ..errors import ConfigError, QuantizedWeightError, TargetError, VariantError
from .config import BaseConfig
from .layer import Layer
from .names import SITES, TIES
from .shared import Shared
from .split import parts_of
from .state import SESSION, AdapterState, Method, Session, Site, Tensors, session_of, sites_of
from .targets import Selection, Target
from .validate import is_name
from .variant import ParamSpec, adds_constant, asks_more, lookup, weight_use

_NAME = re.compile(r"lora_[A-Za-z0-9]+(_[A-Za-z0-9]+)*")
_NUMBERED = re.compile(r"lora_[0-9]+_")
_WRAPPERS = (DistributedDataParallel, DataParallel)
MOST_METHODS = 64
"""One adapter has no more of them, so that a file, which anyone may have written, can't cost more."""

Overrides = Mapping[str, Mapping[str, Any]]
"""Path of a target -> the config fields that differ there."""
Known = dict[tuple[int, int, int, bool], dict[str, ParamSpec]]
"""(d_in, d_out, experts, by_weight) -> the tensors of a method there."""


def attachable(model: nn.Module) -> nn.Module:
    """The module that adapters go on: the model itself, or what torch.compile has wrapped."""
    root: nn.Module = getattr(model, "_orig_mod", model)
    has_sites = False
    for path, module in model.named_modules():
        if isinstance(module, _WRAPPERS):
            raise TargetError(
                f"{type(module).__name__} has registered the parameters already: it would never reduce new ones' "
                f"gradients\n  attach first, then wrap"
            )
        attributes = module.__dict__
        has_sites = has_sites or SITES in attributes
        if SESSION in attributes and module is not root:
            raise TargetError(
                f"{path}: adapters were attached to this part alone\n  attach to the same module each time"
            )
    if has_sites and SESSION not in root.__dict__:
        session_of(root)  # raises on a part of a model that has adapters
    return root


def checked_config(cfg: Any) -> BaseConfig:
    """The config itself, if it is one of a variant that is known, and its regexes compile."""
    if not isinstance(cfg, BaseConfig):
        raise ConfigError(f"{cfg!r} is not a config\n  use one such as lora_lite.LoRAConfig(r=16)")
    if type(cfg) is not lookup(cfg.variant).config:
        wanted = lookup(cfg.variant).config.__name__
        raise ConfigError(
            f"variant {cfg.variant!r} is configured by {wanted}, got {type(cfg).__name__}\n"
            f"  use lora_lite.config_for({cfg.variant!r})(...)"
        )
    cfg.check_regexes()  # those of a file weren't compiled as it was read, and attach is about to run them
    return cfg


def checked_configs(cfg: Any) -> list[BaseConfig]:
    """One config, or several of one adapter, each found right."""
    configs = [checked_config(one) for one in (cfg if isinstance(cfg, list | tuple) else [cfg])]
    if not 0 < len(configs) <= MOST_METHODS:
        wanted = f"wanted one, or several such as [LoRAConfig(r=16), ...], {MOST_METHODS} at most"
        raise ConfigError(f"{len(configs) or 'an empty list of'} configs\n  {wanted}")
    if len(configs) > 1 and (first := [one for one in configs if lookup(one.variant).leads]):
        problem = f"{first[0].variant!r} comes before all other adapters, so it is an adapter of its own"
        raise ConfigError(f"{problem}\n  attach it by itself")
    return configs


def resolve(selection: Selection, cfg: BaseConfig) -> list[Site]:
    """A site for each target that attach has chosen; the regexes of `per_layer` run here."""
    overrides = overrides_at(cfg, [target.path for target in selection.targets])
    return make_sites(selection.targets, cfg, overrides, selection.asked)


def overrides_at(cfg: BaseConfig, paths: list[str]) -> dict[str, dict[str, Any]]:
    """The config's `per_layer` by path."""
    overrides: dict[str, dict[str, Any]] = {}
    for pattern, fields in cfg.per_layer.items():
        matching = [path for path in paths if re.search(pattern, path)]
        if not matching:
            raise TargetError(
                f"per_layer: {pattern!r} is found in none of the {len(paths)} target layers, such as {paths[0]}\n"
                f"  preview them with lora_lite.plan(model, cfg) without per_layer"
            )
        for path in matching:
            overrides.setdefault(path, {}).update(fields)  # of several entries for a field, the later wins
    return overrides


def make_sites(
    targets: Mapping[Target, BaseLayer], cfg: BaseConfig, overrides: Overrides, asked: bool = False
) -> list[Site]:
    """A site for each of these targets, with the fields that differ there.

    Whether the layers are linear was `asked` before, where the targets come from a selection by default.
    """
    unsure = {} if asked else {layer.path: layer for layer in targets.values() if not layer.is_plain}
    for path, reason in not_linear(unsure.values()).items() if unsure else ():
        kind = type(unsure[path].module).__name__
        raise TargetError(f"{path}: an adapter can't act on this {kind}: {reason}\n  leave it out with exclude_names")
    known: Known = {}
    sites = [make_site(target, layer, cfg, overrides.get(target.path, {}), known) for target, layer in targets.items()]
    for site in sites:
        _check_storage(site)
        if site.target.is_diagonal and lookup(cfg.variant).reads_input:
            check_norm(site.base)
        if isinstance(site.base.reader, nn.MultiheadAttention) and adds_constant(site.specs):  # it shows no product
            problem = f"{site.path}: {cfg.variant!r} adds a constant, and no weight holds one"
            raise TargetError(f"{problem}\n  leave this layer of nn.MultiheadAttention out with exclude_names")
    return sites


def make_site(
    target: Target, layer: BaseLayer, cfg: BaseConfig, overrides: Mapping[str, Any], known: Known | None = None
) -> Site:
    """The record of one layer, which no adapter is at yet; `known` are the specs at others with this config."""
    if overrides or known is None or asks_more(cfg):
        try:
            cfg = cfg.with_overrides(overrides)
        except ConfigError as error:
            raise ConfigError(f"{target.path}: {error}") from error
        specs = specs_at(target, cfg)
    else:  # `param_specs` knows a layer by its size alone, so layers of one size have the same
        size = target.d_in, target.d_out, target.experts, target.by_weight
        specs = known[size] = known.get(size) or specs_at(target, cfg)
    site = Site(target, layer, cfg, dict(overrides), weight_use(cfg), is_stacked(target, cfg), dict(specs))
    if sharding.is_parallel(layer.module):
        site.parts = parts_of(site)
    return site


def make_stand_in(
    target: Target,
    cfg: BaseConfig,
    module: nn.Module,
    tensors: Tensors,
    scale: float,
    overrides: Any = None,
    shared: Shared | None = None,
    number: int = 1,
) -> Site:
    """A site on a module that stands for a layer which isn't here; it has the layer's `weight`, if any, and gets these
    tensors. Of some but not all, the others are made as their ParamSpecs say, or they are the base's (DoRA's norms, in
    PEFT's folders) and come of `init`."""
    layer = stand_in(target.path, module, Size(target.d_in, target.d_out, target.experts))
    site = make_site(target, layer, cfg, overrides or {})
    site.set_number(number)
    site.method = Method(site.cfg, [site], shared)
    site.state = AdapterState("default", [site.method], None, scale)  # no suffix, as in files
    if tensors and tensors.keys() != site.specs.keys():
        for name, spec in site.specs.items():
            setattr(module, site.attribute(name), tensor := torch.zeros(spec.shape, dtype=spec.dtype or site.cfg.dtype))
            for part in tensor if site.stacked else [tensor]:
                spec.fill(part)
        if any(spec.saved == "always" for name, spec in site.specs.items() if name not in tensors):
            lookup(site.cfg.variant).init(Layer(module, site), site.cfg)  # writes into all, so the adapter's come after
    for name, tensor in tensors.items():
        setattr(module, site.attribute(name), tensor)
    return site


def is_stacked(target: Target, cfg: BaseConfig) -> bool:
    """Does each expert of this target have tensors of its own?"""
    # A method that reads no weight acts on the block's output, where the block is the target and not a matrix of it.
    return bool(target.experts) and (target.by_weight or weight_use(cfg) != "unused")


def specs_at(target: Target, cfg: BaseConfig) -> dict[str, ParamSpec]:
    """The variant's tensors at a layer."""
    variant, path = lookup(cfg.variant), target.path
    try:
        specs = variant.layer_specs(target, cfg)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    # "__" starts the adapter's name in `lora_A__fr`, so no tensor's name may have it, and `lora_2_` is of its second
    # method at a layer, which one that leads, as a history, never has.
    wrong = [n for n in specs if not _NAME.fullmatch(n) or (_NUMBERED.match(n) and not variant.leads)]
    if wrong or not specs:
        raise VariantError(
            f"variant {variant.name!r}: param_specs gave {list(specs)}; wanted one name or more, each like lora_xyz"
        )
    if is_stacked(target, cfg):
        return {name: replace(spec, shape=(target.experts, *spec.shape)) for name, spec in specs.items()}
    return specs


def check_name(name: str, session: Session, model: str) -> None:
    """ConfigError for an odd adapter name, TargetError for one that is taken."""
    if not is_name(name):
        raise ConfigError(
            f"adapter name {name!r}: it becomes part of parameter names\n"
            f"  use letters and digits, with single '_' or '-' between them"
        )
    if name in session.adapters:
        raise TargetError(
            f"adapter {name!r} is attached to this {model} already\n"
            f"  give the new one another name, detach the old one, or lora_lite.restore a file's values into it"
        )


def check_free(sites: Iterable[Site], exchanged: AdapterState | None = None) -> None:
    """TargetError if a layer has an attribute where a tensor of a new site would go; those of `exchanged` go away."""
    for site in sites:
        old = sites_of(site.module).get(site.slot)
        if old is not None and old.state is exchanged:
            continue
        taken = [site.attribute(tensor) for tensor in site.specs if hasattr(site.module, site.attribute(tensor))]
        if taken:
            raise TargetError(
                f"{site.path}: it has {', '.join(taken)} already, put there by something else\n"
                f"  take that off first, or attach under another name"
            )


def check_weights_present(sites: Iterable[Site]) -> None:
    """TargetError unless every target's weight is whole and here, which a plan can do without."""
    for site in sites:
        weight = site.base.stored
        if site.base.is_lazy:
            problem = "has no shape yet\n  run one forward before attach"
        elif weight.is_meta:
            problem = "is on the meta device\n  load it before attach, with a device_map that offloads no target"
        elif sharding.is_dtensor(weight) and site.parts is None and not is_block_of_parts(site.base):
            problem = "is a DTensor already\n  attach first, then fully_shard"
        else:
            continue
        raise TargetError(f"{site.path}: its weight {problem}")


def _check_storage(site: Site) -> None:
    if site.base_weight == "unused":
        return
    storage, variant, kind = site.base.storage, site.cfg.variant, site.target.kind
    if TIES in site.module.__dict__:
        problem = f'{variant!r} reads the weight, which an adapter with tied_weights="together" changes for each call'
        raise TargetError(f"{site.path}: {problem}\n  leave it out with exclude_names, or detach that adapter")
    if not storage.is_known:
        raise QuantizedWeightError(
            f"{site.path}: {variant!r} reads the weight, and this one is {kind}\n"
            f"  use a base whose layers can be run here, or a variant that never reads it, such as lora"
        )
    if not storage.is_dense and site.base_weight == "dense":
        raise QuantizedWeightError(
            f"{site.path}: {variant!r} needs a dense weight, and this one is {kind}\n"
            f"  load the base without quantization, or use a variant that works on any base, such as lora\n"
            f"  lora_lite.quantize_residual(base_dir, PiSSAConfig(...), out_dir) writes a 4-bit base with its adapter"
        )
    check_affine(site.base)  # a layer that rounds its activations computes with no weight that could be read
