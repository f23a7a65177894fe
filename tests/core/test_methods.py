"""Several methods in one adapter: a list of configs, with one name, one file, one scale and one handle."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, moe, perturb, tiny_llama, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_ecosystem import Tokens, arguments
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from lora_lite.trainer import AdapterTrainer

LISTS: dict[str, list[Any]] = {
    "lora and head": [ll.LoRAConfig(r=2), ll.FullConfig(target_names="lm_head")],
    "two on one layer": [ll.LoRAConfig(r=2, target_names="q_proj"), ll.IA3Config(target_names="q_proj")],
    "the same twice": [
        ll.LoRAConfig(r=2, target_names="q_proj"),
        ll.LoRAConfig(r=3, alpha=9.0, target_names="[qk]_proj"),
    ],
    "ia3, both halves": [ll.IA3Config(), ll.IA3FFConfig()],
    "shared tensors twice": [
        ll.VeRAConfig(r=4, target_names="q_proj"),
        ll.VeRAConfig(r=3, seed=1, target_names="[qv]_proj", save_projection=True),
    ],
    "all kinds": [
        ll.LoRAConfig(r=2, per_layer={"o_proj": {"r": 3}}),
        ll.NormConfig(),
        ll.BiasConfig(),
        ll.TokensConfig(token_ids=(1, 5, 7)),
        ll.FullConfig(target_names="lm_head"),
        ll.DoRAConfig(r=2, target_names="up_proj"),
    ],
}
each_list = pytest.mark.parametrize("configs", LISTS.values(), ids=LISTS)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def attached(configs: Any, name: str = "default") -> tuple[Any, ll.Adapter]:
    model = tiny_llama(bias=True)
    adapter = ll.attach(model, configs, name)
    perturb(adapter)
    return model, adapter


@each_list
def test_it_acts_as_its_methods_do_side_by_side(configs: list[Any]) -> None:
    """Each `forward` sees the layer's own x, and the outputs change in the order of the list."""
    model, adapter = attached(configs)
    other = tiny_llama(bias=True)
    for i, (config, method) in enumerate(zip(configs, adapter.methods, strict=True)):
        one = ll.attach(other, config, f"n{i}")
        values = {site.key(name): tensor for site in method.sites for name, tensor in site.tensors()}
        plain = {
            key.replace(f"lora_{n}_", "lora_"): v for key, v in values.items() for n in (2, 3) if f"lora_{n}_" in key
        }
        values = {key: value for key, value in values.items() if not any(f".lora_{n}_" in key for n in (2, 3))} | plain
        shared = {} if method.shared is None else dict(method.shared.tensors())
        values |= {f"lora_shared.{name}": tensor for name, tensor in shared.items()}
        one.load_state_dict({key: values[key] for key in one.state_dict()})
    assert torch.equal(logits(model), logits(other))


@each_list
def test_a_fresh_one_is_the_identity_and_detach_restores(configs: list[Any]) -> None:
    model = tiny_llama(bias=True)
    base, keys = logits(model), sorted(model.state_dict())
    adapter = ll.attach(model, configs)
    assert torch.equal(logits(model), base)
    perturb(adapter)
    assert not torch.equal(logits(model), base)
    with ll.disabled(model):
        assert torch.equal(logits(model), base)
    ll.detach(model)
    assert torch.equal(logits(model), base)
    assert sorted(model.state_dict()) == keys


@each_list
@pytest.mark.parametrize("name", ["default", "fr"])
def test_one_file(configs: list[Any], name: str, tmp_path: Path) -> None:
    model, adapter = attached(configs, name)
    model.train()
    train(model, adapter, 2)
    model.eval()
    adapter.scale = 0.7
    wanted = logits(model)
    ll.save(model, tmp_path / "a.safetensors", name)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["lora_lite"])
    assert meta["format"] == 2
    assert [method["variant"] for method in meta["methods"]] == [config.variant for config in configs]
    fresh = tiny_llama(bias=True)
    loaded = ll.load(fresh, tmp_path / "a.safetensors", name)
    assert torch.equal(logits(fresh), wanted)
    assert loaded.configs == adapter.configs or loaded.variant == adapter.variant
    assert loaded.state_dict().keys() == adapter.state_dict().keys()
    perturb(loaded, seed=5)
    ll.restore(fresh, tmp_path / "a.safetensors", name)
    assert torch.equal(logits(fresh), wanted)
    again = tmp_path / "b.safetensors"
    ll.save(fresh, again, name)
    assert load_file(again).keys() == load_file(tmp_path / "a.safetensors").keys()


