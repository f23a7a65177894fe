"""Columns: each row of a forward is what the model writes by itself at that scale, and KL is that of its text."""

import copy
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from models import perturb
from playing import attached, divergences, drive, fitted, playground, recipe, texts
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lora_lite as ll
from lora_lite.play import generate
from lora_lite.play.generate import Column, gumbel, stop_tokens, write
from lora_lite.play.texts import Spelling, chat_ids, pieces

PROMPT, NEW = "Tell me about the sea.", 8
METHODS = ("lora", "dora", "ia3", "boft", "reft")


@pytest.fixture
def play(tiny_chat: str) -> Any:
    return playground(tiny_chat)


def alone(play: Any, scales: dict[str, float], prompt: str = PROMPT, system: str | None = None) -> str:
    """The answer by the model's own generate, without a batch."""
    ids = torch.tensor([chat_ids(play.tokenizer, prompt, system)])
    options: Any = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    with torch.no_grad(), ExitStack() as stack:
        for name in ll.adapters(play.model):
            stack.enter_context(ll.scaled(play.model, scales.get(name, 0.0), name))
        tokens = play.model.generate(input_ids=ids, **options)
    return str(play.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))


def columns_of(play: Any, scales: dict[str, float], **options: Any) -> list[dict[str, Any]]:
    return drive(play.write(scales, PROMPT, options.pop("system", ""), max_new_tokens=NEW, **options))


@pytest.mark.parametrize("variant", METHODS)
def test_each_column_is_what_the_model_writes_alone(variant: str, play: Any) -> None:
    attached(play, variant)
    events = columns_of(play, {"a1": 0.7}, system="You speak little, and you rhyme.")
    said = texts(events)
    assert said["base"] == alone(play, {})
    assert said["adapted"] == alone(play, {"a1": 0.7}) != said["base"]
    assert said["system"] == alone(play, {}, system="You speak little, and you rhyme.") != said["base"]
    at_zero = columns_of(play, {"a1": 0.0})
    assert texts(at_zero)["adapted"] == texts(at_zero)["base"] == said["base"]
    assert set(divergences(at_zero, "adapted")) == {0.0}


def steered(play: Any, method: str = "steer") -> str:
    return fitted(play, recipe(method=method))


@pytest.mark.parametrize("method", ["steer", "abliteration"])
def test_fits_beside_each_other(method: str, play: Any) -> None:
    first, second = steered(play), steered(play, method)
    scales = {first: 0.6, second: 0.9}
    assert texts(columns_of(play, scales))["adapted"] == alone(play, scales)


def test_the_divergence_of_each_token_is_that_of_its_text(play: Any) -> None:
    name = steered(play)
    events = columns_of(play, {name: 1.0})
    prompt = chat_ids(play.tokenizer, PROMPT)
    answer = play.tokenizer(texts(events)["adapted"], add_special_tokens=False).input_ids
    (shown,) = events[0]["columns"]
    kl = [token[1] for token in shown["tokens"]] + divergences(events, "adapted")
    with ll.scaled(play.model, 1.0, name):
        whole = ll.kl_divergence(play.model, [{"input_ids": torch.tensor([prompt])}], name, positions="all")
    torch.testing.assert_close(torch.tensor(kl[1 : len(prompt) + 1], dtype=torch.float64), whole, rtol=1e-3, atol=1e-6)
    assert kl[0] == 0.0
    assert len(kl) == len(prompt) + NEW
    assert "".join(token[0] for token in shown["tokens"]) == play.tokenizer.decode(prompt)
    assert len(answer) == NEW
    with ll.scaled(play.model, 1.0, name):
        ids = torch.tensor([prompt + answer])
        whole = ll.kl_divergence(play.model, [{"input_ids": ids}], name, positions="all")[:-1]
    torch.testing.assert_close(torch.tensor(kl[1:], dtype=torch.float64), whole, rtol=1e-3, atol=1e-6)


