"""Merging on disk on layers that aren't linear ones: experts however the file has them, convolutions, embeddings,
attention's projections. Each is equal to merging in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as installed
from models import IDS, SIZES, config, moe, perturb, tiny_llama
from safetensors.torch import load_file, save_file
from test_fused_keys import inkling
from test_on_disk import folder_of, same_weights
from typer.testing import CliRunner

import lora_lite as ll
from lora_lite.base.layer import BaseLayer, find_layers
from lora_lite.cli.commands import app
from lora_lite.cli.report import inspect
from lora_lite.io.safetensors import Header
from lora_lite.merging.plan import MergePlan

transformers: Any = installed  # its classes take more than their signatures say
METHODS = ["lora", "dora", "ia3", "ia3_ff", "pissa"]
EXPERTS: dict[str, Any] = {"kinds": "experts", "target_names": r"experts\.\w+_proj$"}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def deepseek() -> Any:
    heads = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    fields = SIZES | ROUTED | heads | {"num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "intermediate_size": 48}
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**fields, first_k_dense_replace=1))


def llama4() -> Any:
    fields = SIZES | {"intermediate_size": 24, "intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 16}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**fields))


def qwen3_vl_moe() -> Any:
    text = SIZES | {"head_dim": 16, "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 4}
    text |= {"num_experts_per_tok": 2, "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]}}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"patch_size": 4, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return transformers.Qwen3VLMoeForConditionalGeneration(
        transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    )


MIXTURES: dict[str, tuple[Callable[[], Any], str | None]] = {  # the model; a key of its file, of experts one by one
    "mixtral": (lambda: moe("mixtral"), "block_sparse_moe.experts.0.w3.weight"),
    "qwen3": (lambda: moe("qwen3"), "mlp.experts.0.up_proj.weight"),
    "deepseek": (deepseek, "mlp.experts.0.up_proj.weight"),
    "gpt_oss": (lambda: moe("gpt_oss"), None),
    "llama4": (llama4, None),
    "qwen3_vl": (qwen3_vl_moe, None),
}


def merge(folder: Path, **options: Any) -> ll.Merged:
    return ll.merge_checkpoint(folder / "base", folder / "a.safetensors", folder / "out", **options)


def edited(file: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(edit(load_file(file)), file, {"format": "pt"})


def merged_both_ways(made: Any, folder: Path, cfg: Any, **options: Any) -> tuple[Any, Any, ll.Merged]:
    """The model that `merge_checkpoint` writes, and the one that `merge` makes. The base may be there already."""
    if not (folder / "base").exists():
        folder_of(made, folder / "base")
    model = type(made).from_pretrained(folder / "base").eval()
    adapter = ll.attach(model, cfg)
    perturb(adapter)
    adapter.scale = 0.7
    ll.save(model, folder / "a.safetensors")
    ll.merge(model, keep=False)
    done = merge(folder, **options)
    return type(made).from_pretrained(folder / "out"), model, done


# Each way in which they lie, with one method, and on two of them each method.
PAIRS = [(name, METHODS[i % len(METHODS)]) for i, name in enumerate(MIXTURES)]
PAIRS += [pair for name in ("qwen3", "gpt_oss") for v in METHODS if (pair := (name, v)) not in PAIRS]


@pytest.mark.parametrize(("name", "variant"), PAIRS)
def test_experts_merge_however_they_lie(name: str, variant: str, tmp_path: Path, log: list[str]) -> None:
    make, one_by_one = MIXTURES[name]
    torch.manual_seed(0)
    ours, wanted, done = merged_both_ways(make(), tmp_path, config(variant, **EXPERTS))
    same_weights(ours, wanted)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    assert before.keys() == after.keys()
    assert any(key.endswith(one_by_one or "experts.down_proj") for key in before)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if ".experts." in key and not key.endswith("bias")}
    assert done.tensors == len(changed)
    assert not any("another weight" in line for line in log)


def ernie_vl() -> Any:
    text = SIZES | {"intermediate_size": 48, "moe_intermediate_size": [24, 24], "moe_num_experts": 4, "moe_k": 2}
    text |= {"mlp_layer_types": ["dense", "sparse"]}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]}}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
    return transformers.Ernie4_5_VLMoeForConditionalGeneration(
        transformers.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)
    )


def step() -> Any:
    text = SIZES | {"head_dim": 16, "intermediate_size": 48, "moe_intermediate_size": 24, "n_routed_experts": 4}
    text |= {"num_local_experts": 4, "num_experts_per_tok": 2, "share_expert_dim": 24}
    text |= {"mlp_layer_types": ["dense", "sparse"], "layer_types": ["full_attention"] * 2}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.Step3p7ForConditionalGeneration(
        transformers.Step3p7Config(text_config=text, vision_config=vision | {"image_size": 8, "patch_size": 4})
    )


REGROUPED = {  # a key of the file
    inkling: "experts.w13_weight",  # a stack in which the rows of gate and up take turns
    step: "moe.up_proj.weight",  # a stack of gates, and one of ups
    ernie_vl: "experts.3.up_proj.weight",  # the first half are a text layer's, the others an image layer's
}


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("make", REGROUPED)
def test_experts_that_the_file_groups_otherwise(make: Any, variant: str, tmp_path: Path, log: list[str]) -> None:
    folder_of(made := make(), tmp_path / "base")
    before = load_file(tmp_path / "base" / "model.safetensors")
    assert any(key.endswith(REGROUPED[make]) for key in before)
    ours, wanted, _ = merged_both_ways(made, tmp_path, config(variant, **EXPERTS))
    same_weights(ours, wanted)
    assert not any("another weight" in line for line in log)


def test_experts_that_lie_the_other_way_in_the_file(tmp_path: Path, log: list[str]) -> None:
    """Qwen3-VL-MoE's own files have them as (experts, d_in, d_out)."""
    folder_of(made := qwen3_vl_moe(), tmp_path / "base")
    edited(
        tmp_path / "base" / "model.safetensors",
        lambda tensors: {k: t.mT.contiguous() if ".experts." in k else t for k, t in tensors.items()},
    )
    ours, wanted, _ = merged_both_ways(made, tmp_path, config("dora", **EXPERTS))
    same_weights(ours, wanted)
    assert not any("another weight" in line for line in log)


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_one_matrix_is_read_at_a_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    read = Header.tensor

    def watched(self: Any, file: Any, key: str, index: int | None = None) -> torch.Tensor:
        tensor = read(self, file, key, index)
        sizes.append(tensor.numel())
        return tensor

    monkeypatch.setattr(Header, "tensor", watched)
    made = MIXTURES[name][0]()
    merged_both_ways(made, tmp_path, config("lora", **EXPERTS))
    experts = made.model.layers[0].mlp.experts if name == "mixtral" else made.model.layers[0].feed_forward.experts
    assert max(sizes) <= experts.gate_up_proj[0].numel()


