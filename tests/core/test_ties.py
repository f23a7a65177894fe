"""An embedding and a head that are one weight: adapted apart, together, or refused."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import perturb, tiny_llama
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

import lora_lite as ll

IDS = torch.arange(1, 13).reshape(2, 6)
EMBEDDING = {"kinds": ["embedding"], "target_names": ["embed_tokens"], "tied_weights": "together"}


def tied(dtype: torch.dtype = torch.float64) -> Any:
    model = tiny_llama(dtype, tie_word_embeddings=True)
    with torch.no_grad():
        model.lm_head.weight[0].fill_(0.1)  # the padding's row is zero, which DoRA refuses on a head
    return model


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def of_sum(model: Any, delta: torch.Tensor) -> torch.Tensor:
    """Logits of the base with delta (V, d) added to the one weight."""
    weight = {"model.embed_tokens.weight": tied().model.embed_tokens.weight.detach() + delta}
    return torch.func.functional_call(tied(), weight, (IDS,), tie_weights=True).logits


def test_together_both_multiply_by_the_sum() -> None:
    model = tied()
    adapter = ll.attach(model, ll.LoRAConfig(r=3, alpha=6.0, dtype=torch.float64, **EMBEDDING))
    assert torch.equal(logits(model), logits(tied()))
    perturb(adapter, 0.3)
    a, b = adapter.parameters()
    expected = of_sum(model, (2.0 * b @ a).mT)
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)
    gradients = torch.autograd.grad(logits(model).square().sum(), [a, b])
    for got, wanted in zip(gradients, torch.autograd.grad(expected.square().sum(), [a, b]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("cfg", [ll.LoRAConfig, ll.DoRAConfig, ll.PiSSAConfig])
def test_a_merge_of_both_is_what_was_attached(cfg: Any) -> None:
    model = tied()
    perturb(ll.attach(model, cfg(dtype=torch.float64, **EMBEDDING)), 0.3)
    attached, bound = logits(model), 1e-9 if cfg is ll.LoRAConfig else 1e-5  # norms and singular vectors are float32
    ll.merge(model)
    torch.testing.assert_close(logits(model), attached, rtol=bound, atol=bound)
    ll.unmerge(model)
    assert torch.equal(logits(model), attached)
    ll.merge(model, keep=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), attached, rtol=bound, atol=bound)


def test_files_copies_scales_and_detach(tmp_path: Path) -> None:
    model, base = tied(), logits(tied())
    cfg = ll.LoRAConfig(r=3, **EMBEDDING)
    perturb(ll.attach(model, cfg), 0.3)
    attached = logits(model)
    ll.save(model, tmp_path / "a.safetensors")
    fresh = tied()
    ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh), attached)
    ll.restore(fresh, tmp_path / "a.safetensors")
    with ll.scaled(model, 0.0):
        assert torch.equal(logits(model), base)
    perturb(ll.attach(model, ll.LoRAConfig(r=2, **EMBEDDING), "second"), 0.1)
    both = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), both)
        perturb(ll.adapters(other)["second"], 0.1)
        assert not torch.equal(logits(other), both)
        assert torch.equal(logits(model), both)
        ll.detach(other)
        assert torch.equal(logits(other), base)
        assert not any("lora" in key for module in other.modules() for key in vars(module))
    ll.detach(model, "second")
    assert torch.equal(logits(model), attached)
    ll.detach(model)
    assert torch.equal(logits(model), base)
    assert not any("lora" in key for module in model.modules() for key in vars(module))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("is_tied", [True, False])
def test_as_base_is_what_it_was_in_training(is_tied: bool, tmp_path: Path) -> None:
    """On a base of equal numbers that is tied otherwise the outputs would be others: 19 apart, once measured."""
    cfg, path = ll.TokensConfig(token_ids=(1, 5)), tmp_path / "a.safetensors"
    model, alike, other = (tiny_llama(tie_word_embeddings=tied) for tied in (is_tied, is_tied, not is_tied))
    numbers = model.state_dict() | {"lm_head.weight": model.model.embed_tokens.weight}
    for each in (alike, other):
        each.load_state_dict(numbers)
    model.load_state_dict(numbers)
    perturb(ll.attach(model, [cfg, ll.LoRAConfig(r=2)]), 0.3)
    ll.save(model, path)
    ll.load(alike, path)
    assert torch.equal(logits(alike), logits(model))
    words = ("tied", "untied") if is_tied else ("untied", "tied")
    match = f"embed_tokens was trained where its weight is {words[0]}, and in this model it is {words[1]}\n"
    match += f".* tie_word_embeddings={is_tied}"
    with pytest.raises(ll.CheckpointError, match=match):
        ll.load(other, path)
    assert not ll.adapters(other)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ll.CheckpointError, match=match):
        ll.merge_checkpoint(tmp_path / "other", path, tmp_path / "out")
    alike.save_pretrained(tmp_path / "alike")
    perturb(ll.attach(other, [cfg, ll.LoRAConfig(r=2)]), 0.1)
    before = logits(other)
    with pytest.raises(ll.CheckpointError, match=match):
        ll.restore(other, path)
    assert torch.equal(logits(other), before)
    ll.restore(model, path)


def test_apart_is_the_embedding_alone_and_no_merge() -> None:
    model = tied()
    cfg = ll.LoRAConfig(r=3, kinds=["embedding"], target_names=["embed_tokens"])
    assert cfg.tied_weights == "apart"
    assert "tied_weights" not in cfg.to_dict()
    perturb(ll.attach(model, cfg), 0.3)
    hidden = model.model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(logits(model), hidden @ model.model.embed_tokens.weight.T, rtol=1e-12, atol=1e-12)
    with pytest.raises(ll.TargetError, match="shares its weight"):
        ll.merge(model)


def test_an_adapter_apart_beside_one_together() -> None:
    model = tied()
    perturb(ll.attach(model, ll.LoRAConfig(r=3, kinds=["embedding"], target_names=["embed_tokens"]), "apart"), 0.3)
    perturb(ll.attach(model, ll.LoRAConfig(r=3, alpha=6.0, **EMBEDDING)), 0.3)
    hidden = model.model(input_ids=IDS).last_hidden_state
    a, b = (p.double() for p in ll.adapters(model)["default"].parameters())
    weight = model.model.embed_tokens.weight + (b @ a).mT * 2
    torch.testing.assert_close(logits(model), hidden @ weight.T, rtol=1e-6, atol=1e-6)
    with pytest.raises(ll.TargetError, match="shares its weight"):
        ll.merge(model)


def test_a_history_of_it_is_refused() -> None:
    model = tied()
    perturb(ll.attach(model, ll.LoRAConfig(r=3, **EMBEDDING)))
    attached = logits(model)
    with pytest.raises(ll.TargetError, match="a history does not"):
        ll.freeze_into(model)
    assert torch.equal(logits(model), attached)


class Fused(torch.nn.Module):
    """A loss that reads the head's weight, and doesn't call the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(13, 4), torch.nn.Linear(4, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(self.embedding(ids), self.head.weight)


def test_a_holder_whose_weight_is_read_sees_it_too() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(Fused()).requires_grad_(False)
    cfg = ll.LoRAConfig(r=2, kinds="embedding", target_names="embedding", tied_weights="together")
    perturb(ll.attach(model, cfg), 0.5)
    attached = model(IDS[:, :3])
    ll.merge(model)
    torch.testing.assert_close(model(IDS[:, :3]), attached)


def test_a_merge_sees_that_the_weights_were_parted() -> None:
    model = tied()
    perturb(ll.attach(model, ll.LoRAConfig(r=3, **EMBEDDING)), 0.3)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with pytest.raises(ll.TargetError, match="holds another weight by now"):
        ll.merge(model)


def test_adapters_of_the_head_that_read_its_weight_are_refused_in_any_order() -> None:
    head = ll.DoRAConfig(r=2, target_names=["lm_head"])
    model = tied()
    ll.attach(model, ll.LoRAConfig(r=3, **EMBEDDING))
    with pytest.raises(ll.TargetError, match="'dora' reads the weight, which an adapter with tied_weights"):
        ll.attach(model, head, "head")
    model = tied()
    ll.attach(model, head, "head")
    with pytest.raises(ll.TargetError, match="where an adapter reads the weight"):
        ll.attach(model, ll.LoRAConfig(r=3, **EMBEDDING))
    assert list(ll.adapters(model)) == ["head"]


def test_a_lora_of_the_heads_own_stays_beside_it() -> None:
    model = tied()
    perturb(ll.attach(model, ll.LoRAConfig(r=3, **EMBEDDING)), 0.3)
    perturb(ll.attach(model, ll.LoRAConfig(r=2, alpha=2.0, target_names=["lm_head"]), "head"), 0.3)
    wanted = logits(model)
    ll.merge(model, "default", keep=False)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({**EMBEDDING, "tied_weights": "refuse"}, 'lm_head holds its weight as well\n  use tied_weights="apart"'),
        (
            {**EMBEDDING, "kinds": ["embedding", "linear"], "target_names": ["embed_tokens", "lm_head"]},
            "name the embedding alone",
        ),
        ({"target_names": ["lm_head"], "tied_weights": "together"}, "name the embedding alone"),
    ],
)
def test_what_is_refused(fields: dict, words: str) -> None:
    model = tied()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ll.TargetError, match=words):
        ll.attach(model, ll.LoRAConfig(r=3, **fields))
    assert model.state_dict().keys() == before.keys()
    ll.attach(tiny_llama(), ll.LoRAConfig(r=3, **EMBEDDING | {"tied_weights": "refuse"}))  # not tied: nothing to refuse
    with pytest.raises(ll.ConfigError, match="tied_weights='no'"):
        ll.LoRAConfig(tied_weights="no")
    with pytest.raises(ll.TargetError, match=r"no other module holds the weight of model\.embed_tokens"):
        ll.attach(tiny_llama(), ll.LoRAConfig(r=3, **EMBEDDING))
    with pytest.raises(ll.TargetError, match="'ia3' is no low-rank update"):
        ll.attach(tied(), ll.IA3Config(**EMBEDDING))
    sides = {"positive": [{"input_ids": IDS}], "negative": [{"input_ids": IDS + 20}]}
    ll.attach(tied(), ll.SteerConfig(kinds="block", tied_weights="refuse"), calibration_data=sides)


