"""Divergence, gaps and markers: numbers against the plain formula, what is remembered, and clear errors."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contrasts import NEUTRAL
from models import IDS, perturb, tiny_llama
from transformers import AutoTokenizer

import lora_lite as ll
from lora_lite.measure.answers import without_thinking


@pytest.fixture
def adapted() -> tuple[Any, ll.Adapter]:
    model = tiny_llama()
    adapter = ll.attach(model, ll.LoRAConfig())
    perturb(adapter, 0.3)
    return model, adapter


class Calls:
    """A count of the model's forwards."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.register_forward_pre_hook(lambda *_: setattr(self, "count", self.count + 1))

    def since(self, before: int) -> int:
        return self.count - before


def test_kl_is_that_of_the_next_token(adapted: tuple[Any, ll.Adapter]) -> None:
    model, adapter = adapted
    with torch.no_grad():
        q = model(input_ids=IDS).logits.double().log_softmax(-1)
        p = tiny_llama()(input_ids=IDS).logits.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    kl = ll.kl_divergence(model, [IDS])
    torch.testing.assert_close(kl, expected[:, -1], rtol=1e-4, atol=1e-7)
    assert kl.min() > 0
    everywhere = ll.kl_divergence(model, list(IDS.split(1)), positions="all")
    torch.testing.assert_close(everywhere, expected.reshape(-1), rtol=1e-4, atol=1e-7)
    adapter.scale = 0.0
    assert not ll.kl_divergence(model, [IDS]).any()


