"""What is made again in the backward is what plain autograd has, and little is kept for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lora_lite.ops.recompute import add_dense, recomputed

X, Y = (torch.randn(3, 5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (8, 6))


def hadamard(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) * (a.sin() @ b.cos())


def factors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in ((6, 2), (2, 8))]


def plain(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return y + 0.7 * x @ hadamard(a, b).mT


def ours(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return add_dense(y, x, hadamard, a, b, s=0.7)


def whole(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return y + recomputed(lambda x, a, b: 0.7 * x @ hadamard(a, b).mT, x, a, b)


@pytest.mark.parametrize("form", [ours, whole])
@pytest.mark.parametrize("needs", [(1, 1, 1, 1), (0, 0, 1, 1), (1, 1, 0, 0), (0, 1, 0, 1)])
def test_values_gradients_and_second_derivatives(form: Callable[..., Tensor], needs: tuple[int, ...]) -> None:
    inputs = [t.detach().clone().requires_grad_(bool(n)) for t, n in zip((Y, X, *factors()), needs, strict=True)]
    trained = [t for t in inputs if t.requires_grad]
    results = []
    for function in (form, plain):
        out = function(*inputs)
        first = torch.autograd.grad(out.square().sum(), trained, create_graph=True)
        second = torch.autograd.grad(sum((g * g.detach()).sum() for g in first), trained)
        results.append((out, *first, *second))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", [ours, whole])
def test_transforms_and_compile_take_the_plain_form(form: Callable[..., Tensor]) -> None:
    a, b = factors()
    grads = torch.func.grad(lambda a, b: form(Y, X, a, b).square().sum(), (0, 1))(a, b)
    wanted = torch.autograd.grad(plain(Y, X, a, b).square().sum(), (a, b))
    torch.testing.assert_close(grads, wanted)
    out, along = torch.func.jvp(lambda a: form(Y, X, a, b), (a,), (torch.ones_like(a),))
    torch.testing.assert_close(out, plain(Y, X, a, b))
    torch.testing.assert_close(along, torch.func.jvp(lambda a: plain(Y, X, a, b), (a,), (torch.ones_like(a),))[1])


def kept(function: Callable[[], Tensor]) -> int:
    """The numbers that are kept for the backward."""
    tensors: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        tensors[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    assert out.requires_grad
    return sum(tensors.values())


@pytest.mark.parametrize("form", [ours, whole])
def test_the_backward_keeps_x_and_the_tensors_alone(form: Callable[..., Tensor]) -> None:
    a, b = factors()
    assert kept(lambda: form(Y, X, a, b)) == X.numel() + a.numel() + b.numel()
    assert kept(lambda: plain(Y, X, a, b)) > X.numel() + a.numel() + b.numel() + 6 * 8


def test_a_dropped_branch_has_one_mask_in_both_passes() -> None:
    a, b = factors()
    x = X.clone().requires_grad_()
    torch.manual_seed(3)
    out = add_dense(torch.zeros_like(Y), x, hadamard, a, b, dropout=0.5)
    grad = torch.autograd.grad(out, (x, a), torch.ones_like(out))
    delta = hadamard(a, b).detach()
    column = delta.sum(0)
    mask = grad[0] / column  # dx = mask ⊙ (1ᵀ ΔW), of 0 and 2
    assert set(mask.round(decimals=9).unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(out, (x * mask) @ delta.mT)


def test_autocast_rounds_neither_pass() -> None:
    a, b = factors(torch.float32)
    y, x = Y.float(), X.float().requires_grad_()
    wanted = torch.autograd.grad(plain(y, x, a, b).square().sum(), (x, a, b))
    with torch.autocast("cpu", torch.bfloat16):
        for form in (ours, whole):
            grads: Any = torch.autograd.grad(form(y, x, a, b).square().sum(), (x, a, b))
            torch.testing.assert_close(grads, wanted)
