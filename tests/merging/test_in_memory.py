"""Merging in memory: merged equals attached for every method, unmerge gives the bits back, and what can't be raises."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BUT_THREE, IDS, OneLinear, acts_everywhere, attach, config, moe, perturb, quantized, tiny_llama
from test_laws import logits, same_snapshot, snapshot
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import lora_lite as ll
from lora_lite.base.layer import find_layers, layer_of, quantization_of
from lora_lite.core.effective import Affine
from lora_lite.core.swap import Swap

MODES = [{"variant": name} for name in sorted(ll.REGISTRY) if acts_everywhere(name)]
MODES += [{"variant": "abliteration", "normalization": mode} for mode in ("pre", "full", "column")]
MODES += [{"variant": "abliteration", "rank": 2}, {"variant": "lora", "rslora": True, "r": 3}]
MODES += [
    {"variant": "ssteer", "r": 5},
    {"variant": "antipasto", "rotate": "U", "r": 7},
    {"variant": "antipasto", "rotate": "none"},
]


def named(mode: dict[str, Any]) -> str:
    return "-".join(str(value) for value in mode.values())


def adapted(model: Any, mode: dict[str, Any], name: str = "default", **more: Any) -> ll.Adapter:
    """With random values; of a trainable method away from its start."""
    if mode["variant"] == "abliteration":
        more = {"target_roles": ("writer",), "target_names": ()} | more
    torch.manual_seed(1)
    adapter = attach(model, config(**mode, **more), name)
    perturb(adapter)
    return adapter


@pytest.mark.parametrize("mode", MODES, ids=named)
@pytest.mark.parametrize("bias", [False, True])
def test_merged_equals_attached_for_every_method(mode: dict[str, Any], bias: bool) -> None:
    if mode["variant"] == "bias" and not bias:
        pytest.skip("it goes on layers with a bias alone")
    model = tiny_llama(torch.float64, bias=bias, num_hidden_layers=1)
    base = snapshot(model)
    adapter = adapted(model, mode, dtype=torch.float64, exclude_names=BUT_THREE)
    adapter.scale = 0.7
    attached = logits(model)
    ll.merge(model)
    torch.testing.assert_close(logits(model), attached, rtol=1e-10, atol=1e-11)
    ll.unmerge(model)
    assert torch.equal(logits(model), attached)
    ll.detach(model)
    same_snapshot(snapshot(model), base)


@pytest.mark.parametrize("mode", MODES, ids=named)
def test_merged_in_bfloat16_is_one_rounding_from_the_exact_sum(mode: dict[str, Any]) -> None:
    model = tiny_llama(torch.bfloat16, bias=mode["variant"] == "bias", num_hidden_layers=1)
    adapted(model, mode, exclude_names=BUT_THREE)
    exact = copy.deepcopy(model).double()
    ll.merge(model)
    ll.merge(exact)
    for ours, wanted in zip(model.parameters(), exact.parameters(), strict=True):
        if ours.dtype == torch.bfloat16 and ours.ndim == 2:
            error = (ours.double() - wanted).abs()
            assert (error <= 2.0**-8 * wanted.abs() + 1e-6).all()


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("normalization", list(ll.Normalization))
def test_fused_experts_merge_with_their_biases(name: str, normalization: ll.Normalization) -> None:
    model = moe(name, torch.float64, experts_implementation="eager")
    before = snapshot(model)
    cfg = ll.AbliterationConfig(normalization=normalization, dtype=torch.float64, strength=0.6)
    attach(model, cfg)
    attached = logits(model)
    ll.merge(model)
    torch.testing.assert_close(logits(model), attached, rtol=1e-10, atol=1e-11)
    ll.unmerge(model)
    assert torch.equal(logits(model), attached)
    ll.detach(model)
    same_snapshot(snapshot(model), before)


def test_stacked_adapters_merge_together_and_one_alone_where_they_commute() -> None:
    model = tiny_llama(torch.float64)
    for name, variant in (("a", "lora"), ("b", "ia3"), ("c", "lora"), ("d", "ia3_ff"), ("e", "dora")):
        adapted(model, {"variant": variant}, name, dtype=torch.float64)
    attached = logits(model)
    ll.merge(model)
    torch.testing.assert_close(logits(model), attached, rtol=1e-10, atol=1e-11)
    ll.unmerge(model)
    for name, error in (
        ("c", "a, b, d, e would act differently on a weight with c merged"),
        ("a", "b, c, d, e would act"),
    ):
        with pytest.raises(ll.TargetError, match=error):
            ll.merge(model, name)
    assert torch.equal(logits(model), attached)


def test_one_of_two_loras_merges_while_the_other_trains_on() -> None:
    model = tiny_llama(torch.float64)
    adapted(model, {"variant": "lora"}, "a", dtype=torch.float64)
    b = adapted(model, {"variant": "lora"}, "b", dtype=torch.float64)
    attached = logits(model)
    ll.merge(model, "a")
    torch.testing.assert_close(logits(model), attached, rtol=1e-10, atol=1e-11)
    b.scale = 0.0
    assert not torch.allclose(logits(model), attached)
    with pytest.raises(ll.TargetError, match="can't change the scale: a is merged"):
        ll.adapters(model)["a"].scale = 0.0
    ll.unmerge(model)
    b.scale = 1.0
    assert torch.equal(logits(model), attached)


def test_a_hundred_cycles_leave_every_bit() -> None:
    model = tiny_llama(torch.bfloat16, bias=True)
    adapted(model, {"variant": "dora"}, target_names="down_proj")
    before, attached = {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
    for _ in range(100):
        ll.merge(model)
        ll.unmerge(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model), attached)


def test_for_good_leaves_a_plain_model_with_the_flags_it_had() -> None:
    model = tiny_llama(torch.float64)
    keys = set(model.state_dict())
    parameters = {id(p) for p in model.parameters()}
    adapted(model, {"variant": "lora"}, dtype=torch.float64)
    attached = logits(model)
    ll.merge(model, keep=False)
    torch.testing.assert_close(logits(model), attached, rtol=1e-10, atol=1e-11)
    assert set(model.state_dict()) == keys
    assert {id(p) for p in model.parameters()} == parameters
    assert all(p.requires_grad for p in model.parameters())
    assert not ll.adapters(model)
    with pytest.raises(ll.TargetError, match=r"nothing is merged into this LlamaForCausalLM\n.*load the base again"):
        ll.unmerge(model)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("variant", ["lora", "dora", "ia3", "ia3_ff", "abliteration"])
def test_a_quantised_layer_becomes_a_dense_one_with_the_sum(tiny: str, quantization: str, variant: str) -> None:
    model = quantized(tiny, quantization)
    adapted(model, {"variant": variant})
    adapter = ll.adapters(model)["default"]
    wanted = {}
    for site in adapter.sites():
        module = site.module
        fold = Affine([site], torch.float32, torch.device("cpu"))
        weight = layer_of(module, site.path).dense_weight()
        wanted[site.path] = torch.cat([columns for *_, columns in fold.columns(weight)], 1).bfloat16()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attached = logits(model)
    ll.merge(model, quantized="dequantize")
    for path, weight in wanted.items():
        layer = model.get_submodule(path)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, weight)
    if quantization != "int8":  # whose kernel rounds its input, and the dense layer doesn't
        torch.testing.assert_close(logits(model), attached, rtol=0.05, atol=0.05)
    ll.unmerge(model)
    assert torch.equal(logits(model), attached)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_4_bit_model_of_any_dtypes_runs_merged_and_gives_what_it_gave(
    quantization: str, dtype: torch.dtype, compute: torch.dtype, tiny: str
) -> None:
    model = ll.load_base(tiny, dtype, quantization, compute_dtype=compute)
    adapted(model, {"variant": "lora"})
    layer: Any = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 5, layer.in_features, dtype=dtype)
    attached, there = logits(model), layer(x)
    ll.merge(model, quantized="dequantize")
    assert {p.dtype for p in model.parameters()} == {dtype}
    exact = dtype == compute == torch.float32
    with torch.no_grad():
        ours = model.model.layers[0].mlp.up_proj(x)
    assert (ours - there).norm() < (1e-6 if exact else 0.01) * there.norm()
    assert (logits(model) - attached).norm() < (1e-5 if exact else 0.03) * attached.norm()
    ll.unmerge(model)
    assert torch.equal(logits(model), attached)


def test_a_float32_norm_in_front_says_nothing_of_the_dtype(tiny: str) -> None:
    """The model's first parameter is in float32, its activations are in bfloat16."""

    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner = torch.nn.LayerNorm(128), ll.load_base(tiny, torch.bfloat16, "nf4")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inner.model.layers[0].mlp(self.norm(x).bfloat16())
            out: torch.Tensor = self.inner.lm_head(h)
            return out

    model, x = Normed(), torch.randn(3, 128)
    perturb(ll.attach(model, config("lora", target_names=r"layers\.0\.mlp\.\w+_proj")))
    attached = model(x)
    ll.merge(model, quantized="dequantize")
    assert (model(x) - attached).norm() < 0.02 * attached.norm()


