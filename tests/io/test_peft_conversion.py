"""Folders for models whose checkpoints transformers converts: PEFT reads them as they are meant, or none is written."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import IDS, attach, config, moe, perturb, tiny_llama
from safetensors.torch import load_file

import lora_lite as ll
from lora_lite.io.peft.conversion import moved_keys, named_like_experts, old_keys

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DENSE_THEN_SPARSE = {"mlp_layer_types": ["dense", "sparse"], "num_experts": 4, "head_dim": 16}
DEEPSEEK = {"first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
}
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 24,
    "num_experts": 4,
    "head_dim": 16,
}
ERNIE = {"moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1, "moe_layer_start_index": 1}
MODELS: dict[str, dict[str, Any]] = {
    "Glm4Moe": DEEPSEEK,
    "DeepseekV3": DEEPSEEK | LATENT,
    "Qwen3Next": DELTA_NET,
    "Cohere2Moe": DENSE_THEN_SPARSE,
    "Ernie4_5_Moe": ERNIE,
}
"""Model types whose dense layers and shared experts PEFT takes for fused experts; one has layers of two kinds."""
LAGUNA = DENSE_THEN_SPARSE | {"shared_expert_intermediate_size": 16, "num_attention_heads_per_layer": [2, 2]}
LIKE_EXPERTS = r"(gate|up|down)_proj$"


def made(name: str) -> Any:
    torch.manual_seed(0)
    fields = SIZES | (LAGUNA if name == "Laguna" else MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**fields))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=IDS).logits
    return out


def opened(folder: Path, model: Any) -> Any:
    """PEFT's model with the folder, whose keys all had a place."""
    wrapped = peft.PeftModel.from_pretrained(model, folder)
    result = wrapped.load_adapter(folder, "again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "again" in key]
    return wrapped.eval()


def settings(folder: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return held


# PEFT warns of patterns for parameters, and applies them: it looks for their paths among the modules.
unmatched = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")


@unmatched
@pytest.mark.parametrize(
    "fields", [{}, {"rslora": True, "per_layer": {"down_proj": {"r": 2}, "up_proj": {"alpha": 3.0}}}]
)
@pytest.mark.parametrize("name", MODELS)
def test_a_lora_on_dense_layers_and_shared_experts(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = made(name)
    base = logits(model)
    adapter = ll.attach(model, config("lora", r=4, alpha=6.0, **fields))
    perturb(adapter, 0.1)
    ll.save_peft(model, tmp_path)
    wanted = logits(model)
    assert float((wanted - base).abs().max()) > 1e-2
    torch.testing.assert_close(logits(opened(tmp_path, made(name))), wanted, rtol=1e-5, atol=1e-5)
    direct = made(name)
    info = direct.load_adapter(str(tmp_path))
    assert not info.missing_keys
    assert not info.unexpected_keys
    torch.testing.assert_close(logits(direct), wanted, rtol=1e-5, atol=1e-5)
    by_weight = settings(tmp_path)["target_parameters"]
    assert by_weight == sorted(f"{path}.weight" for path in adapter.targets if re.search(LIKE_EXPERTS, path))
    twin = made(name)
    again = ll.load_peft(twin, tmp_path)
    assert torch.equal(logits(twin), wanted)
    ll.save_peft(twin, tmp_path / "again")
    assert settings(tmp_path / "again") == settings(tmp_path)
    assert again.targets == adapter.targets


@pytest.mark.parametrize("name", MODELS)
def test_other_layers_are_written_as_ever(name: str, tmp_path: Path) -> None:
    for variant in ("lora", "dora"):
        model = made(name)
        perturb(ll.attach(model, config(variant, exclude_names=LIKE_EXPERTS, dropout=0.1)), 0.1)
        ll.save_peft(model, tmp_path)
        assert "target_parameters" not in settings(tmp_path)
        model.eval()
        torch.testing.assert_close(logits(opened(tmp_path, made(name))), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_what_has_no_place_on_a_weight_is_refused(name: str, tmp_path: Path) -> None:
    for variant, fields, lacks in (("dora", {}, "DoRA"), ("lora", {"dropout": 0.1}, "dropout")):
        model = made(name)
        adapter = ll.attach(model, config(variant, **fields))
        perturb(adapter, 0.1)
        lost = [path for path in adapter.targets if re.search(LIKE_EXPERTS, path)]
        message = (
            rf"PEFT would lose {len(lost)} of these {len(adapter.targets)} layers .* onto this {name}ForCausalLM\n"
            rf"  {lost[0]}, .*\n"
            rf"  it takes their names for fused experts', and has no {lacks} on a weight by its name\n"
            r"  keep it as our file \(lora_lite.save\), merge it, leave .* \(exclude_names\), or give rank= to write"
        )
        with pytest.raises(ll.CheckpointError, match=message):
            ll.save_peft(model, tmp_path / "a")
        assert not (tmp_path / "a").exists()
    ll.save_peft(model, tmp_path / "b", rank=8, max_error=1e-5)  # the cure
    torch.testing.assert_close(logits(opened(tmp_path / "b", made(name))), logits(model), rtol=1e-4, atol=1e-5)


@unmatched
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_peft_itself_loses_such_layers(tmp_path: Path) -> None:
    """The reason for all of this: where PEFT mends it, this says so."""
    model = made("Glm4Moe")
    perturb(ll.attach(model, config("lora")), 0.1)
    ll.save_peft(model, tmp_path)
    held = settings(tmp_path)
    names = {name.removesuffix(".weight") for name in held.pop("target_parameters")}
    held["target_modules"] += sorted(names)
    (tmp_path / "adapter_config.json").write_text(json.dumps(held))
    other = peft.PeftModel.from_pretrained(made("Glm4Moe"), tmp_path)
    assert float((logits(other) - logits(model)).abs().max()) > 1e-2


SHARED = "model.layers.1.mlp.shared_experts"


@unmatched
@pytest.mark.parametrize("rank", [None, 8])
def test_keys_that_peft_would_rename_are_those_of_an_old_checkpoint(rank: int | None, tmp_path: Path) -> None:
    """transformers takes `shared_experts` for the `shared_expert.` of old ones, and adds a dot."""
    model = made("Laguna")
    base = logits(model)
    fields = {"r": 4, "alpha": 6.0, "per_layer": {"shared_experts.*down_proj": {"r": 2, "alpha": 5.0}}}
    adapter = ll.attach(model, config("lora", **fields))
    perturb(adapter, 0.1)
    wanted = logits(model)
    ll.save_peft(model, tmp_path, rank=rank)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    old = [key for key in keys if ".mlp.shared_expert." in key]
    assert (len(old), any("shared_experts" in key for key in keys)) == (6, False)
    assert float((wanted - base).abs().max()) > 1e-2
    torch.testing.assert_close(logits(opened(tmp_path, made("Laguna"))), wanted, rtol=1e-4, atol=1e-5)
    direct = made("Laguna")
    info = direct.load_adapter(str(tmp_path))
    assert not info.missing_keys
    assert not info.unexpected_keys
    torch.testing.assert_close(logits(direct), wanted, rtol=1e-4, atol=1e-5)
    twin = made("Laguna")
    assert ll.load_peft(twin, tmp_path).targets == adapter.targets
    torch.testing.assert_close(logits(twin), wanted, rtol=1e-4, atol=1e-5)
    if rank is None:
        assert torch.equal(logits(twin), wanted)


@pytest.mark.parametrize("rank", [None, 8])
def test_keys_that_no_old_name_leads_to_are_refused(
    rank: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lora_lite.io.peft.lora.old_keys", lambda root, moved: {})
    model = made("Laguna")
    perturb(ll.attach(model, config("lora")), 0.1)
    message = (
        r"PEFT would lose 3 of these \d+ layers .* onto this LagunaForCausalLM\n"
        r"  model.layers.1.mlp.shared_experts.gate_proj, model.layers.1.mlp.shared_experts.up_proj, .*\n"
        r"  it reads their keys as an old checkpoint's: the first would go to .*.mlp.shared_experts\.\.gate_proj\n"
        r"  keep it as our file \(lora_lite.save\), merge it, leave these layers out \(exclude_names\)$"
    )
    with pytest.raises(ll.CheckpointError, match=message):
        ll.save_peft(model, tmp_path / "a", rank=rank)
    assert not (tmp_path / "a").exists()
    ll.detach(model)
    perturb(ll.attach(model, config("lora", exclude_names="shared_experts")), 0.1)
    ll.save_peft(model, tmp_path / "a")
    torch.testing.assert_close(logits(opened(tmp_path / "a", made("Laguna"))), logits(model), rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_read_and_not_called_is_refused(tmp_path: Path) -> None:
    """PEFT adapts a layer's call, which there never comes: its own folder would do nothing."""
    fields = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 8}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**fields))
    ll.attach(model, config("lora", target_names=r"(dt|in)_proj$"))
    message = r"0\.mixer\.dt_proj: PEFT adapts the call of a layer, and here the model reads its weight without"
    with pytest.raises(ll.CheckpointError, match=message):
        ll.save_peft(model, tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "llama"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_models_that_peft_reads_as_they_are(kind: str, variant: str, tmp_path: Path) -> None:
    """Attention of mixtures of experts; a Llama's MLP has the same names, and is no mixture."""
    model = tiny_llama() if kind == "llama" else moe(kind)
    adapter = ll.attach(model, config(variant))
    assert len(adapter.targets) == (14 if kind == "llama" else 8)
    perturb(adapter, 0.1)
    ll.save_peft(model, tmp_path)
    assert "target_parameters" not in settings(tmp_path)
    fresh = tiny_llama() if kind == "llama" else moe(kind)
    torch.testing.assert_close(logits(opened(tmp_path, fresh)), logits(model), rtol=1e-5, atol=1e-5)


def test_ia3_is_not_converted(tmp_path: Path) -> None:
    model = made("Glm4Moe")
    perturb(ll.attach(model, config("ia3", target_names=r"k_proj|v_proj|up_proj")), 0.2)
    ll.save_peft(model, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(made("Glm4Moe"), tmp_path).eval()
    torch.testing.assert_close(logits(wrapped), logits(model), rtol=1e-5, atol=1e-5)


def test_without_peft_the_names_are_a_sign_by_themselves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder is as right where PEFT isn't installed. Qwen2-MoE's shared expert is one that PEFT leaves alone."""
    shared = transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(**SIZES, num_experts=4, shared_expert_intermediate_size=16)
    ).eval()
    paths = ["model.layers.0.mlp.shared_expert.up_proj", "model.layers.0.self_attn.q_proj"]
    assert named_like_experts(shared, paths) == []
    names = named_like_experts(made("Glm4Moe"), made("Glm4Moe").state_dict())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        assert named_like_experts(shared, paths) == paths[:1]
        assert named_like_experts(made("Glm4Moe"), made("Glm4Moe").state_dict()) == names
        assert named_like_experts(tiny_llama(), ["model.layers.0.mlp.up_proj"]) == []
        perturb(ll.attach(shared, config("lora")), 0.1)
        ll.save_peft(shared, tmp_path)
    assert settings(tmp_path)["target_parameters"]
    wanted = logits(shared)
    ll.detach(shared)
    torch.testing.assert_close(logits(opened(tmp_path, shared)), wanted, rtol=1e-5, atol=1e-5)


def test_a_key_that_loses_its_start_is_no_moved_one() -> None:
    assert moved_keys(tiny_llama(), ["model.layers.0.mlp.up_proj"]) == {}
    assert moved_keys(torch.nn.Linear(2, 2), [""]) == {}
    path = f"{SHARED}.up_proj"
    assert moved_keys(made("Laguna"), [path]) == {path: f"{SHARED}..up_proj"}
    assert old_keys(made("Laguna"), [path]) == {path: "model.layers.1.mlp.shared_expert.up_proj"}
    assert moved_keys(made("Glm4Moe"), [path]) == {}


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.1.mlp.experts.gate_up_proj"],
        ["model.layers.7.mlp.up_proj.weight"],
        "up_proj.weight",
        [["model.layers.0.mlp.up_proj.weight"]],
        [None],
    ],
)
def test_target_parameters_of_other_things_are_refused(names: Any, tmp_path: Path) -> None:
    model = made("Glm4Moe")
    ll.attach(model, config("lora"))
    ll.save_peft(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings(tmp_path) | {"target_parameters": names}))
    with pytest.raises(ll.CheckpointError, match=r"target_parameters=.* can't be kept here, and nothing is dropped"):
        ll.load_peft(made("Glm4Moe"), tmp_path)


def test_a_weight_that_is_packed_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    folder = tmp_path / "base"
    made("Glm4Moe").save_pretrained(folder)
    fourbit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=fourbit)
    ll.attach(model, config("lora"))
    message = r"has no adapter on a packed weight by its name\n  keep it .*, leave these layers out \(exclude_names\)$"
    with pytest.raises(ll.CheckpointError, match=message):
        ll.save_peft(model, tmp_path / "a")
    ll.detach(model)
    attach(model, config("lora", exclude_names=LIKE_EXPERTS))
    ll.save_peft(model, tmp_path / "a")
    assert load_file(tmp_path / "a" / "adapter_model.safetensors")
