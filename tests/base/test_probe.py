"""Layers of other libraries that round their activations: refused where that would be wrong, by what they compute."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import IDS, attach, config, loss_of, perturb, quantized, tiny_llama
from test_laws import logits
from torch import nn
from transformers import AutoModelForCausalLM

import lora_lite as ll
from lora_lite.base import affine, probe
from lora_lite.base.layer import layer_of
from lora_lite.base.own_forward import is_asked

UP = "model.layers.0.mlp.up_proj"
NOT_THROUGH = r"q_proj: adapters can't be trained through this layer \(.*\): {}\n  train on the 16-bit base.*load puts"


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ of quanto's one operation for 4 bits, which tests/quant goes through, is compiled for half a minute."""
    from optimum.quanto.library.extensions.cpp import ext

    library = SimpleNamespace(unpack=lambda t, bits: torch.cat([t >> i & 2**bits - 1 for i in range(0, 8, bits)]))
    monkeypatch.setattr(ext, "_lib", library)


def torchao(name: str, dtype: torch.dtype = torch.float32) -> Any:
    import torchao.quantization as ao

    model = tiny_llama(dtype)
    ao.quantize_(model, getattr(ao, name)())
    return model


def quanto(name: str, dtype: torch.dtype = torch.float32) -> Any:
    from optimum import quanto as oq

    model = tiny_llama(dtype)
    oq.quantize(model, weights=getattr(oq, name), exclude="lm_head")
    oq.freeze(model)
    return model


