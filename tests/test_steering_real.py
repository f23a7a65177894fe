"""Steering the real model between French and English, on every kind of base; `pytest -s` shows the figures."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from contrasts import ENGLISH, FITTED, FRENCH, HELD_OUT, NEUTRAL, chats, first_tokens

import lora_lite as ll

COEFFICIENTS = (-1.0, -0.5, 0.0, 0.5, 1.0)
BUDGET = 0.1


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_c_moves_the_real_model_from_english_to_french_and_can_be_budgeted(
    quantization: str | None, real_base: Callable[..., Any], real_tokenizer: Any
) -> None:
    model, tokenizer = real_base(quantization), real_tokenizer
    languages = ("French", "English")
    positive, negative = (ll.prompt_batches(tokenizer, chats(language, FITTED[:6])) for language in languages)
    sides = {"positive": positive, "negative": negative}
    adapter = ll.attach(model, ll.SteerConfig(layers=[18]), calibration_data=sides)

    held_out = ll.prompt_batches(tokenizer, [chat for each in languages for chat in chats(each, HELD_OUT[:3])])
    tokens = first_tokens(tokenizer, FRENCH), first_tokens(tokenizer, ENGLISH)
    gaps = []
    for c in COEFFICIENTS:
        with ll.scaled(model, c):
            gaps.append(ll.logit_gap(model, held_out, *tokens).reshape(2, -1).mean(1))
    for language, row in zip(languages, zip(*gaps, strict=True), strict=True):
        print(f"\n{quantization or model.dtype}, asked for {language}: gap", *(f"{gap:+.2f}" for gap in row), end="")
        assert row[-1] - row[0] > 2.0
    means = [float(each.mean()) for each in gaps]
    assert all(a < b for a, b in itertools.pairwise(means))

    neutral = ll.prompt_batches(tokenizer, NEUTRAL[:8])
    found = ll.calibrate_scale(model, neutral, BUDGET, tolerance=0.045, apply=True)  # int8 rounds activations: it jumps
    kl = ll.kl_divergence(model, neutral).mean().item()
    print(f"\n{quantization or model.dtype}: KL {kl:.4f} at c = {found.c:.3f}, {found.evaluations} evaluations")
    assert found.met
    assert adapter.scale == found.c
    assert kl == pytest.approx(BUDGET, rel=0.05)