def test_a_file_of_one_method_stays_of_format_1(tmp_path: Path) -> None:
    model, _ = attached([ll.LoRAConfig(r=2)])
    assert ll.adapters(model)["default"].config == ll.LoRAConfig(r=2)
    ll.save(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_lite"])["format"] == 1


@each_list
def test_merged_equals_attached(configs: list[Any]) -> None:
    model, _ = attached(configs)
    wanted, base = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    ll.merge(model)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    ll.unmerge(model)
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())
    ll.merge(model, keep=False)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    assert not ll.adapters(model)


@each_list
def test_merged_on_disk_is_the_merge_in_memory(configs: list[Any], tmp_path: Path) -> None:
    model = tiny_llama(bias=True)
    model.save_pretrained(tmp_path / "base")
    perturb(ll.attach(model, configs))
    model(input_ids=IDS)
    ll.save(model, tmp_path / "a.safetensors")
    ll.merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "merged")
    ll.merge(model, keep=False)
    merged = type(model).from_pretrained(tmp_path / "merged")
    assert all(torch.equal(value, merged.state_dict()[key]) for key, value in model.state_dict().items())


@each_list
def test_copies_and_pickles(configs: list[Any]) -> None:
    model, _ = attached(configs)
    wanted = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), wanted)
        perturb(ll.adapters(twin)["default"], seed=4)
        assert torch.equal(logits(model), wanted)


@each_list
def test_plan_audit_and_the_handle_know_all_methods(configs: list[Any]) -> None:
    model = tiny_llama(bias=True)
    plan = ll.plan(model, configs)
    adapter = ll.attach(model, configs)
    assert plan.parameters == sum(p.numel() for p in adapter.parameters())
    assert sorted(target.path for target in plan) == sorted(adapter.targets)
    assert plan.variant == adapter.variant == " + ".join(config.variant for config in configs)
    perturb(adapter)
    audit = ll.audit(model, {"input_ids": IDS, "labels": IDS}, merged=True)
    assert "adapted layers ran" in str(audit)
    assert all(p.grad is None for p in adapter.parameters())


def test_a_history_keeps_each_method_as_a_round() -> None:
    configs = LISTS["two on one layer"]
    model, _ = attached(configs)
    wanted = logits(model)
    ll.freeze_into(model, label="first")
    torch.testing.assert_close(logits(model), wanted)
    assert [entry.label for entry in ll.history(model)] == ["first", "first-2"]
    ll.drop_round(model, "first")
    ll.drop_round(model, "first-2")
    assert torch.equal(logits(model), logits(tiny_llama(bias=True)))


def test_a_failure_in_the_second_method_changes_nothing() -> None:
    model = tiny_llama(bias=True)
    keys, base = sorted(model.state_dict()), logits(model)
    with pytest.raises(ll.TargetError, match=r"no layer matched target_names=.*score"):
        ll.attach(model, [ll.LoRAConfig(r=2), ll.FullConfig(target_names="score")])
    model.lm_head.lora_weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(ll.TargetError, match="lm_head: it has lora_weight already"):
        ll.attach(model, [ll.LoRAConfig(r=2), ll.FullConfig(target_names="lm_head")])
    del model.lm_head.lora_weight
    assert sorted(model.state_dict()) == keys
    assert torch.equal(logits(model), base)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([], "an empty list of configs"),
        (
            [ll.LoRAConfig(), ll.HistoryConfig(rounds=[], here={})],
            "'history' comes before all other adapters, so it is an adapter of its own",
        ),
    ],
)
def test_lists_that_are_none(configs: Any, message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        ll.attach(tiny_llama(), configs)


def test_configure_reaches_the_method_that_follows() -> None:
    model = tiny_llama()
    data = {"directions": {t.path: torch.randn(t.d_out) for t in ll.plan(model, ll.SteerConfig())}}
    adapter = ll.attach(model, [ll.LoRAConfig(r=2), ll.SteerConfig()], calibration_data=data)
    before = logits(model)
    adapter.configure(strength=3.0)
    assert adapter.configs[1].strength == 3.0
    assert not torch.equal(logits(model), before)
    with pytest.raises(ll.ConfigError, match="r can't change while it is attached\n  'lora \\+ steer' can follow"):
        adapter.configure(r=3)


def test_experts_and_the_layers_beside_them(tmp_path: Path) -> None:
    """A module with several weights has the tensors of each method at each."""
    configs = [
        ll.LoRAConfig(r=2, kinds=("linear", "experts")),
        ll.LoRAConfig(r=3, kinds="experts", target_names="down_proj"),
    ]
    model = moe("qwen3")
    adapter = ll.attach(model, configs)
    perturb(adapter)
    wanted = logits(model)
    assert any(".down_proj.lora_2_A" in key for key in adapter.state_dict())
    ll.save(model, tmp_path / "a.safetensors")
    fresh = moe("qwen3")
    ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh), wanted)
    ll.merge(fresh)
    torch.testing.assert_close(logits(fresh), wanted, rtol=1e-4, atol=1e-4)


