"""PEFT folders merged on disk: the numbers of PEFT's own merge_and_unload, tensor by tensor, or a refusal."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as installed
from models import config, moe, quantized, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import lora_lite as ll
from lora_lite.cli.commands import app
from lora_lite.cli.report import inspect

transformers: Any = installed  # its classes take more than their signatures say
# PEFT says that it puts the head's weight into the folder, where the head is a target.
# It warns of lora_bias, whose tensors have one axis, and of projections that it doesn't save.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}:UserWarning")
    for words in ("Setting `save_embedding_layers`", "Adapter 'default'. 6 LoRA tensor", "Specified to not save vera")
] + [pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")]  # of a norm
ALL = ["q_proj", "k_proj", "down_proj"]
TARGETS: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ALL}
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(**TARGETS),
    "rslora": lambda: peft.LoraConfig(**TARGETS, use_rslora=True, lora_dropout=0.1),
    "patterns": lambda: peft.LoraConfig(**TARGETS, rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3}),
    "dora": lambda: peft.LoraConfig(**TARGETS, use_dora=True),
    "pissa": lambda: peft.LoraConfig(**TARGETS, init_lora_weights="pissa"),
    "olora": lambda: peft.LoraConfig(**TARGETS, init_lora_weights="olora"),
    "lora_bias": lambda: peft.LoraConfig(**TARGETS, lora_bias=True),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=ALL),
    "vera_drawn": lambda: peft.VeraConfig(r=4, target_modules=ALL, save_projection=False),
    "ia3": lambda: peft.IA3Config(target_modules=ALL, feedforward_modules=["down_proj"]),
    "head": lambda: peft.LoraConfig(r=4, target_modules=["lm_head"]),  # PEFT puts the head's own weight beside it
}


def folders(path: Path, cfg: Any, base: Any) -> Any:
    """A folder "base" of several shards, a folder "peft" of an adapter with values of its own, and PEFT's merge."""
    base.save_pretrained(path / "base", max_shard_size="60KB")
    wrapped = peft.get_peft_model(type(base).from_pretrained(path / "base"), cfg)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(path / "peft")
    return wrapped.eval().merge_and_unload()


def close(folder: Path, merged: Any, tolerance: float = 1e-6) -> None:
    ours, theirs = type(merged).from_pretrained(folder).state_dict(), merged.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        torch.testing.assert_close(ours[key], tensor, rtol=tolerance, atol=tolerance)


def merge(path: Path, **options: Any) -> ll.Merged:
    return ll.merge_checkpoint(path / "base", path / "peft", path / "out", **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_peft_folder_merges_as_peft_merges_it(name: str, tmp_path: Path) -> None:
    merged = folders(tmp_path, CONFIGS[name](), tiny_llama(bias=name in ("ia3", "lora_bias")))
    done = merge(tmp_path)
    close(tmp_path / "out", merged, 1e-5 if name in ("pissa", "olora") else 1e-6)
    assert done.layers == (1 if name == "head" else 6)
    # biases are scaled with the outputs, or trained
    assert done.tensors == (12 if name in ("ia3", "lora_bias") else done.layers)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    moved = [key for key, tensor in merged.state_dict().items() if not torch.equal(tensor, base[key])]
    assert len(moved) == (10 if name == "ia3" else done.tensors)  # not those of scaled inputs
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_frods_directions_that_no_weight_has_are_known_with_all_layers_alone(tmp_path: Path) -> None:
    folders(tmp_path, peft.FrodConfig(target_modules=["k_proj"], layers_to_transform=[0]), tiny_llama())
    with pytest.raises(ll.CheckpointError, match=r"has no part in \d+ of V's \d+ directions") as error:
        merge(tmp_path)
    assert "load it on its model" in str(error.value)


BESIDE: dict[str, Callable[[], Any]] = {
    "head and norm": lambda: peft.LoraConfig(**TARGETS, modules_to_save=["lm_head", "model.norm"]),
    "embedding": lambda: peft.LoraConfig(**TARGETS, modules_to_save=["embed_tokens"]),
    "biases": lambda: peft.LoraConfig(**TARGETS, bias="all"),
    "their biases": lambda: peft.LoraConfig(**TARGETS, bias="lora_only", use_dora=True),
    "tokens": lambda: peft.LoraConfig(**TARGETS, trainable_token_indices={"embed_tokens": [7, 3], "lm_head": [5]}),
    "ia3 and head": lambda: peft.IA3Config(
        target_modules=ALL, feedforward_modules=["down_proj"], modules_to_save=["lm_head"]
    ),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, total_step=1, target_modules=ALL),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "rows": lambda: peft.TrainableTokensConfig(token_indices=[9, 2]),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_was_trained_beside_an_adapter_merges_as_well(name: str, tmp_path: Path) -> None:
    merged = folders(tmp_path, BESIDE[name](), tiny_llama(bias=True))
    merge(tmp_path)
    close(tmp_path / "out", merged)


def test_rows_of_a_tied_embedding_merge_into_both(tmp_path: Path) -> None:
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**tiny_llama().config.to_dict() | {"tie_word_embeddings": True})
    )
    cfg = peft.LoraConfig(**TARGETS, trainable_token_indices=[9, 2])
    merged = folders(tmp_path, cfg, base)
    merge(tmp_path)
    close(tmp_path / "out", merged)