def encoder_decoders() -> list[Any]:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = BartConfig(vocab_size=96, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, **sizes)
    t5 = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    models = [BartForConditionalGeneration(bart), T5ForConditionalGeneration(t5)]
    return [model.eval().requires_grad_(False) for model in models]  # which changes T5's own rounding


@pytest.mark.parametrize("family", [0, 1], ids=["bart", "t5"])
def test_rows_of_an_embedding_that_encoder_and_decoder_share(family: int, tmp_path: Path) -> None:
    """`shared` and both `embed_tokens` are one weight: the first is the target, the others its ties."""
    torch.manual_seed(0)
    model, cfg = encoder_decoders()[family], ll.TokensConfig(token_ids=(1, 5))

    def outputs(model: Any) -> torch.Tensor:
        return model(input_ids=IDS, decoder_input_ids=IDS).logits.detach()

    base, other = outputs(model), copy.deepcopy(model)
    (target,) = ll.plan(model, cfg)
    adapter = ll.attach(model, cfg)
    assert target.path.endswith("shared")
    assert list(adapter.targets) == [target.path]
    assert torch.equal(outputs(model), base)
    perturb(adapter, 0.3)
    fresh = copy.deepcopy(other)
    ll.save(model, tmp_path / "a.safetensors")
    ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(outputs(fresh), outputs(model))
    with torch.no_grad():
        other.get_input_embeddings().weight[[1, 5]] += adapter.state_dict()[f"{target.path}.lora_delta"].mT
    torch.testing.assert_close(outputs(model), outputs(other), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs(model), base, atol=0.1)


@pytest.mark.parametrize(
    "cfg", [ll.DoRAConfig(**EMBEDDING | {"target_names": ["lm_head"], "kinds": ["linear"]}), ll.IA3Config(**EMBEDDING)]
)
def test_a_plan_refuses_what_attach_refuses_and_leaves_no_trace(cfg: Any) -> None:
    model = tied()
    with pytest.raises(ll.TargetError) as planned:
        ll.plan(model, cfg)
    with pytest.raises(ll.TargetError) as attached:
        ll.attach(model, cfg)
    assert str(planned.value) == str(attached.value)
    assert not any("_lora" in name for module in model.modules() for name in vars(module))
    ll.plan(model, ll.LoRAConfig(**EMBEDDING))
    assert not any("_lora" in name for module in model.modules() for name in vars(module))
