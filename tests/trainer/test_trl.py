"""TRL's trainers with the mixin: what they train, what they save, and the reference that they take."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import config, perturb, quantized, tiny_llama
from safetensors.torch import load_file
from test_audit import FEW
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel
from trl.trainer.utils import hash_module
from trl_tiny import KINDS, REFERRING, logged, trainer_of

import lora_lite as ll
from lora_lite.trainer import Reference, reference, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),  # torch's, on a machine without an accelerator
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),  # which TRL 1.16 still calls
]


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No trainer loads a second model."""

    def load(cls: type, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"a second model is loaded: {cls.__name__} from {args}")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(load))


def model_for(kind: str, **fields: Any) -> Any:
    """A model that was made from a config, with a fresh adapter and its head in it where the trainer needs one."""
    if kind != "reward":
        model = tiny_llama()
        ll.attach(model, config("lora", **fields))
        return model
    torch.manual_seed(0)
    sizes = {**FEW, "intermediate_size": 48, "num_key_value_heads": 2, "num_labels": 1, "pad_token_id": 0}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes))
    torch.manual_seed(1)
    ll.attach(model, [config("lora", **fields), ll.FullConfig(target_names="score")])
    return model


@pytest.fixture(scope="module")
def base_in_nf4(tiny: str) -> Any:
    return quantized(tiny, "nf4")  # of the module, so it comes before loading is forbidden


@pytest.fixture
def nf4(base_in_nf4: Any) -> Any:
    """An nf4 base with a fresh adapter."""
    model = copy.deepcopy(base_in_nf4)
    ll.attach(model, config("lora"))
    return model


# ---- every trainer ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_saves_the_adapter_alone_and_resumes_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(kind, model_for(kind), tmp_path / "run", **options)
    start = {key: tensor.clone() for key, tensor in ll.adapters(whole.model)["default"].state_dict().items()}
    whole.train()
    moved = ll.adapters(whole.model)["default"].state_dict()
    assert not any(torch.equal(moved[key], start[key]) for key in start if key.endswith("lora_B"))
    half, end = (tmp_path / "run" / f"checkpoint-{step}" for step in (2, 4))
    assert [file.name for file in end.glob("*.safetensors")] == ["default.safetensors"]

    again = trainer_of(kind, model_for(kind), tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(half))
    assert again.state.global_step == 4
    for key, tensor in ll.adapters(again.model)["default"].state_dict().items():
        assert torch.equal(tensor, moved[key]), key

    fresh = model_for(kind)
    ll.detach(fresh)
    ll.load(fresh, end / "default.safetensors")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.equal(fresh.eval()(ids).logits, whole.model.eval()(ids).logits)


def test_a_head_that_is_trained_in_no_adapter_is_named(tmp_path: Path) -> None:
    model = model_for("reward")
    ll.detach(model)
    ll.attach(model, config("lora"))
    model.score.requires_grad_(True)
    with pytest.raises(ll.TargetError, match=r": score\.weight\n  .*ll\.FullConfig\(target_names='score'\)\]\); or"):
        trainer_of("reward", model, tmp_path)


def test_a_head_in_no_adapter_is_a_warning(tmp_path: Path, log: list[str]) -> None:
    warned = r"WARNING .*: the head is in no adapter, .*: score\.weight\n"
    model = model_for("reward")
    trainer_of("reward", model, tmp_path)
    trainer_of("sft", model_for("sft"), tmp_path)  # the head of a language model comes with it
    assert not [line for line in log if "the head" in line]
    ll.detach(model)
    ll.attach(model, config("lora"))
    trainer_of("reward", model, tmp_path)
    lines = [line for line in log if re.match(warned, line)]
    assert len(lines) == 1
    assert lines[0].endswith("to train it: attach(model, [cfg, ll.FullConfig(target_names='score')])")
    ll.attach(model, config("lora", target_names="score"), name="head")
    trainer_of("reward", model, tmp_path)
    assert len([line for line in log if re.match(warned, line)]) == 1


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "grpo", "rloo"])
def test_an_adapter_on_a_head_that_the_loss_reads_stops_the_first_step(kind: str, tmp_path: Path) -> None:
    model = model_for(kind, target_names="_proj$|lm_head")
    perturb(ll.adapters(model)["default"])
    start = ll.adapters(model)["default"].state_dict()["lm_head.lora_B"].clone()
    with pytest.raises(ll.TargetError, match="reads the weight itself: lm_head\n"):  # though generation calls it
        trainer_of(kind, model, tmp_path).train()
    assert torch.equal(ll.adapters(model)["default"].state_dict()["lm_head.lora_B"], start)


