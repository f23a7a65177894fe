"""PEFT's folders on other layers than linear ones: made by PEFT, read here with equal outputs, and written for it."""

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
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


torch.manual_seed(0)  # the same inputs in every run: some differ from PEFT by more than the tolerance
MODELS = {
    "conv1d": (lambda: convolutions(1, 3), torch.randn(2, 4, 9), ["first", "second"]),
    "conv2d": (lambda: convolutions(2, 3), torch.randn(2, 4, 9, 9), ["first", "second"]),
    "conv3d": (lambda: convolutions(3, 2), torch.randn(2, 4, 7, 7, 7), ["first", "second"]),
    "kernel1": (lambda: convolutions(2, 1), torch.randn(2, 4, 5, 5), ["first", "second"]),
    "dilated": (lambda: convolutions(2, 1, dilation=2), torch.randn(2, 4, 5, 5), ["first", "second"]),
    "groups1d": (lambda: convolutions(1, 3, groups=2), torch.randn(2, 4, 9), ["first", "second"]),
    "groups2d": (lambda: convolutions(2, 3, groups=2), torch.randn(2, 4, 9, 9), ["first", "second"]),
    "groups3d": (lambda: convolutions(3, 2, groups=2), torch.randn(2, 4, 7, 7, 7), ["first", "second"]),
    "depthwise": (
        lambda: Net(first=nn.Conv2d(4, 8, 1, groups=4, bias=False), act=nn.Tanh(), second=nn.Conv2d(8, 4, 3)),
        torch.randn(2, 4, 5, 5),
        ["first", "second"],
    ),
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
    if not (model in ("embedding", "conv1d", "groups1d") and method.startswith("ia3"))
    and not (model in ("groups2d", "groups3d", "depthwise") and method in ("dora", "ia3"))
    and not (model == "groups1d" and method == "dora")
    and not (model == "depthwise" and method == "rslora")  # PEFT: 4 groups don't divide its rank 2
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


@pytest.mark.parametrize(
    ("kind", "method"), [p for p in PAIRS if p[1] in ("lora", "rslora", "dora") or p == ("groups2d", "ia3_out")]
)
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


def goes_both_ways(model: nn.Module, config: Any, folder: Path) -> None:
    """PEFT's adapter on a language model is loaded here, and written so that PEFT reads it, with equal outputs."""
    base, x = copy.deepcopy(model), {"input_ids": IDS}
    wanted = made_by_peft(model, config, folder / "theirs", x)
    ll.load_peft(model, folder / "theirs")
    torch.testing.assert_close(model(**x).logits, wanted, atol=2e-5, rtol=1e-4)
    ll.save_peft(model, folder / "ours")
    theirs = peft.PeftModel.from_pretrained(base, folder / "ours").eval()
    torch.testing.assert_close(theirs(**x).logits, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["down_proj"], ["gate_up_proj", "gate.weight"]])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_target_parameters_go_both_ways(kind: str, parameters: list[str], tmp_path: Path) -> None:
    if kind == "gpt_oss":
        parameters = [p.replace("gate.weight", "router.weight") for p in parameters]
        model = built(lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**SMALL, head_dim=8)))
    else:
        model = built(lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL)))
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=parameters, init_lora_weights=False)
    goes_both_ways(model, config, tmp_path)


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_parameters_in_4_bits_go_both_ways_one_on_each_module(kind: str, parameter: str, tmp_path: Path) -> None:
    model, paths = experts_in_4_bits(kind)
    paths = [path for path in paths if path.endswith(parameter)]
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=paths, init_lora_weights=False)
    goes_both_ways(model, config, tmp_path)


