"""Cases of PEFT's methods that train entries, coefficients or directions of the weight; see peft_space.py."""

from typing import Any

import peft

SHIRA, SUPER, DELORA, DEFT = peft.ShiraConfig, peft.SupertuningConfig, peft.DeloraConfig, peft.DeftConfig
C3A, FOURIER, WAVE = peft.C3AConfig, peft.FourierFTConfig, peft.WaveFTConfig
BOTH, FIRST, LAST = {"target_modules": ["lin0", "lin1"]}, {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}
AS_TEXT, SAVED = {"target_modules": "lin0"}, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
BOTH_SAVED = {**BOTH, "modules_to_save": ["lin1"]}
IN_LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


def on_mlps(config: Any, fields: dict[str, Any], only: str = "") -> list[tuple[Any, ...]]:
    """A method on the small models, in all the ways that PEFT's own tests name its layers."""
    targets: list[dict[str, Any]] = [AS_TEXT, FIRST, LAST, BOTH, SAVED, BOTH_SAVED, {"target_modules": "all-linear"}]
    rows = [("mlp", config, target | fields) for target in targets]
    rows += [("mlp_no_bias", config, BOTH | fields), ("normed", config, {"target_modules": ["lin1"]} | fields)]
    if only:
        rows += [("mlp", config, FIRST | fields | {"bias": bias}) for bias in ("all", only)]
        rows += [("mlp_no_bias", config, BOTH | fields | {"bias": only})]
        rows += [("deep", config, {"target_modules": ["lin0"], "layers_to_transform": [1], **fields})]
    names = ["0.lin0", "2.lin1"] if config in (SHIRA, SUPER, C3A) else ["lin0", "lin1"]  # they can't exclude
    deep: dict[str, Any] = {"target_modules": names, **fields}
    return [*rows, ("deep", config, deep | ({} if len(names[0]) > 4 else {"exclude_modules": ["layers.1.lin0"]}))]


# The gradient of x in PEFT's C3A is wrong, so layers below another one have other gradients than here.
OTHER_GRADIENTS, ONE = {"gradients": False}, ("lin0", ["lin0"], ["lin1"])

