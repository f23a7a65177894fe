"""PEFT's adapter folders, with PEFT and transformers themselves on the other end."""

import dataclasses
import json
import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import IDS, OneLinear, attach, config, loss_of, moe, perturb, quantized, tiny_llama
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import lora_lite as ll
from lora_lite.io.keys import plain_key
from lora_lite.ops.svd import low_rank_factors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SOME = ["q_proj", "k_proj", "down_proj"]
DOWN = "model.layers.1.mlp.down_proj"
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"down_proj": 6, "^model.layers.0.self_attn.q_proj": 2},
    "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 3, "down_proj": 5, "layers.0.self_attn.k_proj": 4.5},
}


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "target_modules": SOME, "task_type": "CAUSAL_LM"} | fields))


def ia3(targets: list[str], inner: list[str]) -> Any:
    return peft.IA3Config(target_modules=targets, feedforward_modules=inner, task_type="CAUSAL_LM")


KINDS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True),
    "patterns": lambda: lora(**PATTERNS),
    "rslora_patterns": lambda: lora(use_rslora=True, **PATTERNS),
    "dora": lambda: lora(use_dora=True),
    "dora_patterns": lambda: lora(use_dora=True, **PATTERNS),
    "gaussian": lambda: lora(init_lora_weights="gaussian"),
    "ia3": lambda: ia3(["k_proj", "v_proj"], []),
    "ia3_ff": lambda: ia3(["down_proj"], ["down_proj"]),
    "ia3_both": lambda: ia3(["k_proj", "v_proj", "down_proj"], ["down_proj"]),
}
REWRITTEN: dict[str, Callable[[], Any]] = {
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "pissa_patterns": lambda: lora(init_lora_weights="pissa", **PATTERNS),
    "pissa_rslora": lambda: lora(init_lora_weights="pissa", use_rslora=True),
    "olora": lambda: lora(init_lora_weights="olora"),
    "olora_rslora": lambda: lora(init_lora_weights="olora", use_rslora=True),
    "olora_patterns": lambda: lora(init_lora_weights="olora", **PATTERNS),
}
per_kind = pytest.mark.parametrize("kind", KINDS)


def theirs(folder: Path, cfg: Any, model: Any = None, dtype: torch.dtype | None = None) -> Path:
    """A folder that PEFT has written, of random parameters."""
    wrapped = peft.get_peft_model(tiny_llama(bias=True) if model is None else model, cfg)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
                parameter.data = parameter.data.to(dtype or parameter.dtype)
    wrapped.save_pretrained(folder)
    return folder


def opened(folder: Path, model: Any = None) -> Any:
    """PEFT's model with a folder loaded, whose keys all had a place."""
    base = tiny_llama(bias=True) if model is None else model
    wrapped = peft.PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    result = wrapped.load_adapter(folder, "default", is_trainable=True)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key or "ia3_" in key]
    held = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    assert {plain_key(key) for key in held} == {
        plain_key(key) for key in load_file(folder / WEIGHTS) if ".base_layer." not in key
    }
    return wrapped


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=IDS).logits
    return out


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return found


def change_settings(folder: Path, **fields: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(settings(folder) | fields))


def change_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def same_tensors(a: Path, b: Path) -> bool:
    one, other = ({plain_key(key): t for key, t in load_file(each / WEIGHTS).items()} for each in (a, b))
    assert one.keys() == other.keys()
    assert all(one[key].dtype == other[key].dtype for key in one)
    return all(torch.equal(one[key], other[key]) for key in one)


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("base_model.model.model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj.lora_A"),
        ("base_model.model.model.layers.0.q_proj.lora_B.default.weight", "model.layers.0.q_proj.lora_B"),
        ("model.layers.0.q_proj.lora_B.fr.weight", "model.layers.0.q_proj.lora_B__fr"),
        ("base_model.model.up.lora_magnitude_vector", "up.lora_m"),
        ("base_model.model.up.lora_magnitude_vector.default.weight", "up.lora_m"),
        ("base_model.model.k.ia3_l", "k.lora_l"),
        ("base_model.model.k.ia3_l.default", "k.lora_l"),
        ("base_model.model.k.base_layer.weight", "k.weight"),
        ("k.base_layer.bias", "k.bias"),
        ("base_model.model.model.norm.weight", "model.norm.weight"),
        ("model.layers.0.q_proj.lora_A", "model.layers.0.q_proj.lora_A"),
        ("model.norm.weight", "model.norm.weight"),
        ("embed.lora_embedding_A.default", "embed.lora_A"),
        ("embed.lora_embedding_B", "embed.lora_B"),
        ("k.lora_B.default.bias", "k.lora_bias"),
        ("k.lora_B.fr.bias", "k.lora_bias__fr"),
        ("k.lora_A.default.bias", "k.lora_A.default.bias"),
        ("k.vera_lambda_d.default", "k.lora_d"),
        ("base_model.vera_A", "lora_shared.A"),
        ("base_model.vera_B.fr", "lora_shared__fr.B"),
    ],
)
def test_plain_key(key: str, plain: str) -> None:
    assert plain_key(key) == plain


