"""Starts of LoRA in PEFT: those that leave the base alone are a plain LoRA, others are made again or refused."""

from typing import Any

import peft

LORA = peft.LoraConfig
ALL: dict[str, Any] = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6}
UNWRITTEN = {"unwritten": "PEFT has no adapter like"}
REFUSED = {"refused": "wrote the base: its A and B belong to another one"}

TABLE: list[tuple[Any, ...]] = [
    ("mlp", LORA, {"target_modules": ["lin0"], "init_lora_weights": "eva"}),
    ("llama", LORA, ALL | {"init_lora_weights": "eva", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
    ("llama", LORA, ALL | {"init_lora_weights": "orthogonal", "use_rslora": True}),
    ("llama", LORA, ALL | {"init_lora_weights": "gaussian"}),
    ("llama", LORA, ALL | {"init_lora_weights": False}),
    ("llama", LORA, ALL | {"init_lora_weights": "olora"}, UNWRITTEN),
    ("llama", LORA, ALL | {"init_lora_weights": "pissa", "use_rslora": True}, UNWRITTEN),
    ("conv2d", LORA, {"target_modules": ["conv2d", "lin0"], "r": 2, "init_lora_weights": "gaussian"}),
    ("gpt2", LORA, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": "pissa"}, UNWRITTEN),
    ("llama", LORA, ALL | {"init_lora_weights": "pissa_niter_2"}, REFUSED),
    ("mlp", LORA, {"target_modules": ["lin0"], "init_lora_weights": "lora_ga"}, REFUSED),
]
