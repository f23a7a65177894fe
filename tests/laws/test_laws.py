"""Laws that hold for every registered variant. A new variant gets them all by registering, and owes an oracle."""

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    BUT_THREE,
    IDS,
    attach,
    config,
    covering,
    is_trained,
    one_layer,
    perturb,
    quantized_llama,
    tiny_llama,
    train,
)
from oracles import AT_SCALE, ORACLES
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import lora_lite as ll

VARIANTS = sorted(ll.REGISTRY)
per_variant = pytest.mark.parametrize("variant", VARIANTS)
per_attached = pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "history"])  # made of attached ones
per_identity = pytest.mark.parametrize("variant", [v for v in VARIANTS if ll.REGISTRY[v].has_identity_init])


def on_three(variant: str) -> Any:
    return config(variant, exclude_names=BUT_THREE)


def small(dtype: torch.dtype = torch.float32) -> Any:
    """One block: seven layers of four shapes. What goes by the depth of a layer is checked on two."""
    return tiny_llama(dtype, bias=True, num_hidden_layers=1)


def attached(variant: str, dtype: torch.dtype = torch.float32, *, moved: bool = True) -> tuple[Any, ll.Adapter]:
    model = small(dtype)
    adapter = attach(model, on_three(variant))
    if moved:
        perturb(adapter)
    return model, adapter


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=ids).logits
    return out


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that attach could leave behind."""
    return {
        "state": {key: (value.clone(), value.dtype) for key, value in model.state_dict().items()},
        "grad": {path: p.requires_grad for path, p in model.named_parameters()},
        "hooks": {
            path: (
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                len(m._forward_hooks_with_kwargs),
                sorted(m.__dict__),
            )
            for path, m in model.named_modules()
        },
    }


def same_snapshot(a: dict[str, Any], b: dict[str, Any]) -> bool:
    assert a["state"].keys() == b["state"].keys()
    assert all(
        torch.equal(a["state"][k][0], b["state"][k][0]) and a["state"][k][1] == b["state"][k][1] for k in a["state"]
    )
    assert a["grad"] == b["grad"]
    assert a["hooks"] == b["hooks"]
    return True


def test_every_variant_has_an_oracle() -> None:
    assert set(VARIANTS) == set(ORACLES)


def with_fields(*options: dict[str, Any]) -> list[Any]:
    """Each variant with each of these options whose fields it has."""
    return [
        pytest.param(variant, fields, id="-".join([variant, *fields]))
        for variant in VARIANTS
        for fields in options
        if fields.keys() <= ll.config_for(variant).__dataclass_fields__.keys()
    ]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("variant", "overrides"),
    [*with_fields({}, {"alpha": 3.0}, {"rslora": True}), ("lora", {"bias": True, "alpha": 3.0})],
)
def test_output_is_the_papers_formula(variant: str, bias: bool, overrides: dict[str, Any]) -> None:
    if variant == "bias" and not bias:
        pytest.skip("it goes on layers with a bias alone")
    model, x = one_layer(variant, bias, torch.float64)
    base = model(x)
    cfg = config(variant, target_names="proj", dtype=torch.float64, **overrides)
    adapter = attach(model, cfg)
    perturb(adapter, 0.3)
    tensors = {key.removeprefix("proj."): value.detach() for key, value in adapter.named_tensors()}
    b = getattr(model.proj, "bias", None)
    b = torch.zeros(24 if variant != "norm" else 16, dtype=torch.float64) if b is None else b
    wanted = ORACLES[variant](model.proj.weight, b, adapter.config, tensors, x)
    # DoRA's norm is formed in float32 whatever the dtype, so its last digits are float32's.
    torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(model(x), base, atol=1e-3)


@per_identity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_is_the_identity_bit_for_bit(variant: str, dtype: torch.dtype) -> None:
    model = small(dtype)
    base = logits(model)
    attach(model, on_three(variant))
    assert torch.equal(logits(model), base)


@per_variant
def test_the_base_is_read_only(variant: str) -> None:
    model = tiny_llama(bias=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    versions = {path: p._version for path, p in model.named_parameters()}
    adapter = attach(model, on_three(variant))
    train(model, adapter)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {
        path: p._version for path, p in model.named_parameters() if path in versions
    } == versions  # not even written


@per_variant
@pytest.mark.parametrize("trained", [False, True])
def test_detach_restores_everything(variant: str, trained: bool) -> None:
    model = small()
    model.model.embed_tokens.weight.requires_grad_(False)  # a flag of the user's own
    before, base = snapshot(model), logits(model)
    adapter = attach(model, on_three(variant))
    if trained:
        perturb(adapter)
        train(model, adapter, 1)
        assert not torch.equal(logits(model), base)
    ll.detach(model)
    assert same_snapshot(before, snapshot(model))
    assert torch.equal(logits(model), base)


@per_attached
def test_a_failure_in_the_middle_of_attach_changes_nothing(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    before, base, calls = snapshot(model), logits(model), []
    last = min(5, len(ll.plan(model, on_three(variant))))

    def init(layer: ll.Layer, cfg: Any) -> None:
        calls.append(layer.path)
        if len(calls) == last:
            raise ZeroDivisionError("in the fifth layer")

    monkeypatch.setattr(ll.REGISTRY[variant], "init", staticmethod(init))
    with pytest.raises(ZeroDivisionError, match="fifth"):
        attach(model, on_three(variant))
    assert same_snapshot(before, snapshot(model))
    assert torch.equal(logits(model), base)


@per_variant
def test_only_adapter_parameters_get_gradients_and_each_moves(variant: str) -> None:
    model = small()
    adapter = attach(model, on_three(variant))
    start = [p.detach().clone() for p in adapter.parameters()]
    train(model, adapter)  # two steps: LoRA's A has a zero gradient in the first
    assert {path for path, p in model.named_parameters() if p.requires_grad} == {
        path for path, _ in model.named_parameters() if "lora_" in path
    }
    assert all(p.grad is None for path, p in model.named_parameters() if "lora_" not in path)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert not any(torch.equal(p, before) for p, before in zip(adapter.parameters(), start, strict=True))


@per_variant
@pytest.mark.parametrize("name", ["default", "fr"])
def test_save_and_load_are_bit_equal_and_run_no_init(
    variant: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(bias=True)
    perturb(attach(model, on_three(variant), name=name))
    ll.save(model, tmp_path / "a.safetensors", name=name)
    wanted, tensors = logits(model), ll.adapters(model)[name].state_dict()
    assert all(".lora_" in f".{key}" and not key.endswith("__fr") for key in tensors)

    def forbidden(*_: Any) -> None:
        raise AssertionError("load ran an init")

    for function in ("init", "group_init"):
        monkeypatch.setattr(ll.REGISTRY[variant], function, staticmethod(forbidden))
    fill = ll.ParamSpec.fill  # of what the file leaves out, as the config alone says what it is
    monkeypatch.setattr(ll.ParamSpec, "fill", lambda spec, t: forbidden() if spec.saved == "always" else fill(spec, t))
    monkeypatch.setattr(torch.linalg, "svd", forbidden)
    fresh = tiny_llama(bias=True)
    adapter = ll.load(fresh, tmp_path / "a.safetensors", name="other")
    assert torch.equal(logits(fresh), wanted)
    assert adapter.config == ll.adapters(model)[name].config
    loaded = adapter.state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) and loaded[key].dtype == tensors[key].dtype for key in tensors)


@per_variant
def test_an_adapter_that_was_cast_is_saved_as_it_is(variant: str, tmp_path: Path) -> None:
    model, _ = attached(variant)
    model.to(torch.bfloat16)
    ll.save(model, tmp_path / "a.safetensors")
    fresh = small().to(torch.bfloat16)
    ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh), logits(model))


@per_identity
def test_to_dtype_keeps_a_fresh_adapter_the_identity(variant: str) -> None:
    model, _ = attached(variant, moved=False)
    model.to(torch.bfloat16)
    with_adapter = logits(model)
    ll.detach(model)
    assert torch.equal(with_adapter, logits(model))


@per_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_bases_keep_their_dtype_and_float32_masters(variant: str, dtype: torch.dtype) -> None:
    exact, exact_adapter = attached(variant)
    model = small().to(dtype)
    adapter = attach(model, on_three(variant))
    adapter.load_state_dict(exact_adapter.state_dict())
    assert {t.dtype for _, t in adapter.named_tensors() if t.is_floating_point()} == {torch.float32}
    assert logits(model).dtype == dtype
    with torch.no_grad():
        error = logits(model).float() - logits(exact)
    assert error.norm() < 0.03 * logits(exact).norm()
    train(model, adapter, 1)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


@per_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_trained_change_survives_low_precision(variant: str, dtype: torch.dtype) -> None:
    """The change of the layer as a linear map, from 8192 rounded outputs: where the maths rounds before it subtracts,
    the error is the same for all of them and stays."""
    if variant == "tokens":
        pytest.skip("a token's row is rounded alike each time")
    layer, x = one_layer(variant, dtype=dtype, rows=8192)
    exact, _ = one_layer(variant, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    cfg = config(variant, target_names="proj")
    adapter, reference = attach(layer, cfg), attach(exact, cfg)
    start = {key: value.clone() for key, value in adapter.state_dict().items()}
    factors = "proj.lora_B" in start
    for key in {"proj.lora_B", "proj.lora_E"} & start.keys():
        if not start[key].any():
            start[key].normal_()  # or a small change of A would be none
    adapter.load_state_dict(start)
    perturb(adapter, 3e-3 if factors else 5e-2)
    reference.load_state_dict(adapter.state_dict())

    @torch.no_grad()
    def change(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = model(x).double()
        rows = x.double()  # (8192, 16)
        rows = nn.functional.layer_norm(rows, (16,))[:, :-1] if variant == "norm" else rows  # of 0 in all
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
        with ll.disabled(model):
            return torch.linalg.lstsq(rows, y - model(x).double()).solution

    got, wanted = change(layer, x), change(exact, x.double())
    assert (got - wanted).norm() < (0.1 if factors else 0.02) * wanted.norm()


@per_identity
def test_a_cast_of_parameters_without_buffers_keeps_a_fresh_adapter_the_identity(variant: str) -> None:
    """As mixed precision under FSDP2 does it."""
    model, adapter = attached(variant, moved=False)
    base = logits(small())
    for parameter in adapter.parameters():
        parameter.data = parameter.data.bfloat16()
    assert torch.equal(logits(model), base)


@per_variant
def test_scale_zero_is_the_base_and_one_the_method(variant: str) -> None:
    base = logits(small())
    model, adapter = attached(variant)
    full, values = logits(model), {key: value.clone() for key, value in adapter.state_dict().items()}
    nans = {k: torch.full_like(v, float("nan")) if v.is_floating_point() else v for k, v in values.items()}
    adapter.load_state_dict(nans)
    with ll.scaled(model, 0.0):  # skipped, so not even a NaN gets through
        assert torch.equal(logits(model), base)
    with ll.disabled(model):
        assert torch.equal(logits(model), base)
    adapter.load_state_dict(values)
    assert adapter.scale == 1.0
    assert torch.equal(logits(model), full)


@per_variant
@pytest.mark.parametrize("c", [-1.0, 0.5, 2.0])
def test_scale_c_blends_base_and_method_at_each_layer(variant: str, c: float) -> None:
    """Or is what the method's formula makes of c, which its oracle then knows."""
    model, x = one_layer(variant)
    base = model(x)
    adapter = attach(model, config(variant, target_names="proj"))
    perturb(adapter, 0.3)
    full = model(x)
    adapter.scale = c
    wanted = base + c * (full - base)
    if variant in AT_SCALE:
        tensors = {key.removeprefix("proj."): value for key, value in adapter.state_dict().items()}
        wanted = AT_SCALE[variant](model.proj.weight, model.proj.bias, adapter.config, tensors, x, c)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