def test_online_dpo_calls_a_head_and_trains_it(tmp_path: Path) -> None:
    model = model_for("online_dpo", target_names="_proj$|lm_head")
    perturb(ll.adapters(model)["default"])
    start = ll.adapters(model)["default"].state_dict()["lm_head.lora_B"].clone()
    trainer = trainer_of("online_dpo", model, tmp_path)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(
        math.log(2), abs=5e-5
    )  # of four digits: the reference has the head as it was
    assert not torch.equal(ll.adapters(model)["default"].state_dict()["lm_head.lora_B"], start)


def with_a_frozen_head(kind: str) -> Any:
    """A model for this trainer, with an earlier adapter on its head."""
    model = model_for(kind)
    before = ll.attach(model, config("lora", target_names="lm_head"), name="before")
    perturb(before, 0.5)
    for parameter in before.parameters():
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo", "rloo"])
def test_a_frozen_adapter_on_a_head_that_the_loss_reads_stops_the_first_step(kind: str, tmp_path: Path) -> None:
    trainer = trainer_of(kind, with_a_frozen_head(kind), tmp_path)
    with pytest.raises(ll.TargetError, match=r"the first training step\n.*reads the weight itself: lm_head\n"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_an_adapter_on_a_head_that_an_evaluation_reads_stops_it(kind: str, tmp_path: Path) -> None:
    rows = Dataset.from_list(KINDS[kind].rows * 2)
    trainer = trainer_of(kind, with_a_frozen_head(kind), tmp_path, {"eval_dataset": rows})
    with pytest.raises(ll.TargetError, match=r"the first step of the evaluation\n.*weight itself: lm_head\n"):
        trainer.evaluate()
    with ll.disabled(trainer.model):
        base = trainer.evaluate()["eval_loss"]
    with pytest.raises(ll.TargetError, match="the first step of the evaluation"):  # it was off, not passed
        trainer.evaluate()
    with ll.scaled(trainer.model, 0.0, "before"):
        assert trainer.evaluate()["eval_loss"] == base
        assert not any(module._forward_pre_hooks for module in trainer.model.modules())


def test_a_step_without_compute_loss_has_no_place_for_a_penalty(tmp_path: Path) -> None:
    for kind in ("sft", "online_dpo"):
        model = model_for(kind)
        ll.detach(model)
        adapter = ll.attach(model, config("kasa"))
        start = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
        trainer = trainer_of(kind, model, tmp_path, max_steps=1)
        if kind == "sft":
            trainer.train()
            continue
        match = r"OurOnlineDPOTrainer's training_step doesn't call compute_loss, .* without its penalty \(kasa\)\n  use"
        with pytest.raises(ll.TargetError, match=match):
            trainer.train()
        assert all(torch.equal(tensor, start[key]) for key, tensor in adapter.state_dict().items())


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "cpo", "orpo"])
def test_on_a_quantised_base_an_adapter_keeps_its_dtype(kind: str, nf4: Any, tmp_path: Path) -> None:
    adapter = ll.adapters(nf4)["default"]
    perturb(adapter)
    start = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    trainer = trainer_of(kind, nf4, tmp_path, max_steps=1)
    assert all(torch.equal(tensor, start[key]) for key, tensor in adapter.state_dict().items())
    trainer.train()
    assert {tensor.dtype for tensor in adapter.parameters()} == {torch.float32}