# ---- loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS | REWRITTEN)
def test_a_folder_of_peft_loads_with_equal_outputs_and_gradients(kind: str, tmp_path: Path) -> None:
    theirs(tmp_path, (KINDS | REWRITTEN)[kind]())
    other, model = opened(tmp_path), tiny_llama(bias=True)
    state = torch.get_rng_state()
    adapter = ll.load_peft(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(logits(model), logits(other))
    assert not torch.allclose(logits(model), logits(tiny_llama(bias=True)), atol=1e-3)
    loss_of(other).backward()
    loss_of(model).backward()
    grads = {key: p.grad for key, p in other.named_parameters() if p.requires_grad}
    mine = {}
    for each in ll.adapters(model).values():
        mine |= {key: t.grad for key, t in each.named_tensors() if isinstance(t, nn.Parameter)}
    assert {plain_key(key) for key in grads} == mine.keys()
    for key, grad in grads.items():
        found = mine[plain_key(key)]
        torch.testing.assert_close(found.reshape(grad.shape), grad, rtol=1e-4, atol=1e-6)
    assert adapter is not None


@per_kind
def test_there_and_back_is_bit_exact(kind: str, tmp_path: Path) -> None:
    theirs(tmp_path / "a", KINDS[kind]())
    model = tiny_llama(bias=True)
    ll.load_peft(model, tmp_path / "a")
    ll.save_peft(model, tmp_path / "b", list(ll.adapters(model)))
    assert same_tensors(tmp_path / "a", tmp_path / "b")
    assert torch.equal(logits(opened(tmp_path / "b")), logits(opened(tmp_path / "a")))
    again = tiny_llama(bias=True)
    ll.load_peft(again, tmp_path / "b")
    assert torch.equal(logits(again), logits(model))
    assert {n: a.config for n, a in ll.adapters(again).items()} == {n: a.config for n, a in ll.adapters(model).items()}
    fields = {each.name for each in dataclasses.fields(peft.LoraConfig if "ia3" not in kind else peft.IA3Config)}
    assert settings(tmp_path / "b").keys() <= fields


def test_both_kinds_of_ia3_become_one_adapter_of_two_methods(tmp_path: Path, log: list[str]) -> None:
    theirs(tmp_path, KINDS["ia3_both"]())
    model = tiny_llama(bias=True)
    adapter = ll.load_peft(model, tmp_path, name="fr")
    assert list(ll.adapters(model)) == ["fr"]
    assert [type(cfg) for cfg in adapter.configs] == [ll.IA3Config, ll.IA3FFConfig]
    assert "ia3 + ia3_ff 'fr'" in log[0]
    assert_close(logits(model), logits(opened(tmp_path)))


def test_the_layers_get_their_own_rank_and_alpha(tmp_path: Path) -> None:
    theirs(tmp_path, KINDS["patterns"]())
    model = tiny_llama(bias=True)
    adapter = ll.load_peft(model, tmp_path)
    found = {path: (view.cfg.r, view.cfg.alpha) for path, view in adapter.views().items()}
    assert found == {
        "model.layers.0.self_attn.q_proj": (2, 6.0),
        "model.layers.0.self_attn.k_proj": (4, 4.5),
        "model.layers.0.mlp.down_proj": (6, 5.0),
        "model.layers.1.self_attn.q_proj": (4, 6.0),
        "model.layers.1.self_attn.k_proj": (4, 6.0),
        DOWN: (6, 5.0),  # PEFT sorts its patterns when it saves, and takes the first
    }
    twin = ll.attach(tiny_llama(bias=True), adapter.config)  # its config alone says as much
    assert twin.targets == adapter.targets
    assert twin.per_layer == adapter.per_layer
    ll.save(model, tmp_path / "a.safetensors")
    fresh = tiny_llama(bias=True)
    ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_keep_the_files_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    for kind in ("lora", "ia3"):
        folder = theirs(tmp_path / kind, KINDS[kind](), dtype=dtype)
        model = tiny_llama(bias=True)
        adapter = ll.load_peft(model, folder)
        assert adapter.config.dtype == dtype
        assert {tensor.dtype for _, tensor in adapter.named_tensors()} == {dtype}
        ll.save_peft(model, tmp_path / "back")
        assert same_tensors(folder, tmp_path / "back")


def test_mixed_dtypes_are_promoted_to_one_that_holds_them_all(tmp_path: Path) -> None:
    theirs(tmp_path, lora())

    def mixed(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: t.to(torch.bfloat16 if "lora_A" in key else torch.float16) for key, t in held.items()}

    change_tensors(tmp_path, mixed)
    adapter = ll.load_peft(tiny_llama(bias=True), tmp_path)
    assert adapter.config.dtype == torch.float32
    assert_close(logits(adapter_model := tiny_llama(bias=True)), logits(adapter_model))
    held = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(adapter.state_dict()[plain_key(key)], t.float()) for key, t in held.items())


@pytest.mark.parametrize("kind", ["dora", "pissa", "olora"])
def test_what_is_compared_with_the_live_weight_is_kept_in_float32(kind: str, tmp_path: Path) -> None:
    theirs(tmp_path, (KINDS | REWRITTEN)[kind](), dtype=torch.bfloat16)
    model = tiny_llama(bias=True)
    assert ll.load_peft(model, tmp_path).config.dtype == torch.float32
    assert_close(logits(model), logits(opened(tmp_path)))


def test_several_named_adapters(tmp_path: Path) -> None:
    theirs(tmp_path / "a", lora(target_modules=["q_proj"]))
    theirs(tmp_path / "b", lora(r=2, target_modules=["q_proj", "up_proj"]))
    model = tiny_llama(bias=True)
    ll.load_peft(model, tmp_path / "a", name="one")
    ll.load_peft(model, tmp_path / "b", name="two")
    other = opened(tmp_path / "a")
    other.load_adapter(tmp_path / "b", "two")
    other.base_model.set_adapter(["default", "two"])
    assert_close(logits(model), logits(other))
    for name, folder in (("one", "a"), ("two", "b")):
        ll.save_peft(model, tmp_path / name, name)
        assert same_tensors(tmp_path / name, tmp_path / folder)
    with pytest.raises(ll.TargetError, match="'one' is attached to this LlamaForCausalLM already"):
        ll.load_peft(model, tmp_path / "a", name="one")


