"""Norms as a kind of layer: y = l ⊙ norm(x), norm(l ⊙ x), norm(x) + v, on RMSNorm, Gemma's 1 + w, and LayerNorm."""

import copy
import pickle
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from models import IDS, SIZES, perturb, tiny_llama, train
from test_laws import same_snapshot, snapshot
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.base.layer import quantization_of
from lora_lite.base.matrices import normalized
from lora_lite.cli.report import inspect

SMALL = {**SIZES, "intermediate_size": 96}
MODELS: dict[str, Any] = {
    "llama": tiny_llama,
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SMALL, head_dim=16)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SMALL, head_dim=16)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4)),
    "modernbert": lambda: tf.ModernBertForMaskedLM(
        tf.ModernBertConfig(
            **{key: size for key, size in SMALL.items() if key not in ("num_key_value_heads", "pad_token_id")},
            **dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), 0),
        )
    ),
    "mamba2": lambda: tf.Mamba2ForCausalLM(
        tf.Mamba2Config(
            hidden_size=64,
            vocab_size=96,
            num_hidden_layers=2,
            num_heads=8,
            head_dim=16,
            n_groups=1,
            state_size=16,
            chunk_size=8,
        )
    ),
    "bert": lambda: tf.BertForMaskedLM(
        tf.BertConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    ),
}
TARGETS = {"llama": 4, "gemma2": 8, "qwen3": 8, "gpt2": 4, "modernbert": 3, "mamba2": 4, "bert": 4}
HAS_BIAS = ["gpt2", "bert", "modernbert"]  # ModernBERT's is None, until a vector merges


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # norms too: a weight of 1 would hide how it enters
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def config(variant: str, **fields: Any) -> Any:
    return ll.config_for(variant)(kinds="norm", **fields)


def attach(model: Any, variant: str, name: str = "default", **fields: Any) -> ll.Adapter:
    cfg = config(variant, **fields)
    if variant in ("ia3", "ia3_ff"):
        return ll.attach(model, cfg, name)
    generator = torch.Generator().manual_seed(4)
    directions = {t.path: torch.randn(t.d_out, generator=generator) for t in ll.plan(model, cfg)}
    return ll.attach(model, cfg, name, calibration_data={"directions": directions})


CASES = [(name, variant) for name in MODELS for variant in ("ia3", "ia3_ff", "steer", "abliteration")]


@pytest.mark.parametrize("name", MODELS)
def test_all_norms_of_the_blocks_are_targets_by_default(name: str) -> None:
    model = build(name)
    plan = ll.plan(model, config("ia3"))
    assert len(plan) == TARGETS[name]
    for target in plan:
        module = model.get_submodule(target.path)
        assert "norm" in type(module).__name__.lower()
        assert target.d_in == target.d_out == len(module.weight)
    assert [entry.reason for entry in plan.left_out] == ["in no stack of blocks"] * len(plan.left_out)
    assert plan.parameters == sum(target.d_out for target in plan)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_the_equation_by_plain_hooks(name: str, variant: str) -> None:
    model, plain = build(name), build(name)
    base = logits(plain)
    adapter = attach(model, variant)
    assert torch.equal(logits(model), base) == variant.startswith("ia3")
    perturb(adapter, size=0.3)
    for site in adapter.sites():
        module, tensors = plain.get_submodule(site.path), {k: t.detach() for k, t in site.tensors()}
        if variant == "ia3_ff":
            module.register_forward_pre_hook(lambda module, args, t=tensors: (args[0] * t["lora_l"], *args[1:]))
        elif variant == "ia3":
            module.register_forward_hook(lambda module, args, y, t=tensors: y * t["lora_l"])
        elif variant == "steer":
            module.register_forward_hook(lambda module, args, y, t=tensors: y + t["lora_v"])
        else:
            d = tensors["lora_own"][0]
            b = getattr(module, "bias", None)
            b = torch.zeros(len(d)) if b is None else b.detach()  # the method leaves a layer's bias alone
            module.register_forward_hook(lambda module, args, y, d=d, b=b: y - ((y - b) @ d)[..., None] * d)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(model), base, atol=1e-3)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_files_scales_copies_and_detach(name: str, variant: str, tmp_path: Path) -> None:
    model = build(name)
    before, base = snapshot(model), logits(model)
    adapter = attach(model, variant)
    perturb(adapter, size=0.3)
    adapter.scale = 0.7
    attached = logits(model)
    ll.save(model, tmp_path / "a.safetensors")
    fresh = build(name)
    loaded = ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh), attached)
    assert (loaded.config, loaded.targets) == (adapter.config, adapter.targets)
    ll.restore(fresh, tmp_path / "a.safetensors")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), attached)
        ll.adapters(other)["default"].scale = 0.0
        assert torch.equal(logits(other), base)
    ll.detach(model)
    assert same_snapshot(snapshot(model), before)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("name", MODELS)
