"""lm-evaluation-harness on a model with an adapter, and on the folders that adapters become."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import config, perturb, tiny_llama
from trl_tiny import tokenizer

import lora_lite as ll

lm_eval: Any = pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # the harness and its metrics warn of much, in any order
]
TEXTS = [("a b c", " d e"), ("b", " a a"), ("c d", " e f g")]


def requests() -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, text, i) for i, text in enumerate(TEXTS)]


def scores(**kwargs: Any) -> list[float]:
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(device="cpu", dtype="float32", batch_size=2, tokenizer=tokenizer(), **kwargs)
    return [float(score) for score, _ in lm.loglikelihood(requests(), disable_tqdm=True)]


@torch.no_grad()
def by_hand(model: Any) -> list[float]:
    tokens, result = tokenizer(), []
    for context, continuation in TEXTS:
        whole = tokens(context + continuation, add_special_tokens=False)["input_ids"]
        start = len(tokens(context, add_special_tokens=False)["input_ids"])
        log_probs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        result.append(sum(float(log_probs[i - 1, whole[i]]) for i in range(start, len(whole))))
    return result


def test_the_harness_sees_the_adapter(tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=len(tokenizer()))  # with a PEFT folder the harness cuts the head to the tokenizer's
    model.save_pretrained(tmp_path / "base")
    base = by_hand(model)
    perturb(ll.attach(model, config("lora")), 0.2)
    wanted = by_hand(model)
    assert max(abs(a - b) for a, b in zip(base, wanted, strict=True)) > 0.1
    assert scores(pretrained=model) == pytest.approx(wanted, abs=1e-4)
    with ll.disabled(model):
        assert scores(pretrained=model) == pytest.approx(base, abs=1e-4)
    ll.save_peft(model, tmp_path / "peft")
    assert scores(pretrained=str(tmp_path / "base"), peft=str(tmp_path / "peft")) == pytest.approx(wanted, abs=1e-4)
    ll.save(model, tmp_path / "adapter.safetensors")
    ll.merge_checkpoint(tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "merged")
    assert scores(pretrained=str(tmp_path / "merged")) == pytest.approx(wanted, abs=1e-4)
