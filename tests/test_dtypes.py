"""The one test of finiteness that files and merges go by."""

import itertools
import math

import pytest
import torch

from lora_lite.dtypes import STORAGE_DTYPES, fits

DTYPES = sorted(STORAGE_DTYPES, key=str)
ODD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", ODD)
def test_one_that_is_not_finite_is_found_anywhere(dtype: torch.dtype, value: float) -> None:
    for shape, places in (
        ((20,), range(20)),
        ((1000,), (0, 7, 8, 31, 32, 63, 64, 511, 998, 999)),
        ((300, 200), (59999,)),
    ):
        for at in places:
            values = torch.ones(shape, dtype=dtype)
            values.view(-1)[at] = value
            assert not fits(values)
            assert not fits(values if values.ndim == 1 else values.mT)
    wide = torch.ones(40, 60, dtype=dtype)
    wide[38, 59] = value
    assert not fits(wide[::2].mT)
    assert fits(wide[1::2])
    assert fits(wide[:, :59])


def test_what_is_finite_is_so_and_what_a_cast_makes_infinite_is_not() -> None:
    for dtype, other in itertools.product(DTYPES, DTYPES):
        for value in (torch.finfo(dtype).max, torch.finfo(dtype).min, 65504.0, 65510.0, 65520.0, 1e5, *ODD):
            values = torch.tensor([1.0, value, 0.0], dtype=torch.float64).to(dtype)
            assert fits(values) == bool(values.isfinite().all())
            assert fits(values, other) == bool(values.to(other).isfinite().all()), (value, dtype, other)
        assert fits(torch.empty(0, 4, dtype=dtype), other)
    assert not fits(torch.tensor([math.inf, -math.inf]))
