"""PEFT 0.21 as the oracle: the same parameters give the same outputs, gradients and AdamW steps."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from models import IDS, config, loss_of, perturb, tiny_llama

import lora_lite as ll

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IA3_NAMES = {"target_names": (r"\.(k|v)_proj$",)}
IA3_FF_NAMES = {"target_names": (r"\.down_proj$",)}
R = 4

CASES: dict[str, tuple[str, dict[str, Any], Callable[[], Any]]] = {
    "lora": ("lora", {"r": R, "alpha": 6.0}, lambda: peft.LoraConfig(r=R, lora_alpha=6, target_modules=ALL)),
    "rslora": (
        "lora",
        {"r": R, "alpha": 6.0, "rslora": True},
        lambda: peft.LoraConfig(r=R, lora_alpha=6, use_rslora=True, target_modules=ALL),
    ),
    "lora_bias": (
        "lora",
        {"r": R, "alpha": 6.0, "bias": True},
        lambda: peft.LoraConfig(r=R, lora_alpha=6, lora_bias=True, target_modules=ALL),
    ),
    "pissa": (
        "pissa",
        {"r": R, "alpha": 6.0},
        lambda: peft.LoraConfig(r=R, lora_alpha=6, init_lora_weights="pissa", target_modules=ALL),
    ),
    "dora": (
        "dora",
        {"r": R, "alpha": 6.0},
        lambda: peft.LoraConfig(r=R, lora_alpha=6, use_dora=True, target_modules=ALL),
    ),
    "ia3": (
        "ia3",
        IA3_NAMES,
        lambda: peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    ),
    "ia3_ff": (
        "ia3_ff",
        IA3_FF_NAMES,
        lambda: peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
    ),
}
SUFFIX = {
    "lora_A": "lora_A.default.weight",
    "lora_B": "lora_B.default.weight",
    "lora_bias": "lora_B.default.bias",
    "lora_m": "lora_magnitude_vector.default.weight",
    "lora_l": "ia3_l.default",
}

per_case = pytest.mark.parametrize("case", CASES)


def pair(case: str) -> tuple[Any, Any, list[tuple[torch.nn.Parameter, torch.nn.Parameter]]]:
    """Our model, PEFT's, and their parameters side by side, with equal values away from the start."""
    variant, overrides, peft_config = CASES[case]
    ours, theirs = tiny_llama(bias=True), tiny_llama(bias=True)
    theirs = peft.get_peft_model(theirs, peft_config()).eval()
    adapter = ll.attach(ours, config(variant, **overrides))
    named = dict(theirs.named_parameters())
    pairs = []
    for key, tensor in adapter.named_tensors():
        path, _, name = key.rpartition(".")
        if name in SUFFIX:
            pairs.append((tensor, named[f"base_model.model.{path}.{SUFFIX[name]}"]))
    assert len(pairs) == sum(p.requires_grad for p in named.values())
    if variant == "pissa":  # an SVD's signs are free: take PEFT's factors as the initial ones
        adapter.load_state_dict(
            {
                key: named[f"base_model.model.{key.removesuffix('0')}.default.weight"]
                for key, _ in adapter.named_tensors()
            }
        )
    perturb(adapter)
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine.reshape(other.shape))
    return ours, theirs, pairs


@per_case
def test_outputs_agree_to_float32_rounding(case: str) -> None:
    ours, theirs, _ = pair(case)
    with torch.no_grad():
        a, b = ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits
        assert not torch.allclose(a, tiny_llama(bias=True)(input_ids=IDS).logits, atol=1e-4)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@per_case
def test_gradients_agree_to_float32_rounding(case: str) -> None:
    ours, theirs, pairs = pair(case)
    loss_of(ours).backward()
    loss_of(theirs).backward()
    for mine, other in pairs:
        assert mine.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(mine.grad, other.grad.reshape(mine.shape), rtol=1e-4, atol=1e-6)


@per_case
def test_three_adamw_steps_agree(case: str) -> None:
    ours, theirs, pairs = pair(case)
    optimizers = [torch.optim.AdamW([p[i] for p in pairs], lr=1e-3, eps=1e-4) for i in range(2)]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    for mine, other in pairs:
        torch.testing.assert_close(mine, other.reshape(mine.shape), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss_of(ours), loss_of(theirs), rtol=1e-5, atol=1e-6)


def test_the_pissa_start_is_pefts_up_to_signs() -> None:
    """Each rank-one term of s·B0A0 is the same, so A0 and B0 are PEFT's up to a sign for each."""
    ours = tiny_llama()
    theirs = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=R, lora_alpha=6, init_lora_weights="pissa", target_modules=["up_proj"])
    )
    adapter = ll.attach(ours, config("pissa", r=R, alpha=6.0, target_names=("up_proj",)))
    named = dict(theirs.named_parameters())
    tensors = adapter.state_dict()
    path = "model.layers.1.mlp.up_proj"
    a, b = (named[f"base_model.model.{path}.lora_{x}.default.weight"].detach() for x in "AB")
    mine = torch.einsum("or,ri->roi", tensors[f"{path}.lora_B0"], tensors[f"{path}.lora_A0"])
    torch.testing.assert_close(mine, torch.einsum("or,ri->roi", b, a), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_dora_on_a_4_bit_base_agrees_with_peft(quantization: str, tiny: str) -> None:
    """8-bit is checked against the dequantised matrix in base/test_layer.py: PEFT 0.21's DoRA fails on it on a CPU."""

    def base() -> Any:
        return ll.load_base(tiny, torch.float32, quantization, compute_dtype=torch.float32)

    ours, theirs = base(), base()
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=R, lora_alpha=R, use_dora=True, target_modules=["up_proj"]))
    adapter = ll.attach(ours, config("dora", r=R, target_names=("up_proj",)))
    named = dict(theirs.named_parameters())
    pairs = []
    for key, tensor in adapter.named_tensors():
        path, _, name = key.rpartition(".")
        if name in SUFFIX:
            pairs.append((tensor, named[f"base_model.model.{path}.{SUFFIX[name]}"]))
    for mine, other in pairs:
        if mine.ndim == 1:  # both start from the norms of the dequantised weight
            torch.testing.assert_close(mine, other)
    perturb(adapter)
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
        start = base()(input_ids=IDS).logits
        a, b = (model.eval()(input_ids=IDS).logits - start for model in (ours, theirs))
    assert b.norm() > 0.1
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