def test_an_audit_passes_and_every_factor_moves(name: str) -> None:
    model = build(name)
    adapter = ll.attach(
        model, ll.IA3Config(kinds=["linear", "norm"], target_names=r"\d\.(\w+\.)*(\w*norm|ln_1|LayerNorm)$")
    )
    audit = ll.audit(model, IDS)
    assert {layer.path for layer in audit.layers} == set(adapter.targets)
    assert all(layer.gradients == 1 for layer in audit.layers)
    start = [p.detach().clone() for p in adapter.parameters()]
    train(model, adapter)
    assert not any((p == before).any() for p, before in zip(adapter.parameters(), start, strict=True))
    assert {target.kind for target in ll.plan(build(name), config("ia3"))} == {"float32"}


# ---- merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_merged_is_attached(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    perturb(adapter := attach(model, "ia3"), size=0.3)
    paths = list(adapter.targets)
    if name in HAS_BIAS:
        attach(model, "steer", "second", strength=0.3)
    attached = logits(model)
    ll.merge(model)
    merged = logits(model)
    error = {torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
    assert (merged - attached).abs().max() <= error * attached.abs().max()
    ll.unmerge(model)
    assert torch.equal(logits(model), attached)
    ll.merge(model, keep=False)
    assert torch.equal(logits(model), merged)
    new = model.state_dict().keys() - build(name).state_dict().keys()
    assert new == ({f"{path}.bias" for path in paths} if name == "modernbert" else set())


def test_a_merge_of_one_adapter_beside_another_keeps_the_outputs() -> None:
    model = build("bert")
    perturb(attach(model, "ia3"), size=0.3)
    perturb(attach(model, "ia3", "second"), seed=2, size=0.3)
    attached = logits(model)
    ll.merge(model, "second")
    torch.testing.assert_close(logits(model), attached, rtol=1e-4, atol=1e-5)
    ll.unmerge(model)
    attach(model, "steer", "third")
    with pytest.raises(ll.TargetError, match="default, second would act differently"):
        ll.merge(model, "third")


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("ia3_ff", r"layernorm: an adapter changes the norm's input, or mixes its channels\n  keep the adapter"),
        ("abliteration", r"layernorm: an adapter changes the norm's input, or mixes its channels"),
        ("steer", r"layernorm: an adapter adds a constant, and this norm has no bias\n  keep the adapter attached"),
    ],
)
def test_what_no_norm_holds_is_not_merged(variant: str, message: str) -> None:
    model = build("llama")
    perturb(attach(model, variant), size=0.3)
    before, attached = snapshot(model), logits(model)
    with pytest.raises(ll.TargetError, match=message):
        ll.merge(model)
    assert same_snapshot(snapshot(model), before)
    assert torch.equal(logits(model), attached)


# ---- on disk, and in other forms ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_merged_on_disk_is_merged_in_memory(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "base")
    perturb(attach(model, "ia3"), size=0.3)
    ll.save(model, tmp_path / "a.safetensors")
    ll.merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - logits(model)).abs().max() <= 1e-5 * logits(model).abs().max()
    ll.merge(model, keep=False)
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in merged.state_dict().items())


def test_a_vector_merges_on_disk_where_the_norm_has_a_bias(tmp_path: Path) -> None:
    for name in ("bert", "llama"):
        model = build(name)
        model.save_pretrained(tmp_path / name)
        attach(model, "steer")
        ll.save(model, tmp_path / "a.safetensors")
        if name == "bert":
            ll.merge_checkpoint(tmp_path / name, tmp_path / "a.safetensors", tmp_path / "merged")
            merged = type(model).from_pretrained(tmp_path / "merged").eval()
            torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
            continue
        with pytest.raises(ll.TargetError, match="adds a constant, and this norm has no bias"):
            ll.merge_checkpoint(tmp_path / name, tmp_path / "a.safetensors", tmp_path / "none")
        assert not (tmp_path / "none").exists()


