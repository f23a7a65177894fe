"""Probes of layers that are no plain nn.Linear: each is run on a few rows, to see what it computes.

Three questions. Does it compute W x + b with the weight that it holds, or has it the shape of a linear layer and is
none? Is it x -> W x + b for any W, so that a matrix stands for it? Does its backward give Wᵀu, so that what lies below
it can be trained? A layer that rounds its activations too (torchao's dynamic int8, compressed-tensors' FP8_DYNAMIC)
answers no to the last two: a step of rounding has the gradient 0 or none. Norms are asked two others: does it
normalise its rows, and how does its weight enter?

The forward that runs is the module's own (`own_forward`).
"""

import copy
from collections.abc import Container, Iterable
from dataclasses import replace

import torch
from jaxtyping import Float
from loguru import logger
from torch import Tensor, nn

from ..errors import QuantizedWeightError, TargetError, brief
from .affine import input_dtype
from .kinds import is_bypassed, size_of
from .layer import BaseLayer, layer_of
from .matrices import with_vectors
from .own_forward import NoAnswerError, NotRunError, Run, can_run, is_asked, own_forward, unbiased
from .stacks import starred

# How far from W x + b, in parts of its largest number, an output is no rounding of it any more.
FAR = 2**-2  # measured: FP8 activations are 0.05 off, those of 4 bits 0.2
# The least error of a gradient that isn't noise. Measured: 4e-3 in bfloat16, 0.01 with int8 activations whose gradient
# is straight-through, and 1 where rounding stops it.
WRONG = 0.25
ROWS = 8  # random rows whose gradients are compared


def not_linear(layers: Iterable[BaseLayer]) -> dict[str, str]:
    """Why layers don't compute y = W x + b, and norms don't normalise, by path; those that do, or can't be asked, are
    left out."""
    reasons = {layer.path: _not_its_product(layer) for layer in layers if not layer.is_plain}
    return {path: reason for path, reason in reasons.items() if reason is not None}


def check_gradients(model: nn.Module, targets: Container[str]) -> None:
    """Raises QuantizedWeightError where training adapters on these layers would get wrong gradients, or none.

    Layers after the first target are asked too, in the order of the modules: gradients come down through them. One
    before it, which a model may call later all the same, is named in a warning, as is a target that can't be asked.
    """
    reached, before, unknown = False, [], []
    for path, module in model.named_modules():
        reached = reached or path in targets
        layer = layer_of(module, path)
        if layer is None or not is_asked(layer):
            continue
        try:
            with unbiased(layer) as run:
                problem = _gradient(run, layer)
        except NotRunError as error:
            if path not in targets or layer.storage.is_dense:
                logger.debug(f"{path}: not probed: {error}")
                unknown += [path] if path in targets else []
                continue
            problem = f"its own forward fails ({error}); run the model once, if that unpacks its weights"
        if problem is not None and reached:
            raise QuantizedWeightError(
                f"{path}: adapters can't be trained through this layer ({layer.describe()}): {problem}\n"
                f"  train on the 16-bit base, or on one whose weights alone are quantised; lora_lite.load puts a "
                f"trained adapter on this one, for inference"
            )
        before += [] if problem is None else [path]
    if before:
        logger.warning(
            f"gradients through {_listed(before)} are wrong or stop: adapters on layers that run before it won't train"
        )
    if unknown:
        logger.warning(f"it isn't known whether gradients pass {_listed(unknown)}: its forward can't be run on rows")


def _listed(paths: Iterable[str]) -> str:
    return brief(", ".join(dict.fromkeys(map(starred, paths))))


def _not_its_product(layer: BaseLayer) -> str | None:
    """Why the layer doesn't compute with the weight that it holds; None where it does, or nothing tells."""
    if not layer.kind.has_matrix:
        return _not_a_norm(layer)
    if is_bypassed(layer.module):
        return "nn.MultiheadAttention reads its weight without calling it"
    wraps = any(size_of(inner) for inner in layer.module.modules() if inner is not layer.module)
    if wraps or not (layer.storage.is_dense and is_asked(layer)):
        return None
    x = torch.randn(2, layer.d_in, generator=torch.Generator().manual_seed(0)).to(layer.stored)  # (2, d_in)
    try:
        with own_forward(layer) as run:
            y, wanted, bias = run(x).to(x), layer.linear(x), layer.bias  # (2, d_out), (2, d_out), (d_out,)
            if bias is not None and bias.shape == wanted.shape[-1:]:
                wanted = wanted + bias.to(wanted)
            far = (y - wanted).abs().max() > FAR * wanted.abs().max()  # False for NaN, which is another check's
    except NoAnswerError:  # it may well be linear, so the adapter goes on
        return None
    except NotRunError as problem:
        return str(problem)
    return "its forward is not W x + b" if far else None


