"""What a PEFT folder trains beside its method: one adapter of several methods here, and back."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as installed
from peft_space import IDS, MODELS, Chain, bert, built, llama, output
from safetensors.torch import load_file, save_file
from test_peft_conversion import made
from torch import Tensor, nn

import lora_lite as ll

tf: Any = installed
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
WEIGHTS = "adapter_model.safetensors"


def perturbed(model: nn.Module, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(size * torch.randn(tensor.shape, generator=generator))


def folder_of(base: nn.Module, cfg: Any, folder: Path, **kwargs: Any) -> nn.Module:
    theirs = peft.get_peft_model(copy.deepcopy(base), cfg).eval()
    perturbed(theirs)
    theirs.save_pretrained(folder, **kwargs)
    return theirs


def read_by_peft(base: nn.Module, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def change(folder: Path, **fields: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(settings(folder) | fields))


def edit(folder: Path, **tensors: Tensor | None) -> None:
    """Keys are without `base_model.model.`, their dots as `__`."""
    new = {f"base_model.model.{key.replace('__', '.')}": tensor for key, tensor in tensors.items()}
    new = load_file(folder / WEIGHTS) | new
    save_file({key: tensor.contiguous() for key, tensor in new.items() if tensor is not None}, folder / WEIGHTS)


def refused(base: nn.Module, folder: Path, message: str, error: Any = ll.CheckpointError) -> None:
    keys = sorted(base.state_dict())
    with pytest.raises(error, match=message):
        ll.load_peft(base, folder)
    assert sorted(base.state_dict()) == keys
    assert not ll.adapters(base)


# ---- a method with a head beside it -----------------------------------------------------------------

METHODS: dict[str, Any] = {
    "lora": lambda **kw: peft.LoraConfig(target_modules=["q_proj"], **kw),
    "dora": lambda **kw: peft.LoraConfig(target_modules=["q_proj"], use_dora=True, **kw),
    "pissa": lambda **kw: peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa", **kw),
    "ia3": lambda **kw: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **kw),
    "vera": lambda **kw: peft.VeraConfig(target_modules=["q_proj"], r=6, **kw),
    "adalora": lambda **kw: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=1, **kw),
    "norms": lambda **kw: peft.LNTuningConfig(target_modules=["input_layernorm"], **kw),
}
MODULES = [["lm_head"], ["embed_tokens"], ["norm"], ["mlp"], ["layers.0.mlp.up_proj", "lm_head"]]


@pytest.mark.parametrize("modules", MODULES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_modules_to_save_beside_each_method(method: str, modules: list[str], tmp_path: Path) -> None:
    base = built("llama")
    if method in ("ia3", "norms") and modules in (["mlp"], ["norm"]):
        modules = ["q_proj"]  # the method is on those
    theirs = folder_of(base, METHODS[method](modules_to_save=modules), tmp_path / "theirs")
    ours = copy.deepcopy(base)
    adapter = ll.load_peft(ours, tmp_path / "theirs")
    close(output(ours, IDS), output(theirs, IDS))
    assert adapter.configs[-1].variant == "full"
    assert len(ll.adapters(ours)) == 1
    ll.save(ours, tmp_path / "a.safetensors")
    again = copy.deepcopy(base)
    ll.load(again, tmp_path / "a.safetensors")
    assert torch.equal(output(again, IDS), output(ours, IDS))
    if method != "pissa":
        ll.save_peft(again, tmp_path / "ours")
        close(output(read_by_peft(base, tmp_path / "ours"), IDS), output(theirs, IDS))
    merged = copy.deepcopy(ours)
    ll.merge(merged, never_ran="merge")
    close(output(merged, IDS), output(theirs, IDS))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_classifier_that_is_trained_here_is_read_by_peft(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    is_bert = kind == "bert"
    base = bert(tf.BertForSequenceClassification) if is_bert else llama(tf.LlamaForSequenceClassification)
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    names = ["query"] if is_bert else ["q_proj"]
    head = "classifier" if is_bert else "score"
    adapter = ll.attach(model, [ll.LoRAConfig(r=2, target_names=names), ll.FullConfig(target_names=head)])
    optimizer, labels = torch.optim.AdamW(adapter.parameters(), lr=1e-2), torch.tensor([0, 1])
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=labels).loss.backward()
        optimizer.step()
    wanted = model.eval()(input_ids=IDS).logits
    ll.save_peft(model, tmp_path / "peft")
    assert settings(tmp_path / "peft")["task_type"] == "SEQ_CLS"
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "peft").eval()
    close(theirs(input_ids=IDS).logits, wanted)
    plain = type(base).from_pretrained(tmp_path / "base")
    close(read_by_peft(plain, tmp_path / "peft")(input_ids=IDS).logits, wanted)
    ll.load_peft(plain, tmp_path / "peft")
    close(plain.eval()(input_ids=IDS).logits, wanted)


def test_a_classifier_without_its_head_has_no_task(tmp_path: Path) -> None:
    """PEFT would look for the head in the file."""
    base = built("llama_cls")
    model = copy.deepcopy(base)
    adapter = ll.attach(model, ll.LoRAConfig(r=2, target_names="q_proj"))
    perturbed(model)
    ll.save_peft(model, tmp_path)
    assert settings(tmp_path)["task_type"] is None
    close(output(read_by_peft(base, tmp_path), IDS), output(model, IDS))
    assert adapter.variant == "lora"


def test_a_head_of_several_layers_is_saved_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cfg = tf.RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, pad_token_id=0
    )
    base = tf.RobertaForSequenceClassification(cfg).eval()
    theirs = folder_of(base, peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"), tmp_path / "theirs")
    model = copy.deepcopy(base)
    adapter = ll.load_peft(model, tmp_path / "theirs")
    assert "classifier.dense" in adapter.targets
    ll.save_peft(model, tmp_path / "ours")
    assert settings(tmp_path / "ours")["modules_to_save"] == ["classifier"]
    close(output(read_by_peft(base, tmp_path / "ours"), IDS), output(theirs, IDS))


# ---- embeddings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cfg", ["lora", "tokens"])
def test_an_embedding_that_was_resized_is_in_the_folder_whole(tied: bool, cfg: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = llama(tie_word_embeddings=tied).eval()
    base.save_pretrained(tmp_path / "base")
    grown = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    grown.resize_token_embeddings(44)
    more = {"trainable_token_indices": [41, 40]} if cfg == "tokens" else {}
    theirs = folder_of(grown, peft.LoraConfig(target_modules=["q_proj"], **more), tmp_path / "theirs")
    keys = list(load_file(tmp_path / "theirs" / WEIGHTS))
    assert any("embed_tokens" in key for key in keys)
    refused(base, tmp_path / "theirs", r"another vocabulary: model\.resize_token_embeddings\(44\)")
    ids = torch.tensor([[1, 41, 40, 3]])
    same = copy.deepcopy(grown)
    adapter = ll.load_peft(same, tmp_path / "theirs")  # its own numbers: skipped
    assert "full" not in adapter.variant
    close(output(same, ids), output(theirs, ids))
    torch.manual_seed(9)
    other = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    other.resize_token_embeddings(44)
    with torch.no_grad():
        other.get_input_embeddings().weight[40:] += 0.3
    fresh = copy.deepcopy(other)
    adapter = ll.load_peft(other, tmp_path / "theirs")
    assert "full" in adapter.variant
    close(output(other, ids), output(theirs, ids))
    ll.save_peft(other, tmp_path / "ours")
    close(output(read_by_peft(fresh, tmp_path / "ours"), ids), output(theirs, ids))


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids=str)
@pytest.mark.parametrize("ensure", [False, True])
def test_tied_heads_are_as_peft_has_them(modules: list[str], ensure: bool, tmp_path: Path) -> None:
    base = built("llama_tied")
    cfg = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=modules, ensure_weight_tying=ensure)
    theirs = folder_of(base, cfg, tmp_path / "theirs")
    model = copy.deepcopy(base)
    adapter = ll.load_peft(model, tmp_path / "theirs")
    close(output(model, IDS), output(theirs, IDS))
    (full,) = (cfg for cfg in adapter.configs if cfg.variant == "full")
    assert full.tied_weights == ("together" if ensure else "apart")
    ll.save_peft(model, tmp_path / "ours")
    close(output(read_by_peft(base, tmp_path / "ours"), IDS), output(theirs, IDS))


def test_rows_come_in_any_order_and_go_back(tmp_path: Path) -> None:
    base = built("llama_tied")
    theirs = folder_of(base, peft.TrainableTokensConfig(token_indices=[9, 1, 5]), tmp_path / "theirs")
    model = copy.deepcopy(base)
    adapter = ll.load_peft(model, tmp_path / "theirs")
    assert adapter.config.token_ids == (1, 5, 9)
    close(output(model, IDS), output(theirs, IDS))
    ll.save_peft(model, tmp_path / "ours")
    files = [load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    key = next(key for key in files[0] if "embed_tokens" in key)
    torch.testing.assert_close(files[0][key], files[1][key][[2, 0, 1]])
    close(output(read_by_peft(base, tmp_path / "ours"), IDS), output(theirs, IDS))


@pytest.mark.parametrize("lists", [{"embed_tokens": [5, 1], "lm_head": [2]}, {"lm_head": [5]}, {"embed_tokens": [5]}])
def test_a_tied_head_with_a_list_of_its_own_has_rows_of_its_own(lists: dict[str, list[int]], tmp_path: Path) -> None:
    base = built("llama_tied")
    cfg = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=lists)
    theirs = folder_of(base, cfg, tmp_path / "theirs")
    model = copy.deepcopy(base)
    ll.load_peft(model, tmp_path / "theirs")
    close(output(model, IDS), output(theirs, IDS))
    ll.save_peft(model, tmp_path / "ours")
    close(output(read_by_peft(base, tmp_path / "ours"), IDS), output(theirs, IDS))


def test_other_rows_of_the_same_tokens_in_a_tied_head_are_refused(tmp_path: Path) -> None:
    base = built("llama_tied")
    folder_of(base, peft.TrainableTokensConfig(token_indices=[9, 1]), tmp_path)
    edit(tmp_path, lm_head__trainable_tokens_delta=torch.ones(2, 16))
    refused(base, tmp_path, "has other rows than model.embed_tokens, whose weight it shares, for the same tokens")


def test_rows_of_a_head_train_as_those_of_peft(tmp_path: Path) -> None:
    """The variant tokens on a linear layer: three steps of SGD, the other rows stay."""
    base = built("llama")
    cfg = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5], "lm_head": [7, 2]})
    theirs: Any = folder_of(base, cfg, tmp_path)
    model = copy.deepcopy(base)
    adapter = ll.load_peft(model, tmp_path)
    for net, parameters in ((theirs, None), (model, adapter.parameters())):
        trained = [p for p in net.parameters() if p.requires_grad] if parameters is None else list(parameters)
        optimizer = torch.optim.SGD(trained, lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            output(net, IDS).square().sum().mul(1e-2).backward()
            optimizer.step()
    close(output(model, IDS), output(theirs, IDS))
    ll.merge(model, never_ran="merge")
    same = [i for i in range(40) if i not in (7, 2)]
    assert torch.equal(model.lm_head.weight[same], base.lm_head.weight[same])
    close(output(model, IDS), output(theirs, IDS))


def test_tokens_of_a_head_are_checked() -> None:
    with pytest.raises(ll.ConfigError, match=r"kinds=.*\('embedding',\), or \('linear',\) for a head"):
        ll.TokensConfig(token_ids=[1], kinds=("linear", "embedding"))
    with pytest.raises(ll.ConfigError, match="lm_head: token_ids has 40, and this head 40 tokens"):
        ll.attach(built("llama"), ll.TokensConfig(token_ids=[40], kinds="linear", target_names="lm_head"))


# ---- AdaLoRA after its ranks shrank, and activated LoRA ---------------------------------------------


def test_adalora_with_the_ranks_that_are_left(tmp_path: Path) -> None:
    base = built("llama")
    cfg = peft.AdaLoraConfig(
        target_modules=["q_proj", "down_proj"], init_r=4, target_r=1, total_step=4, tinit=0, tfinal=1, lora_alpha=12
    )
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), cfg)
    perturbed(theirs)
    with torch.no_grad():  # a layer that loses everything
        theirs.base_model.model.model.layers[0].self_attn.q_proj.lora_E["default"].zero_()
    optimizer = torch.optim.AdamW((p for p in theirs.parameters() if p.requires_grad), lr=1e-2)
    for step in range(4):
        output(theirs, IDS).square().sum().mul(1e-2).backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.eval().save_pretrained(tmp_path / "theirs")
    pattern = settings(tmp_path / "theirs")["rank_pattern"]
    ranks = {key.removesuffix(".lora_E"): sum(mask) for key, mask in pattern.items()}
    assert 0 in ranks.values()
    assert len(set(ranks.values())) > 1
    model = copy.deepcopy(base)
    adapter = ll.load_peft(model, tmp_path / "theirs")
    assert {path: view.cfg.r for path, view in adapter.views().items()} == {p: max(r, 1) for p, r in ranks.items()}
    assert (adapter.config.init_r, adapter.config.total_step, adapter.config.tfinal) == (4, 4, 1)
    again = read_by_peft(base, tmp_path / "theirs")
    close(output(model, IDS), output(again, IDS))
    ll.save_peft(model, tmp_path / "ours")
    files = [load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
    kept = settings(tmp_path / "ours")
    for field in ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"):
        assert kept[field] == settings(tmp_path / "theirs")[field]
    close(output(read_by_peft(base, tmp_path / "ours"), IDS), output(again, IDS))
    change(tmp_path / "theirs", rank_pattern=None)
    refused(
        copy.deepcopy(base),
        tmp_path / "theirs",
        r"has tensors of rank \d, and init_r=4, rank_pattern=\[True, True, True, True\]",
    )


def test_alora_goes_both_ways(tmp_path: Path) -> None:
    base = built("llama")
    cfg = peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[9, 30], task_type="CAUSAL_LM")
    theirs = folder_of(base, cfg, tmp_path / "theirs")
    model = copy.deepcopy(base)
    adapter = ll.load_peft(model, tmp_path / "theirs")
    assert adapter.config.invocation_tokens == (9, 30)
    wanted = theirs(input_ids=IDS[:1]).logits
    close(model(input_ids=IDS[:1]).logits, wanted)
    assert not torch.allclose(base(input_ids=IDS[:1]).logits, wanted, atol=1e-4)
    ll.save_peft(model, tmp_path / "ours")
    assert settings(tmp_path / "ours")["alora_invocation_tokens"] == [9, 30]
    close(read_by_peft(base, tmp_path / "ours")(input_ids=IDS[:1]).logits, wanted)


# ---- buffers, and what no layer holds ---------------------------------------------------------------


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.head = nn.Linear(10, 6), Chain(norm=nn.BatchNorm1d(6), lin=nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin0(x))


def test_what_no_layer_holds_must_be_the_models_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = WithBuffers().eval(), torch.randn(3, 10)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=["lin0"], modules_to_save=["head"])
    )
    with torch.no_grad():
        theirs.base_model.model.head.modules_to_save["default"].lin.weight.add_(0.2)
    theirs.eval().save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    ll.load_peft(model, tmp_path)
    close(model(x), theirs(x))
    for key in ("head__norm__running_mean", "head__norm__weight"):
        before = load_file(tmp_path / WEIGHTS)[f"base_model.model.{key.replace('__', '.')}"]
        edit(tmp_path, **{key: before + 1})
        refused(copy.deepcopy(base), tmp_path, f"{key.replace('__', '.')} is not this model's .* no layer that an")
        edit(tmp_path, **{key: before})


def test_a_tensor_that_peft_uses_while_the_adapter_is_off_is_named(tmp_path: Path, log: list[str]) -> None:
    """With bias="all" the copy that modules_to_save keeps of the base is in the folder, too."""
    base = built("mlp")
    cfg = peft.LoraConfig(target_modules=["lin0"], modules_to_save=["lin1"], bias="all")
    folder_of(base, cfg, tmp_path)
    ll.load_peft(copy.deepcopy(base), tmp_path)
    assert not any("WARNING" in line for line in log)
    edit(tmp_path, lin1__original_module__bias=torch.ones(2))
    ll.load_peft(copy.deepcopy(base), tmp_path)
    assert any("lin1.original_module.bias isn't this model's lin1.bias; PEFT uses it while" in line for line in log)


# ---- hostile files ----------------------------------------------------------------------------------


def test_hostile_tensors_and_settings_are_errors_in_words(tmp_path: Path) -> None:
    base = built("llama")
    cfg = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [5, 1]}
    )
    folder_of(base, cfg, tmp_path)
    original, fields = load_file(tmp_path / WEIGHTS), settings(tmp_path)
    rows = "model__embed_tokens__token_adapter__trainable_tokens_delta"
    head = original["base_model.model.lm_head.weight"]
    tensors: list[tuple[dict[str, Any], str]] = [
        (
            {"lm_head__weight": torch.ones(3)},
            r"lm_head.weight is \(3,\), and this model's lm_head.weight is \(40, 16\)",
        ),
        ({"lm_head__weight": torch.ones(40, 17)}, r"is \(40, 17\)"),
        ({"lm_head__weight": torch.ones(41, 16)}, r"is \(41, 16\)"),
        ({"lm_head__weight": None}, r"modules_to_save=.* the file has no lm_head.weight|can't be kept"),
        ({"lm_head__weight": head.int()}, "is stored as I32; wanted floats"),
        ({"lm_head__weight": head * float("nan")}, "NaN"),
        ({"lm_head__bias": torch.ones(40)}, "are not in this LlamaForCausalLM"),
        ({"lm_head__modules_to_save__weight": head + 1}, "are one tensor, and differ"),
        ({"elsewhere__weight": torch.ones(2)}, "are not in this LlamaForCausalLM"),
        ({rows: torch.ones(3, 16)}, r"is \(3, 16\), wanted \(2, 16\): a row for each"),
        ({rows: torch.ones(2, 15)}, r"is \(2, 15\), wanted \(2, 16\)"),
        ({rows: torch.ones(2)}, r"is \(2,\), wanted"),
        ({rows: None}, "trainable_token_indices=.* can't be kept here"),
        ({"model__norm__token_adapter__trainable_tokens_delta": torch.ones(2, 16)}, "trainable_token_indices"),
    ]
    for change_of, message in tensors:
        save_file(original, tmp_path / WEIGHTS)
        edit(tmp_path, **change_of)
        refused(copy.deepcopy(base), tmp_path, message)
    save_file(original, tmp_path / WEIGHTS)
    values: list[tuple[dict[str, Any], str]] = [
        ({"modules_to_save": ["lm_head", 3]}, "modules_to_save=.*: wanted names"),
        ({"modules_to_save": [""]}, "modules_to_save=.*: wanted names"),
        ({"modules_to_save": ["lm_head", "norm"]}, "the file has no model.*norm.weight"),
        ({"trainable_token_indices": [5, "1"]}, "wanted a list of different tokens"),
        ({"trainable_token_indices": [5, 5]}, "wanted a list of different tokens"),
        ({"trainable_token_indices": [-1, 5]}, "wanted a list of different tokens"),
        ({"trainable_token_indices": {"embed": [1, 5]}}, "wanted a list of different tokens"),
        ({"trainable_token_indices": {"embed_tokens": [5, 1], "wte": [2]}}, "has wte, and the file no rows of it"),
        ({"trainable_token_indices": [5, 10**12]}, "has 40 tokens, and the file has rows of token 10000"),
        ({"trainable_token_indices": [5]}, r"wanted \(1, 16\)"),
    ]
    for setting, message in values:
        change(tmp_path, **fields | setting)
        refused(copy.deepcopy(base), tmp_path, message)


@pytest.mark.parametrize(
    ("edit_of", "fields", "message"),
    [
        ({}, {"init_r": -1}, "init_r=-1"),
        ({}, {"init_r": 0}, "init_r"),
        ({}, {"lora_alpha": 0}, "alpha"),
        ({}, {"beta1": 2}, "beta1"),
        ({}, {"total_step": "9"}, "total_step"),
        ({}, {"rank_pattern": [1]}, "rank_pattern"),
        ({}, {"rank_pattern": {"lin0.lora_E": "aaa"}}, "rank_pattern"),
        ({}, {"rank_pattern": {"lin0.lora_E": [True] * 3}}, "rank 12"),
        ({"lin0__lora_E": torch.ones(5, 1)}, {}, "rank 5"),
        ({"lin0__lora_E": torch.ones(12)}, {}, "wrong shapes"),
        ({"lin0__lora_E": None}, {}, "rank 0"),
        ({"lin0__lora_A": torch.ones(3, 10)}, {}, "wrong shapes"),
    ],
)
def test_hostile_adaloras(edit_of: dict[str, Any], fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = built("mlp")
    folder_of(base, peft.AdaLoraConfig(target_modules=["lin0"], total_step=1), tmp_path)
    edit(tmp_path, **edit_of)
    change(tmp_path, **fields)
    refused(base, tmp_path, message)


# ---- what save_peft makes of lists ------------------------------------------------------------------

LISTS: dict[str, tuple[str, list[Any]]] = {
    "lora and all kinds": (
        "llama_bias",
        [
            ll.LoRAConfig(r=2, target_names="q_proj"),
            ll.FullConfig(target_names="lm_head"),
            ll.NormConfig(target_names="input_layernorm"),
            ll.BiasConfig(target_names="k_proj"),
            ll.TokensConfig(token_ids=(1, 5)),
        ],
    ),
    "biases of the targets": (
        "llama_bias",
        [ll.DoRAConfig(r=2, target_names=["q_proj", "v_proj"]), ll.BiasConfig(target_names="q_proj")],
    ),
    "a vera with biases": ("llama_bias", [ll.VeRAConfig(r=4, target_names="q_proj"), ll.BiasConfig()]),
    "an adalora with rows": (
        "llama",
        [ll.AdaLoRAConfig(r=3, target_names="q_proj"), ll.TokensConfig(token_ids=(1, 5))],
    ),
    "norms and a head": ("llama", [ll.NormConfig(), ll.FullConfig(target_names="lm_head")]),
    "full alone": ("conv2d", [ll.FullConfig()]),
    "an embedding alone": ("emb", [ll.FullConfig(target_names="emb")]),
    "rows of two embeddings": ("llama", [ll.TokensConfig(token_ids=(1, 5))]),
    "a bias in a whole layer": (
        "mlp",
        [
            ll.LoRAConfig(r=2, target_names="lin0"),
            ll.FullConfig(target_names="lin1"),
            ll.BiasConfig(target_names="lin1"),
        ],
    ),
    "bare parameters": ("mixtral", [ll.LoRAConfig(r=2, target_names="q_proj"), ll.FullConfig(kinds=("experts",))]),
    "bare parameters alone": ("bare", [ll.FullConfig(kinds="matrix")]),
    "gpt2": ("gpt2", [ll.LoRAConfig(r=2, target_names="c_attn"), ll.FullConfig(target_names="c_fc")]),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_ours_is_read_by_peft_and_by_us(name: str, tmp_path: Path) -> None:
    kind, configs = LISTS[name]
    base, x = built(kind), MODELS[kind][1]
    model = copy.deepcopy(base)
    ll.attach(model, configs)
    perturbed(model)
    wanted = output(model, x).detach()
    assert not torch.allclose(output(base, x), wanted, atol=1e-4)
    ll.save_peft(model, tmp_path)
    close(output(read_by_peft(base, tmp_path), x), wanted)
    again = copy.deepcopy(base)
    ll.load_peft(again, tmp_path)
    close(output(again, x), wanted)


@pytest.mark.parametrize(
    ("kind", "configs", "message"),
    [
        ("llama_bias", [ll.IA3Config(), ll.BiasConfig()], "PEFT trains biases beside a LoRA, .* and this is IA3"),
        ("llama_bias", [ll.BiasConfig()], "PEFT trains biases beside a LoRA, an AdaLoRA or a VeRA only"),
        ("llama", [ll.IA3Config(), ll.TokensConfig(token_ids=(1,))], "PEFT trains tokens beside a LoRA only"),
        (
            "llama",
            [ll.NormConfig(), ll.TokensConfig(token_ids=(1,))],
            "PEFT has no trainable tokens with whole modules",
        ),
        ("mlp", [ll.LoRAConfig(r=2), ll.FullConfig(target_names="lin1")], "lin1: PEFT trains a layer whole, or with"),
        (
            "bare",
            [ll.LoRAConfig(r=2, kinds="matrix"), ll.FullConfig(kinds="matrix")],
            "lin0.weight: PEFT trains a layer",
        ),
        (
            "llama_tied",
            [ll.LoRAConfig(r=2, target_names="q_proj"), ll.TokensConfig(token_ids=(1,), tied_weights="apart")],
            "PEFT gives the rows to all that share its weight, and this adapter to one",
        ),
        ("llama", [ll.LoRAConfig(r=2), ll.ReFTConfig()], "PEFT|residual stream"),
    ],
)
def test_what_peft_can_not_hold_together_is_refused(
    kind: str, configs: list[Any], message: str, tmp_path: Path
) -> None:
    model = built(kind)
    ll.attach(model, configs)
    with pytest.raises(ll.CheckpointError, match=message):
        ll.save_peft(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_name_that_is_the_end_of_another_is_refused(tmp_path: Path) -> None:
    """PEFT compares ends without a dot."""
    model = Chain(lin0=nn.Linear(4, 4), xhead=nn.Linear(4, 4), head=nn.Linear(4, 2))
    ll.attach(model, [ll.LoRAConfig(r=2, target_names="lin0"), ll.FullConfig(target_names="^head")])
    with pytest.raises(ll.CheckpointError, match=r"xhead: PEFT reads modules_to_save as ends of paths"):
        ll.save_peft(model, tmp_path)


def test_a_module_whose_key_peft_renames_is_refused(tmp_path: Path) -> None:
    model = made("Laguna")
    up = "layers.1.mlp.shared_experts.up_proj"
    ll.attach(model, [ll.LoRAConfig(r=2, target_names="q_proj"), ll.FullConfig(target_names=re.escape(up))])
    with pytest.raises(ll.CheckpointError, match=f"{up}: PEFT reads its key as an old checkpoint's"):
        ll.save_peft(model, tmp_path / "a")


def test_rank_takes_the_changes_of_a_list(tmp_path: Path) -> None:
    base = built("llama")
    model = copy.deepcopy(base)
    ll.attach(model, [ll.LoRAConfig(r=2, target_names="q_proj"), ll.FullConfig(target_names="lm_head")])
    perturbed(model)
    assert ll.save_peft(model, tmp_path / "whole", rank=16) < 1e-5
    close(output(read_by_peft(base, tmp_path / "whole"), IDS), output(model, IDS))


def test_a_quantised_base_is_compared_with_the_numbers_that_it_computes_with(tiny: str, tmp_path: Path) -> None:
    from models import quantized

    base = ll.load_base(tiny)
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["layers.0.mlp.down_proj"])
    )
    perturbed(theirs)
    theirs.save_pretrained(tmp_path)
    whole = theirs.base_model.model.model.layers[0].mlp.down_proj.modules_to_save["default"].weight.detach().float()
    model = quantized(tiny, "nf4")
    ll.load_peft(model, tmp_path)
    layer: Any = model.get_submodule("model.layers.0.mlp.down_proj")
    site = next(s for s in ll.adapters(model)["default"].sites() if s.path.endswith("down_proj"))
    close(site.base.dense_weight() + layer.lora_weight, whole)
    with pytest.raises(ll.CheckpointError, match="PEFT would save the codes of this layer"):
        ll.save_peft(model, tmp_path / "ours")
