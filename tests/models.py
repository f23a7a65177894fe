"""Small models for tests, built from configs: nothing is downloaded."""

import copy
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lora_lite as ll
from lora_lite.core.variant import needs_data, weight_use

sys.path.append(str(Path(__file__).parent / "laws"))  # of a script, which has its own folder alone
from oracles import DATA, FIELDS, NOT_AFFINE

IDS = torch.arange(24).reshape(2, 12)
BUT_THREE = r"(v|o|gate|up)_proj"
"""`exclude_names` of a Llama that leave a square, a narrow and a wide layer of each block: q, k and down."""


def tiny_llama(dtype: torch.dtype = torch.float32, *, seed: int = 0, bias: bool = False, **overrides: Any) -> Any:
    """Two blocks, width 64; k and v are narrower than q, so nothing but q and o is square."""
    return once(lambda: _tiny_llama(dtype, seed, bias, overrides), "llama", dtype, seed, bias, overrides)


_BUILT: dict[str, tuple[Any, torch.Tensor]] = {}


def once(build: Callable[[], Any], *key: Any) -> Any:
    """A copy of what `build` makes, which is made once a process; the random numbers go on as after it was made."""
    name = repr((torch.get_default_dtype(), *key))
    if name not in _BUILT:
        _BUILT[name] = build(), torch.get_rng_state()
    model, state = _BUILT[name]
    torch.set_rng_state(state)
    return copy.deepcopy(model)


def _tiny_llama(dtype: torch.dtype, seed: int, bias: bool, overrides: dict[str, Any]) -> Any:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "attention_bias": bias,
        "mlp_bias": bias,
        "pad_token_id": 0,
    }
    model = LlamaForCausalLM(LlamaConfig(**(sizes | overrides)))
    if bias:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
    return model.to(dtype).eval()


SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def moe(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A tiny mixture-of-experts model, with biases where its kind has them."""
    return once(lambda: _moe(name, dtype, overrides), name, dtype, overrides)


def _moe(name: str, dtype: torch.dtype, overrides: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    few = {"num_experts_per_tok": 2, "num_local_experts": 4, "intermediate_size": 48}
    makers: dict[str, Any] = {
        "qwen3": lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **SIZES, head_dim=16, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2, **overrides
            )
        ),
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES | few | overrides)),
        "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, **few, head_dim=16, **overrides)),
    }
    model = makers[name]()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1 or path.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.to(dtype).eval()


def tiny_folder(folder: Path, dtype: torch.dtype = torch.bfloat16, bias: bool = False, **overrides: Any) -> str:
    """The tiny Llama as a folder for from_pretrained."""
    tiny_llama(dtype, hidden_size=128, intermediate_size=256, bias=bias, **overrides).save_pretrained(folder)
    return str(folder)


def quantized(folder: str, quantization: str, **kwargs: Any) -> Any:
    """The tiny folder on a bitsandbytes base."""
    return ll.load_base(folder, dtype=torch.bfloat16, quantization=quantization, **kwargs)


def quantized_llama(quantization: str) -> Any:
    """A block of the tiny Llama with biases, on a bitsandbytes base."""

    def build() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return quantized(tiny_folder(Path(folder), bias=True, num_hidden_layers=1), quantization)

    return once(build, quantization)


class OneLinear(nn.Module):
    """One linear layer, with a forward that passes x on."""

    def __init__(self, d_in: int = 16, d_out: int = 24, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.proj = nn.Linear(d_in, d_out, bias=bias, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def one_layer(
    variant: str, bias: bool = True, dtype: torch.dtype = torch.float32, rows: int = 5
) -> tuple[Any, torch.Tensor]:
    """A model of one layer of the kind that a method is for, called proj, and an input of some rows, or token ids."""
    model: Any = OneLinear(bias=bias)
    x = torch.randn(rows, 16, dtype=dtype)
    if variant == "norm":
        model.proj = nn.LayerNorm(16, bias=bias)
        nn.init.normal_(model.proj.weight)
    if variant == "tokens":
        model.proj, x = nn.Embedding(16, 24), torch.arange(3, rows + 3) % 16
    return model.to(dtype).eval(), x


def config(variant: str, **overrides: Any) -> Any:
    """A registered variant's own config, on every linear layer of the blocks; of one that acts at the ends of a prompt,
    at all of its tokens.

    A default rank that is too large for the smallest layer of the tests becomes 5, which divides no width of theirs.
    """
    names = {"norm": r"norm$", "tokens": r"embed_tokens$"}.get(variant, r"_proj$")
    everywhere = {"variant": variant, "target_names": (names,), "target_roles": ()}
    everywhere |= {"token_ids": (1, 3, 5, 7, 13)} if variant == "tokens" else {}
    cls: Any = ll.config_for(variant)
    if variant == "reft":
        everywhere |= {"kinds": "linear", "first": 1 << 20}
    everywhere |= FIELDS.get(variant, {})
    cfg = cls(**(everywhere | overrides))
    if "r" in cls.__dataclass_fields__ and "r" not in overrides:
        try:
            ll.REGISTRY[variant].layer_specs(ll.Target("layer", 16, 24, "float32"), cfg)
        except ll.ConfigError:
            cfg = cls(**(everywhere | overrides | {"r": 5}))
    return cfg


def acts_everywhere(variant: str) -> bool:
    """Is its effect the same at all positions of a sequence, so that a weight may hold it?"""
    return variant not in NOT_AFFINE and ll.REGISTRY[variant].positions(config(variant)) is None


def is_trained(variant: str) -> bool:
    """Does the method have parameters to train, or is it computed?"""
    return "trained" in mechanisms(variant)


def mechanisms(variant: str) -> set[str]:
    """What the runtime does for a method, by what its class declares."""
    cls, cfg = ll.REGISTRY[variant], config(variant)
    target = ll.Target("layer", 64, 64, "float32")
    specs = [*cls.layer_specs(target, cfg).values(), *cls.shared_specs((target,), cfg).values()]
    parts = ("forward_input", "low_rank", "shared_specs", "init", "group_init", "on_step", "penalty", "refresh")
    overridden = {part for part in parts if getattr(cls, part) is not getattr(ll.Variant, part)}
    tensors = {
        "trained": any(spec.trainable for spec in specs),
        "kept numbers": any(not spec.trainable and spec.dtype is None for spec in specs),
        "a table": any(spec.dtype is not None for spec in specs),
        "a constant": any(spec.is_shift for spec in specs),
    }
    form = "on x and y" if cls.reads_input else "on y"
    scale = "own scale" if cls.handles_scale else "blended"
    return {f"base {weight_use(cfg)}", form, scale, *overridden, *(name for name, has in tensors.items() if has)}


def covering() -> list[str]:
    """Some registered methods that together have every mechanism: for what takes seconds and is no matter of maths."""
    has = {variant: mechanisms(variant) for variant in ll.REGISTRY}
    missing, chosen = set().union(*has.values()), ["lora"]
    while missing := missing - has[chosen[-1]]:
        chosen.append(max(has, key=lambda variant: len(has[variant] & missing)))
    return chosen


def attach(model: nn.Module, cfg: Any, name: str = "default") -> ll.Adapter:
    """ll.attach, with data for a method that is computed from it. A history: of two rounds."""
    if cfg.variant == "history":
        return keep_two(model, cfg, name)
    if not needs_data(cfg):
        return ll.attach(model, cfg, name)
    return ll.attach(model, cfg, name, calibration_data=calibration(model, cfg))


def calibration(model: nn.Module, cfg: Any) -> Any:
    """The data that a method is computed from: a direction for each of its layers, or what its family says."""
    sizes = {t.path: (t.d_in, t.d_out) for t in ll.plan(model, cfg)}
    if cfg.variant in DATA:
        return DATA[cfg.variant](model, sizes)
    generator = torch.Generator().manual_seed(3)
    rank = getattr(cfg, "rank", 1)
    return {"directions": {path: torch.randn(rank, d_out, generator=generator) for path, (_, d_out) in sizes.items()}}


def keep_two(model: nn.Module, cfg: Any, name: str) -> ll.Adapter:
    """A history of two LoRAs, of different ranks, on the layers that this config is for."""
    filters = {field: getattr(cfg, field) for field in cfg.FILTERS}
    for r, c in ((3, 0.7), (2, -1.5)):
        perturb(ll.attach(model, ll.LoRAConfig(r=r, dtype=cfg.dtype, **filters), "round"), seed=r)
        made = ll.freeze_into(model, "round", into=name, c=c)
    return made


MIXED: list[tuple[str, dict[str, Any], float]] = [
    ("lora", {"r": 3, "target_names": "q_proj|mlp"}, 0.7),
    ("ia3", {"target_names": "_proj$"}, 1.5),
    ("lora", {"r": 5, "alpha": 3.0, "rslora": True, "target_names": "down_proj"}, -0.4),
    ("pissa", {"r": 2, "target_names": "q_proj|down_proj"}, 2.0),
    ("ia3_ff", {"target_names": "down_proj|o_proj"}, 0.5),
    ("dora", {"r": 2, "per_layer": {"down_proj": {"r": 4, "alpha": 1.0}}}, 0.9),
    ("abliteration", {"target_names": "o_proj|down_proj", "normalization": "full"}, 0.3),
    ("abliteration", {"target_names": "down_proj", "normalization": "column"}, 0.6),
    ("ssteer", {"r": 6, "target_names": "k_proj|down_proj"}, 0.8),
    ("antipasto", {"r": 7, "target_names": "o_proj|down_proj"}, -0.5),
    ("steer", {"target_names": "o_proj|down_proj"}, 0.5),
    ("lora", {"r": 1, "target_names": "down_proj|k_proj"}, 1.0),
]
"""Rounds of every kind: method, fields, coefficient."""


def trained(model: nn.Module, variant: str, name: str = "default", *, seed: int = 1, **fields: Any) -> ll.Adapter:
    """An adapter that has moved from its start, the same for the same seed."""
    torch.manual_seed(seed)  # a fresh LoRA is random
    adapter = attach(model, config(variant, **fields), name)
    perturb(adapter, 0.1, seed)
    return adapter


def keep(model: nn.Module, variant: str = "lora", c: float = 1.0, *, seed: int = 1, **fields: Any) -> ll.Adapter:
    """A trained adapter as a round of the model's history."""
    trained(model, variant, seed=seed, **fields)
    return ll.freeze_into(model, c=c)


def keep_rounds(model: Any, which: Iterable[int]) -> Any:
    """The model with these of MIXED in its history, after those that it has."""
    for i in which:
        variant, fields, c = MIXED[i]
        keep(model, variant, c, seed=i, **fields)
    return model


@torch.no_grad()
def perturb(adapter: ll.Adapter, size: float = 0.05, seed: int = 1) -> None:
    """Move every trainable tensor away from its start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))


def gradients_of(model: Any, cfg: Any, ids: torch.Tensor, reentrant: bool | None = None) -> dict[str, Any]:
    """Those of a perturbed adapter in training, by key; with gradient checkpointing of this kind, unless it is None."""
    adapter = ll.attach(model, cfg)
    perturb(adapter, 0.2)
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    model(input_ids=ids, labels=ids).loss.backward()
    return {key: tensor.grad for key, tensor in adapter.named_tensors()}


def train(model: Any, adapter: ll.Adapter, steps: int = 2) -> None:
    """AdamW steps on fixed tokens. Of a method that is computed, nothing is trainable, and only the forward runs."""
    parameters = list(adapter.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0) if parameters else None
    for _ in range(steps):
        loss = loss_of(model)
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def loss_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The language-model loss on fixed tokens."""
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


__all__ = [
    "BUT_THREE",
    "IDS",
    "MIXED",
    "SIZES",
    "AutoModelForCausalLM",
    "OneLinear",
    "acts_everywhere",
    "attach",
    "config",
    "is_trained",
    "keep",
    "keep_rounds",
    "loss_of",
    "moe",
    "perturb",
    "quantized",
    "quantized_llama",
    "tiny_folder",
    "tiny_llama",
    "train",
    "trained",
]