def _not_a_norm(layer: BaseLayer) -> str | None:
    """Why the layer is no norm of the last axis; None where it is, or nothing tells."""
    if not can_run(layer.module, layer.stored):
        return None
    x = torch.randn(3, layer.d_in, generator=torch.Generator().manual_seed(0)).to(layer.stored)  # (3, d)
    try:
        with own_forward(layer) as run:
            y, of_larger = run(x), run(8 * x)  # (3, d), equal but for the norm's eps
    except NoAnswerError:
        return None
    except NotRunError as problem:
        return str(problem)
    return "it doesn't normalise its input" if (of_larger - y).abs().max() > FAR * y.abs().max() else None


def check_norm(layer: BaseLayer) -> None:
    """TargetError for a norm that isn't (w + c) ⊙ n(x) + b, as far as its forward can be run on rows alone."""
    if can_run(layer.module, layer.stored):
        try:
            _offset(layer)
        except NotRunError:  # a gate is asked for, say: then nothing tells
            return


def norm_offset(layer: BaseLayer) -> float:
    """c of a norm y = (w + c) ⊙ n(x) + b, as its own forward shows it: 0, or 1 of Gemma's.

    Raises:
        TargetError: for a norm that computes anything else.
    """
    try:
        return _offset(layer)
    except NotRunError as error:
        problem = f"its own forward can't be run on rows: {error}"
    raise TargetError(f"{layer.path}: nothing can be merged into this norm: {problem}\n  keep the adapter attached")


@torch.no_grad()
def _offset(layer: BaseLayer) -> float:
    module = layer.module
    # Shallow: a call of the norm in another thread keeps its weight. A forward of a patch is of this very object.
    module = module if "forward" in vars(module) else copy.copy(module)
    x, w = torch.randn(2, 3, layer.d_in, generator=torch.Generator().manual_seed(0)).to(layer.stored.device)  # (3, d)

    def scaled(weight: Float[Tensor, "d"]) -> Float[Tensor, "n d"]:
        """y - b with this weight, in float32."""
        bias = {} if layer.bias is None else {layer.kind.bias: torch.zeros_like(weight)}
        with own_forward(replace(layer, module=module)) as run:
            return with_vectors(module, {layer.kind.weight: weight, **bias}, lambda: run(x))

    zero, one, other = (scaled(weight) for weight in (0 * w[0], 0 * w[0] + 1, w[0]))  # (3, d)
    n = one - zero
    for c in (0.0, 1.0):
        errors = (zero - c * n, other - (w[0] + c) * n)
        if all(error.abs().max() <= 1e-4 * other.abs().max() for error in errors):
            return c
    raise TargetError(
        f"{layer.path}: this norm's own forward isn't (w + c) ⊙ n(x) + b, with c = 0 or 1: no change of its weight is "
        f"known there\n  leave it out with exclude_names, or keep the adapter attached"
    )


def _gradient(run: Run, layer: BaseLayer) -> str | None:
    """A sentence on a backward that is off Wᵀu by more than noise, for the W that the forward shows; else None."""
    dtype, device = input_dtype(layer), layer.stored.device
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        x = torch.randn(ROWS, layer.d_in, generator=generator).to(device, dtype).requires_grad_()
        y = run(x)
        if not y.requires_grad:
            return "no gradient passes it"
        u = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
        try:
            (gradient,) = torch.autograd.grad(y, x, u, allow_unused=True)
        except Exception as failure:  # of any kind: the backward is anyone's
            raise NotRunError(f"its backward fails: {brief(failure)}") from failure
        if gradient is None:
            return "no gradient passes it"
    steps = (y.detach() - run(torch.zeros_like(x))).double()  # W x of each row, without its bias: (ROWS, d_out)
    wanted = u.double() @ steps.mT  # (ROWS, ROWS): ⟨u, W x⟩ = ⟨Wᵀu, x⟩
    error = (gradient.double() @ x.detach().double().mT - wanted).norm() / wanted.norm()
    return f"the gradient of its input is {float(error):.0%} off" if error > WRONG else None