def test_of_two_parameters_in_4_bits_on_a_module_peft_trains_one(tmp_path: Path) -> None:
    """Its inner adapter gets no gradient, so a folder of its own is read as it is, and none is written for it."""
    model, paths = experts_in_4_bits("mixtral")
    base = copy.deepcopy(model)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=[], target_parameters=paths))
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "lora_B" in name and "base_layer" not in name:
                tensor.normal_(std=0.3)
    wanted = theirs(input_ids=IDS).logits  # the next forward with gradients raises, in PEFT 0.21.2
    wanted.sum().backward()
    inner = [t.grad for name, t in theirs.named_parameters() if "base_layer.lora_" in name]
    assert len(inner) == 4
    assert not any(grad is not None for grad in inner)
    theirs.save_pretrained(tmp_path)
    adapter = ll.load_peft(base, tmp_path)
    assert set(adapter.targets) == set(paths)
    torch.testing.assert_close(base(input_ids=IDS).logits, wanted, atol=2e-5, rtol=1e-4)
    with pytest.raises(ll.CheckpointError, match="of several parameters in bitsandbytes' 4 bits on one module, PEFT"):
        ll.save_peft(base, tmp_path / "ours")


def experts_in_4_bits(kind: str) -> tuple[nn.Module, list[str]]:
    """A model, and the paths of its experts' matrices."""
    quantise = pytest.importorskip("bitsandbytes.nn.parametrize").replace_parameter_4bit
    if kind == "gpt_oss":
        model = built(lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**SMALL, head_dim=8)))
    else:
        model = built(lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL)))
    model.set_experts_implementation("eager")
    experts = {path: module for path, module in model.named_modules() if path.endswith(".experts")}
    for module in experts.values():
        for name in ("gate_up_proj", "down_proj"):
            quantise(module, name)
    return model, [f"{path}.{name}" for path in experts for name in ("gate_up_proj", "down_proj")]


def test_dora_on_attention_is_not_written(tmp_path: Path) -> None:
    model = built(MODELS["attention"][0])
    ll.attach(model, ll.DoRAConfig(r=2, target_names="attn"))
    with pytest.raises(ll.CheckpointError, match=r"PEFT has no DoRA on nn\.MultiheadAttention"):
        ll.save_peft(model, tmp_path / "folder")
    ll.save_peft(model, tmp_path / "folder", rank=4)


# ---- convolutions with groups: PEFT's A sees the channels of all groups -----------------------------


def grouped(tmp_path: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """A model with PEFT's LoRA on a convolution with groups and on a plain one, its input, and PEFT's output."""
    make, x, names = MODELS["groups2d"]
    model = built(make)
    wanted = made_by_peft(model, METHODS["lora"](names, lora_dropout=0.0), tmp_path / "theirs", x)
    ll.load_peft(model, tmp_path / "theirs")
    return model, x, wanted


def test_with_groups_gradients_and_tensors_are_those_of_peft(tmp_path: Path) -> None:
    model, x, _ = grouped(tmp_path)
    theirs = peft.PeftModel.from_pretrained(built(MODELS["groups2d"][0]), tmp_path / "theirs", is_trainable=True)
    ll.save_peft(model, tmp_path / "ours")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
    target = torch.randn_like(model(x))
    for net in (model, theirs):
        (net(x) * target).sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora" in name]
    wanted = [p.grad for name, p in theirs.named_parameters() if "lora" in name]
    assert len(gradients) == len(wanted) == 4
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.flatten(), other.flatten(), rtol=1e-4, atol=1e-5)


def test_with_groups_files_scales_copies_and_detach(tmp_path: Path) -> None:
    model, x, wanted = grouped(tmp_path)
    base = built(MODELS["groups2d"][0])
    ll.save(model, tmp_path / "a.safetensors")
    fresh = copy.deepcopy(base)
    ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(x), model(x))
    ll.restore(fresh, tmp_path / "a.safetensors")
    assert ll.adapters(fresh)["default"].targets == {"first": (36, 3), "second": (6, 4)}
    with ll.scaled(fresh, 0.0):
        assert torch.equal(fresh(x), base(x))
    assert torch.equal(copy.deepcopy(fresh)(x), model(x))
    ll.save_peft(pickle.loads(pickle.dumps(model)), tmp_path / "ours")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
    ll.attach(fresh, ll.LoRAConfig(r=2, kinds="conv", target_names="first"), "plain")
    ll.attach(fresh, ll.IA3Config(kinds="conv", target_names="first"), "ia3")
    assert torch.equal(fresh(x), model(x))
    with torch.no_grad():
        fresh.first.lora_B__plain.add_(1)
    both = fresh(x)
    ll.detach(fresh, "default")
    ll.load(fresh, tmp_path / "a.safetensors", "after")  # in the other order
    torch.testing.assert_close(fresh(x), both, rtol=1e-5, atol=1e-5)
    assert ll.audit(model, x).layers
    ll.detach(fresh)
    assert torch.equal(fresh(x), base(x))
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=2e-5)


