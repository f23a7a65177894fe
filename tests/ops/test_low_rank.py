"""The fused low-rank op: its gradients, what it keeps, its two dtypes, and where it takes the reference form."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import OneLinear, config, perturb
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from lora_lite.ops import low_rank
from lora_lite.ops.low_rank import add_low_rank

D_IN, D_OUT, R = 6, 5, 3
GAINS = [None, 1.0, 0.4, -1.5]
per_gain = pytest.mark.parametrize("c", GAINS, ids=["no gain", "c=1", "c=0.4", "c=-1.5"])
per_bias = pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])


def operands(dtype: torch.dtype = torch.float64, rows: tuple[int, ...] = (2, 4), grad: bool = True) -> list[Any]:
    """y, x, A, B, gain, bias"""
    generator = torch.Generator().manual_seed(0)
    shapes = [(*rows, D_OUT), (*rows, D_IN), (R, D_IN), (D_OUT, R), (D_OUT,), (D_OUT,)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    made[4] = 1 + 0.3 * made[4].tanh()
    return [each.to(dtype).requires_grad_(grad) for each in made]


def formula(y: Any, x: Any, a: Any, b: Any, s: float, gain: Any = None, c: float = 1.0, bias: Any = None) -> Any:
    branch = s * x @ a.mT @ b.mT
    if gain is None:
        return y + branch
    wx = y if bias is None else y - bias
    return (1 - c) * wx + c * gain * (wx + branch) + (0 if bias is None else bias)


def kwargs(c: float | None, gain: Any, bias: Any, biased: bool) -> dict[str, Any]:
    return {} if c is None else {"gain": gain, "c": c, "bias": bias if biased else None}


# ---- the maths ----------------------------------------------------------------------------------


@per_gain
@per_bias
def test_values_and_gradients_are_the_formulas(c: float | None, biased: bool) -> None:
    found = []
    for op in (add_low_rank, formula):
        y, x, a, b, gain, bias = operands()
        out = op(y, x, a, b, 1.7, **kwargs(c, gain, bias, biased))
        (out.square() * torch.arange(D_OUT)).sum().backward()
        found.append([out, *(each.grad for each in (y, x, a, b, gain, bias) if each.grad is not None)])
    assert len(found[0]) == 5 + (c is not None) * (1 + biased)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@per_gain
@per_bias
def test_it_can_be_differentiated_twice(c: float | None, biased: bool) -> None:
    def run(y: Any, x: Any, a: Any, b: Any, gain: Any, bias: Any) -> Any:
        return add_low_rank(y, x, a, b, 1.7, **kwargs(c, gain, bias, biased))

    used = operands(rows=(2,))
    if c is None:
        assert gradcheck(lambda *four: run(*four, None, None), used[:4])
        assert gradgradcheck(lambda *four: run(*four, None, None), used[:4])
    else:
        assert gradcheck(run, used)
        assert gradgradcheck(run, used)


@per_gain
@pytest.mark.parametrize("rows", [(), (0,), (3, 0), (4,), (2, 1, 3)], ids=str)
def test_any_batch_shape(c: float | None, rows: tuple[int, ...]) -> None:
    for grad in (True, False):
        y, x, a, b, gain, bias = operands(torch.float32, rows, grad)
        out = add_low_rank(y, x, a, b, 0.5, **kwargs(c, gain, bias, True))
        assert out.shape == y.shape
        torch.testing.assert_close(out, formula(y, x, a, b, 0.5, **kwargs(c, gain, bias, True)))
        if grad:
            out.sum().backward()
            assert a.grad.shape == a.shape


def test_strided_inputs() -> None:
    y, x, a, b, gain, _ = operands(grad=False)
    y, x = y.transpose(0, 1), x.transpose(0, 1)
    for given in ({}, {"gain": gain, "c": 0.5}):
        wanted = formula(y, x, a, b, 1.0, **given)
        torch.testing.assert_close(add_low_rank(y, x, a, b, 1.0, **given), wanted)
        grown = add_low_rank(y, x, a.clone().requires_grad_(), b, 1.0, **given)
        torch.testing.assert_close(grown, wanted)


class Functions(TorchFunctionMode):
    """The names of torch's functions that run, without readings of attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in ("__get__", "numel"):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 8, low_rank.FEW])