def test_prefixes_are_resolved(tmp_path: Path) -> None:
    theirs(tmp_path, lora())
    model = tiny_llama(bias=True)
    adapter = ll.load_peft(model.model, tmp_path)
    assert "layers.1.mlp.down_proj" in adapter.targets
    assert_close(logits(model), logits(opened(tmp_path)))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_4_bit_base(kind: str, tiny: str, tmp_path: Path) -> None:
    theirs(tmp_path / "a", KINDS[kind](), model=quantized(tiny, "nf4"))
    model = quantized(tiny, "nf4")
    ll.load_peft(model, tmp_path / "a")
    other = quantized(tiny, "nf4")
    for module in other.modules():  # as attach does: PEFT would read a layer that its first forward has repacked
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    other = opened(tmp_path / "a", other)
    wanted, base = logits(other).float(), logits(quantized(tiny, "nf4")).float()
    error, size = (logits(model).float() - wanted).norm(), (wanted - base).norm()
    assert error < 0.05 * size, f"{error / size:.1e} of the adapter's effect"
    ll.save_peft(model, tmp_path / "b")
    assert same_tensors(tmp_path / "a", tmp_path / "b")


def test_gpt2s_transposed_layers(tmp_path: Path) -> None:
    def gpt2() -> Any:
        torch.manual_seed(0)
        sizes = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()

    for init in (True, "pissa"):
        cfg = lora(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True, init_lora_weights=init)
        theirs(tmp_path / "a", cfg, model=gpt2())
        model = gpt2()
        ll.load_peft(model, tmp_path / "a")
        assert_close(logits(model), logits(opened(tmp_path / "a", gpt2())))
        ll.save_peft(model, tmp_path / "b", rank=8)
        assert settings(tmp_path / "b")["fan_in_fan_out"] is True
        assert settings(tmp_path / "b")["target_modules"] == [
            f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "mlp.c_proj")
        ]
        assert_close(logits(opened(tmp_path / "b", gpt2())), logits(model))


# ---- what isn't supported -----------------------------------------------------------------------


