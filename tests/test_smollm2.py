"""The real model, where its wheel is installed: attach, train a step, save, load, on every kind of base."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learning_rates import learning_rate
from models import loss_of, perturb

import lora_lite as ll

CASES = [("lora", None), ("dora", None), ("ia3", None), ("ia3_ff", None), ("dora", "nf4"), ("lora", "int8")]


@pytest.mark.parametrize(("variant", "quantization"), CASES)
def test_a_real_model_trains_saves_and_loads(
    variant: str, quantization: str | None, real_base: Callable[..., Any], real_tokenizer: Any, tmp_path: Path
) -> None:
    ids = real_tokenizer("The capital of France is Paris.", return_tensors="pt").input_ids
    model = real_base(quantization)
    with torch.no_grad():
        base = model(input_ids=ids).logits
    adapter = ll.attach(model, ll.config_for(variant)())  # type: ignore[call-arg]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base)
    rate = learning_rate(variant) / 4  # at the full one, a first step may overshoot
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=rate)
    model.train()
    losses = []
    for _ in range(4):
        loss = loss_of(model, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"\n{variant} on {quantization or model.dtype}: loss", *(f"{loss:.3f}" for loss in losses), end="")
    # They fall by 0.44 to 0.91, at every step, in bfloat16 and on a CPU without it in float32; that the two and the
    # ways of quantising begin at other losses, 2.565 to 2.645, is the noise.
    assert losses[-1] < losses[0] - 0.25
    model.eval()
    ll.save(model, tmp_path / "a.safetensors")
    fresh = real_base(quantization)
    ll.load(fresh, tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=ids).logits, model(input_ids=ids).logits)
        ll.detach(model)
        assert torch.equal(model(input_ids=ids).logits, base)


def test_the_real_model_answers(real_base: Callable[..., Any], real_tokenizer: Any) -> None:
    model, tokenizer = real_base(), real_tokenizer
    message = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])


def test_pissa_refuses_the_real_model_in_4_bit(real_base: Callable[..., Any]) -> None:
    model = real_base("nf4")
    with pytest.raises(ll.QuantizedWeightError, match=r"layers.0.self_attn.q_proj: 'pissa' needs a dense weight.*nf4"):
        ll.attach(model, ll.PiSSAConfig())
    assert not any("lora_" in key for key in model.state_dict())


def test_what_acts_at_positions_decodes_as_it_reads(real_base: Callable[..., Any], real_tokenizer: Any) -> None:
    """LoReFT and an aLoRA beside each other, on rows of different lengths: a step is the forward without cache."""
    model, chats = real_base().float(), ("What is the capital of France?", "Name three colours.", "Hi.")
    texts = [
        real_tokenizer.apply_chat_template(
            [{"role": "user", "content": chat}], tokenize=False, add_generation_prompt=on
        )
        for chat, on in zip(chats, (True, False, True), strict=True)
    ]
    invocation = real_tokenizer.encode("<|im_start|>assistant\n")
    batch = real_tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    greedy = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    base = model.generate(**batch, **greedy)
    alora = ll.attach(model, ll.LoRAConfig(r=8, invocation_tokens=invocation), "alora")
    perturb(alora, 0.02)
    only_alora = model.generate(**batch, **greedy)
    changes = [
        max(float((a[row] - b[row]).abs().max()) for a, b in zip(only_alora.logits, base.logits, strict=True))
        for row in (0, 1)
    ]
    assert changes[0] > 0.1
    assert changes[1] < 1e-4  # its prompt has no invocation; the head's product rounds by where its rows lie in memory
    perturb(ll.attach(model, ll.ReFTConfig(r=4, layers=range(0, 30, 3)), "reft"), 0.05)
    both = model.generate(**batch, **greedy)
    n, ids = batch["input_ids"].shape[1], both.sequences
    mask = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, n:])], 1)
    labels = ids.clone()
    labels[:, :n] = -100
    with torch.no_grad():
        whole = model(ids, mask, position_ids=(mask.cumsum(1) - 1).masked_fill(mask == 0, 0), labels=labels).logits
    torch.testing.assert_close(torch.stack(both.logits, 1), whole[:, n - 1 : -1], rtol=1e-3, atol=1e-3)
    assert (both.logits[0][1] - base.logits[0][1]).abs().max() > 0.1  # LoReFT edits every prompt
