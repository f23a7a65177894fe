"""Stacks of blocks: numbered lists of equal blocks, whatever their names are, and the place of a layer in them."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from .kinds import size_of

Modules = Mapping[str, nn.Module]
"""All modules of a model by path, in order, as `named_modules` gives them."""
Shapes = Mapping[str, tuple[int, int]]
"""(d_in, d_out) of linear layers by path, in order."""
Place = tuple[str | None, int | None]
"""("model.layers.", 3): the stack, and the index of the block in it; (None, None) outside of every stack."""

_NUMBERED = re.compile(r"(?:^|(?<=\.))([^\W\d]\w*\.)(\d+)(?=\.)")
_ENDS_IN_NUMBER = re.compile(r"(.*?)([0-9]+)")
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Stacks:
    """The stacks of blocks of one model, none inside of another."""

    depths: Mapping[str, int]
    """Path of a stack, up to the numbers of its blocks (`model.layers.`) -> number of its blocks."""

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


def starred(path: str, at: Place | None = None) -> str:
    """The path with a star for the block index: `model.layers.*.mlp`; `at` is its place, by default that of the path
    alone."""
    stack, block = place(path) if at is None else at
    return path if stack is None else f"{stack}*{path[len(f'{stack}{block}') :]}"


def layer_shapes(modules: Modules) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of every module with the shape of a linear layer, and of fused experts.

    A shared module counts once, under its first path. What such a module holds inside (another library's adapter, say)
    is its own affair and is left alone.
    """
    shapes: dict[str, tuple[int, int]] = {}
    within: str | None = None
    for path, module in modules.items():
        if within is not None and path.startswith(within):
            continue
        size = size_of(module)
        if size is not None:
            shapes[path], within = (size.d_in, size.d_out), f"{path}." if path else ""
    return shapes


def find_stacks(modules: Modules, shapes: Shapes | None = None) -> Stacks:
    """The stacks of a model. `shapes` is what `layer_shapes` gives for it.

    A stack is a module whose children are numbered and are no linear layers themselves: an nn.ModuleList of any classes
    (Jamba's two kinds of decoder layers), or any other module of children of one class. Of an nn.Sequential or an
    nn.ModuleDict the names may be one prefix with numbers (`encoder_layer_0`), which then belongs to the stack's name.
    At least one child must be a block: it holds two linear layers or more, and it normalises, or its last layer gives
    back the width that its first one takes. So neither q, k and v in a list, nor a head's list of linear layers, nor a
    list of such heads is a stack. Of nested ones (stages of blocks, experts in a block) the outermost counts.
    """
    inside: dict[str, list[tuple[int, int]]] = defaultdict(list)  # numbered module -> the layers that it holds
    shapes = layer_shapes(modules) if shapes is None else shapes
    for path, shape in shapes.items():
        for _, _, numbered in _numbers(path):
            if numbered != path:
                inside[numbered].append(shape)
    normed = {
        numbered
        for path, module in modules.items()
        if path not in shapes and _is_norm(module)
        for _, _, numbered in _numbers(path)
    }
    depths: dict[str, int] = {}
    for path, layers in sorted(inside.items(), key=lambda item: item[0].count(".")):
        *outer, (parent, _, _) = _numbers(path)
        is_block = len(layers) > 1 and (path in normed or layers[0][0] == layers[-1][1])
        nested = any(each in depths for each, _, _ in outer)
        if is_block and not nested and parent not in depths:
            numbers = _listed(parent, modules, shapes)
            depths |= {parent: 1 + max(numbers)} if numbers else {}
    return Stacks(depths)


def _numbers(path: str) -> Iterator[tuple[str, int, str]]:
    """(`model.layers.`, 3, `model.layers.3`) for each part of a path that ends in a number, but the first: the model
    itself is no stack."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if i and (match := _ENDS_IN_NUMBER.fullmatch(part)):
            yield ".".join([*parts[:i], match[1]]), int(match[2]), ".".join(parts[: i + 1])


def _listed(parent: str, modules: Modules, shapes: Shapes) -> list[int]:
    """The numbers of a list's children; none if it is no list of equal modules."""
    path, _, prefix = parent.rpartition(".")
    holder = modules[path]
    children = {name: child for name, child in holder._modules.items() if child is not None}
    equal = isinstance(holder, nn.ModuleList) or len({type(child) for child in children.values()}) == 1
    named = not prefix or isinstance(holder, nn.Sequential | nn.ModuleDict)
    matches = [_ENDS_IN_NUMBER.fullmatch(name) for name in children if f"{path}.{name}" not in shapes]
    numbers = [int(match[2]) for match in matches if match and match[1] == prefix]
    return numbers if equal and named and len(numbers) == len(children) else []


def _is_norm(module: nn.Module) -> bool:
    """True for torch's norms, and for what holds vectors alone: other norms, scales of layers."""
    own = [p for p in module._parameters.values() if p is not None]
    return isinstance(module, NORMS) or (bool(own) and all(p.ndim == 1 for p in own))
