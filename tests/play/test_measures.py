"""Damage, effect, budget, fit and map, against what the library and plain sums say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from playing import LINES, PROMPTS, as_written, attached, drive, fitted, playground, recipe, result
from transformers import GPT2Config, GPT2LMHeadModel

import lora_lite as ll
from lora_lite.play import damage
from lora_lite.play import fit as fits
from lora_lite.play import playground as pages
from lora_lite.play.damage import ANSWER, answer_positions, neutral_prompts
from lora_lite.play.effect import REQUEST, Lines, batch_of
from lora_lite.play.heat import SCALES, layers_of, spread
from lora_lite.play.texts import chat_ids, word_ids


@pytest.fixture
def play(tiny_chat: str) -> Any:
    return playground(tiny_chat)


def count_forwards(play: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    play.model.register_forward_pre_hook(lambda module, args: calls.append(1))
    return calls


def log_probabilities(play: Any, ids: list[int], c: float = 0.0, name: str | None = None) -> torch.Tensor:
    """(t, v) of a sequence by itself, without padding."""
    with torch.no_grad(), ll.scaled(play.model, 0.0):
        if name is None:
            return play.model(torch.tensor([ids])).logits[0].log_softmax(-1).double()
        with ll.scaled(play.model, c, name):
            return play.model(torch.tensor([ids])).logits[0].log_softmax(-1).double()


def by_hand(play: Any, c: float, name: str | None, system: str | None = None) -> float:
    """The mean KL over the answers' tokens, request by request."""
    kl = []
    answers = [answer for batch in play.neutral.answers for answer in batch]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        before, other = chat_ids(play.tokenizer, prompt), chat_ids(play.tokenizer, prompt, system)
        base = log_probabilities(play, before + answer)[len(before) - 1 : -1]
        moved = log_probabilities(play, other + answer, c, name)[len(other) - 1 : -1]
        kl.append((base.exp() * (base - moved)).sum(-1))
    return float(torch.cat(kl).mean())


def test_damage_is_the_mean_over_the_answers(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = fitted(play)
    versions = play.versions({name: 1.0})
    kl = result(play.neutral.damage({name: 1.0}, versions))
    assert kl == pytest.approx(by_hand(play, 1.0, name), rel=1e-3)
    calls = count_forwards(play, monkeypatch)
    assert result(play.neutral.damage({name: 1.0}, versions)) == kl
    assert result(play.neutral.damage({name: 0.0}, versions)) == 0.0
    again = fitted(play, label="The same lines", replaces=name)
    assert result(play.neutral.damage({again: 1.0}, play.versions({again: 1.0}))) == kl
    assert calls == []


def absolute(tokenizer: Any) -> Any:
    """GPT-2 adds a vector for each absolute position, so that padding on the left would show."""
    sizes: Any = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).eval()
    with torch.no_grad():
        model.transformer.wpe.weight.normal_()
    return pages.Playground(model, tokenizer, "absolute", PROMPTS)


@pytest.mark.parametrize("variant", ["lora", "reft", "absolute"])
def test_texts_are_read_as_they_would_be_written(variant: str, tiny_chat: str, real_tokenizer: Any) -> None:
    """Reft acts on the prompt's first and last tokens: what comes after the prompt mustn't be taken for it."""
    play = absolute(real_tokenizer) if variant == "absolute" else playground(tiny_chat)
    name = attached(play, "lora" if variant == "absolute" else variant)
    versions, scales = play.versions({name: 0.7}), {name: 0.7}
    kl = result(play.neutral.damage(scales, versions))
    answers, parts = [answer for batch in play.neutral.answers for answer in batch], []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = chat_ids(play.tokenizer, prompt)
        base, moved = as_written(play, ids, answer, {}), as_written(play, ids, answer, scales)
        parts.append((base.exp() * (base - moved)).sum(-1))
    assert kl == pytest.approx(float(torch.cat(parts).mean()), rel=1e-3)
    lines = Lines(
        (*LINES.positive, "Two.", "A held line that is longer than the other."), (*LINES.negative, "No.", "Off.")
    )
    moved_by = result(play.effects.effect(lines, scales, versions))
    prefix, wanted = chat_ids(play.tokenizer, REQUEST), 0.0
    for side, sign in (("positive", 1), ("negative", -1)):
        for given, adapted in ((scales, 1), ({}, -1)):
            logp = []
            for line in lines.held_out(side):
                words = word_ids(play.tokenizer, line)
                written = as_written(play, prefix, words, given)
                logp.append(written.gather(1, torch.tensor(words)[:, None]))
            wanted += sign * adapted * float(torch.cat(logp).mean())
    assert moved_by == pytest.approx(wanted, rel=1e-3)