@pytest.mark.parametrize("shard", ["50GB", "30KB"])
def test_gate_and_up_are_merged_once(shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two files, the last of one is made again for the next at most."""
    moe("mixtral").save_pretrained(tmp_path / "base", max_shard_size=shard)
    shards = len(list((tmp_path / "base").glob("*.safetensors")))
    assert (shards > 4) == (shard == "30KB")
    folded: list[str] = []
    fold = MergePlan._fold

    def counted(self: Any, path: str, *args: Any) -> torch.Tensor:
        folded.append(path)
        return fold(self, path, *args)

    monkeypatch.setattr(MergePlan, "_fold", counted)
    ours, wanted, done = merged_both_ways(moe("mixtral"), tmp_path, config("dora", **EXPERTS))
    same_weights(ours, wanted)
    assert done.tensors == 24
    assert len(folded) == 16 if shards == 1 else 16 <= len(folded) <= 24


def fewer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if ".experts.3." not in key}


def narrower(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: t[:40].clone() if k.endswith(("w1.weight", "w3.weight")) else t for k, t in tensors.items()}


def without_w3(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith("w3.weight")}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (fewer, r"layers\.0\.mlp\.experts\.gate_up_proj has 3 experts there; wanted 4"),
        (narrower, r"gate_up_proj is 80 rows of .*experts\.0\.w1\.weight, .*w3\.weight \(64,\); wanted \(96, 64\)"),
        (without_w3, r"has no tensor for model\.layers\.0\.mlp\.experts\.gate_up_proj of MixtralForCausalLM by itself"),
    ],
)
def test_experts_that_do_not_fit_raise_before_the_first_byte(damage: Any, message: str, tmp_path: Path) -> None:
    folder_of(made := moe("mixtral"), tmp_path / "base")
    ll.attach(made, config("lora", **EXPERTS))
    ll.save(made, tmp_path / "a.safetensors")
    edited(tmp_path / "base" / "model.safetensors", damage)
    with pytest.raises(ll.CheckpointError, match=message):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()


def test_another_base_is_told_by_one_expert(tmp_path: Path) -> None:
    folder_of(made := moe("mixtral"), tmp_path / "base")
    ll.attach(made, config("dora", **EXPERTS))
    ll.save(made, tmp_path / "a.safetensors")

    def last(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: t + 1 if k.endswith("experts.3.w3.weight") else t for k, t in tensors.items()}

    edited(tmp_path / "base" / "model.safetensors", last)
    with pytest.raises(ll.CheckpointError, match=r"experts\.gate_up_proj of .* was trained on another weight than"):
        merge(tmp_path)


# ---- convolutions, attention, weights that are read ----------------------------------------------


def wav2vec2() -> Any:
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    fields |= {"conv_dim": [8, 8], "conv_kernel": [5, 3], "conv_stride": [2, 2], "num_feat_extract_layers": 2}
    fields |= {"conv_bias": True, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**fields))


def convnext() -> Any:
    return transformers.ConvNextModel(transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2))


def vit() -> Any:
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return transformers.ViTModel(transformers.ViTConfig(**fields, image_size=8, patch_size=4))


@pytest.mark.parametrize("variant", ["lora", "dora", "ia3", "ia3_ff"])
@pytest.mark.parametrize("make", [wav2vec2, convnext, vit])
def test_convolutions_and_their_biases(make: Any, variant: str, tmp_path: Path, log: list[str]) -> None:
    ours, wanted, done = merged_both_ways(
        make(), tmp_path, config(variant, kinds="conv", target_names=".", **RANK[variant])
    )
    same_weights(ours, wanted)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) == done.layers * (2 if variant == "ia3" else 1)
    assert all(before[key].ndim > 2 or key.endswith("bias") for key in changed)
    assert not any("another weight" in line for line in log)


RANK: dict[str, dict[str, Any]] = {"lora": {"r": 2}, "dora": {"r": 2}, "ia3": {}, "ia3_ff": {}}


def siglip() -> Any:
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**fields, image_size=8, patch_size=4))


def mamba() -> Any:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=96, state_size=4, time_step_rank=4)
    )


@pytest.mark.parametrize("variant", ["lora", "dora", "ia3", "ia3_ff"])
@pytest.mark.parametrize(
    ("make", "names"), [(siglip, r"head\.attention\.(in_proj_weight|out_proj)$"), (mamba, r"dt_proj$|A_log$")]
)
def test_a_weight_whose_layer_is_not_called_keeps_its_bias(make: Any, names: str, variant: str, tmp_path: Path) -> None:
    cfg = config(variant, kinds=("linear", "matrix"), target_names=names, **RANK[variant])
    ours, wanted, done = merged_both_ways(make(), tmp_path, cfg)
    same_weights(ours, wanted)
    assert done.tensors == done.layers == 2


# ---- embeddings ----------------------------------------------------------------------------------


EMBEDDING: dict[str, Any] = {"kinds": "embedding", "target_names": r"embed_tokens$"}


@pytest.mark.parametrize("variant", ["lora", "dora", "ia3"])
def test_an_embedding_with_a_head_of_its_own(variant: str, tmp_path: Path, log: list[str]) -> None:
    cfg = config(variant, **EMBEDDING, **RANK[variant])
    ours, wanted, done = merged_both_ways(tiny_llama(), tmp_path, cfg)
    same_weights(ours, wanted)
    before = load_file(tmp_path / "base" / "model.safetensors")
    assert not torch.equal(ours.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    assert torch.equal(ours.lm_head.weight, before["lm_head.weight"])
    assert done.tensors == 1
    assert not any("another weight" in line for line in log)


@pytest.mark.parametrize("names", [r"embed_tokens$", r"lm_head$", r"embed_tokens$|lm_head$"])
def test_a_tied_embedding_is_written_untied_or_refused(names: str, tmp_path: Path) -> None:
    folder_of(tiny_llama(tie_word_embeddings=True), tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    perturb(ll.attach(model, config("lora", kinds=("embedding", "linear"), target_names=names, r=2)))
    ll.save(model, tmp_path / "a.safetensors")
    with torch.no_grad():
        attached = model(input_ids=IDS).logits
    message = r"its weight is also (lm_head|model\.embed_tokens)\.weight, which would change with it\n  use untie=True"
    with pytest.raises(ll.TargetError, match=message):
        merge(tmp_path)
    merge(tmp_path, untie=True)
    out = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    before = load_file(tmp_path / "base" / "model.safetensors")
    assert "lm_head.weight" not in before
    for layer, name in ((out.model.embed_tokens, "embed_tokens"), (out.lm_head, "lm_head")):
        assert torch.equal(layer.weight, before["model.embed_tokens.weight"]) == (name not in names)
    with torch.no_grad():
        torch.testing.assert_close(out(input_ids=IDS).logits, attached, rtol=0, atol=1e-5)


def merged_as_attached(cls: Any, folder: Path) -> Any:
    """The base in this folder with one adapter for its embedding and its head, merged on disk and compared."""
    model = cls.from_pretrained(folder / "base").eval()
    perturb(ll.attach(model, config("lora", r=2, tied_weights="together", **EMBEDDING)))
    ll.save(model, folder / "a.safetensors")
    merge(folder)
    out = cls.from_pretrained(folder / "out").eval()
    with torch.no_grad():
        logits, attached = (each(input_ids=IDS).logits for each in (out, model))
    torch.testing.assert_close(logits, attached, rtol=0, atol=1e-5)
    return out


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice in the file"])
def test_what_shares_an_adapter_stays_tied(twice: bool, tmp_path: Path) -> None:
    folder_of(tiny_llama(tie_word_embeddings=True), tmp_path / "base")
    if twice:
        tensors = load_file(file := tmp_path / "base" / "model.safetensors")
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    out = merged_as_attached(transformers.LlamaForCausalLM, tmp_path)
    if not twice:
        assert out.lm_head.weight is out.model.embed_tokens.weight


def test_what_shares_an_adapter_is_found_by_the_files_keys(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = transformers.LlamaConfig(**sizes, vocab_size=96, pad_token_id=0)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    fields: dict[str, Any] = {"text_config": text, "vision_config": vision, "image_token_index": 95}
    whole = transformers.LlavaConfig(**fields, tie_word_embeddings=True)
    folder_of(transformers.LlavaForConditionalGeneration(whole).eval(), tmp_path / "base")
    tensors = load_file(file := tmp_path / "base" / "model.safetensors")
    embedding = next(key for key in tensors if key.endswith("embed_tokens.weight"))
    save_file({**tensors, "language_model.lm_head.weight": tensors[embedding].clone()}, file, {"format": "pt"})
    merged_as_attached(transformers.LlavaForConditionalGeneration, tmp_path)


def test_what_shares_an_adapter_wants_a_base_that_is_tied(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    perturb(ll.attach(model, config("lora", r=2, tied_weights="together", **EMBEDDING)))
    ll.save(model, tmp_path / "a.safetensors")
    untied = tiny_llama()
    untied.load_state_dict({key: t for key, t in model.state_dict().items() if "lora_" not in key})
    folder_of(untied, tmp_path / "base")
    with pytest.raises(ll.TargetError, match=r"all that share the weight of model\.embed_tokens: in .* nothing does"):
        merge(tmp_path)
    with pytest.raises(ll.TargetError, match=r"no other module holds the weight of model\.embed_tokens"):
        ll.load(untied, tmp_path / "a.safetensors")


def test_an_embedding_needs_the_config_of_its_base(tmp_path: Path) -> None:
    folder_of(made := tiny_llama(), tmp_path / "base")
    ll.attach(made, config("lora", **EMBEDDING, r=2))
    ll.save(made, tmp_path / "a.safetensors")
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(ll.CheckpointError, match=r"an adapter on an embedding needs the config\.json of the base"):
        merge(tmp_path)


# ---- 16 bits, the command ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "cfg"),
    [
        (lambda: moe("qwen3", torch.bfloat16), config("lora", **EXPERTS)),
        (lambda: moe("gpt_oss", torch.bfloat16), config("dora", **EXPERTS)),
        (lambda: tiny_llama(torch.bfloat16), config("lora", **EMBEDDING, r=2)),
        (lambda: convnext().bfloat16(), config("lora", kinds="conv", target_names=".", r=2)),
    ],
)
def test_in_bfloat16_it_is_one_rounding(make: Any, cfg: Any, tmp_path: Path) -> None:
    ours, wanted, _ = merged_both_ways(make(), tmp_path, cfg)
    assert ours.dtype == torch.bfloat16
    same_weights(ours, wanted)


@pytest.mark.parametrize(
    ("make", "cfg"),
    [
        (lambda: moe("mixtral"), config("lora", **EXPERTS)),
        (lambda: moe("mixtral"), config("dora", **EXPERTS)),
        (convnext, config("ia3", kinds="conv", target_names=".")),
        (tiny_llama, config("lora", **EMBEDDING, r=2)),
    ],
)
def test_the_command_merges_and_inspects(make: Any, cfg: Any, tmp_path: Path) -> None:
    folder_of(made := make(), tmp_path / "base")
    model = type(made).from_pretrained(tmp_path / "base")
    perturb(adapter := ll.attach(model, cfg))
    ll.save(model, tmp_path / "a.safetensors")
    before = {path: target.weight() for path, target in layers_at(model, adapter).items()}
    before = {path: weight.clone() for path, weight in before.items()}
    report = inspect(tmp_path / "a.safetensors", tmp_path / "base")
    ll.merge(model, keep=False)
    done = CliRunner().invoke(app, ["merge", *(str(tmp_path / name) for name in ("base", "a.safetensors", "out"))])
    assert done.exit_code == 0, done.output
    same_weights(type(made).from_pretrained(tmp_path / "out"), model)
    after = find_layers(dict(model.named_modules()))
    norms = {path: float((after[path].weight() - weight).detach().norm()) for path, weight in before.items()}
    assert {layer.path: layer.norm for layer in report.layers} == pytest.approx(norms, rel=1e-4)


def layers_at(model: Any, adapter: ll.Adapter) -> dict[str, BaseLayer]:
    layers = find_layers(dict(model.named_modules()))
    return {path: layers[path] for path in adapter.targets}
