"""Everything that is checked before anything changes, and the plan that comes of it."""

import math
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..base import probe, quant, sharding
from ..base.shapes import not_linear
from ..errors import ConfigError, QuantizedWeightError, TargetError, VariantError
from .adapter import Adapter
from .config import BaseConfig
from .layer import AdapterState
from .names import file_key
from .session import Session, has_session, session_of
from .targets import LeftOut, Target, model_width, select
from .validate import is_name
from .variant import ParamSpec, lookup, weight_use

Specs = dict[str, dict[str, ParamSpec]]
"""Path of a target -> name of a tensor -> its spec."""
Changes = dict[str, dict[str, Any]]
"""Path of a target -> the config fields that differ there."""
Layers = dict[str, quant.Linear]
"""Path of a target -> the module there."""


COLUMNS, GROUPS = 80, 8
"""How wide a plan says what is left out, and in how many lines at most."""


@dataclass(frozen=True)
class Plan:
    """What `attach` would adapt. Prints as a table; iterates over its targets."""

    model: str
    variant: str
    targets: tuple[Target, ...]
    parameters: int
    d_model: int | None
    left_out: tuple[LeftOut, ...] = ()
    """What the config's defaults leave out, and why; empty where target_names says what is wanted."""

    def __len__(self) -> int:
        return len(self.targets)

    def __iter__(self) -> Iterator[Target]:
        return iter(self.targets)

    def __str__(self) -> str:
        """One row for all layers that differ in the block index only."""
        groups: dict[tuple[str, ...], list[Target]] = defaultdict(list)
        for target in self.targets:
            role = "-" if self.d_model is None else target.role(self.d_model) or "square"
            groups[target.pattern, f"{target.d_in} -> {target.d_out}", role, target.kind].append(target)
        head = ("layer", "in -> out", "role", "base", "n")
        rows = [head, *((*key, str(len(members))) for key, members in groups.items())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        title = f"{self.variant} on {self.model}: {len(self)} layers, {self.parameters:,} trainable parameters"
        return "\n".join([title, *lines, *self._lines_left_out()])

    def _lines_left_out(self) -> list[str]:
        """One entry for all that differs in numbers only; what is just outside of the blocks comes last."""
        groups: Counter[LeftOut] = Counter()
        for path, reason in sorted(self.left_out, key=lambda each: each.reason == "in no stack of blocks"):
            groups[LeftOut(re.sub(r"(?<![^.])\d+(?![^.])", "*", path), reason)] += 1
        entries = [f"{path}{f' x {n}' if n > 1 else ''} ({why})" for (path, why), n in groups.items()]
        more = [f"and {len(entries) - GROUPS} more kinds: Plan.left_out"] if len(entries) > GROUPS else []
        wrap = textwrap.TextWrapper(COLUMNS, subsequent_indent=" " * 10, break_on_hyphens=False)
        return [line for entry in entries[:GROUPS] + more for line in wrap.wrap(f"left out: {entry}")]


def plan(model: nn.Module, cfg: BaseConfig) -> Plan:
    """The layers that `attach(model, cfg)` would adapt; the model may be on the meta device. Raises as attach does."""
    root = attachable(model)
    selection = select(root, checked_config(cfg))
    targets = selection.targets
    layers = layers_at(root, targets)
    specs = checked_specs(targets, layers, configs_at(cfg, targets, changes_at(cfg, targets)), selection.asked)
    parameters = sum(math.prod(spec.shape) for at in specs.values() for spec in at.values() if spec.trainable)
    if parameters:
        probe.check_gradients(root, layers)
    left_out = tuple(selection.left_out)
    return Plan(type(root).__name__, cfg.variant, tuple(targets), parameters, model_width(root), left_out)


def attachable(model: nn.Module) -> nn.Module:
    """The module that adapters go on: the model itself, or what torch.compile has wrapped. Raises TargetError."""
    root: nn.Module = getattr(model, "_orig_mod", model)
    for path, module in model.named_modules():
        if isinstance(module, DistributedDataParallel | DataParallel):
            raise TargetError(
                f"{type(module).__name__} has registered the parameters already, and would never reduce the "
                f"gradients of new ones\n  attach first, then wrap"
            )
        if module is not root and has_session(module):
            raise TargetError(
                f"{path}: adapters were attached to this part alone\n  attach to the same module each time"
            )
    session_of(root)  # raises on a part of a model that has adapters
    return root


def checked_config(cfg: Any) -> BaseConfig:
    """The config itself. Raises ConfigError if it isn't one, or not of its variant; VariantError for an unknown one."""
    if not isinstance(cfg, BaseConfig):
        raise ConfigError(f"{cfg!r} is not a config\n  use one such as lora_lite.LoRAConfig(r=16)")
    wanted = lookup(cfg.variant).config
    if type(cfg) is not wanted:
        raise ConfigError(
            f"variant {cfg.variant!r} is configured by {wanted.__name__}, got {type(cfg).__name__}\n"
            f"  use lora_lite.config_for({cfg.variant!r})(...)"
        )
    cfg.check_regexes()
    return cfg


def changes_at(cfg: BaseConfig, targets: list[Target]) -> Changes:
    """The config's `per_layer` by path: this is where its regexes run. Raises TargetError if one finds no target."""
    changes: Changes = {}
    for pattern, fields in cfg.per_layer.items():
        found = [target.path for target in targets if re.search(pattern, target.path)]
        if not found:
            raise TargetError(
                f"per_layer: {pattern!r} is found in none of the {len(targets)} target layers, such as "
                f"{targets[0].path}\n  preview them with lora_lite.plan(model, cfg) without per_layer"
            )
        for path in found:
            changes.setdefault(path, {}).update(fields)
    return changes


def configs_at(cfg: BaseConfig, targets: list[Target], changes: Changes) -> dict[str, BaseConfig]:
    """The config at each target, by path. Raises ConfigError, naming it."""
    configs = {}
    for target in targets:
        try:
            configs[target.path] = cfg.with_overrides(changes.get(target.path, {}))
        except ConfigError as error:
            raise ConfigError(f"{target.path}: {error}") from error
    return configs


def layers_at(root: nn.Module, targets: list[Target]) -> Layers:
    """The targets' modules, in one walk."""
    modules: dict[str, Any] = dict(root.named_modules())
    return {target.path: modules[target.path] for target in targets}


def checked_specs(targets: list[Target], layers: Layers, configs: dict[str, BaseConfig], asked: bool = False) -> Specs:
    """The variant's tensors for each target. Raises if a layer can't carry them, naming it; whether it is linear was
    `asked` before, where the targets come from a selection by default."""
    for path, reason in ({} if asked else not_linear(layers)).items():
        kind = type(layers[path]).__name__
        raise TargetError(f"{path}: an adapter can't act on this {kind}: {reason}\n  leave it out with exclude_names")
    for target in targets:
        _check_layer(target, layers[target.path], configs[target.path])
    return {target.path: specs_at(target, configs[target.path]) for target in targets}


def is_stacked(target: Target, cfg: BaseConfig) -> bool:
    """Does each expert of this target have tensors of its own?"""
    return bool(target.experts) and weight_use(cfg) != "unused"


def specs_at(target: Target, cfg: BaseConfig) -> dict[str, ParamSpec]:
    """The variant's tensors at a layer. Raises ConfigError with the layer's path, VariantError for a bad name."""
    variant, path = lookup(cfg.variant), target.path
    try:
        specs = variant.param_specs(target.d_in, target.d_out, cfg)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    wrong = [name for name in specs if not re.fullmatch(r"lora_[A-Za-z0-9]+(_[A-Za-z0-9]+)*", name)]
    if wrong or not specs:
        raise VariantError(
            f"variant {variant.name!r}: param_specs gave {list(specs)}; wanted one name or more, each like lora_xyz"
        )
    if is_stacked(target, cfg):
        return {name: replace(spec, shape=(target.experts, *spec.shape)) for name, spec in specs.items()}
    return specs


def shapes_of(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """What its config says that each tensor must be."""
    return {
        file_key(target.path, tensor): tuple(spec.shape)
        for target in adapter.layers
        for tensor, spec in specs_at(
            target, adapter.config.with_overrides(adapter.per_layer.get(target.path, {}))
        ).items()
    }


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


def check_free(name: str, layers: Layers, specs: Specs) -> None:
    """TargetError if a layer has an attribute of a name that an adapter's tensor would take."""
    attribute = AdapterState(name, None, [], {}).attribute
    for path, at in specs.items():
        taken = [attribute(tensor) for tensor in at if hasattr(layers[path], attribute(tensor))]
        if taken:
            raise TargetError(
                f"{path}: it has {', '.join(taken)} already, put there by something else\n"
                f"  take that off first, or attach under another name"
            )


def check_ready(layers: Layers) -> None:
    """TargetError unless every target's weight is whole and here, which a plan can do without."""
    for path, module in layers.items():
        if quant.is_lazy(module):
            raise TargetError(f"{path}: its weight has no shape yet\n  run one forward before attach")
        weight = quant.stored(module)
        if weight.is_meta:
            raise TargetError(
                f"{path}: its weight is on the meta device\n"
                f"  load the weights before attach, with a device_map that offloads no target"
            )
        if sharding.is_dtensor(weight):
            raise TargetError(
                f"{path}: its weight is a DTensor already, sharded by fully_shard or by tensor parallelism\n"
                f"  attach first, then fully_shard; of a tensor-parallel model, load it without tp_plan"
            )


def _check_layer(target: Target, module: Any, cfg: BaseConfig) -> None:
    path, kind, use = target.path, quant.kind_of(module), weight_use(cfg)
    if kind is quant.Kind.UNKNOWN and use != "unused":
        raise QuantizedWeightError(
            f"{path}: {cfg.variant!r} reads the weight, and this one is {target.kind}\n"
            f"  use a dense or bitsandbytes base, or a variant that never reads it, such as lora"
        )
    if kind is not quant.Kind.DENSE and use == "dense":
        raise QuantizedWeightError(
            f"{path}: {cfg.variant!r} needs a dense weight, and this one is {target.kind}\n"
            f"  load the base without quantization, or use a variant that works on any base, such as lora"
        )
    if use != "unused":
        probe.check_affine(module, path)