def refused(folder: Path, message: str, error: Any = ll.CheckpointError, model: Any = None) -> None:
    """load_peft raises, and the model is as it was."""
    model = tiny_llama(bias=True) if model is None else model
    before, flags = sorted(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        ll.load_peft(model, folder)
    assert sorted(model.state_dict()) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not ll.adapters(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "POLY"}, r"peft_type 'POLY' isn't supported; wanted one of \['ADALORA', 'ADAMSS', 'BEFT"),
        ({"peft_type": None}, r"peft_type None"),
        ({"bias": "some"}, r'bias="some" can\'t be kept here'),
        ({"bias": ["all"]}, r'bias=\["all"\] can\'t be kept here'),
        ({"lora_bias": True}, r"6 missing keys; .*\n  such as model\.layers\.0\.mlp\.down_proj\.lora_bias"),
        ({"lora_bias": 1}, r"lora_bias=1: wanted true or false"),
        ({"lora_bias": True, "use_dora": True}, r"lora_bias=true with use_dora=True, .* isn't supported"),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save=\["lm_head"\]'),
        ({"target_parameters": ["experts.down_proj"]}, r"target_parameters="),
        ({"layer_replication": [[0, 1], [0, 2]]}, r"layer_replication="),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\]"),
        ({"alora_invocation_tokens": [1, "x"]}, r"alora_invocation_tokens=\[1, 'x'\]: wanted a list of tokens"),
        ({"alora_invocation_tokens": [1, 2], "use_dora": True}, r"alora_invocation_tokens with use_dora=True"),
        ({"modules_to_save": "lm_head"}, r"modules_to_save='lm_head': wanted names"),
        ({"use_qalora": True}, r"use_qalora=true"),
        ({"a_field_of_tomorrow": 1}, r"a_field_of_tomorrow=1"),
        ({"layer_replication": 1, "use_qalora": True}, r"layer_replication=1, use_qalora=true"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights='pissa_niter_4' wrote the base.*\n.*path_initial"),
        ({"init_lora_weights": "corda"}, r"'corda' wrote the base"),
        ({"init_lora_weights": "lora_ga"}, r"'lora_ga' wrote the base"),
        ({"init_lora_weights": "loftq"}, r"'loftq' wrote the base"),
        ({"init_lora_weights": 3}, r"init_lora_weights=3 isn't supported"),
        ({"init_lora_weights": "pissa", "use_dora": True}, r"'pissa' with use_dora wrote the base"),
        ({"init_lora_weights": "pissa", "lora_dropout": 0.1}, r"lora_dropout=0.1 with init_lora_weights='pissa'"),
        ({"alpha_pattern": {r".*\.down_proj": 4}}, r"alpha_pattern has '.*down_proj', and no regex of a file is run"),
        ({"alpha_pattern": {"q_proj|k_proj": 4}}, r"alpha_pattern has 'q_proj|k_proj'"),
        ({"alpha_pattern": {"(a+)+$": 4}}, r"alpha_pattern has '\(a\+\)\+\$'"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is no object"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"lora_alpha has x: wanted a finite number"),
        ({"lora_alpha": 10**400}, r"lora_alpha has 1000000.*: wanted a finite number"),
        ({"lora_alpha": -1}, r"alpha=-1.0\): wanted a number above 0"),
        ({"lora_alpha": None}, r"lora_alpha has None"),
        ({"lora_dropout": 1.0}, r"dropout=1.0"),
        ({"use_rslora": "yes"}, r"use_rslora='yes': wanted true or false"),
        ({"peft_type": []}, r"peft_type \[\] isn't supported"),
        ({"r": 8}, r"has tensors of rank 4, and r and rank_pattern name \[8\]"),
        ({"r": 8, "rank_pattern": {".*": 6}}, r"rank 4, and r and rank_pattern name \[8, 6\]"),
        ({"r": "4", "rank_pattern": [4]}, r"rank 4, and r and rank_pattern name \['4'\]"),
        ({"alpha_pattern": {str(i): 1 for i in range(10_001)}}, r"alpha_pattern is no object of at most 10000 entries"),
        ({"use_dora": True}, r"6 missing keys;(.|\n)*lora_m"),
    ],
)
def test_a_setting_that_would_be_lost_is_an_error(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    theirs(tmp_path, lora())
    change_settings(tmp_path, **fields)
    refused(tmp_path, message)


def test_a_rank_pattern_is_never_read_as_a_regex(tmp_path: Path) -> None:
    theirs(tmp_path, lora())
    wanted = logits(opened(tmp_path))
    change_settings(tmp_path, r=8, rank_pattern={"(a+)+$": 4})
    model = tiny_llama(bias=True)
    ll.load_peft(model, tmp_path)
    assert_close(logits(model), wanted)


def test_alphas_that_depend_on_the_order_are_named(tmp_path: Path, log: list[str]) -> None:
    theirs(tmp_path, lora())
    change_settings(tmp_path, alpha_pattern={r"1\.mlp\.down_proj": 3, "down_proj": 5, "q_proj": 2, "attn.q_proj": 2})
    ll.load_peft(tiny_llama(bias=True), tmp_path)
    assert f"WARNING {tmp_path / CONFIG}: several entries of alpha_pattern find {DOWN}; took the first" in log[0]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_were_trained_are_tensors_of_the_file(bias: str, tmp_path: Path) -> None:
    """A base without biases has none to train."""
    theirs(tmp_path, lora(bias=bias), model=tiny_llama())
    model = tiny_llama()
    ll.load_peft(model, tmp_path)
    assert_close(logits(model), logits(opened(tmp_path, tiny_llama())))
    theirs(tmp_path / "biased", lora(bias=bias))
    model = tiny_llama(bias=True)
    assert ll.load_peft(model, tmp_path / "biased").variant == "lora + bias"


def test_the_folders_in_a_root_are_named(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(tiny_llama(), lora(), "fr")
    wrapped.add_adapter("de", lora())
    wrapped.save_pretrained(tmp_path)
    message = (
        rf"{tmp_path} is no adapter folder of PEFT: wanted .* in it\n  2 of its folders are: de, fr; load one of them"
    )
    refused(tmp_path, message)
    with pytest.raises(ll.CheckpointError, match=message):
        ll.load(tiny_llama(), tmp_path)
    assert ll.load_peft(tiny_llama(), tmp_path / "fr").targets
    (tmp_path / "de").rename(tmp_path / ("\x1b" * 200))
    refused(tmp_path, r"2 of its folders are: \?+, fr|2 of its folders are: fr, \?+")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_a_copy_of_the_bases_head_is_compared_and_left(tmp_path: Path) -> None:
    """PEFT adds it to the file of an adapter on lm_head."""
    for use_dora in (False, True):
        theirs(tmp_path, lora(target_modules=["lm_head", "q_proj"], use_dora=use_dora), model=tiny_llama())
        assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
        model = tiny_llama()
        adapter = ll.load_peft(model, tmp_path)
        assert "lm_head" in adapter.targets
        assert_close(logits(model), logits(opened(tmp_path, tiny_llama())))
    message = r"lm_head.base_layer.weight is not this model's lm_head.weight\n  the adapter belongs to another base"
    refused(tmp_path, message, model=tiny_llama(seed=1))

    def moved(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        held["base_model.model.lm_head.base_layer.weight"][3, 1] += 1e-3
        return held

    change_tensors(tmp_path, moved)
    refused(tmp_path, message, model=tiny_llama())


def test_a_copy_of_another_kind_is_refused(tmp_path: Path, tiny: str) -> None:
    def added(key: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        return lambda held: held | {f"base_model.model.{key}": torch.ones(shape)}

    theirs(tmp_path, lora())
    change_tensors(tmp_path, added(f"{DOWN}.base_layer.weight", 64, 3))
    refused(tmp_path, rf"{DOWN}.base_layer.weight is not this model's {DOWN}.weight")
    theirs(tmp_path, lora())
    change_tensors(tmp_path, added(f"{DOWN}.base_layer.scales", 64))
    refused(tmp_path, rf"{DOWN}.base_layer.scales is not this model's {DOWN}.scales")
    theirs(tmp_path, lora())
    change_tensors(tmp_path, added("model.layers.1.mlp.up_proj.base_layer.weight", 128, 64))
    refused(tmp_path, r"1 of its 13 tensors have no place(.|\n)*up_proj.base_layer.weight")
    theirs(tmp_path, lora(), model=quantized(tiny, "nf4"))
    change_tensors(tmp_path, added(f"{DOWN}.base_layer.weight", 128, 256))
    message = rf"{DOWN}.base_layer.weight can not be compared with this model's {DOWN}.weight"
    refused(tmp_path, message, model=quantized(tiny, "nf4"))


class Nested(nn.Module):
    """One linear layer at a path."""

    def __init__(self, path: str) -> None:
        super().__init__()
        name, _, rest = path.partition(".")
        self.add_module(name, Nested(rest) if rest else nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return next(self.children())(x)


@pytest.mark.parametrize("path", ["a.q_proj", "b.a_q_proj", "q_proj", "a.b.q_proj", "a.q-proj", "a.q_proj2"])
def test_a_literal_pattern_finds_what_peft_finds(path: str, tmp_path: Path) -> None:
    keys = ["q_proj", "_proj", "proj", "a.q_proj", r"a\.q_proj", "^a.q_proj", "^q_proj", "q_proj$", "x.a.q_proj", "q"]
    keys += [r"q\-proj", "a.b.q_proj", "^a.q_proj$", "q.proj"]
    theirs(tmp_path, peft.LoraConfig(target_modules=[path], r=2, lora_alpha=1), model=Nested(path))
    for key in keys:
        change_settings(tmp_path, alpha_pattern={key: 7})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The following alpha_pattern keys did not match")
            wanted = peft.PeftModel.from_pretrained(Nested(path), tmp_path).get_submodule(f"base_model.model.{path}")
        model = Nested(path)
        assert ll.load_peft(model, tmp_path).config.scaling == wanted.scaling["default"], key


@pytest.mark.parametrize(
    ("cls", "field"),
    [(cls, f.name) for cls in (peft.LoraConfig, peft.IA3Config) for f in dataclasses.fields(cls)],
)
def test_no_field_of_peft_passes_unseen(cls: Any, field: str, tmp_path: Path) -> None:
    """Each is read, or says nothing about the outputs, or is refused."""
    where = {"target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform", "layers_pattern"}
    where |= {"base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "rank_pattern"}
    how = {"inference_mode", "runtime_config", "megatron_core", "fan_in_fan_out", "qalora_group_size"}
    how |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "init_ia3_weights"}
    theirs(tmp_path, KINDS["lora" if cls is peft.LoraConfig else "ia3"]())
    change_settings(tmp_path, **{field: {"(odd)": 1}})
    if field in where | how:
        ll.load_peft(tiny_llama(bias=True), tmp_path)
    else:
        refused(tmp_path, r"odd")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda held: {**held, "base_model.model.lm_head.weight": torch.ones(2)}, r"lm_head.weight is \(2,\), and"),
        (lambda held: {**held, "base_model.model.lm_head.scales": torch.ones(2)}, r"1 of its 13 tensors have no place"),
        (lambda held: {**held, "base_model.model.head.weight": torch.ones(2)}, r"1 of its 1 whole tensors are not in"),
        (
            lambda held: {**held, "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2)},
            "embed_tokens.lora_B",
        ),
        (
            lambda held: {**held, f"base_model.model.{DOWN}.lora_B.bias": torch.ones(64)},
            r"unexpected keys.*\n.*lora_bias",
        ),
        (lambda held: {**held, f"base_model.model.{DOWN}.lora_magnitude_vector": torch.ones(64)}, r"unexpected keys"),
        (lambda held: {**held, f"{DOWN}.lora_A.weight": torch.ones(4, 128)}, r"1 of its 13 tensors"),
        (lambda held: dict(list(held.items())[1:]), r"1 missing keys; 11 tensors where 12 are wanted"),
        (lambda held: {}, r"0 of its 0 tensors"),
        (
            lambda held: {k.replace("layers.1", "layers.7"): t for k, t in held.items()},
            r"are not in this LlamaForCausalLM",
        ),
        (lambda held: {k.replace(".q_proj", ""): t for k, t in held.items()}, r"is no linear layer .* LlamaAttention"),
        (lambda held: {k: t.int() for k, t in held.items()}, r"is stored as I32; wanted floats"),
        (lambda held: {k: t * math.nan for k, t in held.items()}, r"hold NaN"),
        (lambda held: {k: t[0] for k, t in held.items()}, r"wrong shapes"),
        (lambda held: {k: t[:3] for k, t in held.items()}, r"down_proj.lora_B \(3, 4\), wanted \(64, 3\)"),
        (lambda held: {k: t[:0] if "A" in k else t[:, :0] for k, t in held.items()}, r"has tensors of rank 0, and r"),
    ],
)
def test_every_tensor_has_a_place_or_is_an_error(edit: Any, message: str, tmp_path: Path) -> None:
    theirs(tmp_path, lora())
    change_tensors(tmp_path, edit)
    refused(tmp_path, message)


def test_an_ia3_vector_of_another_shape(tmp_path: Path) -> None:
    theirs(tmp_path, KINDS["ia3"]())
    change_tensors(tmp_path, lambda held: {key: t[:3] for key, t in held.items()})
    refused(tmp_path, r"wrong shapes(.|\n)*k_proj.lora_l \(3, 1\), wanted \(32, 1\)")


def test_an_ia3_vector_that_could_be_either(tmp_path: Path) -> None:
    cfg = peft.IA3Config(target_modules=["proj"], feedforward_modules=[])
    theirs(tmp_path, cfg, model=OneLinear(1, 1))
    refused(tmp_path, r"proj.ia3_l is \(1, 1\), so it could scale input or output", model=OneLinear(1, 1))


def test_an_embedding_among_the_targets_and_whole_modules_beside(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs(tmp_path / "b", lora(target_modules=["embed_tokens", "q_proj"]))
    # PEFT adds the embedding's own weight, which is compared with this model's.
    assert "model.embed_tokens" in ll.load_peft(tiny_llama(bias=True), tmp_path / "b").targets
    theirs(tmp_path / "c", lora(modules_to_save=["lm_head"]))
    model = tiny_llama(bias=True)
    assert ll.load_peft(model, tmp_path / "c").variant == "lora + full"
    assert_close(logits(model), logits(opened(tmp_path / "c")))


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_rewritten_base_must_be_dense(kind: str, tiny: str, tmp_path: Path) -> None:
    folder = theirs(tmp_path / "a", REWRITTEN[kind](), model=ll.load_base(tiny))
    refused(folder, "and this one is nf4", ll.QuantizedWeightError, model=quantized(tiny, "nf4"))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "lora_ga"])
def test_a_folder_that_peft_converted_is_a_plain_lora(init: str, tmp_path: Path) -> None:
    more: Any = {"lora_ga_config": peft.LoraGAConfig()} if init == "lora_ga" else {}
    base, cfg = tiny_llama(bias=True), lora(init_lora_weights=init, **more)
    if init == "lora_ga":
        preprocess_loraga(base, cfg, lambda: loss_of(base).backward())
        base.zero_grad()
    model = peft.get_peft_model(base, cfg)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.2)
    model.save_pretrained(tmp_path / "unconverted")
    if init not in ("pissa", "olora"):  # what their init took out can be made again
        refused(tmp_path / "unconverted", r"wrote the base.*\n  make a plain LoRA of it: .*path_initial_model")
    is_told = pytest.warns(UserWarning, match="changes the base weights")
    with is_told if init in ("pissa", "olora") else nullcontext():
        model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=tmp_path / "initial")
    mine = tiny_llama(bias=True)
    adapter = ll.load_peft(mine, tmp_path / "a")
    assert (adapter.variant, adapter.config.r) == ("lora", 8)
    torch.testing.assert_close(logits(mine), logits(model.eval()), rtol=1e-4, atol=1e-5)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    theirs(tmp_path, lora())
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    refused(tmp_path, r"adapter_model.bin is a pickle, which is never opened: it can run code\n.*safe_serialization")
    (tmp_path / "adapter_model.bin").rename(tmp_path / "elsewhere.bin")
    refused(tmp_path, r"is no adapter folder of PEFT: wanted adapter_model.safetensors and adapter_config.json")