def test_both_columns_have_the_same_dice(play: Any) -> None:
    name = steered(play)
    drawn = [texts(columns_of(play, {name: 0.0}, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0]["base"] == drawn[0]["adapted"]
    assert drawn[0]["base"] != drawn[2]["base"]


def test_gumbel_noise_draws_by_the_probabilities() -> None:
    p, generator = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64), torch.Generator().manual_seed(0)
    draws = torch.stack([(p.log() + gumbel(3, generator)).argmax() for _ in range(4000)])
    assert (torch.bincount(draws, minlength=3) / 4000 - p).abs().max() < 0.03


def test_a_sweep_is_each_scale_by_itself(play: Any) -> None:
    name = steered(play)
    cs = [-1.0, 0.0, 0.5, 2.0]
    events = drive(play.sweep({name: 9.0}, name, cs, PROMPT, max_new_tokens=NEW))
    assert list(texts(events).values()) == [alone(play, {name: c}) for c in cs]
    assert events[-1]["columns"]["1"]["mean"] == 0.0 < events[-1]["columns"]["3"]["mean"]


LLAMA = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA |= {"intermediate_size": 128, "max_position_embeddings": 256, "head_dim": 16, "pad_token_id": 0}
DELTA = {f"linear_{what}": 16 for what in ("key_head_dim", "value_head_dim")}
DELTA |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}
DELTA |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},  # a vector for each absolute position
    "opt": LLAMA | {"ffn_dim": 128, "word_embed_proj_dim": 64},  # the same, counted from 2
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},  # ALiBi
    "gemma2": LLAMA | {"sliding_window": 16, "tie_word_embeddings": False},
    "lfm2": LLAMA | {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": LLAMA | DELTA | {"layer_types": ["linear_attention", "full_attention"]},  # a recurrent state
}
"""Models of other kinds, in which padding on the left would show where it weren't masked."""


def model_of(kind: str, tokenizer: Any, **sizes: Any) -> Any:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("kind", OTHERS)
def test_rows_of_other_lengths_on_other_kinds_of_model(kind: str, real_tokenizer: Any) -> None:
    model = model_of(kind, real_tokenizer, **OTHERS[kind])
    columns = [Column("base"), Column("same", compared=True), Column("system", system="You speak only of ships.")]
    events = drive(write(model, real_tokenizer, columns, PROMPT, max_new_tokens=NEW))
    said = texts(events)
    for column in columns:
        ids = torch.tensor([chat_ids(real_tokenizer, PROMPT, column.system)])
        options: Any = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
        with torch.no_grad():
            tokens = model.generate(ids, pad_token_id=0, **options)[0, ids.shape[1] :]
        assert said[column.key] == real_tokenizer.decode(tokens, skip_special_tokens=True)
    assert said["base"] == said["same"] != said["system"]
    assert set(divergences(events, "same")) == {0.0}


def test_a_model_without_keys_and_values_is_refused(real_tokenizer: Any) -> None:
    model = model_of("mamba", real_tokenizer, hidden_size=32, num_hidden_layers=1, state_size=8)
    with pytest.raises(ll.BaseModelError, match="MambaForCausalLM gives no keys and values to go on from"):
        drive(write(model, real_tokenizer, [Column("base")], PROMPT, max_new_tokens=2))


