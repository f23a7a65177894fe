"""Folders whose tensors hold rows of several layers, or a layer in parts, and weights that several layers share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as installed
from models import IDS, config
from safetensors.torch import load_file, save_file
from test_on_disk import folder_of, same_weights
from transformers import BitsAndBytesConfig

import lora_lite as ll
from lora_lite.base.layer import layer_of
from lora_lite.cli.report import inspect

transformers: Any = installed  # its classes take more than their signatures say
SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"pad_token_id": 0}
TEXT: dict[str, Any] = SIZES | {"head_dim": 16, "num_key_value_heads": 4, "intermediate_size": 48}


def nomic_bert() -> Any:
    return transformers.NomicBertForMaskedLM(transformers.NomicBertConfig(**SIZES, intermediate_size=96))


def hrm_text() -> Any:
    fields = SIZES | {
        "num_hidden_layers": 4,
        "num_layers_per_stack": 1,
        "L_bp_cycles": [1],
        "H_cycles": 1,
        "L_cycles": 1,
    }
    return transformers.HrmTextForCausalLM(
        transformers.HrmTextConfig(**fields, head_dim=16, intermediate_size=48, tie_word_embeddings=False)
    )


def sapiens2() -> Any:
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    fields |= {"image_size": 8, "patch_size": 4, "num_register_tokens": 2, "use_gated_mlp": True, "mlp_bias": True}
    return transformers.Sapiens2Backbone(
        transformers.Sapiens2Config(**fields, num_key_value_heads_per_layer=[4, 4], num_key_value_attention_heads=4)
    )


def inkling() -> Any:
    text = TEXT | {"d_rel": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 16}
    text |= {"layer_types": ["hybrid_sliding", "hybrid"], "mlp_layer_types": ["dense", "sparse"], "n_routed_experts": 4}
    text |= {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_shared_experts": 2, "unpadded_vocab_size": None}
    audio = {"mel_vocab_size": 8, "n_mel_bins": 4, "text_hidden_size": 64}
    vision = {"hidden_size": 64, "n_layers": 2, "num_attention_heads": 4, "patch_size": 5, "text_hidden_size": 64}
    return transformers.InklingForConditionalGeneration(
        transformers.InklingConfig(text_config=text, audio_config=audio, vision_config=vision, num_hidden_layers=2)
    )


def minimax_m3() -> Any:
    text = TEXT | {"dense_intermediate_size": 80, "shared_intermediate_size": 32, "num_local_experts": 4}
    text |= {"layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse"]}
    text |= {"index_n_heads": 2, "index_head_dim": 16, "num_experts_per_tok": 2, "n_shared_experts": 1, "rotary_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 14, "patch_size": 14}
    return transformers.MiniMaxM3SparseForConditionalGeneration(
        transformers.MiniMaxM3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    )


FUSED: dict[Callable[[], Any], tuple[str, str]] = {  # the layers, and a key of the file that holds some of them
    nomic_bert: (r"layers\.\d\.self_attn\.[qv]_proj$", ".Wqkv.weight"),
    hrm_text: (r"(q|gate)_proj$", ".gqkv_proj.weight"),
    sapiens2: (r"mlp\.(gate|up)_proj$", ".w12.weight"),
    inkling: (r"layers\.0\.mlp\.(gate|up)_proj$", ".w13_dn.weight"),  # its rows take turns
    minimax_m3: (r"layers\.0\.mlp\.gate_up_proj$", "layers.0.mlp.gate_proj.weight"),  # one layer in two tensors
}
"""Models whose files hold the layers' weights in other tensors than the model has."""