@per_variant
def test_deepcopy_and_pickle_are_independent_copies(variant: str) -> None:
    model, adapter = attached(variant)
    wanted = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), wanted)
        perturb(ll.adapters(twin)["default"], 1.0)
        ll.adapters(twin)["default"].scale = 0.5
        assert adapter.scale == 1.0
        assert torch.equal(logits(model), wanted)
        ll.detach(twin)
        assert torch.equal(logits(twin), logits(small()))
        assert torch.equal(logits(model), wanted)


@per_variant
def test_functional_call_uses_the_given_tensors(variant: str) -> None:
    model, _ = attached(variant, moved=False)
    before = logits(model)
    twin, _ = attached(variant)
    given = {path: p for path, p in twin.named_parameters() if "lora_" in path}
    with torch.no_grad():
        out = torch.func.functional_call(model, given, (), {"input_ids": IDS}).logits
    assert torch.equal(out, logits(twin))
    assert torch.equal(logits(model), before)


@per_variant
def test_layers_may_be_called_by_keyword(variant: str) -> None:
    model, x = one_layer(variant)
    layer = model.proj  # as the whole model: what acts at positions wants its calls
    base = layer(x)
    perturb(attach(layer, config(variant, target_names="^$")), 0.3)
    assert torch.equal(layer(input=x), layer(x))
    assert not torch.equal(layer(x), base)


