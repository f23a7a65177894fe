"""VeRA's folders: what its layers share is in the file, or is drawn again, bit for bit; and what strangers write."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import IDS, config, tiny_llama
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.cli.report import inspect

NAMES = ["q_proj", "k_proj", "down_proj"]
A, B = "base_model.vera_A", "base_model.vera_B"
PATH = "base_model.model.model.layers.0.mlp.down_proj.vera_lambda_"
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:Specified to not {verb} vera:UserWarning") for verb in ("save", "load")
]


def folder_of(path: Path, **fields: Any) -> Any:
    """PEFT's VeRA away from its start, and its folder."""
    theirs = peft.get_peft_model(tiny_llama(), peft.VeraConfig(r=6, target_modules=NAMES, **fields)).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for tensor in theirs.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor) * 0.3)
    theirs.save_pretrained(str(path))
    return theirs


def edited(path: Path, tensors: dict[str, Tensor] | None = None, drop: str = "", **settings: Any) -> None:
    file, stored = path / "adapter_config.json", load_file(path / "adapter_model.safetensors")
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    left = {key: tensor for key, tensor in stored.items() if not drop or not key.startswith(drop)}
    save_file(left | (tensors or {}), path / "adapter_model.safetensors")


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS).logits
    return out


@pytest.mark.parametrize("is_saved", [True, False])
def test_what_is_shared_is_theirs_bit_for_bit(is_saved: bool, tmp_path: Path) -> None:
    theirs = folder_of(tmp_path, save_projection=is_saved, projection_prng_key=11)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.rand(7)  # other draws before it change nothing
    try:
        model = tiny_llama()
        adapter = ll.load_peft(model, tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(model.lora_shared.A, theirs.base_model.vera_A["default"])
    assert torch.equal(model.lora_shared.B, theirs.base_model.vera_B["default"])
    assert (adapter.config.seed, adapter.config.save_projection, adapter.config.r) == (11, is_saved, 6)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_saved", [True, False])
def test_what_is_written_is_what_was_read(is_saved: bool, tmp_path: Path) -> None:
    folder_of(tmp_path / "theirs", save_projection=is_saved, projection_prng_key=11, vera_dropout=0.1, d_initial=0.2)
    model = tiny_llama()
    ll.load_peft(model, tmp_path / "theirs")
    ll.save_peft(model, tmp_path / "ours")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
    settings = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours")]
    for field in ("r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "fan_in_fan_out"):
        assert settings[0][field] == settings[1][field], field
    ll.save(model, tmp_path / "a.safetensors")
    assert (A.replace("base_model.vera_", "lora_shared.") in load_file(tmp_path / "a.safetensors")) == is_saved


def test_projections_in_16_bits_are_written_as_peft_would_draw_others(tmp_path: Path) -> None:
    model = tiny_llama()
    ll.attach(model, config("vera", r=6, target_names=NAMES, dtype=torch.bfloat16))
    with torch.no_grad():
        for key, tensor in ll.adapters(model)["default"].named_tensors():
            if key.endswith("lora_b"):
                tensor.normal_()
    ll.save_peft(model, tmp_path)
    assert A in load_file(tmp_path / "adapter_model.safetensors")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)


def test_16_bit_vectors_are_read_with_projections_as_they_are_drawn(tmp_path: Path) -> None:
    folder_of(tmp_path, save_projection=False)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    edited(tmp_path, {key: tensor.bfloat16() for key, tensor in stored.items()})
    model = tiny_llama()
    assert ll.load_peft(model, tmp_path).config.dtype == torch.float32
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


def test_a_state_dict_of_peft_is_read_with_a_config(tmp_path: Path) -> None:
    theirs = folder_of(tmp_path, projection_prng_key=3)
    adapted = {key: t.clone() for key, t in theirs.state_dict().items() if "vera" in key}
    # In memory each layer names what all of them share, too.
    once = {key: t for key, t in adapted.items() if ".vera_A." not in key.removeprefix("base_model.vera_A")}
    once = {key: t for key, t in once.items() if not key.startswith("base_model.model") or "lambda" in key}
    save_file(once, tmp_path / "raw.safetensors")
    model = tiny_llama()
    ll.load(model, tmp_path / "raw.safetensors", cfg=config("vera", r=6, seed=3, save_projection=True))
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


def test_inspect_knows_the_layers_of_one_with_its_projections(tmp_path: Path) -> None:
    folder_of(tmp_path / "with")
    folder_of(tmp_path / "without", save_projection=False)
    tiny_llama().save_pretrained(tmp_path / "base")
    report = inspect(tmp_path / "with", tmp_path / "base")
    assert (report.variant, report.tensors, len(report.layers)) == ("vera", 14, 6)
    assert all(layer.norm is not None and layer.norm > 0 for layer in report.layers)
    with pytest.raises(ll.CheckpointError, match=r"its tensors don.t tell the sizes of its layers"):
        inspect(tmp_path / "without")


@pytest.mark.parametrize(
    ("is_saved", "change", "message"),
    [
        (True, {"drop": A}, r"1 missing keys(.|\n)*lora_shared\.A"),
        (True, {"save_projection": False}, r"2 unexpected keys(.|\n)*lora_shared\.A"),
        (False, {"save_projection": True}, r"2 missing keys"),
        (True, {"save_projection": 1}, r"save_projection=1: wanted true or false"),
        (True, {"tensors": {A: torch.zeros(6, 64)}}, r"wrong shapes(.|\n)*lora_shared\.A \(6, 64\), wanted \(6, 128\)"),
        (True, {"tensors": {A: torch.zeros(())}}, r"wrong shapes"),
        (True, {"tensors": {B: torch.zeros(9, 6)}}, r"wrong shapes"),
        (True, {"tensors": {B: torch.full((64, 6), torch.nan)}}, r"1 tensors hold NaN.*vera_B"),
        (True, {"tensors": {B: torch.zeros(64, 6, dtype=torch.int32)}}, r"vera_B is stored as I32; wanted floats"),
        (True, {"tensors": {"base_model.vera_C": torch.zeros(1)}}, r"1 of its 15 tensors have no place"),
        (True, {"tensors": {f"{PATH}d": torch.zeros(7)}}, r"wrong shapes"),
        (True, {"r": 7}, r"wrong shapes"),
        (True, {"r": "x"}, r"r='x': wanted an integer of at least 0"),
        (True, {"r": 6.0}, r"r=6\.0: wanted an integer"),
        (False, {"r": 0}, r"VeRAConfig\(r=0\): wanted a rank of at least 1"),
        (False, {"r": 10**12}, r"wrong shapes"),
        (True, {"d_initial": "x"}, r"d_initial has x: wanted a finite number"),
        (True, {"vera_dropout": 2}, r"VeRAConfig\(dropout=2\.0\)"),
        (False, {"projection_prng_key": -1}, r"projection_prng_key=-1: wanted an integer"),
        (False, {"projection_prng_key": 2**63}, r"VeRAConfig\(seed="),
        (True, {"a_field_of_tomorrow": 3}, r"a_field_of_tomorrow=3 can't be kept"),
    ],
)
def test_what_a_folder_can_not_be(is_saved: bool, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder_of(tmp_path, save_projection=is_saved)
    edited(tmp_path, **change)
    model = tiny_llama()
    before = logits(model)
    with pytest.raises(ll.CheckpointError, match=message):
        ll.load_peft(model, tmp_path)
    assert torch.equal(logits(model), before)
    assert not hasattr(model, "lora_shared")


def test_a_small_file_does_not_ask_for_much_memory(tmp_path: Path) -> None:
    """λ_d of 8 MB would have A of 1 GiB drawn."""
    folder_of(tmp_path, save_projection=False)
    stored, r = load_file(tmp_path / "adapter_model.safetensors"), 1 << 22
    tensors = {key: torch.zeros(r, dtype=torch.bfloat16) for key in stored if key.endswith("_d")}
    edited(tmp_path, tensors, r=r)
    with pytest.raises(ll.CheckpointError, match=r"lora_shared\.A isn't in the file and would be made again"):
        ll.load_peft(tiny_llama(), tmp_path)


def test_where_peft_has_none(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU())
    ll.attach(model, ll.VeRAConfig(r=3, kinds="conv", target_names="0"))
    with pytest.raises(ll.CheckpointError, match="0: PEFT has no vera on it"):
        ll.save_peft(model, tmp_path / "ours")
    linear = nn.Sequential(nn.Linear(12, 6), nn.ReLU())
    peft.get_peft_model(linear, peft.VeraConfig(r=3, target_modules=["0"])).save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(ll.CheckpointError, match="0: PEFT has no vera on it"):
        ll.load_peft(nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU()), tmp_path / "theirs")


def test_dropout_by_layer_is_not_written(tmp_path: Path) -> None:
    model = tiny_llama()
    ll.attach(model, config("vera", r=3, per_layer={"q_proj": {"dropout": 0.5}}))
    with pytest.raises(ll.CheckpointError, match="dropout differs by layer"):
        ll.save_peft(model, tmp_path)
