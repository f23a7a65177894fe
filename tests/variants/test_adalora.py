"""AdaLoRA beside PEFT's: the same outputs, gradients and penalty, and after every step the same ranks."""

import copy
import inspect
import json
import random
import shutil
import statistics
import textwrap
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import IDS, OneLinear, moe, perturb, tiny_llama
from test_ecosystem import Tokens, arguments
from transformers import TrainingArguments

import lora_lite as ll
from lora_lite.families.allocator import budget
from lora_lite.trainer import AdapterTrainer

NAMES = ["q_proj", "k_proj", "down_proj"]
SCHEDULES: list[dict[str, Any]] = [
    {"total_step": 12},
    {"total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2},
    {"total_step": 11, "tinit": 1, "tfinal": 4, "deltaT": 3, "beta1": 0.6, "beta2": 0.95},
    {"total_step": 12, "tinit": 10, "tfinal": 1, "target_r": 1},
]


def both(alpha: float = 8.0, **fields: Any) -> tuple[Any, Any, list[tuple[Any, Any]]]:
    """A model with our AdaLoRA, one with PEFT's at the same values, and their parameters side by side."""
    fields = {"init_r": 6, "target_r": 2, "total_step": 12} | fields
    base = tiny_llama()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=NAMES, lora_alpha=alpha, **fields)
    )
    ours = copy.deepcopy(base)
    adapter = ll.attach(ours, ll.AdaLoRAConfig(target_names=NAMES, alpha=alpha, **fields))
    live, pairs = dict(theirs.named_parameters()), []
    for key, tensor in adapter.named_tensors():
        if isinstance(tensor, torch.nn.Parameter):
            pairs.append((tensor, live[f"base_model.model.{key}.default"]))
    copy_to_peft(pairs)
    return ours, theirs, pairs


@torch.no_grad()
def copy_to_peft(pairs: list[tuple[Any, Any]]) -> None:
    for mine, other in pairs:
        other.copy_(mine)


def ranks(adapter: ll.Adapter) -> list[int]:
    return [int((t != 0).sum()) for key, t in adapter.named_tensors() if key.endswith("lora_E")]


