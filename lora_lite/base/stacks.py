"""The structure of a model, whatever its parts are called: stacks of blocks, a layer's place in them, routers.

A stack is a numbered list of equal blocks; a router is a linear layer that chooses among experts.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from .kinds import bare_parameters, size_of

Modules = Mapping[str, nn.Module]  # all modules of a model by path, in order, as `named_modules` gives them
Shapes = Mapping[str, tuple[int, int]]  # path -> (d_in, d_out) of linear layers, in order
Place = tuple[str | None, int | None]  # ("model.layers.", 3): stack and index of the block; (None, None) in no stack

_NUMBERED = re.compile(r"(?:^|(?<=\.))([^\W\d]\w*\.)(\d+)(?=\.)")
_NUMBERED_PART = re.compile(r"(?<=\.)[^.]*?([0-9]+)(?=\.|\Z)")
_ENDS_IN_NUMBER = re.compile(r"(.*?)([0-9]+)")
_LAYERS = (nn.Linear, _ConvNd, nn.Embedding)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Stacks:
    """The stacks of blocks of one model, none inside of another."""

    depths: Mapping[str, int]  # path of a stack, up to its blocks' numbers (`model.layers.`) -> how many blocks it has

    def place(self, path: str) -> Place:
        """The place of a block, or of a layer inside of one."""
        for parent, index, _ in _numbers(path):
            if parent in self.depths:
                return parent, index
        return None, None

    def blocks(self, modules: Modules) -> dict[str, nn.Module]:
        """Every block by its path (`model.layers.3`), in order; none is inside of another."""
        return {
            path: module
            for path, module in modules.items()
            if any(parent in self.depths and numbered == path for parent, _, numbered in _numbers(path))
        }


def place(path: str) -> Place:
    """A layer's place by its path alone, where there is no model to look at: the first part that is a number and has a
    name before it and a layer after it. A name that ends in a number (`encoder_layer_3`) may mean anything."""
    match = _NUMBERED.search(path)
    return (path[: match.start(2)], int(match[2])) if match else (None, None)


def starred(path: str, where: Place | None = None) -> str:
    """The path with a star for the block index: `model.layers.*.mlp`. By default its place is `place(path)`."""
    stack, block = place(path) if where is None else where
    return path if stack is None else f"{stack}*{path[len(f'{stack}{block}') :]}"


def layer_shapes(modules: Modules) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of every module with the shape of a linear layer, and of fused experts.

    A shared module counts once, under its first path.
    """
    shapes: dict[str, tuple[int, int]] = {}
    within = "."  # the layer before, as a prefix: what is inside of it are other libraries' adapters
    for path, module in modules.items():
        if not path.startswith(within) and (size := size_of(module)) is not None:
            shapes[path], within = (size.d_in, size.d_out), f"{path}." if path else ""
    return shapes


def find_stacks(modules: Modules, shapes: Shapes | None = None) -> Stacks:
    """The stacks of a model; `shapes` is what `layer_shapes` gives for it.

    A stack is a list of numbered modules that are no linear layers themselves; at least one of them is a block.
    """
    inside: dict[str, list[tuple[int, int]]] = defaultdict(list)  # numbered module -> the layers that it holds
    shapes = layer_shapes(modules) if shapes is None else shapes
    for path, shape in shapes.items():
        for _, _, numbered in _numbers(path):
            if numbered != path:
                inside[numbered].append(shape)
    norms = [path for path, module in modules.items() if path not in shapes and _is_norm(module)]
    normed = {numbered for path in norms for _, _, numbered in _numbers(path)}
    depths: dict[str, int] = {}
    for path, layers in sorted(inside.items(), key=lambda item: item[0].count(".")):
        *outer, (parent, _, _) = _numbers(path)
        # A block holds two layers or more and normalises, or gives back the width that it takes. So neither q, k and v
        # in a list, nor a head's list of linear layers, nor a list of such heads is a stack.
        is_block = len(layers) > 1 and (path in normed or layers[0][0] == layers[-1][1])
        # Fewest dots come first, so of nested stacks (stages of blocks, experts in a block) the outermost counts.
        is_nested = any(stack in depths for stack, _, _ in outer)
        if is_block and not is_nested and parent not in depths:
            numbers = _listed(parent, modules, shapes)
            depths |= {parent: 1 + max(numbers)} if numbers else {}  # not len: there may be gaps
    return Stacks(depths)


def _numbers(path: str) -> Iterator[tuple[str, int, str]]:
    """(`model.layers.`, 3, `model.layers.3`) for each part of a path, after the first, that ends in a number."""
    for match in _NUMBERED_PART.finditer(path):
        yield path[: match.start(1)], int(match[1]), path[: match.end()]


def _listed(parent: str, modules: Modules, shapes: Shapes) -> list[int]:
    """The numbers of a list's children; none if it is no list of equal modules."""
    path, _, prefix = parent.rpartition(".")
    holder = modules[path]
    children = {name: child for name, child in holder._modules.items() if child is not None}
    # An nn.ModuleList is a list whatever its classes are: Jamba has two kinds of decoder layers.
    equal = isinstance(holder, nn.ModuleList) or len({type(child) for child in children.values()}) == 1
    # A prefix (`encoder_layer_0`) is a list's only in a container: attributes layer1 and layer2 may be anything.
    named = not prefix or isinstance(holder, nn.Sequential | nn.ModuleDict)
    matches = [_ENDS_IN_NUMBER.fullmatch(name) for name in children if f"{path}.{name}" not in shapes]
    numbers = [int(match[2]) for match in matches if match and match[1] == prefix]
    return numbers if equal and named and len(numbers) == len(children) else []


def _is_norm(module: nn.Module) -> bool:
    """True for torch's norms, and for what holds vectors alone: other norms, scales of layers."""
    tensors = [p for p in module._parameters.values() if p is not None]
    return isinstance(module, NORMS) or (bool(tensors) and all(p.ndim == 1 for p in tensors))


# ---- routers of experts -----------------------------------------------------------------------------


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
    if not (module._parameters or module._modules) or _is_layer(module):  # an activation function has neither
        return False
    children = list(module.children())
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        listed = len(children) == n and len({type(child) for child in children}) == 1
        return listed and any(size_of(inner) for child in children for inner in child.modules())
    # One matrix must be d_in wide with a first axis that n divides: Dbrx keeps the rows of all experts in one matrix.
    # One is enough, for not every expert has each matrix: LongCat's n counts experts that return their input.
    modules = [inner for inner in module.modules() if not isinstance(inner, ParametrizationList)]
    matrices = [parameter for inner in modules for parameter in bare_parameters(inner).values()]
    if any(p.ndim < 2 for p in matrices) or not any(d_in in p.shape[-2:] and p.shape[0] % n == 0 for p in matrices):
        return False
    return not any(_is_layer(inner) for inner in module.modules())


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, _LAYERS):
        return True
    size = size_of(module)
    return size is not None and not size.experts
