"""Merging on disk: equal to merging in memory bit for bit, for every method, base and layout; whole or not at all."""

import gc
import json
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BUT_THREE, SIZES, config, moe, quantized, tiny_llama
from safetensors.torch import load_file, save_file
from test_in_memory import MODES, adapted, named, own
from test_laws import logits
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import lora_lite as ll
from lora_lite.base.layer import layer_of, quantization_of
from lora_lite.merging.base_folder import BaseFolder
from lora_lite.merging.on_disk import MARKER


def opened(folder: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **more).eval()


def same_weights(a: Any, b: Any) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key]) or a[key].dtype != b[key].dtype] == []


def merged_both_ways(tmp_path: Path, mode: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """From the folder "base": the model that `merge_checkpoint` writes, and the one that `merge` makes."""
    model = opened(tmp_path / "base")
    adapted(model, mode, **options).scale = 0.7
    ll.save(model, tmp_path / "a.safetensors")
    ll.merge(model, keep=False)
    ll.merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    return opened(tmp_path / "out"), model


@pytest.mark.parametrize("mode", MODES, ids=named)
def test_every_method_merges_on_disk_as_in_memory(mode: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_llama(torch.bfloat16, bias=True, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    assert len(list((tmp_path / "base").glob("model-*"))) > 3
    same_weights(*merged_both_ways(tmp_path, mode, exclude_names=BUT_THREE))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    before = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    assert index == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("variant", ["lora", "dora", "ia3_ff"])
def test_other_dtypes_in_a_single_file(dtype: torch.dtype, variant: str, tmp_path: Path) -> None:
    tiny_llama(dtype).save_pretrained(tmp_path / "base")
    ours, wanted = merged_both_ways(tmp_path, {"variant": variant})
    assert ours.dtype == dtype
    same_weights(ours, wanted)


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("normalization", list(ll.Normalization))
def test_experts_are_found_however_they_lie(name: str, normalization: str, tmp_path: Path) -> None:
    moe(name, torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    disk = {key for file in (tmp_path / "base").glob("*.safetensors") for key in load_file(file)}
    assert any(("experts.0." in key) for key in disk) == (name != "gpt_oss")  # one by one on disk
    mode = {"variant": "abliteration", "normalization": normalization}
    same_weights(*merged_both_ways(tmp_path, mode))


def test_conv1d_and_its_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    ).bfloat16().save_pretrained(tmp_path / "base")
    same_weights(*merged_both_ways(tmp_path, {"variant": "dora"}, target_names=r"c_(attn|fc|proj)$"))


def test_renamed_keys_are_followed(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(**SIZES, intermediate_size=128)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=95))
    model = model.bfloat16().eval()
    model.save_pretrained(tmp_path / "base")
    assert any(
        key.startswith("language_model.model.layers") for key in load_file(tmp_path / "base" / "model.safetensors")
    )
    ll.attach(model, config("lora", target_names=r"language_model.*_proj$"))
    for parameter in ll.adapters(model)["default"].parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    ll.save(model, tmp_path / "a.safetensors")
    ll.merge(model, keep=False)
    ll.merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    same_weights(LlavaForConditionalGeneration.from_pretrained(tmp_path / "out"), model)


def folder_of(model: Any, folder: Path) -> Path:
    """The model's folder, of numbers that differ everywhere."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def classifier() -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3)), r"score$|q_proj$"


def resnet() -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    labels = {0: "cat", 1: "dog", 2: "newt"}
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, id2label=labels)), r"classifier\.1$"


def vitpose() -> Any:
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

    sizes = {"image_size": [16, 16], "patch_size": [4, 4], "hidden_size": 32, "num_attention_heads": 2}
    backbone = VitPoseBackboneConfig(**sizes, num_hidden_layers=2, intermediate_size=48)
    return VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=5)), r"fc1$|query$|q_proj$"


def mamba2() -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"hidden_size": 32, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "vocab_size": 96}
    return Mamba2ForCausalLM(Mamba2Config(**sizes, num_hidden_layers=2)), r"(in|out)_proj$"


def doge() -> Any:
    from transformers import DogeConfig, DogeForCausalLM

    config = DogeConfig(**SIZES, intermediate_size=48)
    assert config.num_experts == 16384
    assert not config.is_moe
    return DogeForCausalLM(config), r"(q|up)_proj$"


@pytest.mark.parametrize("make", [classifier, resnet, vitpose, mamba2, doge])
def test_a_skeleton_has_its_heads_backbones_and_infinities(make: Callable[[], Any], tmp_path: Path) -> None:
    model, targets = make()
    folder_of(model, tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base").eval()
    adapter = ll.attach(model, ll.LoRAConfig(r=3, target_names=targets))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    ll.save(model, tmp_path / "a.safetensors")
    ll.merge(model, keep=False)
    ll.merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    same_weights(type(model).from_pretrained(tmp_path / "out"), model)


def test_infinities_as_json_once_had_them(tmp_path: Path) -> None:
    """transformers 4 wrote the bare word."""
    model, targets = mamba2()
    folder_of(model, tmp_path / "base")
    edited(tmp_path / "base", lambda config: config.update(time_step_limit=[0.0, float("inf")]))
    assert "Infinity]" in (tmp_path / "base" / "config.json").read_text()
    ll.attach(model, ll.LoRAConfig(target_names=targets))
    ll.save(model, tmp_path / "a.safetensors")
    ll.merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")


def test_a_head_of_the_default_size_in_a_config_of_three_labels_is_seen(tmp_path: Path) -> None:
    model, targets = classifier()
    folder_of(model, tmp_path / "base")
    ll.attach(model, ll.LoRAConfig(r=3, target_names=targets))
    ll.save(model, tmp_path / "a.safetensors")
    edited(tmp_path / "base", lambda config: config.pop("id2label"))
    with pytest.raises(ll.CheckpointError, match=r"score.weight is \(3, 64\); wanted \(2, 64\)"):
        ll.merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")


def edited(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    edit(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda c: c["backbone_config"].update(num_hidden_layers=10**9),
            r"num_hidden_layers=1e\+09, and the files hold",
        ),
        (
            lambda c: c.update(backbone_config={"model_type": "resnet", "depths": [10**9]}),
            r"depths=1e\+09, and the files",
        ),
        (
            lambda c: c.update(backbone_config={"model_type": "resnet", "depths": [900] * 9}),
            r"depths=8.1e\+03, and the",
        ),
        (lambda c: c.update(backbone_config={"model_type": "nothing"}), "describes no VitPose"),
        (lambda c: c.update(backbone_config="evil/backbone"), r"fc1.weight is \(128, 32\); wanted \(3072, 768\)"),
        (
            lambda c: c.update(backbone_config=None, backbone="evil/backbone"),
            r"fc1.weight is \(128, 32\); wanted \(3072, 768\)",
        ),
        (
            lambda c: c.update(backbone_config={"model_type": "timm_backbone", "backbone": "hf-hub:evil/backbone"}),
            "describes no VitPose.*(timm library|backbone is not set)",
        ),
    ],
)
def test_a_backbone_can_neither_fetch_nor_grow(
    edit: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dialled(*_: Any, **__: Any) -> None:
        asked.append(_)
        raise OSError("no network")

    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", dialled)
    model, _ = vitpose()
    folder_of(model, tmp_path / "base")
    ll.attach(model, ll.LoRAConfig(target_names="fc1$"))
    ll.save(model, tmp_path / "a.safetensors")
    edited(tmp_path / "base", edit)
    started = time.monotonic()
    with pytest.raises(ll.CheckpointError, match=message):
        ll.merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    assert time.monotonic() - started < 20
    assert not asked


@pytest.mark.slow
def test_whatever_field_asks_for_modules_without_end_building_ends(tmp_path: Path) -> None:
    from transformers import MusicgenDecoderConfig, MusicgenForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 96}
    model = MusicgenForCausalLM(MusicgenDecoderConfig(**sizes, num_codebooks=2))
    folder_of(model, tmp_path / "base")
    ll.attach(model, ll.LoRAConfig(target_names="fc1$"))
    ll.save(model, tmp_path / "a.safetensors")
    ll.merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    edited(tmp_path / "base", lambda config: config.update(num_codebooks=10**9))
    started = time.monotonic()
    with pytest.raises(
        ll.CheckpointError,
        match=r"more than 10000 modules and parameters, and the files hold \d+ tensors\n.*two models",
    ):
        ll.merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "other")
    assert time.monotonic() - started < 20
    assert len(nn.Sequential(*(nn.Identity() for _ in range(20_000)))) == 20_000  # nothing is counted afterwards


def one_rounding(a: torch.Tensor, b: torch.Tensor, exact: bool) -> None:
    """Equal, or neighbours in bfloat16: a 4-bit layer's own kernel adds up DoRA's norm in another order."""
    torch.testing.assert_close(a, b, rtol=0 if exact else 2.0**-7, atol=0)
    assert (a == b).float().mean() > 0.99


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize(("variant", "double_quant"), [("lora", True), ("lora", False), ("dora", True)])
def test_as_trained_is_the_model_that_was_trained(
    quantization: str, variant: str, double_quant: bool, tiny: str, tmp_path: Path
) -> None:
    model = quantized(tiny, quantization, double_quant=double_quant)
    adapted(model, {"variant": variant}, target_names=r"(up|q)_proj$")
    values = {path: layer_of(m, path).dense_weight() for path, m in model.named_modules() if path.endswith("_proj")}
    ll.save(model, tmp_path / "a.safetensors")
    ll.merge(model, quantized="dequantize")
    ll.merge_checkpoint(tiny, tmp_path / "a.safetensors", tmp_path / "out", "as_trained")
    out = opened(tmp_path / "out")
    assert quantization_of(out) is None
    for path, value in values.items():
        layer, ours = model.get_submodule(path), out.get_submodule(path)
        if path.endswith(("up_proj", "q_proj")):
            one_rounding(ours.weight, layer.weight, exact=variant == "lora")
        else:  # quantised, though no adapter is on it
            assert torch.equal(ours.weight.float(), value)
    base = opened(Path(tiny))
    for key in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):  # which were never quantised
        assert torch.equal(out.state_dict()[key], base.state_dict()[key])


def test_as_trained_on_8_bit(tiny: str, tmp_path: Path) -> None:
    model = quantized(tiny, "int8")
    adapted(model, {"variant": "lora"}, target_names="up_proj")
    ll.save(model, tmp_path / "a.safetensors")
    ll.merge(model, quantized="dequantize")
    ll.merge_checkpoint(tiny, tmp_path / "a.safetensors", tmp_path / "out", "as_trained")
    out = opened(tmp_path / "out")
    for path, layer in model.named_modules():
        if path.endswith("up_proj"):
            assert torch.equal(out.get_submodule(path).weight, layer.weight)
        elif path.endswith("_proj"):
            assert torch.equal(out.get_submodule(path).weight, layer_of(layer, path).dense_weight().bfloat16())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_base_that_is_quantised_on_disk(quantization: str, tiny: str, tmp_path: Path) -> None:
    quantized(tiny, quantization).save_pretrained(tmp_path / "base")
    model = ll.load_base(str(tmp_path / "base"), torch.bfloat16)
    adapted(model, {"variant": "dora"}, target_names="up_proj")
    ll.save(model, tmp_path / "a.safetensors")
    ll.merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    ll.merge(model, quantized="dequantize")
    out = opened(tmp_path / "out")
    assert not hasattr(out.config, "quantization_config")
    for path, layer in model.named_modules():
        if path.endswith("up_proj"):
            one_rounding(out.get_submodule(path).weight, layer.weight, exact=False)
        elif path.endswith("_proj"):
            assert torch.equal(out.get_submodule(path).weight, layer_of(layer, path).dense_weight().bfloat16())


def test_original_weights_for_an_adapter_of_a_quantised_base(tiny: str, tmp_path: Path, log: list[str]) -> None:
    model = quantized(tiny, "nf4")
    adapted(model, {"variant": "lora"})
    ll.save(model, tmp_path / "a.safetensors")
    ll.merge_checkpoint(tiny, tmp_path / "a.safetensors", tmp_path / "out")
    assert not any(line.startswith("WARNING") for line in log)
    dense = opened(Path(tiny))
    ll.load(dense, tmp_path / "a.safetensors")
    ll.merge(dense, keep=False)
    same_weights(opened(tmp_path / "out"), dense)


def test_a_tied_head_wants_to_be_untied(tmp_path: Path) -> None:
    tiny_llama(torch.bfloat16, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = opened(tmp_path / "base")
    adapted(model, {"variant": "lora"}, target_names="(lm_head|up_proj)$")
    attached = logits(model)
    ll.save(model, tmp_path / "a.safetensors")
    arguments = tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out"
    with pytest.raises(ll.TargetError, match=r"lm_head: its weight is also model.embed_tokens.weight.*\n.*untie=True"):
        ll.merge_checkpoint(*arguments)
    assert not (tmp_path / "out").exists()
    ll.merge_checkpoint(*arguments, untie=True)
    out = opened(tmp_path / "out")
    assert out.config.tie_word_embeddings is False
    assert torch.equal(out.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert not torch.equal(out.lm_head.weight, out.get_input_embeddings().weight)
    torch.testing.assert_close(logits(out), attached, rtol=0.02, atol=0.02)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder "base" of several shards, with an adapter file beside it."""
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    model = opened(tmp_path / "base")
    adapted(model, {"variant": "lora"})
    ll.save(model, tmp_path / "a.safetensors")
    return tmp_path


def merge_in(folder: Path, **options: Any) -> ll.Merged:
    return ll.merge_checkpoint(folder / "base", folder / "a.safetensors", folder / "out", **options)


def test_one_weight_is_in_memory_at_a_time_without_help_of_the_garbage_collector(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, weights, most = BaseFolder.read, [], []

    def noted(self: BaseFolder, key: str, index: int | None = None) -> torch.Tensor:
        tensor = read(self, key, index)
        weights.append(weakref.ref(tensor))
        most.append(sum(weight() is not None for weight in weights))
        return tensor

    monkeypatch.setattr(BaseFolder, "read", noted)
    gc.collect()
    gc.disable()
    try:
        merge_in(saved)
    finally:
        gc.enable()
    assert len(most) > 10
    assert max(most) <= 2, most  # the one that is being written, and the next


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata)


UP = "model.layers.0.mlp.up_proj.lora_A"


def adapter_tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: change(folder / "a.safetensors", edit)


def other_base(folder: Path) -> None:
    tiny_llama(torch.bfloat16, seed=5).save_pretrained(folder / "base", max_shard_size="60KB")


def narrower(folder: Path) -> None:
    tiny_llama(torch.bfloat16, intermediate_size=112).save_pretrained(folder / "base", max_shard_size="60KB")


def fewer_blocks(folder: Path) -> None:
    tiny_llama(torch.bfloat16, num_hidden_layers=1).save_pretrained(folder / "base", max_shard_size="60KB")


def shorter(folder: Path) -> None:
    file = next((folder / "base").glob("model-*"))
    file.write_bytes(file.read_bytes()[:-1])


def escaping(folder: Path) -> None:
    index = folder / "base" / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    names["weight_map"]["lm_head.weight"] = "../a.safetensors"
    index.write_text(json.dumps(names))


def no_weights(folder: Path) -> None:
    for file in (folder / "base").glob("*.safetensors*"):
        file.unlink()
    (folder / "base" / "pytorch_model.bin").write_bytes(b"\x80\x04")


def unknown_architecture(folder: Path) -> None:
    file = folder / "base" / "config.json"
    file.write_text(file.read_text().replace("LlamaForCausalLM", "os.system"))


def occupied(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("mine")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (narrower, ll.CheckpointError, r"mlp.gate_proj was saved from .* = \(64, 128\), and .* has \(64, 112\)"),
        (
            fewer_blocks,
            ll.CheckpointError,
            r"7 of its 14 target layers are not in this LlamaForCausalLM\n  file:  model.layers.1",
        ),
        (
            lambda f: change(f / "a.safetensors", lambda t: t.pop("model.layers.0.mlp.up_proj.lora_A")),
            ll.CheckpointError,
            "1 missing keys; 27 tensors where 28 are wanted\n  such as model.layers.0.mlp.up_proj.lora_A",
        ),
        (
            lambda f: change(f / "a.safetensors", lambda t: t.update(x=torch.ones(1))),
            ll.CheckpointError,
            "1 unexpected keys.*\n  such as x",
        ),
        (
            lambda f: change(f / "a.safetensors", lambda t: t["model.layers.0.mlp.up_proj.lora_A"].fill_(float("nan"))),
            ll.CheckpointError,
            "hold NaN",
        ),
        (shorter, ll.CheckpointError, "is no safetensors file; it is cut short or damaged"),
        (escaping, ll.CheckpointError, r"it names the file '../a.safetensors'; wanted the plain name"),
        (
            no_weights,
            ll.CheckpointError,
            r"has neither model.safetensors nor .*\n.*pytorch_model.bin, a pickle, which is never",
        ),
        (unknown_architecture, ll.CheckpointError, r"architectures=\['os.system'\] is no model of transformers"),
        (occupied, ll.CheckpointError, r"out is there already and holds what no merge has written, such as mine.txt"),
    ],
)
def test_what_cannot_be_right_raises_before_the_first_byte(saved: Path, damage: Any, error: Any, message: str) -> None:
    damage(saved)
    before = sorted(path for path in saved.rglob("*"))
    with pytest.raises(error, match=message):
        merge_in(saved)
    assert sorted(path for path in saved.rglob("*")) == before


def test_another_base_warns_or_raises(saved: Path, log: list[str]) -> None:
    other_base(saved)
    merge_in(saved)
    assert any("was trained on another weight than that in" in line and line.startswith("WARNING") for line in log)
    model = tiny_llama(torch.bfloat16)
    adapted(model, {"variant": "dora"})
    ll.save(model, saved / "a.safetensors")
    with pytest.raises(ll.CheckpointError, match=r"another weight(.|\n)*'dora' depends on the values"):
        merge_in(saved)
    merge_in(saved, verify_base=False)


@pytest.mark.parametrize("base_weights", ["original", "as_trained"])
def test_another_base_than_the_quantised_one(base_weights: str, tiny: str, tmp_path: Path, log: list[str]) -> None:
    model = quantized(tiny, "nf4")
    adapted(model, {"variant": "lora"})
    ll.save(model, tmp_path / "a.safetensors")
    tiny_llama(torch.bfloat16, seed=5, hidden_size=128, intermediate_size=256).save_pretrained(tmp_path / "base")
    merge_in(tmp_path, base_weights=base_weights)
    assert sum("another weight" in line for line in log) == 1


def test_dora_of_a_quantised_base_wants_its_weights(tiny: str, tmp_path: Path) -> None:
    model = quantized(tiny, "nf4")
    adapted(model, {"variant": "dora"})
    ll.save(model, tmp_path / "a.safetensors")
    with pytest.raises(ll.CheckpointError, match=r'depends on the values.*use base_weights="as_trained"'):
        ll.merge_checkpoint(tiny, tmp_path / "a.safetensors", tmp_path / "out")


def test_an_overflow_leaves_nothing(tmp_path: Path) -> None:
    tiny_llama(torch.float16).save_pretrained(tmp_path / "base")
    model = opened(tmp_path / "base")
    adapter = adapted(model, {"variant": "lora"})
    with torch.no_grad():
        list(adapter.parameters())[-1].fill_(1e6)
    ll.save(model, tmp_path / "a.safetensors")
    with pytest.raises(ll.BaseModelError, match=r"1.mlp.down_proj: merged numbers are NaN or infinite in float16"):
        merge_in(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "a.safetensors"}


def test_a_constant_without_a_bias_to_hold_it_raises(tmp_path: Path) -> None:
    own("shift", lambda layer, x, y: y + layer.lora_v, has_identity_init=False)
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = opened(tmp_path / "base")
    ll.attach(model, config("shift"))
    ll.save(model, tmp_path / "a.safetensors")
    with pytest.raises(ll.CheckpointError, match="_proj: 'shift' adds a constant there, and this model has no bias"):
        merge_in(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_method_that_is_not_affine_leaves_nothing(tmp_path: Path) -> None:
    own("bent", lambda layer, x, y: y + layer.lora_v * y.tanh())
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = opened(tmp_path / "base")
    ll.attach(model, config("bent"))
    ll.save(model, tmp_path / "a.safetensors")
    with pytest.raises(ll.VariantError, match="'bent' is not affine in x"):
        merge_in(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "a.safetensors"}


def test_a_method_that_reads_its_weight_in_forward(tmp_path: Path) -> None:
    own("echo", lambda layer, x, y: y + layer.lora_v * layer.linear(x), base_weight="read")
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = opened(tmp_path / "base")
    ll.attach(model, config("echo"))
    ll.save(model, tmp_path / "a.safetensors")
    ll.merge(model, keep=False)
    merge_in(tmp_path)
    same_weights(opened(tmp_path / "out"), model)


def test_files_beside_the_tensors_come_along(saved: Path) -> None:
    (saved / "base" / "tokenizer.json").write_text("{}")
    (saved / "base" / "optimizer.bin").write_text("not this one")
    told: list[tuple[int, int]] = []
    done = merge_in(saved, progress=lambda done, total: told.append((done, total)))
    assert (saved / "out" / "tokenizer.json").read_text() == "{}"
    assert not (saved / "out" / "optimizer.bin").exists()
    assert not list(saved.glob("*.partial"))
    assert told[-1][0] <= told[-1][1] == done.size
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert "merged 14 layers (14 tensors) into" in str(done)


def test_a_folder_of_its_own_is_replaced_and_the_base_never(saved: Path) -> None:
    merge_in(saved)
    first = (saved / "out" / MARKER).stat().st_ino
    merge_in(saved)
    assert (saved / "out" / MARKER).stat().st_ino != first
    with pytest.raises(ll.CheckpointError, match="out is the base itself"):
        ll.merge_checkpoint(saved / "out", saved / "a.safetensors", saved / "out")
    assert {path.name for path in saved.iterdir()} == {"base", "a.safetensors", "out"}


def test_a_full_disk_is_seen_first(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(saved)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ll.CheckpointError, match=r"has 0.0 GB free, and 0.0 GB are to be written"):
        merge_in(saved)
    assert not (saved / "out").exists()


def test_a_second_merge_waits_for_the_first(saved: Path) -> None:
    def again(done: int, total: int) -> None:
        with pytest.raises(ll.CheckpointError, match="another merge is writing to it"):
            merge_in(saved)
        again.called = True  # type: ignore[attr-defined]

    merge_in(saved, progress=again)
    assert again.called  # type: ignore[attr-defined]


class Stop(BaseException):
    """As Ctrl-C."""


def stopped(done: int, total: int) -> None:
    if done > total / 2:
        raise Stop


@pytest.mark.parametrize("changed", ["adapter", "base", "options"])
def test_a_run_of_other_things_starts_over(changed: str, saved: Path, log: list[str]) -> None:
    with pytest.raises(Stop):
        merge_in(saved, progress=stopped)
    assert len(list((saved / "out.partial").glob("model-*"))) > 0
    if changed == "adapter":
        model = opened(saved / "base")
        adapted(model, {"variant": "ia3"})
        ll.save(model, saved / "a.safetensors")
    elif changed == "base":
        next((saved / "base").glob("model-*")).touch()
    merge_in(saved, verify_base=changed != "options")
    assert any("starting over" in line for line in log)
    dense = opened(saved / "base")
    ll.load(dense, saved / "a.safetensors")
    ll.merge(dense, keep=False)
    same_weights(opened(saved / "out"), dense)
    assert {path.name for path in saved.iterdir()} == {"base", "a.safetensors", "out"}


def test_a_folder_that_was_changed_since_is_not_replaced(saved: Path) -> None:
    merge_in(saved)
    file = next((saved / "out").glob("model-*"))
    change(file, lambda tensors: next(iter(tensors.values())).zero_())
    with pytest.raises(ll.CheckpointError, match=f"holds what no merge has written, such as {file.name}"):
        merge_in(saved)


def test_a_link_is_followed_and_other_paths_are_ours_to_refuse(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved / "disk").mkdir()
    (saved / "out").symlink_to(saved / "disk")
    for _ in range(2):
        merge_in(saved)
        assert (saved / "out").is_symlink()
        assert (saved / "disk" / MARKER).is_file()
    monkeypatch.chdir(saved / "base")
    (saved / "file").touch()
    for out in (".", "sub/..", saved / "file" / "out"):
        with pytest.raises(ll.CheckpointError):
            ll.merge_checkpoint(saved / "base", saved / "a.safetensors", out)


def test_two_models_in_one_folder_raise(saved: Path) -> None:
    tiny_llama(torch.bfloat16, seed=7).save_pretrained(saved / "other")
    (saved / "other" / "model.safetensors").rename(saved / "base" / "model.safetensors")
    with pytest.raises(ll.CheckpointError, match=r"has both model.safetensors and model.safetensors.index.json"):
        merge_in(saved)


def test_a_full_disk_keeps_what_is_finished(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    with pytest.raises(Stop):
        merge_in(saved, progress=stopped)
    usage = shutil.disk_usage(saved)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(ll.CheckpointError, match="GB free"):
            merge_in(saved)
    assert merge_in(saved).resumed > 0


def test_tensors_of_other_dtypes_and_folders_of_templates_come_along(saved: Path, log: list[str]) -> None:
    base = saved / "base"
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{}")
    (base / "onnx").mkdir()
    shard = next(base.glob("model-*"))
    index = base / "model.safetensors.index.json"
    change(shard, lambda tensors: tensors.update(extra=torch.ones(3).to(torch.float8_e4m3fn)))
    names = json.loads(index.read_text())
    names["weight_map"]["extra"] = shard.name
    index.write_text(json.dumps(names))
    merge_in(saved)
    assert (saved / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "{}"
    assert load_file(saved / "out" / shard.name)["extra"].dtype == torch.float8_e4m3fn
    assert any("left behind: onnx" in line for line in log)


def test_a_config_can_neither_fetch_nor_grow(saved: Path) -> None:
    file = saved / "base" / "config.json"
    held = json.loads(file.read_text())
    more = {"num_labels": 10**9, "attn_implementation": "evil/kernel", "backbone": "evil/backbone"}
    file.write_text(json.dumps(held | more | {"use_pretrained_backbone": True}))
    started = time.monotonic()
    merge_in(saved)
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_killed_at_any_point_it_goes_on_and_ends_the_same(saved: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "workers.py"), "killed", str(saved)], timeout=300
    )
    assert done.returncode == 0


def test_bad_choice(saved: Path) -> None:
    with pytest.raises(ll.ConfigError, match="base_weights='trained': wanted one of"):
        merge_in(saved, base_weights="trained")
