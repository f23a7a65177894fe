"""Settings that differ by layer: a config's `per_layer`, from construction to the file and back."""

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, OneLinear, attach, config, perturb, tiny_llama, train
from oracles import ORACLES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora_lite as ll

DOWN, UP = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"
BY_LAYER: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {r"down_proj$": {"r": 6, "alpha": 3.0}, r"\.1\.mlp\.down": {"r": 2}, r"k_proj": {"rslora": True}},
    "dora": {r"down_proj$": {"r": 6, "alpha": 3.0}, r"\.1\.mlp\.down": {"r": 2}},
    "pissa": {r"down_proj$": {"r": 6, "alpha": 3.0}, r"\.1\.mlp\.down": {"r": 2}, r"k_proj": {"svd": "fast"}},
    "ssteer": {r"down_proj$": {"r": 6}, r"\.1\.mlp\.down": {"r": 2}, r"k_proj": {"r": 1}},
    "antipasto": {
        r"down_proj$": {"r": 6, "rotate": "U"},
        r"\.1\.mlp\.down": {"r": 2, "block": 3},
        r"k_proj": {"rotate": "none"},
    },
    "abliteration": {
        r"down_proj$": {"strength": 0.5, "normalization": "full"},
        r"\.1\.mlp\.down": {"normalization": "none"},
        r"k_proj": {"kernels": {"": [1.0, 0.0, 0.5, 3.0]}},
    },
    "steer": {
        r"down_proj$": {"strength": 0.5},
        r"\.1\.mlp\.down": {"strength": 0.7},
        r"k_proj": {"kernels": {"": [1.0, 0.0, 0.5, 3.0]}, "strength": 2.0},
    },
}
per_case = pytest.mark.parametrize("variant", BY_LAYER)


def cfg_of(variant: str, **overrides: Any) -> Any:
    return config(variant, per_layer=BY_LAYER[variant], **overrides)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=IDS).logits
    return out


def cfg_at(adapter: ll.Adapter, path: str) -> Any:
    return adapter.views()[path].cfg


@pytest.mark.parametrize(
    ("per_layer", "message"),
    [
        ({"(": {"r": 2}}, r"per_layer=.*wanted regexes that compile"),
        (
            {"x": {"target_names": "y"}},
            r"per_layer\['x'\]: LoRAConfig: \['target_names'\] can't differ by layer; wanted",
        ),
        (
            {"x": {"dtype": torch.bfloat16}},
            r"\['dtype'\] can't differ by layer; wanted some of \['r', 'alpha', 'rslora'",
        ),
        ({"x": {"variant": "dora"}}, r"\['variant'\] can't differ"),
        ({"x": {"per_layer": {}}}, r"\['per_layer'\] can't differ"),
        ({"x": {"beta": 1}}, r"\['beta'\] can't differ"),
        ({"x": {"r": 0}}, r"per_layer\['x'\]: LoRAConfig\(r=0\): wanted a rank of at least 1"),
        ({"x": {"dropout": 1.0}}, r"per_layer\['x'\]: LoRAConfig\(dropout=1.0\)"),
    ],
)
def test_a_bad_entry_is_named(per_layer: Any, message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        ll.LoRAConfig(per_layer=per_layer)
    with pytest.raises(ll.ConfigError, match=r"\['rank'\] can't differ by layer; wanted some of \['strength', 'layer'"):
        ll.AbliterationConfig(per_layer={"x": {"rank": 2}})


@per_case
def test_json_round_trip(variant: str) -> None:
    cfg = cfg_of(variant)
    assert type(cfg).from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert hash(cfg) == hash(dataclasses.replace(cfg, per_layer={}))
    assert "per_layer" not in config(variant).to_dict()


def test_a_config_keeps_no_hold_of_the_callers_mapping() -> None:
    mine: dict[str, dict[str, Any]] = {"x": {"r": 2}}
    cfg = ll.LoRAConfig(per_layer=mine)
    mine["x"]["r"] = 3
    assert cfg.per_layer == {"x": {"r": 2}}


@per_case
def test_the_layers_have_their_own_settings_and_later_entries_win(variant: str) -> None:
    model = tiny_llama(bias=True)
    adapter = attach(model, cfg_of(variant))
    for path, view in adapter.views().items():
        wanted: dict[str, Any] = {}
        for pattern, fields in BY_LAYER[variant].items():
            wanted |= fields if re.search(pattern, path) else {}
        assert view.cfg == config(variant, **wanted) if wanted else view.cfg is adapter.config
    assert set(adapter.per_layer) == {
        p for p in adapter.targets if "down" in p or ("k_proj" in p and variant != "dora")
    }
    assert str(ll.plan(tiny_llama(bias=True), cfg_of(variant))).count(
        f"{sum(p.numel() for p in adapter.parameters()):,} trainable"
    )


@per_case
@pytest.mark.parametrize("path", [DOWN, UP, "model.layers.0.mlp.down_proj"])
def test_each_layer_computes_its_own_formula(variant: str, path: str) -> None:
    model = tiny_llama(bias=True).double()
    adapter = attach(model, cfg_of(variant, dtype=torch.float64))
    perturb(adapter, 0.3)
    layer = model.get_submodule(path)
    tensors = {k.removeprefix(f"{path}."): v for k, v in adapter.state_dict().items() if k.startswith(f"{path}.")}
    x = torch.randn(5, layer.in_features, dtype=torch.float64)
    wanted = ORACLES[variant](layer.weight, layer.bias, cfg_at(adapter, path), tensors, x)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-3)


