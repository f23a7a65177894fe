"""PEFT's adapter folders, with PEFT and transformers themselves on the other end."""

import pytest

from lora_lite.peft_format import plain_key


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("base_model.model.model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj.lora_A"),
        ("base_model.model.model.layers.0.q_proj.lora_B.default.weight", "model.layers.0.q_proj.lora_B"),
        ("model.layers.0.q_proj.lora_B.fr.weight", "model.layers.0.q_proj.lora_B"),
        ("base_model.model.up.lora_magnitude_vector", "up.lora_m"),
        ("base_model.model.up.lora_magnitude_vector.default.weight", "up.lora_m"),
        ("base_model.model.k.ia3_l", "k.lora_l"),
        ("base_model.model.k.ia3_l.default", "k.lora_l"),
        ("base_model.model.k.base_layer.weight", "k.weight"),
        ("k.base_layer.bias", "k.bias"),
        ("base_model.model.model.norm.weight", "model.norm.weight"),
        ("model.layers.0.q_proj.lora_A", "model.layers.0.q_proj.lora_A"),
        ("model.norm.weight", "model.norm.weight"),
        ("embed.lora_embedding_A.default", "embed.lora_embedding_A.default"),
        ("k.lora_B.default.bias", "k.lora_B.default.bias"),
    ],
)
def test_plain_key(key: str, plain: str) -> None:
    assert plain_key(key) == plain