# ---- the reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"precompute_ref_log_probs": True}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dpo_on_a_quantised_base_starts_from_ln_2(
    checkpointing: bool, settings: dict[str, Any], nf4: Any, tmp_path: Path
) -> None:
    before = len(list(nf4.modules()))
    trainer = trainer_of("dpo", nf4, tmp_path, max_steps=3, activation_checkpointing=checkpointing, **settings)
    trainer.train()
    losses = logged(trainer, "loss")
    assert abs(losses[0] - math.log(2)) < 1e-5
    assert logged(trainer, "rewards/margins")[0] == 0
    assert losses[-1] < losses[0] - 1e-3
    assert len(list(nf4.modules())) == before


def test_kto_on_a_quantised_base_starts_where_policy_and_reference_are_one(nf4: Any, tmp_path: Path) -> None:
    trainer = trainer_of("kto", nf4, tmp_path)
    trainer.train()
    assert logged(trainer, "loss")[0] == 0.5
    assert logged(trainer, "kl")[0] == 0 < logged(trainer, "kl")[1]


def figures(trainer: Any) -> dict[str, list[float]]:
    trainer.train()
    return {name: logged(trainer, name) for name in ("loss", "kl", "rewards/margins") if logged(trainer, name)}


@pytest.mark.parametrize("kind", REFERRING)
def test_of_a_fresh_adapter_the_reference_is_the_base(kind: str, tmp_path: Path) -> None:
    given = model_for(kind)
    by_itself = figures(trainer_of(kind, model_for(kind), tmp_path))
    assert by_itself == figures(trainer_of(kind, given, tmp_path, {"ref_model": reference(given)}))


@pytest.mark.parametrize("kind", ["dpo", "kto", "online_dpo"])
def test_a_reference_of_the_users_wins(kind: str, tmp_path: Path) -> None:
    losses = []
    for ref_model in (None, tiny_llama(seed=7)):
        model = model_for(kind)
        trainer = trainer_of(kind, model, tmp_path, {"ref_model": ref_model})
        assert trainer.ref_model is ref_model or ref_model is None
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] != losses[1]


def test_the_base_as_the_reference_is_what_a_second_model_would_be(tmp_path: Path) -> None:
    base, models = tiny_llama(), [model_for("dpo") for _ in range(2)]
    for model in models:
        perturb(ll.adapters(model)["default"])
    ours, theirs = (
        figures(trainer_of("dpo", model, tmp_path, {"ref_model": ref_model}))
        for model, ref_model in zip(models, (reference(models[0]), base), strict=True)
    )
    assert ours == theirs
    assert abs(ours["loss"][0] - math.log(2)) > 1e-3


@pytest.mark.parametrize("kind", REFERRING)
def test_a_trained_adapter_starts_from_itself(kind: str, tmp_path: Path, log: list[str]) -> None:
    name = "kl" if kind in ("grpo", "rloo") else "rewards/margins"
    firsts = []
    for choose in (lambda model: None, reference):
        model = model_for(kind)
        perturb(ll.adapters(model)["default"])
        trainer = trainer_of(kind, model, tmp_path, {"ref_model": choose(model)}, max_steps=1)
        trainer.train()
        firsts.append(logged(trainer, name)[0])
    assert firsts[0] == 0 != firsts[1]
    assert sum(f"Our{KINDS[kind].trainer.__name__}: the reference is this model with its" in line for line in log) == 1
    count = sum(parameter.numel() for parameter in ll.adapters(model)["default"].parameters())
    assert any(f"({count:,} numbers are copied), which for fresh ones is the base\n" in line for line in log)


def test_the_frozen_copy_is_that_of_a_second_model(tmp_path: Path) -> None:
    """As TRL does with a PeftModel that comes trained: against a deep copy of the model as it was."""
    models = [model_for("dpo") for _ in range(2)]
    for model in models:
        perturb(ll.adapters(model)["default"])
    second = copy.deepcopy(models[1])
    ours = figures(trainer_of("dpo", models[0], tmp_path, max_steps=3))
    assert ours == figures(trainer_of("dpo", models[1], tmp_path, {"ref_model": second}, max_steps=3))
    assert ours["rewards/margins"][-1] != 0


