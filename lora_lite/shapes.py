"""Layers that have the shape of a linear layer and are none, or choose among experts: what a default leaves out."""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd

from . import experts, quant
from .sharding import is_sharded
from .stacks import Modules, Shapes

ROWS = 2
_LAYERS = (nn.Linear, _ConvNd, nn.Embedding)
FAR = 2**-5
"""How far from W x + b, in parts of its largest number, a layer's output is no rounding of it any more."""


def not_linear(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why layers don't compute y = W x + b, by path; those that do, or can't be asked, are left out.

    A layer is asked if its weight is dense and here, and its class has a forward of its own: it gets ROWS random
    inputs, one layer of each class and shape for all of them. What holds a linear layer inside (another library's
    adapter) is not asked.
    """
    answers: dict[tuple[type, tuple[int, int] | None], str | None] = {}
    reasons = {}
    for path, layer in layers.items():
        key = type(layer), quant.features(layer)
        if key not in answers:
            answers[key] = _reason(layer)
        reason = answers[key]
        if reason is not None:
            reasons[path] = reason
    return reasons


def routers(modules: Modules, shapes: Shapes) -> set[str]:
    """Paths of the linear layers that choose among n experts: d_out is n, and beside the layer (or beside a module that
    holds nothing linear but the layer) there are n experts."""
    holds: dict[str, int] = {}
    for path in shapes:
        holder = path.rpartition(".")[0]
        holds[holder] = holds.get(holder, 0) + 1
    return {
        path
        for path, (d_in, n) in shapes.items()
        if n > 1 and any(_are_experts(other, d_in, n) for other in _beside(path, modules, holds))
    }


def _beside(path: str, modules: Modules, holds: Mapping[str, int]) -> Iterator[nn.Module]:
    """The siblings of a layer; of one that is alone in its module, those of that module too."""
    holder = path.rpartition(".")[0]
    for inner in (path, holder) if holds.get(holder) == 1 else (path,):
        outer, _, name = inner.rpartition(".")
        if outer:
            yield from (m for key, m in modules[outer]._modules.items() if key != name and m is not None)


def _are_experts(module: nn.Module, d_in: int, n: int) -> bool:
    """True for a list of n modules of one class with linear layers, and for a module of bare matrices alone, of which
    one is d_in wide and the first axis of it divides into n: some keep the rows of all experts in one matrix (Dbrx),
    and of some not every expert has each matrix (LongCat's n counts experts that return their input)."""
    if _is_layer(module):
        return False
    children = list(module.children())
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        listed = len(children) == n and len({type(child) for child in children}) == 1
        return listed and any(quant.features(inner) for child in children for inner in child.modules())
    matrices = list(module.parameters())
    if any(p.ndim < 2 for p in matrices) or not any(d_in in p.shape[-2:] and p.shape[0] % n == 0 for p in matrices):
        return False
    return not any(_is_layer(inner) for inner in module.modules())


def _is_layer(module: nn.Module) -> bool:
    linear = quant.features(module) is not None and not experts.count(module)
    return linear or isinstance(module, _LAYERS)


def _reason(layer: quant.Linear) -> str | None:
    if quant.is_bypassed(layer):
        return "nn.MultiheadAttention reads its weight without calling it"
    if not _can_be_asked(layer):
        return None
    (d_in, d_out), weight = quant.features(layer) or (0, 0), quant.stored(layer)
    x = torch.randn(ROWS, d_in, generator=torch.Generator().manual_seed(0)).to(weight)
    training = {module: module.training for module in layer.modules()}
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            y = type(layer).forward(layer, x)  # not layer(x): nobody's hooks run
            expected = F.linear(x, weight, getattr(layer, "bias", None))
    except Exception as error:  # whatever a stranger's forward raises
        return f"it takes no input ({ROWS}, {d_in}): {type(error).__name__}"
    finally:
        for module, mode in training.items():
            module.training = mode
    if not isinstance(y, torch.Tensor):
        return f"it gives a {type(y).__name__}, not a tensor"
    if y.shape != expected.shape:
        return f"it gives {tuple(y.shape)} for ({ROWS}, {d_in}), not ({ROWS}, {d_out})"
    if (y - expected).abs().max() > FAR * expected.abs().max():  # False for NaN, which is another check's
        return "its forward is not W x + b"
    return None


def _can_be_asked(layer: quant.Linear) -> bool:
    if type(layer).forward is nn.Linear.forward or quant.is_transposed(layer):
        return False
    weight = quant.stored(layer)
    dense = weight.ndim == 2 and quant.kind_of(layer) is quant.Kind.DENSE
    wraps = any(quant.features(inner) for inner in layer.modules() if inner is not layer)
    return dense and not wraps and not weight.is_meta and not is_sharded(weight)
