"""LoRA with a bias of its own, PEFT's lora_bias: what a constant in a low-rank update asks of all that knows LoRA."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, OneLinear, config, perturb, tiny_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_lite as ll

CFG = config("lora", r=3, bias=True, alpha=5.0)


def biased(model: Any, cfg: Any = CFG) -> ll.Adapter:
    adapter = ll.attach(model, cfg)
    perturb(adapter, 0.2)
    return adapter


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.detach()


def test_a_fresh_one_is_the_identity_and_a_file_keeps_it(tmp_path: Path) -> None:
    model, fresh = tiny_llama(), tiny_llama()
    base = logits(model)
    adapter = ll.attach(model, CFG)
    assert torch.equal(logits(model), base)
    perturb(adapter, 0.2)
    ll.save(model, tmp_path / "a.safetensors")
    loaded = ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh), logits(model))
    assert loaded.config.bias
    with ll.scaled(fresh, 0.0):
        assert torch.equal(logits(fresh), base)


def test_without_it_a_file_is_as_it_was_before_there_was_one() -> None:
    assert "bias" not in ll.LoRAConfig().to_dict()
    assert "bias" not in ll.DoRAConfig().to_dict()
    assert ll.LoRAConfig.from_dict(ll.LoRAConfig().to_dict()) == ll.LoRAConfig()
    assert ll.LoRAConfig.from_dict(CFG.to_dict()).bias


def test_it_may_be_at_some_layers_alone() -> None:
    model = tiny_llama()
    adapter = ll.attach(model, config("lora", per_layer={"q_proj": {"bias": True}}))
    assert {key.split(".")[-2] for key in adapter.state_dict() if key.endswith("bias")} == {"q_proj"}


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_merge_puts_it_into_the_layers_bias(has_bias: bool) -> None:
    model, x = OneLinear(bias=has_bias), torch.randn(4, 16)
    biased(model, config("lora", target_names="proj", bias=True, alpha=5.0))
    wanted = model(x).detach()
    ll.merge(model, keep=False)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    assert model.proj.bias is not None


class Others(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv1d, self.conv = nn.Embedding(9, 4), Conv1D(6, 4), nn.Conv1d(6, 4, 3, padding=1, groups=2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.conv(self.conv1d(self.emb(ids)).mT)


def test_on_other_layers_it_is_added_once_to_each_output() -> None:
    torch.manual_seed(0)
    model, ids = Others(), torch.tensor([[1, 2, 3], [4, 1, 0]])
    adapter = ll.attach(model, ll.LoRAConfig(r=2, kinds=("linear", "conv", "embedding"), bias=True, alpha=3.0))
    before, values = model(ids), {path: torch.randn(view.out_features) for path, view in adapter.views().items()}
    with torch.no_grad():
        for path, value in values.items():
            model.get_parameter(f"{path}.lora_bias").copy_(value)
    base = Others()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" not in k})
    h = base.conv1d(base.emb(ids) + 1.5 * values["emb"]) + 1.5 * values["conv1d"]
    wanted = base.conv(h.mT) + 1.5 * values["conv"][:, None]
    torch.testing.assert_close(model(ids), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, wanted)


def test_a_history_keeps_it_in_tensors_of_its_own() -> None:
    model = tiny_llama()
    biased(model)
    with ll.scaled(model, 0.7):
        wanted = logits(model)
    ll.freeze_into(model, c=0.7)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    assert ll.history(model)[0].ranks == dict.fromkeys(ll.adapters(model)["history"].targets)


def test_no_weight_holds_it() -> None:
    """While it is 0, a weight could stand for it; once it is trained, none does."""
    attention = nn.MultiheadAttention(4, 2)
    for layer in ("out_proj", "in_proj_weight"):
        with pytest.raises(ll.TargetError, match=rf"{layer}: 'lora' adds a constant, and no weight holds one\n  leave"):
            ll.attach(attention, ll.LoRAConfig(r=2, target_names=layer, bias=True))
    assert not ll.adapters(attention)
    ll.attach(attention, ll.LoRAConfig(r=2, bias=True, per_layer={".": {"bias": False}}))
    together = {"target_names": "embed_tokens", "kinds": "embedding", "tied_weights": "together"}
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.raises((ll.VariantError, ll.TargetError), match="adds a constant"):
        ll.attach(model, ll.LoRAConfig(r=2, bias=True, **together))
        logits(model)  # fresh


@pytest.mark.slow  # dynamo is imported
def test_a_graph_refuses_it_on_a_convolution_at_the_first_step() -> None:
    """In a process of its own, without the shape checks of the tests, which no graph can hold."""
    script = """
import torch, lora_lite as ll
for cfg in (ll.FullConfig(target_names=""), ll.BiasConfig(), ll.LoRAConfig(r=2, bias=True, kinds="conv")):
    model = torch.nn.Sequential(torch.nn.Conv1d(4, 6, 3))
    ll.attach(model, cfg)
    torch._dynamo.reset()
    try:
        torch.compile(model, backend="eager")(torch.randn(2, 4, 9))
    except Exception as error:
        print(str(error).splitlines()[:2])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    refused = result.stdout.splitlines()
    assert len(refused) == 3, result.stderr[-2000:]
    for line, name in zip(refused, ("full", "bias", "lora"), strict=True):
        assert f"{name!r} adds a constant, and no weight holds one" in line
        assert "as under torch.compile" in line


def test_what_has_none() -> None:
    with pytest.raises(ll.ConfigError, match=r"DoRAConfig\(bias=True\): wanted False"):
        ll.DoRAConfig(bias=True)
    not_bool: Any = 1
    with pytest.raises((ll.ConfigError, TypeError)):
        ll.LoRAConfig(bias=not_bool)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (ll.LoRAConfig(r=2, kinds="embedding", target_names="emb", bias=True), "emb: PEFT has no lora_bias on it"),
        (ll.LoRAConfig(r=2, target_names="conv1d", bias=True), ""),
    ],
)
def test_what_peft_has_no_bias_on_is_not_written(cfg: Any, message: str, tmp_path: Path) -> None:
    model = Others()
    ll.attach(model, cfg)
    if not message:
        ll.save_peft(model, tmp_path / "peft")
        return
    with pytest.raises(ll.CheckpointError, match=message):
        ll.save_peft(model, tmp_path / "peft")


def test_one_that_differs_by_layer_is_not_written(tmp_path: Path) -> None:
    model = tiny_llama()
    ll.attach(model, config("lora", per_layer={"q_proj": {"bias": True}}))
    with pytest.raises(ll.CheckpointError, match="bias differ by layer"):
        ll.save_peft(model, tmp_path / "peft")
