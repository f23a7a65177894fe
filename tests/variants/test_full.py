"""full, norm, bias and tokens against the layers themselves, unfrozen."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import IDS, perturb, quantized, tiny_folder, tiny_llama
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForSequenceClassification,
)

import lora_lite as ll


class Everything(nn.Module):
    """A layer of each kind, with a bias where it may have one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12, padding_idx=0)
        self.conv = nn.Conv1d(12, 8, 3, padding=1, groups=2)
        self.ln = nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8)
        self.proj = nn.Linear(8, 6)
        self.head = nn.Linear(6, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).mT).mT
        return self.head(self.proj(self.rms(F.gelu(self.ln(x)))))


def randomized(model: Any) -> Any:
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


CASES = [
    (ll.FullConfig(target_names="."), {"embed", "conv", "ln", "rms", "proj", "head"}),
    (ll.FullConfig(target_names="proj|ln"), {"proj", "ln"}),
    (ll.NormConfig(), {"ln", "rms"}),
    (ll.BiasConfig(), {"conv.bias", "ln.bias", "proj.bias"}),
]


@pytest.mark.parametrize(("cfg", "unfrozen"), CASES, ids=["full", "some", "norm", "bias"])
def test_it_trains_as_the_layer_itself(cfg: Any, unfrozen: set[str]) -> None:
    """Outputs and gradients, and three steps of SGD with momentum: ΔW moves as W would."""
    ours = randomized(Everything().double())
    plain = copy.deepcopy(ours)
    names = dict(plain.named_parameters())
    chosen = {n: p for n, p in names.items() if n in unfrozen or n.partition(".")[0] in unfrozen}
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    adapter = ll.attach(ours, cfg.__class__(**{**vars(cfg), "dtype": torch.float64}))
    start = {name: parameter.detach().clone() for name, parameter in chosen.items()}
    optimizers = [torch.optim.SGD(m, lr=0.05, momentum=0.9) for m in (adapter.parameters(), chosen.values())]
    ids = torch.tensor([[3, 1, 0, 5], [2, 2, 9, 0]])
    for _ in range(3):
        for model, optimizer in zip((ours, plain), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        grads = {key: tensor.grad for key, tensor in adapter.named_tensors()}
        for name, parameter in chosen.items():
            path, _, kind = name.rpartition(".")
            grad = grads[f"{path}.lora_{kind}"]
            wanted = parameter.grad.mT if path == "embed" else parameter.grad
            torch.testing.assert_close(grad, wanted.reshape(grad.shape))
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours(ids), plain(ids))
    for name, parameter in chosen.items():
        path, _, kind = name.rpartition(".")
        delta = dict(adapter.named_tensors())[f"{path}.lora_{kind}"]
        moved = (parameter - start[name]).detach()
        torch.testing.assert_close(delta.detach(), (moved.mT if path == "embed" else moved).reshape(delta.shape))


@pytest.mark.parametrize("cfg", [case[0] for case in CASES], ids=["full", "some", "norm", "bias"])
def test_it_merges_into_every_kind(cfg: Any, tmp_path: Path) -> None:
    model = randomized(Everything())
    ids = torch.tensor([[3, 1, 0, 5], [2, 2, 9, 0]])
    base = model(ids)
    adapter = ll.attach(model, cfg)
    assert torch.equal(model(ids), base)
    perturb(adapter, 0.3)
    wanted = model(ids)
    assert not torch.allclose(wanted, base, atol=1e-2)
    ll.save(model, tmp_path / "a.safetensors")
    ll.merge(model)
    torch.testing.assert_close(model(ids), wanted, rtol=1e-4, atol=1e-4)
    ll.unmerge(model)
    ll.detach(model)
    ll.load(model, tmp_path / "a.safetensors")
    assert torch.equal(model(ids), wanted)


