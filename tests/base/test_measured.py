"""The weight of a layer that is known by its forward alone."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import config
from test_probe import int8
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.base import affine, measured
from lora_lite.base.layer import layer_of


class Codes(nn.Module):
    """A quantised layer with its codes under another name than `weight`: int8 by rows, multiplied in x's dtype."""

    def __init__(self, d_in: int = 300, d_out: int = 24, bias: float | None = 1e4, dtype: Any = torch.float32) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.register_buffer("codes", torch.randint(-127, 128, (d_out, d_in), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(d_out, 1).to(dtype) / 127)
        self.bias = None if bias is None else nn.Parameter(torch.full((d_out,), bias, dtype=dtype))
        self.calls = [0]  # which a shallow copy shares

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return nn.functional.linear(x, self.numbers().to(x.dtype), self.bias)

    def numbers(self) -> Tensor:
        return self.codes * self.scales


class Gguf(Codes):
    """It has the name of another quantiser."""


class Changed(Codes):
    """What it makes of x is changed."""

    def __init__(self, change: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(bias=None)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(super().forward, x)


def read(module: nn.Module) -> Any:
    layer = layer_of(module, "proj")
    assert layer is not None
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_is_what_the_forward_makes_of_the_unit_vectors(dtype: torch.dtype) -> None:
    """In more than one block, the last one short; a bias that is 10⁴ times as large costs no digit."""
    for bias in (None, 1e4):
        module = Codes(bias=bias, dtype=dtype)
        weight = read(module).dense_weight()
        assert weight.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(weight, module.numbers().to(weight.dtype))
        assert module.bias is None or (module.bias == bias).all()


@pytest.mark.parametrize("where", ["parameter", "buffer", "attribute"])
def test_the_bias_is_back_in_its_place_even_after_an_error(where: str) -> None:
    module: Any = Codes()
    bias = module.bias
    del module.bias
    if where == "parameter":
        module.bias = bias
    elif where == "buffer":
        module.register_buffer("bias", bias.detach())
    else:
        vars(module)["bias"] = bias.detach()
    before = module.bias
    assert torch.equal(read(module).dense_weight(), module.numbers())
    assert module.bias is before
    module.forward = lambda x: 1 / 0
    with pytest.raises(ll.QuantizedWeightError, match="can't be run on rows"):
        read(module).dense_weight()
    assert module.bias is before
    assert set(module.state_dict()) == {"codes", "scales"} | ({"bias"} - ({"bias"} if where == "attribute" else set()))


def test_a_product_goes_through_the_forward_and_takes_a_gradient() -> None:
    layer = read(Codes())
    t = torch.randn(5, 300, requires_grad=True)
    numbers = layer.module.numbers()
    product = layer.linear(t)
    torch.testing.assert_close(product, t @ numbers.mT)
    (gradient,) = torch.autograd.grad(product.sum(), t)
    torch.testing.assert_close(gradient, numbers.sum(0).expand(5, -1))
    with torch.no_grad():
        assert not layer.linear(t).requires_grad
    layer.module.calls[0] = 0
    layer.linear(t.detach())
    assert layer.module.calls == [1]
    torch.testing.assert_close(layer.linear(t.detach().view(1, 5, 300)), product[None].detach())


def test_where_the_forward_passes_no_gradient_the_numbers_do() -> None:
    layer = read(Changed(lambda f, x: f(x.detach())))
    t = torch.randn(5, 300, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer.linear(t).sum(), t)
    torch.testing.assert_close(gradient, layer.module.numbers().sum(0).expand(5, -1))


def test_a_forward_of_one_dtype_multiplies_in_that() -> None:
    def only_bfloat16(f: Any, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16:
            raise TypeError(x.dtype)
        return f(x)

    module = Changed(only_bfloat16).bfloat16()
    t = torch.randn(5, 300)
    product = read(module).linear(t)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, t @ module.numbers().float().mT, rtol=0.02, atol=0.2)


def test_it_is_probed_once_for_the_same_tensor_and_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    probes: list[str] = []
    bend = affine._bend
    monkeypatch.setattr(affine, "_bend", lambda run, layer: (probes.append(layer.path), bend(run, layer))[1])
    module = Codes()
    for _ in range(3):
        read(module).dense_weight()
    assert len(probes) == 1
    module.codes = module.codes.clone()
    read(module).dense_weight()
    assert len(probes) == 2
    module.forward = lambda x: Codes.forward(module, x).clamp(-1, 1)
    for _ in range(2):  # what has failed is asked again
        with pytest.raises(ll.QuantizedWeightError, match="no matrix stands for this layer"):
            read(module).dense_weight()
    assert len(probes) == 4
    assert not [key for key in vars(module) if "probe" in key]
    del module.forward
    twin = copy.deepcopy(module)
    assert torch.equal(read(twin).dense_weight(), twin.numbers())


def test_training_a_method_that_reads_the_weight_measures_it_once() -> None:
    model = nn.ModuleDict({"proj": Codes(64, 32, bias=None)})
    adapter = ll.attach(model, config("dora", target_names="proj"))
    module: Any = model["proj"]
    calls = []
    for _ in range(2):
        before = module.calls[0]
        module(torch.randn(3, 64)).square().sum().backward()
        calls.append(module.calls[0] - before)
    assert calls == [2, 2]  # y, and W Aᵀ
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


@pytest.mark.parametrize("variant", ["dora", "pissa"])
def test_what_no_matrix_stands_for_is_refused_where_the_weight_is_read(variant: str) -> None:
    rounded = nn.ModuleDict({"proj": Changed(lambda f, x: f(int8(x)))})
    with pytest.raises(ll.QuantizedWeightError, match=r"proj: (no matrix stands|'pissa' needs a dense)"):
        ll.attach(rounded, config(variant, target_names="proj"))
    assert not ll.adapters(rounded)
    ll.attach(rounded, config("lora", target_names="proj"))
    with pytest.raises(ll.QuantizedWeightError, match="proj: no matrix stands for this layer"):
        ll.merge(rounded, quantized="dequantize")


def test_a_constant_that_is_no_bias_is_no_part_of_the_weight() -> None:
    with pytest.raises(ll.QuantizedWeightError, match=r"proj: this layer .* adds a constant that isn't its bias"):
        read(Changed(lambda f, x: f(x) + 1)).dense_weight()


def test_the_record_tells_quantisers_and_weights_apart(tmp_path: Path) -> None:
    def model(kind: type[Codes], seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return nn.ModuleDict({"proj": kind(64, 32)})

    adapter = ll.attach(model(Gguf), config("dora", target_names="proj"))
    record = adapter.base["quantization"]
    assert (record["method"], record["quant_type"], record["modules"]) == ("gguf", "Gguf", ["proj"])
    _, *numbers = adapter.base["fingerprint"]["proj"]
    numbers_of = model(Gguf)["proj"].numbers()
    assert len(numbers) == 4
    assert all(number in numbers_of for number in torch.tensor(numbers))
    first = model(Gguf)
    ll.attach(first, config("dora", target_names="proj"))
    ll.save(first, tmp_path / "a.safetensors")
    ll.load(model(Gguf), tmp_path / "a.safetensors")
    for other in (model(Codes), model(Gguf, seed=1), nn.ModuleDict({"proj": nn.Linear(64, 32)})):
        with pytest.raises(ll.CheckpointError, match="trained on another base"):
            ll.load(other, tmp_path / "a.safetensors")


def test_codes_without_a_weight_are_a_layer_and_other_modules_are_none() -> None:
    module = Codes()
    assert (read(module).d_in, read(module).d_out) == (300, 24)
    assert read(module).stored is module.codes
    wrapper = nn.Linear(4, 4)  # as PEFT's layers: sizes, and tensors of floating numbers alone
    del wrapper.weight
    wrapper.other = nn.Parameter(torch.ones(4, 4))
    assert layer_of(wrapper) is None


def test_a_merged_layer_has_the_dtype_of_the_activations_and_not_of_codes() -> None:
    model = nn.ModuleDict({"proj": Codes(64, 32), "norm": nn.LayerNorm(8, dtype=torch.bfloat16)})
    model["norm"].register_parameter("codes", nn.Parameter(torch.zeros(99, dtype=torch.float8_e4m3fn), False))
    ll.attach(model, config("lora", target_names="proj"))
    for p in (model["proj"].bias, model["proj"].scales):
        p.data = p.data.float()
    model["proj"].bias.data = model["proj"].bias.data.bfloat16()
    ll.merge(model, quantized="dequantize")
    assert model["proj"].weight.dtype == torch.bfloat16


def test_a_layer_that_is_not_here_is_not_measured() -> None:
    for module in (Codes().to("meta"), nn.LazyLinear(4)):
        assert not read(module).storage.is_dense
        assert read(module).storage is not measured.MEASURED
