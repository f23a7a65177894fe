"""The space of PEFT's folders as a table: small models, and what PEFT's own adapters can be on them.

One line is one case: a model, PEFT's config class, its fields. `refused` is what `load_peft` says of a folder that it
does not take, `unwritten` what `save_peft` says of one that it takes and can't write.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Case:
    model: str
    config: type[peft.PeftConfig]
    fields: dict[str, Any]
    refused: str = ""
    unwritten: str = ""
    gradients: bool = True  # has each of PEFT's trained tensors one of ours with the same gradient?
    id: str = ""

    def made(self) -> peft.PeftConfig:
        return self.config(**self.fields)


# ---- models that are nothing but their layers -----------------------------------------------------


class Chain(nn.Module):
    """Its children in a row; what follows a convolution or an embedding sees flat features."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.named_children():
            x = layer(x, x, x)[0] if name == "mha" else layer(x)
        return x


class Deep(nn.Module):
    """Blocks of two layers, with numbers in their paths."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Chain(lin0=nn.Linear(6, 12), act=nn.ReLU(), lin1=nn.Linear(12, 6)) for _ in "abc")
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Bare(nn.Module):
    """Linear layers whose weights are bare parameters."""

    class Part(nn.Module):
        def __init__(self, d_in: int, d_out: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(d_out, d_in) * 0.3)
            self.bias = nn.Parameter(torch.randn(d_out) * 0.1)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias)

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.act, self.lin1 = self.Part(10, 20), nn.ReLU(), self.Part(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.act(self.lin0(x)))


class Turned(nn.Module):
    """A layer with the names of a linear one, whose weight is (in_features, out_features)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.weight, self.bias = nn.Parameter(torch.randn(d_in, d_out) * 0.3), nn.Parameter(torch.randn(d_out) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def mlp(bias: bool = True) -> Chain:
    return Chain(lin0=nn.Linear(10, 20, bias), act=nn.ReLU(), lin1=nn.Linear(20, 2, bias))


def normed() -> Chain:
    layers: dict[str, nn.Module] = {"lin0": nn.Linear(10, 20), "layernorm0": nn.LayerNorm(20), "act": nn.ReLU()}
    return Chain(**layers, lin1=nn.Linear(20, 6), layernorm1=nn.LayerNorm(6), lin2=nn.Linear(6, 2))


def conv(dims: int, kernel: int = 3, channels: tuple[int, int] = (4, 6), **options: Any) -> Chain:
    layer = getattr(nn, f"Conv{dims}d")(*channels, kernel, **options)
    # Not ReLU, which lets nothing of one channel through where all of its outputs are below 0.
    return Chain(**{f"conv{dims}d": layer}, act=nn.Tanh(), flat=nn.Flatten(), lin0=nn.LazyLinear(3))


# ---- tiny models of transformers ------------------------------------------------------------------

SIZES: dict[str, Any] = {"vocab_size": 40, "max_position_embeddings": 24}
WIDTHS: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(kind: Any = tf.LlamaForCausalLM, **fields: Any) -> Any:
    settings = {**SIZES, **WIDTHS, "num_key_value_heads": 2, "intermediate_size": 24, "pad_token_id": 0}
    return kind(tf.LlamaConfig(**settings | fields))


def bert(kind: Any) -> Any:
    return kind(tf.BertConfig(**SIZES, **WIDTHS, intermediate_size=24))


def gpt2(kind: Any = tf.GPT2LMHeadModel, **fields: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "n_positions": 24,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "pad_token_id": 0,
    }
    return kind(tf.GPT2Config(**sizes | fields))


def opt() -> Any:
    return tf.OPTForCausalLM(tf.OPTConfig(**SIZES, **WIDTHS, ffn_dim=24, word_embed_proj_dim=16, pad_token_id=0))


def t5() -> Any:
    sizes: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes | {"decoder_start_token_id": 0}))


def mixtral() -> Any:
    few: dict[str, Any] = {"num_local_experts": 3, "num_key_value_heads": 2, "intermediate_size": 12}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, **WIDTHS, **few))


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