def test_with_groups_no_weight_holds_it(tmp_path: Path) -> None:
    model, x, _ = grouped(tmp_path)
    for attempt in (lambda: ll.merge(model, never_ran="merge"), lambda: ll.save_peft(model, tmp_path / "r", rank=4)):
        with pytest.raises(
            ll.TargetError, match="first: PEFT's LoRA on a convolution with groups sees the channels of"
        ):
            attempt()
    with pytest.raises(ll.TargetError, match="first: a history is of layers, and this adapter is on all groups"):
        ll.freeze_into(model)
    conv: Any = model.first
    conv.forward = lambda x: (conv.weight * 1).sum() + x  # a function that has no form for its weight
    with pytest.raises(ll.TargetError, match=r"first: .*no kernel with groups does"):
        conv(x)


@pytest.mark.parametrize("variant", ["lora", "dora", "ia3"])
def test_with_groups_what_came_after_it_is_no_round_of_a_history(variant: str, tmp_path: Path) -> None:
    model, x, _ = grouped(tmp_path)
    cfg = ll.config_for(variant)(kinds="conv", target_names="first")
    ll.attach(model, cfg, "own")
    before = model(x)
    said = r"first: 'default' came before 'own', and is on all groups of a conv.*\n.*keep 'own' beside 'default'"
    with pytest.raises(ll.TargetError, match=said):
        ll.freeze_into(model, "own")
    assert torch.equal(model(x), before)
    ll.detach(model, "default")
    ll.freeze_into(model, "own")
    assert [entry.label for entry in ll.history(model)] == ["own"]


def test_what_only_peft_can_is_refused_with_the_reason(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"groups": 2}, "dora", "PEFT's DoRA divides by the norm of another matrix"),
        ({"groups": 2}, "ia3", "PEFT scales all of its channels, and a patch has those of a group"),
        ({"padding": "same", "stride": 1, "dilation": 2}, "lora", "PEFT's A has no dilation, and this convolution has"),
        ({"padding_mode": "reflect"}, "lora", "by padding_mode='reflect'"),
        ({"padding_mode": "reflect"}, "dora", "by padding_mode='reflect'"),
    ]
    for i, (options, method, reason) in enumerate(cases):
        model = built(lambda options=options: Net(first=nn.Conv2d(4, 6, 3, **{"padding": 1, **options})))
        made_by_peft(model, METHODS[method](["first"]), tmp_path / str(i), torch.randn(2, 4, 9, 9))
        with pytest.raises(ll.CheckpointError, match=reason):
            ll.load_peft(model, tmp_path / str(i))
        if method == "lora":
            ll.attach(model, ll.LoRAConfig(r=2, kinds="conv", target_names="first"))
            with pytest.raises(ll.CheckpointError, match=reason):
                ll.save_peft(model, tmp_path / "ours")
    model = built(lambda: convolutions(2, 3, groups=2))
    ll.attach(model, ll.LoRAConfig(r=2, kinds="conv", target_names="first"))
    with pytest.raises(ll.CheckpointError, match="this one those of a group"):
        ll.save_peft(model, tmp_path / "ours")


def test_hostile_shapes_with_groups_are_errors_in_words(tmp_path: Path) -> None:
    grouped(tmp_path)
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(file)
    a, b = "base_model.model.first.lora_A.weight", "base_model.model.first.lora_B.weight"
    for key, tensor in ((a, torch.zeros(3, 4, 3, 3)), (a, torch.zeros(4, 2, 3, 3)), (b, torch.zeros(5, 2, 1, 1))):
        save_file({**tensors, key: tensor}, file)
        with pytest.raises(ll.CheckpointError, match="first"):
            ll.load_peft(built(MODELS["groups2d"][0]), tmp_path / "theirs")
