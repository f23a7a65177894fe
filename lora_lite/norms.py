"""W' - W: how an adapter on disk moves a layer's weight, from its own maths on a stand-in for the layer.

W' is the weight that would stand for layer and adapter together (lora_lite/affine.py). Where probing shows that the
difference depends on W, that layer's weight is read from the original checkpoint, and no other.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .affine import Affine, apply_input, apply_output
from .errors import CheckpointError, QuantizedWeightError
from .files import read_shards
from .keys import resolve
from .layer import AdapterState, Layer, Slot
from .preflight import specs_at
from .stored import StoredLayer
from .targets import Target
from .variant import lookup, weight_use


class Weights:
    """The weights of some layers in a checkpoint's folder, each read when it is asked for."""

    def __init__(self, folder: Path, paths: Iterable[str]) -> None:
        """Raises CheckpointError unless each path has its weight there."""
        self._folder, self._headers = folder, read_shards(folder)
        there = {key.removesuffix(".weight") for key in self._headers if key.endswith(".weight")}
        self._at = resolve(folder, paths, there, "checkpoint")
        self._transposed = any(map(self._is_transposed, there))

    def read(self, layer: StoredLayer) -> Float[Tensor, "o i"]:
        """In its own dtype. Raises CheckpointError unless it is a plain matrix of the layer's shape."""
        target = layer.target
        key = f"{self._at[target.path]}.weight"
        header, wanted = self._headers[key], [target.d_out, target.d_in]
        weight = header.read([key])[key]
        weight = weight.mT if weight.ndim == 2 and self._lies_transposed(weight, target) else weight
        fits = weight.ndim == 2 and all(n in (0, size) for n, size in zip(wanted, weight.shape, strict=True))
        if not (fits and weight.is_floating_point()):
            raise CheckpointError(
                f"{header.path}: {key} is {header.entries[key].dtype} {list(header.entries[key].shape)}; wanted "
                f"numbers {wanted}\n  give the original checkpoint of the adapter's base, not a quantised one"
            )
        return weight

    def _lies_transposed(self, weight: Tensor, target: Target) -> bool:
        """By its shape, unless that fits both ways."""
        fits = [
            all(n in (0, size) for n, size in zip((target.d_out, target.d_in), shape, strict=True))
            for shape in (weight.shape, weight.mT.shape)
        ]
        return self._transposed if all(fits) else fits[1]

    def _is_transposed(self, path: str) -> bool:
        """Is it (d_in, d_out), as GPT-2 stores it? Its bias, of d_out numbers, tells, unless it is square."""
        shapes = [self._headers[key].entries[key].shape for key in (f"{path}.weight", f"{path}.bias") if key in self]
        return len(shapes) == 2 and len(shapes[0]) == 2 and shapes[0][0] != shapes[0][1] and shapes[1] == shapes[0][1:]

    def __contains__(self, key: str) -> bool:
        return key in self._headers


def norm(layer: StoredLayer, weights: Weights | None = None) -> float | None:
    """‖W' - W‖, Frobenius; None if it depends on W and there are no weights."""
    blocks = delta(layer, weights)
    if blocks is None:
        return None
    return math.hypot(*(float(torch.linalg.vector_norm(block, dtype=torch.float64)) for block in blocks))


def delta(layer: StoredLayer, weights: Weights | None = None) -> Iterator[Float[Tensor, "o n"]] | None:
    """W' - W in blocks of columns, of fused experts one after the other; None as for `norm`.

    Without W it is formed in float32, where nothing cancels; as a difference in float64.
    """
    if is_free(layer):
        zeros = torch.zeros(()).expand(layer.target.d_out, layer.target.d_in)
        return (block for affine in _affines(layer, None, torch.float32) for _, _, block in affine.columns(zeros))
    return None if weights is None else _difference(layer, weights.read(layer))


def _difference(layer: StoredLayer, weight: Float[Tensor, "o i"]) -> Iterator[Float[Tensor, "o n"]]:
    d_out, d_in = weight.shape
    layer = replace(layer, target=replace(layer.target, d_in=d_in, d_out=d_out))
    for affine in _affines(layer, weight, torch.float64):
        for start, stop, block in affine.columns(weight):
            yield block - weight[:, start:stop].double()


@torch.no_grad()
def is_free(layer: StoredLayer) -> bool:
    """Is W' - W the same whatever W is: no weight is read, x passes, and what is added to y is the same for any y?"""
    sizes = layer.target.d_in, layer.target.d_out
    if 0 in sizes or layer.tensors.keys() != specs_at(layer.target, layer.cfg).keys():
        return False
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, width, generator=generator, dtype=torch.float64) for width in sizes)
    module, slot = stand_in(layer)
    try:
        for expert in _experts(layer):
            view = Layer(module, slot, torch.float64, expert, {"training": False, "bias": None})
            if not torch.equal(apply_input(view, x), x):
                return False
            added, alone = apply_output(view, x, y) - y, apply_output(view, x, torch.zeros_like(y))
            if (added - alone).abs().max() > 1e-12 * (y.abs().max() + alone.abs().max()):
                return False
    except QuantizedWeightError:
        return False
    return True


@torch.no_grad()
def stand_in(layer: StoredLayer, weight: Float[Tensor, "o i"] | None = None) -> tuple[nn.Module, Slot]:
    """A module with the layer's shape and the adapter's tensors, and the slot that a view of it needs.

    Tensors that the adapter lacks are the base's, and come of its `init`. Without a weight the module has one of a kind
    that no method can read: trying raises QuantizedWeightError.
    """
    target, cfg = layer.target, layer.cfg
    module = nn.Linear(target.d_in, target.d_out, bias=False, device="meta")
    shown = torch.empty(target.d_out, target.d_in, dtype=torch.int8, device="meta") if weight is None else weight
    module.weight = nn.Parameter(shown, requires_grad=False)
    specs = specs_at(target, cfg)
    for name, spec in specs.items():
        module.register_buffer(name, torch.zeros(spec.shape, dtype=cfg.dtype))
    state = AdapterState("default", cfg, [target], {}, layer.scale, layers=[module])
    kept = {name: spec.keep_dtype for name, spec in specs.items()}
    slot = Slot(state, target, cfg, weight_use(cfg), target.experts > 0, kept)
    if layer.tensors.keys() != specs.keys():
        lookup(cfg.variant).init(Layer(module, slot), cfg)
    for name, tensor in layer.tensors.items():
        module.register_buffer(name, tensor)
    return module, slot


def _affines(layer: StoredLayer, weight: Float[Tensor, "o i"] | None, dtype: torch.dtype) -> Iterator[Affine]:
    module, slot = stand_in(layer, weight)
    for expert in _experts(layer):
        yield Affine(module, [slot], dtype, torch.device("cpu"), expert)


def _experts(layer: StoredLayer) -> list[int | None]:
    return list(range(layer.target.experts)) or [None]