@pytest.mark.parametrize("s", [1.0, 0.5])
def test_few_tokens_without_gradients_take_two_products_and_a_sum(s: float, dtype: torch.dtype, tokens: int) -> None:
    y, x, a, b, _, _ = operands(grad=False, rows=(1, tokens))
    wide = torch.promote_types(dtype, torch.float32)
    y, x, a, b = y.to(dtype), x.to(dtype), a.to(wide), b.to(wide)
    with torch.no_grad(), Functions() as ran:
        out = add_low_rank(y, x, a, b, s)
    up, down = ([], []) if dtype == wide else (["float"], ["to"])
    assert ran.names == [*up, "linear", "linear", "add_" if s == 1 else "add", *down]
    wanted = formula(y.to(wide), x.to(wide), a, b, s).to(dtype)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    torch.testing.assert_close(out, wanted, **tolerance)


def calls_of_ours(run: Callable[[], Any]) -> list[str]:
    """The Python functions of lora_lite that are entered, by name and in order."""
    folder, names = str(Path(ll.__file__).parent), []

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            names.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return names


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("tokens", [1, low_rank.FEW + 1])
@per_gain
def test_few_python_calls(c: float | None, tokens: int, grad: bool) -> None:
    """Of one token they are what takes time. add_low_rank itself counts, and every operand wants a gradient."""
    y, x, a, b, gain, bias = operands(torch.float32, (1, tokens), grad)

    def run() -> None:
        out = add_low_rank(y, x, a, b, 0.5, **kwargs(c, gain, bias, True))
        if grad:
            out.sum().backward()

    names = calls_of_ours(run)
    assert names[0] == "add_low_rank"
    assert ("backward" in names) == grad
    most = 3 if not grad else 8 if c is None else 10
    assert len(names) <= most, names


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    y, x, a, b, gain, bias = operands(grad=False)
    out = add_low_rank(y, x, a.requires_grad_(), b, 1.0, gain=gain, c=0.5, bias=bias)
    assert [grad is None for grad in torch.autograd.grad(out.sum(), (a,))] == [False]
    assert all(each.grad is None for each in (y, x, b, gain, bias))
    assert not add_low_rank(y, x, a.detach(), b, 1.0).requires_grad


