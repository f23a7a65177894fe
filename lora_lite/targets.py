"""Which layers an adapter goes on, found by shape and path, never by class name."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from . import experts, quant
from .config import BaseConfig
from .errors import TargetError

Modules = Mapping[str, nn.Module]
"""All modules of a model by path, in order, as `named_modules` gives them."""

_BLOCK = re.compile(r"(?:^|(?<=\.))(layers?|h|blocks?)\.(\d+)(?=\.|$)")
"""A block in a path: `layers.3` (Llama), `h.3` (GPT-2), `blocks.3` (MPT), `layer.3` (BERT), `block.3` (T5)."""

_WRITES = re.compile(
    r"(?:^|\.)(?:o|out|wo|w2|fc2|fc_out|down|dense|dense_4h_to_h|proj|(?:o|out|c|down)_proj|proj_out|to_out\.0)$"
)
_READS = re.compile(
    r"(?:^|\.)(?:[qkv]|w[qkv]|qkv|Wqkv|w[13]|wi|wi_[01]|fc1|c_fc|c_attn|query|key|value|query_key_value|gate|up"
    r"|dense_h_to_4h|(?:[qkv]|qkv|kv|gate|up|gate_up|in)_proj|to_[qkv])$"
)
"""What the last part of a path says of a square layer, whose shape says nothing."""


@dataclass(frozen=True)
class Target:
    """A layer of the model: weight (d_out, d_in), or one such matrix for each of the experts that it fuses."""

    path: str
    d_in: int
    d_out: int
    kind: str
    stack: str | None = None
    block: int | None = None
    experts: int = 0

    @classmethod
    def at(cls, path: str, layer: quant.Linear) -> "Target | None":
        """The module as a target; None if it has neither the shape of a linear layer nor fuses experts."""
        shape = quant.features(layer)
        if shape is None:
            return None
        return cls(path, *shape, quant.describe(layer), *place(path), experts.count(layer))

    @property
    def pattern(self) -> str:
        """The path with a star for the block index."""
        return starred(self.path)

    def role(self, d_model: int) -> str | None:
        """ "reader", "writer" or "inner" by the model width; None for a square layer whose name says nothing either."""
        reads, writes = self.d_in == d_model and not self.experts, self.d_out == d_model
        if reads and writes:
            return "writer" if _WRITES.search(self.path) else "reader" if _READS.search(self.path) else None
        return "reader" if reads else "writer" if writes else "inner"


def find_targets(model: nn.Module, cfg: BaseConfig) -> list[Target]:
    """The layers that every filter of the config lets pass, in module order. Raises TargetError.

    Asked for the writers of the residual stream by role alone, it raises rather than leave one out that no adapter can
    reach: fused experts for most methods, bare matrices in an unknown form.
    """
    modules = dict(model.named_modules())
    everything = [t for t in linear_layers(modules) if cfg.FUSED_EXPERTS or not t.experts]
    depth: dict[str, int] = {}  # of each stack of blocks
    for stack, block in map(place, (*blocks(modules), *(target.path for target in everything))):
        if stack is not None and block is not None:
            depth[stack] = max(depth.get(stack, 0), block + 1)
    _check_layers(cfg, depth)
    head = _output_head(model, modules)
    stacked = any(t.stack for t in everything)
    named = [t for t in everything if _named(t, cfg, default=bool(t.stack) if stacked else t.path != head)]
    found = [t for t in named if _deep(t.stack, t.block, cfg, depth)]
    if cfg.target_roles:
        width, text = model_width(model), _text_part(model, modules)
        found = _with_roles([t for t in found if t.path.startswith(text)], cfg, width)
        if "writer" in cfg.target_roles and not cfg.target_names:
            _check_writers(model, modules, cfg, depth, text, found, width)
    if not found:
        raise TargetError(_nothing_found(model, cfg, everything))
    return found


def linear_layers(modules: Modules) -> list[Target]:
    """Every module with the shape of a linear layer, and fused experts; a shared module once, under its first path.

    What such a module holds inside (another library's adapter, say) is its own affair and is left alone.
    """
    out: list[Target] = []
    within: str | None = None
    for path, module in modules.items():
        target = Target.at(path, module)
        if target is None or (within is not None and path.startswith(within)):
            continue
        within = f"{path}." if path else ""
        out.append(target)
    return out


def blocks(modules: Modules) -> dict[str, nn.Module]:
    """Every block of the model by its path (`model.layers.3`), in order; none that is inside of another."""
    found = ((path, module, _BLOCK.search(path)) for path, module in modules.items())
    return {path: module for path, module, match in found if match and match.end() == len(path)}


def starred(path: str) -> str:
    """The path with a star for the block index: `model.layers.*.mlp`."""
    return _BLOCK.sub(r"\1.*", path, count=1)


def place(path: str) -> tuple[str | None, int | None]:
    """("model.layers.", 3) for `model.layers.3.mlp`: the stack, and the index in it."""
    match = _BLOCK.search(path)
    return (path[: match.start(2)], int(match[2])) if match else (None, None)


def model_width(model: nn.Module) -> int | None:
    """d_model, the width of the residual stream, from the model's config; never guessed from shapes."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for name in ("hidden_size", "d_model", "n_embd", "dim"):
        width = getattr(config, name, None)
        if isinstance(width, int):
            return width
    return None


def _text_part(model: nn.Module, modules: Modules) -> str:
    """The path of the language model inside a multimodal one, whose width the roles are of; else the empty path."""
    config = getattr(model, "config", None)
    nested = getattr(config, "get_text_config", None)
    text = config if nested is None else nested()
    if text is config:
        return ""
    return next((f"{path}." for path, m in modules.items() if path and getattr(m, "config", None) is text), "")


def _named(target: Target, cfg: BaseConfig, default: bool) -> bool:
    if any(re.search(pattern, target.path) for pattern in cfg.exclude_names):
        return False
    if cfg.target_names:
        return any(re.search(pattern, target.path) for pattern in cfg.target_names)
    return default


def _output_head(model: nn.Module, modules: Modules) -> str | None:
    """The path of a transformers model's output head."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    return next((path for path, module in modules.items() if module is head), None)


def _deep(stack: str | None, block: int | None, cfg: BaseConfig, depth: dict[str, int]) -> bool:
    if cfg.layers is None and cfg.layer_range is None:
        return True
    if stack is None or block is None:
        return False
    n = depth[stack]
    if cfg.layers is not None and block not in {i % n for i in cfg.layers if -n <= i < n}:
        return False
    low, high = cfg.layer_range or (0.0, 1.0)
    return low <= (block + 0.5) / n <= high


def _check_layers(cfg: BaseConfig, depth: dict[str, int]) -> None:
    longest = max(depth.values(), default=0)
    wrong = [i for i in cfg.layers or () if not -longest <= i < longest]
    if wrong:
        raise TargetError(
            f"layers={cfg.layers}: {wrong} name no block; stacks: {depth or 'none'}\n"
            f"  block indices run from 0; negative ones count from the end"
        )


def _with_roles(found: list[Target], cfg: BaseConfig, d_model: int | None) -> list[Target]:
    if d_model is None:
        raise TargetError(
            f"target_roles={cfg.target_roles}: this model has no config that gives its width (hidden_size)\n"
            f"  choose the layers with target_names or exclude_names"
        )
    square = [t.path for t in found if t.role(d_model) is None]
    if square:
        raise TargetError(
            f"target_roles={cfg.target_roles}: {len(square)} layers are {d_model} x {d_model}, so they could "
            f"be readers or writers\n"
            f"  such as {', '.join(square[:3])}\n"
            f"  choose among them with target_names or exclude_names"
        )
    return [t for t in found if t.role(d_model) in cfg.target_roles]


def _check_writers(
    model: nn.Module,
    modules: Modules,
    cfg: BaseConfig,
    depth: dict[str, int],
    within: str,
    found: list[Target],
    d_model: int | None,
) -> None:
    """TargetError if a part of a block has matrices in no layer that could write to the residual stream.

    Three dimensions are experts in a form that isn't known; two dimensions, in a part where nothing else was found, are
    a projection without a module. A module with d_out features and no weight is packed by some other library.
    """
    linear, reached = (
        {t.path for t in linear_layers(modules) if cfg.FUSED_EXPERTS or not t.experts},
        [t.path for t in found],
    )
    for path, block in blocks(modules).items():
        if not (path.startswith(within) and _deep(*place(path), cfg, depth)):
            continue
        for part, holder, ndim in _bare(path, block, linear, d_model):
            if any(re.search(pattern, holder) for pattern in cfg.exclude_names):
                reached.append(holder)  # what was left out on purpose explains what goes with it, such as a router
            elif ndim > 2 or not any(f"{at}.".startswith(f"{part}.") for at in reached):
                kind = type(model.get_submodule(holder)).__name__
                raise TargetError(
                    f"{holder}: this {kind} may write to the residual stream, and {cfg.variant!r} can't go on it\n"
                    f"  to leave it as it is, say so: exclude_names={holder.rpartition('.')[2]!r}"
                )


def _bare(path: str, block: nn.Module, linear: set[str], d_model: int | None) -> list[tuple[str, str, int]]:
    """(part of the block, module, dimensions) of matrices of the model's width in no known layer, most dimensions
    first; a packed layer counts as three."""
    out = []
    for at, module in block.named_modules(prefix=path):
        if at in linear or isinstance(module, _ConvNd | nn.Embedding):
            continue
        part = ".".join(at.split(".")[: path.count(".") + 2])
        for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if t.ndim > 1 and (d_model in t.shape[-2:] or not t.is_floating_point()):
                out.append((part, at, t.ndim))
        if getattr(module, "out_features", None) == d_model:
            out.append((part, at, 3))
    return sorted(out, key=lambda each: -each[2])


def _nothing_found(model: nn.Module, cfg: BaseConfig, everything: list[Target]) -> str:
    filters = {name: getattr(cfg, name) for name in cfg.FILTERS if getattr(cfg, name)}
    given = ", ".join(f"{name}={value!r}" for name, value in filters.items()) or f"the defaults of {cfg.variant!r}"
    return (
        f"no layer matched {given} in {type(model).__name__}\n"
        f"  {len(everything)} linear layers searched; nearest: {', '.join(_nearest(cfg, everything)) or 'none'}\n"
        f"  preview with lora_lite.plan(model, cfg)"
    )


def _nearest(cfg: BaseConfig, everything: list[Target], n: int = 3) -> list[str]:
    """Paths whose last name is the most like a wanted one, one path for each last name."""
    first: dict[str, str] = {}
    for target in everything:
        first.setdefault(target.path.rpartition(".")[2], target.path)
    wanted = [re.sub(r"[^\w.]", "", pattern).rpartition(".")[2] for pattern in cfg.target_names] or [""]
    ranked = sorted(first, key=lambda name: -max(difflib.SequenceMatcher(None, w, name).ratio() for w in wanted))
    return [first[name] for name in ranked[:n]]
