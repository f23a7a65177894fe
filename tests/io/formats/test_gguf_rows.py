"""The order of rows that llama.cpp has, for each type of model, by hand; llama.cpp itself is in test_llama_cpp.py."""

from types import SimpleNamespace
from typing import Any

import pytest

from lora_lite.io.formats.gguf_names import ARCHITECTURES, Named

Rows = dict[str, list[int]]
"""llama.cpp's name of a layer -> for each output row in GGUF the row here."""

# Four heads of q, two of k and v, of eight rows each; the two numbers of a rotary pair are half a head apart here.
HEAD = [0, 4, 1, 5, 2, 6, 3, 7]
ROTARY: Rows = {
    "attn_q": [*HEAD, *(8 + i for i in HEAD), *(16 + i for i in HEAD), *(24 + i for i in HEAD)],
    "attn_k": [*HEAD, *(8 + i for i in HEAD)],
}
ALONE: Rows = ROTARY | {"attn_k": ROTARY["attn_q"]}  # each head of q has one of k
# Four heads of two rows each: the q, k and v of a head lie together here.
BY_HEAD: Rows = {
    "attn_qkv": [0, 1, 6, 7, 12, 13, 18, 19, 2, 3, 8, 9, 14, 15, 20, 21, 4, 5, 10, 11, 16, 17, 22, 23],
}
# Falcon: two heads of q, then their one of k and of v, twice; or all heads of q, then the only one of k and of v.
BY_GROUP: Rows = {"attn_qkv": [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]}
ONE_GROUP: Rows = {"attn_qkv": list(range(12))}

GROUPS = {"num_attention_heads": 4, "num_key_value_heads": 2}
FALCON = {"num_attention_heads": 4, "multi_query": True, "new_decoder_architecture": False, "num_kv_heads": 4}
EXPECTED: list[tuple[str, dict[str, Any], Rows]] = [
    ("llama", GROUPS, ROTARY),
    ("llama", {"num_attention_heads": 4, "num_key_value_heads": None}, ALONE),
    ("llama", {"num_attention_heads": 4}, ALONE),
    ("mistral", GROUPS, ROTARY),
    ("mixtral", GROUPS, ROTARY),
    ("smollm3", GROUPS, ROTARY),
    ("arcee", GROUPS, ROTARY),
    ("granite", GROUPS, ROTARY),
    ("granitemoe", GROUPS, ROTARY),
    ("olmo", GROUPS, ROTARY),
    ("gpt_neox", {"num_attention_heads": 4}, BY_HEAD),
    ("bloom", {"num_attention_heads": 4}, BY_HEAD),
    ("falcon", FALCON, ONE_GROUP),
    ("falcon", FALCON | {"multi_query": False}, BY_HEAD),
    ("falcon", FALCON | {"new_decoder_architecture": True}, BY_HEAD),
    ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, BY_GROUP),
]
SAME = [
    *("apertus", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2"),
    *("gpt_bigcode", "gpt_oss", "hunyuan_v1_dense", "jais2", "nemotron", "olmo2", "olmo3", "olmoe", "phi", "phi3"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "stablelm", "starcoder2"),
]
"""Rotary pairs half a head apart in llama.cpp too, or neighbours in both; q, k and v apart, or one below the other."""
LAYERS = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def rows(kind: str, config: dict[str, Any], layer: str, d_out: int) -> list[int]:
    names = Named(ARCHITECTURES[kind], SimpleNamespace(**config), {})
    order = names.rows(f"blk.1.{layer}.weight", d_out)
    return list(range(d_out)) if order is None else order.tolist()


@pytest.mark.parametrize(
    ("kind", "config", "expected"), EXPECTED, ids=lambda value: value if type(value) is str else ""
)
def test_the_rows_of_a_type(kind: str, config: dict[str, Any], expected: Rows) -> None:
    for layer in LAYERS:
        wanted = expected.get(layer, list(range(32)))
        assert rows(kind, config, layer, len(wanted)) == wanted, layer


@pytest.mark.parametrize("kind", SAME)
def test_the_same_rows(kind: str) -> None:
    for layer in LAYERS:
        assert rows(kind, GROUPS | FALCON, layer, 48) == list(range(48)), layer


def test_every_type_is_in_the_table() -> None:
    assert sorted({kind for kind, _, _ in EXPECTED} | set(SAME)) == sorted(ARCHITECTURES)
