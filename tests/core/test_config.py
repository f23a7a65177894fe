"""Configs: valid once constructed, frozen, JSON round trip."""

import dataclasses
import json
from typing import Any

import pytest
import torch

import lora_lite as ll

VARIANTS = sorted(ll.REGISTRY)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"LoRAConfig\(r=0\): wanted a rank of at least 1"),
        ({"r": -3}, r"LoRAConfig\(r=-3\)"),
        ({"alpha": float("inf")}, r"alpha=inf\): wanted a number above 0"),
        ({"layer_range": (0.2, float("nan"))}, r"layer_range=\(0.2, nan\)\)"),
        ({"alpha": 0.0}, r"alpha=0.0\): wanted a number above 0"),
        ({"dropout": 1.0}, r"dropout=1.0\): wanted a probability below 1"),
        ({"dtype": torch.int8}, r"dtype=torch.int8\): wanted a floating dtype"),
        ({"target_names": ("(",)}, r"target_names=\('\(',\)\): wanted regexes that compile"),
        ({"exclude_names": "["}, r"exclude_names=\('\[',\)\)"),
        ({"target_roles": ("head",)}, r"target_roles=\('head',\)\): wanted any of \('reader', 'writer', 'inner'\)"),
        ({"layers": ()}, r"layers=\(\)\): wanted one or more block indices"),
        ({"layer_range": (0.8, 0.2)}, r"layer_range=\(0.8, 0.2\)\): wanted two fractions"),
        ({"layer_range": (0.2,)}, r"layer_range=\(0.2,\)\)"),
    ],
)
def test_a_bad_field_is_named_with_its_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        ll.LoRAConfig(**fields)


def test_configs_hold_only_fields_of_their_method() -> None:
    with pytest.raises(TypeError, match="alpha"):
        ll.IA3Config(alpha=8.0)  # type: ignore[call-arg]
    assert "r" not in {field.name for field in dataclasses.fields(ll.IA3Config)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_json_round_trip(variant: str) -> None:
    cls = ll.config_for(variant)
    cfg = cls(target_names=["a", "b"], layers=[0, -1], layer_range=[0.0, 0.5], dtype=torch.bfloat16)
    assert cls.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert cls.from_dict(json.loads(json.dumps(cls().to_dict()))) == cls()
    assert cfg.variant == variant


def test_from_dict_takes_exactly_the_fields() -> None:
    values = ll.LoRAConfig().to_dict()
    with pytest.raises(ll.ConfigError, match=r"unknown: \['beta'\], missing: \['alpha'\]"):
        ll.LoRAConfig.from_dict({**{k: v for k, v in values.items() if k != "alpha"}, "beta": 1})
    with pytest.raises(ll.ConfigError, match=r"stored dtype 'float99': wanted one of \['bfloat16'"):
        ll.LoRAConfig.from_dict({**values, "dtype": "float99"})


def test_configs_are_frozen_and_a_single_regex_may_stand_alone() -> None:
    cfg = ll.LoRAConfig(target_names="q_proj")
    assert cfg.target_names == ("q_proj",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.r = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    "pattern", ["", "attn", r"self_attn\.o_proj$", r"layers\.\d+\.(?:self_attn|mlp)\.(o|down)_proj$", "(?i)^(?!.*mlp)"]
)
def test_kernels_take_regexes_that_end_in_no_time(pattern: str) -> None:
    cfg = ll.AbliterationConfig(kernels={pattern: (1.0, 0.0, 1.0, 1.0)})
    assert ll.AbliterationConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


@pytest.mark.parametrize(
    "pattern",
    [r"(a+)+$", r"(a|a){9}", r"(\()(a+)+", "a?" * 4, "(a)?", "(?P<x>a)(?(x)b)", ".*.*.*.*", "x" * 201, "(", 3],
)
def test_kernels_take_no_regex_that_could_run_for_ever(pattern: Any) -> None:
    with pytest.raises(ll.ConfigError, match="with three repetitions at most"):
        ll.AbliterationConfig(kernels=[(pattern, (1.0, 0.0, 1.0, 1.0))])


def test_regexes_of_a_file_are_checked_by_attach_and_not_before() -> None:
    cfg = ll.LoRAConfig.from_dict({**ll.LoRAConfig().to_dict(), "target_names": ["("]})
    with pytest.raises(ll.ConfigError, match=r"target_names=\('\(',\)\): wanted regexes that compile"):
        ll.plan(torch.nn.Linear(2, 2), cfg)
    with pytest.raises(ll.ConfigError, match=r"exclude_names=\[3\]|exclude_names=\(3,\)"):
        ll.LoRAConfig.from_dict({**ll.LoRAConfig().to_dict(), "exclude_names": [3]})


def test_scaling() -> None:
    assert ll.LoRAConfig(r=16).scaling == 1.0
    assert ll.LoRAConfig(r=16, alpha=32.0).scaling == 2.0
    assert ll.LoRAConfig(r=16, alpha=32.0, rslora=True).scaling == 8.0


@pytest.mark.parametrize("field", ["token_ids", "invocation_tokens"])
def test_ids_of_tokens_are_those_of_a_tokenizer(field: str) -> None:
    """More than an embedding can have would raise within torch, in the forward; and a long list makes no long error."""
    config: Any = {"token_ids": ll.TokensConfig, "invocation_tokens": ll.LoRAConfig}[field]
    assert getattr(config(**{field: [1, 2**31 - 1]}), field)[-1] == 2**31 - 1
    for wrong in ([1, 2**31], [2**70], [*range(100_000), -1]):
        with pytest.raises(ll.ConfigError, match=rf"{field}=\[.*: wanted") as error:
            config(**{field: wrong})
        assert len(str(error.value)) < 600
