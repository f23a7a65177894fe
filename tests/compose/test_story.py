"""A user's story on the real model: LoRA on a 4-bit base, saved, merged in every way, opened again and compared.

pytest -s tests/test_story.py     prints the table
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contrasts import NEUTRAL
from peft import LoraConfig, get_peft_model
from torch import Tensor

import lora_lite as ll
from lora_lite.base.layer import quantization_of

TEXTS = [f"Question: {prompt}\nAnswer: it depends on what you mean by" for prompt in NEUTRAL[:8]]


def log_probabilities(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch).logits[batch["attention_mask"].bool()]
    return logits.float().log_softmax(-1)


def difference(ours: Tensor, wanted: Tensor) -> tuple[float, float]:
    """(KL in nats a token, largest difference of a log-probability that is above 1 %)"""
    kl = (wanted.exp() * (wanted - ours)).sum(-1, dtype=torch.float64).mean()
    likely = wanted > -4.6
    return float(kl), float((ours - wanted)[likely].abs().max())


def resident(what: str) -> float:
    """MiB"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


@pytest.mark.slow
def test_train_on_4_bit_save_merge_both_ways_and_reload(
    smollm2: str, real_base: Callable[..., Any], real_tokenizer: Any, tmp_path: Path
) -> None:
    batch = real_tokenizer(TEXTS, return_tensors="pt", padding=True)
    model = real_base("nf4")
    untrained = log_probabilities(model, batch)
    adapter = ll.attach(model, ll.LoRAConfig(r=8))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=4e-3)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(4):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = log_probabilities(model, batch)
    ll.save(model, tmp_path / "adapter.safetensors")
    factors = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    rows = {"untrained": difference(untrained, wanted)}
    for how in ("requantize", "dequantize"):
        ll.merge(model, quantized=how)
        rows[f"in memory, {how}d"] = difference(log_probabilities(model, batch), wanted)
        ll.unmerge(model)
    assert torch.equal(log_probabilities(model, batch), wanted)
    ll.detach(model)
    rows["PEFT merge_and_unload"] = difference(peft_merged(model, factors, batch), wanted)
    del model, adapter, optimizer

    size = sum(file.stat().st_size for file in Path(smollm2).glob("*.safetensors")) / 2**20
    for way in ("original", "as_trained"):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = resident("VmRSS")
        ll.merge_checkpoint(smollm2, tmp_path / "adapter.safetensors", tmp_path / way, way)
        assert resident("VmHWM") - before < size / 2, "the model was in memory"
        assert quantization_of(opened(tmp_path / way)) is None
    rows["as trained, merged on disk"] = difference(log_probabilities(opened(tmp_path / "as_trained"), batch), wanted)

    dense = real_base()
    ll.load(dense, tmp_path / "adapter.safetensors")
    on_dense = log_probabilities(dense, batch)
    merged = log_probabilities(opened(tmp_path / "original"), batch)
    rows["original, merged on disk; against the adapter on the original"] = difference(merged, on_dense)
    rows["the same against what was trained"] = difference(merged, wanted)
    del dense

    print(f"\n{'':<64}{'KL':>10}{'max':>8}")
    for name, (kl, largest) in rows.items():
        print(f"{name:<64}{kl:>10.5f}{largest:>8.3f}")
    kl = {name: values[0] for name, values in rows.items()}
    assert kl["untrained"] > 0.1
    exact = (
        "in memory, dequantized",
        "as trained, merged on disk",
        "original, merged on disk; against the adapter on the original",
    )
    for name in exact:  # bfloat16's rounding, of weights or of all that is computed, is a thousandth of the training
        assert kl[name] < kl["untrained"] / 100, name
    assert kl["PEFT merge_and_unload"] > 10 * kl["as trained, merged on disk"]


def opened(folder: Path) -> Any:
    return ll.load_base(str(folder))


def peft_merged(model: Any, factors: dict[str, Tensor], batch: Any) -> Tensor:
    """The same factors in PEFT, merged into the 4-bit layers."""
    targets = sorted({key.rpartition(".")[0] for key in factors})
    peft = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=targets))
    own = dict(peft.named_parameters())
    with torch.no_grad():
        for key, tensor in factors.items():
            own[f"base_model.model.{key}.default.weight"].copy_(tensor)
    with pytest.warns(UserWarning, match="rounding errors"):
        merged = peft.merge_and_unload()
    return log_probabilities(merged, batch)
