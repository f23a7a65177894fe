"""The coefficient c of every method: the base, the poles, several adapters, and a forward that is run again later."""

import copy
import threading
from typing import Any

import pytest
import torch
from models import IDS, OneLinear, attach, config, loss_of, one_layer, perturb, tiny_llama
from oracles import AT_SCALE, DRAWS
from test_ecosystem import gradients, per_trained, per_variant
from test_laws import attached, logits, small
from torch.utils.checkpoint import checkpoint

import lora_lite as ll

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # a checkpoint in no_grad

POLES = (1.0, -1.0, 0.5)


# ---- what c does --------------------------------------------------------------------------------


@per_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_is_the_base_bit_for_bit_in_any_dtype(variant: str, dtype: torch.dtype) -> None:
    base = logits(small(dtype))
    model, adapter = attached(variant, dtype)
    assert not torch.equal(logits(model), base)
    for c in (0.0, -0.0):
        adapter.scale = c
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("variant", sorted(ll.REGISTRY.keys() - AT_SCALE.keys()))
def test_the_sign_of_c_is_that_of_the_delta(variant: str) -> None:
    """At each layer what c adds is linear in c. A method whose c turns a rotation has an oracle that knows c."""
    model, x = one_layer(variant, dtype=torch.float64)
    base = model(x)
    adapter = attach(model, config(variant, target_names="proj", dtype=torch.float64))
    perturb(adapter, 0.3)
    delta = model(x) - base
    assert delta.abs().max() > 1e-3
    for c in (-1.0, 0.25, -2.5):
        adapter.scale = c
        torch.testing.assert_close(model(x) - base, c * delta, rtol=1e-6, atol=1e-7)


@per_variant
def test_a_sweep_needs_no_new_attach(variant: str) -> None:
    model, adapter = attached(variant)
    values = {key: value.clone() for key, value in adapter.state_dict().items()}
    hooks = {path: list(module._forward_hooks) for path, module in model.named_modules()}
    for c in (-2.0, 0.0, 0.3, 1.0):
        fresh, other = attached(variant)
        other.scale = c
        with ll.scaled(model, c):
            assert torch.equal(logits(model), logits(fresh))
    assert hooks == {path: list(module._forward_hooks) for path, module in model.named_modules()}
    assert all(torch.equal(value, values[key]) for key, value in adapter.state_dict().items())


@per_variant
def test_of_two_adapters_one_is_scaled_by_name(variant: str) -> None:
    alone = attached(variant)[0]
    model, adapter = attached(variant)
    other = attach(model, config("lora"), "other")
    perturb(other, 0.2, seed=5)
    both = logits(model)
    with ll.scaled(model, 0.0, "other"):
        assert torch.equal(logits(model), logits(alone))
        with ll.scaled(model, -0.5, "default"):
            assert (adapter.scale, other.scale) == (-0.5, 0.0)
            with ll.scaled(alone, -0.5):
                assert torch.equal(logits(model), logits(alone))
            with ll.disabled(model), ll.scaled(model, 2.0, "other"):
                assert (adapter.scale, other.scale) == (0.0, 2.0)
            assert (adapter.scale, other.scale) == (-0.5, 0.0)
    assert torch.equal(logits(model), both)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_it_is_restored_whatever_ends_the_block(error: type[BaseException]) -> None:
    model, adapter = attached("lora")
    adapter.scale = 0.25
    with pytest.raises(error), ll.scaled(model, 3.0), ll.disabled(model):
        raise error
    assert adapter.scale == 0.25


