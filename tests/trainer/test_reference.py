"""The reference of preference training: the model with its adapters off, or as they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, attach, config, is_trained, loss_of, moe, one_layer, perturb, tiny_llama
from test_laws import VARIANTS, logits

import lora_lite as ll
from lora_lite.trainer import reference, snapshot


def test_the_reference_is_the_base_and_touches_nothing() -> None:
    model = tiny_llama()
    with torch.no_grad():
        base = model(input_ids=IDS).logits
        bare = model.generate(IDS[:1, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
    perturb(ll.attach(model, config("lora", dropout=0.5)), 0.5)
    model.train()
    model.model.layers[1].eval()
    modes, moved = [module.training for module in model.modules()], logits(model)
    reference_ = reference(model)
    reference_.eval().requires_grad_(False).to(torch.float64)
    out = reference_(input_ids=IDS)
    assert torch.equal(out.logits, base)
    assert not out.logits.requires_grad
    assert torch.equal(reference_.generate(IDS[:1, :4], max_new_tokens=6, do_sample=False, pad_token_id=0), bare)
    assert [module.training for module in model.modules()] == modes
    assert not any(module is not reference_ for module in reference_.modules())
    assert not list(reference_.parameters())
    assert reference_.state_dict().keys() == tiny_llama().state_dict().keys()
    assert reference_.config is model.config
    assert reference_.device == model.device
    assert not hasattr(reference_, "_hf_peft_config_loaded")
    assert all(p.requires_grad for p in ll.adapters(model)["default"].parameters())
    assert not torch.equal(moved, base)
    assert ll.adapters(model)["default"].scale == 1.0


def test_the_reference_of_one_adapter_keeps_the_others_on() -> None:
    model = tiny_llama()
    perturb(ll.attach(model, config("lora"), name="kept"))
    wanted = logits(model)
    perturb(ll.attach(model, config("lora"), name="new"), seed=2)
    assert torch.equal(reference(model, "new")(input_ids=IDS).logits, wanted)
    with pytest.raises(ll.TargetError, match="no adapter 'other'"):
        reference(model, "other")
    with pytest.raises(ll.TargetError, match="LlamaForCausalLM has no adapter to switch off"):
        reference(tiny_llama())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_reference_between_forward_and_backward_leaves_checkpointed_gradients(use_reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny_llama().train()
        adapter = ll.attach(model, config("lora"))
        perturb(adapter)
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
        loss = loss_of(model)
        reference(model)(input_ids=IDS)
        loss.backward()
        found.append([p.grad for p in adapter.parameters()])
    torch.testing.assert_close(*found)


# ---- as it was ----------------------------------------------------------------------------------


@torch.no_grad()
def without_gradients(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Few tokens take another way through a method then, as in a reference."""
    return model(x)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if is_trained(v)])
def test_a_snapshot_is_the_adapter_as_it_was(variant: str) -> None:
    model, x = one_layer(variant)
    adapter = attach(model, config(variant, target_names="proj"))
    perturb(adapter, seed=1)
    start = without_gradients(model, x)
    then = snapshot(model)
    perturb(adapter, seed=2)
    now = without_gradients(model, x)
    assert not torch.equal(now, start)
    assert torch.equal(then(x), start)
    assert torch.equal(without_gradients(model, x), now)
    assert then.size == sum(tensor.numel() for _, tensor in adapter.named_tensors())
    assert not list(then.parameters())


def test_a_snapshot_reaches_what_is_read_and_not_called() -> None:
    model = moe("qwen3")
    adapter = ll.attach(model, ll.LoRAConfig(r=2, target_names="experts|q_proj"))
    perturb(adapter)
    start, then = logits(model), snapshot(model)
    perturb(adapter, seed=2)
    assert not torch.equal(logits(model), start)
    assert torch.equal(then(input_ids=IDS).logits, start)


def test_a_snapshot_generates_and_keeps_the_scale() -> None:
    model = tiny_llama()
    frozen, adapter = ll.attach(model, config("lora"), name="before"), ll.attach(model, config("lora", dropout=0.5))
    perturb(frozen, seed=3)
    perturb(adapter, 0.5)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    adapter.scale = 0.5
    start = logits(model)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    text, then = model.generate(IDS[:1, :4], **options), snapshot(model)
    assert then.size == sum(parameter.numel() for parameter in adapter.parameters())  # of what is trained alone
    perturb(adapter, 0.5, seed=2)
    adapter.scale = -1.0
    model.train()
    with ll.scaled(model, 2.0, "default"):
        assert torch.equal(then(input_ids=IDS).logits[:1], start[:1])
    assert torch.equal(then(input_ids=IDS).logits, start)
    assert torch.equal(then.generate(IDS[:1, :4], **options), text)
    assert (adapter.scale, frozen.scale, model.training) == (-1.0, 1.0, True)


def test_a_snapshot_is_without_the_adapters_that_come_later() -> None:
    model = tiny_llama()
    frozen, adapter = ll.attach(model, config("lora"), name="before"), ll.attach(model, config("lora"))
    for seed, each_adapter in enumerate((frozen, adapter)):
        perturb(each_adapter, 0.5, seed=seed)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    frozen.scale = 0.5
    start, then = logits(model), snapshot(model)
    perturb(ll.attach(model, config("lora"), name="later"), 0.5, seed=3)
    frozen.scale = -1.0
    assert not torch.equal(logits(model), start)
    assert torch.equal(then(input_ids=IDS).logits, start)
    assert not any("later" in path for path in then.state_dict())
    ll.detach(model, "later")
    assert torch.equal(then(input_ids=IDS).logits, start)
    ll.detach(model, "before")
    with pytest.raises(ll.TargetError, match="no adapter 'before'"):
        then(input_ids=IDS)


@pytest.mark.parametrize("part", ["lm_head", "model", "base_model", "get_decoder", "get_output_embeddings"])
def test_a_reference_has_no_parts(part: str) -> None:
    model = tiny_llama()
    ll.attach(model, config("lora"))
    for ref_model in (reference(model), snapshot(model)):
        with pytest.raises(ll.TargetError, match=rf"'{part}' of a Reference .* as they are now\n  call the reference"):
            getattr(ref_model, part)


def test_a_snapshot_in_a_file(tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = ll.attach(model, config("lora"))
    perturb(adapter, 0.5)
    adapter.scale = 0.5
    start = logits(model)
    snapshot(model).save(tmp_path / "reference.pt")
    adapter.scale = 1.0
    perturb(adapter, 0.5, seed=2)
    then = snapshot(model)
    assert not then.is_in(tmp_path / "reference.pt")
    then.restore(tmp_path / "reference.pt")
    assert then.is_in(tmp_path / "reference.pt")
    assert torch.equal(then(input_ids=IDS).logits, start)
    ll.detach(model)
    ll.attach(model, config("lora", target_names="q_proj"))
    with pytest.raises(
        ll.CheckpointError, match=r"reference\.pt is the reference of other adapters .*\n  attach those"
    ):
        snapshot(model).restore(tmp_path / "reference.pt")