def test_the_answers_are_the_bases_own(play: Any) -> None:
    list(play.neutral.prepare(play.neutral.batches - 1))
    batches = ll.prompt_batches(play.tokenizer, PROMPTS, 1, thinking=False)
    for batch, answer in zip(batches, [a for part in play.neutral.answers for a in part], strict=True):
        tokens = play.model.generate(**batch, max_new_tokens=ANSWER, do_sample=False)[0, batch["input_ids"].shape[1] :]
        assert tokens.tolist() == answer
    inputs = play.neutral.inputs(0)
    assert answer_positions(inputs).sum(1).tolist() == [len(answer) for answer in play.neutral.answers[0]]


def test_a_short_answer_counts_its_own_tokens_alone(play: Any) -> None:
    fitted(play)  # a system prompt's damage is the base's, whatever is attached
    play.model.generation_config.eos_token_id = result_of_first(play)
    kl = result(play.neutral.system_damage("You are a pirate."))
    assert {len(answer) for part in play.neutral.answers for answer in part} != {ANSWER}
    assert kl == pytest.approx(by_hand(play, 0.0, None, "You are a pirate."), rel=1e-3)


def result_of_first(play: Any) -> int:
    """The fourth token of the first answer."""
    ids = torch.tensor([chat_ids(play.tokenizer, PROMPTS[0])])
    return int(play.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)[0, -1])


def test_two_adapters_are_measured_together(play: Any) -> None:
    one, two = fitted(play), fitted(play, recipe(0))
    scales = {one: 0.5, two: 0.5}
    kl = result(play.neutral.damage(scales, play.versions(scales)))
    with ll.scaled(play.model, 0.5):
        parts = [
            ll.kl_divergence(play.model, [play.neutral.inputs(i)], positions=answer_positions)
            for i in range(play.neutral.batches)
        ]
    assert kl == pytest.approx(float(torch.cat(parts).mean()), rel=1e-6)


@pytest.mark.parametrize("limit", [2.0, -2.0])
def test_the_budget_is_that_of_calibrate_scale(limit: float, play: Any) -> None:
    name = fitted(play)
    events = drive(play.neutral.budget(name, play.entry(name).version, 0.05, limit))
    batches = [play.neutral.inputs(i) for i in range(play.neutral.batches)]
    options: Any = {"limit": limit, "tolerance": 0.025, "max_evaluations": 12, "positions": answer_positions}
    wanted = ll.calibrate_scale(play.model, batches, 0.05 * 0.975, name=name, **options)
    assert events[-1]["c"] == pytest.approx(wanted.c, rel=1e-4)
    assert events[-1]["kl"] <= 0.05
    assert (events[-1]["met"], events[-1]["pole"]) == (wanted.met, limit / 2)
    assert len(events) == wanted.evaluations + 1