# ---- saving -------------------------------------------------------------------------------------

OURS: dict[str, Any] = {
    "lora": {"alpha": 6.0},
    "lora_patterns": {"rslora": True, "per_layer": {"down_proj": {"r": 3}, r"1\.mlp\.down": {"alpha": 2.5}}},
    "dora": {"alpha": 6.0, "dropout": 0.1, "per_layer": {r"\.0\.": {"r": 3, "alpha": None}}},
    "ia3": {},
    "ia3_ff": {},
}


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("where", [r"(q|down)_proj$", r"layers\.1\..*(v|o)_proj", r"lm_head|\.0\.mlp"])
def test_ours_opens_in_peft_and_transformers(kind: str, where: str, tmp_path: Path) -> None:
    model = tiny_llama(bias=True)
    fields = OURS[kind] if "down" in where else {}
    adapter = ll.attach(model, config(kind.removesuffix("_patterns"), target_names=where, **fields))
    perturb(adapter, 0.2)
    ll.save_peft(model, tmp_path)
    other = opened(tmp_path)
    found = {plain_key(key).rpartition(".")[0] for key in load_file(tmp_path / WEIGHTS)}
    assert found == set(adapter.targets)
    assert_close(logits(other), logits(model))
    assert not torch.allclose(logits(model), logits(tiny_llama(bias=True)), atol=1e-3)
    direct = tiny_llama(bias=True)
    info = direct.load_adapter(str(tmp_path))
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert not info.mismatched_keys
    assert_close(logits(direct), logits(model))
    twin = tiny_llama(bias=True)
    ll.load_peft(twin, tmp_path)
    assert torch.equal(logits(twin), logits(model))


