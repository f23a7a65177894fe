"""Data for starts of LoRA: moments of layers' inputs, gradients of weights, weights from before quantisation."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from os import PathLike
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..base.layer import layer_of
from ..base.still import still
from ..core.config import BaseConfig
from ..core.layer import Layer
from ..errors import BaseModelError, ConfigError, TargetError
from ..measure.batches import check_batches, inputs_of
from ..measure.capture import Statistics, capture

__all__ = ["check_fresh", "dense_weights", "gradients", "lots", "moments", "on_called_layers"]

T = TypeVar("T")
MOST_BYTES = 4 << 30
"""Bytes of moments or gradients that are in memory at a time; the batches run once for each lot of layers."""


def on_called_layers(cfg: BaseConfig) -> None:
    """ConfigError for kinds of layer whose inputs a hook doesn't see as vectors (d_in,)."""
    wanted = "'linear' alone: its start is computed from the vectors that a layer is called with"
    cfg.require(tuple(cfg.kinds) == ("linear",), "kinds", wanted)


def check_fresh(targets: Mapping[str, Layer], is_trained: Callable[[Layer], bool]) -> None:
    """ConfigError where new data would overwrite what was trained."""
    if trained := [path for path, layer in targets.items() if is_trained(layer)]:
        problem = f"{trained[0]}: it was trained from the start that it has, so it can't start anew"
        raise ConfigError(f"{problem}\n  detach, and attach a fresh adapter with the new calibration_data")


def moments(model: nn.Module, layers: Mapping[str, tuple[int, int]], batches: Any) -> Iterator[tuple[str, Statistics]]:
    """The second moment (i, i) of each layer's inputs at all tokens, by path; `layers` are sizes (d_in, d_out)."""
    check_batches(batches)
    _called(model, layers)
    for lot in lots(layers, lambda path: 8 * layers[path][0] ** 2, MOST_BYTES):
        statistics = capture(model, batches, lot, what="input", positions="all", reduce="second_moment")
        for path in lot:
            if len(statistics[path].mean) != layers[path][0]:
                raise TargetError(f"{path}: its inputs are no vectors of {layers[path][0]} numbers\n  leave it out")
            yield path, statistics.pop(path)


def gradients(
    model: nn.Module, layers: Mapping[str, tuple[int, int]], data: Any
) -> Iterator[tuple[str, Float[Tensor, "o i"]]]:
    """dL/dW (o, i) in float32 of each layer, summed over the batches, by path.

    No weight needs a gradient for it, whatever it is stored as: dW = Σ_tokens u xᵀ, of the layer's input x and the
    gradient u of its output. data: batches, or {"batches": batches, "loss": f(model, inputs) -> scalar}. Without a loss
    it is that of the model's output, of the next token where a batch has no labels. Raises ConfigError.
    """
    batches, loss = data, _model_loss
    if isinstance(data, Mapping) and data.keys() == {"batches", "loss"}:
        batches, loss = data["batches"], data["loss"]
    check_batches(batches)
    _called(model, layers)
    for lot in lots(layers, lambda path: 4 * layers[path][0] * layers[path][1], MOST_BYTES):
        sums: dict[str, Tensor] = {}
        # No flag of a parameter is touched (still), nor a .grad: what needs a gradient is a 0 that all outputs get.
        with still(model), torch.enable_grad(), ExitStack() as hooks:
            zero = torch.zeros((), requires_grad=True)
            for path in lot:
                hook, module = partial(_watch, path, sums, zero), model.get_submodule(path)
                # prepend: y is the layer's own, before another adapter's hooks
                hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
            for inputs in inputs_of(model, batches, True, "calibrate"):
                if (value := loss(model, inputs)).requires_grad:
                    torch.autograd.grad(value, zero, allow_unused=True)
        for path in lot:
            if path not in sums:
                raise TargetError(f"{path}: the model's loss doesn't depend on it\n  leave it out")
            if not sums[path].isfinite().all() or not sums[path].any():
                problem = f"{path}: its weight's gradient is 0, NaN or infinite"
                raise BaseModelError(f"{problem}\n  leave it out, or give more data")
            yield path, sums.pop(path)


def _watch(path: str, sums: dict[str, Tensor], zero: Tensor, _: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor:
    """A forward hook: once the gradient of y is there, u xᵀ joins the sum."""
    x = (*args, *kwargs.values())[0].detach()
    y = y + zero.to(y)

    def add(u: Tensor) -> None:
        flat_u, flat_x = u.reshape(-1, u.shape[-1]).float(), x.reshape(-1, x.shape[-1]).float()
        product = flat_u.mT @ flat_x  # (o, i)
        sums[path] = sums[path].add_(product) if path in sums else product

    y.register_hook(add)
    return y


def _model_loss(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The loss that the model's output has, as those of transformers do. Raises ConfigError if it has none."""
    if "input_ids" in inputs and "labels" not in inputs:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        inputs = {**inputs, "labels": ids if mask is None else ids.masked_fill(mask == 0, -100)}
    output = model(**inputs)
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        return output["loss"]
    problem = f"the output of this {type(model).__name__} has no loss"
    raise ConfigError(f'{problem}\n  use calibration_data={{"batches": batches, "loss": lambda model, inputs: ...}}')


def dense_weights(data: Any) -> Callable[[str, Layer], Float[Tensor, "o i"]]:
    """W of a layer, from the model before it was quantised, its folder, or {path: W}. Raises ConfigError."""
    if isinstance(data, str | PathLike):
        from ..base.load import load_base  # half of the library's own import time

        data = load_base(str(data))
    if not isinstance(data, nn.Module | Mapping):
        wanted = "the dense model, its folder, or {path: weight (d_out, d_in)}"
        raise ConfigError(f"calibration_data is a {type(data).__name__}: wanted {wanted}")

    @torch.no_grad()
    def weight(path: str, layer: Layer) -> Tensor:
        if isinstance(data, Mapping):
            value = data.get(path)
        else:
            module = dict(data.named_modules()).get(path)
            dense = None if module is None else layer_of(module, path)
            value = None if dense is None or not dense.storage.is_dense else dense.dense_weight()
        wanted = (layer.out_features, layer.in_features)
        if not isinstance(value, Tensor) or tuple(value.shape) != wanted:
            got = tuple(value.shape) if isinstance(value, Tensor) else "none"
            raise ConfigError(f"{path}: wanted its dense weight {wanted} in calibration_data, got {got}")
        return value.to(layer.lora_A.device, torch.float32)

    return weight


def _called(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """TargetError for a layer that no call shows."""
    modules = dict(model.named_modules())
    if others := [path for path in layers if path not in modules]:
        problem = f"{others[0]}: the model multiplies by this weight itself, so no call shows what it sees"
        raise TargetError(f"{problem}\n  leave it out with exclude_names")


def lots(values: Iterable[T], nbytes: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """The values in order, in lists that take no more than this many bytes, or have one value."""
    lot: list[T] = []
    total = 0
    for value in values:
        size = nbytes(value)
        if lot and total + size > limit:
            yield lot
            lot, total = [], 0
        lot.append(value)
        total += size
    yield lot