# ---- files that are anyone's --------------------------------------------------------------------


def edited(path: Path, change: Any, tensors: Any = None) -> Path:
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["lora_lite"])
    change(meta)
    out = path.with_name("edited.safetensors")
    save_file(tensors or load_file(path), out, {"format": "pt", "lora_lite": json.dumps(meta)})
    return out


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, _ = attached(LISTS["all kinds"])
    ll.save(model, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.pop("methods"), '"methods": None; wanted a list of objects'),
        (lambda meta: meta.update(methods=[]), r'"methods": \[\]; wanted a list of objects'),
        (lambda meta: meta.update(methods={"a": 1}), '"methods": .*; wanted a list of objects'),
        (lambda meta: meta.update(methods=[1, 2]), '"methods": .*; wanted a list of objects'),
        (lambda meta: meta.update(methods=meta["methods"] * 100), '"methods": .*; wanted a list of objects'),
        (lambda meta: meta["methods"][1].pop("targets"), r"lacks \['targets'\]"),
        (lambda meta: meta["methods"][1].update(targets={}), "has no targets"),
        (lambda meta: meta["methods"][1].update(variant=3), "names the variant 3; wanted a string"),
        (lambda meta: meta["methods"][1].update(diagonal=["elsewhere"]), "wanted some of its targets"),
        (lambda meta: meta["methods"][1].update(biased={"a": 1}), "wanted some of its targets"),
        (lambda meta: meta["methods"].reverse(), "missing keys|unexpected keys|wrong shapes"),
        (lambda meta: meta["methods"].append(meta["methods"][0]), "missing keys"),
        (lambda meta: meta["methods"].pop(), "unexpected keys"),
        (lambda meta: meta["methods"][3]["config"].update(token_ids=[1, 5]), "wrong shapes"),
        (lambda meta: meta["methods"][3]["config"].update(token_ids=[1, 5, 5]), "token ids, each once"),
        (lambda meta: meta["methods"][3]["config"].update(token_ids=[1, 5, 10**9]), "token_ids has 1000000000"),
        (lambda meta: meta["methods"][3]["config"].update(token_ids=[1, 5, -1]), "token ids, each once"),
    ],
)
def test_a_hostile_file_of_format_2_is_a_clear_error(saved: Path, change: Any, message: str) -> None:
    path, model = edited(saved, change), tiny_llama(bias=True)
    keys = sorted(model.state_dict())
    with pytest.raises(ll.LoraLiteError, match=message):
        ll.load(model, path)
    assert sorted(model.state_dict()) == keys