def adapted(model: Any, folder: Path, variant: str, targets: str) -> Any:
    adapter = ll.attach(model, config(variant, target_names=targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    ll.save(model, folder / "a.safetensors")
    return adapter


def merge(folder: Path, **options: Any) -> ll.Merged:
    return ll.merge_checkpoint(folder / "base", folder / "a.safetensors", folder / "out", **options)


@pytest.mark.parametrize("variant", ["lora", "dora", "ia3", "ia3_ff"])
@pytest.mark.parametrize("make", FUSED)
def test_rows_of_a_fused_tensor_are_found(make: Any, variant: str, tmp_path: Path, log: list[str]) -> None:
    cls, (targets, fused) = type(made := make()), FUSED[make]
    folder_of(made, tmp_path / "base")
    before = load_file(tmp_path / "base" / "model.safetensors")
    assert any(key.endswith(fused) for key in before)
    model = cls.from_pretrained(tmp_path / "base").eval()
    adapter = adapted(model, tmp_path, variant, targets)
    assert not any(f"{path}.weight" in before for path in adapter.targets)
    ll.merge(model, keep=False, never_ran="merge")
    merge(tmp_path)
    same_weights(cls.from_pretrained(tmp_path / "out"), model)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert not any("another weight" in line for line in log)


def test_another_base_is_told_by_its_rows(tmp_path: Path, log: list[str]) -> None:
    folder_of(nomic_bert(), tmp_path / "base")
    model = transformers.NomicBertForMaskedLM.from_pretrained(tmp_path / "base")
    adapted(model, tmp_path, "lora", r"v_proj$")
    file = tmp_path / "base" / "model.safetensors"
    for part, told in (("q", False), ("v", True)):
        tensors = load_file(file)
        for key in [key for key in tensors if "Wqkv" in key]:
            tensors[key].chunk(3)["qkv".index(part)].add_(1.0)
        save_file(tensors, file, {"format": "pt"})
        merge(tmp_path)
        assert any("another weight" in line for line in log) == told


def test_a_fused_tensor_of_another_size(tmp_path: Path) -> None:
    folder_of(nomic_bert(), tmp_path / "base")
    adapted(transformers.NomicBertForMaskedLM.from_pretrained(tmp_path / "base"), tmp_path, "lora", r"v_proj$")
    file = tmp_path / "base" / "model.safetensors"
    save_file({k: t[:96].clone() if "Wqkv" in k else t for k, t in load_file(file).items()}, file, {"format": "pt"})
    message = r"self_attn.v_proj.weight is 32 rows of .*Wqkv.weight \(64,\); wanted \(64, 64\)"
    with pytest.raises(ll.CheckpointError, match=message):
        merge(tmp_path)


@pytest.mark.parametrize("make", [nomic_bert, minimax_m3])
def test_norms_are_of_the_rows(make: Any, tmp_path: Path) -> None:
    cls, (targets, _) = type(made := make()), FUSED[make]
    folder_of(made, tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base")
    before = {path: module.weight.clone() for path, module in model.named_modules() if path.endswith("_proj")}
    paths = list(adapted(model, tmp_path, "dora", targets).targets)
    report = inspect(tmp_path / "a.safetensors", tmp_path / "base")
    ll.merge(model, keep=False, never_ran="merge")
    norms = {path: float((model.get_submodule(path).weight - before[path]).detach().norm()) for path in paths}
    assert {layer.path: layer.norm for layer in report.layers} == pytest.approx(norms, rel=1e-4)


def test_as_trained_quantises_each_layer_by_itself(tmp_path: Path) -> None:
    """q_proj is adapted; k_proj and v_proj, in the same tensor, go through the quantiser alone."""
    folder_of(nomic_bert(), tmp_path / "base")
    fourbit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    cls = transformers.NomicBertForMaskedLM
    model = cls.from_pretrained(tmp_path / "base", quantization_config=fourbit, dtype=torch.float32)
    adapted(model, tmp_path, "lora", r"layers\.0\.self_attn\.q_proj$")
    ll.merge(model, keep=False, quantized="dequantize", never_ran="merge")
    merge(tmp_path, base_weights="as_trained")
    out = cls.from_pretrained(tmp_path / "out")
    attention = "nomic_bert.layers.0.self_attn"
    assert torch.equal(
        out.get_submodule(f"{attention}.q_proj").weight, model.get_submodule(f"{attention}.q_proj").weight
    )
    for name in ("k_proj", "v_proj", "o_proj"):
        packed: Any = layer_of(model.get_submodule(f"{attention}.{name}"), name)
        assert torch.equal(out.get_submodule(f"{attention}.{name}").weight, packed.dense_weight())


def test_a_matrix_that_is_a_bare_parameter(tmp_path: Path) -> None:
    """nn.MultiheadAttention's packed projections, in SigLIP's pooling head."""
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    cls = transformers.SiglipVisionModel
    folder_of(cls(transformers.SiglipVisionConfig(**fields, image_size=8, patch_size=4)), tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base")
    assert any(path.endswith(".in_proj_weight") for path in adapted(model, tmp_path, "lora", r"in_proj|fc1").targets)
    ll.merge(model, keep=False, never_ran="merge")
    merge(tmp_path)
    same_weights(cls.from_pretrained(tmp_path / "out"), model)


# ---- weights that several layers share ----------------------------------------------------------


def zamba(folder: Path) -> Any:
    """Two layers that share a transformer block, which the file holds once; the head is tied as well."""
    fields = SIZES | {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3}
    fields |= {"attention_head_dim": 32, "num_key_value_heads": 4, "intermediate_size": 48, "mamba_dt_rank": 8}
    torch.manual_seed(0)
    config = transformers.ZambaConfig(**fields, use_mamba_kernels=False, initializer_range=0.2)
    transformers.ZambaForCausalLM(config).save_pretrained(folder)
    return transformers.ZambaForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


@pytest.mark.parametrize("layers", ["1", "2", "[12]"])
def test_a_shared_weight_is_written_untied_or_refused(layers: str, tmp_path: Path) -> None:
    model = zamba(tmp_path / "base")
    assert model.model.layers[1].shared_transf.self_attn.q_proj.weight is (
        model.model.layers[2].shared_transf.self_attn.q_proj.weight
    )
    base = logits(model)
    adapted(model, tmp_path, "lora", rf"layers\.{layers}\.shared_transf.*(q_proj|up_proj)$")
    attached = logits(model)
    assert (attached - base).abs().max() > 1e-2
    message = (
        r"model\.layers\.[12]\.shared_transf\.self_attn\.q_proj: its weight is also model\.layers\.[12]\.shared_transf"
        r"\.self_attn\.q_proj\.weight, which would change with it\n  use untie=True"
    )
    with pytest.raises(ll.TargetError, match=message):
        merge(tmp_path)
    merge(tmp_path, untie=True)
    out = transformers.ZambaForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(out), attached, rtol=0, atol=2e-4)
    # The other shared weights are stored once: with the config's flag off, they would not be found.
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_a_head_is_untied_where_other_weights_stay_shared(tmp_path: Path) -> None:
    model = zamba(tmp_path / "base")
    adapted(model, tmp_path, "lora", r"lm_head$|layers\.0\.mamba\.out_proj$")
    attached = logits(model)
    merge(tmp_path, untie=True)
    out = transformers.ZambaForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(out), attached, rtol=0, atol=2e-4)
