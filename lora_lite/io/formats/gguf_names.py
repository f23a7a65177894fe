"""llama.cpp's names of a model's layers, and the order that it has their output rows in.

The names are those of gguf.TensorNameMap. What else a conversion does to a weight is in llama.cpp's conversion/*.py,
one class for each architecture: read there, and each type of model below run in llama.cpp beside transformers.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...base.layer import find_layers
from ...errors import CheckpointError, brief
from ..keys import core

Order = Callable[[str, Any, int], Tensor | None]
"""(name in a block, config, d_out) -> for each output row in GGUF the row here; None where they are the same."""


def same(name: str, config: Any, d_out: int) -> None:
    """All rows as they are."""


def rotary(name: str, config: Any, d_out: int) -> Tensor | None:
    """In each head of q and k the two numbers of a rotary pair are neighbours, as in Meta's checkpoints."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": _groups(config)}.get(name)
    return None if heads is None else torch.arange(d_out).reshape(heads, 2, -1).mT.reshape(-1)


def by_head(name: str, config: Any, d_out: int) -> Tensor | None:
    """One matrix of q, k and v of the first head, of the second, ... has all q, all k, all v."""
    if name != "attn_qkv":
        return None
    return torch.arange(d_out).reshape(config.num_attention_heads, 3, -1).transpose(0, 1).reshape(-1)


def by_group(name: str, config: Any, d_out: int) -> Tensor | None:
    """The same for Falcon, where some heads of q share one of k and v."""
    if name != "attn_qkv":
        return None
    heads = config.num_attention_heads
    one = 1 if config.multi_query else heads
    groups = config.num_kv_heads if config.new_decoder_architecture else one
    rows = torch.arange(d_out).reshape(groups, heads // groups + 2, -1)
    return torch.cat([rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()])


def _groups(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or int(config.num_attention_heads)


@dataclass(frozen=True)
class Architecture:
    """llama.cpp's kind of model."""

    name: str  # general.architecture
    order: Order = same
    always_ties: bool = False  # does llama.cpp take the embedding for the head, whatever the config says?
    is_plain: bool = True  # does a block add what its MLP's last layer puts out as it is?


ARCHITECTURES = {  # by model_type of transformers
    "llama": Architecture("llama", rotary),
    "mistral": Architecture("llama", rotary),
    "mixtral": Architecture("llama", rotary),
    "smollm3": Architecture("smollm3", rotary),
    "arcee": Architecture("arcee", rotary),
    "granite": Architecture("granite", rotary, is_plain=False),
    "granitemoe": Architecture("granitemoe", rotary, is_plain=False),
    "olmo": Architecture("olmo", rotary),
    "ernie4_5": Architecture("ernie4_5"),
    "apertus": Architecture("apertus"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2_moe": Architecture("qwen2moe"),
    "qwen3_moe": Architecture("qwen3moe"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2", always_ties=True, is_plain=False),
    "gemma3_text": Architecture("gemma3", is_plain=False),
    "phi": Architecture("phi2"),
    "phi3": Architecture("phi3"),
    "gpt2": Architecture("gpt2"),
    "gpt_bigcode": Architecture("starcoder"),
    "starcoder2": Architecture("starcoder2"),
    "gpt_neox": Architecture("gptneox", by_head),
    "bloom": Architecture("bloom", by_head),
    "falcon": Architecture("falcon", by_group),
    "stablelm": Architecture("stablelm"),
    "olmo2": Architecture("olmo2", is_plain=False),
    "olmo3": Architecture("olmo2", is_plain=False),
    "olmoe": Architecture("olmoe"),
    "cohere": Architecture("command-r"),
    "cohere2": Architecture("cohere2"),
    "exaone4": Architecture("exaone4", is_plain=False),
    "seed_oss": Architecture("seed_oss"),
    "glm": Architecture("chatglm"),
    "glm4": Architecture("glm4", is_plain=False),
    "gpt_oss": Architecture("gpt-oss"),
    "nemotron": Architecture("nemotron"),
    "hunyuan_v1_dense": Architecture("hunyuan-dense"),
    "jais2": Architecture("jais2"),
}


@dataclass(frozen=True)
class Named:
    """The layers of a model that a GGUF file has names for."""

    architecture: Architecture
    config: Any
    by_name: dict[str, str]  # "blk.0.attn_q.weight" -> the layer's path

    def rows(self, name: str, d_out: int) -> Tensor | None:
        """For each output row in GGUF the row here."""
        return self.architecture.order(name.removesuffix(".weight").rpartition(".")[2], self.config, d_out)


def text_config(root: nn.Module) -> Any:
    """The config of the language model; None where there is none."""
    config: Any = getattr(root, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def architecture_of(root: nn.Module) -> Architecture:
    """The architecture of a model. Raises CheckpointError for one that isn't known here."""
    kind = getattr(text_config(root), "model_type", None)
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"this {type(root).__name__} (model_type {brief(repr(kind))}) has no GGUF architecture that is known here\n"
            f"  known: {', '.join(sorted(ARCHITECTURES))}\n"
            f"  merge it (merge_checkpoint), and convert the folder by llama.cpp's convert_hf_to_gguf.py"
        )
    return ARCHITECTURES[kind]


def named_layers(root: nn.Module) -> Named:
    """llama.cpp's names of a model's layers. Raises CheckpointError for an unknown model, or without gguf."""
    architecture, config = architecture_of(root), text_config(root)
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise CheckpointError("GGUF's names of layers are in the package gguf\n  pip install 'gguf>=0.19'") from error
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    paths: dict[str, str] = {}
    for path in find_layers(dict(root.named_modules())):
        plain = core(path)
        known = (names.get_name(key) for key in (path, plain, f"model.{plain}"))
        if name := next(filter(None, known), None):
            paths[path] = f"{name}.weight"
    counts = Counter(paths.values())  # a name of two layers is no layer's
    return Named(architecture, config, {name: path for path, name in paths.items() if counts[name] == 1})