@pytest.mark.parametrize("call", [ll.attach, ll.plan])
def test_an_entry_that_finds_no_target_is_an_error(call: Any) -> None:
    model = tiny_llama()
    before = sorted(model.state_dict())
    with pytest.raises(ll.TargetError, match=r"per_layer: 'lm_head' is found in none of the 14 target layers, such as"):
        call(model, config("lora", per_layer={"lm_head": {"r": 2}}))
    with pytest.raises(ll.ConfigError, match=r"model.layers.0.self_attn.k_proj: PiSSAConfig\(r=40\)"):
        call(model, config("pissa", per_layer={"k_proj": {"r": 40}}))
    assert sorted(model.state_dict()) == before


@per_case
def test_save_load_and_restore_are_bit_equal(variant: str, tmp_path: Path) -> None:
    model = tiny_llama(bias=True)
    adapter = attach(model, cfg_of(variant))
    perturb(adapter)
    wanted = logits(model)
    ll.save(model, tmp_path / "a.safetensors")
    fresh = tiny_llama(bias=True)
    loaded = ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh), wanted)
    assert loaded.config == adapter.config
    assert loaded.per_layer == adapter.per_layer
    ll.save(fresh, tmp_path / "b.safetensors")
    again = tiny_llama(bias=True)
    assert ll.load(again, tmp_path / "b.safetensors").per_layer == adapter.per_layer
    assert torch.equal(logits(again), wanted)
    perturb(loaded, seed=2)
    ll.restore(fresh, tmp_path / "b.safetensors")
    assert torch.equal(logits(fresh), wanted)
    other = tiny_llama(bias=True)
    attach(other, config(variant))
    with pytest.raises(ll.CheckpointError, match=r"not of one config\n.*per_layer"):
        ll.restore(other, tmp_path / "b.safetensors")


def rewrite(path: Path, **changes: Any) -> None:
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["lora_lite"])
    meta = {key: value for key, value in (meta | changes).items() if value is not None}
    save_file(load_file(path), path, metadata={"lora_lite": json.dumps(meta)})


def test_a_load_runs_no_regex_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = tiny_llama()
    perturb(attach(model, cfg_of("lora")))
    ll.save(model, path)
    with safe_open(path, framework="pt") as file:
        cfg = json.loads(file.metadata()["lora_lite"])["config"]
    rewrite(path, config=cfg | {"per_layer": {"no layer has this name": {"r": 5}}})
    fresh = tiny_llama()
    ll.load(fresh, path)
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, r"settings by layer for \[\]; wanted them for some of its targets"),
        ({}, r"settings by layer for \[\]"),
        ({"elsewhere": {"r": 2}}, r"settings by layer for \['elsewhere'\]"),
        ({UP: {"dtype": "float64"}}, r"bad config or targets: .*\['dtype'\] can't differ"),
        ({UP: {"r": -1}}, r"bad config or targets: .*r=-1"),
        ({UP: {"r": 3}}, r"wrong shapes"),
        ([UP], r"bad config or targets"),
        ({UP: 3}, r"bad config or targets"),
    ],
)
def test_a_file_with_other_settings_is_refused(entry: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = tiny_llama()
    attach(model, cfg_of("lora"))
    ll.save(model, path)
    rewrite(path, per_layer=entry)
    fresh = tiny_llama()
    with pytest.raises(ll.CheckpointError, match=message):
        ll.load(fresh, path)
    assert not ll.adapters(fresh)


def test_a_file_of_one_config_says_nothing_of_layers(tmp_path: Path) -> None:
    model = OneLinear()
    ll.attach(model, config("lora", target_names="proj"))
    ll.save(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert "per_layer" not in file.metadata()["lora_lite"]


def test_configure_leaves_what_a_layer_sets_for_itself() -> None:
    model = tiny_llama()
    adapter = attach(model, cfg_of("abliteration"))
    adapter.configure(strength=2.0)
    assert adapter.config.strength == 2.0
    assert float(adapter.state_dict()[f"{UP}.lora_strength"]) == 2.0
    assert float(adapter.state_dict()[f"{DOWN}.lora_strength"]) == 0.5
    assert cfg_at(adapter, DOWN).normalization == "none"
    with pytest.raises(ll.ConfigError, match=r"no direction is kept for it"):
        adapter.configure(layer=9)
    assert cfg_at(adapter, UP).layer is None
    assert cfg_at(adapter, DOWN).layer is None
    with pytest.raises(ll.ConfigError, match="per_layer can't change while it is attached"):
        adapter.configure(per_layer={})


def test_a_base_that_one_layer_alone_reads_is_verified(tmp_path: Path) -> None:
    model = tiny_llama()
    attach(model, config("abliteration", per_layer={"up_proj": {"normalization": "pre"}}))
    ll.save(model, tmp_path / "a.safetensors")
    with pytest.raises(ll.CheckpointError, match="trained on another base"):
        ll.load(tiny_llama(seed=5), tmp_path / "a.safetensors")


@per_case
def test_training_deepcopy_and_detach_go_on_as_with_one_config(variant: str) -> None:
    model = tiny_llama()
    adapter = attach(model, cfg_of(variant))
    train(model, adapter)
    wanted = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)
    ll.detach(model)
    assert torch.equal(logits(model), logits(tiny_llama()))
