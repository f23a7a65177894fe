"""Models in llama.cpp: a base of transformers as an F32 GGUF file, and what it answers with an adapter on.

The orders of rows are written out here once more, index by index, so that base and adapter don't share a mistake.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as llama
import numpy as np
import torch
from torch import Tensor


def for_rope(matrix: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of the rows of q and k: of each head the i-th of the first half, the i-th of the second, ..."""
    size = len(matrix) // heads
    rows = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return matrix[rows]


def all_q_all_k_all_v(matrix: Tensor, heads: int) -> Tensor:
    """From q, k and v of the first head, of the second, ..."""
    size = len(matrix) // (3 * heads)
    rows = [(3 * head + part) * size + i for part in range(3) for head in range(heads) for i in range(size)]
    return matrix[rows]


def write_base(model: Any, path: Path, architecture: str) -> Path:
    """A model of transformers as llama.cpp reads it, without a vocabulary."""
    config = model.config
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(size * rope.get("partial_rotary_factor", 1.0)))
    if architecture == "gptneox":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_parallel_residual(config.use_parallel_residual)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        tensor, name = value.detach().float(), names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name == "output.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and ".attn_q." in name:
            tensor = for_rope(tensor, heads)
        if architecture == "llama" and ".attn_k." in name:
            tensor = for_rope(tensor, groups)
        if architecture == "gptneox" and ".attn_qkv." in name:
            tensor = all_q_all_k_all_v(tensor, heads)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@llama.llama_log_callback
def _silent(level: int, text: bytes, data: Any) -> None:
    """llama.cpp writes hundreds of lines to stderr."""


class Base:
    """A model in llama.cpp, its keys and values in F32."""

    def __init__(self, path: Path, tokens: int = 64) -> None:
        llama.llama_log_set(_silent, ctypes.c_void_p(0))
        parameters = llama.llama_model_default_params()
        parameters.use_mmap = False
        parameters.use_extra_bufts = False  # weights that are packed for a CPU's products are rounded
        self.model = llama.llama_model_load_from_file(str(path).encode(), parameters)
        assert self.model, f"llama.cpp doesn't load {path}"
        context = llama.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = tokens
        context.n_threads = context.n_threads_batch = 1
        context.type_k = context.type_v = 0
        context.flash_attn_type = 0
        self.context = llama.llama_init_from_model(self.model, context)

    def close(self) -> None:
        llama.llama_free(self.context)
        llama.llama_model_free(self.model)

    @contextmanager
    def lora(self, path: Path, scale: float = 1.0) -> Iterator[None]:
        """A LoRA's file, read by llama.cpp, at a scale."""
        adapter = llama.llama_adapter_lora_init(self.model, str(path).encode())
        assert adapter, f"llama.cpp doesn't load {path}"
        adapters, scales = (llama.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(scale)
        assert llama.llama_set_adapters_lora(self.context, adapters, 1, scales) == 0
        yield
        llama.llama_set_adapters_lora(self.context, None, 0, None)

    @contextmanager
    def control_vector(self, path: Path) -> Iterator[None]:
        """A vector's file, read by the package gguf, and laid out as llama.cpp's common library does: block 1 first.

        That library, which reads such files for its programs, isn't in the Python package.
        """
        directions = {int(t.name.split(".")[1]): t.data for t in gguf.GGUFReader(path).tensors}
        width = len(next(iter(directions.values())))
        values = np.zeros((max(directions), width), np.float32)
        for block, direction in directions.items():
            values[block - 1] = direction
        pointer = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        last = llama.llama_model_n_layer(self.model)
        assert llama.llama_set_adapter_cvec(self.context, pointer, values.size, width, 1, last) == 0
        yield
        llama.llama_set_adapter_cvec(self.context, None, 0, 0, 0, 0)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """The logits (t, V) of t tokens."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        batch = llama.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        assert llama.llama_decode(self.context, batch) == 0
        width = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        values = np.ctypeslib.as_array(llama.llama_get_logits(self.context), (len(ids), width)).copy()
        llama.llama_batch_free(batch)
        return torch.from_numpy(values)


def kl(ours: Tensor, theirs: Tensor) -> float:
    """The mean over tokens of KL(ours ‖ theirs), in nats."""
    p, q = (logits.double().log_softmax(-1) for logits in (ours, theirs))
    return float((p.exp() * (p - q)).sum(-1).mean())