@pytest.mark.parametrize("c", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("least", [0.0, 1e-7, -1e-4])
def test_a_row_that_is_all_but_off_has_the_right_gradient(c: float, least: float) -> None:
    """Where k = 1 - c + c g is about 0 the result tells nothing of the direction."""
    found = []
    for op in (add_low_rank, formula):
        y, x, a, b, gain, _ = operands(torch.float32)
        with torch.no_grad():
            gain[1] = 1 - (1 - least) / c
        op(y, x, a, b, 1.7, gain=gain, c=c).square().sum().backward()
        found.append(gain.grad)
    torch.testing.assert_close(*found)
    assert found[0].isfinite().all()


# ---- what is kept -------------------------------------------------------------------------------


def kept(run: Any, *without: torch.Tensor) -> dict[int, int]:
    """Storages that autograd keeps for the backward, with their bytes; those of parameters aside."""
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    parameters = {each.untyped_storage().data_ptr() for each in without}
    return {at: each.nbytes() for at, each in seen.items() if at not in parameters} | {0 * len(out): 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_x_and_r_numbers_a_token_are_all_that_is_kept(dtype: torch.dtype, dropout: float) -> None:
    y, x, *_ = operands(dtype)
    _, _, a, b, gain, _ = operands(torch.float32)
    h = x.numel() // x.shape[-1] * len(a) * x.itemsize
    found = kept(lambda: add_low_rank(y, x, a, b, 2.0, dropout), a, b)
    assert found.pop(x.untyped_storage().data_ptr())
    assert sorted(found.values()) == [0, h]
    found = kept(lambda: add_low_rank(y, x, a, b, 2.0, dropout, gain=gain), a, b, gain)
    assert all(found.pop(t.untyped_storage().data_ptr()) for t in (x, y))
    assert sorted(found.values()) == [0, h]


@per_gain
def test_what_comes_may_be_changed_in_place(c: float | None) -> None:
    """As models do that add one branch into another's output, or have an activation work in place."""
    found = []
    for change in (lambda out: torch.relu(out + 1), lambda out: out.add_(1).relu_()):
        leaves = operands()
        change(add_low_rank(*leaves[:4], 1.0, **kwargs(c, leaves[4], None, False))).square().sum().backward()
        found.append([each.grad for each in leaves[: 4 if c is None else 5]])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kept", ["x", "a", "y"])
def test_an_in_place_change_of_what_is_kept_raises(kept: str) -> None:
    leaves = dict(zip(("y", "x", "a", "b", "gain"), operands()[:5], strict=True))
    used = {name: leaf * 1 for name, leaf in leaves.items()}
    out = add_low_rank(used["y"], used["x"], used["a"], used["b"], 1.0, gain=used["gain"])
    used[kept].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@per_gain
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("rows", [2, low_rank.FEW + 1])
def test_y_stays_as_it_is_and_what_comes_is_no_view(c: float | None, grad: bool, rows: int) -> None:
    """So others may write into either; into a gradient too, where autograd has several to add."""
    y, x, *_ = operands(torch.bfloat16, (2, rows), grad)
    _, _, a, b, gain, _ = operands(torch.float32, grad=grad)
    before = y.detach().clone()
    out = add_low_rank(y, x, a, b, 1.7, **kwargs(c, gain, None, False))
    assert torch.equal(y, before)
    assert not torch.equal(out, before)
    assert not out._is_view()
    if grad:
        assert not any(g._is_view() for g in torch.autograd.grad(out.sum(), (x, a, b)))


# ---- dropout ------------------------------------------------------------------------------------


def test_dropout_drops_scales_and_is_seeded() -> None:
    y, x, a, b, *_ = operands(torch.float32, (4000,), grad=False)
    a = a.requires_grad_()
    x = torch.ones_like(x)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return add_low_rank(torch.zeros_like(y), x, a, b, 1.0, 0.25)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    whole = add_low_rank(torch.zeros_like(y), x, a, b, 1.0)
    torch.testing.assert_close(run(1).mean(0), whole[0], rtol=0.05, atol=0.05)


@per_gain
def test_the_backward_has_the_mask_of_the_forward(c: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[torch.Tensor] = []
    dropped = low_rank.dropped

    def watched(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
        masks.append(dropped(torch.ones_like(x), p, seed))
        return dropped(x, p, seed)

    monkeypatch.setattr(low_rank, "dropped", watched)
    y, x, a, b, gain, _ = operands()
    given = kwargs(c, gain, None, False)
    weights = torch.arange(D_OUT)
    (add_low_rank(y, x, a, b, 1.5, 0.4, **given) * weights).sum().backward()
    got = [each.grad for each in (y, x, a, b) + (() if c is None else (gain,))]
    assert len(masks) == 3
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert 0 < (masks[0] == 0).sum() < masks[0].numel()
    y, x, a, b, gain, _ = operands()
    given = kwargs(c, gain, None, False)
    (formula(y, x * masks[0], a, b, 1.5, **given) * weights).sum().backward()
    for one, each in zip(got, (y, x, a, b, gain)[: len(got)], strict=True):
        torch.testing.assert_close(one, each.grad, rtol=1e-12, atol=1e-12)


def test_the_mask_of_a_strided_input_is_the_same_in_the_backward() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(D_IN, 7, 5, generator=generator).permute(2, 1, 0).requires_grad_()
    a, b = torch.ones(1, D_IN), torch.ones(1, 1).requires_grad_()
    out = add_low_rank(torch.zeros(5, 7, 1), x, a, b, 1.0, 0.5)
    (grad,) = torch.autograd.grad(out.sum(), (x,))
    assert set(grad.unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(out[..., 0], (x * grad).sum(-1))


@per_gain
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_drops_the_same(c: float | None, dtype: torch.dtype, use_reentrant: bool) -> None:
    """The first run of a reentrant one is without gradients."""
    found = []
    for way in ("plain", "checkpoint"):
        torch.manual_seed(3)
        y, x, a, b, gain, bias = operands(dtype, (low_rank.FEW + 1,))
        with torch.no_grad():
            gain[0] = 0.01
        given = kwargs(c, gain, bias, True)
        run = lambda y, x, a=a, b=b, given=given: add_low_rank(y, x, a, b, 1.0, 0.5, **given).square()  # noqa: E731
        out = run(y, x) if way == "plain" else checkpoint(run, y, x, use_reentrant=use_reentrant)
        out.sum().backward()
        found.append((out, a.grad, b.grad, x.grad, *([] if c is None else [gain.grad, bias.grad])))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# ---- dtypes -------------------------------------------------------------------------------------


@per_gain
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_tokens_are_as_right_as_one_rounding(c: float | None, dtype: torch.dtype) -> None:
    y, x, *_ = operands(dtype, (1, low_rank.FEW), grad=False)
    _, _, a, b, gain, bias = operands(torch.float32, grad=False)
    bias = bias.to(dtype)
    exact = formula(*(t.double() for t in (y, x, a, b)), 0.7, **kwargs(c, gain.double(), bias.double(), True))
    few = add_low_rank(y, x, a, b, 0.7, **kwargs(c, gain, bias, True))
    assert few.dtype == dtype
    torch.testing.assert_close(few, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    many = torch.cat([y, y], 1), torch.cat([x, x], 1)
    many = add_low_rank(*many, a, b, 0.7, **kwargs(c, gain, bias, True))
    torch.testing.assert_close(many[:, : low_rank.FEW], few, rtol=0.03, atol=0.1)


@per_gain
def test_an_unmoved_adapter_is_exact_in_every_form(c: float | None) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (1, low_rank.FEW + 1):
            for grad in (False, True):
                y, x, *_ = operands(dtype, (rows,), grad)
                _, _, a, b, gain, _ = operands(torch.float32, grad=grad)
                _, _, _, _, _, bias = operands(dtype, grad=False)
                given = kwargs(c, torch.ones_like(gain).requires_grad_(grad), bias, True)
                out = add_low_rank(y, x, a, torch.zeros_like(b).requires_grad_(grad), 2.0, **given)
                assert torch.equal(out, y)


def test_products_are_of_the_dtypes_given_under_autocast() -> None:
    y, x, a, b, *_ = operands(torch.float32, (40,))
    wanted = add_low_rank(y, x, a, b, 1.0)
    wanted.sum().backward()
    grads = [each.grad.clone() for each in (a, b, x)]
    for each in (a, b, x):
        each.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        out = add_low_rank(y, x, a, b, 1.0)
        out.sum().backward()
    assert out.dtype == torch.float32
    assert torch.equal(out, wanted)
    assert all(torch.equal(one, each.grad) for one, each in zip(grads, (a, b, x), strict=True))


@pytest.mark.parametrize("rows", [low_rank.FEW, low_rank.FEW + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_are_they_without_gradients(rows: int, dtype: torch.dtype) -> None:
    y, x, *_ = operands(dtype, (rows,), grad=False)
    _, _, a, b, gain, _ = operands(torch.float32, grad=False)
    for given in ({}, {"gain": gain, "c": 0.5}):
        wanted = add_low_rank(y, x, a, b, 1.0, **given)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(add_low_rank(y, x, a, b, 1.0, **given), wanted)


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa"])
def test_a_layer_that_autocast_leaves_alone(variant: str) -> None:
    """As bitsandbytes' layers, which answer in the dtype that they are asked in."""

    class Own(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x)

    model = torch.nn.Sequential(Own(16, 24)).eval()
    perturb(ll.attach(model, config(variant, target_names=r"^0$")))
    x = torch.randn(20, 16)
    with torch.autocast("cpu", torch.bfloat16):
        with_gradients = model(x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), with_gradients)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", [1.0, 0.5, 0.2, 0.06])
@pytest.mark.parametrize("c", [1.0, 0.5, 8.0, -4.0])
def test_the_gains_gradient_in_bfloat16_is_as_good_as_autograds(biased: bool, size: float, c: float) -> None:
    generator = torch.Generator().manual_seed(1)
    n, i, o = 64, 48, 40
    made = [torch.randn(shape, generator=generator) for shape in ((n, i), (o, i), (R, i), (o, R), (o,), (n, o))]
    x, w, a, b, noise, u = made
    bias = 3 * noise if biased else None
    gain = size * (1 + 0.1 * noise)
    x, u = x.bfloat16(), u.bfloat16()
    y = x.double() @ w.double().T + (0 if bias is None else bias.double())

    def found(op: Any, dtype: torch.dtype) -> torch.Tensor:
        g = gain.to(torch.float64 if dtype == torch.float64 else torch.float32, copy=True).requires_grad_()
        own = None if bias is None else bias.to(dtype)
        factors = (a.to(g.dtype), b.to(g.dtype))
        op(y.to(dtype), x.to(dtype), *factors, 0.1, gain=g, c=c, bias=own).backward(u.to(dtype))
        assert g.grad is not None
        return g.grad.double()

    def plain(y: Any, x: Any, a: Any, b: Any, s: float, **given: Any) -> Any:
        return low_rank._reference(y, x, a, b, s, 0.0, given["gain"], given["c"], given["bias"])

    exact = found(formula, torch.float64)
    off = [float((found(op, torch.bfloat16) - exact).norm() / exact.norm()) for op in (add_low_rank, plain)]
    assert off[0] < 2 * off[1] + 0.002


# ---- the reference form ---------------------------------------------------------------------------


def test_function_transforms_go_through() -> None:
    y, x, a, b, gain, _ = operands(grad=False)

    def loss(a: torch.Tensor, b: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return add_low_rank(y, x, a, b, 1.3, gain=gain, c=0.5).square().sum()

    transformed = torch.func.grad(loss, argnums=(0, 1, 2))(a, b, gain)
    leaves = [each.clone().requires_grad_() for each in (a, b, gain)]
    loss(*leaves).backward()
    for one, leaf in zip(transformed, leaves, strict=True):
        torch.testing.assert_close(one, leaf.grad)
    _, tangent = torch.func.jvp(lambda a: add_low_rank(y, x, a, b, 1.3), (a,), (torch.ones_like(a),))
    torch.testing.assert_close(tangent, 1.3 * F.linear(F.linear(x, torch.ones_like(a)), b))


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa"])
def test_the_layers_of_a_model_keep_no_more(variant: str) -> None:
    """A LoRA keeps x and r numbers a token, a DoRA the layer's output too; no cast of A or B."""
    model = OneLinear().train()
    adapter = ll.attach(model, config(variant, target_names="proj"))
    perturb(adapter, 0.1)
    x = torch.randn(50, 16, requires_grad=True)
    found = kept(lambda: model(x), *adapter.parameters(), *model.parameters())
    assert x.untyped_storage().data_ptr() in found
    cfg = config(variant, target_names="proj")
    most = x.nbytes + 50 * 4 * cfg.r
    if variant == "dora":
        most += 50 * 4 * model.proj.out_features + 3 * 4 * model.proj.out_features  # y, g and what it is made of
    if variant == "pissa":
        most += 50 * 4 * cfg.r + 2 * 4 * sum(p.numel() for p in adapter.parameters())  # A and B beside what they were
    assert sum(found.values()) <= most


@pytest.mark.parametrize("variant", ["lora", "pissa"])
def test_shapes_alone_go_through(variant: str) -> None:
    """On the meta device, which has no autocast to ask for."""
    model = OneLinear()
    ll.attach(model, config(variant, target_names="proj"))
    model.to("meta")
    assert model(torch.empty(5, 16, device="meta", requires_grad=True)).is_meta
    with torch.no_grad():
        assert model(torch.empty(5, 16, device="meta")).is_meta


@pytest.mark.parametrize("grad", [False, True])
def test_an_exported_model_takes_any_number_of_tokens(grad: bool) -> None:
    """torch.export traces without dynamo, by default: neither the short path nor its limit may be in the graph."""
    model = OneLinear()
    perturb(ll.attach(model, config("lora", target_names="proj")))
    x = torch.randn(1, 5, 16)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {1: torch.export.Dim("n", min=2, max=64)}})
    for tokens in (5, 40):
        x = torch.randn(1, tokens, 16)
        torch.testing.assert_close(program.module()(x), model(x))