X = numbers(3, 10)
IDS = torch.tensor([[1, 5, 9, 30, 2], [7, 5, 1, 38, 3]])
MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "mlp": (mlp, X),
    "mlp_no_bias": (lambda: mlp(False), X),
    "normed": (normed, X),
    "deep": (lambda: Chain(body=Deep()), X[:, :6]),
    "bare": (Bare, X),
    "turned": (lambda: Chain(lin0=Turned(10, 20), act=nn.ReLU(), lin1=Turned(20, 2)), X),
    "emb": (
        lambda: Chain(
            emb=nn.Embedding(40, 5), conv1d=Conv1D(6, 5), act=nn.ReLU(), flat=nn.Flatten(), lin0=nn.Linear(30, 2)
        ),
        IDS,
    ),
    "conv1d": (lambda: conv(1), numbers(2, 4, 9)),
    "conv1d_wide": (lambda: conv(1, 2, (32, 24)), numbers(2, 32, 5)),
    "conv1d_one": (lambda: conv(1, 2, (1, 1)), numbers(2, 1, 9)),
    "conv2d": (lambda: conv(2, stride=2, padding=1), numbers(2, 4, 7, 7)),
    "conv2d_1x1": (lambda: conv(2, 1), numbers(2, 4, 3, 3)),
    "conv2d_groups": (lambda: conv(2, groups=2), numbers(2, 4, 5, 5)),
    "conv3d": (lambda: conv(3, 2), numbers(2, 4, 4, 4, 4)),
    "mha": (lambda: Chain(lin0=nn.Linear(10, 12), mha=nn.MultiheadAttention(12, 3), lin1=nn.Linear(12, 2)), X),
    "llama": (llama, IDS),
    "llama_tied": (lambda: llama(tie_word_embeddings=True), IDS),
    "llama_bias": (lambda: llama(attention_bias=True), IDS),
    "llama_cls": (lambda: llama(tf.LlamaForSequenceClassification), IDS),
    "llama_tokens": (lambda: llama(tf.LlamaForTokenClassification), IDS),
    "bert_cls": (lambda: bert(tf.BertForSequenceClassification), IDS),
    "bert_tokens": (lambda: bert(tf.BertForTokenClassification), IDS),
    "gpt2": (gpt2, IDS),
    "gpt2_cls": (lambda: gpt2(tf.GPT2ForSequenceClassification), IDS),
    "opt": (opt, IDS),
    "t5": (t5, IDS),
    "mixtral": (mixtral, IDS),
}


def built(name: str) -> nn.Module:
    """The model of this name with numbers of its own everywhere, the same at each call."""
    make, x = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        output(model, x)  # lazy layers have their size then
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.05)
    return model.requires_grad_(False)


def output(model: Any, x: Tensor) -> Tensor:
    if not isinstance(getattr(model, "config", None), tf.PretrainedConfig):
        return model(x)
    more = {"decoder_input_ids": x} if model.config.is_encoder_decoder else {}
    return model(input_ids=x, **more).logits


# ---- the table ------------------------------------------------------------------------------------

LORA, IA3, VERA, ADALORA = peft.LoraConfig, peft.IA3Config, peft.VeraConfig, peft.AdaLoraConfig
NORMS, TOKENS = peft.LNTuningConfig, peft.TrainableTokensConfig


NO_LAYER = "no layer that an adapter goes on holds it"


def cases() -> Iterator[Case]:
    families = [import_module(file.stem).TABLE for file in sorted(Path(__file__).parent.glob("peft_space_*.py"))]
    for n, (model, config, fields, *rest) in enumerate([*TABLE, *(row for table in families for row in table)]):
        options = rest[0] if rest else {}
        named = {name: value for name, value in fields.items() if name != "target_modules"}
        yield Case(model, config, fields, **options, id=f"{n}-{model}-{config.__name__[:-6]}-{'-'.join(named)}")


