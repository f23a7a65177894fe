"""Experts' matrices that bitsandbytes keeps in 4 bits by a parametrisation: the dequantised numbers are the weight."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from models import gradients_of, moe, perturb
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import lora_lite as ll

bitsandbytes = pytest.importorskip("bitsandbytes.nn.parametrize")

IDS = torch.arange(1, 13).reshape(2, 6)
EXPERTS = ll.LoRAConfig(r=2, kinds=["experts"])
NAMES = ("gate_up_proj", "down_proj")
spread = partial(perturb, size=0.2)


def plain(name: str) -> nn.Module:
    model = moe(name, **({"intermediate_size": 64} if name == "mixtral" else {})).requires_grad_(False)
    model.set_experts_implementation("eager")
    return model


def packed(name: str = "mixtral", quant_type: str = "nf4", nested: bool = True) -> nn.Module:
    return quantised(plain(name), quant_type, nested)


def quantised(model: nn.Module, quant_type: str, nested: bool) -> nn.Module:
    for experts in experts_of(model).values():
        for parameter in NAMES:
            bitsandbytes.replace_parameter_4bit(experts, parameter, nested, quant_type)
    return model


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if path.endswith(".experts")}


def dequantised(model: nn.Module) -> dict[str, Tensor]:
    """The experts' matrices, by the paths that a dense model has them at."""
    return {f"{path}.{name}": getattr(m, name) for path, m in experts_of(model).items() for name in NAMES}


def dense(model: nn.Module, name: str = "mixtral") -> nn.Module:
    """A model of that kind with the numbers of this one as parameters."""
    twin = plain(name)
    with torch.no_grad():
        for path, tensor in dequantised(model).items():
            twin.get_parameter(path).copy_(tensor)
    return twin


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


CASES = [("mixtral", "nf4", True), ("mixtral", "fp4", False), ("qwen3", "nf4", False), ("gpt_oss", "fp4", True)]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize(("name", "quant_type", "nested"), CASES)
def test_outputs_and_gradients_are_those_of_the_dense_formula(
    name: str, quant_type: str, nested: bool, implementation: str
) -> None:
    """Against W + s B A on the dequantised W, in float64."""
    model = packed(name, quant_type, nested)
    oracle = dense(model, name).double()
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        before = logits(model)
        adapter = ll.attach(model, EXPERTS)
        assert torch.equal(logits(model), before)
    spread(adapter)
    factors = {key: t.detach().double().requires_grad_() for key, t in adapter.state_dict().items()}
    weights = {}
    for path in adapter.targets:
        delta = adapter.config.scaling * factors[f"{path}.lora_B"] @ factors[f"{path}.lora_A"]  # (e, o, i)
        plain = oracle.get_parameter(path)
        weights[path] = plain + (delta.mT if name == "gpt_oss" else delta)
    wanted = functional_call(oracle, weights, kwargs={"input_ids": IDS}).logits
    got = logits(model)
    assert (got - before).abs().max() > 0.1
    torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=1e-4)
    direction = torch.randn_like(got)
    got.backward(direction)
    wanted.backward(direction.double())
    for key, tensor in adapter.named_tensors():
        torch.testing.assert_close(tensor.grad.double(), factors[key].grad, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        ll.detach(model)
        assert torch.equal(logits(model), before)


def test_the_plan_is_that_of_the_dense_model() -> None:
    model, twin = packed(), dense(packed())
    for cfg in (ll.LoRAConfig(), EXPERTS, ll.AbliterationConfig(), ll.SteerConfig(), ll.IA3FFConfig()):
        plan, wanted = ll.plan(model, cfg), ll.plan(twin, cfg)
        assert [(t.path, t.d_in, t.d_out, t.experts) for t in plan] == [
            (t.path, t.d_in, t.d_out, t.experts) for t in wanted
        ]
        assert plan.unadapted == wanted.unadapted
    assert {t.kind for t in ll.plan(model, EXPERTS)} == {"nf4, 4-bit bitsandbytes"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_under_checkpointing(reentrant: bool) -> None:
    gradients = []
    for each in (None, reentrant):
        gradients.append(gradients_of(packed(), EXPERTS, IDS, each))
        assert not parametrize._cache_enabled
        assert not parametrize._cache
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


def test_each_call_dequantises_once_with_an_adapter_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    decode = bitsandbytes.Bnb4bitParametrization.forward
    monkeypatch.setattr(
        bitsandbytes.Bnb4bitParametrization, "forward", lambda self, codes: calls.append(1) or decode(self, codes)
    )
    model = packed()
    logits(model)
    without = len(calls)
    spread(ll.attach(model, EXPERTS))
    ll.attach(model, EXPERTS, "second")
    calls.clear()
    logits(model)
    assert len(calls) == without == 4


def test_values_that_torch_has_cached_dont_hide_an_adapter() -> None:
    """`parametrize.cached` keeps what a parametrisation gave: the plain weight, or one that knows its adapters."""
    model = packed()
    before = logits(model)
    spread(ll.attach(model, EXPERTS))
    attached = logits(model)
    assert not torch.equal(attached, before)
    with parametrize.cached():
        weight = experts_of(model)["model.layers.0.mlp.experts"].down_proj
        assert torch.equal(logits(model), attached)
        assert type(weight) is type(experts_of(model)["model.layers.0.mlp.experts"].down_proj) is Tensor
        with ll.disabled(model):
            assert torch.equal(logits(model), before)
        assert torch.equal(logits(model), attached)


def test_a_forward_that_fails_leaves_the_parametrisation_in_its_place() -> None:
    model = packed()
    weights = dequantised(model)
    spread(ll.attach(model, EXPERTS))
    for experts in experts_of(model).values():
        with pytest.raises(TypeError):
            experts(None)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in dequantised(model).items())


def test_copies_scales_and_two_adapters_on_one_weight() -> None:
    model = packed()
    before, keys = logits(model), list(model.state_dict())
    spread(ll.attach(model, EXPERTS))
    one = logits(model)
    spread(ll.attach(model, ll.IA3Config(kinds=["experts"], target_names=["gate_up_proj$"]), "second"))
    two = logits(model)
    assert not torch.equal(one, before)
    assert not torch.equal(one, two)
    twin = copy.deepcopy(model)
    with ll.scaled(model, 0.0):
        assert torch.equal(logits(model), before)
        assert torch.equal(logits(twin), two)
    ll.detach(model)
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(twin), two)
    assert list(model.state_dict()) == keys
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    assert sum(hooks) == 2 * 2 * 2  # bitsandbytes' own: two for each parameter