def test_measure_says_all_and_remembers_it(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = fitted(play)
    events = drive(play.measure({name: 0.5}, 0.05))
    kinds = [event["kind"] for event in events]
    assert kinds[:3] == ["damage", "effect", "curve"]
    assert kinds.count("budget") == 2
    assert kinds[-1] == "end"
    calls = count_forwards(play, monkeypatch)
    again = drive(play.measure({name: 0.5}, 0.05))
    assert calls == []
    (curve,) = [event["points"] for event in again if event["kind"] == "curve"]
    assert [c for c, _ in curve] == sorted(c for c, _ in curve)
    assert [0.0, 0.0] in curve
    assert len(curve) > 4


def test_the_effect_is_that_of_the_held_out_lines(play: Any) -> None:
    name = fitted(play)
    effect = result(play.effects.effect(LINES, {name: 0.8}, play.versions({name: 0.8})))
    prefix, means = chat_ids(play.tokenizer, REQUEST), {}
    for side in ("positive", "negative"):
        (line,) = LINES.held_out(side)
        words = play.tokenizer(line, add_special_tokens=False).input_ids
        for c in (0.8, 0.0):
            logp = log_probabilities(play, prefix + words, c, name)[len(prefix) - 1 : -1]
            means[side, c] = logp.gather(1, torch.tensor(words)[:, None]).mean()
    by_sums = means["positive", 0.8] - means["positive", 0.0] - (means["negative", 0.8] - means["negative", 0.0])
    assert effect == pytest.approx(float(by_sums), rel=1e-3)
    assert effect != 0
    events = drive(play.system_prompt("You are a pirate.", name))
    assert events[-1]["effect"] != 0


def test_a_fit_is_that_of_contrast_without_the_held_out_lines(play: Any) -> None:
    assert LINES.held_out("positive") == ("A held line.",)
    assert LINES.fitted("positive") == tuple(line for line in LINES.positive if line != "A held line.")
    fitted(play, recipe(0, lines=Lines(("Yes.", "Good."), ("No.", "Bad."))), "Beside it, which is off while we read")
    name = fitted(play)
    block = play.fitter.blocks[1]
    means = {}
    for side in ("positive", "negative"):
        vectors = []
        for line in LINES.fitted(side):
            batch, is_word = batch_of(play.tokenizer, [line])
            with ll.scaled(play.model, 0.0):
                vectors.append(ll.capture(play.model, [batch], [block], positions=is_word, progress=False)[block].mean)
        means[side] = torch.stack(vectors).mean(0)
    step = (means["positive"] - means["negative"]).float()
    (vector,) = [t for key, t in ll.adapters(play.model)[name].named_tensors() if key.endswith("lora_v")]
    torch.testing.assert_close(vector, step, rtol=1e-3, atol=1e-5)
    assert ll.adapters(play.model)[name].scale == 0.0


def test_a_fit_at_another_block_runs_no_forward(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted(play)
    calls = count_forwards(play, monkeypatch)
    events = drive(play.fit(recipe(0, direction="pca"), "Other", None))
    assert [event["kind"] for event in events] == ["fitted"]
    assert calls == []
    changed = replace(LINES, positive=("A new line.", *LINES.positive[1:]))
    assert len(drive(play.fit(recipe(lines=changed), "Third", None))) == 2  # one sentence was read
    monkeypatch.setattr(fits, "MOST_SENTENCES", 3)
    drive(play.fit(recipe(), "Fourth", None))
    assert len(play.fitter.sentences) == 3


def test_a_refit_takes_the_place_of_the_old_one(play: Any) -> None:
    first, second = fitted(play), fitted(play, label="Second")
    third = fitted(play, recipe(0, "abliteration"), "Mine again", first)
    assert [entry["label"] for entry in play.listed()] == ["Mine again", "Second"]
    assert set(ll.adapters(play.model)) == {second, third}
    with pytest.raises(ll.ConfigError, match="wanted equal numbers"):
        lines = Lines((*LINES.positive, "One more."), LINES.negative)
        fitted(play, recipe(direction="pca", lines=lines), "Mine again", third)
    assert set(ll.adapters(play.model)) == {second, third}


def test_labels_are_one_adapters_own(play: Any, tmp_path: Path) -> None:
    """A link names adapters by them."""
    first, second = fitted(play, label="One"), fitted(play, label="Two")
    for steps in (lambda: play.rename(second, "One"), lambda: fitted(play, label="One"),
                  lambda: fitted(play, label="One", replaces=second)):  # fmt: skip
        with pytest.raises(ll.ConfigError, match="another adapter is called 'One'\n  choose another name"):
            steps()
    play.rename(first, "One")
    running = play.fit(recipe(lines=Lines(("Yes.", "Good."), ("No.", "Bad."))), "Three", None)
    next(running)
    play.rename(first, "Three")  # meanwhile
    with pytest.raises(ll.ConfigError, match="another adapter is called 'Three'"):
        drive(running)
    ll.save(play.model, tmp_path / "Two.safetensors", second)
    play.load(tmp_path / "Two.safetensors")
    play.load(tmp_path / "Two.safetensors")
    assert [entry["label"] for entry in play.listed()] == ["Three", "Two", "Two 2", "Two 3"]


def test_a_page_of_a_server_that_has_ended_names_no_adapter_of_the_next(play: Any) -> None:
    name = fitted(play)
    other = playground_like(play)
    fitted(other)
    with pytest.raises(ll.ConfigError, match="not on the page any more\n  load the page again"):
        other.scales({name: 1.0})


def test_a_files_scale_that_is_beyond_the_sliders(play: Any, tmp_path: Path) -> None:
    name = fitted(play)
    ll.adapters(play.model)[name].scale = -12.0
    ll.save(play.model, tmp_path / "far.safetensors", name)
    play.load(tmp_path / "far.safetensors")
    listed = play.listed()[-1]
    assert listed["start"] == -8.0
    assert listed["says"].endswith("; its file has c = -12, beyond this page's -8")


def test_rounding_is_no_damage(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = fitted(play)
    monkeypatch.setattr(damage, "divergences", lambda *given, **options: torch.tensor([-3e-6, 1e-6]).double())
    assert result(play.neutral.damage({name: 0.1}, play.versions({name: 0.1}))) == 0.0
    play.model.bfloat16()
    with pytest.raises(ll.ConfigError, match=r"0.002 nats is too near to .* bfloat16 .*\n  write 0.005 or more"):
        drive(play.measure({name: 0.1}, 0.002))


def test_the_curve_goes_on_when_no_more_is_remembered(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = fitted(play)
    monkeypatch.setattr(damage, "MOST_POINTS", 2)
    events = drive(play.neutral.budget(name, play.entry(name).version, 0.05, 2.0))
    assert len(events) > 4
    assert {event["kind"] for event in events[:-1]} == {"curve"}
    assert len(play.neutral.points) == 2


def test_names_and_numbers_of_adapters(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = fitted(play)
    play.rename(name, "Better")
    assert play.listed()[0]["label"] == "Better"
    monkeypatch.setattr(pages, "MOST_ADAPTERS", 1)
    with pytest.raises(ll.ConfigError, match="1 adapters are on the page\n  remove one first"):
        fitted(play)
    play.remove(name)
    for steps in (lambda: play.remove(name), lambda: play.scales({name: 1.0}), lambda: play.rename(name, "x")):
        with pytest.raises(ll.ConfigError, match="not on the page any more\n  load the page again"):
            steps()
    assert not ll.adapters(play.model)


def test_few_lines_are_fitted_whole_and_say_so(play: Any) -> None:
    few = Lines(("Yes.", "Good."), ("No.", "Bad."))
    assert (few.fitted("positive"), few.held_out("positive")) == (("Yes.", "Good."), ())
    name = fitted(play, recipe(lines=few))
    assert not play.listed()[0]["fitted"]
    assert "effect" not in {event["kind"] for event in drive(play.measure({name: 0.5}, 0.05))}
    with pytest.raises(ll.ConfigError, match="every fourth line\n  write four lines or more"):
        drive(play.map(recipe(lines=few), [0.5]))
    with pytest.raises(ll.ConfigError, match="has no token"):
        fitted(play, recipe(lines=Lines(("", "Good."), ("No.", "Bad."))))


def test_a_cell_of_the_map_is_what_a_fit_there_does(play: Any) -> None:
    cells = [event for event in drive(play.map(recipe(), [-1.0, 0.5])) if event["kind"] == "cell"]
    assert {(cell["layer"], cell["c"]) for cell in cells} == {(layer, c) for layer in (0, 1) for c in (-1.0, 0.5)}
    assert not ll.adapters(play.model)
    name = fitted(play, recipe(0))
    (cell,) = [cell for cell in cells if (cell["layer"], cell["c"]) == (0, 0.5)]
    fresh = playground_like(play)
    there = fitted(fresh, recipe(0))
    versions = fresh.versions({there: 0.5})
    assert cell["effect"] == pytest.approx(result(fresh.effects.effect(LINES, {there: 0.5}, versions)), rel=1e-4)
    assert cell["kl"] == pytest.approx(result(fresh.neutral.damage({there: 0.5}, versions, 1)), rel=1e-4)
    assert play.entry(name).version == fresh.entry(there).version


def playground_like(play: Any) -> Any:
    """Another page, which remembers nothing."""
    ll.detach(play.model)
    return pages.Playground(play.model, play.tokenizer, "tiny", PROMPTS)


def test_a_map_that_is_given_up_leaves_nothing(play: Any) -> None:
    steps = play.map(recipe(), [0.5])
    while not ll.adapters(play.model):
        next(steps)
    steps.close()
    assert not ll.adapters(play.model)


def test_the_rows_of_a_map() -> None:
    assert layers_of(2) == [0, 1]
    assert layers_of(30) == list(range(1, 30, 2))
    assert layers_of(80)[-1] == 79
    assert sorted(spread(layers_of(30))) == layers_of(30)
    assert spread(layers_of(30))[:3] == [5, 13, 21]
    assert all(0 not in scales for scales in SCALES.values())


def test_what_is_shipped() -> None:
    assert len(set(neutral_prompts())) == 12
    import json
    from importlib import resources

    presets = json.loads(resources.files("lora_lite.play").joinpath("presets.json").read_text(encoding="utf-8"))
    assert [preset["name"] for preset in presets] == [
        "French / English",
        "Formal / casual",
        "Terse / wordy",
        "Past / present",
    ]
    for preset in presets:
        assert len(preset["positive"]) == len(preset["negative"]) >= 12
        assert len({*preset["positive"], *preset["negative"]}) == 2 * len(preset["positive"])