def test_a_dequantised_layer_has_the_numbers_that_were_multiplied_by(tiny: str) -> None:
    model = ll.load_base(tiny, torch.float32, "nf4", compute_dtype=torch.bfloat16)
    ll.attach(model, ll.LoRAConfig(target_names="up_proj"))  # which changes nothing yet
    path = "model.layers.0.mlp.up_proj"
    layer: Any = model.get_submodule(path)
    with torch.no_grad():
        numbers = layer(torch.eye(layer.in_features)).mT
    assert not torch.equal(numbers, layer_of(layer, path).dense_weight())
    ll.merge(model, quantized="dequantize")
    assert torch.equal(model.get_submodule(path).weight, numbers)


@pytest.mark.parametrize("library", ["torchao", "quanto"])
def test_what_other_libraries_quantised_becomes_dense(library: str) -> None:
    model = tiny_llama()
    if library == "torchao":
        import torchao.quantization as ao

        ao.quantize_(model, ao.Int8WeightOnlyConfig())
    else:
        from optimum import quanto

        quanto.quantize(model, weights=quanto.qint8)
        quanto.freeze(model)
    adapted(model, {"variant": "lora"})
    attached = logits(model)
    with pytest.raises(
        ll.QuantizedWeightError,
        match=rf"q_proj: the weight is {library} \(\w+, float32\), which can't hold the sum\n"
        r'  use quantized="dequantize" \(a dense layer\), or lora_lite.merge_checkpoint on the 16-bit checkpoint$',
    ):
        ll.merge(model)
    with pytest.raises(ll.QuantizedWeightError, match=r"q_proj: a .* weight can't be quantised again here\n  use quan"):
        ll.merge(model, quantized="requantize")
    assert torch.equal(logits(model), attached)
    ll.merge(model, quantized="dequantize")
    torch.testing.assert_close(logits(model), attached, rtol=1e-4, atol=1e-5)
    ll.unmerge(model)
    assert torch.equal(logits(model), attached)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_a_quantised_layer_quantised_again(tiny: str, quantization: str, log: list[str]) -> None:
    model = quantized(tiny, quantization)
    adapted(model, {"variant": "lora"}, target_names="up_proj")
    old = {path: m for path, m in model.named_modules() if path.endswith("up_proj")}
    ll.merge(model, quantized="requantize")
    assert any("quantised 2 layers again, which adds an error of" in line and "times what" in line for line in log)
    for path, before in old.items():
        after = model.get_submodule(path)
        assert type(after) is type(before)
        assert layer_of(after).describe() == layer_of(before).describe()
        assert after.weight.dtype == before.weight.dtype
        change = layer_of(after, path).dense_weight() - layer_of(before, path).dense_weight()
        assert 0 < change.norm() < layer_of(before, path).dense_weight().norm()
    assert logits(model).isfinite().all()
    ll.unmerge(model)
    assert all(model.get_submodule(path) is before for path, before in old.items())


