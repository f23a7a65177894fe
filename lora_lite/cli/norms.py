"""W' - W: how an adapter on disk moves a layer's weight, from its own maths on a stand-in for the layer.

W' is the weight that would stand for layer and adapter together (lora_lite/core/effective.py). Where probing shows that
the difference depends on W, that layer's weight is read from the original checkpoint, and no other.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.adapt import adapt_input, adapt_output
from ..core.effective import Affine, random_rows
from ..core.layer import Layer
from ..core.resolve import is_stacked, make_stand_in, specs_at
from ..core.state import Site
from ..core.targets import Target
from ..errors import CheckpointError, QuantizedWeightError
from ..merging.adapter_source import reason_for_no_weight
from ..merging.base_folder import BaseFolder
from ..merging.bnb_files import unpack
from .stored import StoredLayer


class Weights:
    """The weights of an adapter's layers in a checkpoint's folder, each read when it is asked for.

    Raises CheckpointError unless each layer is there in its size.
    """

    def __init__(self, folder: Path, layers: Mapping[str, StoredLayer]) -> None:
        self._base = BaseFolder(folder)
        self._locations = self._base.find(folder, list(dict.fromkeys(layer.target.path for layer in layers.values())))
        for stored in layers.values():
            path = stored.target.path
            layer, location, target = stored.target, self._locations[path], self._locations[path].target
            experts = target.experts if is_stacked(target, stored.cfg) else 0
            sizes = ((layer.d_in, target.d_in), (layer.d_out, target.d_out))
            if stored.relative is not None and location.layer.kind.category == "embedding":
                sizes = ((layer.d_in, target.d_out), (layer.d_out, target.d_in))  # its weight lies the other way round
            if experts != layer.experts or any(a not in (0, b) for a, b in sizes):  # 0: no tensor of PEFT's tells it
                if problem := reason_for_no_weight(location, (layer.d_in, layer.d_out)):
                    raise CheckpointError(f"{folder}: {target.path}: {problem}")
                raise CheckpointError(
                    f"{folder}: {target.path} is {_size(target)}, and the adapter's {path} is {_size(layer)}\n"
                    f"  this is another base model"
                )

    def sized(self, layer: StoredLayer) -> StoredLayer:
        """The layer with the sizes and experts that it has in the checkpoint."""
        path = layer.target.path
        facts = layer.target.has_bias, layer.target.is_diagonal
        target = replace(self._locations[path].target, path=path, has_bias=facts[0], is_diagonal=facts[1])
        return replace(layer, target=target)

    def matrices(self, path: str) -> Iterator[Float[Tensor, "o i"]]:
        """A layer's weight, or those of its experts one by one, each as it is stored; a packed one dequantised."""
        location = self._locations[path]
        if location.offset is not None:
            yield (self._base.read(location.weight[0].key) + location.offset).diag()  # a norm's factors
            return
        by_expert = {ref.expert: ref for ref in location.weight}
        for expert, ref in by_expert.items():
            for index in _experts(location.target) if expert is None else [None]:  # fused, or one of many
                if ref.positions is not None:
                    yield self._base.assembled(location.weight, expert, index)
                    continue
                packed = self._base.packed.get(ref.key)
                yield self._base.matrix(ref, index) if packed is None else unpack(self._base.headers, packed)[0]


def norm(layer: StoredLayer, weights: Weights | None = None) -> float | None:
    """‖W' - W‖, Frobenius; None if it depends on W and there are no weights."""
    blocks = delta(layer, weights)
    if blocks is None:
        return None
    return math.hypot(*(float(torch.linalg.vector_norm(block, dtype=torch.float64)) for block in blocks))


def delta(layer: StoredLayer, weights: Weights | None = None) -> Iterator[Float[Tensor, "o n"]] | None:
    """W' - W in blocks of columns, of fused experts one after the other; None as for `norm`.

    A whole difference of a wide head would take gigabytes in float64.
    """
    if is_free(layer):
        return _blocks(layer, [None] * len(_experts(layer.target)), torch.float32)  # nothing is subtracted, so enough
    # Of a norm the base's folder gives its factors with Gemma's 1; rows and biases don't tell what they are of.
    is_untold = layer.relative is not None and (layer.target.is_diagonal or layer.cfg.variant != "full")
    if weights is None or is_untold:
        return None
    return _blocks(weights.sized(layer), weights.matrices(layer.target.path), torch.float64)


def _blocks(
    layer: StoredLayer, matrices: Iterable[Float[Tensor, "o i"] | None], dtype: torch.dtype
) -> Iterator[Float[Tensor, "o n"]]:
    zeros = torch.zeros(()).expand(layer.target.d_out, layer.target.d_in)
    for expert, matrix in zip(_experts(layer.target), matrices, strict=True):
        affine = Affine([stand_in(layer, matrix)], dtype, torch.device("cpu"), expert)
        weight = zeros if matrix is None else matrix
        for start, stop, columns in affine.columns(weight):
            yield columns - weight[:, start:stop].to(dtype)


@torch.no_grad()
def is_free(layer: StoredLayer) -> bool:
    """True where W' - W is the same whatever W is: no weight is read, x passes, and what is added to y is the same for
    any y."""
    target = layer.target
    if 0 in (target.d_in, target.d_out):
        return False
    if any(spec.saved == "always" and name not in layer.tensors for name, spec in specs_at(target, layer.cfg).items()):
        return False
    x, y = random_rows((1, target.d_in), (1, target.d_out))  # (1, i), (1, o)
    site = stand_in(layer)
    try:
        for expert in _experts(target):
            view = Layer(site.module, site, torch.float64, None, expert, {"training": False, "bias": None})
            if not torch.equal(adapt_input(view, x), x):
                return False
            added, alone = adapt_output(view, x, y) - y, adapt_output(view, x, torch.zeros_like(y))
            if (added - alone).abs().max() > 1e-12 * (y.abs().max() + alone.abs().max()):
                return False
    except QuantizedWeightError:  # it read the weight
        return False
    return True


@torch.no_grad()
def stand_in(layer: StoredLayer, weight: Float[Tensor, "o i"] | None = None) -> Site:
    """The adapter at a module of the layer's shape.

    Without a weight the module has one that no method can read: trying raises QuantizedWeightError.
    """
    target, cfg = layer.target, layer.cfg
    if weight is None:
        weight = torch.empty(target.d_out, target.d_in, dtype=torch.int8, device="meta")  # codes of no known quantiser
    module = nn.Linear(target.d_in, target.d_out, bias=False, device="meta")
    stack = (target.experts,) if target.experts else ()  # a view asks for an expert's matrix, and gets this one
    module.weight = nn.Parameter(weight.expand(*stack, *weight.shape), requires_grad=False)
    site = make_stand_in(target, cfg, module, {}, layer.scale)
    tensors = layer.tensors if layer.relative is None else layer.relative(site.base)
    return make_stand_in(target, cfg, module, tensors, layer.scale, shared=layer.shared)


def _size(target: Target) -> str:
    return f"{target.d_in} -> {target.d_out}" + (f" for {target.experts} experts" if target.experts else "")


def _experts(target: Target) -> list[int | None]:
    return list(range(target.experts)) or [None]
