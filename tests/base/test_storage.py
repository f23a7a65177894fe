"""A quantiser that this library has never heard of becomes fully supported by one registered class."""

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, perturb, tiny_llama
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.base.kinds import Kind
from lora_lite.base.layer import BaseLayer, layer_of
from lora_lite.base.storage import STORAGES, Quantization, Storage, register_storage


class RowInt8(nn.Module):
    """A toy quantised layer: int8 codes with a scale for each row, dequantised at each forward."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        scales = weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
        self.register_buffer("weight", (weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight * self.scales).to(x.dtype), self.bias)


class RowInt8Storage(Storage):
    """All that this library has to know of it."""

    def holds(self, module: Any, kind: Kind) -> bool:
        return isinstance(module, RowInt8)

    def describe(self, layer: BaseLayer) -> str:
        return "row-wise int8"

    def dense(self, layer: BaseLayer, expert: int | None) -> Tensor:
        return layer.stored * layer.module.scales

    def record(self, layer: BaseLayer) -> Quantization:
        return Quantization("toy", "row-wise int8")

    def requantized(self, layer: BaseLayer, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return RowInt8(weight, bias)


@pytest.fixture
def registered() -> Iterator[None]:
    before = list(STORAGES)
    register_storage(RowInt8Storage)
    yield
    STORAGES[:] = before


def quantized() -> Any:
    model = tiny_llama()
    for block in model.model.layers:
        for name in ("up_proj", "down_proj"):
            layer = getattr(block.mlp, name)
            setattr(block.mlp, name, RowInt8(layer.weight.detach(), layer.bias))
    return model


def dequantized(model: Any) -> Any:
    """The same model with the numbers that the toy layers compute with."""
    model = copy.deepcopy(model)
    for block in model.model.layers:
        for name in ("up_proj", "down_proj"):
            layer = layer_of(getattr(block.mlp, name))
            setattr(block.mlp, name, layer.dense_module(layer.dense_weight(), layer.bias))
    return model


def output(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


def test_the_class_is_short() -> None:
    assert len(inspect.getsource(RowInt8Storage).splitlines()) <= 40


def test_without_the_class_its_numbers_are_measured() -> None:
    model = quantized()
    for path, module in model.named_modules():
        if isinstance(module, RowInt8):
            assert torch.equal(layer_of(module, path).dense_weight(), module.weight * module.scales)
    adapter = ll.attach(model, ll.DoRAConfig(target_names="mlp"))
    assert adapter.base["quantization"]["quant_type"] == "unknown (Tensor, int8)"
    with pytest.raises(ll.QuantizedWeightError, match=r"unknown \(Tensor, int8\) weight can't be quantised again here"):
        ll.merge(model, quantized="requantize")


@pytest.mark.parametrize("variant", ["lora", "dora", "ia3"])
def test_with_it_every_method_trains_saves_and_merges(variant: str, registered: None, tmp_path: Path) -> None:
    model = quantized()
    exact = dequantized(model)
    torch.testing.assert_close(output(model), output(exact))
    cfg = ll.config_for(variant)(target_names="mlp")  # type: ignore[call-arg]
    adapters = []
    for each in (model, exact):
        torch.manual_seed(1)
        adapters.append(ll.attach(each, cfg))
        perturb(adapters[-1])
        each(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(output(model), output(exact))
    for a, b in zip(adapters[0].parameters(), adapters[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    assert adapters[0].base["quantization"]["method"] == "toy"

    wanted = output(model)
    ll.save(model, tmp_path / "a.safetensors")
    fresh = quantized()
    ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(output(fresh), wanted)
    if variant == "dora":
        with pytest.raises(ll.CheckpointError, match="trained on another base"):
            ll.load(dequantized(quantized()), tmp_path / "a.safetensors")

    with pytest.raises(ll.QuantizedWeightError, match="row-wise int8, which can't hold the sum"):
        ll.merge(model)
    ll.merge(model, quantized="dequantize")
    torch.testing.assert_close(output(model), wanted, rtol=1e-4, atol=1e-5)
    ll.unmerge(model)
    assert torch.equal(output(model), wanted)
    ll.merge(model, quantized="requantize")
    assert isinstance(model.model.layers[0].mlp.up_proj, RowInt8)
    ll.unmerge(model)
    assert torch.equal(output(model), wanted)


def test_pissa_on_it_raises(registered: None) -> None:
    with pytest.raises(ll.QuantizedWeightError, match="'pissa' needs a dense weight, and this one is row-wise int8"):
        ll.attach(quantized(), ll.PiSSAConfig(r=4, target_names="mlp"))
