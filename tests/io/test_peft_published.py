"""The kinds of PEFT folder that people publish: each loads with equal outputs and goes back, or says what to do."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as installed
from peft_space import IDS, built, llama, output
from torch import nn

import lora_lite as ll

tf: Any = installed
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
QV = ["q_proj", "v_proj"]


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(**{"target_modules": QV, "r": 3, **fields})


LOAD: dict[str, tuple[str, Any]] = {  # a model, PEFT's config
    "plain": ("llama", lora()),
    "all-linear": ("llama", lora(target_modules="all-linear")),
    "dropout": ("llama", lora(lora_dropout=0.1)),
    "layers_to_transform": ("llama", lora(layers_to_transform=[1])),
    "layers_pattern": ("llama", lora(layers_to_transform=[1], layers_pattern="layers")),
    "a regex of targets": ("llama", lora(target_modules=r".*\.1\..*(q|v)_proj")),
    "exclude_modules": ("llama", lora(exclude_modules=["layers.0.self_attn.q_proj"])),
    "orthogonal": ("llama", lora(init_lora_weights="orthogonal", r=4)),
    "IA3": ("llama", peft.IA3Config(target_modules=[*QV, "down_proj"], feedforward_modules=["down_proj"])),
    "attention of experts": ("mixtral", lora()),
    "rsLoRA with patterns": ("llama", lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})),
    "DoRA": ("llama", lora(use_dora=True)),
    "LoHa": ("llama", peft.LoHaConfig(target_modules=QV)),
    "LoKr": ("llama", peft.LoKrConfig(target_modules=QV)),
    "OFT": ("llama", peft.OFTConfig(target_modules=QV, oft_block_size=4)),
    "sequence classification": ("llama_cls", lora(task_type="SEQ_CLS")),
    "token classification": ("bert_tokens", lora(target_modules=["query"], task_type="TOKEN_CLS")),
    "IA3, sequence classification": (
        "bert_cls",
        peft.IA3Config(target_modules=["key"], feedforward_modules=[], task_type="SEQ_CLS"),
    ),
    "embedding and head": ("llama", lora(modules_to_save=["embed_tokens", "lm_head"])),
    "trainable_token_indices": ("llama", lora(trainable_token_indices=[39, 38])),
    "lora_bias": ("llama_bias", lora(lora_bias=True)),
    "bias=lora_only": ("llama_bias", lora(bias="lora_only")),
    "bias=all": ("llama_bias", lora(bias="all")),
    "bias=all without any": ("llama", lora(bias="all")),
    "target_parameters": ("mixtral", lora(target_modules=[], target_parameters=["gate_up_proj", "down_proj"])),
    "a router": ("mixtral", lora(target_modules=[], target_parameters=["gate.weight"])),
    "embed_tokens": ("llama", lora(target_modules=["embed_tokens", "q_proj"])),
    "lm_head": ("llama", lora(target_modules=["lm_head", "q_proj"])),
    "VeRA": ("llama", peft.VeraConfig(target_modules=QV, r=4)),
    "AdaLoRA": ("llama", peft.AdaLoraConfig(target_modules=QV, total_step=9)),
    "LN tuning": ("llama", peft.LNTuningConfig(target_modules=["input_layernorm"])),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "prompt tuning": (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "isn't supported"),
}


def folder_of(base: nn.Module, cfg: Any, folder: Path, **options: Any) -> Any:
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(base), cfg).eval()
    with torch.no_grad():
        for tensor in theirs.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    theirs.save_pretrained(folder, **options)
    return theirs


def goes_both_ways(base: nn.Module, theirs: nn.Module, folder: Path, ids: torch.Tensor = IDS) -> None:
    model, wanted = copy.deepcopy(base), output(theirs, ids)
    ll.load_peft(model, folder)
    torch.testing.assert_close(output(model, ids), wanted, rtol=1e-4, atol=2e-5)
    ll.save_peft(model, folder / "again")
    again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "again").eval()
    torch.testing.assert_close(output(again, ids), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", LOAD)
def test_it_loads_and_goes_back(name: str, tmp_path: Path) -> None:
    model, cfg = LOAD[name]
    base = built(model)
    theirs = folder_of(base, cfg, tmp_path)
    assert not torch.allclose(output(theirs, IDS), output(base, IDS), atol=1e-4)
    goes_both_ways(base, theirs, tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_wrote_the_base_loads_and_goes_back_as_a_lora(start: str, tmp_path: Path) -> None:
    base = built("llama")
    theirs = folder_of(base, lora(init_lora_weights=start), tmp_path)
    ll.load_peft(base, tmp_path)
    torch.testing.assert_close(output(base, IDS), output(theirs, IDS), rtol=1e-4, atol=2e-5)
    assert ll.save_peft(base, tmp_path / "again", rank=6) < 1e-5


def test_only_a_new_vocabulary(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    base = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    base.resize_token_embeddings(44)
    goes_both_ways(base, folder_of(base, lora(), tmp_path / "a"), tmp_path / "a", IDS + 3)


def test_several_adapters_and_those_that_transformers_adds(tmp_path: Path) -> None:
    base = built("llama")
    theirs = peft.get_peft_model(copy.deepcopy(base), lora(), "fr")
    theirs.add_adapter("de", lora(modules_to_save=["lm_head"]))
    theirs.save_pretrained(tmp_path / "a")
    with pytest.raises(ll.CheckpointError, match="2 of its folders are: de, fr; load one of them"):
        ll.load_peft(copy.deepcopy(base), tmp_path / "a")
    for name in ("de", "fr"):
        theirs.set_adapter(name)
        goes_both_ways(base, theirs, tmp_path / "a" / name)
    added: Any = copy.deepcopy(base)
    added.add_adapter(lora(init_lora_weights=False))
    added.save_pretrained(tmp_path / "b")
    goes_both_ways(base, added.eval(), tmp_path / "b")


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_its_type(name: str, tmp_path: Path) -> None:
    cfg, message = REFUSED[name]
    base = built("llama")
    folder_of(base, cfg, tmp_path)
    with pytest.raises(ll.CheckpointError, match=message):
        ll.load_peft(base, tmp_path)


def test_a_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    base = built("llama")
    folder_of(base, lora(), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    for load in (ll.load_peft, ll.load):
        with pytest.raises(ll.CheckpointError, match=r"is a pickle, which is never opened.*\n.*safe_serialization"):
            load(base, tmp_path)
