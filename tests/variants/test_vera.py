"""VeRA beside PEFT's, whose seed gives the same A and B."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import IDS, tiny_llama

import lora_lite as ll

NAMES = ["q_proj", "k_proj", "down_proj"]  # three shapes: A and B are of the largest


def both(**fields: Any) -> tuple[Any, Any]:
    """A model with our VeRA, and with PEFT's, at the same values."""
    base = tiny_llama()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.VeraConfig(r=8, target_modules=NAMES, projection_prng_key=3, d_initial=0.2, **fields)
    )
    ours = copy.deepcopy(base)
    adapter = ll.attach(ours, ll.VeRAConfig(r=8, seed=3, d_initial=0.2, target_names=NAMES))
    generator = torch.Generator().manual_seed(0)
    live = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, tensor in adapter.named_tensors():
            if not isinstance(tensor, torch.nn.Parameter):
                continue
            path, _, name = key.rpartition(".")
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
            live[f"base_model.model.{path}.vera_lambda_{name[-1]}.default"].copy_(tensor)
    return ours, theirs


def test_one_seed_gives_pefts_projections() -> None:
    ours, theirs = both()
    assert torch.equal(ours.lora_shared.A, theirs.base_model.vera_A["default"])
    assert torch.equal(ours.lora_shared.B, theirs.base_model.vera_B["default"])


def test_a_seed_is_the_same_under_another_default_dtype() -> None:
    wanted = both()[0].lora_shared
    torch.set_default_dtype(torch.float64)
    try:
        again = both()[0].lora_shared
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again.A, wanted.A)
    assert torch.equal(again.B, wanted.B)


def test_outputs_gradients_and_steps_are_those_of_peft() -> None:
    ours, theirs = both()
    parameters = [list(ll.adapters(ours)["default"].parameters()), []]
    for key, _ in ll.adapters(ours)["default"].named_tensors():
        path, _, name = key.rpartition(".")
        if "shared" not in path:
            parameters[1].append(theirs.get_parameter(f"base_model.model.{path}.vera_lambda_{name[-1]}.default"))
    optimizers = [torch.optim.AdamW(each, lr=1e-2) for each in parameters]
    for _ in range(3):
        losses = [model(input_ids=IDS, labels=IDS).loss for model in (ours, theirs)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for mine, other in zip(*parameters, strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("save_projection", [False, True])
def test_the_file_has_a_and_b_where_it_is_asked_to(save_projection: bool, tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = ll.attach(model, ll.VeRAConfig(r=8, save_projection=save_projection))
    ll.save(model, tmp_path / "a.safetensors")
    assert ("lora_shared.A" in adapter.state_dict()) == save_projection
    trained = sum(p.numel() * 4 for p in adapter.parameters())
    shared = 4 * (model.lora_shared.A.numel() + model.lora_shared.B.numel())
    header = 200 * len(adapter.state_dict()) + 4000
    assert (tmp_path / "a.safetensors").stat().st_size <= trained + save_projection * shared + header


def test_a_low_rank_pair_is_the_same_change() -> None:
    ours, _ = both()
    wanted = ours(input_ids=IDS).logits
    model = tiny_llama()
    for path, view in ll.adapters(ours)["default"].views().items():
        a, b, s, *_ = ll.REGISTRY["vera"].low_rank(view)
        model.get_submodule(path).weight.data += (b * s) @ a
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{"seed": -1}, {"d_initial": 0.0}, {"dropout": 1.0}, {"save_projection": 1}])
def test_fields_that_can_not_be(fields: dict[str, Any]) -> None:
    with pytest.raises((ll.ConfigError, TypeError)):
        ll.VeRAConfig(**fields)