def test_a_quantised_layer_wants_a_choice(tiny: str) -> None:
    model = quantized(tiny, "nf4")
    adapted(model, {"variant": "lora"})
    attached = logits(model)
    with pytest.raises(ll.QuantizedWeightError, match=r'q_proj: the weight is nf4.*\n.*"dequantize".*merge_checkpoint'):
        ll.merge(model)
    with pytest.raises(ll.ConfigError, match="quantized='maybe': wanted one of"):
        ll.merge(model, quantized="maybe")
    assert torch.equal(logits(model), attached)


def test_a_quantised_model_for_good(tiny: str) -> None:
    model = quantized(tiny, "nf4")
    adapted(model, {"variant": "lora"})
    ll.merge(model, quantized="dequantize", keep=False)
    assert quantization_of(model) is None
    assert not any("lora" in key for key in model.state_dict())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("names", [(), (r"q_proj$",)], ids=["all layers", "some layers"])
def test_a_folder_of_layers_that_became_dense_opens_as_they_are(
    tiny: str, tmp_path: Path, quantization: str, names: tuple[str, ...]
) -> None:
    model = quantized(tiny, quantization)
    perturb(ll.attach(model, ll.LoRAConfig(r=4, target_names=names)))
    ll.merge(model, quantized="dequantize", keep=False)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=model.dtype)
    assert {name: type(m) for name, m in again.named_modules()} == {name: type(m) for name, m in model.named_modules()}
    layers = [find_layers(dict(m.named_modules())).items() for m in (model, again)]
    weights, saved = (
        {path: layer.dense_weight() for path, layer in of if layer.kind.category == "linear"} for of in layers
    )
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[path], saved[path]) for path in weights)
    kept = quantization_of(again)
    assert (kept.quant_type if kept is not None else None) == (quantization if names else None)


