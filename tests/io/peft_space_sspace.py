"""PEFT's folders of the methods in the weight's own directions, on the models of PEFT's own tests for them."""

from typing import Any

import peft
from peft.tuners.lora.config import BdLoraConfig

LORA, OSF, FROD, ADAMSS = peft.LoraConfig, peft.OSFConfig, peft.FrodConfig, peft.AdamssConfig
KASA = {"kasa_config": peft.KasaConfig(beta=1e-3, gamma=1e-2), "r": 4}
MICA = {"init_lora_weights": "mica", "r": 4}
BOTH = ["lin0", "lin1"]


def blocks(a: Any = None, b: Any = None, n: int = 2, **more: Any) -> dict[str, Any]:
    return {"use_bdlora": BdLoraConfig(target_modules_bd_a=a, target_modules_bd_b=b, nblocks=n, **more)}


def velora(**fields: Any) -> dict[str, Any]:
    return {"velora_config": peft.VeloraConfig(**{"num_groups": 2} | fields)}


TABLE: list[tuple[Any, ...]] = [
    # ---- VeLoRA
    ("mlp", LORA, {"target_modules": ["lin0"], **velora(init_type="random")}),
    ("mlp", LORA, {"target_modules": BOTH, **velora(init_type="batch_average"), "lora_alpha": 3}),
    ("mlp", LORA, {"target_modules": ["lin0"], **velora(init_type="batch_average_once", scale=0.5)}),
    ("mlp", LORA, {"target_modules": BOTH, **velora(num_groups=64), "rank_pattern": {"lin1": 2}, "use_rslora": True}),
    ("mlp", LORA, {"target_modules": ["lin0"], **velora(), "modules_to_save": ["lin1"], "lora_dropout": 0.1}),
    ("gpt2", LORA, {"target_modules": ["c_attn"], "fan_in_fan_out": True, **velora(num_groups=5)}),
    # ---- MiCA
    ("mlp", LORA, {"target_modules": ["lin0"], **MICA}),
    ("mlp", LORA, {"target_modules": "lin0", **MICA, "lora_alpha": 3, "use_rslora": True, "lora_dropout": 0.1}),
    ("mlp", LORA, {"target_modules": BOTH, **MICA, "rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin0": 5}}),
    ("mlp", LORA, {"target_modules": ["lin0"], **MICA, "modules_to_save": ["lin1"]}),
    ("mlp", LORA, {"target_modules": ["lin0"], **MICA, "bias": "all"}),
    ("mlp", LORA, {"target_modules": ["lin0"], **MICA, "bias": "lora_only"}),
    ("emb", LORA, {"target_modules": ["emb"], **MICA}),
    ("emb", LORA, {"target_modules": ["emb", "conv1d"], **MICA}),
    ("deep", LORA, {"target_modules": ["lin0"], **MICA, "layers_to_transform": [0, 2]}),
    ("llama", LORA, {"target_modules": ["q_proj", "down_proj"], **MICA}),
    ("gpt2", LORA, {"target_modules": ["c_attn"], "fan_in_fan_out": True, **MICA}),
    # ---- KaSA
    ("mlp", LORA, {"target_modules": ["lin0"], **KASA}),
    ("mlp", LORA, {"target_modules": ["lin0"], **KASA, "lora_alpha": 3, "use_rslora": True, "lora_dropout": 0.1}),
    ("mlp", LORA, {"target_modules": BOTH, **KASA, "rank_pattern": {"lin1": 1}, "alpha_pattern": {"lin1": 5}}),
    ("mlp", LORA, {"target_modules": ["lin0"], **KASA, "modules_to_save": ["lin1"]}),
    ("mlp_no_bias", LORA, {"target_modules": ["lin0"], **KASA}),
    ("llama", LORA, {"target_modules": ["q_proj", "up_proj"], **KASA}),
    # ---- BD-LoRA
    ("mlp", LORA, {"target_modules": ["lin0"], **blocks(b=["lin0"])}),
    ("mlp", LORA, {"target_modules": BOTH, **blocks(["lin0"], ["lin1"])}),
    ("mlp", LORA, {"target_modules": BOTH, **blocks(["lin1"], ["lin0"], n=4), "lora_alpha": 3}),
    ("mlp", LORA, {"target_modules": BOTH, **blocks(["lin0"], match_strict=False), "r": 4, "use_rslora": True}),
    ("mlp", LORA, {"target_modules": BOTH, **blocks(b=["lin0"], n=1, match_strict=False), "lora_dropout": 0.2}),
    ("mlp", LORA, {"target_modules": ["lin0"], **blocks(["lin0"]), "modules_to_save": ["lin1"]}),
    ("deep", LORA, {"target_modules": BOTH, **blocks(["lin1"], ["lin0"], n=3), "r": 6}),
    ("llama", LORA, {"target_modules": ["q_proj", "o_proj"], **blocks(["o_proj"], ["q_proj"])}),
    # ---- OSF
    ("mlp", OSF, {"target_modules": ["lin0"]}),
    ("mlp", OSF, {"target_modules": BOTH}),
    ("mlp", OSF, {"target_modules": BOTH, "effective_rank": 1}),
    ("mlp", OSF, {"target_modules": ["lin0"], "effective_rank": 0.3}),
    ("mlp", OSF, {"target_modules": BOTH, "effective_rank": 7, "rank_pattern": {"lin1": 1}}),
    ("mlp", OSF, {"target_modules": BOTH, "effective_rank": 7}, {"refused": "leave 1 to train"}),
    ("mlp_no_bias", OSF, {"target_modules": "all-linear"}),
    ("mlp", OSF, {"target_modules": ["lin1"], "init_weights": False}),
    ("deep", OSF, {"target_modules": BOTH, "effective_rank": 2}),
    ("llama", OSF, {"target_modules": ["q_proj", "down_proj"]}),
    # ---- FRoD
    ("mlp", FROD, {"target_modules": "lin0", "sparse_rate": 0.1}),
    ("mlp", FROD, {"target_modules": ["lin0"]}),
    ("mlp", FROD, {"target_modules": ["lin1"]}),
    ("mlp", FROD, {"target_modules": BOTH, "sparse_rate": 0.1}),
    ("deep", FROD, {"target_modules": ["lin1"], "layers_to_transform": [2], "sparse_rate": 0.2}),
    ("mlp", FROD, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("mlp", FROD, {"target_modules": ["lin0"], "bias": "all"}),
    ("mlp", FROD, {"target_modules": ["lin0"], "bias": "frod_only", "frod_dropout": 0.1}),
    ("mlp", FROD, {"target_modules": ["lin0"], "projection_prng_key": 3, "regularization_alpha": 0.1}),
    ("mlp", FROD, {"target_modules": ["lin0"], "save_projection": False}, {"refused": "save_projection=false"}),
    ("emb", FROD, {"target_modules": ["conv1d"]}),
    ("deep", FROD, {"target_modules": BOTH, "sparse_rate": 0.05}),
    ("deep", FROD, {"target_modules": ["lin0"], "layers_to_transform": [1]}),
    ("llama", FROD, {"target_modules": ["q_proj", "down_proj"]}),
    ("gpt2", FROD, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    # ---- AdaMSS
    *(
        (model, ADAMSS, {"r": 6, "num_subspaces": 3, **fields}, {"gradients": False})
        for model, fields in [
            ("mlp", {"target_modules": ["lin0"]}),
            ("mlp", {"target_modules": BOTH, "subspace_rank": 2}),
            ("mlp", {"target_modules": BOTH, "r": 100, "num_subspaces": 5, "subspace_rank": 3, "random_seed": 7}),
            ("mlp", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
            ("mlp", {"target_modules": ["lin0"], "use_dynamic_rank": True, "subspace_rank": 3, "svd_threshold": 0.3}),
            ("mlp", {"target_modules": ["lin0"], "use_asa": True, "asa_target_subspaces": 2}),
            ("mlp", {"target_modules": ["lin0"], "init_weights": None}),
            ("mlp_no_bias", {"target_modules": BOTH, "subspace_rank": 2}),
            ("deep", {"target_modules": ["lin0"], "layers_to_transform": [0, 1]}),
            ("llama", {"target_modules": ["q_proj", "down_proj"], "subspace_rank": 2}),
            ("llama_bias", {"target_modules": ["q_proj"]}),
        ]
    ),
]
