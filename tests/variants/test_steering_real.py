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
    french, english = gaps[COEFFICIENTS.index(0.0)]
    apart = french - english
    for language, row in zip(languages, zip(*gaps, strict=True), strict=True):
        print(f"\n{quantization or model.dtype}, asked for {language}: gap", *(f"{gap:+.2f}" for gap in row), end="")
        # 0.8 to 1.1 times apart, on CPUs with bfloat16 and without it.
        assert row[-1] - row[0] > apart / 2, "from c = -1 to 1 it does much of what asking for the language does"
    means = [float(each.mean()) for each in gaps]
    assert all(a < b for a, b in itertools.pairwise(means))

    neutral = ll.prompt_batches(tokenizer, NEUTRAL[:8])
    for smooth in (False, True) if quantization is None else (False,):
        if smooth:
            model.float()
        found = ll.calibrate_scale(model, neutral, BUDGET, tolerance=0.045, apply=True)
        kl = ll.kl_divergence(model, neutral).mean().item()
        print(f"\n{quantization or model.dtype}: KL {kl:.4f} at c = {found.c:.3f}, {found.evaluations} evaluations")
        assert adapter.scale == found.c
        assert kl == pytest.approx(found.kl, rel=1e-4)
        if smooth:
            assert found.met
            assert kl == pytest.approx(BUDGET, rel=0.05)
        # Rounding makes the divergence jump as c grows, in 16 bits and int8 by a tenth within 5 % of c: the budget may
        # be missed from below. On CPUs with bfloat16 and without it, what is found is 0.096 to 0.103.
        assert BUDGET / 1.5 < kl < 1.1 * BUDGET
