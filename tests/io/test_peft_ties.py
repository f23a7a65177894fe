"""PEFT's ensure_weight_tying: one adapter for an embedding and a head of one weight."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import perturb, tiny_llama
from safetensors.torch import load_file, save_file

import lora_lite as ll

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own words on tied layers
IDS = torch.arange(1, 13).reshape(2, 6)


def base() -> Any:
    return tiny_llama(tie_word_embeddings=True)


def made_by_peft(folder: Path, targets: list[str], **settings: Any) -> torch.Tensor:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, ensure_weight_tying=True, **settings)
    model = base()
    if "use_dora" in settings:
        model.lm_head.weight.data[0] = 0.1  # a row of zeros has no norm to divide by
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name and "lm_head" not in name:  # the head's lie in the memory of the embedding's
                tensor.add_(torch.randn_like(tensor) * 0.2)
    model.save_pretrained(folder)
    return model(input_ids=IDS).logits.detach()


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "lm_head", "q_proj"]])
def test_a_folder_of_peft_goes_both_ways(targets: list[str], tmp_path: Path) -> None:
    wanted = made_by_peft(tmp_path / "theirs", targets)
    model = base()
    adapter = ll.load_peft(model, tmp_path / "theirs")
    assert adapter.config.tied_weights == "together"
    assert "lm_head" not in adapter.targets
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=2e-5, rtol=1e-5)
    ll.save_peft(model, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert ours.keys() == {key for key in theirs if "base_layer" not in key}
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, wanted, atol=2e-5, rtol=1e-5)
    ll.save_peft(model, tmp_path / "of_rank_3", rank=3)
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "of_rank_3").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_pattern": {"embed_tokens": 24, "lm_head": 24}},
        {"rank_pattern": {"embed_tokens": 12}, "alpha_pattern": {"model.embed_tokens": 24}},
        {"rank_pattern": {"embed_tokens": 12}, "alpha_pattern": {"embed_tokens": 12}, "use_rslora": True},
    ],
)
def test_a_folder_of_peft_with_one_scaling_by_its_patterns_loads(settings: dict[str, Any], tmp_path: Path) -> None:
    wanted = made_by_peft(tmp_path, ["embed_tokens", "q_proj"], **settings)
    ll.load_peft(model := base(), tmp_path)
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)


def test_what_is_not_the_mirror_is_refused(tmp_path: Path) -> None:
    made_by_peft(tmp_path, ["embed_tokens"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    a, b, embedding = "lm_head.lora_A.weight", "lm_head.lora_B.weight", "model.embed_tokens.lora_embedding_A"
    moved = tensors[f"base_model.model.{a}"] + 1
    for name, wrong in ((a, moved), (b, torch.zeros(3)), (embedding, torch.zeros(3)), (embedding, torch.zeros(()))):
        save_file({**tensors, f"base_model.model.{name}": wrong}, file)
        with pytest.raises(ll.CheckpointError, match=r"lm_head has another adapter than model\.embed_tokens"):
            ll.load_peft(base(), tmp_path)


@pytest.mark.parametrize("r", [0, -1, True, "3", None, 10**400, {}], ids=lambda r: repr(r)[:4])
def test_a_rank_that_is_none_is_an_error_in_words(r: Any, tmp_path: Path) -> None:
    made_by_peft(tmp_path, ["embed_tokens"])
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rank_pattern": {"lm_head": r}}))
    with pytest.raises(ll.CheckpointError, match=r"r has .*: wanted a finite number|lm_head has r="):
        ll.load_peft(base(), tmp_path)


@pytest.mark.parametrize("fields", [{"alpha": 32.0}, {"r": 5}, {"r": 5, "alpha": 1.5}, {"r": 12, "alpha": 24.0}])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_embedding_with_settings_of_its_own_is_read_by_peft(
    fields: dict[str, Any], rslora: bool, tmp_path: Path
) -> None:
    model = base()
    cfg = ll.LoRAConfig(
        r=3,
        alpha=6.0,
        rslora=rslora,
        kinds=["embedding", "linear"],
        target_names=["embed_tokens", "q_proj", "v_proj"],
        tied_weights="together",
        per_layer={"embed_tokens": fields},
    )
    perturb(ll.attach(model, cfg), 0.2)
    wanted = model(input_ids=IDS).logits
    ll.save_peft(model, tmp_path / "folder")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "folder").eval()
    torch.testing.assert_close(theirs(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)
    ll.load_peft(again := base(), tmp_path / "folder")
    assert torch.equal(again(input_ids=IDS).logits, wanted)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha_pattern": {"embed_tokens": 24}}, r"scales lm_head by 2, and model\.embed_tokens by 8"),
        ({"alpha_pattern": {"lm_head": 24}}, r"scales lm_head by 8, and model\.embed_tokens by 2"),
        ({"rank_pattern": {"embed_tokens": 12}}, r"scales lm_head by 2, and model\.embed_tokens by 0\.5"),
        (
            {"rank_pattern": {"embed_tokens": 12}, "use_rslora": True},
            r"lm_head by 3\.4641, and .*embed_tokens by 1\.7321",
        ),
        ({"use_dora": True}, r"\.lora_magnitude_vector is neither of the two factors that it ties"),
    ],
)
def test_what_peft_ties_by_halves_is_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    made_by_peft(tmp_path / "peft", ["embed_tokens", "q_proj"], **settings)
    with pytest.raises(ll.CheckpointError, match=said):
        ll.load_peft(base(), tmp_path / "peft")
    base().save_pretrained(tmp_path / "base")
    with pytest.raises(ll.CheckpointError, match=said):
        ll.merge_checkpoint(tmp_path / "base", tmp_path / "peft", tmp_path / "out")


def test_what_peft_does_not_tie_is_not_written(tmp_path: Path) -> None:
    model = base()
    ll.attach(model, ll.DoRAConfig(r=3, kinds=["embedding"], target_names=["embed_tokens"], tied_weights="together"))
    with pytest.raises(ll.CheckpointError, match="PEFT ties a"):
        ll.save_peft(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_where_nothing_is_tied_peft_takes_the_embedding_alone(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=["embed_tokens"], ensure_weight_tying=True, init_lora_weights=False)
    theirs = peft.get_peft_model(tiny_llama(), config).eval()
    theirs.save_pretrained(tmp_path)
    model = tiny_llama()
    assert ll.load_peft(model, tmp_path).config.tied_weights == "apart"
    torch.testing.assert_close(model(input_ids=IDS).logits, theirs(input_ids=IDS).logits, atol=2e-5, rtol=1e-5)
