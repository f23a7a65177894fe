"""Which adapted layers a forward has called since attach, as far as their sites remember."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..base.layer import BaseLayer
from ..base.stacks import starred
from ..errors import brief
from .adapter import adapters
from .state import sites_at

LONGEST = 600  # characters of paths in a message


Layers = Mapping[str, BaseLayer]  # by path


def adapted(root: nn.Module) -> dict[str, BaseLayer]:
    """Every layer with an adapter, by path."""
    return {site.path: site.base for adapter in adapters(root).values() for site in adapter.sites()}


def trained(layers: Layers) -> dict[str, nn.Parameter]:
    """The parameters of adapters on these layers that are to be trained, by path, shared ones too: none of an adapter
    at scale 0."""
    working = [site for layer in layers.values() for site in sites_at(layer) if not site.state.is_idle]
    at_layers = [(f"{s.path}.{s.attribute(name)}", tensor) for s in working for name, tensor in s.tensors()]
    states = {id(site.state): site.state for site in working}.values()
    once = [(state.suffix, method.shared) for state in states for method in state.methods if method.shared is not None]
    shared = [(f"{each.place}{suffix}.{name}", tensor) for suffix, each in once for name, tensor in each.tensors()]
    return {
        path: tensor
        for path, tensor in (*at_layers, *shared)
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad
    }


def uncalled(root: nn.Module) -> set[str]:
    """Paths of the layers that no forward has called since attach, although one has called others (none in compiled
    parts: in a graph no hook can note that it ran); and those of which the adapter's file says so."""
    layers = adapted(root)
    silent = {path: layer for path, layer in layers.items() if not has_run(layer)}
    recorded = {path for path, layer in silent.items() if any(site.never_ran for site in sites_at(layer))}
    if not silent or len(silent) == len(layers):  # none has run: load, then merge, is how one deploys
        return recorded
    compiled = in_graphs(root) | _in_graphs_of_classes(root)
    return recorded | {path for path, layer in silent.items() if id(layer.module) not in compiled}


def has_run(layer: BaseLayer) -> bool:
    """True once a forward has called the layer."""
    return any(site.ran for site in sites_at(layer))


def in_graphs(model: nn.Module) -> set[int]:
    """The ids of all modules inside of a part that `torch.compile(part)` or `part.compile()` has taken."""
    parts = [
        module
        for path, module in model.named_modules()
        if path.rpartition(".")[2] == "_orig_mod" or module._compiled_call_impl is not None  # wrapper, or in place
    ]
    return {id(module) for part in parts for module in part.modules()}


def _in_graphs_of_classes(root: nn.Module) -> set[int]:
    """The ids of modules within one of a class that torch.compile has made a graph of: `torch.compile(root)` is a
    wrapper that the root doesn't know of. It may have been another model's, so this can only clear a layer."""
    if "torch._dynamo" not in sys.modules:
        return set()  # torch.compile was never called
    parts = [module for module in root.modules() if _has_graphs(module)]
    return {id(module) for part in parts for module in part.modules() if module is not part}


def _has_graphs(module: nn.Module) -> bool:
    forward: Any = type(module).forward
    while forward is not None:  # transformers decorates it
        code = getattr(forward, "__code__", None)
        if code is not None and torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def grouped(paths: Iterable[str], pattern: Callable[[str], str] = starred) -> str:
    """Paths for a message: "layers.*.dt_proj (2), lm_head", with the number of layers that differ in the block."""
    counts = Counter(map(pattern, sorted(paths)))
    return brief(", ".join(path if n == 1 else f"{path} ({n})" for path, n in counts.items()), LONGEST)