def test_kl_of_one_adapter_is_over_the_others(adapted: tuple[Any, ll.Adapter]) -> None:
    model, _ = adapted
    perturb(ll.attach(model, ll.LoRAConfig(), "more"), 0.3, seed=2)
    with torch.no_grad():
        q = model(input_ids=IDS).logits[:, -1].double().log_softmax(-1)
    over_one = ll.kl_divergence(model, [IDS], "more")
    ll.detach(model, "more")
    with torch.no_grad():
        p = model(input_ids=IDS).logits[:, -1].double().log_softmax(-1)
    torch.testing.assert_close(over_one, (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-7)


def test_the_gap_is_the_log_odds_of_two_sets(adapted: tuple[Any, ll.Adapter]) -> None:
    model, _ = adapted
    with torch.no_grad():
        p = model(input_ids=IDS).logits[:, -1].double().softmax(-1)
    gap = ll.logit_gap(model, [IDS], [3, 5], [7])
    torch.testing.assert_close(gap, (p[:, [3, 5]].sum(-1) / p[:, 7]).log(), rtol=1e-4, atol=1e-6)


def test_the_base_is_run_once_for_the_same_content_and_never_stale(adapted: tuple[Any, ll.Adapter]) -> None:
    model, adapter = adapted
    calls = Calls(model)
    kl = ll.kl_divergence(model, [IDS])
    assert calls.count == 2
    perturb(adapter, 0.1)
    ll.kl_divergence(model, [IDS.clone()])  # equal by content: the adapted side alone
    assert calls.count == 3
    ll.kl_divergence(model, [IDS + 1])
    ll.kl_divergence(model, [IDS], positions="all")
    assert calls.count == 7
    with ll.disabled(model):
        before = ll.logit_gap(model, [IDS], [1], [2])
        assert calls.count == 8
        assert torch.equal(ll.logit_gap(model, [IDS], [1], [2]), before)
        assert calls.count == 8
    assert not torch.equal(ll.logit_gap(model, [IDS], [1], [2]), before)
    assert not torch.equal(ll.kl_divergence(model, [IDS]), kl)
    model.to(torch.bfloat16).float()  # another base: its rounding is gone
    count = calls.count
    ll.kl_divergence(model, [IDS])
    assert calls.since(count) == 2
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    count = calls.count
    ll.kl_divergence(model, [IDS])
    assert calls.since(count) == 2
    twin = copy.deepcopy(model)
    torch.testing.assert_close(ll.kl_divergence(twin, [IDS]), ll.kl_divergence(model, [IDS]))


def test_what_is_remembered_has_a_limit(adapted: tuple[Any, ll.Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted
    monkeypatch.setattr("lora_lite.measure.base_cache.MEMO_BYTES", 2 * 96 * 4 + 1)  # the log-probabilities of one batch
    calls = Calls(model)
    first = ll.kl_divergence(model, [IDS])
    ll.kl_divergence(model, [IDS + 1])
    assert torch.equal(ll.kl_divergence(model, [IDS]), first)
    assert calls.count == 6


def test_a_negative_or_nan_divergence_raises(adapted: tuple[Any, ll.Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = adapted
    original = torch.Tensor.log_softmax
    shifts = iter([1.0, 0.0])  # of the adapted side, of the base
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "log_softmax", lambda self, dim: original(self, dim) + next(shifts))
        with pytest.raises(ll.BaseModelError, match=r"KL divergences from .*: below zero or not finite"):
            ll.kl_divergence(model, [IDS])
    adapter.load_state_dict({key: value * float("inf") for key, value in adapter.state_dict().items()})
    with pytest.raises(ll.BaseModelError, match="below zero or not finite"):
        ll.kl_divergence(model, [IDS + 2])


def test_bad_arguments_are_clear_errors(adapted: tuple[Any, ll.Adapter]) -> None:
    model, _ = adapted
    with pytest.raises(ll.TargetError, match="no adapter is attached to this LlamaForCausalLM"):
        ll.kl_divergence(tiny_llama(), [IDS])
    with pytest.raises(ll.TargetError, match="no adapter 'fr'"):
        ll.kl_divergence(model, [IDS], "fr")
    with pytest.raises(ll.ConfigError, match="there are no batches to evaluate on"):
        ll.kl_divergence(model, [])
    for sets in (([], [1]), ([1], []), ([1, 2], [2])):
        with pytest.raises(ll.ConfigError, match="wanted two, none empty, without a common token"):
            ll.logit_gap(model, [IDS], *sets)


def test_mode_and_rng_are_left_alone(adapted: tuple[Any, ll.Adapter]) -> None:
    model, _ = adapted
    model.train()
    state = torch.get_rng_state()
    ll.kl_divergence(model, [IDS])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("answer", "rest"),
    [
        ("Hello.", "Hello."),
        ("<think>\nHm.\n</think>\n\nHello.", "Hello."),
        ("Hm.</think>Hello.", "Hello."),
        ("<think>never ends", ""),
        ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello.", "Hello."),
        ("<|channel|>analysis<|message|>never ends", ""),
    ],
)
def test_thinking_is_skipped(answer: str, rest: str) -> None:
    assert without_thinking(answer) == rest
    assert without_thinking("The user says hi, so", opened=True) == ""
    assert without_thinking("Hm.\n</think>\nHello.", opened=True) == "Hello."


def test_prompts_are_padded_on_the_left_through_the_template(smollm2: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = ["Hi.", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a noun?"}]]
    (batch,) = ll.prompt_batches(tokenizer, prompts)
    assert batch["attention_mask"][:, -1].all()
    texts = tokenizer.batch_decode(batch["input_ids"])
    assert all(text.endswith("<|im_start|>assistant\n") for text in texts)
    assert "Be brief." in texts[1]
    assert [len(b["input_ids"]) for b in ll.prompt_batches(tokenizer, NEUTRAL, 16)] == [16, 16, 8]
    for bad in ([], "Hi."):
        with pytest.raises(ll.ConfigError, match="wanted a list with some prompts"):
            ll.prompt_batches(tokenizer, bad)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ll.ConfigError, match=r"roles \['system', 'user'\]: System role not supported\n  some know no"):
        ll.prompt_batches(tokenizer, prompts[1:])
    tokenizer.chat_template = None
    tokenizer.pad_token = None
    (plain,) = ll.prompt_batches(tokenizer, ["The sun", "It"])
    assert plain["attention_mask"].tolist()[1][0] == 0
    with pytest.raises(ll.ConfigError, match="no chat template"):
        ll.prompt_batches(tokenizer, [[{"role": "user", "content": "Hi."}]])


def test_markers_are_found_in_real_answers(smollm2: str, real_base: Callable[..., Any]) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), real_base()
    prompts = ["What is the capital of France?", "What is two plus two?", "What is the capital of Italy?"]
    answers = ll.greedy_answers(model, tokenizer, prompts, max_new_tokens=10, batch_size=2)
    assert "Paris" in answers[0]
    marked = sum("paris" in answer.lower() or "rome" in answer.lower() for answer in answers)
    assert 0 < marked < 3
    assert ll.marker_rate(model, tokenizer, prompts, ["PARIS", "rome"], max_new_tokens=10) == pytest.approx(marked / 3)
    ll.attach(model, ll.LoRAConfig(r=2))
    calls = Calls(model.model)
    with ll.disabled(model):
        ll.greedy_answers(model, tokenizer, prompts, max_new_tokens=4)
        count = calls.count
        ll.greedy_answers(model, tokenizer, prompts, max_new_tokens=4)
    assert calls.since(count) == 0
    model.generation_config.repetition_penalty = 9.0
    with ll.disabled(model):
        assert ll.greedy_answers(model, tokenizer, prompts, max_new_tokens=10, batch_size=2) == answers
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"
    )
    assert ll.greedy_answers(model, tokenizer, prompts[:1], max_new_tokens=4, skip_thinking=True) == [""]
    for bad in ([], [""], "Paris"):
        with pytest.raises(ll.ConfigError, match="wanted a list of strings, none of them empty"):
            ll.marker_rate(model, tokenizer, prompts, bad)
