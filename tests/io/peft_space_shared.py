"""PEFT's folders of the methods whose layers share tensors: RandLoRA, PVeRA, VB-LoRA, Uni-LoRA, TinyLoRA, Lily."""

from typing import Any

import peft

PVERA, RANDLORA, VBLORA = peft.PveraConfig, peft.RandLoraConfig, peft.VBLoRAConfig
UNILORA, TINYLORA, LILY = peft.UniLoraConfig, peft.TinyLoraConfig, peft.LilyConfig
MLPS: list[dict[str, Any]] = [
    {"target_modules": "lin0"},
    {"target_modules": ["lin0"]},
    {"target_modules": ["lin1"]},
    {"target_modules": ["lin0", "lin1"]},
    {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
]
BANK, FEW = {"vector_length": 1, "num_vectors": 5}, {"r": 2, "stride_A": 1, "num_B": 2}
TWO = {"target_modules": ["lin0", "lin1"]}
GPT2 = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


def on_mlps(config: Any, **fields: Any) -> list[tuple[Any, ...]]:
    return [("mlp", config, at | fields) for at in MLPS]


TABLE: list[tuple[Any, ...]] = [
    # ---- PVeRA
    *on_mlps(PVERA),
    ("mlp", PVERA, TWO | {"r": 6, "save_projection": False, "projection_prng_key": 9}),
    ("mlp", PVERA, TWO | {"r": 6, "pvera_dropout": 0.1, "d_initial": 0.3, "generator_seed": 4}),
    ("mlp", PVERA, {"target_modules": ["lin0"], "r": 6, "bias": "pvera_only"}),
    ("mlp", PVERA, {"target_modules": ["lin0"], "r": 6, "bias": "all"}),
    ("emb", PVERA, {"target_modules": ["conv1d"]}),
    ("deep", PVERA, TWO | {"r": 6, "layers_to_transform": [1, 2]}),
    ("llama", PVERA, LLAMA | {"r": 6, "save_projection": False}),
    ("gpt2", PVERA, GPT2 | {"r": 6}),
    ("bert_cls", PVERA, {"target_modules": ["query"], "r": 6, "task_type": "SEQ_CLS"}),
    # ---- RandLoRA
    *on_mlps(RANDLORA, randlora_alpha=1),
    ("mlp", RANDLORA, TWO | {"r": 3, "randlora_alpha": 6, "randlora_dropout": 0.1}),
    ("mlp", RANDLORA, TWO | {"sparse": True, "randlora_alpha": 1}),
    ("mlp", RANDLORA, TWO | {"very_sparse": True, "randlora_alpha": 1}),
    ("mlp", RANDLORA, TWO | {"r": 3, "projection_prng_key": 5, "bias": "randlora_only"}),
    ("mlp", RANDLORA, TWO | {"r": 3, "save_projection": False}, {"refused": "in the dtype of the machine"}),
    ("emb", RANDLORA, {"target_modules": ["conv1d"], "r": 3}),
    ("deep", RANDLORA, TWO | {"r": 4, "layers_to_transform": [1, 2]}),
    ("llama", RANDLORA, LLAMA | {"r": 5, "randlora_alpha": 5}),
    ("gpt2", RANDLORA, GPT2 | {"r": 6, "randlora_alpha": 6}),
    ("bert_cls", RANDLORA, {"target_modules": ["query"], "r": 6, "task_type": "SEQ_CLS"}),
    # ---- VB-LoRA
    *on_mlps(VBLORA, vector_length=1, num_vectors=5),
    ("mlp", VBLORA, {"target_modules": ["lin1"], "vector_length": 2, "num_vectors": 5}),
    ("mlp", VBLORA, TWO | BANK | {"r": 2, "topk": 3, "vblora_dropout": 0.1, "init_logits_std": 0.3}),
    ("mlp", VBLORA, TWO | BANK | {"init_vector_bank_bound": 0.1, "bias": "vblora_only"}),
    ("mlp", VBLORA, TWO | BANK | {"save_only_topk_weights": True}, {"gradients": False}),
    ("emb", VBLORA, {"target_modules": ["conv1d"], "vector_length": 1, "num_vectors": 2}),
    (
        "deep",
        VBLORA,
        TWO | {"vector_length": 3, "num_vectors": 300, "save_only_topk_weights": True},
        {"gradients": False},
    ),
    ("deep", VBLORA, TWO | {"vector_length": 3, "num_vectors": 7, "layers_to_transform": [0, 2]}),
    ("llama", VBLORA, LLAMA | {"vector_length": 8, "num_vectors": 9}),
    ("gpt2", VBLORA, GPT2 | {"vector_length": 16, "num_vectors": 9}),
    ("bert_cls", VBLORA, {"target_modules": ["query"], "vector_length": 4, "num_vectors": 9, "task_type": "SEQ_CLS"}),
    # ---- Uni-LoRA
    *on_mlps(UNILORA, theta_d_length=101),
    ("mlp", UNILORA, TWO | {"theta_d_length": 101, "save_indices": True}),
    ("mlp", UNILORA, TWO | {"theta_d_length": 101, "modules_to_save": ["lin1"]}),
    ("mlp", UNILORA, TWO | {"theta_d_length": 300, "r": 7, "proj_seed": 3, "unilora_dropout": 0.1}),
    ("mlp", UNILORA, TWO | {"theta_d_length": 20, "init_theta_d_bound": 0.3, "bias": "unilora_only"}),
    ("mlp", UNILORA, {"target_modules": r"lin\d", "theta_d_length": 101}),
    ("mlp", UNILORA, {"target_modules": "all-linear", "theta_d_length": 101}),
    ("mlp", UNILORA, {"target_modules": "(lin0|lin1)+", "theta_d_length": 101}, {"refused": "a regex that"}),
    (
        "mlp",
        UNILORA,
        {"refused": "exclude_modules"},
    ),
    ("emb", UNILORA, {"target_modules": ["conv1d"], "theta_d_length": 101}),
    ("deep", UNILORA, TWO | {"layers_to_transform": [1]}, {"refused": "layers_to_transform"}),
    ("deep", UNILORA, TWO | {"layers_to_transform": [1], "save_indices": True}),
    ("llama", UNILORA, LLAMA | {"theta_d_length": 40}),
    ("gpt2", UNILORA, GPT2 | {"theta_d_length": 40}),
    ("bert_cls", UNILORA, {"target_modules": ["query"], "theta_d_length": 40, "task_type": "SEQ_CLS"}),
    # ---- TinyLoRA
    # Our v is one tensor for all groups.
    *(row if len(row[2]["target_modules"]) != 2 else (*row, {"gradients": False}) for row in on_mlps(TINYLORA, u=16)),
    ("mlp", TINYLORA, TWO | {"r": 2, "u": 8, "weight_tying": 1.0}, {"gradients": False}),
    (
        "mlp",
        TINYLORA,
        TWO | {"r": 3, "u": 8, "projection_seed": 4, "save_projection": False, "tinylora_dropout": 0.1},
        {"gradients": False},
    ),
    (
        "mlp",
        TINYLORA,
        TWO | {"u": 8, "init_weights": "uniform", "init_v_bound": 0.3, "bias": "tinylora_only"},
        {"gradients": False},
    ),
    ("emb", TINYLORA, {"target_modules": ["conv1d"], "r": 2, "u": 16, "init_v_bound": 0.5}),
    ("emb", TINYLORA, {"target_modules": ["emb"], "r": 2, "u": 16}),
    (
        "emb",
        TINYLORA,
        {"target_modules": ["emb", "conv1d", "lin0"], "r": 2, "u": 6, "weight_tying": 0.4},
        {"gradients": False},
    ),
    (
        "emb",
        TINYLORA,
        {"target_modules": ["emb", "lin0"], "r": 3, "u": 6, "save_projection": False},
        {"gradients": False},
    ),
    ("deep", TINYLORA, TWO | {"u": 4, "weight_tying": 0.5}, {"gradients": False}),
    ("llama", TINYLORA, LLAMA | {"u": 5, "weight_tying": 0.3, "save_projection": False}, {"gradients": False}),
    ("gpt2", TINYLORA, GPT2 | {"u": 5}, {"gradients": False}),
    ("bert_cls", TINYLORA, {"target_modules": ["query"], "u": 5, "task_type": "SEQ_CLS"}, {"gradients": False}),
    # ---- Lily: PEFT's layers share what ours have of their own, so sums of gradients differ
    *on_mlps(LILY, **FEW),
    ("mlp", LILY, {"target_modules": ["lin0"], "r": 4, "num_B": 3, "scaling": 0.5}),
    ("mlp", LILY, TWO | {"r": 4, "init_weights": False}),
    ("deep", LILY, TWO | {"r": 4}, {"gradients": False}),
    ("deep", LILY, TWO | {"r": 4, "stride_A": 2}, {"gradients": False}),
    ("deep", LILY, {"target_modules": "all-linear", "r": 4}, {"gradients": False}),
    ("llama", LILY, LLAMA | {"r": 3}, {"gradients": False}),
    ("bert_cls", LILY, {"target_modules": ["query"], "r": 3, "task_type": "SEQ_CLS"}, {"gradients": False}),
]