class Experts(nn.Module):
    """Two experts as modules of their own: each sees the tokens that are routed to it, in which there are no rows."""

    def __init__(self, mlps: list[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(mlps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, y = x[..., 0] > 0, torch.zeros_like(x)
        for expert, where in zip(self.experts, (first, ~first), strict=True):
            y[where] = expert(x[where])
        return y


def test_experts_write_apart(play: Any) -> None:
    model, tokenizer = play.model, play.tokenizer
    for layer in model.model.layers:
        layer.mlp = Experts([layer.mlp, copy.deepcopy(layer.mlp)])
    perturb(ll.attach(model, ll.LoRAConfig(r=2, target_names="experts"), "a1"), 0.3)
    ll.adapters(model)["a1"].scale = 0.0
    columns = [Column("base"), Column("adapted", {"a1": 1.0}, compared=True)]
    events = drive(write(model, tokenizer, columns, "Hi.", max_new_tokens=4))
    assert "rows can't be told apart" in events[1]["text"]
    ids = torch.tensor([chat_ids(tokenizer, "Hi.")])
    for key, c in (("base", 0.0), ("adapted", 1.0)):
        with ll.scaled(model, c), torch.no_grad():
            options: Any = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
            tokens = model.generate(input_ids=ids, **options)
        assert texts(events)[key] == tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    assert all(divergences(events, "adapted"))


def test_a_column_that_overflows_ends_and_the_other_goes_on(play: Any) -> None:
    name = steered(play)
    adapter = ll.adapters(play.model)[name]
    with torch.no_grad():
        for _, tensor in adapter.named_tensors():
            tensor.fill_(3e38)
    events = columns_of(play, {name: 2.0})
    assert events[-1]["columns"]["adapted"] == {"why": "overflow", "tokens": 0, "mean": None}
    assert events[-1]["columns"]["base"]["tokens"] == NEW
    assert divergences(events, "adapted") == [None]


def test_an_answer_ends_with_its_stop_token(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = columns_of(play, {})
    third = [event["tokens"][0][1] for event in said if event["kind"] == "tokens"][2]
    (token,) = play.tokenizer(third, add_special_tokens=False).input_ids
    play.model.generation_config.eos_token_id = token
    assert stop_tokens(play.model, play.tokenizer) == sorted({token, play.tokenizer.eos_token_id})
    events = columns_of(play, {})
    assert texts(events)["base"] == texts(said)["base"].partition(third)[0]
    assert events[-1]["columns"]["base"]["why"] == "stop"


def test_an_adapter_that_goes_ends_the_text_with_a_sentence(play: Any) -> None:
    name = steered(play)
    steps = play.write({name: 1.0}, PROMPT, "", max_new_tokens=NEW)
    next(steps), next(steps)
    play.remove(name)
    with pytest.raises(ll.ConfigError, match="changed or removed meanwhile\n  start it again"):
        drive(steps)


def test_columns_that_depend_on_each_other_say_so(play: Any) -> None:
    name = attached(play, "lily")
    events = columns_of(play, {name: 0.7}, system="Be brief.")
    assert [event["text"] for event in events if event["kind"] == "note"] == [
        "lily mixes by all tokens of a forward: each column depends on the others"
    ]
    assert "note" not in {event["kind"] for event in columns_of(play, {name: 0.0})}


def test_a_text_that_waits_keeps_the_logits_of_one_token(play: Any) -> None:
    name = steered(play)
    steps = play.write({name: 1.0}, PROMPT, "", max_new_tokens=NEW)
    assert next(steps)["kind"] == "prompt"
    logits = steps.gi_yieldfrom.gi_frame.f_locals["logits"]
    assert logits.untyped_storage().nbytes() == 3 * 4 * play.model.config.vocab_size


def test_texts_wait_for_room_for_their_keys_and_values(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "MOST_KEPT", 10)
    first, second = (play.write({}, PROMPT, "", max_new_tokens=NEW) for _ in range(2))
    assert next(first)["kind"] == "prompt"
    assert play.room.kept > 10
    assert [next(second) for _ in range(3)] == [None] * 3
    first.close()  # whoever asked has gone
    assert play.room.kept == 0
    assert drive(second)[-1]["kind"] == "end"
    assert play.room.kept == 0


def test_a_step_reads_so_many_tokens_at_most(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = steered(play)
    rows = 3 * len(chat_ids(play.tokenizer, PROMPT))
    monkeypatch.setattr(generate, "MOST_READ", rows)
    drive(play.write({name: 1.0}, PROMPT, "", max_new_tokens=1))
    with pytest.raises(ll.ConfigError, match=r"9 columns are 18 rows, and a prompt of \d+ .*\n  write one of .* fewer"):
        drive(play.sweep({}, name, [i / 8 for i in range(9)], PROMPT, max_new_tokens=1))


def test_what_the_model_can_not_read_is_refused(play: Any) -> None:
    with pytest.raises(ll.ConfigError, match="may have 200; this model reads 128\n  write a shorter prompt"):
        drive(play.write({}, PROMPT, "", max_new_tokens=200))
    with pytest.raises(ll.ConfigError, match="tokens: wanted 1 to 512"):
        chat_ids(play.tokenizer, "word " * 900)
    play.tokenizer.chat_template = None
    with pytest.raises(ll.ConfigError, match="no chat template, so there is no place for a system prompt"):
        chat_ids(play.tokenizer, "Hi.", "Be brief.")


def test_a_character_of_several_tokens_comes_whole(real_tokenizer: Any) -> None:
    ids = real_tokenizer("Fish 🐟, née.", add_special_tokens=False).input_ids
    spelling = Spelling(real_tokenizer)
    added = [spelling.add(token) for token in ids]
    assert "".join(added) == "Fish 🐟, née."
    assert not any("�" in text for text in added)
    assert len(pieces(real_tokenizer, ids)) == len(ids)
    assert generate.MOST_NEW_TOKENS == 256
