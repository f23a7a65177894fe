"""Layers that have the shape of a linear layer and are none, or choose among experts: what a default leaves out."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .kinds import is_bypassed, size_of
from .layer import BaseLayer
from .own_forward import NoAnswerError, NotRunError, is_asked, own_forward
from .stacks import Modules, Shapes

ROWS = 2  # random rows that a layer is run on
_LAYERS = (nn.Linear, _ConvNd, nn.Embedding)
# How far from W x + b, in parts of its largest number, a layer's output is no rounding of it any more.
FAR = 2**-2  # measured: FP8 activations are 0.05 off, those of 4 bits 0.2


def not_linear(layers: Iterable[BaseLayer]) -> dict[str, str]:
    """Why layers don't compute y = W x + b, by path; those that do, or can't be asked, are left out.

    A layer is asked if its weight is dense and in memory, its forward is not torch's, and it holds no other layer.
    """
    reasons = {layer.path: _reason(layer) for layer in layers if not layer.is_plain}
    return {path: reason for path, reason in reasons.items() if reason is not None}


def routers(modules: Modules, shapes: Shapes) -> set[str]:
    """Paths of the linear layers that choose among n experts: d_out is n, and beside the layer (or beside a module that
    holds nothing linear but the layer) there are n experts."""
    # By structure, not by name: routers are called gate, router, classifier, ..., and a `gate` is often a projection.
    counts = Counter(path.rpartition(".")[0] for path in shapes)  # module -> the linear layers right inside of it
    return {
        path
        for path, (d_in, n) in shapes.items()
        if n > 1 and any(_are_experts(other, d_in, n) for other in _beside(path, modules, counts))
    }


def _beside(path: str, modules: Modules, counts: Mapping[str, int]) -> Iterator[nn.Module]:
    """The siblings of a layer; of one that is alone in its module, those of that module too."""
    holder = path.rpartition(".")[0]
    for inner in (path, holder) if counts[holder] == 1 else (path,):  # mlp.gate, or mlp.router.layer
        outer, _, name = inner.rpartition(".")
        if outer:
            yield from (m for key, m in modules[outer]._modules.items() if key != name and m is not None)


def _are_experts(module: nn.Module, d_in: int, n: int) -> bool:
    """True for a list of n modules of one class with linear layers, and for a module that holds bare matrices alone."""
    if _is_layer(module):
        return False
    children = list(module.children())
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        listed = len(children) == n and len({type(child) for child in children}) == 1
        return listed and any(size_of(inner) for child in children for inner in child.modules())
    # One matrix must be d_in wide with a first axis that n divides: Dbrx keeps the rows of all experts in one matrix.
    # One is enough, for not every expert has each matrix: LongCat's n counts experts that return their input.
    matrices = list(module.parameters())
    if any(p.ndim < 2 for p in matrices) or not any(d_in in p.shape[-2:] and p.shape[0] % n == 0 for p in matrices):
        return False
    return not any(_is_layer(inner) for inner in module.modules())


def _is_layer(module: nn.Module) -> bool:
    size = size_of(module)
    return (size is not None and not size.experts) or isinstance(module, _LAYERS)


def _reason(layer: BaseLayer) -> str | None:
    if is_bypassed(layer.module):
        return "nn.MultiheadAttention reads its weight without calling it"
    wraps = any(size_of(inner) for inner in layer.module.modules() if inner is not layer.module)
    if wraps or not (layer.storage.is_dense and is_asked(layer)):
        return None
    weight, bias = layer.stored, layer.bias
    x = torch.randn(ROWS, layer.d_in, generator=torch.Generator().manual_seed(0)).to(weight)  # (ROWS, d_in)
    try:
        with own_forward(layer) as run:
            y, wanted = run(x).to(weight), layer.linear(x)  # (ROWS, d_out)
            if bias is not None and bias.shape == wanted.shape[-1:]:
                wanted = wanted + bias.to(wanted)
            far = (y - wanted).abs().max() > FAR * wanted.abs().max()  # False for NaN, which is another check's
    except NoAnswerError:  # it may well be linear, so the adapter goes on
        return None
    except NotRunError as problem:
        return str(problem)
    return "its forward is not W x + b" if far else None
