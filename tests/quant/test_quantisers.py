"""Every method on the layers of real quantisers. What isn't in the `test` extra is tried where it is installed."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, attach, config, loss_of, perturb, tiny_llama
from quantisers import QUANTISERS, Quantiser, replaced
from test_laws import logits
from torch import nn

import lora_lite as ll
from lora_lite.base.layer import layer_of

INSTALLED = ("torchao", "optimum.quanto", "hqq.core.quantize", "diffusers")  # by the `test` extra
UP = "model.layers.0.mlp.up_proj"
MODES = ("none", "pre", "full", "column")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.quant,
    pytest.mark.parametrize("name", QUANTISERS),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Using naive"),
]


def quantiser_of(name: str) -> Quantiser:
    quantiser = QUANTISERS[name]
    if quantiser.package in INSTALLED:
        importlib.import_module(quantiser.package)
    else:
        pytest.importorskip(quantiser.package)
    return quantiser


def base(name: str) -> Any:
    quantiser = quantiser_of(name)
    torch.manual_seed(0)
    return replaced(tiny_llama(quantiser.dtype), quantiser.make).requires_grad_(False)


def close(model: Any, wanted: torch.Tensor) -> None:
    """The outputs are the same within the rounding of the model's dtype, or of float16, which AWQ multiplies in."""
    size, error = wanted.abs().max(), (logits(model) - wanted).abs().max()
    assert error <= (1e-5 if model.dtype == torch.float32 and not is_half(model) else 0.02) * size


def is_half(model: Any) -> bool:
    return "WQLinear" in type(model.get_submodule(UP)).__name__


def test_a_measured_weight_is_the_one_that_the_library_dequantises(name: str) -> None:
    quantiser = quantiser_of(name)
    torch.manual_seed(0)
    for bias in (True, False):
        linear = nn.Linear(64, 96, bias, dtype=quantiser.dtype)
        if bias:
            nn.init.constant_(linear.bias, 4.0)
        layer: Any = layer_of(quantiser.make(linear), "proj")
        measured = layer.dense_weight()  # before the other: gptqmodel's AWQ casts its scales in the first forward
        with torch.no_grad():
            wanted = quantiser.dequantise(layer.module).float()
        assert torch.equal(measured, wanted)
        assert layer.describe().startswith(f"{quantiser.method} (")
        t = torch.randn(5, 64, dtype=quantiser.dtype, requires_grad=True)
        product = layer.linear(t)  # (5, 96)
        error, size = (product - t @ wanted.to(t).mT).abs().max(), product.abs().max()
        assert error <= (1e-5 if t.dtype == torch.float32 and name != "AWQ (autoawq)" else 0.02) * size
        (gradient,) = torch.autograd.grad(product, t, torch.ones_like(product))
        torch.testing.assert_close(gradient.float(), wanted.sum(0).expand(5, -1), rtol=0.02, atol=0.02)
        assert layer.bias is None or (layer.bias.float() == 4).all()


@pytest.mark.parametrize("variant", ["lora", "dora", "ia3"])
def test_methods_train_save_load_and_merge(variant: str, name: str, tmp_path: Path) -> None:
    model, quantiser = base(name), QUANTISERS[name]
    bare = logits(model)
    if quantiser.trains:
        with pytest.raises(ll.QuantizedWeightError, match="adapters can't be trained through this layer"):
            ll.attach(model, config(variant))
        return
    adapter = ll.attach(model, config(variant))
    assert torch.equal(logits(model), bare)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(loss_of(model))
        losses[-1].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
        optimizer.step()
    assert losses[-1] < losses[0]
    assert adapter.base["quantization"]["method"] == quantiser.method

    perturb(adapter)
    attached = logits(model)
    ll.save(model, tmp_path / "a.safetensors")
    ll.load(loaded := base(name), tmp_path / "a.safetensors")
    assert torch.equal(logits(loaded), attached)
    ll.merge(model, quantized="dequantize")
    assert type(model.get_submodule(UP)) is nn.Linear
    close(model, attached)
    ll.unmerge(model)
    assert torch.equal(logits(model), attached)


def test_directions_are_taken_out_in_each_mode(name: str) -> None:
    for mode in MODES:
        model = base(name)
        bare = logits(model)
        attach(model, config("abliteration", normalization=mode, target_names="(o|down)_proj$"))
        attached = logits(model)
        assert not torch.equal(attached, bare)
        ll.merge(model, quantized="dequantize")
        close(model, attached)


def test_a_file_of_another_quantiser_is_refused_where_the_weight_is_read(name: str, tmp_path: Path) -> None:
    if QUANTISERS[name].trains:
        quantiser_of(name)
        return
    other = "HQQ 4-bit" if QUANTISERS[name].method != "hqq" else "quanto int8"
    ll.attach(model := base(name), config("dora"))
    ll.save(model, tmp_path / "a.safetensors")
    for another in (base(other), tiny_llama(QUANTISERS[name].dtype)):
        with pytest.raises(ll.CheckpointError, match="trained on another base"):
            ll.load(another, tmp_path / "a.safetensors")
    ll.load(model := base(other), tmp_path / "a.safetensors", verify_base=False)
    assert model(input_ids=IDS).logits.isfinite().all()


def test_what_needs_a_dense_weight_and_quantising_again_are_refused(name: str) -> None:
    model = base(name)
    with pytest.raises(ll.QuantizedWeightError, match=rf"'pissa' needs a dense weight, and this one is {layer(model)}"):
        ll.attach(model, config("pissa"))
    if not QUANTISERS[name].trains:
        ll.attach(model, config("lora"))
        with pytest.raises(ll.QuantizedWeightError, match="can't be quantised again here"):
            ll.merge(model, quantized="requantize")
        with pytest.raises(
            ll.QuantizedWeightError, match=r'use quantized="dequantize" \(a dense layer\), or lora_lite'
        ):
            ll.merge(model)


def layer(model: Any) -> str:
    found: Any = layer_of(model.get_submodule(UP), UP)
    return str(found.describe()).split(" (")[0]