TABLE: list[tuple[Any, ...]] = [
    *on_mlps(SHIRA, {"r": 1, "random_seed": 5}),
    ("mlp", SHIRA, {**AS_TEXT, "r": 1}),
    ("mlp", SHIRA, {**FIRST, "r": 4, "random_seed": 56, "init_weights": False}),
    ("llama", SHIRA, {**IN_LLAMA, "r": 2}),
    *on_mlps(SUPER, {"sparsity": 0.5}),
    ("mlp", SUPER, {**BOTH, "sparsity": 0.5, "select_top": False}),
    ("mlp", SUPER, {**FIRST, "sparsity": 0.5, "r": 2}),
    ("mlp", SUPER, {**BOTH, "sparsity": 0.9, "r": 2, "lora_alpha": 3, "lora_dropout": 0.1}),
    ("mlp", SUPER, {**BOTH, "sparsity": 0.7, "save_precomputed_indices": False}),
    ("llama", SUPER, {**IN_LLAMA, "sparsity": 0.9, "r": 2}),
    *on_mlps(DELORA, {}, "delora_only"),
    ("mlp", DELORA, {**FIRST, "module_dropout": 0.1, "r": 3}),
    ("mlp", DELORA, {**BOTH, "delora_lambda": 4, "init_weights": False}),
    ("mlp", DELORA, {**BOTH, "rank_pattern": {"lin1": 2}, "lambda_pattern": {"lin0": 3}}),
    ("deep", DELORA, {**BOTH, "rank_pattern": {r"layers\.1\.lin0": 3}, "lambda_pattern": {"1.lin1": 2.5}}),
    ("llama", DELORA, IN_LLAMA),
    *on_mlps(DEFT, {}, "deft_only"),
    ("mlp", DEFT, {**BOTH, "decomposition_method": "qr"}),
    ("mlp", DEFT, {**BOTH, "decomposition_method": "qr", "alpha": 4, "r": 3}),
    ("mlp", DEFT, {**BOTH, "alpha": 3.5, "deft_dropout": 0.1}),
    ("mlp", DEFT, {**BOTH, "alpha": 0}),
    ("mlp", DEFT, {**BOTH, "para": True}),
    ("mlp", DEFT, {**BOTH, "para": True, "decomposition_method": "qr", "r": 2}),
    ("mlp", DEFT, {**BOTH, "init_weights": False, "init_scale": 2.0}),
    ("emb", DEFT, {"target_modules": ["conv1d"]}),
    ("emb", DEFT, {"target_modules": ["conv1d", "lin0"], "decomposition_method": "qr", "bias": "all"}),
    ("gpt2", DEFT, {"target_modules": ["c_attn"], "r": 4}),
    ("llama", DEFT, {**IN_LLAMA, "r": 4}),
    *(
        (model, config, fields, {} if fields["target_modules"] in ONE else OTHER_GRADIENTS)
        for model, config, fields in on_mlps(C3A, {"block_size": 2}, "c3a_only")
    ),
    ("mlp", C3A, {"block_size": 10, **SAVED, "init_weights": True}),
    ("mlp", C3A, {"block_size": 10, **BOTH_SAVED, "init_weights": True}),
    ("mlp", C3A, {"block_size_pattern": {"lin0": 5, "lin1": 10}, **BOTH_SAVED, "init_weights": True}),
    (
        "mlp",
        C3A,
        {"block_size": 1, "block_size_pattern": {"lin0": 5}, **BOTH, "init_weights": "gaussian"},
        OTHER_GRADIENTS,
    ),
    ("deep", C3A, {"block_size": 6, "block_size_pattern": {"layers.1.lin0": 3}, **BOTH}, OTHER_GRADIENTS),
    ("mlp", C3A, {"block_size": 10, "block_size_pattern": {"^lin0": 5}, **FIRST}, {"refused": "PEFT finds nowhere"}),
    ("llama", C3A, {"block_size": 8, **IN_LLAMA, "init_weights": "kaiming_uniform"}, OTHER_GRADIENTS),
    *on_mlps(FOURIER, {"n_frequency": 10}, "fourier_only"),
    ("mlp", FOURIER, {"n_frequency": 10, **BOTH, "init_weights": True, "scaling": 20.0, "random_loc_seed": 4}),
    ("mlp", FOURIER, {"n_frequency_pattern": {"lin0": 5, "lin1": 10}, **BOTH}),
    ("mlp", FOURIER, {"n_frequency_pattern": {"lin0": 5, "lin1": 10}, **BOTH_SAVED, "init_weights": True}),
    ("deep", FOURIER, {"n_frequency": 9, "n_frequency_pattern": {"layers.1.lin0": 3}, **BOTH}),
    ("mlp", FOURIER, {"n_frequency": 9, "n_frequency_pattern": {"^lin0": 5}, **FIRST}, {"refused": "finds nowhere"}),
    ("emb", FOURIER, {"n_frequency": 10, "target_modules": ["conv1d"]}),
    ("emb", FOURIER, {"n_frequency": 10, "target_modules": ["conv1d", "lin0"]}),
    ("gpt2", FOURIER, {"n_frequency": 50, "target_modules": ["c_attn", "c_proj"]}),
    ("llama", FOURIER, {"n_frequency": 50, **IN_LLAMA}),
    *on_mlps(WAVE, {"n_frequency": 8}, "waveft_only"),
    ("mlp", WAVE, {**FIRST, "n_frequency": 8, "scaling": 3.0, "wavelet_family": "db1", "random_loc_seed": 4}),
    ("mlp", WAVE, {"target_modules": "lin1", "n_frequency": 8, "use_idwt": False}),
    ("mlp", WAVE, {**BOTH, "n_frequency": 16, "wavelet_family": "sym2", "use_idwt": False}),
    ("mlp", WAVE, {**BOTH, "n_frequency": 16, "wavelet_family": "coif4", "use_idwt": False}),
    ("mlp", WAVE, {**BOTH, "n_frequency": 16, "wavelet_family": "db20", "use_idwt": False}),
    ("mlp", WAVE, {**AS_TEXT, "n_frequency": 16, "proportional_parameters": True}),
    ("mlp", WAVE, {**BOTH, "n_frequency": 16, "proportional_parameters": True, "wavelet_family": "db3"}),
    ("deep", WAVE, {**BOTH, "n_frequency": 16, "n_frequency_pattern": {"layers.1.lin0": 4}}),
    *(
        ("mlp", WAVE, {**BOTH, "n_frequency": 20, "wavelet_family": family, "init_weights": False})
        for family in ("db2", "db4", "db7", "db10", "sym2", "sym5", "sym9", "sym10", "coif1", "coif2", "coif3")
    ),
    ("mlp", WAVE, {**BOTH, "n_frequency": 16, "wavelet_family": "coif4"}, {"refused": "no wavelet's"}),
    ("emb", WAVE, {"n_frequency": 10, "target_modules": ["conv1d"]}),
    ("gpt2", WAVE, {"n_frequency": 50, "target_modules": ["c_attn", "c_proj"], "wavelet_family": "db2"}),
    ("llama", WAVE, {"n_frequency": 50, **IN_LLAMA, "wavelet_family": "sym4"}),
]
