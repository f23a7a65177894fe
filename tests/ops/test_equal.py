"""Equal by device, dtype, shape and bytes."""

import ctypes

import pytest
import torch
from torch import nn

from lora_lite.ops import equal
from lora_lite.ops.equal import same


@pytest.fixture(params=[True, False], ids=["by bytes", "by torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(equal, "_memcmp", None)
    return bool(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.bool])
def test_one_number_tells_them_apart(dtype: torch.dtype) -> None:
    a = torch.ones(5, 7).to(dtype)
    b = a.clone()
    assert same(a, b)
    b[4, 6] = 0
    assert not same(a, b)
    assert same(nn.Parameter(a, requires_grad=False), a)


@pytest.mark.usefixtures("way")
def test_dtype_shape_and_device_count() -> None:
    a = torch.zeros(6)
    assert not same(a, a.view(2, 3))
    assert not same(a, a.int())
    assert not same(a, a.to("meta"))
    assert same(torch.zeros(0), torch.zeros(0))


@pytest.mark.usefixtures("way")
def test_tensors_that_lie_apart_in_memory() -> None:
    a = torch.arange(12.0).view(3, 4)
    assert same(a.mT, a.mT.contiguous())
    assert same(a[:, 1:3], a[:, 1:3].clone())
    assert not same(a.mT, a.mT + 1)


def test_a_nan_is_itself() -> None:
    a = torch.tensor([float("nan"), 1.0])
    assert same(a, a.clone())
    assert not same(a, torch.tensor([1.0, 1.0]))


def test_a_process_without_a_c_library_has_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def windows(name: None) -> None:
        raise TypeError("an integer is required")

    monkeypatch.setattr(ctypes, "CDLL", windows)
    assert equal._find_memcmp() is None