def compressed(
    scheme: str, folder: Path, dtype: torch.dtype = torch.float32, forward_first: bool = True, rounded: bool = True
) -> Any:
    """The tiny Llama as compressed-tensors stores it, opened by transformers; its first forward unpacks the weights."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    model = tiny_llama(dtype)
    groups = {"group_0": preset_name_to_scheme(scheme, ["Linear"])}
    if not rounded:
        groups["group_0"].input_activations = None
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for layer in model.modules():
        if hasattr(layer, "quantization_scheme"):
            largest = layer.weight.abs().amax(1, keepdim=True)
            layer.weight_scale.data.copy_(largest / (448 if scheme.startswith("FP8") else 127))
            layer.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if forward_first:
        model(input_ids=IDS)
    return model


ROUNDED: dict[str, Callable[[Path], Any]] = {
    "torchao-int8-dynamic": lambda _: torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao-int8-dynamic-bf16": lambda _: torchao("Int8DynamicActivationInt8WeightConfig", torch.bfloat16),
    "compressed-fp8-dynamic": lambda folder: compressed("FP8_DYNAMIC", folder),
    "compressed-fp8-dynamic-bf16": lambda folder: compressed("FP8_DYNAMIC", folder, torch.bfloat16),
    "compressed-int8-dynamic": lambda folder: compressed("W8A8", folder),
    "compressed-int8-dynamic-bf16": lambda folder: compressed("W8A8", folder, torch.bfloat16),
}
EXACT: dict[str, Callable[[], Any]] = {
    f"{library.__name__}-{name}-{str(dtype)[6:]}": lambda library=library, name=name, dtype=dtype: library(name, dtype)  # type: ignore[misc]
    for library, name in [
        (torchao, "Int8WeightOnlyConfig"),
        (torchao, "Float8WeightOnlyConfig"),
        (quanto, "qint8"),
        (quanto, "qint4"),
        (quanto, "qfloat8"),
    ]
    for dtype in (torch.float32, torch.bfloat16)
}
per_rounded = pytest.mark.parametrize("base", ROUNDED)
per_exact = pytest.mark.parametrize("base", EXACT)


@per_rounded
def test_no_adapter_is_trained_through_rounded_activations(base: str, tmp_path: Path) -> None:
    model = ROUNDED[base](tmp_path)
    before, keys = logits(model), set(model.state_dict())
    for call in (ll.attach, ll.plan):
        with pytest.raises(ll.QuantizedWeightError, match=NOT_THROUGH.format("no gradient passes it")):
            call(model, config("lora"))
    assert set(model.state_dict()) == keys
    assert not ll.adapters(model)
    assert torch.equal(logits(model), before)


@per_rounded
def test_nor_is_its_weight_read_as_if_it_were_all(base: str, tmp_path: Path) -> None:
    model = ROUNDED[base](tmp_path)
    with pytest.raises(
        ll.QuantizedWeightError, match=r"q_proj: (no matrix stands for this layer|'dora' reads the weight)"
    ):
        ll.attach(model, config("dora"))
    layer = model.get_submodule(UP)
    with pytest.raises(
        ll.QuantizedWeightError,
        match=r"up_proj: no matrix stands for this layer \(.*\): (f\(u \+ v\)|.* of small inputs)(?s:.*)merge_ch",
    ):
        affine.check_affine(layer_of(layer, UP))


def test_compressed_weights_before_the_first_forward_are_no_weights_yet(tmp_path: Path) -> None:
    model = compressed("FP8_DYNAMIC", tmp_path, forward_first=False)
    fails = (
        r"its own forward fails \(it takes no input .*expected m1.*\); run the model once, if that unpacks its weights"
    )
    with pytest.raises(ll.QuantizedWeightError, match=NOT_THROUGH.format(fails)):
        ll.attach(model, config("lora"))
    assert not ll.adapters(model)


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8"])
def test_compressed_weights_alone_are_a_dense_layer_after_the_first_forward(scheme: str, tmp_path: Path) -> None:
    model = compressed(scheme, tmp_path, rounded=False)
    assert is_asked(layer_of(model.get_submodule(UP)))
    perturb(ll.attach(model, config("dora")))
    attached = logits(model)
    ll.merge(model)
    torch.testing.assert_close(logits(model), attached, rtol=1e-4, atol=1e-5)


@per_rounded
def test_a_trained_adapter_serves_on_rounded_activations(base: str, tmp_path: Path) -> None:
    """What LoRA adds to the output doesn't depend on how the base computes its own."""
    model = ROUNDED[base](tmp_path)
    trained = tiny_llama(next(model.parameters()).dtype)
    perturb(ll.attach(trained, config("lora", target_names="up_proj")))
    ll.save(trained, tmp_path / "a.safetensors")
    layer: Any = model.get_submodule(UP)
    x = torch.randn(1, 5, 64, dtype=trained.dtype)
    with torch.no_grad():
        own = layer(x)
        adapter = ll.load(model, tmp_path / "a.safetensors", verify_base=False)
        tensors = {key: value.float() for key, value in adapter.state_dict().items()}
        wanted = own + x.float() @ (tensors[f"{UP}.lora_B"] @ tensors[f"{UP}.lora_A"]).mT
        tolerance = 1e-5 if x.dtype == torch.float32 else 0.01
        torch.testing.assert_close(layer(x).float(), wanted.float(), rtol=tolerance, atol=tolerance)
    with pytest.raises(
        ll.QuantizedWeightError, match=r"up_proj: (no matrix stands for this layer|the weight is unknown)"
    ):
        ll.merge(model)


@pytest.mark.parametrize("mode", [{"variant": "steer", "target_names": "down_proj"}, {"variant": "abliteration"}])
def test_what_is_computed_and_reads_no_weight_goes_on(mode: dict[str, Any]) -> None:
    model = ROUNDED["torchao-int8-dynamic"](Path())
    fields = {"target_names": "down_proj"} | ({"normalization": "none"} if mode["variant"] == "abliteration" else {})
    adapter = attach(model, config(**(mode | fields)))
    assert not list(adapter.parameters())
    ll.detach(model)


@per_exact
def test_quantised_weights_alone_train_with_the_gradients_of_their_numbers(base: str) -> None:
    model = EXACT[base]()
    adapter = ll.attach(model, config("lora"))
    perturb(adapter)
    loss_of(model).backward()
    numbers = tiny_llama(model.dtype)
    for path in adapter.targets:
        layer: Any = model.get_submodule(path)
        with torch.no_grad(), ll.disabled(model):
            numbers.get_submodule(path).weight.copy_(layer(torch.eye(layer.in_features, dtype=model.dtype)).mT)
    if not layer_of(model.lm_head).storage.is_dense:
        numbers.lm_head.weight.data = model.lm_head.weight.dequantize()
    twin = ll.attach(numbers, config("lora"))
    with torch.no_grad():
        for (_, a), (_, b) in zip(twin.named_tensors(), adapter.named_tensors(), strict=True):
            a.copy_(b)
    loss_of(numbers).backward()
    ours, wanted = (torch.cat([p.grad.flatten() for p in each.parameters()]).float() for each in (adapter, twin))
    assert (ours - wanted).norm() < (1e-5 if model.dtype == torch.float32 else 0.05) * wanted.norm()