def test_peft_and_a_history_have_no_place_for_it(tmp_path: Path) -> None:
    model = build("llama")
    perturb(attach(model, "ia3"), size=0.3)
    for rank in (None, 4):
        with pytest.raises(ll.CheckpointError, match=r"layernorm: PEFT has no such method on a norm"):
            ll.save_peft(model, tmp_path / "peft", rank=rank)
    with pytest.raises(ll.TargetError, match=r"a history is of layers, and this adapter is on a norm"):
        ll.freeze_into(model)


# ---- refusals -----------------------------------------------------------------------------------


class Scale(nn.Module):
    """It looks like a norm by its parameters, and normalises nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Cubed(Scale):
    """A norm whose weight enters in a way of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight**3 * x / x.norm(dim=-1, keepdim=True)


def blocks_of(norm: Any) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(8, 8), norm(), nn.Linear(8, 8))] * 2)})


@pytest.mark.parametrize("variant", [v for v in sorted(ll.REGISTRY) if "norm" not in ll.config_for(v).WITHOUT_MATRIX])
def test_methods_that_need_a_matrix_are_refused(variant: str) -> None:
    fields = {"rounds": [], "here": {}} if variant == "history" else {}
    with pytest.raises(ll.ConfigError, match=r"kinds=\('norm',\)\): wanted no 'norm': its method needs a matrix"):
        ll.config_for(variant)(variant=variant, kinds="norm", **fields)


def test_modes_of_ablation_that_read_a_weight_are_refused() -> None:
    with pytest.raises(ll.ConfigError, match="wanted 'none' on blocks and on norms"):
        ll.AbliterationConfig(kinds="norm", normalization="pre")


def test_what_normalises_nothing_is_no_norm() -> None:
    model = blocks_of(Scale)
    with pytest.raises(ll.TargetError, match="an adapter can't act on this Scale: it doesn't normalise its input"):
        ll.attach(model, config("ia3", target_names="1"))
    with pytest.raises(ll.TargetError, match=r"0.1 \(it doesn't normalise its input\)"):
        ll.plan(model, config("ia3"))


@pytest.mark.parametrize("norm", [nn.GroupNorm, nn.BatchNorm1d, nn.InstanceNorm1d])
def test_norms_of_other_axes_are_not_found(norm: Any) -> None:
    model = blocks_of(lambda: norm(2, 8) if norm is nn.GroupNorm else norm(8, affine=True))
    with pytest.raises(ll.TargetError, match="0 norms searched"):
        ll.plan(model, config("ia3", target_names="1"))


def test_a_norm_of_an_unknown_form_runs_and_is_not_merged() -> None:
    model = blocks_of(Cubed)
    perturb(ll.attach(model, config("ia3")), size=0.3)
    with pytest.raises(ll.TargetError, match=r"0.1: this norm.s own forward isn.t \(w \+ c\)"):
        ll.merge(model, never_ran="merge")


def test_a_file_of_another_kind_goes_on_no_norm(tmp_path: Path) -> None:
    model = build("llama")
    ll.attach(model, ll.LoRAConfig(r=2, target_names="q_proj"))
    ll.save(model, tmp_path / "a.safetensors")
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        metadata = {k: v.replace("self_attn.q_proj", "input_layernorm") for k, v in opened.metadata().items()}
    tensors = {
        k.replace("self_attn.q_proj", "input_layernorm"): t for k, t in load_file(tmp_path / "a.safetensors").items()
    }
    save_file(tensors, tmp_path / "b.safetensors", metadata)
    with pytest.raises(ll.CheckpointError, match="input_layernorm is no linear layer of this LlamaForCausalLM but"):
        ll.load(build("llama"), tmp_path / "b.safetensors")


def test_steering_fitted_on_the_output_of_norms() -> None:
    model = build("bert")
    sides = {"positive": [IDS[:, :6], IDS[:, 2:8]], "negative": [IDS[:, 6:], IDS[:, 5:11]]}
    adapter = ll.attach(
        model, config("steer", what="output", target_names=r"1\.output\.LayerNorm"), calibration_data=sides
    )
    (path,) = adapter.targets
    step = ll.contrast(build("bert"), sides, [path], what="output", progress=False)[path].step
    torch.testing.assert_close(model.get_submodule(path).lora_v, step.float(), rtol=1e-4, atol=1e-6)