def test_conv1d_keeps_its_layout() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_fc = Conv1D(24, 16).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c_fc(x)

    model, x = Block(), torch.randn(3, 16, dtype=torch.float64)
    adapted(model, {"variant": "lora"}, target_names="c_fc", dtype=torch.float64)
    attached, shape = model(x), model.c_fc.weight.shape
    ll.merge(model)
    assert model.c_fc.weight.shape == shape
    torch.testing.assert_close(model(x), attached, rtol=1e-12, atol=1e-12)


def own(name: str, forward: Any, **more: Any) -> None:
    specs = staticmethod(lambda d_in, d_out, cfg: {"lora_v": ll.ParamSpec((d_out,), init="normal")})
    ll.register(type(name, (), {"name": name, "param_specs": specs, "forward": staticmethod(forward), **more}))


def test_a_method_with_an_offset_gets_a_bias_and_gives_it_back() -> None:
    own("shift", lambda layer, x, y: y + layer.lora_v, has_identity_init=False)
    model = tiny_llama(torch.float64)
    ll.attach(model, config("shift", dtype=torch.float64))
    attached, keys = logits(model), set(model.state_dict())
    ll.merge(model)
    assert set(model.state_dict()) > keys
    torch.testing.assert_close(logits(model), attached, rtol=1e-10, atol=1e-11)
    ll.unmerge(model)
    assert set(model.state_dict()) == keys
    assert torch.equal(logits(model), attached)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("bend", [torch.tanh, lambda t: t * t.abs().mean(-1, keepdim=True)])
def test_a_method_that_is_not_affine_raises_and_changes_nothing(bend: Any, keep: bool) -> None:
    own("bent", lambda layer, x, y: y + layer.lora_v * bend(y))
    model = tiny_llama()
    ll.attach(model, config("bent", target_names="up_proj"))
    before, attached = snapshot(model), logits(model)
    with pytest.raises(ll.VariantError, match=r"up_proj: 'bent' is not affine in x.*\n.*wanted 0\n.*keep the adapter"):
        ll.merge(model, keep=keep)
    same_snapshot(snapshot(model), before)
    assert torch.equal(logits(model), attached)


def test_a_bias_that_is_shared_raises_where_it_would_change() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    for cfg in (ll.IA3Config(target_names="0"), ll.LoRAConfig(r=2, target_names="0")):
        perturb(ll.attach(model, cfg), 0.3)
        if isinstance(cfg, ll.IA3Config):
            with pytest.raises(ll.TargetError, match="changes its bias, which another module holds as well"):
                ll.merge(model)
        else:
            ll.merge(model)
            ll.unmerge(model)
        ll.detach(model)


def test_a_tied_head_raises() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    adapted(model, {"variant": "lora"}, target_names="lm_head")
    with pytest.raises(ll.TargetError, match="lm_head: another module shares its weight, as an embedding does"):
        ll.merge(model)