# ---- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [EXPERTS, ll.DoRAConfig(r=2, kinds=["experts"])], ids=["lora", "dora"])
def test_a_file_is_read_bit_equal(cfg, tmp_path: Path) -> None:
    model = packed()
    adapter = ll.attach(model, cfg)
    spread(adapter, size=0.02)
    audit = ll.audit(model, {"input_ids": IDS})
    assert all(layer.ran for layer in audit.layers)
    assert len(audit.layers) == 4
    attached = logits(model)
    ll.save(model, tmp_path / "a.safetensors")
    fresh = packed()
    ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh), attached)
    record = adapter.base["quantization"]
    assert (record["method"], record["quant_type"], record["double_quant"]) == ("bitsandbytes-4bit", "nf4", True)
    assert record["modules"] == sorted(adapter.targets)
    for other in (dense(packed()), packed(quant_type="fp4"), packed(nested=False)):
        if cfg is EXPERTS:
            ll.load(other, tmp_path / "a.safetensors")  # with a warning: it never reads the weight
        else:
            with pytest.raises(ll.CheckpointError, match="was trained on another base than this one"):
                ll.load(other, tmp_path / "a.safetensors")


def test_experts_and_linear_layers_of_bitsandbytes_are_one_record() -> None:
    model = packed()
    attention = model.model.layers[0].self_attn
    linear = bitsandbytes_linear(attention.q_proj)
    attention.q_proj = linear
    record = ll.attach(model, EXPERTS).base["quantization"]
    assert "model.layers.0.self_attn.q_proj" in record["modules"]
    assert len(record["modules"]) == 5


def bitsandbytes_linear(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    new = Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
    new.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=new)
    return new.to("cpu")


# ---- methods that read the weight, and merging -----------------------------------------------------------


METHODS = {
    "lora": EXPERTS,
    "dora": ll.DoRAConfig(r=2, kinds=["experts"]),
    "ia3": ll.IA3Config(kinds=["experts"], target_names=["."]),
}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("method", METHODS)
def test_merged_into_dense_numbers_it_is_as_attached(method: str, name: str) -> None:
    model = packed(name)
    before, state = logits(model), model.state_dict()
    adapter = ll.attach(model, METHODS[method])
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    spread(adapter, size=0.1)
    attached = logits(model)
    with pytest.raises(ll.QuantizedWeightError, match=r'nf4, 4-bit bitsandbytes, which can.t hold .*\n.*"requantize"'):
        ll.merge(model)
    ll.merge(model, quantized="dequantize")
    merged = copy.deepcopy(model)
    torch.testing.assert_close(logits(model), attached, atol=1e-4, rtol=1e-4)
    for twin in (merged, model):  # the copy first: they share the parametrised class
        ll.unmerge(twin)
        assert torch.equal(logits(twin), attached)
    ll.detach(model)
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())


