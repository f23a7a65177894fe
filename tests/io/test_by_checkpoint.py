"""LoRA by the names of checkpoints: each expert by itself, gate apart from up, and the numbers are the adapter's."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import IDS, attach, config, moe, perturb, tiny_llama
from safetensors.torch import load_file
from transformers import HrmTextConfig, HrmTextForCausalLM

import lora_lite as ll
from lora_lite.core.effective import delta_weight

NAMES = {"qwen3": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
         "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2"))}  # fmt: skip
KINDS = ("linear", "experts")


def with_lora(name: str, **fields: Any) -> Any:
    """A mixture of experts with a LoRA on its experts and on q_proj, moved from its start."""
    model = moe(name)
    cfg = ll.LoRAConfig(target_names=["experts", "q_proj"], kinds=KINDS, **({"r": 4, "alpha": 6.0} | fields))
    perturb(ll.attach(model, cfg))
    return model


def hrm() -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return HrmTextForCausalLM(HrmTextConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()


def dense(folder: Path, module: str) -> torch.Tensor:
    """The delta (o, i) of a module as a reader of the folder makes it, in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    assert not settings["use_rslora"]
    values = {}
    for field, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        values[field] = next((v for p, v in settings[patterns].items() if re.match(p + "$", module)), settings[field])
    assert values["r"] == len(a)
    return values["lora_alpha"] / values["r"] * b @ a


@pytest.mark.parametrize("fields", [{}, {"rslora": True}, {"per_layer": {"down_proj": {"r": 2, "alpha": 3.0}}}])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("name", NAMES)
def test_each_expert_has_the_adapters_own_delta(
    name: str, rank: int | None, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = with_lora(name, **fields)
    ll.save_peft(model, tmp_path / "a", rank=rank, per_expert=True)
    block, (gate, up, down) = NAMES[name]
    keys = set(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    for site in ll.adapters(model)["default"].sites():
        start, _, last = site.path.rpartition(".")
        if last == "q_proj":
            wanted = {site.path: delta_weight([site])[0]}
        else:
            deltas = [delta_weight([site], expert)[0] for expert in range(4)]
            start = start.replace("mlp.experts", block)
            parts = {down: slice(None)} if last == "down_proj" else {gate: slice(48), up: slice(48, 96)}
            wanted = {f"{start}.{e}.{part}": deltas[e][rows] for e in range(4) for part, rows in parts.items()}
        for module, delta in wanted.items():
            # The scaling is a float of Python either way; with a rank, factors are of an SVD in float32.
            bound = 1e-12 if rank is None else 1e-6
            assert (dense(tmp_path / "a", module) - delta).norm() <= bound * delta.norm()
            keys -= {f"base_model.model.{module}.lora_{side}.weight" for side in "AB"}
    assert not keys


@pytest.mark.parametrize("per_expert", [False, True])
def test_an_energy_is_that_of_each_expert(per_expert: bool, tmp_path: Path) -> None:
    model = with_lora("qwen3", r=6)
    with torch.no_grad():  # experts that need different ranks
        model.model.layers[0].mlp.experts.lora_down_proj_B[1, :, 1:] *= 1e-3
    ll.save_peft(model, tmp_path / "a", energy=0.9, per_expert=per_expert)
    sites = {site.path: site for site in ll.adapters(model)["default"].sites()}
    ranks = {
        key: len(t) for key, t in load_file(tmp_path / "a" / "adapter_model.safetensors").items() if "lora_A" in key
    }
    assert min(ranks.values()) < 6
    if not per_expert:  # as PEFT has them, one rank for the experts of a layer
        again = moe("qwen3")
        ll.load_peft(again, tmp_path / "a")
        others = {site.path: site for site in ll.adapters(again)["default"].sites()}
    for path in (path for path in sites if path.endswith("down_proj")):
        for expert in range(4):
            delta = delta_weight([sites[path]], expert)[0]
            module = path.replace("experts.down_proj", f"experts.{expert}.down_proj")
            got = dense(tmp_path / "a", module) if per_expert else delta_weight([others[path]], expert)[0]
            assert (got - delta).norm() <= 0.1**0.5 * delta.norm() * 1.001
            assert (got - delta).norm() > 1e-3 * delta.norm()


def test_tensors_are_rows_of_the_adapters_own(tmp_path: Path) -> None:
    model = with_lora("qwen3")
    ll.save_peft(model, tmp_path / "a", per_expert=True)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    site = next(s for s in ll.adapters(model)["default"].sites() if s.path.endswith("0.mlp.experts.gate_up_proj"))
    a, b = site.tensor("lora_A"), site.tensor("lora_B")
    start = "base_model.model.model.layers.0.mlp.experts.3"
    for part, rows in (("gate_proj", slice(48)), ("up_proj", slice(48, 96))):
        assert torch.equal(tensors[f"{start}.{part}.lora_A.weight"], a[3])
        assert torch.equal(tensors[f"{start}.{part}.lora_B.weight"], b[3, rows])


def test_settings_name_modules_as_servers_read_them(tmp_path: Path) -> None:
    ll.save_peft(with_lora("qwen3"), tmp_path / "a", per_expert=True)
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]
    assert "target_parameters" not in settings
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (4, 6, {})


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"
)  # of entries that PEFT adds
def test_peft_itself_reads_it_with_equal_outputs(tmp_path: Path) -> None:
    for name in NAMES:
        model = with_lora(name)
        wanted = model(IDS).logits
        ll.save_peft(model, tmp_path / name, per_expert=True)
        theirs = peft.PeftModel.from_pretrained(moe(name), tmp_path / name).eval()
        assert (moe(name)(IDS).logits - wanted).abs().max() > 0.01
        torch.testing.assert_close(theirs(IDS).logits, wanted, atol=2e-5, rtol=1e-4)