class Twice(nn.Module):
    """`net.0` is the end of `twin.net.0`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.twin = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.twin["net"](x))


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (r"0$", ["0"]),
        (r"twin\.net\.0$", ["twin.net.0"]),
        (r"^net\.0$", r"net\.0"),
        (r"^net\.0$|twin\.net\.1", r"net\.0|twin\.net\.1"),
    ],
)
def test_target_modules_reach_exactly_the_layers(names: str, wanted: Any, tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    for variant in ("lora", "ia3", "ia3_ff"):
        fields = {"r": 2} if variant == "lora" else {}
        model = Twice()
        perturb(ll.attach(model, config(variant, target_names=names, **fields)), 0.3)
        ll.save_peft(model, tmp_path)
        assert settings(tmp_path)["target_modules"] == wanted
        torch.testing.assert_close(opened(tmp_path, Twice())(x), model(x))


def test_a_feed_forward_whose_name_ends_another(tmp_path: Path) -> None:
    """PEFT looks for the ends of feedforward_modules without a dot before them."""

    def made() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict(up_proj=nn.Linear(4, 4), proj=nn.Linear(4, 4), k=nn.Linear(4, 4)))

    model, x = nn.Sequential(OrderedDict(a=made())), torch.randn(3, 4)
    perturb(ll.attach(model, config("ia3", target_names=r"up_proj"), "out"), 0.3)
    perturb(ll.attach(model, config("ia3_ff", target_names=r"\.proj"), "in"), 0.3)
    ll.save_peft(model, tmp_path, ["out", "in"])
    assert settings(tmp_path)["feedforward_modules"] == ["a.proj"]
    torch.testing.assert_close(opened(tmp_path, nn.Sequential(OrderedDict(a=made())))(x), model(x))


def test_two_kinds_of_ia3_make_one_adapter(tmp_path: Path) -> None:
    model = tiny_llama(bias=True)
    perturb(ll.attach(model, config("ia3", target_names=r"(k|v)_proj$"), "kv"), 0.2)
    perturb(ll.attach(model, config("ia3_ff", target_names=r"down_proj$"), "ff"), 0.2)
    ll.save_peft(model, tmp_path, ["ff", "kv"])
    assert settings(tmp_path)["feedforward_modules"] == ["down_proj"]
    assert settings(tmp_path)["target_modules"] == ["down_proj", "k_proj", "v_proj"]
    assert_close(logits(opened(tmp_path)), logits(model))
    perturb(ll.attach(model, config("ia3_ff", target_names=r"k_proj$"), "both"), 0.2)
    with pytest.raises(ll.CheckpointError, match=r"PEFT has no adapter like 'kv' \(ia3\), 'both' \(ia3_ff\)"):
        ll.save_peft(model, tmp_path, ["kv", "both"])


def test_an_ia3_of_two_kinds_goes_back_whole(tmp_path: Path) -> None:
    """Loaded under one name, saved under it; through our own files too."""
    theirs(tmp_path / "a", KINDS["ia3_both"]())
    model = tiny_llama(bias=True)
    ll.load_peft(model, tmp_path / "a", name="fr")
    ll.save_peft(model, tmp_path / "b", "fr")
    assert same_tensors(tmp_path / "a", tmp_path / "b")
    assert_close(logits(opened(tmp_path / "b")), logits(opened(tmp_path / "a")))
    fresh = tiny_llama(bias=True)
    ll.save(model, tmp_path / "fr.safetensors", "fr")
    ll.load(fresh, tmp_path / "fr.safetensors", "fr")
    ll.save_peft(fresh, tmp_path / "c", "fr")
    assert same_tensors(tmp_path / "a", tmp_path / "c")


def test_a_16_bit_dora_gives_peft_the_same_outputs(tmp_path: Path) -> None:
    """Its norms are rounded here, and not there."""
    model = tiny_llama(bias=True)
    adapter = ll.attach(model, config("dora", dtype=torch.bfloat16))
    ll.save_peft(model, tmp_path)
    assert_close(logits(opened(tmp_path)), logits(tiny_llama(bias=True)))
    perturb(adapter, 0.1)
    ll.save_peft(model, tmp_path)
    assert_close(logits(opened(tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("variant", "fields", "arguments", "error", "message"),
    [
        (
            "pissa",
            {},
            {},
            ll.CheckpointError,
            r"PEFT has no adapter like 'default' \(pissa\)\n  give rank= .* 2r is exact",
        ),
        ("abliteration", {}, {}, ll.CheckpointError, r"no adapter like 'default' \(abliteration\)\n  give rank="),
        ("lora", {}, {"rank": 0}, ll.ConfigError, r"rank=0: wanted an integer"),
        ("lora", {}, {"rank": True}, ll.ConfigError, r"rank=True"),
        ("lora", {}, {"max_error": 0.1}, ll.ConfigError, r"max_error=0.1 with rank=None"),
        ("lora", {}, {"name": []}, ll.ConfigError, r"name=\[\]: wanted one adapter"),
        ("lora", {}, {"name": ["default"] * 2}, ll.ConfigError, r"or several different ones"),
        ("lora", {}, {"name": "fr"}, ll.TargetError, r"no adapter 'fr'"),
        (
            "lora",
            {"per_layer": {"k_proj": {"dropout": 0.1}}},
            {},
            ll.CheckpointError,
            r"rslora and dropout differ by layer",
        ),
        ("ia3", {}, {"rank": 4}, ll.CheckpointError, r"'ia3' changes its bias, which a plain LoRA can't hold"),
    ],
)
def test_what_peft_cant_hold(
    variant: str, fields: Any, arguments: dict[str, Any], error: Any, message: str, tmp_path: Path
) -> None:
    model = tiny_llama(bias=True)
    perturb(attach(model, config(variant, **fields)))
    with pytest.raises(error, match=message):
        ll.save_peft(model, tmp_path / "a", **arguments)
    assert not (tmp_path / "a").exists()


def test_more_that_peft_cant_hold(tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = ll.attach(model, config("lora"))
    adapter.scale = 0.5
    with pytest.raises(ll.CheckpointError, match=r"'default' has a scale, .*\n  set it to 1, or give rank="):
        ll.save_peft(model, tmp_path / "a")
    adapter.scale = 1.0
    (tmp_path / "file").write_text("")
    with pytest.raises(ll.CheckpointError, match="is a file; PEFT's format is a folder"):
        ll.save_peft(model, tmp_path / "file")
    adapter.load_state_dict({key: t * math.nan for key, t in adapter.state_dict().items()})
    with pytest.raises(ll.CheckpointError, match=r"default in memory: .* hold NaN"):
        ll.save_peft(model, tmp_path / "a")
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 128)
    with pytest.raises(ll.CheckpointError, match="2 missing keys"):
        ll.save_peft(model, tmp_path / "a")
    bare = nn.Linear(4, 4)
    ll.attach(bare, config("lora", target_names="^$"))
    with pytest.raises(
        ll.CheckpointError, match="the model itself: PEFT's format holds adapters of named linear layers"
    ):
        ll.save_peft(bare, tmp_path / "a")
    experts = moe("qwen3")
    attach(experts, config("abliteration", target_names="experts"))
    with pytest.raises(ll.CheckpointError, match=r"experts: PEFT's .* fused experts have no place"):
        ll.save_peft(experts, tmp_path / "a", rank=1)
    assert not (tmp_path / "a").exists()


def test_a_save_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    adapter = ll.attach(model, config("lora"))
    ll.save_peft(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {WEIGHTS, CONFIG}
    perturb(adapter)

    def fails(*_: Any, **__: Any) -> bytes:
        raise OSError("no space left on device")

    monkeypatch.setattr("lora_lite.io.peft.save.to_bytes", fails)
    with pytest.raises(OSError, match="no space"):
        ll.save_peft(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- as a plain LoRA ----------------------------------------------------------------------------

EXACT: list[tuple[str, dict[str, Any], int, float]] = [
    ("lora", {"r": 4, "alpha": 6.0}, 4, 1.0),
    ("lora", {"r": 4, "alpha": 6.0}, 4, -0.7),
    ("pissa", {"r": 3}, 6, 1.0),
    ("abliteration", {"rank": 2}, 2, 1.0),
    ("abliteration", {"rank": 1}, 1, 0.5),
    ("abliteration", {"rank": 1, "normalization": "pre"}, 1, 1.0),
    ("abliteration", {"rank": 1, "normalization": "full"}, 64, 1.0),
    ("abliteration", {"rank": 1, "normalization": "column"}, 64, 1.0),
    ("dora", {"r": 4}, 64, 1.0),
    ("ia3", {}, 64, 1.0),
    ("ia3_ff", {}, 64, 0.5),
]


def without_bias(variant: str, fields: dict[str, Any]) -> tuple[Any, ll.Adapter]:
    model = tiny_llama(bias=variant != "ia3")
    cfg = config(variant, target_names=r"(q|k|down)_proj$", **fields)
    if variant == "abliteration":
        rows = {t.path: torch.randn(cfg.rank, t.d_out) for t in ll.plan(model, cfg)}
        return model, ll.attach(model, cfg, calibration_data={"directions": rows})
    adapter = ll.attach(model, cfg)
    perturb(adapter, 0.2)
    return model, adapter


@pytest.mark.parametrize(("variant", "fields", "rank", "scale"), EXACT)
def test_any_method_is_a_plain_lora_of_enough_rank(
    variant: str, fields: dict[str, Any], rank: int, scale: float, tmp_path: Path, log: list[str]
) -> None:
    model, adapter = without_bias(variant, fields)
    adapter.scale = scale
    ll.save_peft(model, tmp_path, rank=rank, max_error=1e-6)
    other = opened(tmp_path, tiny_llama(bias=variant != "ia3"))
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(model), logits(tiny_llama(bias=variant != "ia3")), atol=1e-3)
    held = settings(tmp_path)
    assert held["use_dora"] is False
    for key, a in load_file(tmp_path / WEIGHTS).items():
        if "lora_A" in key:
            b = load_file(tmp_path / WEIGHTS)[key.replace("lora_A", "lora_B")]
            torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-3, atol=1e-5)  # balanced, and orthogonal
            path = re.escape(plain_key(key).removesuffix(".lora_A"))
            assert held["rank_pattern"].get(f"^{path}", held["r"]) == len(a) == rank
            assert held["alpha_pattern"].get(f"^{path}", held["lora_alpha"]) == len(a)
    assert any("relative error" in line for line in log)
    if rank < 32:
        with pytest.raises(ll.CheckpointError, match=r"at worst \(model.*\n  wanted at most max_error=0.001; nothing"):
            model, _ = without_bias("dora", {"r": 4})
            ll.save_peft(model, tmp_path / "b", rank=rank, max_error=1e-3)
        assert not (tmp_path / "b").exists()


def test_the_error_is_that_of_the_best_matrix_of_the_rank(tmp_path: Path, log: list[str]) -> None:
    model = OneLinear(16, 24, bias=False)
    adapter = ll.attach(model, config("lora", target_names="proj", r=8))
    perturb(adapter, 0.3)
    delta = adapter.state_dict()["proj.lora_B"].double() @ adapter.state_dict()["proj.lora_A"].double()
    s = torch.linalg.svdvals(delta)
    ll.save_peft(model, tmp_path, rank=3)
    wanted = float(s[3:].norm() / s.norm())
    found = re.search(r"relative error (\S+) overall, (\S+) at worst \(proj\)", log[-2])
    assert found
    assert [float(each) for each in found.groups()] == pytest.approx([wanted, wanted], rel=0.1)
    held = load_file(tmp_path / WEIGHTS)
    a, b = (held[f"base_model.model.proj.lora_{x}.weight"].double() for x in "AB")
    assert float((delta - b @ a).norm()) == pytest.approx(float(s[3:].norm()), rel=1e-6)
    with pytest.raises(ll.CheckpointError, match="wanted at most max_error"):
        ll.save_peft(model, tmp_path / "b", rank=3, max_error=wanted * 0.9)
    ll.save_peft(model, tmp_path / "b", rank=3, max_error=wanted * 1.1)


def test_a_stack_is_one_lora(tmp_path: Path) -> None:
    model = tiny_llama(bias=True)
    perturb(ll.attach(model, config("lora", target_names="q_proj", r=2), "one"), 0.2)
    perturb(ll.attach(model, config("pissa", target_names="(q|k)_proj", r=2), "two"), 0.2)
    ll.save_peft(model, tmp_path, ["two", "one"], rank=6, max_error=1e-6)
    torch.testing.assert_close(logits(opened(tmp_path)), logits(model), rtol=1e-4, atol=1e-5)


def test_nothing_changed_is_a_lora_of_zeros(tmp_path: Path) -> None:
    model = tiny_llama()
    ll.attach(model, config("lora"))
    ll.save_peft(model, tmp_path, rank=2, max_error=0.0)
    assert not any(t.any() for key, t in load_file(tmp_path / WEIGHTS).items())


def test_an_export_from_a_4_bit_base_is_against_its_values(tiny: str, tmp_path: Path) -> None:
    model = quantized(tiny, "nf4")
    perturb(ll.attach(model, config("lora", target_names="q_proj", r=2)), 0.2)
    ll.save_peft(model, tmp_path, rank=2, max_error=1e-6)
    delta = {}
    for where, source in (
        ("peft", load_file(tmp_path / WEIGHTS)),
        ("ours", ll.adapters(model)["default"].state_dict()),
    ):
        held = {plain_key(key): t.float() for key, t in source.items()}
        path = "model.layers.1.self_attn.q_proj"
        delta[where] = held[f"{path}.lora_B"] @ held[f"{path}.lora_A"]
    torch.testing.assert_close(delta["peft"], delta["ours"], rtol=1e-4, atol=1e-6)


def test_factors_of_a_matrix_with_less_and_with_more_rank() -> None:
    low = torch.randn(40, 3, dtype=torch.float64) @ torch.randn(3, 30, dtype=torch.float64)
    full = torch.randn(40, 30, dtype=torch.float64)
    for matrix in (low, full):
        a, b = low_rank_factors(matrix, 5)
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(b @ a, (u[:, :5] * s[:5]) @ vt[:5], rtol=1e-8, atol=1e-8)
