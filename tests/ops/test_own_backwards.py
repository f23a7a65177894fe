"""Products with a backward of their own: what plain autograd has, in value, first and second derivatives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lite.ops.cayley import add_turn
from lora_lite.ops.few import few_wide, plus
from lora_lite.ops.pairs import mix_halves
from lora_lite.ops.recompute import add_factors
from lora_lite.ops.sparse import Rows, add_sparse, by_rows, is_sparse_enough

O, I, N = 12, 8, 5  # noqa: E741
PLACES = torch.randperm(O * I, generator=torch.Generator().manual_seed(0))[:N].int()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


class Case(NamedTuple):
    """ours, plain: the same function of the inputs."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def dense(values: Tensor, places: Tensor = PLACES) -> Tensor:
    return values.new_zeros(O * I).index_add(0, places, values).view(O, I)


def factors(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return p.sin(), q, q.sum(1)  # (2, i), (o, 2), (o,)


def factored(y: Tensor, x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    a, b, shift = factors(p, q)
    return y + 0.7 * (x @ a.mT @ b.mT + shift)


def turn(t: Tensor) -> Tensor:
    return t.sin()  # (n, 4, 4)


def turned(y: Tensor, x: Tensor, t: Tensor) -> Tensor:
    turns = turn(t) if len(t) > 1 else turn(t).expand(2, 4, 4)
    return y + 0.7 * x @ torch.block_diag(*turns)


def mixed(y: Tensor, p: Tensor, q: Tensor) -> Tensor:
    swapped = y.unflatten(-1, (-1, 2, 3)).flip(-2).flatten(-3)
    return y + p * y + q * swapped


X, Y, V, T = drawn(3, 2, I), drawn(3, 2, O), drawn(N), drawn(2, 4, 4)
SORTED = PLACES.sort().values
CASES = {
    "sparse": Case(
        lambda y, x, v: add_sparse(y, x, v, by_rows(PLACES, O, I), 0.7),
        lambda y, x, v: y + 0.7 * x @ dense(v).mT,
        (Y, X, V),
    ),
    "sorted": Case(
        lambda y, x, v: add_sparse(y, x, v, by_rows(torch.stack([SORTED // I, SORTED % I]), O, I)),
        lambda y, x, v: y + x @ dense(v, SORTED).mT,
        (Y, X, V),
    ),
    "factors": Case(
        lambda y, x, p, q: add_factors(y, x, factors, p, q, s=0.7), factored, (Y, X, drawn(2, I), drawn(O, 2))
    ),
    "turn": Case(lambda y, x, t: add_turn(y, x, turn, t, s=0.7), turned, (drawn(3, 2, I, seed=1), X, T)),
    "one turn": Case(lambda y, x, t: add_turn(y, x, turn, t, s=0.7), turned, (drawn(3, 2, I, seed=1), X, T[:1])),
    "turn of itself": Case(lambda x, t: add_turn(x, x, turn, t, s=0.7), lambda x, t: turned(x, x, t), (X, T)),
    "pairs": Case(
        lambda y, p, q: mix_halves(y, 3, lambda p, q: torch.stack([p.sin(), q]), p, q, s=0.7),
        lambda y, p, q: mixed(y, 0.7 * p.sin(), 0.7 * q),
        (Y, drawn(O, seed=1), drawn(O, seed=2)),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("frozen", [None, 0, 1, 2])
def test_values_gradients_and_second_derivatives(case: Case, frozen: int | None) -> None:
    inputs = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(case.inputs)]
    trained = [t for t in inputs if t.requires_grad]
    results = []
    for function in (case.ours, case.plain):
        out = function(*inputs)
        once = torch.autograd.grad(out.square().sum(), trained, retain_graph=True)  # by the backward's own products
        first = torch.autograd.grad(out.square().sum(), trained, create_graph=True)
        second = torch.autograd.grad(sum((g * g.detach()).sum() for g in first), trained)
        results.append((out, *once, *first, *second))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_without_gradients_and_of_no_rows(case: Case) -> None:
    with torch.no_grad():
        torch.testing.assert_close(case.ours(*case.inputs), case.plain(*case.inputs))
    tokens = sum(t.dim() == 3 and t.shape[:2] == (3, 2) for t in case.inputs)
    empty = [t[:0] for t in case.inputs[:tokens]]
    assert case.ours(*empty, *case.inputs[tokens:]).shape == case.plain(*empty, *case.inputs[tokens:]).shape


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_vector(case: Case) -> None:
    tokens = sum(t.dim() == 3 and t.shape[:2] == (3, 2) for t in case.inputs)
    inputs = [*(t[0, 0] for t in case.inputs[:tokens]), *case.inputs[tokens:]]
    results = []
    for function in (case.ours, case.plain):
        trained = [t.clone().requires_grad_() for t in inputs]
        out = function(*trained)
        results.append((out, *torch.autograd.grad(out.square().sum(), trained)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_factors_that_need_no_gradient_cost_no_product() -> None:
    """With B frozen there is no uᵀ h: of (o, r) numbers none are computed."""
    a, b = drawn(2, I).requires_grad_(), drawn(O, 2)
    shapes: list[tuple[int, ...]] = []
    out = add_factors(Y, X, lambda a, b: (a * 1, b), a, b)
    multiply = torch.Tensor.__matmul__

    def noted(self: Tensor, other: Tensor) -> Tensor:
        shapes.append((self.shape[0], other.shape[-1]))
        return multiply(self, other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", noted)
        out.sum().backward()
    assert (O, 2) not in shapes
    assert (2, I) in shapes
    torch.testing.assert_close(a.grad, torch.autograd.grad((Y + X @ a.mT @ b.mT).sum(), a)[0])


def test_a_dropped_branch_has_one_mask_in_both_passes() -> None:
    x, a, b = torch.ones(500, I, dtype=torch.float64, requires_grad=True), drawn(2, I), drawn(O, 2)
    weights = [t.clone().requires_grad_() for t in (a, b)]
    out = add_factors(torch.zeros(500, O, dtype=torch.float64), x, lambda a, b: (a, b), *weights, dropout=0.5)
    out.sum().backward()
    x_hat = x.grad / (a.mT @ b.mT).sum(1)  # (n, i): the mask over 1 - p
    assert set(x_hat.detach().round(decimals=6).unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(out, x_hat @ a.mT @ b.mT)
    torch.testing.assert_close(weights[0].grad, (b.sum(0)[:, None] * x_hat.sum(0)))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_transforms_take_the_plain_form(case: Case) -> None:
    if case.ours.__code__.co_names[0] == "add_sparse":
        pytest.skip("only asked for where `is_sparse_enough` says that there is none")
    grads = torch.func.grad(lambda *inputs: case.ours(*inputs).square().sum(), 0)(*case.inputs)
    torch.testing.assert_close(grads, torch.func.grad(lambda *i: case.plain(*i).square().sum(), 0)(*case.inputs))


def test_where_sparse_products_are_taken() -> None:
    assert is_sparse_enough(X, 6, O, I)
    assert not is_sparse_enough(X, 7, O, I)  # denser than a sixteenth
    assert not is_sparse_enough(X[:0], 6, O, I)
    assert not is_sparse_enough(X.to("meta"), 6, O, I)
    asked: list[bool] = []
    torch.func.vmap(lambda x: (asked.append(is_sparse_enough(x, 6, O, I)), x)[1])(X)
    assert asked == [False]


def test_rows_of_a_table_of_places() -> None:
    order, starts, columns = by_rows(torch.tensor([7, 1, 5, 1]), 3, 3)
    assert order.tolist() == [1, 3, 2, 0]
    assert starts.tolist() == [0, 2, 3, 4]
    assert columns.tolist() == [1, 1, 2, 1]
    in_order = by_rows(torch.tensor([1, 5, 7]), 3, 3)
    assert in_order.order.numel() == 0
    assert in_order.starts.tolist() == [0, 1, 2, 3]
    y = add_sparse(torch.zeros(2, 3), torch.eye(3)[:2], torch.tensor([1.0, 2, 3, 4]), Rows(order, starts, columns))
    assert torch.equal(y, torch.tensor([[0.0, 0, 0], [6, 0, 1]]))  # two numbers at one place add up


@pytest.mark.parametrize("case", ["sparse", "factors", "turn", "pairs"])
def test_autocast_rounds_neither_pass(case: str) -> None:
    inputs = [t.float().requires_grad_() for t in CASES[case].inputs]
    wanted = torch.autograd.grad(CASES[case].ours(*inputs).square().sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = CASES[case].ours(*inputs)
        got = torch.autograd.grad(out.square().sum(), inputs)
    assert out.dtype == torch.float32
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_few_tokens_without_gradients_are_wide() -> None:
    x: Any = torch.ones(2, 8, 4, dtype=torch.bfloat16)
    assert few_wide(x).dtype == torch.float32
    assert few_wide(torch.cat([x, x[:1]])).dtype == torch.bfloat16  # 24 tokens
    assert few_wide(x.double()).dtype == torch.float64
    with torch.enable_grad():
        assert few_wide(x).dtype == torch.bfloat16
    change = F.linear(few_wide(x), torch.full((3, 4), 1e-3))
    y = torch.ones(2, 8, 3, dtype=torch.bfloat16)
    assert plus(y, change, 2.0).dtype == torch.bfloat16
    assert torch.equal(plus(y, change, 2.0), (y.float() + 2 * change).bfloat16())  # rounded once
