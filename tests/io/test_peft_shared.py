"""PEFT's folders of methods whose layers share tensors: merged on disk, written from shared ones, from strangers."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import IDS, perturb, tiny_llama
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.cli.report import inspect

NAMES = ["q_proj", "k_proj", "down_proj"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CONFIGS: dict[str, Any] = {
    "tinylora": lambda: peft.TinyLoraConfig(target_modules=NAMES, u=4, weight_tying=0.5),
    "tinylora_drawn": lambda: peft.TinyLoraConfig(target_modules=NAMES, u=4, save_projection=False),
    "unilora": lambda: peft.UniLoraConfig(target_modules=NAMES, theta_d_length=50),
    "vblora_top": lambda: peft.VBLoRAConfig(
        target_modules=NAMES, vector_length=8, num_vectors=9, save_only_topk_weights=True
    ),
    "randlora": lambda: peft.RandLoraConfig(target_modules=NAMES, r=5, randlora_alpha=5),
}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits
    return out


def folder_of(path: Path, cfg: Any, blocks: int = 2) -> Any:
    """PEFT's adapter away from its start, and its folder."""
    theirs = peft.get_peft_model(tiny_llama(num_hidden_layers=blocks), cfg).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for tensor in theirs.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor) * 0.3)
    theirs.save_pretrained(str(path))
    return theirs


