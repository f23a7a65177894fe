"""Are all numbers finite?"""

import math

import torch
from torch import Tensor


def fits(values: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Are all of these (one of config.STORAGE_DTYPES) finite, and still so in this dtype? One pass and one wait;
    `isfinite` takes several passes."""
    if not values.numel():
        return True
    ends = torch.stack(values.aminmax())  # NaN if there is one
    return all(map(math.isfinite, ends.to(dtype or values.dtype).tolist()))
