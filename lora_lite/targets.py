"""Which layers an adapter goes on, found by shape and path, never by class name."""

import difflib
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import quant
from .config import BaseConfig
from .errors import TargetError

_BLOCK = re.compile(r"(?:^|(?<=\.))(layers?|h|blocks?)\.(\d+)(?=\.|$)")
"""A block in a path: `layers.3` (Llama), `h.3` (GPT-2), `blocks.3` (MPT), `layer.3` (BERT), `block.3` (T5)."""


@dataclass(frozen=True)
class Target:
    """A linear layer of the model: weight (d_out, d_in), and where it sits."""

    path: str
    d_in: int
    d_out: int
    kind: str
    stack: str | None = None
    block: int | None = None

    @property
    def pattern(self) -> str:
        """The path with a star for the block index."""
        return _BLOCK.sub(r"\1.*", self.path, count=1)

    def role(self, d_model: int) -> str | None:
        """ "reader", "writer" or "inner" by the model width; None for a square layer, which could be either."""
        reads, writes = self.d_in == d_model, self.d_out == d_model
        if reads and writes:
            return None
        return "reader" if reads else "writer" if writes else "inner"


def find_targets(model: nn.Module, cfg: BaseConfig) -> list[Target]:
    """The linear layers that every filter of the config lets pass, in module order. Raises TargetError."""
    everything = linear_layers(model)
    depth: dict[str, int] = {}  # of each stack of blocks
    for target in everything:
        if target.stack is not None and target.block is not None:
            depth[target.stack] = max(depth.get(target.stack, 0), target.block + 1)
    _check_layers(cfg, depth)
    head = _output_head(model)
    named = [t for t in everything if _named(t, cfg, default=bool(t.stack) if depth else t.path != head)]
    found = [t for t in named if _deep(t, cfg, depth)]
    if cfg.target_roles:
        found = _with_roles(found, cfg, model_width(model))
    if not found:
        raise TargetError(_nothing_found(model, cfg, everything))
    return found


def linear_layers(model: nn.Module) -> list[Target]:
    """Every module with the shape of a linear layer; a shared module once, under its first path.

    What such a module holds inside (another library's adapter, say) is its own affair and is left alone.
    """
    out: list[Target] = []
    within: str | None = None
    for path, module in model.named_modules():
        shape = quant.features(module)
        if shape is None or (within is not None and path.startswith(within)):
            continue
        within = f"{path}." if path else ""
        match = _BLOCK.search(path)
        stack, block = (path[: match.start(2)], int(match[2])) if match else (None, None)
        out.append(Target(path, *shape, quant.describe(module), stack, block))
    return out


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


def _named(target: Target, cfg: BaseConfig, default: bool) -> bool:
    if any(re.search(pattern, target.path) for pattern in cfg.exclude_names):
        return False
    if cfg.target_names:
        return any(re.search(pattern, target.path) for pattern in cfg.target_names)
    return default


def _output_head(model: nn.Module) -> str | None:
    """The path of a transformers model's output head."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    return next((path for path, module in model.named_modules() if module is head), None)


def _deep(target: Target, cfg: BaseConfig, depth: dict[str, int]) -> bool:
    if cfg.layers is None and cfg.layer_range is None:
        return True
    if target.stack is None or target.block is None:
        return False
    n = depth[target.stack]
    if cfg.layers is not None and target.block not in {i % n for i in cfg.layers if -n <= i < n}:
        return False
    low, high = cfg.layer_range or (0.0, 1.0)
    return low <= (target.block + 0.5) / n <= high


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