@per_variant
def test_a_layer_may_be_called_without_rows(variant: str) -> None:
    """As an expert that is a module of its own, in a batch that sends it no token."""
    model, x = one_layer(variant)
    adapter = attach(model, config(variant, target_names="proj"))
    for training in (True, False):
        model.train(training)
        assert model(x[:0]).shape == (0, *model(x).shape[1:])
    if is_trained(variant):
        model.train()(x[:0]).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in adapter.parameters())


@per_variant
def test_a_bare_layer_can_be_the_model(variant: str, tmp_path: Path) -> None:
    (model, x), twin = one_layer(variant), one_layer(variant)[0].proj
    layer = model.proj
    twin.load_state_dict(layer.state_dict())
    perturb(attach(layer, config(variant, target_names="^$")))
    ll.save(layer, tmp_path / "a.safetensors")
    ll.load(twin, tmp_path / "a.safetensors")
    assert torch.equal(twin(x), layer(x))


@per_variant
def test_eval_outputs_follow_every_way_to_change_a_parameter(variant: str) -> None:
    """Whatever is cached in eval mode must never be stale."""
    model, x = one_layer(variant)
    adapter = attach(model.eval(), config(variant, target_names="proj"))
    perturb(adapter)

    @torch.no_grad()
    def outputs(model: nn.Module) -> torch.Tensor:
        y: torch.Tensor = model(x)
        return y

    def uncached() -> torch.Tensor:
        return outputs(copy.deepcopy(model))  # a copy starts without a memo

    moved, before = False, outputs(model)

    def in_place(tensor: torch.Tensor) -> None:
        with torch.no_grad():
            tensor.mul_(0.98)

    def through_data(tensor: torch.Tensor) -> None:
        tensor.data.mul_(0.98)  # bumps no version counter

    def other_memory(tensor: torch.Tensor) -> None:
        tensor.data = tensor.data * 0.98

    for change in (in_place, through_data, other_memory):
        for _, tensor in adapter.named_tensors():
            if not tensor.is_floating_point():
                continue
            change(tensor)
            now = outputs(model)  # right after the logits before it, so with all that those have left
            assert torch.equal(now, uncached())
            moved, before = moved or not torch.equal(now, before), now
    assert moved
    smaller = {key: value * 0.9 if value.is_floating_point() else value for key, value in adapter.state_dict().items()}
    adapter.load_state_dict(smaller)
    assert torch.equal(outputs(model), uncached())


