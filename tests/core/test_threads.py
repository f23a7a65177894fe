"""Threads that run one model: a weight that knows its adapters stays until the last of them is through with it."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import torch
from models import perturb
from torch import nn

import lora_lite as ll

SECONDS = 20


class Reads(nn.Module):
    """It reads a weight, says so, and reads it again once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 3, bias=False)

    def forward(self, x: torch.Tensor, is_in: Event, go_on: Event) -> torch.Tensor:
        x @ self.proj.weight.T
        is_in.set()
        assert go_on.wait(SECONDS)
        return x @ self.proj.weight.T


def adapted() -> tuple[Any, torch.Tensor]:
    """The module with two adapters, and W'."""
    torch.manual_seed(0)
    module = Reads()
    for name in ("one", "two"):
        perturb(ll.attach(module, ll.LoRAConfig(r=2, alpha=2.0, target_names=["proj"]), name), 0.5)
    delta = sum(b @ a for a, b in (adapter.parameters() for adapter in ll.adapters(module).values()))
    return module, (module.proj.weight + delta).detach()


@pytest.mark.parametrize("leaves", [0, 1], ids=["the first leaves", "the second leaves"])
def test_a_thread_that_leaves_takes_nothing_from_the_other(leaves: int) -> None:
    module, weight = adapted()
    x, is_in, go_on = torch.randn(5, 4), [Event(), Event()], [Event(), Event()]
    with ThreadPoolExecutor(2) as pool:
        calls = []
        for i in (0, 1):
            calls.append(pool.submit(module, x, is_in[i], go_on[i]))
            assert is_in[i].wait(SECONDS)
        for i in (leaves, 1 - leaves):
            go_on[i].set()
            torch.testing.assert_close(calls[i].result(SECONDS), x @ weight.T)
    assert "weight" not in module.proj.__dict__


def test_a_thread_that_leaves_between_two_hooks_is_not_followed_by_a_second_use() -> None:
    torch.manual_seed(0)
    module, x, between, left = Reads(), torch.randn(5, 4), Event(), Event()
    perturb(ll.attach(module, ll.LoRAConfig(r=2, alpha=2.0, target_names=["proj"]), "one"), 0.5)

    def wait(module: nn.Module, args: Any) -> None:
        if between.is_set() or not first_in.is_set():
            return
        between.set()  # the second thread, after its hook of the first adapter
        assert left.wait(SECONDS)

    module.register_forward_pre_hook(wait)
    perturb(ll.attach(module, ll.LoRAConfig(r=2, alpha=2.0, target_names=["proj"]), "two"), 0.5)
    delta = sum(b @ a for a, b in (adapter.parameters() for adapter in ll.adapters(module).values()))
    weight, first_in, go_on, anyone = (module.proj.weight + delta).detach(), Event(), Event(), Event()
    anyone.set()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(module, x, first_in, go_on)
        assert first_in.wait(SECONDS)
        second = pool.submit(module, x, Event(), anyone)
        assert between.wait(SECONDS)
        go_on.set()
        torch.testing.assert_close(first.result(SECONDS), x @ weight.T)
        left.set()
        torch.testing.assert_close(second.result(SECONDS), x @ weight.T)


def test_another_scale_meanwhile_is_an_error_there_and_only_there() -> None:
    module, weight = adapted()
    x, is_in, go_on = torch.randn(5, 4), Event(), Event()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(module, x, is_in, go_on)
        assert is_in.wait(SECONDS)
        for scale in (2.0, 0.0):
            with ll.scaled(module, scale), pytest.raises(ll.TargetError, match=r"another thread .* at scale 1"):
                module(x, Event(), go_on)
        go_on.set()
        torch.testing.assert_close(call.result(SECONDS), x @ weight.T)
    torch.testing.assert_close(module(x, Event(), go_on), x @ weight.T)