@pytest.mark.parametrize("ids", [[1, 5, 96], [-1, 5, 7], [5, 1, 7], [1, 5, 5]])
def test_a_files_indices_are_in_range_and_in_order(saved: Path, ids: list[int]) -> None:
    """They are made of the config; those of a file would index, and be searched in order of size."""
    tensors = load_file(saved) | {"model.embed_tokens.lora_ids": torch.tensor(ids)}
    with pytest.raises(ll.CheckpointError, match="lora_ids has indices out of their range or order"):
        ll.load(tiny_llama(bias=True), edited(saved, lambda meta: None, tensors))
    wrong = tensors | {"model.embed_tokens.lora_ids": torch.tensor([1.0, 5.0, 7.0])}
    with pytest.raises(ll.CheckpointError, match=r"no floating numbers, such as .*lora_ids \(torch.float32\)"):
        ll.load(tiny_llama(bias=True), edited(saved, lambda meta: None, wrong))


# ---- random numbers of a forward ------------------------------------------------------------------


class Noisy:
    name = "noisy"
    config = ll.AdapterConfig

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ll.ParamSpec]:
        return {"lora_w": ll.ParamSpec((d_out,), init="ones")}

    @staticmethod
    def forward(layer: ll.Layer, x: Tensor, y: Tensor) -> Tensor:
        if not layer.training:
            return y
        return y + layer.lora_w * torch.rand(y.shape, generator=layer.generator(y))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_draws_the_same_random_numbers_again(use_reentrant: bool) -> None:
    ll.register(Noisy)
    layer = nn.Linear(4, 4)
    adapter = ll.attach(layer, ll.AdapterConfig(variant="noisy", target_names="^$"))
    x = torch.randn(3, 4, requires_grad=True)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        y = run(x)
        torch.rand(5)  # the user's own numbers in between
        (gradient,) = torch.autograd.grad(y.pow(3).sum(), list(adapter.parameters())) if run is layer else (None,)
        if gradient is None:
            y.pow(3).sum().backward()
            gradient = next(adapter.parameters()).grad
        gradients.append(gradient)
    assert torch.equal(*gradients)
    assert not torch.equal(layer(x), layer(x))


# ---- training that stops and goes on ---------------------------------------------------------------

RESUMED = {
    **LISTS,
    "full": [ll.FullConfig(target_names="lm_head|norm|embed_tokens")],
    "norm": [ll.NormConfig()],
    "bias": [ll.BiasConfig()],
    "tokens": [ll.TokensConfig(token_ids=(1, 5, 7))],
    "vera": [ll.VeRAConfig(r=4)],
    "reft": [ll.ReFTConfig(r=2)],
    "lora with a bias": [ll.LoRAConfig(r=2, bias=True)],
    "activated lora": [ll.LoRAConfig(r=2, invocation_tokens=(20,))],
}


@pytest.mark.slow
@pytest.mark.parametrize("configs", RESUMED.values(), ids=RESUMED)
def test_a_resumed_training_ends_as_one_that_went_through(configs: list[Any], tmp_path: Path) -> None:
    def trainer() -> tuple[ll.Adapter, AdapterTrainer]:
        torch.manual_seed(0)
        model = tiny_llama(bias=True)
        adapter = ll.attach(model, configs)
        args = arguments(tmp_path, save_steps=2, max_steps=4, learning_rate=1e-2)
        return adapter, AdapterTrainer(model, args, train_dataset=Tokens())

    through, training = trainer()
    before = {key: value.clone() for key, value in through.state_dict().items()}
    training.train()
    again, training = trainer()
    training.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.steps == through.steps == 4
    wanted = through.state_dict()
    assert any(not torch.equal(wanted[key], value) for key, value in before.items())
    assert all(torch.equal(wanted[key], tensor) for key, tensor in again.state_dict().items())


# ---- ties, copies and histories -----------------------------------------------------------------------


def test_a_method_that_reads_a_tied_weight_is_refused_in_a_list_too() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    for configs in ([ll.TokensConfig(token_ids=(1, 5)), ll.DoRAConfig(r=2, target_names="lm_head")],) * 2:
        with pytest.raises(ll.TargetError, match="where another method of this adapter reads the weight"):
            ll.attach(model, configs)
        configs.reverse()
    assert not ll.adapters(model)