@pytest.mark.parametrize("keep", [True, False])
def test_numbers_that_overflow_raise_and_change_nothing(keep: bool) -> None:
    model = tiny_llama(torch.float16)
    adapter = adapted(model, {"variant": "lora"})
    with torch.no_grad():
        list(adapter.parameters())[-1].fill_(1e6)
    before = snapshot(model)
    with pytest.raises(ll.BaseModelError, match=r"1.mlp.down_proj: merged numbers are NaN or infinite in float16"):
        ll.merge(model, keep=keep)
    same_snapshot(snapshot(model), before)


@pytest.mark.parametrize("where", ["dense", "dequantize", "requantize", "experts"])
def test_a_bias_that_overflows_in_its_dtype_raises_and_changes_nothing(where: str) -> None:
    """The weight's may have room for it."""
    model: Any = moe("gpt_oss") if where == "experts" else OneLinear(16, 64)
    if where == "dense":
        model.proj.bias = nn.Parameter(torch.full((64,), 60000.0, dtype=torch.float16))
    elif where == "experts":
        block = model.model.layers[1].mlp.experts
        block.down_proj_bias = nn.Parameter(torch.full_like(block.down_proj_bias, 60000.0, dtype=torch.float16))
    else:
        from bitsandbytes.nn import Linear4bit

        layer = Linear4bit(16, 64, bias=True, compute_dtype=torch.float16, quant_type="nf4")
        layer.load_state_dict(model.proj.state_dict())
        model.proj = layer.to("cpu")
        model.proj.bias = nn.Parameter(torch.full((64,), 60000.0, dtype=torch.float16))
    if where == "experts":
        cfg, given = ll.AbliterationConfig(target_names="experts"), {"directions": torch.ones(2, 1, 64)}
        ll.attach(model, cfg, calibration_data=given).scale = -1.0
    else:
        with torch.no_grad():
            for parameter in ll.attach(model, config("ia3", target_names="proj")).parameters():
                parameter.fill_(2.0)
    before = snapshot(model)
    with pytest.raises(ll.BaseModelError, match="merged numbers are NaN or infinite in float16"):
        ll.merge(model, quantized=where if where.endswith("quantize") else None)
    same_snapshot(snapshot(model), before)


def test_while_merged_what_would_change_nothing_raises() -> None:
    model = tiny_llama()
    adapter = adapted(model, {"variant": "lora"})
    state = adapter.state_dict()
    ll.merge(model)
    calls: list[Any] = [
        lambda: ll.merge(model),
        lambda: ll.detach(model),
        lambda: ll.attach(model, config("ia3"), "b"),
        lambda: ll.disabled(model).__enter__(),
        lambda: ll.scaled(model, 0.5).__enter__(),
        lambda: adapter.load_state_dict(state),
        lambda: adapter.configure(),
        lambda: ll.kl_divergence(model, [{"input_ids": IDS}]),
    ]
    for call in calls:
        with pytest.raises(
            ll.TargetError, match=r"can't .*: default is merged into the weights\n.*unmerge\(model\) first"
        ):
            call()
    ll.unmerge(model)
    assert adapter.scale == 1.0


def test_a_merged_adapter_can_be_saved_also_from_a_replaced_layer(tiny: str, tmp_path: Any) -> None:
    model = quantized(tiny, "nf4")
    adapted(model, {"variant": "lora"})
    attached = logits(model)
    ll.merge(model, quantized="dequantize")
    ll.save(model, tmp_path / "a.safetensors")
    fresh = quantized(tiny, "nf4")
    ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh), attached)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_merged_model_unmerges_by_itself(copied: Any) -> None:
    model = tiny_llama()
    adapted(model, {"variant": "lora"})
    attached = logits(model)
    ll.merge(model)
    merged = logits(model)
    other = copied(model)
    ll.unmerge(other)
    assert torch.equal(logits(other), attached)
    assert torch.equal(logits(model), merged)


def test_dropout_and_train_mode_leave_the_merged_weight_alone() -> None:
    weights = []
    for training in (False, True):
        torch.manual_seed(0)
        model = OneLinear()
        adapted(model, {"variant": "lora"}, target_names="proj", dropout=0.5)
        model.train(training)
        ll.merge(model)
        weights.append(model.proj.weight.clone())
    assert torch.equal(*weights)