@pytest.mark.parametrize("c", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_and_changes_nothing(c: float) -> None:
    model, adapter = attached("lora")
    wanted = logits(model)
    with pytest.raises(ll.ConfigError, match=f"scale {c!r}: wanted a finite number; 0 is the base, 1 the method"):
        adapter.scale = c
    with pytest.raises(ll.ConfigError, match="wanted a finite number"), ll.scaled(model, c):
        pass
    assert adapter.scale == 1.0
    assert torch.equal(logits(model), wanted)


# ---- both poles in one step ---------------------------------------------------------------------


def trainable(variant: str, blocks: int = 2) -> tuple[Any, ll.Adapter]:
    model = tiny_llama(torch.float64, bias=True, num_hidden_layers=blocks).train()
    adapter = attach(model, config(variant, dtype=torch.float64))
    perturb(adapter)
    return model, adapter


def apart(model: Any, name: str = "default", **others: float) -> torch.Tensor:
    """The sum of the gradients of models of their own, one at each pole."""
    total = torch.zeros((), dtype=torch.float64)
    for c in POLES:
        twin = copy.deepcopy(model)
        for each, adapter in ll.adapters(twin).items():
            adapter.scale = c if each == name else others[each]
        loss_of(twin).backward()
        total = total + gradients(ll.adapters(twin)[name])
    return total


def at_the_poles(model: Any, name: str | None = None, run: Any = loss_of) -> torch.Tensor:
    """One loss; every block is over when it is returned."""
    total = torch.zeros((), dtype=torch.float64)
    for c in POLES:
        with ll.scaled(model, c, name):
            total = total + run(model)
        with torch.no_grad(), ll.disabled(model):
            loss_of(model)  # the anchor of a divergence from the base
    return total


WAYS = [None, {"use_reentrant": False}, {"use_reentrant": True}]
per_way = pytest.mark.parametrize("way", WAYS, ids=["plain", "checkpoint", "reentrant"])


def checkpointed(model: Any, way: dict[str, bool] | None) -> None:
    if way is not None:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=way)


@per_trained
def test_both_poles_in_one_step_give_the_gradients_of_two_models(variant: str) -> None:
    if variant in DRAWS:
        pytest.skip("it draws other numbers in each forward")
    model, adapter = trainable(variant, blocks=1)
    wanted = apart(model)
    assert wanted.abs().max() > 1e-4
    for way in WAYS:
        model.zero_grad()
        checkpointed(model, way)
        at_the_poles(model).backward()
        torch.testing.assert_close(gradients(adapter), wanted, rtol=1e-10, atol=1e-13, msg=lambda m, w=way: f"{w}: {m}")


@per_way
@pytest.mark.parametrize("during", [0.0, 0.3])
def test_a_backward_may_come_at_any_other_scale(during: float, way: dict[str, bool] | None) -> None:
    model, adapter = trainable("lora")
    other = attach(model, config("ia3", dtype=torch.float64), "other")
    perturb(other)
    other.scale = 0.5
    wanted = apart(model, other=0.5)
    checkpointed(model, way)
    loss = at_the_poles(model, "default")
    other.scale = 2.0
    with ll.scaled(model, during):
        loss.backward()
    torch.testing.assert_close(gradients(adapter), wanted, rtol=1e-10, atol=1e-13)
    assert (adapter.scale, other.scale) == (1.0, 2.0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_any_part_of_a_model_may_be_checkpointed_and_losses_apart(use_reentrant: bool) -> None:
    model, adapter = trainable("dora")
    wanted = apart(model)

    def run(model: Any) -> torch.Tensor:
        embedded = model.model.embed_tokens(IDS).requires_grad_()
        return checkpoint(
            lambda e: model(inputs_embeds=e, labels=IDS, use_cache=False).loss, embedded, use_reentrant=use_reentrant
        )

    losses = []
    for c in POLES:
        with ll.scaled(model, c):
            losses.append(run(model))
    for loss in losses:  # in the order of the forwards, so the later graph is there while the earlier one is run again
        loss.backward()
    torch.testing.assert_close(gradients(adapter), wanted, rtol=1e-10, atol=1e-13)


def test_a_checkpoint_within_a_checkpoint() -> None:
    model, adapter = trainable("lora")
    wanted = apart(model)
    checkpointed(model, {"use_reentrant": False})

    def run(model: Any) -> torch.Tensor:
        return checkpoint(lambda ids: model(input_ids=ids, labels=ids).loss, IDS, use_reentrant=False)

    at_the_poles(model, run=run).backward()
    torch.testing.assert_close(gradients(adapter), wanted, rtol=1e-10, atol=1e-13)


def test_who_runs_a_forward_in_a_backward_of_his_own_has_the_scale_he_sets() -> None:
    """As an autograd function that computes its own second run does; the checkpoints around it are not confused."""
    model = OneLinear(dtype=torch.float64)
    adapter = attach(model, config("lora", target_names="proj", dtype=torch.float64))
    perturb(adapter, 0.3)
    x, seen = torch.randn(3, 16, dtype=torch.float64), []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), ll.scaled(model, -2.0):
                seen.append(model(x))
            return grad

    with ll.scaled(model, 0.5):
        loss = checkpoint(lambda x: Probe.apply(checkpoint(model, x, use_reentrant=False)), x, use_reentrant=False)
    loss.sum().backward()
    got = gradients(adapter)
    with ll.scaled(model, -2.0), torch.no_grad():
        assert torch.equal(seen[0], model(x))
    model.zero_grad()
    adapter.scale = 0.5
    model(x).sum().backward()
    torch.testing.assert_close(got, gradients(adapter))