@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo"])
def test_a_resumed_training_has_the_reference_that_it_began_with(kind: str, tmp_path: Path, log: list[str]) -> None:
    """Whatever the adapter is where it goes on: that of the start, a fresh one, or that of the checkpoint."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    model = model_for(kind)
    perturb(ll.adapters(model)["default"])
    whole = trainer_of(kind, model, tmp_path / "run", **options)
    whole.train()
    half = tmp_path / "run" / "checkpoint-2"
    name = "kl" if kind in ("grpo", "rloo") else "rewards/margins"

    def goes_on(model: Any) -> None:
        again = trainer_of(kind, model, tmp_path / "again", **options)
        again.train(resume_from_checkpoint=str(half))
        for figure in ("loss", name):
            assert logged(again, figure)[-2:] == logged(whole, figure)[-2:]
        for key, tensor in ll.adapters(model)["default"].state_dict().items():
            assert torch.equal(tensor, ll.adapters(whole.model)["default"].state_dict()[key]), key

    goes_on(model_for(kind))
    loaded = model_for(kind)
    ll.detach(loaded)
    ll.load(loaded, half / "default.safetensors")
    goes_on(loaded)
    assert not [line for line in log if "reference.pt" in line]
    (half / "reference.pt").unlink()
    trainer_of(kind, model_for(kind), tmp_path / "again", **options).train(resume_from_checkpoint=str(half))
    assert any(re.match(r"WARNING .*reference\.pt is missing: the reference is the model with its", x) for x in log)


def test_computed_before_a_resume_the_reference_has_to_be_that_of_the_start(tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "precompute_ref_log_probs": True}
    model = model_for("dpo")
    perturb(ll.adapters(model)["default"])
    ll.save(model, tmp_path / "start.safetensors")
    trainer_of("dpo", model, tmp_path, **options).train()
    model = model_for("dpo")
    with pytest.raises(
        ll.CheckpointError, match=r"began with another reference than .*\n  attach the adapters that it"
    ):
        trainer_of("dpo", model, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    ll.restore(model, tmp_path / "start.safetensors")
    trainer_of("dpo", model, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_grpo_gives_beta_back_and_takes_either_reference(tmp_path: Path) -> None:
    trainer = trainer_of("grpo", model_for("grpo"), tmp_path, beta=0.25)
    assert (trainer.beta, trainer.args.beta) == (0.25, 0.25)
    assert isinstance(trainer.ref_model, Reference)
    assert trainer_of("grpo", model_for("grpo"), tmp_path, beta=0.0).ref_model is None
    with pytest.raises(ValueError, match="reward"):  # and where the constructor raises
        trainer_of("grpo", model_for("grpo"), tmp_path, {"args": trainer.args, "reward_funcs": []})
    assert trainer.args.beta == 0.25


def test_what_is_remembered_is_not_taken_for_another_reference() -> None:
    """TRL keeps log-probabilities on disk by this hash."""
    model = tiny_llama()
    adapter = ll.attach(model, config("lora"))
    perturb(adapter)
    hashes = [hash_module(reference(model)), hash_module(snapshot(model))]
    perturb(adapter, seed=2)
    hashes += [hash_module(snapshot(model))]
    adapter.scale = 0.5
    hashes += [hash_module(snapshot(model))]
    assert len(set(hashes)) == 4
    assert hash_module(reference(model)) == hashes[0]


def test_files_are_of_the_adapter_and_not_of_its_copy(tmp_path: Path) -> None:
    trainer = trainer_of("dpo", model_for("dpo"), tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "end"))
    stored = load_file(tmp_path / "end" / "default.safetensors")
    assert {key: tensor.shape for key, tensor in stored.items()} == {
        key: tensor.shape for key, tensor in ll.adapters(trainer.model)["default"].state_dict().items()
    }