@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_in_bfloat16_it_is_one_rounding(name: str, tmp_path: Path) -> None:
    folders(tmp_path, CONFIGS[name](), tiny_llama(torch.bfloat16))
    merge(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ll.load_peft(model, tmp_path / "peft")
    ll.merge(model, keep=False)
    close(tmp_path / "out", model, 0)


def test_a_conv1d_of_transformers(tmp_path: Path) -> None:
    base = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64))
    cfg = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    close_to = folders(tmp_path, cfg, base)
    merge(tmp_path)
    close(tmp_path / "out", close_to)


@pytest.mark.parametrize(
    ("name", "names"),
    [("Glm4Moe", r"layers\.0\.mlp"), ("Glm4Moe", "shared_experts"), ("Laguna", "shared_experts")],
)
def test_folders_as_save_peft_writes_them_for_experts(name: str, names: str, tmp_path: Path) -> None:
    """By their weight where PEFT takes dense layers for experts, by an old name where it renames their keys."""
    from test_peft_conversion import made

    base = made(name)
    base.save_pretrained(tmp_path / "base")
    adapter = ll.attach(base, config("lora", target_names=names))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    ll.save_peft(base, tmp_path / "peft")
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert ("target_parameters" in settings) == (name == "Glm4Moe")
    ll.merge(base, keep=False)
    merge(tmp_path)
    close(tmp_path / "out", base)


def test_a_base_that_is_4_bit_on_disk(tiny: str, tmp_path: Path) -> None:
    quantized(tiny, "nf4").save_pretrained(tmp_path / "base")
    model = ll.load_base(str(tmp_path / "base"), torch.bfloat16)
    adapter = ll.attach(model, config("lora", target_names="up_proj"))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    ll.save_peft(model, tmp_path / "peft")
    ll.merge(model, quantized="dequantize")
    merge(tmp_path)
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for path in adapter.targets:
        assert torch.equal(out.get_submodule(path).weight, model.get_submodule(path).weight)


def test_a_run_goes_on_and_another_folder_starts_over(tmp_path: Path, log: list[str]) -> None:
    class Stop(BaseException):
        pass

    def stopped(done: int, total: int) -> None:
        if done > total / 2:
            raise Stop

    merged = folders(tmp_path, CONFIGS["lora"](), tiny_llama())
    for change in (False, True):
        with pytest.raises(Stop):
            merge(tmp_path, progress=stopped)
        if change:  # of the settings alone
            edited(tmp_path, lora_alpha=12)
        done = merge(tmp_path)
        assert (done.resumed > 0, any("starting over" in line for line in log)) == (not change, change)
        if not change:
            close(tmp_path / "out", merged)