TABLE: list[tuple[Any, ...]] = [
    # ---- LoRA on linear layers
    ("mlp", LORA, {"target_modules": "lin0"}),
    ("mlp", LORA, {"target_modules": ["lin1"]}),
    ("mlp", LORA, {"target_modules": ["lin0", "lin1"]}),
    ("mlp", LORA, {"target_modules": r"lin\d"}),
    ("mlp", LORA, {"target_modules": "all-linear"}),
    ("mlp", LORA, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("mlp", LORA, {"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1}),
    ("mlp", LORA, {"target_modules": ["lin0", "lin1"], "use_rslora": True, "r": 2}),
    ("mlp", LORA, {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin0": 3}}),
    ("mlp", LORA, {"target_modules": ["lin0", "lin1"], "use_dora": True}),
    ("mlp", LORA, {"target_modules": ["lin1"], "use_dora": True, "lora_alpha": 32}),
    ("mlp", LORA, {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "use_dora": True}),
    ("mlp", LORA, {"target_modules": ["lin0", "lin1"], "lora_bias": True, "lora_alpha": 32}),
    ("mlp", LORA, {"target_modules": ["lin0"], "lora_bias": True, "use_rslora": True}),
    ("mlp", LORA, {"target_modules": ["lin0"], "bias": "all"}),
    ("mlp", LORA, {"target_modules": ["lin0"], "bias": "lora_only"}),
    ("mlp", LORA, {"target_modules": ["lin0"], "bias": "all", "modules_to_save": ["lin1"]}),
    ("mlp_no_bias", LORA, {"target_modules": ["lin0"], "bias": "all"}),
    ("mlp_no_bias", LORA, {"target_modules": ["lin0"], "bias": "lora_only"}),
    ("mlp", LORA, {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"]}),
    ("bare", LORA, {"target_modules": [], "target_parameters": ["lin0.weight"]}),
    ("bare", LORA, {"target_modules": [], "target_parameters": ["lin0.weight", "lin1.weight"]}),
    ("turned", LORA, {"target_modules": [], "target_parameters": ["lin0.weight"]}),
    ("turned", LORA, {"target_parameters": ["lin0.weight", "lin1.weight"], "r": 3, "use_rslora": True}),
    ("deep", LORA, {"target_modules": ["lin0"], "layers_to_transform": [1]}),
    ("deep", LORA, {"target_modules": ["lin1"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    ("deep", LORA, {"target_modules": ["lin0", "lin1"], "exclude_modules": ["layers.1.lin0"]}),
    (
        "deep",
        LORA,
        {"target_modules": ["lin0"], "rank_pattern": {r"layers\.1\.lin0": 3}, "modules_to_save": ["head"]},
    ),
    ("normed", LORA, {"target_modules": ["lin1"], "modules_to_save": ["layernorm0", "lin2"]}),
    *(
        ("mlp", LORA, {"target_modules": ["lin0"], "init_lora_weights": init}, options)
        for init, options in {
            False: {},
            "gaussian": {},
            "orthogonal": {},
            "pissa": {"unwritten": "PEFT has no adapter like"},
            "olora": {"unwritten": "PEFT has no adapter like"},
            "pissa_niter_4": {"refused": "wrote the base"},
            "mica": {},
        }.items()
    ),
    # ---- LoRA on other layers
    ("emb", LORA, {"target_modules": ["conv1d"]}),
    ("emb", LORA, {"target_modules": ["emb"]}),
    ("emb", LORA, {"target_modules": ["emb", "conv1d"]}),
    ("emb", LORA, {"target_modules": ["emb", "conv1d"], "use_dora": True}),
    ("emb", LORA, {"target_modules": ["conv1d"], "lora_bias": True, "lora_alpha": 3}),
    ("emb", LORA, {"target_modules": ["conv1d"], "modules_to_save": ["emb"]}),
    ("emb", LORA, {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 7]}}),
    ("conv1d", LORA, {"target_modules": ["conv1d"]}),
    ("conv1d", LORA, {"target_modules": ["conv1d"], "use_dora": True}),
    ("conv2d", LORA, {"target_modules": ["conv2d"]}),
    ("conv2d", LORA, {"target_modules": ["conv2d", "lin0"], "use_rslora": True}),
    ("conv2d", LORA, {"target_modules": ["conv2d", "lin0"], "use_dora": True}),
    ("conv2d", LORA, {"target_modules": ["conv2d"], "modules_to_save": ["lin0"]}),
    ("conv2d", LORA, {"target_modules": ["lin0"], "modules_to_save": ["conv2d"]}),
    ("conv2d", LORA, {"target_modules": ["conv2d"], "lora_bias": True, "lora_alpha": 32}),
    ("conv2d_1x1", LORA, {"target_modules": ["conv2d", "lin0"], "lora_bias": True}),
    ("conv2d_groups", LORA, {"target_modules": ["conv2d"]}),
    ("conv2d_groups", LORA, {"target_modules": ["conv2d"], "lora_bias": True, "lora_alpha": 32}),
    ("conv3d", LORA, {"target_modules": ["conv3d"]}),
    ("conv3d", LORA, {"target_modules": ["conv3d", "lin0"], "use_dora": True}),
    ("conv3d", LORA, {"target_modules": ["conv3d"], "lora_bias": True, "lora_alpha": 32}),
    ("mha", LORA, {"target_modules": ["mha"]}, {"gradients": False}),
    ("mha", LORA, {"target_modules": ["mha", "lin0"]}, {"gradients": False}),
    # ---- LoRA on transformers' models
    ("llama", LORA, {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", LORA, {"target_modules": "all-linear", "rank_pattern": {"down_proj": 3}}),
    ("llama", LORA, {"target_modules": ["q_proj", "lm_head"]}),
    ("llama", LORA, {"target_modules": ["q_proj", "embed_tokens"]}),
    ("llama", LORA, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("llama", LORA, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    ("llama", LORA, {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    ("llama", LORA, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}),
    (
        "llama",
        LORA,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}},
    ),
    ("llama_tied", LORA, {"target_modules": ["q_proj"], "trainable_token_indices": [5, 1]}),
    (
        "llama_tied",
        LORA,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5], "lm_head": [5]}},
    ),
    (
        "llama_tied",
        LORA,
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"gradients": False},
    ),  # PEFT's are of parts
    ("llama_tied", LORA, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama_bias", LORA, {"target_modules": ["q_proj"], "bias": "all"}),
    ("llama_bias", LORA, {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only"}),
    ("llama_bias", LORA, {"target_modules": ["q_proj"], "lora_bias": True}),
    ("llama_cls", LORA, {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    ("llama_tokens", LORA, {"target_modules": ["q_proj"], "task_type": "TOKEN_CLS"}),
    ("bert_cls", LORA, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    ("bert_cls", LORA, {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"}),
    ("bert_cls", LORA, {"target_modules": ["query"], "bias": "all"}),
    ("bert_tokens", LORA, {"target_modules": ["query", "value"], "task_type": "TOKEN_CLS"}),
    ("gpt2", LORA, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ("gpt2", LORA, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True}),
    ("gpt2", LORA, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    ("gpt2", LORA, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    ("gpt2", LORA, {"target_modules": ["c_attn"], "alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}),
    (
        "gpt2_cls",
        LORA,
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "SEQ_CLS"},
    ),
    ("opt", LORA, {"target_modules": ["q_proj", "fc1"], "lora_alpha": 3}),
    ("opt", LORA, {"target_modules": ["q_proj"], "modules_to_save": ["fc2"]}),
    ("t5", LORA, {"target_modules": ["q", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
    ("t5", LORA, {"target_modules": ["q"], "modules_to_save": ["lm_head"]}),
    ("mixtral", LORA, {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"], "r": 2}),
    # ---- IA3
    ("mlp", IA3, {"target_modules": "lin0", "feedforward_modules": []}),
    ("mlp", IA3, {"target_modules": "lin0", "feedforward_modules": "lin0"}),
    ("mlp", IA3, {"target_modules": ["lin1"], "feedforward_modules": ["lin1"]}),
    ("mlp", IA3, {"target_modules": ["lin0", "lin1"], "feedforward_modules": []}),
    ("mlp", IA3, {"target_modules": ["lin0", "lin1"], "feedforward_modules": ["lin1"]}),
    ("mlp", IA3, {"target_modules": ["lin0", "lin1"], "feedforward_modules": ["lin0", "lin1"]}),
    (
        "mlp",
        IA3,
        {"target_modules": ["lin0"], "feedforward_modules": ["lin0"], "modules_to_save": ["lin1"]},
    ),
    ("emb", IA3, {"target_modules": ["conv1d"], "feedforward_modules": ["conv1d"]}),
    ("emb", IA3, {"target_modules": ["conv1d", "lin0"], "feedforward_modules": ["conv1d"]}),
    (
        "emb",
        IA3,
        {"target_modules": ["conv1d"], "feedforward_modules": [], "modules_to_save": ["lin0"]},
    ),
    ("conv2d", IA3, {"target_modules": ["conv2d"], "feedforward_modules": []}),
    (
        "conv2d",
        IA3,
        {"target_modules": ["conv2d", "lin0"], "feedforward_modules": ["conv2d"]},
        {"gradients": False, "unwritten": "each element of a patch"},
    ),
    ("conv2d_1x1", IA3, {"target_modules": ["conv2d", "lin0"], "feedforward_modules": ["conv2d", "lin0"]}),
    ("conv3d", IA3, {"target_modules": ["conv3d", "lin0"], "feedforward_modules": ["lin0"]}),
    ("llama", IA3, {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    (
        "bert_cls",
        IA3,
        {"target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"], "task_type": "SEQ_CLS"},
    ),
    ("gpt2", IA3, {"target_modules": ["c_attn", "c_fc"], "feedforward_modules": ["c_fc"], "fan_in_fan_out": True}),
    # ---- VeRA
    ("mlp", VERA, {"target_modules": "lin0", "r": 6}),
    ("mlp", VERA, {"target_modules": ["lin0", "lin1"], "r": 6}),
    ("mlp", VERA, {"target_modules": ["lin0", "lin1"], "r": 6, "save_projection": False}),
    ("mlp", VERA, {"target_modules": ["lin1"], "r": 6, "projection_prng_key": 17, "save_projection": False}),
    ("mlp", VERA, {"target_modules": ["lin1"], "r": 6, "d_initial": 0.3, "vera_dropout": 0.1}),
    ("mlp", VERA, {"target_modules": ["lin0"], "r": 6, "init_weights": False}),
    ("mlp", VERA, {"target_modules": ["lin0"], "r": 6, "modules_to_save": ["lin1"]}),
    ("mlp", VERA, {"target_modules": ["lin0"], "r": 6, "bias": "vera_only"}),
    ("mlp_no_bias", VERA, {"target_modules": ["lin0"], "r": 6, "bias": "all"}),
    ("emb", VERA, {"target_modules": ["conv1d"], "r": 6}),
    ("deep", VERA, {"target_modules": ["lin0", "lin1"], "r": 6, "layers_to_transform": [1, 2]}),
    ("llama", VERA, {"target_modules": ["q_proj", "down_proj"], "r": 6, "save_projection": False}),
    ("gpt2", VERA, {"target_modules": ["c_attn", "c_fc"], "r": 6, "save_projection": False, "fan_in_fan_out": True}),
    ("bert_cls", VERA, {"target_modules": ["query"], "r": 6, "task_type": "SEQ_CLS"}),
    # ---- AdaLoRA, LN tuning, trainable tokens
    ("mlp", ADALORA, {"target_modules": ["lin0"], "total_step": 1}),
    ("emb", ADALORA, {"target_modules": ["conv1d"], "total_step": 1}),
    (
        "mlp",
        ADALORA,
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "total_step": 1},
    ),
    ("conv2d", ADALORA, {"target_modules": ["conv2d", "lin0"], "total_step": 1}),
    ("conv2d", ADALORA, {"target_modules": ["conv2d"], "modules_to_save": ["lin0"], "total_step": 1, "init_r": 4}),
    ("mlp", ADALORA, {"target_modules": ["lin0"], "bias": "all", "total_step": 1}),
    ("mlp", ADALORA, {"target_modules": ["lin0", "lin1"], "bias": "lora_only", "total_step": 9, "tinit": 2}),
    ("gpt2", ADALORA, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "total_step": 1}),
    ("llama", ADALORA, {"target_modules": ["q_proj"], "total_step": 1, "trainable_token_indices": [5, 2]}),
    ("bert_cls", ADALORA, {"target_modules": ["query"], "total_step": 1, "task_type": "SEQ_CLS"}),
    ("mlp", VERA, {"target_modules": ["lin0"], "r": 6, "bias": "all"}),
    ("mlp", VERA, {"target_modules": ["lin0"], "r": 6, "bias": "all", "modules_to_save": ["lin1"]}),
    (
        "bare",
        LORA,
        {"target_modules": [], "target_parameters": ["lin0.weight"], "modules_to_save": ["lin1"]},
        {"refused": NO_LAYER},
    ),
    ("conv1d", LORA, {"target_modules": ["lin0"], "modules_to_save": ["conv1d"], "bias": "all"}),
    ("mha", LORA, {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "bias": "all"}, {"refused": NO_LAYER}),
    ("normed", LORA, {"target_modules": ["lin1"], "bias": "all"}),
    ("mixtral", LORA, {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    ("t5", IA3, {"target_modules": ["k", "wo"], "feedforward_modules": ["wo"], "modules_to_save": ["lm_head"]}),
    ("normed", NORMS, {"target_modules": "layernorm0"}),
    ("normed", NORMS, {"target_modules": ["layernorm0", "layernorm1"]}),
    (
        "normed",
        NORMS,
        {"target_modules": ["layernorm1"], "modules_to_save": ["lin2"]},
    ),
    ("mlp", NORMS, {"target_modules": ["lin0"]}),
    ("llama", NORMS, {"target_modules": ["input_layernorm", "norm"]}),
    (
        "emb",
        TOKENS,
        {"target_modules": ["emb"], "token_indices": [0, 1, 3]},
    ),
    ("llama", TOKENS, {"token_indices": [3, 1]}),
    ("llama_tied", TOKENS, {"token_indices": [1, 3]}),
]
