"""A peak learning rate of AdamW for each method, with the reason.

The losses are held-out ones of the demo (finetune.py on SmolLM2-135M-Instruct): from 3.79 in a whole run, or from 3.62
in 25 steps (--steps 25 --eval-pairs 32).
"""

import lora_lite as ll

OTHER = 1e-3
"""For a method that is not in the table."""

LEARNING_RATES: dict[str, float | None] = {
    "lora": 2e-3,  # low-rank factors want ten times full fine-tuning's rate: 25 steps end at 2.85, at 5e-4 at 2.99
    "dora": 2e-3,  # as lora; the magnitude, a row norm of about 1, moves by at most this much a step: ends at 2.74
    "pissa": 5e-4,  # A and B start at the weight's own size, so a step moves the layer further: ends at 2.75
    "ia3": 3e-2,  # a useful l is several per cent from 1, and a step moves it by about this much: ends at 2.87
    "ia3_ff": 3e-2,  # as ia3: ends at 2.78
    "ssteer": 2e-1,  # Δs is in singular values (SmolLM2's: 4 to 23): 25 steps end at 2.93, at 5e-2 at 3.02
    "antipasto": 2e-2,  # θ is an angle, which wants less than ssteer's Δs: 25 steps end at 2.91
    "abliteration": None,  # computed, not trained; so are the next two
    "steer": None,
    "history": None,
}
TRAINED = [name for name in ll.REGISTRY if LEARNING_RATES.get(name, OTHER) is not None]


def learning_rate(variant: str) -> float:
    """The method's rate. Raises ConfigError for a method that is computed, not trained."""
    rate = LEARNING_RATES.get(variant, OTHER)
    if rate is None:
        raise ll.ConfigError(f"--variant {variant}: it is computed, not trained; use one of {', '.join(TRAINED)}")
    return rate
