"""Probes of layers that are no plain nn.Linear: each is run on a few rows, to see what it computes.

Two questions. Is it x -> W x + b, so that a matrix stands for it? Does its backward give Wᵀu, so that what lies below
it can be trained? A layer that rounds its activations too (torchao's dynamic int8, compressed-tensors' FP8_DYNAMIC)
answers no: a step of rounding has the gradient 0 or none. One whose weight alone is quantised answers yes twice.

The forward that runs is the module's own (`own_forward`).
"""

from collections.abc import Container, Iterable

import torch
from loguru import logger
from torch import nn

from ..dtypes import STORAGE_DTYPES
from ..errors import QuantizedWeightError, brief
from .layer import BaseLayer, layer_of
from .own_forward import NotRunError, Run, is_asked, own_forward
from .stacks import starred

# The least departure from f(u + v) = f(u) + f(v) - f(0), beside f, that no rounding explains: TF32 has 10 bits, as
# float16 has. Measured: 4e-7 in float32 and 6e-4 in float16 where exact, 5e-3 of int8 and 3.3e-2 of FP8 activations.
# bfloat16's own rounding is 4e-3, so its limit is its eps, and int8 is found by SWALLOWED.
BENT = 2.0**-10
SWALLOWED = 0.5  # least lost part of a small vector beside a large one. Measured: 0.15 in bfloat16, 1 with int8
# The large vector has ±SPIKE at each PERIOD-th channel. The small one has ±1 at the others: half a step of an int8 that
# reaches to SPIKE (256 / 127 = 2) is more. Activations are scaled by rows, or by groups of PERIOD channels or more.
SPIKE, PERIOD = 256.0, 32
# The least error of a gradient that isn't noise. Measured: 4e-3 in bfloat16, 0.01 with int8 activations whose gradient
# is straight-through, and 1 where rounding stops it.
WRONG = 0.25
ROWS = 8  # random rows whose gradients are compared


def check_affine(layer: BaseLayer) -> None:
    """Raises QuantizedWeightError where the weight of a layer isn't what it multiplies its input by, or may not be."""
    if not is_asked(layer):
        return
    try:
        with own_forward(layer) as run:
            problem = _bend(run, layer)
    except NotRunError as error:
        raise QuantizedWeightError(
            f"{layer.path}: its own forward can't be run on rows, so it isn't known whether a matrix stands for it: "
            f"{error}\n"
            f"  keep an adapter that doesn't read the weight (lora) attached, or leave it out with exclude_names"
        ) from error
    if problem is not None:
        raise QuantizedWeightError(
            f"{layer.path}: no matrix stands for this layer ({layer.describe()}): {problem}\n"
            f"  it rounds its activations, or is no linear layer: use a 16-bit base, or one whose weights alone are "
            f"quantised; merge on disk, with lora_lite.merge_checkpoint and the 16-bit checkpoint"
        )


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
            with own_forward(layer) as run:
                problem = _gradient(run, layer)
        except NotRunError as error:
            if path not in targets or layer.storage.is_known:
                logger.debug(f"{path}: not probed: {error}")
                unknown += [path] if path in targets else []
                continue
            problem = f"its own forward fails ({error}); run the model once, if that unpacks its weights"
        if problem is None:
            continue
        if reached:
            raise QuantizedWeightError(
                f"{path}: adapters can't be trained through this layer ({layer.describe()}): {problem}\n"
                f"  train on the 16-bit base, or on one whose weights alone are quantised; lora_lite.load puts a "
                f"trained adapter on this one, for inference"
            )
        before.append(path)
    if before:
        logger.warning(
            f"gradients through {_listed(before)} are wrong or stop: adapters on layers that run before it won't train"
        )
    if unknown:
        logger.warning(f"it isn't known whether gradients pass {_listed(unknown)}: its forward can't be run on rows")


def _listed(paths: Iterable[str]) -> str:
    return brief(", ".join(dict.fromkeys(map(starred, paths))))


def _bend(run: Run, layer: BaseLayer) -> str | None:
    """A sentence on how the layer departs from x -> W x + b, beyond rounding; None if it doesn't."""
    dtype, device, d_in = _dtype(layer), layer.stored.device, layer.d_in
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randint(-4, 5, (2, d_in), generator=generator).double()  # integers: u + v is exact in any dtype
    small = torch.randint(0, 2, (d_in,), generator=generator).double() * 2 - 1
    large = torch.zeros(d_in).double()
    small[::PERIOD], large[::PERIOD], large[:: 2 * PERIOD] = 0, SPIKE, -SPIKE
    rows = torch.stack([u * 0, u, v, u + v, small, large, small + large]).to(device, dtype)  # (7, d_in)
    fs = run(rows)  # (7, d_out)
    f0, fu, fv, fuv, fsmall, flarge, fboth = fs.double()
    alone = run(rows[1:2])[0].double()  # a scale for the whole batch would make it another than fu
    limit = max(BENT, torch.finfo(fs.dtype).eps, torch.finfo(dtype).eps)
    size = torch.stack([f0, fu, fv, fuv]).norm(dim=1).max()
    if (bent := (fuv - fu - fv + f0).norm() / size) > limit:
        return f"f(u + v) - f(u) - f(v) + f(0) is {float(bent):.2g} of f"
    if (lost := (fboth - fsmall - flarge + f0).norm() / (fsmall - f0).norm()) > SWALLOWED:
        return f"{float(lost):.2g} of small inputs is lost beside large ones"
    if (difference := (alone - fu).norm() / size) > limit:
        return f"the output of a row depends on the other rows, by {float(difference):.2g} of it"
    return None


def _gradient(run: Run, layer: BaseLayer) -> str | None:
    """A sentence on a backward that is off Wᵀu by more than noise, for the W that the forward shows; else None."""
    dtype, device = _dtype(layer), layer.stored.device
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


def _dtype(layer: BaseLayer) -> torch.dtype:
    """The dtype of the layer's inputs, as far as its tensors say: codes have none."""
    tensors = [layer.stored, *layer.module.parameters(), *layer.module.buffers()]
    return next((tensor.dtype for tensor in tensors if tensor.dtype in STORAGE_DTYPES), torch.float32)