def test_plan_counts_norms_as_it_did(tmp_path: Path) -> None:
    model = build("llama")
    text = str(ll.plan(model, ll.LoRAConfig(r=2)))
    assert "norms and other vectors x 5" in text
    listed = ll.plan(model, config("ia3")).unadapted
    assert ("model.norm", "in no stack of blocks") in [(entry.paths, entry.reason) for entry in listed]
    assert sum(entry.share for entry in listed) < 1


def test_inspect_shows_how_far_a_gain_moves_a_norm(tmp_path: Path) -> None:
    model = build("gemma2")
    model.save_pretrained(tmp_path / "base")
    perturb(attach(model, "ia3"), size=0.3)
    ll.save(model, tmp_path / "a.safetensors")
    for layer in inspect(tmp_path / "a.safetensors", tmp_path / "base").layers:
        module = model.get_submodule(layer.path)
        moved = (module.lora_l - 1) * (module.weight + 1)
        assert layer.norm == pytest.approx(moved.norm().item(), rel=1e-5)


def test_a_packed_norm_makes_no_base_a_quantised_one() -> None:
    class Packed(nn.Parameter):
        """As GGUF keeps it."""

    model = build("llama")
    norm = model.model.layers[0].input_layernorm
    norm.weight = Packed(norm.weight.data, requires_grad=False)
    assert quantization_of(model) is None
    assert len(ll.plan(model, config("ia3"))) == TARGETS["llama"] - 1


# ---- methods that read a norm's input ----------------------------------------------------------------


class Gated(nn.Module):
    """As Mamba2's: the gate goes in before the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        hidden = hidden if gate is None else hidden * F.silu(gate)
        return self.weight * F.rms_norm(hidden, (8,))


class WithGain(nn.Module):
    """Another parameter enters beside the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.gain * F.rms_norm(x, (8,))


class Exponential(WithGain):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight.exp() * F.rms_norm(x, (8,))


class Calls(nn.Module):
    """A norm, called in the ways that models call theirs."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.way = norm, 0

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        if not isinstance(self.norm, Gated):
            return self.norm(x)
        return [lambda: self.norm(x, gate), lambda: self.norm(gate=gate, hidden=x), lambda: self.norm(x)][self.way]()


@pytest.mark.parametrize("way", [0, 1, 2])
@pytest.mark.parametrize("make", [Gated, WithGain, lambda: nn.LayerNorm(8), lambda: nn.RMSNorm(8)])
@pytest.mark.parametrize("is_patched", [False, True])
def test_a_change_of_a_norms_weight_is_that_of_another_weight(make: Any, way: int, is_patched: bool) -> None:
    """Whatever its forward is called with, and also where a forward lies on the instance, as accelerate puts it."""
    model = Calls(make())
    model.way = way
    x, gate = torch.randn(3, 8), torch.randn(3, 8)
    if is_patched:
        model.norm.forward = types.MethodType(type(model.norm).forward, model.norm)  # type: ignore[method-assign]
    base = model(x, gate)
    adapter = ll.attach(model, ll.NormConfig())
    assert torch.equal(model(x, gate), base)
    perturb(adapter, 0.5)
    got = model(x, gate)
    tensors = {key.rpartition("lora_")[2]: tensor.detach() for key, tensor in adapter.named_tensors()}
    ll.detach(model)
    with torch.no_grad():
        for name, change in tensors.items():
            getattr(model.norm, name).add_(change)
    torch.testing.assert_close(got, model(x, gate), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, base, atol=1e-2)


def test_a_norm_that_no_change_of_its_weight_fits_is_refused() -> None:
    model = Calls(Exponential())
    with pytest.raises(ll.TargetError, match=r"own forward isn't \(w \+ c\) ⊙ n\(x\) \+ b"):
        ll.attach(model, ll.NormConfig())
    ll.attach(model, ll.IA3Config(kinds="norm"))  # acts on the output alone


@pytest.mark.parametrize("make", [Gated, WithGain, lambda: nn.LayerNorm(8)])
def test_a_replica_of_data_parallel_normalises_alike(make: Any) -> None:
    """Its parameters are plain attributes, which stay as they are."""
    norm, x = make(), torch.randn(3, 8)
    replica = norm._replicate_for_data_parallel()
    replica._parameters = {}
    for name, parameter in norm._parameters.items():
        setattr(replica, name, parameter.detach().clone())
    before = dict(replica.__dict__)
    assert torch.equal(normalized(replica, x, (x,), {}), normalized(norm, x, (x,), {}))
    assert replica.__dict__.keys() == before.keys()
    assert all(replica.__dict__[name] is before[name] for name in norm._parameters)