def test_a_plain_model_keeps_its_names(tmp_path: Path) -> None:
    model = tiny_llama()
    perturb(attach(model, config("lora")))
    for folder, per_expert in (("a", True), ("b", False)):
        ll.save_peft(model, tmp_path / folder, per_expert=per_expert)
    ours, plain = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in "ab")
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[key], plain[key]) for key in plain)


def test_a_rank_holds_fused_experts_as_peft_has_them(tmp_path: Path) -> None:
    """Without per_expert: target_parameters, as for a LoRA that is written as it is."""
    model = with_lora("qwen3", rslora=True)
    assert (ll.save_peft(model, tmp_path / "a", rank=4) or 0.0) < 1e-6
    again = moe("qwen3")
    ll.load_peft(again, tmp_path / "a")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=2e-5, rtol=1e-4)


def test_what_has_no_such_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ll.CheckpointError,
        match=r"experts.gate_up_proj: the checkpoints of a GptOssForCausalLM keep its experts in one tensor, .*\n"
        r"  leave it out \(exclude_names\), or write the folder without per_expert",
    ):
        ll.save_peft(with_lora("gpt_oss"), tmp_path / "a", per_expert=True)
    model = tiny_llama()
    attach(model, config("dora"))
    with pytest.raises(ll.CheckpointError, match=r"per_expert is for one LoRA of two factors, and here is 'dora'\n"):
        ll.save_peft(model, tmp_path / "a", per_expert=True)
    model = tiny_llama()
    ll.attach(model, ll.LoRAConfig(r=2, target_names="embed_tokens", kinds="embedding"))
    with pytest.raises(ll.CheckpointError, match=r"embed_tokens: per_expert is for linear layers and fused experts\n"):
        ll.save_peft(model, tmp_path / "a", per_expert=True)
    model = tiny_llama()
    adapter = attach(model, config("lora"))
    adapter.scale = 0.5
    with pytest.raises(ll.CheckpointError, match=r"'default' has a scale, which PEFT can't hold"):
        ll.save_peft(model, tmp_path / "a", per_expert=True)
    assert not (tmp_path / "a").exists()


def test_a_conversion_that_loses_rows_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lora_lite.io.peft import by_checkpoint

    model, as_saved = with_lora("qwen3"), by_checkpoint._as_saved
    monkeypatch.setattr(
        by_checkpoint, "_as_saved", lambda root, tensors: {k: t[:-1] for k, t in as_saved(root, tensors).items()}
    )
    match = r"q_proj: the checkpoints of a Qwen3MoeForCausalLM hold other numbers\n  leave it out"
    with pytest.raises(ll.CheckpointError, match=match):
        ll.save_peft(model, tmp_path / "a", per_expert=True)


def test_layers_that_a_checkpoint_joins_are_refused(tmp_path: Path) -> None:
    """transformers has HRM's gate and up apart, and its checkpoints have them in one: half of that is no module."""
    model = hrm()
    ll.attach(model, ll.LoRAConfig(r=2, target_names="gate_proj"))
    match = (
        r"mlp.gate_proj: the checkpoints of a HrmTextForCausalLM join it with other layers in .*mlp.gate_up_proj.weight"
    )
    with pytest.raises(ll.CheckpointError, match=match):
        ll.save_peft(model, tmp_path / "a", per_expert=True)
