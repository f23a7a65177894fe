"""A tiny model of each type that GGUF files are written for, and llama.cpp's own conversion of it.

As a script it runs in a process of its own, which has the packages of llama.cpp's checkout:

    PYTHONPATH=checkout:checkout/gguf-py python llama_cpp_models.py folder...      writes folder/base.gguf of each
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

FIELDS: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
SIZE = {"head_dim": 16}
WINDOW = {"sliding_window": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
TIED = {"tie_word_embeddings": True}  # llama.cpp has no other of these
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
GROUPS = {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 256}
FACTORS = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_multiplier": 0.2}
TYPES: dict[str, dict[str, Any]] = {  # beside FIELDS, by model_type
    "llama": {},
    "mistral": {},
    "mixtral": LOCAL,
    "smollm3": {},
    "arcee": SIZE,
    "granite": FACTORS,
    "granitemoe": LOCAL,
    "olmo": {},
    "ernie4_5": SIZE,
    "apertus": {},
    "qwen2": {},
    "qwen3": SIZE,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 48},
    "qwen3_moe": EXPERTS | SIZE | {"norm_topk_prob": True},
    "gemma": TIED | SIZE,
    "gemma2": TIED | SIZE | WINDOW | {"query_pre_attn_scalar": 16},
    "gemma3_text": TIED | SIZE | WINDOW | {"query_pre_attn_scalar": 16},
    "phi": {"intermediate_size": 256, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi3": {},
    "gpt2": TIED | GPT2,
    "gpt_bigcode": TIED | GPT2,
    "starcoder2": TIED,
    "gpt_neox": {"num_key_value_heads": 4, "rotary_pct": 0.25},
    "bloom": TIED | {"n_layer": 3, "n_head": 4},
    "falcon": TIED | GROUPS | {"alibi": False},
    "stablelm": {"partial_rotary_factor": 0.25, "use_qkv_bias": True},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": EXPERTS | {"num_key_value_heads": 4},
    "cohere": TIED,
    "cohere2": TIED | WINDOW,
    "exaone4": WINDOW,
    "seed_oss": SIZE,
    "glm": SIZE,
    "glm4": SIZE,
    "gpt_oss": LOCAL | SIZE | WINDOW | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "nemotron": SIZE,
    "hunyuan_v1_dense": TIED | SIZE,
    "jais2": SIZE,
}


def tiny(kind: str) -> Any:
    """A model whose every matrix, norm and bias matters."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**FIELDS | TYPES[kind])).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.mul_("norm" in name or "ln" in name).add_(0.1 * torch.randn_like(parameter))
    return model


def convert(folder: Path) -> None:
    """llama.cpp's conversion, without a vocabulary."""
    import gguf
    from conversion import ModelBase, get_model_class  # type: ignore[import-not-found]

    numbers = ModelBase.load_hparams(folder, False)
    rope = numbers.get("rope_parameters") or {}
    # What these conversions read by names that transformers 5 has no more.
    named = {"n_ctx": 64, "rotary_pct": rope.get("partial_rotary_factor", 1.0)}
    if "rms_norm_eps" in numbers:
        named["layernorm_epsilon"] = numbers["rms_norm_eps"]
    named["layer_norm_epsilon"] = numbers.get("layer_norm_epsilon", 1e-5)

    kind = get_model_class(json.loads((folder / "config.json").read_text())["architectures"][0])
    vocabulary = {str(token): token for token in range(FIELDS["vocab_size"])}  # Gemma's conversion counts it
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    goal = folder / "base.gguf"
    converter = kind(folder, gguf.LlamaFileType.ALL_F32, goal, hparams=numbers | named, eager=True)
    converter.gguf_writer.add_tokenizer_model("none")
    converter.gguf_writer.add_vocab_size(len(vocabulary))
    converter.set_vocab = lambda: None
    converter.gguf_writer.add_vocab_size = lambda size: None  # some write it once more
    converter.write()


if __name__ == "__main__":
    for place in map(Path, sys.argv[1:]):
        try:
            convert(place)
        except Exception:  # the others' conversions go on
            (place / "base.gguf").unlink(missing_ok=True)
            print(place.name, traceback.format_exc(), file=sys.stderr)