def edited(path: Path, **settings: Any) -> None:
    file = path / "peft" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def of_another_base(path: Path) -> None:
    tensors = load_file(path / "peft" / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"] = torch.ones(96, 64)
    save_file(tensors, path / "peft" / "adapter_model.safetensors")


def narrower(path: Path) -> None:
    tiny_llama(intermediate_size=112).save_pretrained(path / "base")
    for file in (path / "base").glob("model-*"):
        file.unlink()
    (path / "base" / "model.safetensors.index.json").unlink(missing_ok=True)


def of_experts(path: Path) -> None:
    import shutil

    shutil.rmtree(path / "base")
    moe("mixtral").save_pretrained(path / "base")
    tensors = {"lora_A": torch.ones(2, 64), "lora_B": torch.ones(64, 2)}
    start = "base_model.model.model.layers.0.mlp.experts"
    save_file({f"{start}.{n}.weight": t for n, t in tensors.items()}, path / "peft" / "adapter_model.safetensors")
    edited(path, r=2)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("head", of_another_base, r"base_layer\.weight is not lm_head\.weight of .*base\n  the adapter belongs"),
        ("lora", narrower, r"wrong shapes; .*\n  such as model\.layers\.0\.mlp\.down_proj\.lora_A \(4, 128\), wanted"),
        ("lora", of_experts, r"layers\.0\.mlp\.experts of .*base are fused experts; PEFT's format has no place"),
        ("lora", lambda p: edited(p, bias="x", use_qalora=True), r"bias=\"x\", use_qalora=true can't be kept here"),
        ("lora", lambda p: edited(p, peft_type="POLY"), r"peft_type 'POLY' isn't supported"),
        (
            "lora",
            lambda p: (p / "peft" / "adapter_config.json").unlink(),
            r"is no adapter folder of PEFT: wanted adapter_model\.safetensors and adapter_config\.json in it",
        ),
    ],
)
def test_what_would_be_lost_raises_before_the_first_byte(name: str, damage: Any, message: str, tmp_path: Path) -> None:
    folders(tmp_path, CONFIGS[name](), tiny_llama())
    damage(tmp_path)
    with pytest.raises(ll.CheckpointError, match=message):
        merge(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "peft"}


# ---- on layers that aren't linear ones ------------------------------------------------------------


def convolutional() -> Any:
    fields = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
    return transformers.ConvNextModel(transformers.ConvNextConfig(**fields))


def pooled() -> Any:
    """With an nn.MultiheadAttention in its head."""
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**fields, image_size=8, patch_size=4))


def parameters(*names: str, **more: Any) -> Any:
    return peft.LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=list(names), **more)


