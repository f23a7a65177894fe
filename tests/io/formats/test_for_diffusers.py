"""Files for diffusers, with its pipelines and models on the other end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, StableDiffusionPipeline
from models import OneLinear, config, perturb, tiny_llama
from safetensors import safe_open
from test_diffusers import FILE, MODELS, assert_close, output, unet
from torch import nn

import lora_lite as ll

pytestmark = pytest.mark.filterwarnings("ignore:.*`torch_dtype` is deprecated:FutureWarning")
NAMES = r"to_(q|v|out\.0)$|proj_in$"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"r": 4, "alpha": 6.0, "target_names": NAMES}),
    "ranks": ("lora", {"target_names": NAMES, "per_layer": {"to_v": {"r": 2, "alpha": 5.0}}, "rslora": True}),
    "dora": ("dora", {"r": 3, "alpha": 5.0, "target_names": NAMES}),
    "16 bits": ("lora", {"target_names": NAMES, "dtype": torch.bfloat16}),
    "dora in 16 bits": ("dora", {"target_names": NAMES, "dtype": torch.bfloat16}),
    "convolutions": ("lora", {"kinds": ("linear", "conv"), "target_names": ".", "per_layer": {"conv1": {"r": 2}}}),
    "dora on convolutions": ("dora", {"kinds": ("linear", "conv"), "target_names": r"conv1$|to_q$|conv_shortcut"}),
}
CASES = [(name, kind) for name in MODELS for kind in KINDS if name == "unet" or "convolutions" not in kind]


def adapted(name: str, kind: str) -> Any:
    model, (variant, fields) = MODELS[name](), KINDS[kind]
    perturb(ll.attach(model, config(variant, **fields)), 0.2)
    assert float((output(model) - output(MODELS[name]())).abs().max()) > 1e-2
    return model


def pipeline_of(model: Any) -> Any:
    """A pipeline of its kind around a model; what else it has is never called."""
    if isinstance(model, FluxTransformer2DModel):
        others = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        return FluxPipeline(transformer=model, **dict.fromkeys(others))
    others = ("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
    return StableDiffusionPipeline(unet=model, **dict.fromkeys(others), requires_safety_checker=False)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_pipeline_computes_what_we_do(name: str, kind: str, tmp_path: Path) -> None:
    model, other = adapted(name, kind), MODELS[name]()
    assert ll.save_as(model, tmp_path, "diffusers") < 2e-6
    pipeline_of(other).load_lora_weights(tmp_path)
    if "16 bits" in kind:  # ours are cast to the layer's float32, and theirs stay
        other.float()
    assert_close(output(other), output(model))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_model_computes_what_we_do(name: str, kind: str, tmp_path: Path) -> None:
    model, other = adapted(name, kind), MODELS[name]()
    ll.save_as(model, tmp_path, "diffusers")
    other.load_lora_adapter(tmp_path, use_safetensors=True, **({"prefix": "unet"} if name == "unet" else {}))
    other.float()
    assert_close(output(other), output(model))
    again = MODELS[name]()
    ll.load(again, tmp_path)
    assert_close(output(again), output(model))


@pytest.mark.parametrize("prefix", ["", "transformer", "unet_2"])
def test_the_component_is_an_argument(prefix: str, tmp_path: Path) -> None:
    model, other = adapted("unet", "lora"), unet()
    ll.save_as(model, tmp_path / "a.safetensors", "diffusers", prefix=prefix)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        keys, described = list(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])
    start = f"{prefix}." if prefix else ""
    assert all(key.startswith((f"{start}down", f"{start}up", f"{start}mid")) for key in keys)
    assert described[f"{start}r"] == described[f"{start}lora_alpha"] == 4
    other.load_lora_adapter(tmp_path / "a.safetensors", prefix=prefix or None)  # reads no metadata of a file
    assert_close(output(other), output(model))
    again = unet()
    ll.load(again, tmp_path / "a.safetensors")
    assert_close(output(again), output(model))


def test_the_default_component_is_the_pipelines(tmp_path: Path) -> None:
    for model, component in ((unet(), "unet"), (MODELS["flux"](), "transformer"), (tiny_llama(), "text_encoder")):
        ll.attach(model, config("lora", target_names=r"(to_q|q_proj)$"))
        ll.save_as(model, tmp_path, "diffusers")
        with safe_open(tmp_path / FILE, "pt") as file:
            assert all(key.startswith(f"{component}.") for key in file.keys())  # noqa: SIM118


def test_what_is_not_written_is_named(tmp_path: Path) -> None:
    model = unet()
    ll.attach(model, [config("lora", target_names="to_q"), config("dora", target_names="to_v")])
    with pytest.raises(ll.CheckpointError, match=r"diffusers' file holds one method, and here are dora, lora\n.*rank="):
        ll.save_as(model, tmp_path, "diffusers")
    for prefix in ("a b", 3):
        with pytest.raises(ll.ConfigError, match=r"prefix=.*: wanted a component's name, such as 'unet', or '' for"):
            ll.save_as(model, tmp_path, "diffusers", prefix=prefix)
    one = OneLinear()
    one.proj = nn.Conv2d(4, 8, 3, dilation=2)  # type: ignore[assignment]
    ll.attach(one, config("lora", kinds="conv", target_names="proj"))
    with pytest.raises(ll.CheckpointError, match=r"proj: PEFT's A has no dilation, .*\n  leave it out"):
        ll.save_as(one, tmp_path, "diffusers")
    assert not list(tmp_path.iterdir())