def test_nothing_to_merge() -> None:
    with pytest.raises(ll.TargetError, match="no adapter on this OneLinear"):
        ll.merge(OneLinear())
    model = OneLinear()
    adapted(model, {"variant": "lora"}, target_names="proj")
    with pytest.raises(ll.TargetError, match="no adapter 'b'"):
        ll.merge(model, "b")


def test_a_weight_that_is_computed_at_each_forward_raises() -> None:
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        model = OneLinear()
        wrap(model.proj)
        adapted(model, {"variant": "lora"}, target_names="proj")
        with pytest.raises(ll.TargetError, match="proj: its weight is computed from others at each forward"):
            ll.merge(model)


def test_an_export_while_merged_raises(tmp_path: Path) -> None:
    model = tiny_llama()
    adapted(model, {"variant": "dora"})
    ll.merge(model)
    with pytest.raises(ll.TargetError, match="can't export: default is merged"):
        ll.save_peft(model, tmp_path / "peft", rank=4)
    assert not (tmp_path / "peft").exists()


def test_for_good_is_whole_at_each_layer_whatever_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(torch.float64)
    adapted(model, {"variant": "lora"}, dtype=torch.float64)
    attached, put, count = logits(model), Swap.put, 0

    def stops(swap: Swap, value: Any) -> None:
        nonlocal count
        count += 1
        if count == 6:
            raise torch.OutOfMemoryError("no memory")
        put(swap, value)

    monkeypatch.setattr(Swap, "put", stops)
    with pytest.raises(torch.OutOfMemoryError):
        ll.merge(model, keep=False)
    torch.testing.assert_close(logits(model), attached, rtol=1e-10, atol=1e-11)


def test_modes_dtypes_and_devices_change_while_merged(tiny: str) -> None:
    model = quantized(tiny, "nf4")
    adapted(model, {"variant": "lora"}, dropout=0.5)
    model.train()
    ll.merge(model, quantized="dequantize")
    model.eval()
    ll.unmerge(model)
    assert not any(module.training for module in model.modules())
    dense = tiny_llama(torch.bfloat16)
    adapted(dense, {"variant": "lora"})
    ll.merge(dense)
    dense.float()
    ll.unmerge(dense)
    wanted = tiny_llama(torch.bfloat16).float()
    assert all(torch.equal(dense.state_dict()[key], value) for key, value in wanted.state_dict().items())
    assert logits(dense).isfinite().all()


def test_hooks_of_others_on_a_layer_that_is_replaced_raise(tiny: str) -> None:
    model = quantized(tiny, "nf4")
    adapted(model, {"variant": "lora"}, target_names="up_proj")
    handle = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ll.TargetError, match=r"1.mlp.up_proj: something else has hooks on this Linear4bit"):
        ll.merge(model, quantized="dequantize")
    handle.remove()
    ll.merge(model, quantized="dequantize")


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa", "ia3_ff"])
def test_the_callers_modes_leave_the_result_alone(variant: str) -> None:
    models = [tiny_llama(), tiny_llama(), tiny_llama()]
    for model in models:
        adapted(model, {"variant": variant})
    ll.merge(models[0], keep=False)
    with torch.autocast("cpu", torch.bfloat16):
        ll.merge(models[1], keep=False)
    with torch.inference_mode():
        ll.merge(models[2], keep=False)
    for model in models[1:]:
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), model.parameters(), strict=True))
    ll.attach(models[2], config("lora"))
    models[2](input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("fails", [False, True])
def test_a_block_of_merged_is_the_adapters_and_leaves_every_bit(fails: bool) -> None:
    model = tiny_llama(torch.bfloat16)
    perturb(ll.attach(model, ll.LoRAConfig(r=2)))
    before, attached = snapshot(model), logits(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        with ll.merged(model):
            torch.testing.assert_close(logits(model), attached, rtol=0.05, atol=0.05)
            changed = [name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])]
            assert len(changed) == len(ll.adapters(model)["default"].targets)
            assert all(name.endswith(".weight") for name in changed)
            if fails:
                raise KeyError("within the block")
    except KeyError:
        assert fails
    assert same_snapshot(before, snapshot(model))
    assert torch.equal(logits(model), attached)