@per_exact
def test_quantised_weights_alone_are_affine(base: str) -> None:
    model = EXACT[base]()
    layer = model.get_submodule(UP)
    assert is_asked(layer_of(layer))
    affine.check_affine(layer_of(layer, UP))


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_bitsandbytes_isnt_asked(quantization: str, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its int8 rounds activations in eval by design, and its gradients are right."""
    monkeypatch.setattr(probe, "own_forward", None)
    ll.attach(quantized(tiny, quantization), config("lora"))


# ---- layers of one's own ------------------------------------------------------------------------


class Own(nn.Linear):
    """A linear layer with a forward of its own."""

    def __init__(self, change: Callable[[Any, torch.Tensor], Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(64, 32, dtype=dtype)
        self.change = change

    def forward(self, x: torch.Tensor) -> Any:
        return self.change(super().forward, x)


def stepped(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return x + ((x / step).round() * step - x).detach()


def int8(x: torch.Tensor) -> torch.Tensor:
    """Rounded by rows, with a straight-through gradient."""
    return stepped(x, x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-4) / 127)


NOT_AFFINE: dict[str, tuple[Callable[[Any, torch.Tensor], Any], str]] = {
    "int8": (lambda f, x: f(int8(x)), "f\\(u"),
    "groups": (lambda f, x: f(int8(x.unflatten(-1, (-1, 32))).flatten(-2)), "f\\(u"),
    "clipped": (lambda f, x: f(x.clamp(-4, 4)), "f\\(u"),
    "squashed": (lambda f, x: f(x).tanh(), "f\\(u"),
    "output": (lambda f, x: int8(f(x)), "f\\(u"),
    "rows": (lambda f, x: f(x) - f(x).mean(-2, keepdim=True), "the output of a row depends on the other rows"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NOT_AFFINE)
def test_what_no_matrix_stands_for_is_found(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    change, found = NOT_AFFINE[name]
    model = nn.ModuleDict({"proj": Own(change, dtype)})
    found = found if dtype != torch.bfloat16 else f"{found}|of small inputs is lost"
    with pytest.raises(ll.QuantizedWeightError, match=rf"proj: no matrix stands for this layer .*({found})"):
        affine.check_affine(layer_of(model["proj"], "proj"))
    if name in ("int8", "groups", "output"):  # a straight-through gradient is a right one, of the weight
        ll.attach(model, config("lora", target_names="proj"))
        with pytest.raises(ll.QuantizedWeightError, match="proj: no matrix stands for this layer"):
            ll.merge(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d_in", [1, 33, 3000])
def test_a_linear_layer_with_a_forward_of_its_own_is_one(d_in: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Own(lambda f, x: f(x).to(x.dtype))
    layer.weight, layer.in_features = nn.Parameter(torch.randn(32, d_in) * d_in**-0.5), d_in
    model = nn.ModuleDict({"proj": layer.to(dtype), "wrapped": nn.Linear(d_in, 8, dtype=dtype)})
    wrapped: Any = model["wrapped"]
    wrapped.forward = lambda x: type(wrapped).forward(wrapped, x)
    layer.requires_grad_(False)
    probe.check_gradients(model, dict(model.named_children()))
    for path, each in model.named_children():
        assert is_asked(layer_of(each))
        affine.check_affine(layer_of(each, path))


def test_a_wrong_gradient_is_found() -> None:
    model = nn.ModuleDict({"proj": Own(lambda f, x: f(x.detach() + (x - x.detach()) / 2))})
    with pytest.raises(
        ll.QuantizedWeightError, match=r"proj: adapters can't.*float32\): the gradient of its input is 50% off"
    ):
        ll.attach(model, config("lora", target_names="proj"))


def test_gradients_come_down_through_later_layers_that_are_no_targets() -> None:
    def model() -> Any:
        below, stop, above = nn.Linear(64, 64), Own(lambda f, x: f(x.detach())), nn.Linear(64, 64)
        return nn.ModuleDict({"below": below, "stop": stop, "above": above})

    with pytest.raises(ll.QuantizedWeightError, match="stop: adapters can't be trained through this layer"):
        ll.attach(model(), config("lora", target_names="below"))
    ll.attach(model(), config("lora", target_names="above"))


@pytest.mark.parametrize("change", [lambda f, x: (f(x), None), lambda f, x: f(x.unflatten(-2, (2, 7)))])
def test_what_gives_no_rows_may_train_but_its_weight_is_not_read(change: Any, log: list[str]) -> None:
    layer = Own(change)
    with pytest.raises(
        ll.QuantizedWeightError,
        match=r"proj: its own forward can't be run on rows, so it isn't known whether a matrix stands for.*\n  keep an",
    ):
        affine.check_affine(layer_of(layer, "proj"))
    probe.check_gradients(nn.ModuleDict({"proj": layer}), {"proj": layer})
    assert "WARNING it isn't known whether gradients pass proj: its forward can't be run on rows" in log


class Residual(nn.Linear):
    """It wants another argument."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) + residual


def test_a_forward_that_wants_other_arguments_trains_and_stays_attached(log: list[str]) -> None:
    model: Any = nn.ModuleDict({"proj": Residual(64, 64)})
    ll.attach(model, config("lora", target_names="proj"))
    assert any("WARNING it isn't known whether gradients pass proj" in line for line in log)
    for call in (ll.merge, lambda model: ll.attach(model, config("dora", target_names="proj"), "second")):
        with pytest.raises(
            ll.QuantizedWeightError, match=r"proj: its own forward .*: missing a required argument: 'res"
        ):
            call(model)


def rows_only(f: Any, x: torch.Tensor) -> torch.Tensor:
    n, _ = x.shape
    return f(int8(x)).view(n, -1)


def test_a_layer_of_rows_alone_is_found_too() -> None:
    model = nn.ModuleDict({"proj": Own(rows_only)})
    for call in (lambda: ll.attach(model, config("dora", target_names="proj")), lambda: ll.merge(model)):
        with pytest.raises(ll.QuantizedWeightError, match="proj: no matrix stands for this layer"):
            call()
        ll.adapters(model) or ll.attach(model, config("lora", target_names="proj"))
    stopped = nn.ModuleDict({"proj": Own(lambda f, x: rows_only(f, x.detach()))})
    with pytest.raises(ll.QuantizedWeightError, match="proj: adapters can't be trained through this layer"):
        ll.attach(stopped, config("lora", target_names="proj"))


def test_a_layer_before_the_first_target_may_run_after_it(log: list[str]) -> None:
    model = nn.ModuleDict({"head": Own(lambda f, x: f(x.detach())), "a": nn.Linear(64, 64)})
    ll.attach(model, config("lora", target_names="^a$"))
    warning = "WARNING gradients through head are wrong or stop: adapters on layers that run before it won't train"
    assert warning in log


def test_a_backward_that_fails_is_no_raw_error(log: list[str]) -> None:
    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            raise NotImplementedError("no backward")

    ll.attach(nn.ModuleDict({"proj": Own(lambda f, x: f(Refusing.apply(x)))}), config("lora", target_names="proj"))
    assert any("DEBUG proj: not probed: its backward fails: no backward" in line for line in log)


def test_a_probe_leaves_nothing_behind() -> None:
    layer = nn.Sequential(Own(lambda f, x: f(x)))[0].train()
    layer.inner = nn.Dropout(0.5).train()
    layer.change = lambda f, x: f(x) + 0 * torch.rand(())
    calls: list[Any] = []
    layer.register_forward_hook(lambda *_: calls.append(_))
    state, before = torch.random.get_rng_state(), set(vars(layer))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        affine.check_affine(layer_of(layer, ""))
        probe.check_gradients(layer, {"": layer})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert layer.training
    assert layer.inner.training
    assert not calls
    assert set(vars(layer)) == before
    assert layer.weight.grad is None
    assert layer.weight.requires_grad


def test_a_plan_on_the_meta_device_runs_nothing() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"proj": Own(lambda f, x: f(x.detach()))})
    assert len(ll.plan(model, config("lora", target_names="proj"))) == 1
