"""PEFT's methods that change a weight by products, on its test-suite's kinds of model, over their options."""

from typing import Any

import peft

LOHA, LOKR, HIRA, GRALORA = peft.LoHaConfig, peft.LoKrConfig, peft.HiraConfig, peft.GraloraConfig
GLORA, MISS, BEFT, PEANUT = peft.GloraConfig, peft.MissConfig, peft.BeftConfig, peft.PeanutConfig
CORE = {"use_effective_conv2d": True}
SAVED = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
BOTH = {"target_modules": ["lin0", "lin1"]}
RANDOM = {"init_weights": False}
SWAPPED = {"refused": "no Kronecker product"}


def on_mlp(config: Any, **fields: Any) -> list[tuple[Any, ...]]:
    """As PEFT's suite has each method on its MLP."""
    names = ({"target_modules": "lin0"}, {"target_modules": ["lin1"]}, BOTH, SAVED)
    return [("mlp", config, {**name, **fields}) for name in names]


TABLE: list[tuple[Any, ...]] = [
    *on_mlp(LOHA),
    ("mlp", LOHA, {**BOTH, "alpha": 4, "module_dropout": 0.1, "rank_dropout": 0.5, **RANDOM}),
    ("mlp", LOHA, {**BOTH, "rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin0": 3}, "r": 4}),
    ("deep", LOHA, {"target_modules": ["lin0"], "layers_to_transform": [1]}),
    ("conv2d", LOHA, {"target_modules": ["conv2d"]}),
    ("conv2d", LOHA, {"target_modules": ["conv2d", "lin0"]}),
    ("conv2d", LOHA, {"target_modules": ["conv2d", "lin0"], **CORE, "r": 3}, {"gradients": False}),  # PEFT's are wrong
    ("conv2d_1x1", LOHA, {"target_modules": ["conv2d"], **CORE}),
    ("conv2d_groups", LOHA, {"target_modules": ["conv2d"]}),
    ("conv1d", LOHA, {"target_modules": ["conv1d"], "r": 2}),
    ("conv1d", LOHA, {"target_modules": ["conv1d"], "r": 2, **CORE}, {"gradients": False}),
    ("llama", LOHA, {"target_modules": ["q_proj", "down_proj"]}),
    ("bert_cls", LOHA, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    *on_mlp(LOKR),
    ("mlp", LOKR, {**BOTH, "alpha": 4, "module_dropout": 0.1, "rank_dropout": 0.5, "rank_dropout_scale": True}),
    ("mlp", LOKR, {"target_modules": "lin0", "decompose_both": True, "r": 1, "alpha": 1}),
    ("mlp", LOKR, {**BOTH, "r": 1, "decompose_factor": 4}),
    ("mlp", LOKR, {**BOTH, "r": 1, "init_weights": "lycoris", "rank_pattern": {"lin1": 2}}),
    ("conv2d", LOKR, {"target_modules": ["conv2d"]}),
    ("conv2d", LOKR, {"target_modules": ["conv2d", "lin0"], **CORE}),
    ("conv2d", LOKR, {"target_modules": ["conv2d", "lin0"], **CORE, "decompose_both": True, "r": 1}),
    ("conv2d", LOKR, {"target_modules": ["conv2d", "lin0"], **CORE, "decompose_factor": 4}),
    ("conv2d_1x1", LOKR, {"target_modules": ["conv2d"]}),
    ("conv2d_groups", LOKR, {"target_modules": ["conv2d"]}),
    ("conv1d", LOKR, {"target_modules": ["conv1d"]}, SWAPPED),
    ("conv1d_wide", LOKR, {"target_modules": ["conv1d"], "r": 2}),
    ("conv1d_wide", LOKR, {"target_modules": ["conv1d"], "r": 2, **CORE}),
    ("conv1d_one", LOKR, {"target_modules": ["conv1d"], "alpha": 80}),
    ("llama", LOKR, {"target_modules": ["q_proj", "down_proj"], "r": 1}),
    *on_mlp(HIRA),
    ("mlp", HIRA, {**BOTH, "hira_dropout": 0.1, "init_weights": "gaussian", "rank_pattern": {"lin1": 2}}),
    ("emb", HIRA, {"target_modules": ["conv1d"], "fan_in_fan_out": True}),
    ("emb", HIRA, {"target_modules": ["emb"]}),
    ("emb", HIRA, {"target_modules": ["emb", "conv1d"], "fan_in_fan_out": True}),
    ("conv1d", HIRA, {"target_modules": ["conv1d"]}),
    ("conv2d", HIRA, {"target_modules": ["conv2d", "lin0"]}),
    ("conv2d_1x1", HIRA, {"target_modules": ["conv2d"]}),
    ("conv3d", HIRA, {"target_modules": ["conv3d", "lin0"]}),
    ("gpt2", HIRA, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ("llama", HIRA, {"target_modules": ["q_proj", "embed_tokens"]}),
    *on_mlp(GRALORA),
    ("mlp", GRALORA, {**BOTH, "hybrid_r": 4, "r": 8, "alpha": 5, "gralora_dropout": 0.1}),
    ("mlp", GRALORA, {**BOTH, "bias": "all"}),
    ("mlp", GRALORA, {**BOTH, "bias": "gralora_only"}),
    ("emb", GRALORA, {"target_modules": ["conv1d"], "gralora_k": 1, "fan_in_fan_out": True}),
    ("llama", GRALORA, {"target_modules": ["q_proj", "down_proj"], "gralora_k": 4}),
    *on_mlp(GLORA),
    ("mlp_no_bias", GLORA, BOTH),
    ("mlp", GLORA, {**BOTH, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
    ("mlp", GLORA, {**BOTH, "config_A_B": "constant", "config_C": "none", "config_D_E": "none"}),
    ("mlp", GLORA, {**BOTH, "config_A_B": "none", "config_C": "lora", "config_D_E": "vector"}),
    ("mlp_no_bias", GLORA, {**BOTH, "config_A_B": "none"}, {"refused": "no place in an adapter"}),
    ("mlp", GLORA, {**BOTH, "bias": "all"}, {"refused": "trained beside"}),
    ("llama_bias", GLORA, {"target_modules": ["q_proj", "down_proj"]}),
    *on_mlp(MISS, r=2),
    *on_mlp(MISS, r=2, init_weights="bat"),
    ("mlp", MISS, {**BOTH, "r": 3, "init_weights": "mini", "mini_r": 2}),
    ("mlp", MISS, {**BOTH, "r": 3, "miss_dropout": 0.1, **RANDOM}),
    ("mlp", MISS, {**BOTH, "r": 3, "bias": "all"}),
    ("llama", MISS, {"target_modules": ["q_proj", "down_proj"], "r": 5}),
    *on_mlp(BEFT),
    ("mlp_no_bias", BEFT, BOTH),
    ("llama", BEFT, {"target_modules": ["v_proj"]}),
    *on_mlp(PEANUT, r=2),
    ("mlp", PEANUT, {**BOTH, "r": 2, "depth": 1, "act_fn": "gelu"}),
    ("mlp", PEANUT, {**BOTH, "r": 3, "depth": 2, "act_fn": "tanh", "scaling": 0.5, **RANDOM}),
    ("mlp", PEANUT, {**BOTH, "act_fn": "prelu"}, {"refused": "act_fn"}),
    ("llama", PEANUT, {"target_modules": ["q_proj", "down_proj"]}),
]
