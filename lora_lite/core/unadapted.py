"""The parameters that a plan gives no adapter though no filter of the config says so: why, and what share they are."""

import math
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ..base.kinds import bare_parameters, packed_in
from ..base.layer import BaseLayer, find_layers
from ..base.sharding import shape_of
from ..base.stacks import routers
from .config import BaseConfig
from .shared import Shared
from .state import sites_of

COLUMNS, LINES = 80, 8  # how wide they are printed, and in how many lines at most
VECTORS = "norms and other vectors"  # few numbers under many names, so they are one entry
REASONS = {
    "linear": "linear layer",
    "conv": "convolution",
    "embedding": "embedding",
    "experts": "stacked matrices",
    "matrix": "a bare parameter",
    "norm": "",
}
"""By what a config's `kinds` calls a layer."""


class Unadapted(NamedTuple):
    """Parameters without an adapter: one entry for all whose paths differ in numbers only."""

    paths: str
    n: int
    reason: str
    share: float  # of the numbers in the model's parameters; 0 where another module, which came first, has them too


@dataclass(frozen=True)
class _Why:
    """Why a parameter has no adapter."""

    cfg: BaseConfig
    layers: Mapping[str, BaseLayer]
    targets: Collection[str]
    left_out: Mapping[str, str]
    routers: Collection[str]  # which may be bare matrices

    def __call__(self, path: str, name: str, module: nn.Module, shape: Sequence[int]) -> tuple[str, str] | None:
        """The path to print, and the reason; None where it has one, or a filter of the config leaves it out."""
        key = f"{path}.{name}" if path else name
        around = [key, *_around(path)]
        # What only holds bare matrices may be a whole block, and says nothing of the layers inside.
        said = [p for p in around if p in self.left_out and (p in self.layers or p in (key, path))]
        if said and key not in self.routers:
            return said[0], self.left_out[said[0]]
        excluded = any(re.search(pattern, key) for pattern in self.cfg.exclude_names)
        if excluded or any(p in self.targets for p in around):
            return None
        layer = next((self.layers[p] for p in around if p in self.layers), None)
        if layer is not None:
            if layer.path in self.routers:
                return layer.path, "a router of experts"
            category, name = layer.kind.category, layer.path if layer.kind.has_matrix else VECTORS
            return None if category in self.cfg.kinds else (name, REASONS[category])
        if sum(n > 1 for n in shape) < 2:
            return VECTORS, ""
        if isinstance(module, _ConvNd | nn.EmbeddingBag):
            return path, REASONS["conv" if isinstance(module, _ConvNd) else "embedding"]
        return key, REASONS["matrix"]


def unadapted(
    model: nn.Module, cfg: BaseConfig, targets: Collection[str], left_out: Mapping[str, str]
) -> tuple[Unadapted, ...]:
    """All that is no target, the largest share first; `left_out` says why of layers, by path."""
    modules = dict(model.named_modules())
    layers = find_layers(modules)
    linear = (layer for layer in layers.values() if not layer.experts and layer.kind.has_matrix)
    shapes = {layer.path: (layer.d_in, layer.d_out) for layer in linear}
    why = _Why(cfg, layers, targets, left_out, routers(modules, shapes))
    entries: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # (paths, reason) -> numbers by path
    seen: dict[int, Tensor] = {}  # with the tensors, or an address could be that of two
    total = 0
    for path, module in modules.items():
        if isinstance(module, Shared):
            continue
        ours = {site.attribute(name) for site in sites_of(module).values() for name in site.specs}
        packed = packed_in(modules[path.rpartition(".parametrizations.")[0]])  # counted as what they stand for
        for name, parameter in () if module in packed.values() else bare_parameters(module).items():
            if is_lazy(parameter) or name in ours:
                continue
            layer, shape = layers.get(path), tuple(shape_of(parameter))
            # Packed codes are fewer than the numbers.
            if layer is not None and layer.kind.has_matrix and layer.stored is parameter:
                shape = (max(layer.experts, 1), layer.d_out, layer.d_in)
            size = 0 if id(parameter) in seen else math.prod(shape)
            seen[id(parameter)] = parameter
            total += size
            if (entry := why(path, name, module, shape)) is not None:
                paths = re.sub(r"(?<![^.])\d+(?![^.])", "*", entry[0])
                entries[paths, entry[1]][f"{path}.{name}" if entry[0] == VECTORS else entry[0]] += size
    shares = [Unadapted(key[0], len(sizes), key[1], sizes.total() / max(total, 1)) for key, sizes in entries.items()]
    return tuple(sorted(shares, key=lambda entry: -entry.share))


def lines(entries: Sequence[Unadapted]) -> list[str]:
    """An entry for each reason, in LINES lines at most; the last says how much isn't named."""
    groups: dict[str, list[Unadapted]] = defaultdict(list)
    for entry in entries:
        groups[entry.reason].append(entry)
    ranked = sorted(groups.values(), key=lambda group: -_share(group))
    wrap = textwrap.TextWrapper(COLUMNS, subsequent_indent=" " * 10, break_on_hyphens=False)
    out: list[str] = []
    for i, group in enumerate(ranked):
        wrapped = wrap.wrap(_line(group, "" if i else " of the parameters"))
        rest = ranked[i:]
        if len(out) + len(wrapped) + (len(rest) > 1) > LINES:
            share = _percent(_share([entry for group in rest for entry in group]))
            return [*out, f"left out: for {len(rest)} more reasons, {share} (Plan.unadapted)"]
        out += wrapped
    return out


def _line(group: Sequence[Unadapted], of: str) -> str:
    """As many paths as a line holds, at least one."""
    share = f"{_percent(_share(group))}{of}" if _share(group) else "tied"
    names = [f"{entry.paths} x {entry.n}" if entry.n > 1 else entry.paths for entry in group]

    def line(n: int) -> str:
        shown = names[:n] + ([f"{len(names) - n} more"] if n < len(names) else [])
        return f"left out: {', '.join(shown)} ({', '.join(filter(None, [group[0].reason, share]))})"

    return next((text for n in range(len(names), 1, -1) if len(text := line(n)) <= COLUMNS), line(1))


def _share(group: Sequence[Unadapted]) -> float:
    return sum(entry.share for entry in group)


def _around(path: str) -> Iterator[str]:
    """The path, and those of the modules around it, the innermost first."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _percent(share: float) -> str:
    return f"{share:.0%}"[:-1] + " %" if share >= 0.01 else f"{share:.1%}"[:-1] + " %" if share >= 0.001 else "< 0.1 %"