PATCHES = ["downsampling_layer.1", "patch_embeddings"]  # with kernels of 2 x 2 and 4 x 4
OTHERS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "mixtral": (lambda: moe("mixtral"), lambda: parameters("gate_up_proj", "down_proj")),
    "mixtral_down": (
        lambda: moe("mixtral"),
        lambda: parameters("down_proj", "gate.weight"),
    ),
    "gpt_oss": (lambda: moe("gpt_oss"), lambda: parameters("gate_up_proj", "down_proj", use_rslora=True)),
    "convolution": (convolutional, lambda: peft.LoraConfig(r=2, target_modules=PATCHES)),
    "dora_convolution": (convolutional, lambda: peft.LoraConfig(r=2, target_modules=PATCHES, use_dora=True)),
    "ia3_convolution": (convolutional, lambda: peft.IA3Config(target_modules=PATCHES, feedforward_modules=PATCHES[:1])),
    "embedding": (tiny_llama, lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])),
    "dora_embedding": (tiny_llama, lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True)),
    "attention": (pooled, lambda: peft.LoraConfig(r=2, target_modules=["head.attention", "fc1"])),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_merge_as_they_load(name: str, tmp_path: Path) -> None:
    make, cfg = OTHERS[name]
    base = make()
    merged = folders(tmp_path, cfg(), base)
    merge(tmp_path)
    model = type(base).from_pretrained(tmp_path / "base").eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    names = list(ll.load_peft(model, tmp_path / "peft").targets)
    ll.merge(model, keep=False)
    close(tmp_path / "out", model)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert names
    if name != "attention":  # PEFT adds an out_proj's update twice in each forward, and merges it once
        close(tmp_path / "out", merged, 1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_weight_holds_it_on_a_convolution_with_groups(tmp_path: Path) -> None:
    convolutional().save_pretrained(tmp_path / "base")
    model = transformers.ConvNextModel.from_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=16, target_modules=["dwconv"]))
    wrapped.save_pretrained(tmp_path / "peft")
    ll.load_peft(model, tmp_path / "peft")
    ll.save(model, tmp_path / "a.safetensors")
    said = r"dwconv: PEFT's LoRA on a convolution with groups sees the channels of all groups, .*\n  keep the adapter"
    for file in (tmp_path / "peft", tmp_path / "a.safetensors"):
        with pytest.raises(ll.CheckpointError, match=said):
            ll.merge_checkpoint(tmp_path / "base", file, tmp_path / "out")
    with pytest.raises(ll.CheckpointError, match=said):
        inspect(tmp_path / "a.safetensors", tmp_path / "base")
    fields = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}
    transformers.ConvNextModel(transformers.ConvNextConfig(**fields)).save_pretrained(tmp_path / "other")
    for use in (
        lambda: ll.merge_checkpoint(tmp_path / "other", tmp_path / "a.safetensors", tmp_path / "out"),
        lambda: inspect(tmp_path / "a.safetensors", tmp_path / "other"),
    ):
        with pytest.raises(ll.CheckpointError, match="this is another base model"):
            use()


def test_the_command_takes_target_parameters(tmp_path: Path) -> None:
    merged = folders(tmp_path, parameters("gate_up_proj", "down_proj"), moe("mixtral"))
    done = CliRunner().invoke(app, ["merge", *(str(tmp_path / name) for name in ("base", "peft", "out"))])
    assert done.exit_code == 0, done.output
    assert "merged 4 layers (24 tensors) into" in done.output
    close(tmp_path / "out", merged)


def test_dora_on_experts_is_no_adapter_of_pefts(tmp_path: Path) -> None:
    base = moe("mixtral")
    folders(tmp_path, parameters("down_proj"), base)
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    vectors = {key.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(64) for key in tensors if "_A" in key}
    save_file(tensors | vectors, tmp_path / "peft" / "adapter_model.safetensors")
    edited(tmp_path, use_dora=True)
    message = r"use_dora=true on experts, model\.layers\.0.* isn't supported: PEFT has no such adapter"
    for use in (lambda: merge(tmp_path), lambda: ll.load_peft(base, tmp_path / "peft")):
        with pytest.raises(ll.CheckpointError, match=message):
            use()


def test_as_trained_is_not_known_of_a_peft_folder(tmp_path: Path) -> None:
    folders(tmp_path, CONFIGS["lora"](), tiny_llama())
    message = r"PEFT's format does not say how the base was quantised in training\n  use base_weights=\"original\""
    with pytest.raises(ll.CheckpointError, match=message):
        merge(tmp_path, base_weights="as_trained")


def test_the_command_takes_a_peft_folder(tmp_path: Path) -> None:
    merged = folders(tmp_path, CONFIGS["lora"](), tiny_llama())
    done = CliRunner().invoke(app, ["merge", *(str(tmp_path / name) for name in ("base", "peft", "out"))])
    assert done.exit_code == 0, done.output
    assert re.search(r"merged 6 layers \(6 tensors\) into", done.output)
    close(tmp_path / "out", merged)
    # Not the command's own: a folder that is no adapter's.
    done = CliRunner().invoke(app, ["merge", *(str(tmp_path / name) for name in ("base", "base", "other"))])
    assert (done.exit_code, "is no adapter folder of PEFT" in done.output) == (2, True)