def test_what_is_remembered_of_the_scale_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = trainable("lora")
    state = next(site.state for site in adapter.sites())
    with torch.no_grad():
        for c in range(100):
            with ll.scaled(model, float(c)):
                logits(model)
    assert len(state.changes.numbers) <= 2  # no graph, so nothing that could be run again

    monkeypatch.setattr("lora_lite.core.scale.MOST_CHANGES", 8)
    checkpointed(model, {"use_reentrant": False})
    early = loss_of(model)
    for _ in range(2):
        late = at_the_poles(model)
    late.backward()
    assert len(state.changes.numbers) <= 8
    with pytest.raises(ll.ConfigError, match=r"more than 4 changes of the scale ago: .*\n.*earlier"):
        early.backward()


def test_a_copy_starts_without_what_is_pending() -> None:
    model, adapter = trainable("lora")
    checkpointed(model, {"use_reentrant": False})
    loss = at_the_poles(model)
    twin = copy.deepcopy(model)
    wanted = apart(model)
    loss.backward()
    torch.testing.assert_close(gradients(adapter), wanted, rtol=1e-10, atol=1e-13)
    at_the_poles(twin).backward()
    torch.testing.assert_close(gradients(ll.adapters(twin)["default"]), wanted, rtol=1e-10, atol=1e-13)


def in_a_thread(run: Any) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_of_its_own_trains_at_the_scale_that_was_set_elsewhere() -> None:
    model, adapter = trainable("lora")
    checkpointed(model, {"use_reentrant": False})
    adapter.scale = 0.5
    in_a_thread(lambda: loss_of(model).backward())
    got = gradients(adapter)
    for each in adapter.parameters():
        each.grad = None
    loss_of(model).backward()
    torch.testing.assert_close(got, gradients(adapter), rtol=1e-10, atol=1e-13)


def test_another_threads_change_before_a_second_run_raises_and_is_over_with_the_next_forward() -> None:
    model, adapter = trainable("lora")
    wanted = apart(model)
    checkpointed(model, {"use_reentrant": False})
    at_the_poles(model).backward()

    def evaluate() -> None:
        with ll.disabled(model):
            loss_of(model).backward()

    for each in adapter.parameters():
        each.grad = None
    pending = at_the_poles(model)
    in_a_thread(evaluate)
    with pytest.raises(ll.ConfigError, match="several threads"):
        pending.backward()
    for each in adapter.parameters():
        each.grad = None
    at_the_poles(model)
    for _ in range(2):
        at_the_poles(model).backward()
        torch.testing.assert_close(gradients(adapter), wanted, rtol=1e-10, atol=1e-13)
        for each in adapter.parameters():
            each.grad = None


@pytest.mark.parametrize("inner", [True, False])
def test_a_checkpoint_inside_of_a_reentrant_one_raises(inner: bool) -> None:
    model, _ = trainable("lora")
    checkpointed(model, {"use_reentrant": inner})

    def run(model: Any) -> torch.Tensor:
        embedded = model.model.embed_tokens(IDS).requires_grad_()
        return checkpoint(
            lambda e: model(inputs_embeds=e, labels=IDS, use_cache=False).loss, embedded, use_reentrant=True
        )

    with ll.scaled(model, -1.0):
        inside = run(model)
        inside.backward()  # inside of the block all is known
        loss = run(model)
    with pytest.raises(ll.ConfigError, match="inside of a reentrant one"):
        loss.backward()


def test_a_scale_that_is_set_for_good_in_a_backward_counts_there_alone() -> None:
    model, adapter = trainable("lora")
    wanted = apart(model)
    first = next(adapter.parameters())
    handle = first.register_post_accumulate_grad_hook(lambda p: setattr(adapter, "scale", 1.0))
    loss_of(model).backward()
    handle.remove()
    for each in adapter.parameters():
        each.grad = None
    checkpointed(model, {"use_reentrant": False})
    at_the_poles(model).backward()
    torch.testing.assert_close(gradients(adapter), wanted, rtol=1e-10, atol=1e-13)
