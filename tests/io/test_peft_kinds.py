"""PEFT's folders on other layers than linear ones: made by PEFT, read here with equal outputs, and written for it."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_lite as ll

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"vocab_size": 64, "num_key_value_heads": 2, "num_local_experts": 4}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own words on Conv1D and groups
IDS = torch.tensor([[1, 2, 3], [4, 1, 9]])


class Net(nn.Module):
    """Any layers in a row; of a tuple the first is handed on."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.named_children():
            x = layer(x, x, x)[0] if name == "attn" else layer(x)
        return x


def convolutions(dims: int, kernel: int, **options: Any) -> Net:
    conv = getattr(nn, f"Conv{dims}d")
    return Net(
        first=conv(4, 6, kernel, stride=2, padding=1, **options), act=nn.ReLU(), second=conv(6, 4, 1, bias=False)
    )


MODELS = {
    "conv1d": (lambda: convolutions(1, 3), torch.randn(2, 4, 9), ["first", "second"]),
    "conv2d": (lambda: convolutions(2, 3), torch.randn(2, 4, 9, 9), ["first", "second"]),
    "conv3d": (lambda: convolutions(3, 2), torch.randn(2, 4, 7, 7, 7), ["first", "second"]),
    "kernel1": (lambda: convolutions(2, 1), torch.randn(2, 4, 5, 5), ["first", "second"]),
    "embedding": (
        lambda: Net(emb=nn.Embedding(10, 8), conv1d=Conv1D(6, 8), lin=nn.Linear(6, 3)),
        IDS,
        ["emb", "conv1d"],
    ),
    "attention": (
        lambda: Net(norm=nn.LayerNorm(8), attn=nn.MultiheadAttention(8, 2), lin=nn.Linear(8, 3)),
        torch.randn(2, 5, 8),
        ["attn", "lin"],
    ),
}
METHODS = {
    "lora": lambda names, **kw: peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=names, **kw),
    "rslora": lambda names: peft.LoraConfig(
        r=4, use_rslora=True, init_lora_weights=False, target_modules=names, rank_pattern={names[0]: 2}
    ),
    "dora": lambda names: peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False, target_modules=names),
    "ia3": lambda names: peft.IA3Config(target_modules=names, feedforward_modules=names[:1], init_ia3_weights=False),
    "ia3_out": lambda names: peft.IA3Config(target_modules=names, feedforward_modules=[], init_ia3_weights=False),
}
PAIRS = [
    (model, method)
    for model in MODELS
    for method in METHODS
    if not (model in ("embedding", "conv1d") and method.startswith("ia3"))
    and not (model == "attention" and method != "lora" and method != "rslora")
]


def built(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return make().eval().requires_grad_(False)


def made_by_peft(model: nn.Module, config: Any, folder: Path, x: Any) -> Tensor:
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for tensor in theirs.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor) * 0.2)
    theirs.save_pretrained(folder)
    return theirs(x).detach() if not isinstance(x, dict) else theirs(**x).logits.detach()


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_a_folder_of_peft_loads_with_equal_outputs(kind: str, method: str, tmp_path: Path) -> None:
    make, x, names = MODELS[kind]
    model = built(make)
    before = model(x)
    wanted = made_by_peft(model, METHODS[method](names), tmp_path, x)
    assert not torch.allclose(before, wanted, atol=1e-3)
    ll.load_peft(model, tmp_path)
    torch.testing.assert_close(model(x), wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "method"), [p for p in PAIRS if p[1] in ("lora", "dora")])
def test_a_folder_that_is_written_here_is_read_by_peft(kind: str, method: str, tmp_path: Path) -> None:
    make, x, names = MODELS[kind]
    model = built(make)
    base = copy.deepcopy(model)
    made_by_peft(model, METHODS[method](names), tmp_path / "theirs", x)
    ll.load_peft(model, tmp_path / "theirs")
    wanted = model(x).detach()
    ll.save_peft(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(x), wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["down_proj"], ["gate_up_proj", "gate.weight"]])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_target_parameters_go_both_ways(kind: str, parameters: list[str], tmp_path: Path) -> None:
    if kind == "gpt_oss":
        parameters = [p.replace("gate.weight", "router.weight") for p in parameters]
        model = built(lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**SMALL, head_dim=8)))
    else:
        model = built(lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL)))
    base, x = copy.deepcopy(model), {"input_ids": IDS}
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=parameters, init_lora_weights=False)
    wanted = made_by_peft(model, config, tmp_path / "theirs", x)
    ll.load_peft(model, tmp_path / "theirs")
    torch.testing.assert_close(model(**x).logits, wanted, atol=2e-5, rtol=1e-4)
    ll.save_peft(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(**x).logits, wanted, atol=2e-5, rtol=1e-4)


def test_grouped_convolutions_are_refused_with_the_reason(tmp_path: Path) -> None:
    model = built(lambda: convolutions(2, 3, groups=2))
    made_by_peft(model, METHODS["lora"](["first"]), tmp_path, torch.randn(2, 4, 9, 9))
    with pytest.raises(ll.CheckpointError, match="groups"):
        ll.load_peft(model, tmp_path)
