"""Is a layer x -> W x + b for some W, so that a matrix stands for it? Its own forward is run on a few rows to see."""

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from ..dtypes import STORAGE_DTYPES
from ..errors import QuantizedWeightError
from .own_forward import NotRunError, Run, is_asked, unbiased

if TYPE_CHECKING:
    from .layer import BaseLayer

# The least departure from f(u + v) = f(u) + f(v) - f(0), beside f, that no rounding explains: TF32 has 10 bits, as
# float16 has. Measured: 4e-7 in float32 and 6e-4 in float16 where exact, 5e-3 of int8 and 3.3e-2 of FP8 activations.
# bfloat16's own rounding is 4e-3, so its limit is its eps, and int8 is found by SWALLOWED.
BENT = 2.0**-10
SWALLOWED = 0.5  # least lost part of a small vector beside a large one. Measured: 0.15 in bfloat16, 1 with int8
# The large vector has ±SPIKE at each PERIOD-th channel. The small one has ±1 at the others: half a step of an int8 that
# reaches to SPIKE (256 / 127 = 2) is more. Activations are scaled by rows, or by groups of PERIOD channels or more.
SPIKE, PERIOD = 256.0, 32


def check_affine(layer: "BaseLayer") -> None:
    """Raises QuantizedWeightError where the weight of a layer isn't what it multiplies its input by, or may not be.

    Of a layer whose numbers are measured, the answer is remembered as long as it has the same tensor and forward.
    """
    if not is_asked(layer) or _has_passed(layer):
        return
    try:
        with unbiased(layer) as run:
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
    if not layer.storage.decodes:
        _PASSED[layer.module] = (ref(layer.stored), vars(layer.module).get("forward"))


_PASSED: WeakKeyDictionary[nn.Module, tuple[ref[torch.Tensor], object]] = WeakKeyDictionary()


def _has_passed(layer: "BaseLayer") -> bool:
    stored, forward = _PASSED.get(layer.module, (None, None))
    return stored is not None and stored() is layer.stored and forward is vars(layer.module).get("forward")


def _bend(run: Run, layer: "BaseLayer") -> str | None:
    """A sentence on how the layer departs from x -> W x + b, beyond rounding; None if it doesn't."""
    dtype, device, d_in = input_dtype(layer), layer.stored.device, layer.d_in
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


def input_dtype(layer: "BaseLayer") -> torch.dtype:
    """The dtype of the layer's inputs, as far as its tensors say: codes have none."""
    tensors = [layer.stored, *layer.module.parameters(), *layer.module.buffers()]
    dtypes = [
        getattr(layer.module, "compute_dtype", None),
        *(tensor.dtype for tensor in tensors),
    ]  # HQQ's and GGUF's own
    return next((dtype for dtype in dtypes if dtype in STORAGE_DTYPES), torch.float32)
