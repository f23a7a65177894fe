"""Starting is linear in the blocks, the adapters and the layers of one size. Calls are counted, never timed."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_llama
from test_reading import python_calls

import lora_lite as ll
from lora_lite.core.ran import has_run
from lora_lite.io.safetensors import Header

CONFIG = ll.LoRAConfig(r=2)


def calls_at(blocks: int, folder: Path) -> Counter[str]:
    """The library's calls of a plan, an attach, a load and a detach on so many blocks."""
    model, file = tiny_llama(num_hidden_layers=blocks), folder / f"{blocks}.safetensors"
    ll.attach(model, CONFIG)
    ll.save(model, file)
    counts: Counter[str] = Counter()
    runs: dict[str, Callable[[], Any]] = {
        "detach": lambda: ll.detach(model),
        "plan": lambda: ll.plan(model, CONFIG),
        "attach": lambda: ll.attach(model, CONFIG, "again"),
        "load": lambda: ll.load(model, file),
    }
    for name, run in runs.items():
        counts[name] = len(python_calls(run))
    return counts


def test_twice_the_blocks_are_at_most_twice_the_calls(tmp_path: Path) -> None:
    few, some, many = (calls_at(blocks, tmp_path) for blocks in (4, 8, 16))
    for name in few:
        assert many[name] - some[name] <= 2.02 * (some[name] - few[name]), name


def test_an_attach_looks_at_no_layer_of_adapters_before_it() -> None:
    model = tiny_llama(num_hidden_layers=8)
    calls = [python_calls(lambda i=i: ll.attach(model, CONFIG, f"a{i}")) for i in range(12)]
    layers, more = len(ll.adapters(model)["a0"].targets), len(calls[11]) - len(calls[1])
    assert layers > 50
    assert more < layers, (Counter(calls[11]) - Counter(calls[1])).most_common(5)


def test_layers_of_one_size_are_asked_for_their_tensors_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    plain = ll.REGISTRY["lora"].param_specs
    monkeypatch.setattr(ll.REGISTRY["lora"], "param_specs", lambda i, o, cfg: sizes.append((i, o)) or plain(i, o, cfg))
    model = tiny_llama(num_hidden_layers=4)
    adapter = ll.attach(model, CONFIG)
    assert sorted(sizes) == sorted({*adapter.targets.values()})
    first, second = list(adapter.sites())[:2]
    assert first.specs is not second.specs  # one site's are no other's
    ll.detach(model)
    sizes.clear()
    ll.attach(
        model, ll.LoRAConfig(r=2, per_layer={r"layers\.0\.": {"r": 3}})
    )  # by layer: those are asked by themselves
    assert len(sizes) == 7 + len({*adapter_sizes(model)})


def adapter_sizes(model: Any) -> list[tuple[int, int]]:
    return [*ll.adapters(model)["default"].targets.values()]


def test_a_load_takes_the_memory_that_its_file_was_read_into(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, read = tiny_llama(), {}
    ll.attach(model, CONFIG)
    ll.save(model, file := tmp_path / "a.safetensors")
    ll.detach(model)
    tensor = Header.tensor

    def noted(self: Header, handle: Any, key: str, index: int | None = None) -> torch.Tensor:
        read[key] = tensor(self, handle, key, index)
        return read[key]

    monkeypatch.setattr(Header, "tensor", noted)
    adapter = ll.load(model, file)
    for key, value in adapter.named_tensors():
        assert value.data_ptr() == read[key].data_ptr()
        assert value.untyped_storage().nbytes() == value.nbytes  # of its own: no part of a larger piece
        assert value.is_leaf
        assert value._base is None
    ll.detach(model)
    with torch.inference_mode():
        adapter = ll.load(model, file)
    assert not any(value.is_inference() for value in adapter.parameters())


def test_a_parameter_that_wants_a_gradient_again_is_frozen_by_the_next_attach() -> None:
    model = tiny_llama()
    first = ll.attach(model, CONFIG, "first")
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight.requires_grad_()  # on a layer with an adapter, and on one without
    model.model.norm.weight.requires_grad_()
    layer.register_parameter("lora_A__other", torch.nn.Parameter(torch.zeros(1)))  # no adapter's, whatever its name
    second = ll.attach(model, CONFIG, "second")
    wanted = {id(p) for adapter in (first, second) for p in adapter.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == wanted
    ll.detach(model)
    assert layer.weight.requires_grad
    assert model.model.norm.weight.requires_grad
    assert layer.lora_A__other.requires_grad


def test_that_a_layer_was_called_outlives_the_adapter_that_saw_it() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    ll.attach(model, CONFIG, "first")
    model(torch.zeros(1, 4))
    second = ll.attach(model, CONFIG, "second")
    ll.detach(model, "first")
    assert all(has_run(site.base) for site in second.sites())
    ll.detach(model)
    third = ll.attach(model, CONFIG, "third")  # since its first adapter, which this is
    assert not any(has_run(site.base) for site in third.sites())