def edited(path: Path, tensors: dict[str, Tensor] | None = None, **settings: Any) -> None:
    file, stored = path / "adapter_config.json", load_file(path / "adapter_model.safetensors")
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    save_file(stored | (tensors or {}), path / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["tinylora_drawn", "unilora", "vblora_top", "randlora"])
def test_merged_on_disk_it_is_pefts_model(name: str, tmp_path: Path) -> None:
    theirs, base = folder_of(tmp_path / "peft", CONFIGS[name](), blocks=1), tiny_llama(num_hidden_layers=1)
    base.save_pretrained(tmp_path / "base")
    ll.merge_checkpoint(tmp_path / "base", tmp_path / "peft", tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(theirs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(merged), logits(base), atol=1e-3)


def test_a_lily_cant_be_merged_on_disk(tmp_path: Path) -> None:
    folder_of(tmp_path / "peft", peft.LilyConfig(target_modules=NAMES, r=3))
    tiny_llama().save_pretrained(tmp_path / "base")
    with pytest.raises(ll.VariantError, match="'lily' is not affine in x"):
        ll.merge_checkpoint(tmp_path / "base", tmp_path / "peft", tmp_path / "merged")


def test_an_adapter_in_the_order_of_a_model_is_refused_without_one(tmp_path: Path) -> None:
    folder_of(tmp_path, CONFIGS["tinylora"]())
    with pytest.raises(ll.CheckpointError, match="the order of its model's layers is a part of it"):
        inspect(tmp_path)


# ---- Lily -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
def test_a_lily_that_shares_is_written_as_pefts(stride: int, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=3)
    perturb(ll.attach(model, ll.LilyConfig(target_names=NAMES, r=3, stride_A=stride)), 0.3)
    ll.save_peft(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(NAMES)
    theirs: Any = peft.PeftModel.from_pretrained(tiny_llama(num_hidden_layers=3), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    layers = theirs.base_model.model.model.layers
    assert layers[0].mlp.down_proj.lily_B["default"] is layers[2].mlp.down_proj.lily_B["default"]


def test_a_lily_that_shares_nothing_is_written_with_full_paths(tmp_path: Path) -> None:
    model = tiny_llama()
    perturb(ll.attach(model, ll.LilyConfig(target_names=NAMES, r=3, share=False)), 0.3)
    ll.save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)


def test_a_lily_whose_layers_peft_would_tie_is_not_written(tmp_path: Path) -> None:
    """Of 20 names it takes the ends: its layers would have the last one's A and B."""
    model = tiny_llama(num_hidden_layers=3)
    perturb(ll.attach(model, ll.LilyConfig(target_names="_proj", r=3, share=False)), 0.3)
    with pytest.raises(ll.CheckpointError, match="of one name and shape share A and B, and here they differ"):
        ll.save_peft(model, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- RandLoRA, VB-LoRA ------------------------------------------------------------------------------


def test_bases_that_peft_would_draw_otherwise_are_not_left_out(tmp_path: Path) -> None:
    model = tiny_llama()
    ll.attach(model, ll.RandLoRAConfig(target_names=NAMES, r=5))
    with pytest.raises(ll.CheckpointError, match="draws RandLoRA's bases in the dtype of the machine"):
        ll.save_peft(model, tmp_path)


def test_bases_that_differ_by_layer_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, CONFIGS["randlora"]())
    key = "base_model.model.model.layers.0.mlp.down_proj.randlora_A"
    edited(tmp_path, {key: load_file(tmp_path / "adapter_model.safetensors")[key] + 1})
    with pytest.raises(ll.CheckpointError, match=r"randlora_A and .*randlora_A are one tensor, and differ"):
        ll.load_peft(tiny_llama(), tmp_path)


TOP = "base_model.model.model.layers.0.mlp.down_proj.vblora_logits_A_topk_"


@pytest.mark.parametrize("part", ["indices", "weights"])
def test_top_vectors_that_are_none_are_refused(part: str, tmp_path: Path) -> None:
    folder_of(tmp_path, CONFIGS["vblora_top"]())
    tensor = load_file(tmp_path / "adapter_model.safetensors")[TOP + part]
    edited(tmp_path, {TOP + part: torch.full_like(tensor, 9) if part == "indices" else -tensor})
    with pytest.raises(ll.CheckpointError, match="its top 2 weights and indices are none, of 9 vectors"):
        ll.load_peft(tiny_llama(), tmp_path)


# ---- Uni-LoRA ---------------------------------------------------------------------------------------

INDICES = "base_model.model.model.layers.0.mlp.down_proj.unilora_indices_A"


def unilora(path: Path) -> Tensor:
    folder_of(path, peft.UniLoraConfig(target_modules=NAMES, theta_d_length=50, save_indices=True))
    return load_file(path / "adapter_model.safetensors")[INDICES].clone()


@pytest.mark.parametrize("index", [50, 256, -1])
def test_an_index_out_of_range_is_refused(index: int, tmp_path: Path) -> None:
    indices = unilora(tmp_path)
    indices[0, 0] = index
    edited(tmp_path, {INDICES: indices})
    with pytest.raises(ll.CheckpointError, match="unilora_indices are out of the range of 50 numbers"):
        ll.load_peft(tiny_llama(), tmp_path)


def test_scales_that_differ_at_an_index_are_refused(tmp_path: Path) -> None:
    key, _ = INDICES.replace("indices", "scales"), unilora(tmp_path)
    edited(tmp_path, {key: load_file(tmp_path / "adapter_model.safetensors")[key] * 2})
    with pytest.raises(ll.CheckpointError, match="unilora_scales differ at one index"):
        ll.load_peft(tiny_llama(), tmp_path)


def test_tables_of_floats_are_refused(tmp_path: Path) -> None:
    edited(tmp_path, {INDICES: unilora(tmp_path).float()})
    with pytest.raises(ll.CheckpointError, match="is stored as F32; wanted integers"):
        ll.load_peft(tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": 1 << 40}, "wanted at most"),
        ({"theta_d_length": 0}, "wanted at most"),
        ({"theta_d_length": 1 << 28}, "of its theta"),
        ({"r": 5.5}, "r=5.5: wanted an integer"),
        ({"proj_seed": -1}, "proj_seed=-1: wanted an integer"),
        ({"save_indices": "no"}, "save_indices='no': wanted true or false"),
        ({"target_modules": 7}, "target_modules=7: wanted names"),
        ({"target_modules": "(a|b)*c"}, "is a regex that may take long"),
        ({"target_modules": ["nowhere"]}, "wanted at most"),
        ({"layers_to_transform": [0]}, r"layers_to_transform=\[0\] with indices that the file leaves out"),
    ],
)
def test_what_strangers_write_for_tables_that_arent_there(settings: Any, match: str, tmp_path: Path) -> None:
    folder_of(tmp_path, CONFIGS["unilora"]())
    edited(tmp_path, **settings)
    model = tiny_llama()
    with pytest.raises(ll.CheckpointError, match=match):
        ll.load_peft(model, tmp_path)
    assert not any("lora" in key for key in model.state_dict())


def test_indices_that_are_drawn_are_those_that_peft_saves(tmp_path: Path) -> None:
    models = []
    for name, save_indices in (("with", True), ("without", False)):
        cfg = peft.UniLoraConfig(target_modules=NAMES, theta_d_length=50, save_indices=save_indices)
        folder_of(tmp_path / name, cfg)
        model = tiny_llama()
        ll.load_peft(model, tmp_path / name)
        models.append(dict(ll.adapters(model)["default"].named_tensors()))
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(tensor, models[1][key]) for key, tensor in models[0].items() if "theta" not in key)
    assert any("indices" in key for key in models[0])


def test_indices_of_a_16_bit_base_have_scales_rounded_as_pefts(tmp_path: Path) -> None:
    theirs: Any = peft.get_peft_model(
        tiny_llama(torch.bfloat16), peft.UniLoraConfig(target_modules=NAMES, theta_d_length=50)
    )
    theirs.save_pretrained(str(tmp_path))
    model: nn.Module = tiny_llama(torch.bfloat16)
    ll.load_peft(model, tmp_path)
    layer = theirs.base_model.model.model.layers[1].mlp.down_proj
    wanted = layer.unilora_scales_A["default"].float()
    assert torch.equal(model.lora_shared.norms[layer.unilora_indices_A["default"]], wanted)
