"""Skeletons of configs from anywhere: what real ones hold passes, and nothing in them reaches a file."""

import json
import types
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.timm_wrapper import modeling_timm_wrapper

import lora_lite as ll
from lora_lite.merging.skeleton import _check_depth, skeleton


def default_of(model_type: str) -> dict[str, Any] | None:
    """The default config as it would be in a file; None for a class that has none, or whose library isn't here."""
    try:
        config: dict[str, Any] = json.loads(CONFIG_MAPPING[model_type]().to_json_string(use_diff=False))
    except Exception:  # of any kind: the classes are transformers', and some want arguments
        return None
    return config


@pytest.mark.slow
def test_no_default_config_of_transformers_has_too_many_blocks() -> None:
    refused, built = [], 0
    for model_type in CONFIG_MAPPING:
        config = default_of(model_type)
        if config is None:
            continue
        built += 1
        try:
            _check_depth(Path(), config, tensors=100)
        except ll.CheckpointError as error:
            refused.append(f"{model_type}: {error}")
    assert built > 700
    assert not refused


@pytest.mark.parametrize("name", ["vocab_size_per_layer_input", "block_size", "depthwise_separable_out_channel"])
def test_a_size_that_has_to_do_with_blocks_is_no_count_of_them(name: str) -> None:
    _check_depth(Path(), {name: 262_144}, tensors=100)


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer", "depths", "depth", "num_blocks", "n_block"])
def test_a_count_of_blocks_is(name: str) -> None:
    with pytest.raises(ll.CheckpointError, match=rf"config.json: {name}=2.62e\+05, and the files hold 100 tensors"):
        _check_depth(Path(), {"backbone_config": {name: 262_144}}, tensors=100)


def test_a_config_names_no_file_for_timm_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm isn't installed here, so a stand-in says what it would be asked for."""
    asked: dict[str, Any] = {}

    def create_model(architecture: str, **kwargs: Any) -> nn.Module:
        asked.update(kwargs, architecture=architecture)
        return nn.Linear(2, 2)

    monkeypatch.setattr(modeling_timm_wrapper, "timm", types.SimpleNamespace(create_model=create_model), raising=False)
    monkeypatch.setattr(modeling_timm_wrapper, "requires_backends", lambda *_: None)
    monkeypatch.setattr(transformers, "TimmWrapperModel", modeling_timm_wrapper.TimmWrapperModel)
    evil = {
        "checkpoint_path": "/tmp/evil.pth",
        "pretrained_cfg": {"file": "evil"},
        "pretrained_cfg_overlay": {"file": 1},
    }
    config = {
        "model_type": "timm_wrapper",
        "architectures": ["TimmWrapperModel"],
        "architecture": "resnet18",
        "label_names": ["a", "b"],
        "num_classes": 2,
        "model_args": {"img_size": 32} | evil,
    }
    assert type(skeleton(Path(), config, tensors=100)).__name__ == "TimmWrapperModel"
    assert asked == {"architecture": "resnet18", "pretrained": False, "num_classes": 0, "img_size": 32}