@pytest.mark.parametrize(
    "other",
    [ll.LoRAConfig(r=2, kinds="embedding", target_names="embed_tokens"), ll.FullConfig(target_names="lm_head")],
)
def test_one_method_on_all_that_share_a_weight_and_another_on_a_part_dont_merge(other: Any, tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    perturb(ll.attach(model, [ll.TokensConfig(token_ids=(1, 5)), other]))
    model(input_ids=IDS)
    ll.save(model, tmp_path / "a.safetensors")
    with pytest.raises(ll.TargetError):
        ll.merge(model)
    for untie in (True, False):
        with pytest.raises(ll.TargetError, match="one method acts on all that share the weight"):
            ll.merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out", untie=untie)


@pytest.mark.parametrize("configs", [LISTS["shared tensors twice"], LISTS["all kinds"]], ids=["vera", "all kinds"])
def test_a_file_of_a_copy_is_the_file(configs: list[Any], tmp_path: Path) -> None:
    """A copy's specs have lost their functions, and what is made again from the config stays out all the same."""
    model, adapter = attached(configs)
    ll.save(model, tmp_path / "a.safetensors")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        ll.save(twin, tmp_path / "b.safetensors")
        a, b = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
        ll.restore(model, tmp_path / "b.safetensors")
        adapter.load_state_dict(ll.adapters(twin)["default"].state_dict())


@pytest.mark.parametrize(
    "cfg",
    [
        ll.FullConfig(target_names="q_proj|lm_head", kinds="linear"),
        ll.AdaLoRAConfig(target_names="q_proj"),
        ll.BiasConfig(target_names="q_proj", kinds="linear"),
        ll.TokensConfig(token_ids=(1, 5), tied_weights="apart"),
    ],
    ids=lambda cfg: cfg.variant,
)
def test_the_new_methods_go_into_a_history(cfg: Any, tmp_path: Path) -> None:
    model, _ = attached(cfg)
    wanted = logits(model)
    ll.freeze_into(model)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-6)
    kept = logits(model)
    ll.save(model, tmp_path / "a.safetensors", "history")
    fresh = tiny_llama(bias=True)
    ll.load(fresh, tmp_path / "a.safetensors", "history")
    assert torch.equal(logits(fresh), kept)


def test_what_differs_by_layer_is_told_of_each_method() -> None:
    configs = [ll.LoRAConfig(r=2, target_names="q_proj", per_layer={f"{i}.self": {"r": 3 + i}}) for i in (0, 0, 1)]
    adapter = ll.attach(tiny_llama(), configs)
    path = "model.layers.{}.self_attn.q_proj"
    assert adapter.per_layer == {
        path.format(0): {"r": 3},
        f"{path.format(0)} (2)": {"r": 3},
        f"{path.format(1)} (3)": {"r": 4},
    }


def test_data_is_for_the_method_that_takes_it() -> None:
    model = tiny_llama()
    directions = {"directions": torch.eye(64)[:1]}
    adapter = ll.attach(model, [ll.LoRAConfig(r=2), ll.AbliterationConfig()], calibration_data=directions)
    before = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    adapter.configure(calibration_data={"directions": torch.eye(64)[1:2]})
    after = adapter.state_dict()
    assert {key.rpartition("_")[2] for key in after if not torch.equal(before[key], after[key])} == {"own", "v"}
    with pytest.raises(ll.ConfigError, match="'lora' takes no calibration_data"):
        ll.attach(model, [ll.LoRAConfig(r=2), ll.NormConfig()], "second").configure(calibration_data=directions)


def test_a_list_is_no_longer_than_a_file_may_hold(tmp_path: Path) -> None:
    model, cfg = tiny_llama(), ll.LoRAConfig(r=1, target_names="0.self_attn.q_proj")
    with pytest.raises(ll.ConfigError, match=r"65 configs\n  wanted one, or several .*, 64 at most"):
        ll.attach(model, [cfg] * 65)
    ll.attach(model, [cfg] * 64)
    ll.save(model, tmp_path / "a.safetensors")
    assert len(ll.load(tiny_llama(), tmp_path / "a.safetensors").methods) == 64


def test_an_adapter_of_several_is_named_once_where_it_does_not_commute() -> None:
    model = tiny_llama()
    perturb(ll.attach(model, [ll.IA3Config(target_names="q_proj")] * 3))
    perturb(ll.attach(model, ll.LoRAConfig(r=2, target_names="q_proj"), "last"))
    with pytest.raises(ll.TargetError, match=r"q_proj: default would act differently on a weight with last merged"):
        ll.merge(model, "last")