def test_merged_for_good_it_is_a_plain_model_and_copies_are_as_they_were() -> None:
    model = packed()
    spread(ll.attach(model, EXPERTS), size=0.1)
    attached, twin = logits(model), copy.deepcopy(model)
    ll.merge(model, quantized="dequantize", keep=False)
    torch.testing.assert_close(logits(model), attached, atol=1e-4, rtol=1e-4)
    assert set(model.state_dict()) == set(dense(packed()).state_dict())
    experts = experts_of(model)["model.layers.0.mlp.experts"]
    assert type(experts).__name__ == "MixtralExperts"
    assert type(experts.down_proj) is nn.Parameter
    assert torch.equal(logits(twin), attached)
    torch.testing.assert_close(logits(copy.deepcopy(model)), attached, atol=1e-4, rtol=1e-4)
    # Of one of the parameters alone, the other stays as it was.
    part = packed()
    spread(ll.attach(part, ll.LoRAConfig(r=2, kinds=["experts"], target_names=["down_proj$"])), size=0.1)
    attached = logits(part)
    ll.merge(part, quantized="dequantize", keep=False)
    torch.testing.assert_close(logits(part), attached, atol=1e-4, rtol=1e-4)
    assert list(experts_of(part)["model.layers.0.mlp.experts"].parametrizations) == ["gate_up_proj"]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantised_again_it_has_the_codes_that_bitsandbytes_makes(quant_type: str) -> None:
    model = packed(quant_type=quant_type)
    wanted = dense(model)
    adapter = ll.attach(model, EXPERTS)
    spread(adapter, size=0.1)
    attached = logits(model)
    spread(twin := ll.attach(wanted, EXPERTS), size=0.1)
    twin.load_state_dict(adapter.state_dict())
    ll.merge(wanted, keep=False)
    quantised(wanted, quant_type, True)
    ll.merge(model, quantized="requantize")
    torch.testing.assert_close(logits(model), logits(wanted), atol=1e-5, rtol=1e-5)
    codes = model.state_dict()
    assert all(torch.equal(codes[key], tensor) for key, tensor in wanted.state_dict().items() if "experts" in key)
    ll.unmerge(model)
    assert torch.equal(logits(model), attached)
    ll.merge(model, quantized="requantize", keep=False)
    torch.testing.assert_close(logits(model), logits(wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["none", "pre", "full", "column"])
def test_ablation_is_exact_on_the_numbers_that_the_experts_compute_with(mode: str) -> None:
    model = packed()
    twin = dense(model)
    cfg = ll.AbliterationConfig(normalization=mode)
    data = {"directions": {t.path: torch.randn(t.d_out) for t in ll.plan(model, cfg)}}
    for either in (model, twin):
        ll.attach(either, cfg, calibration_data=data)
    torch.testing.assert_close(logits(model), logits(twin))
    attached = logits(model)
    ll.merge(model, quantized="dequantize")
    torch.testing.assert_close(logits(model), attached, atol=1e-4, rtol=1e-4)


def test_what_needs_a_dense_weight_is_refused() -> None:
    with pytest.raises(
        ll.QuantizedWeightError, match=r"gate_up_proj: 'pissa' needs a dense weight, and this one is nf4"
    ):
        ll.attach(packed(), ll.PiSSAConfig(r=2, kinds=["experts"]))


SHAPES = [(4, 96, 64), (4, 64, 48), (3, 20, 24), (3, 5, 128), (64, 48)]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_expert_is_dequantised_as_in_the_whole(shape: tuple[int, ...], nested: bool) -> None:
    """Also where rows are no whole number of blocks, which bitsandbytes 0.50 misreads on a CPU: that is the weight."""
    torch.manual_seed(0)
    category = "experts" if len(shape) == 3 else "matrix"

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bare = nn.Parameter(torch.randn(shape), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.bare.mT

    model = nn.Sequential(Holder())
    bitsandbytes.replace_parameter_4bit(model[0], "bare", nested)
    adapter = ll.attach(model, ll.DoRAConfig(r=1, kinds=[category], target_names=["bare"]))
    whole = model[0].bare
    for view, matrix in zip(adapter.views().values(), whole if len(shape) == 3 else [whole], strict=True):
        assert torch.equal(view.dense_weight(), matrix)
        x = torch.randn(2, shape[-1])
        torch.testing.assert_close(view.linear(x), x @ matrix.mT)
    x = torch.randn(*shape[:-2], 2, shape[-1])
    spread(adapter)
    attached = model(x)
    ll.merge(model, quantized="dequantize")
    torch.testing.assert_close(model(x), attached, atol=1e-5, rtol=1e-5)