@per_variant
def test_function_transforms_and_inference_mode_mix_with_what_is_remembered(variant: str) -> None:
    """Neither may leave a tensor behind that a later forward can't use."""
    model, adapter = attached(variant)
    wanted = logits(model)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, wanted)
    everything = itertools.chain(model.named_parameters(), model.named_buffers())
    given = {p: tensor.detach() for p, tensor in everything if "lora_" in p and tensor.is_floating_point()}

    def loss(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        out = torch.func.functional_call(model, tensors, (), {"input_ids": IDS}).logits
        return out.square().mean()

    grads = torch.func.grad(loss)(given)
    assert torch.equal(logits(model), wanted)
    if list(adapter.parameters()):
        model(input_ids=IDS).logits.square().mean().backward()
    for path, parameter in model.named_parameters():
        if path in given:
            torch.testing.assert_close(parameter.grad, grads[path], rtol=1e-4, atol=1e-7)
    assert adapter.scale == 1.0

    # Forward mode: the same derivative along v, at a point of which nothing is remembered yet, and nothing is after it.
    there = {path: 1.1 * tensor for path, tensor in given.items()}
    v = {path: torch.randn_like(tensor) for path, tensor in there.items()}
    along = sum((grad * v[path]).sum() for path, grad in torch.func.grad(loss)(there).items())
    for enabled in (True, False):
        with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(enabled):
            torch.testing.assert_close(torch.func.jvp(loss, (there,), (v,))[1], along, rtol=1e-3, atol=1e-6)
            with forward_ad.dual_level():
                duals = {path: forward_ad.make_dual(there[path], v[path]) for path in there}
                torch.testing.assert_close(forward_ad.unpack_dual(loss(duals)).tangent, along, rtol=1e-3, atol=1e-6)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        torch.testing.assert_close(loss(there), torch.func.jvp(loss, (there,), (v,))[0])
    assert torch.equal(logits(model), wanted)


ON_QUANTISED = [(v, q) for v in VARIANTS for q in ("nf4", "int8")] + [(v, "fp4") for v in covering()]
"""To us fp4 is nf4 but for the table of its values, so of the methods some go through it, of each mechanism one."""


@pytest.mark.parametrize(("variant", "quantization"), ON_QUANTISED)
def test_quantised_bases_are_right_or_refused(variant: str, quantization: str, tmp_path: Path) -> None:
    model = quantized_llama(quantization)
    base = logits(model)
    if ll.REGISTRY[variant].base_weight == "dense":
        before = sorted(model.state_dict())
        with pytest.raises(ll.QuantizedWeightError, match=r"needs a dense weight, and this one is .*bitsandbytes"):
            attach(model, on_three(variant))
        assert sorted(model.state_dict()) == before
        return
    adapter = attach(model, on_three(variant))
    assert torch.equal(logits(model), base) == ll.REGISTRY[variant].has_identity_init
    start = [p.detach().clone() for p in adapter.parameters()]
    model.train()
    train(model, adapter)
    assert not any(torch.equal(p, before) for p, before in zip(adapter.parameters(), start, strict=True))
    model.eval()
    trained = logits(model)
    assert not torch.equal(trained, base)
    ll.save(model, tmp_path / "a.safetensors")
    fresh = quantized_llama(quantization)
    ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh), trained)
    ll.detach(model)
    assert torch.equal(logits(model), base)
