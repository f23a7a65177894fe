"""Dtypes that adapters are stored in, their names in files, and whether numbers are finite in them."""

import math

import torch
from torch import Tensor

STORAGE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


def fits(values: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Are all of these (of a dtype in STORAGE_DTYPES) finite, and still so in this dtype? One pass and one wait;
    `isfinite` takes several passes."""
    if not values.numel() or (dtype in (None, values.dtype) and math.isfinite(values.sum())):
        return True  # one that isn't finite would show in the sum, which is the faster; a sum may overflow
    ends = torch.stack(values.aminmax())  # NaN if there is one
    return all(map(math.isfinite, ends.to(dtype or values.dtype).tolist()))