def test_outputs_gradients_and_penalty_are_those_of_peft() -> None:
    ours, theirs, pairs = both(alpha=3.0, orth_reg_weight=0.3)
    adapter = ll.adapters(ours)["default"]
    perturb(adapter, 0.2)
    copy_to_peft(pairs)
    out, other = ours(input_ids=IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(out.logits, other.logits, rtol=1e-4, atol=1e-5)
    penalty = adapter.penalty()
    assert penalty is not None
    torch.testing.assert_close(out.loss + penalty, other.loss)  # PEFT's loss has the penalty in it
    assert penalty > 0.1
    (out.loss + penalty).backward()
    other.loss.backward()
    for mine, theirs_too in pairs:
        assert mine.grad.abs().sum() > 0
        torch.testing.assert_close(mine.grad, theirs_too.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_step_masks_what_peft_masks(schedule: dict[str, Any]) -> None:
    """AdamW, penalty and allocator, from the start to two steps past the end."""
    ours, theirs, pairs = both(**schedule)
    adapter = ll.adapters(ours)["default"]
    optimizers = [torch.optim.AdamW([pair[i] for pair in pairs], lr=1e-2) for i in (0, 1)]
    shrunk = []
    for step in range(1, schedule["total_step"] + 3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(input_ids=IDS, labels=IDS).loss
            (loss + adapter.penalty() if model is ours else loss).backward()
            optimizer.step()
        adapter.step()
        theirs.base_model.update_and_allocate(step)
        for mine, other in pairs:
            assert torch.equal(mine == 0, other == 0), f"step {step}"
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=2e-5)
        shrunk.append(sum(ranks(adapter)))
    layers = len(adapter.targets)
    assert len(set(shrunk)) > (2 if schedule.get("tinit") != 10 else 1)
    assert shrunk[schedule.get("tinit", 0)] <= 6 * layers
    end = schedule["total_step"] - schedule.get("tfinal", 0)
    assert set(shrunk[end - 1 :]) == {schedule.get("target_r", 2) * layers}, "to the budget, and no further"
    assert all(n == 6 * layers for n in shrunk[: schedule.get("tinit", 0)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
@pytest.mark.parametrize("stop", [2, 3, 5])  # before the first mask, as ranks fall, and once they stay
def test_training_stopped_and_resumed_ends_as_training_through(stop: int, tmp_path: Path) -> None:
    def trainer() -> tuple[ll.Adapter, AdapterTrainer]:
        torch.manual_seed(0)
        model = tiny_llama()
        cfg = ll.AdaLoRAConfig(target_names=NAMES, init_r=6, target_r=2, total_step=6, tinit=2, tfinal=2)
        adapter = ll.attach(model, cfg)
        args = arguments(tmp_path, save_steps=1, learning_rate=1e-2)
        return adapter, AdapterTrainer(model, args, train_dataset=Tokens())

    through, training = trainer()
    training.train()
    again, training = trainer()
    training.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert again.steps == through.steps == 6
    assert sum(ranks(through)) == 2 * len(through.targets)
    assert len(set(ranks(through))) > 1
    wanted = through.state_dict()
    assert any(key.endswith("lora_B_unc") and tensor.any() for key, tensor in wanted.items())
    assert all(torch.equal(wanted[key], tensor) for key, tensor in again.state_dict().items())


def stepped(steps: int = 4, learning_rate: float = 1e-2, **fields: Any) -> tuple[Any, ll.Adapter]:
    """A model trained for some steps, its schedule as far along."""
    torch.manual_seed(0)
    model = tiny_llama()
    settings = {"target_names": NAMES, "init_r": 6, "target_r": 2, "total_step": 4}
    adapter = ll.attach(model, ll.AdaLoRAConfig(**settings | fields))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(input_ids=IDS, labels=IDS).loss + adapter.penalty()).backward()
        optimizer.step()
        adapter.step()
    return model, adapter


def test_a_finished_adapter_is_saved_without_statistics_and_loads_bit_equal(tmp_path: Path) -> None:
    model, adapter = stepped()
    ll.save(model, tmp_path / "a.safetensors")
    trained = sum(p.numel() * p.element_size() for p in adapter.parameters())
    assert (tmp_path / "a.safetensors").stat().st_size < trained + 200 * len(adapter.targets) * 3 + 4000
    fresh = tiny_llama()
    loaded = ll.load(fresh, tmp_path / "a.safetensors")
    assert ranks(loaded) == ranks(adapter)
    assert sum(ranks(loaded)) == 2 * len(adapter.targets)
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_save_whose_schedule_was_never_stepped_says_so(tmp_path: Path, log: list[str]) -> None:
    def warnings_of_save(model: Any) -> list[str]:
        log.clear()
        ll.save(model, tmp_path / "a.safetensors")
        return [line for line in log if line.startswith("WARNING")]

    model, _ = stepped(steps=0)
    (warning,) = warnings_of_save(model)
    assert "'adalora' has a schedule, and no step of it was taken" in warning
    assert "call adapter.step()" in warning
    fresh = tiny_llama()
    again = ll.load(fresh, tmp_path / "a.safetensors")
    assert again.steps == 0
    assert not warnings_of_save(fresh), "a loaded adapter may have been finished elsewhere"
    again.steps = 0
    assert warnings_of_save(fresh), "its count is known now"
    assert not warnings_of_save(stepped(steps=1)[0])
    plain = tiny_llama()
    ll.attach(plain, ll.LoRAConfig(r=2))
    assert not warnings_of_save(plain)


def test_a_layer_without_a_gradient_is_the_first_to_give_up_its_ranks() -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"used": OneLinear(), "unused": OneLinear()})
    adapter = ll.attach(model, ll.AdaLoRAConfig(target_names="proj", init_r=4, target_r=2, total_step=3))
    perturb(adapter, 0.3)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model["used"](torch.randn(5, 16)).square().sum().backward()
        optimizer.step()
        adapter.step()
    assert ranks(adapter) == [4, 0]


def test_a_step_without_any_gradient_is_an_error() -> None:
    model, adapter = stepped(steps=0)
    perturb(adapter)
    with pytest.raises(ll.TargetError, match=r"step 1 of 'adalora': none .* had a gradient.*\n.*before zero_grad\(\)"):
        adapter.step()
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.zero_grad(set_to_none=False)
    with pytest.raises(ll.TargetError, match="had a gradient"):
        adapter.step()
    assert adapter.steps == 0


def test_a_step_of_sharded_tensors_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter = stepped(steps=0)
    monkeypatch.setattr("lora_lite.base.sharding.is_sharded", lambda tensor: True)
    with pytest.raises(ll.TargetError, match=r"'adalora' chooses ranks by whole tensors.*\n  train it by DDP"):
        adapter.step()


def test_a_warmup_from_a_learning_rate_of_0_masks_nothing_that_it_needs() -> None:
    assert ranks(stepped(steps=1, learning_rate=0.0)[1]) == [0] * 6
    assert sum(ranks(stepped(steps=1)[1])) == budget(ll.AdaLoRAConfig(total_step=4, target_r=2), 1, 36, 6)


def test_without_total_step_it_is_for_inference() -> None:
    model, adapter = stepped(steps=0, total_step=None)
    assert not any("_ipt" in key or "_unc" in key for key, _ in adapter.named_tensors())
    model(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(ll.ConfigError, match=r"total_step=None\) is for inference.*\n  attach with total_step="):
        adapter.step()


def test_layers_of_fewer_ranks_keep_the_scale_of_all() -> None:
    """As a shrunk folder of PEFT has them; a layer may have none left."""
    model = OneLinear()
    x = torch.randn(3, 16)
    base = model(x)
    adapter = ll.attach(model, ll.AdaLoRAConfig(target_names="proj", per_layer={"proj": {"r": 2}}))
    perturb(adapter, 0.5)
    a, b, e = (dict(adapter.named_tensors())[f"proj.lora_{name}"] for name in "ABE")
    assert a.shape == (2, 16)
    torch.testing.assert_close(model(x), base + x @ (b @ (e * a)).mT * 8 / (12 + 1e-5))
    ll.detach(model)
    none = ll.attach(model, ll.AdaLoRAConfig(target_names="proj", r=0, init_r=12))
    assert torch.equal(model(x), base)
    model(x).sum().backward()
    assert none.penalty() == 0


def test_a_rank_of_0_is_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = ll.attach(
        model, ll.AdaLoRAConfig(target_names=NAMES, per_layer={"k_proj": {"r": 0}, "q_proj": {"r": 3}}, total_step=5)
    )
    perturb(adapter)
    ll.save(model, tmp_path / "a.safetensors")
    fresh = tiny_llama()
    loaded = ll.load(fresh, tmp_path / "a.safetensors")
    assert [t.shape[0] for key, t in loaded.named_tensors() if key.endswith("lora_E")] == [3, 0, 12] * 2
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        assert torch.equal(fresh(input_ids=IDS).logits, wanted)
        ll.merge(fresh)
        torch.testing.assert_close(fresh(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-5)


def test_each_expert_has_the_importance_of_its_own_gradient() -> None:
    """A view of an expert shows a slice, whose `.grad` torch never fills."""
    torch.manual_seed(0)
    model = moe("qwen3")
    cfg = ll.AdaLoRAConfig(init_r=4, target_r=2, total_step=4, kinds=("experts",), target_names="experts")
    adapter = ll.attach(model, cfg)
    perturb(adapter, 0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    tensors = {key: t.detach().clone() for key, t in adapter.named_tensors()}
    trained = {key: p.grad.clone() for key, p in adapter.named_tensors() if isinstance(p, torch.nn.Parameter)}
    adapter.step()
    now = dict(adapter.named_tensors())
    for key, gradient in trained.items():
        torch.testing.assert_close(now[f"{key}_ipt"], 0.15 * (tensors[key] * gradient).abs())
        assert now[f"{key}_ipt"].flatten(1).any(1).sum() > 1, "more than one expert was at work"


def test_a_history_keeps_it_as_one_pair_of_products() -> None:
    """In float64, where a history compares, its products aren't rounded to the factors' float32."""
    model, _ = stepped()
    wanted = model(input_ids=IDS).logits.detach()
    ll.freeze_into(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    assert ll.history(model)[0].ranks


@pytest.mark.parametrize(
    ("fields", "wanted"), [({}, (12, 12)), ({"r": 4}, (4, 4)), ({"init_r": 6}, (6, 6)), ({"init_r": 6, "r": 2}, (2, 6))]
)
def test_r_is_init_r_where_nothing_else_is_said(fields: dict[str, int], wanted: tuple[int, int]) -> None:
    cfg = ll.AdaLoRAConfig(**fields)
    assert (cfg.r, cfg.init_r) == wanted
    assert ll.AdaLoRAConfig.from_dict(cfg.to_dict()) == cfg


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_r": 0}, r"init_r=0\): wanted a whole number, 1 or more"),
        ({"r": 13, "init_r": 12}, "at most init_r = 12"),
        ({"r": -1, "init_r": 3}, "0 or more"),
        ({"deltaT": 0}, "deltaT"),
        ({"tinit": True}, "tinit"),
        ({"alpha": 0.0}, "a number above 0"),
        ({"beta1": 1.0}, "from 0 to below 1"),
        ({"orth_reg_weight": -1.0}, "orth_reg_weight"),
        ({"total_step": 10, "tinit": 4, "tfinal": 6}, r"at least tinit \+ tfinal \+ 1 = 11"),
    ],
)
def test_fields_that_can_not_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        ll.AdaLoRAConfig(**fields)


@pytest.mark.slow
def test_a_trainer_alone_shrinks_the_real_model_to_its_budget(
    real_base: Any, real_tokenizer: Any, tmp_path: Path
) -> None:
    """12 steps on the docstrings of the standard library: 210 layers, 2,520 ranks that become 840."""
    functions = [
        f for m in (statistics, random, textwrap, json, shutil) for _, f in inspect.getmembers(m, inspect.isroutine)
    ]
    texts = [inspect.getdoc(function) or "" for function in functions]
    ids = [real_tokenizer(text).input_ids[:48] for text in texts if len(text) > 200]
    rows = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in ids if len(row) == 48]
    trained, kept_back = rows[4:], {key: torch.stack([row[key] for row in rows[:4]]) for key in rows[0]}
    model = real_base().float()
    cfg = ll.AdaLoRAConfig(init_r=12, target_r=4, alpha=32.0, total_step=12, tinit=2, tfinal=3, orth_reg_weight=0.1)
    adapter = ll.attach(model, cfg)
    with torch.no_grad():
        before = float(model.eval()(**kept_back).loss)
    args = TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=1, learning_rate=1e-2, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    AdapterTrainer(model, args, train_dataset=trained).train()
    with torch.no_grad():
        after = float(model.eval()(**kept_back).loss)
    ranks = [int(tensor.count_nonzero()) for key, tensor in adapter.named_tensors() if key.endswith("lora_E")]
    assert (len(ranks), sum(ranks), adapter.steps) == (210, 840, 12)
    print(f"\nheld-out loss {before:.3f} -> {after:.3f}, {min(ranks)} to {max(ranks)} ranks a layer", end="")
    assert after < before - 0.1