def test_a_gemma_norm_whose_weight_is_one_less() -> None:
    """y = (1 + w) n(x): Δw is of w, and n(x) isn't divided by anything."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    model: Any = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).eval()  # every w is 0
    twin = copy.deepcopy(model)
    adapter = ll.attach(model, ll.NormConfig())
    assert len(adapter.targets) == 9
    perturb(adapter, 0.3)
    for path, norm in twin.named_modules():
        if path in adapter.targets:
            norm.weight.data += dict(adapter.named_tensors())[f"{path}.lora_weight"].detach()
    torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, rtol=1e-4, atol=1e-5)
    ll.merge(model, keep=False)
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("is_tied", [True, False])
def test_new_tokens(is_tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=is_tied)
    model.resize_token_embeddings(99)
    base, ids = model(IDS).logits, torch.tensor([[96, 3, 98, 97]])
    adapter = ll.attach(model, [ll.LoRAConfig(r=2), ll.TokensConfig(token_ids=(98, 96))])
    assert torch.equal(model(IDS).logits, base)
    perturb(adapter, 0.3)
    twin = copy.deepcopy(model)
    ll.detach(twin)
    delta = dict(adapter.named_tensors())["model.embed_tokens.lora_delta"]  # (d, 2), of 96 and 98
    with torch.no_grad():
        twin.model.embed_tokens.weight[[96, 98]] += delta.mT
    lora = {key: value for key, value in adapter.state_dict().items() if "_proj" in key}
    ll.attach(twin, ll.LoRAConfig(r=2)).load_state_dict(lora)
    torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) is is_tied
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    ll.save(model, tmp_path / "a.safetensors")
    wanted = model(ids).logits
    ll.merge(model)
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    fresh = tiny_llama(tie_word_embeddings=is_tied)
    with pytest.raises(
        ll.CheckpointError, match=r"embed_tokens was saved from a layer with \(d_in, d_out\) = \(99, 64\)"
    ):
        ll.load(fresh, tmp_path / "a.safetensors")
    with pytest.raises(ll.ConfigError, match=r"token_ids has 98.*96 tokens\n  .*resize_token_embeddings"):
        ll.attach(fresh, ll.TokensConfig(token_ids=(98,)))
    with pytest.raises(ll.ConfigError, match="no token_ids"):
        ll.attach(fresh, ll.TokensConfig())


def test_a_quantised_base_keeps_its_codes(tmp_path: Path) -> None:
    model = quantized(tiny_folder(tmp_path / "base"), "nf4")
    base = model(IDS).logits
    adapter = ll.attach(model, ll.FullConfig(target_names="down_proj|norm"))
    assert torch.equal(model(IDS).logits, base)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_classifier_keeps_its_head(kind: str, tmp_path: Path) -> None:
    def fresh() -> Any:
        torch.manual_seed(0)
        if kind == "llama":
            return LlamaForSequenceClassification(
                tiny_llama().config.__class__(**tiny_llama().config.to_dict() | {"num_labels": 3})
            )
        sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return BertForSequenceClassification(BertConfig(**sizes, intermediate_size=48, num_labels=3))

    model = fresh()
    head = "score" if kind == "llama" else "classifier"
    adapter = ll.attach(model, [ll.LoRAConfig(r=4), ll.FullConfig(target_names=rf"^{head}$")])
    labels, optimizer = torch.tensor([0, 2]), torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    model.train()
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    wanted = model(input_ids=IDS).logits
    ll.save(model, tmp_path / "a.safetensors")
    other = fresh().eval()
    ll.load(other, tmp_path / "a.safetensors")
    assert torch.equal(other(input_ids=IDS).logits, wanted)
    assert dict(adapter.named_tensors())[f"{head}.lora_weight"].any()


def test_biases_alone_of_a_model_without_any() -> None:
    with pytest.raises(ll.TargetError, match=r"no layer of kinds=\('linear', 'conv', 'norm'\) has a bias, and 'bias'"):
        ll.attach(nn.Sequential(nn.Linear(4, 4, bias=False)), ll.BiasConfig())
