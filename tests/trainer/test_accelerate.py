"""Accelerate's save_state and load_state keep the adapters alone, and training goes on to the same bits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from models import attach, config, loss_of, perturb, tiny_llama
from processes import both_pass
from safetensors import safe_open
from torch import nn

import lora_lite as ll
from lora_lite.trainer.accelerate import keep_adapters

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # torch's, without an accelerator


def prepared(*names: str, seed: int = 5) -> tuple[Accelerator, Any, Any, Any]:
    """An accelerator that keeps adapters, with a model with dropout, an optimizer and a schedule."""
    accelerator = Accelerator(cpu=True)
    keep_adapters(accelerator)
    model = tiny_llama()
    torch.manual_seed(seed)
    for name in names:
        ll.attach(model, config("lora", dropout=0.2), name)
    optimizer = torch.optim.AdamW([p for a in ll.adapters(model).values() for p in a.parameters()], lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
    model, optimizer, schedule = accelerator.prepare(model.train(), optimizer, schedule)
    return accelerator, model, optimizer, schedule


def train(parts: tuple[Accelerator, Any, Any, Any], steps: int) -> list[float]:
    accelerator, model, optimizer, schedule = parts
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{n}:{key}": t.clone() for n, a in ll.adapters(model).items() for key, t in a.state_dict().items()}


def test_a_state_holds_the_adapters_alone_and_training_goes_on_from_it(tmp_path: Path) -> None:
    whole = prepared("default", "fr")
    train(whole, 2)
    ll.adapters(whole[1])["fr"].scale = 0.5
    whole[0].save_state(str(tmp_path))
    last, end = train(whole, 2), values(whole[1])
    assert {file.name for file in tmp_path.iterdir()} == {
        "default.safetensors",
        "fr.safetensors",
        "optimizer.bin",
        "scheduler.bin",
        "random_states_0.pkl",
    }
    with safe_open(tmp_path / "fr.safetensors", "pt") as file:
        assert all(".lora_" in key for key in file.keys())  # noqa: SIM118

    again = prepared("default", "fr", seed=6)
    base = copy.deepcopy(again[1].state_dict())
    again[0].load_state(str(tmp_path))
    assert all(torch.equal(t, base[key]) for key, t in again[1].state_dict().items() if "lora_" not in key)
    assert ll.adapters(again[1])["fr"].scale == 0.5
    assert train(again, 2) == last  # losses with dropout: random states, moments and learning rates came back
    assert all(torch.equal(t, end[key]) for key, t in values(again[1]).items())


def test_schedules_go_on_and_models_without_adapters_go_as_ever(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    keep_adapters(accelerator)
    model = accelerator.prepare(tiny_llama(num_hidden_layers=1))
    parts = [tiny_llama(num_hidden_layers=1) for _ in range(2)]
    for part in parts:
        attach(part, ll.AdaLoRAConfig(init_r=4, target_r=2, total_step=9))
        perturb(ll.adapters(part)["default"])
    parts = [accelerator.prepare(part) for part in parts]
    for part in parts:
        ll.adapters(part)["default"].steps = 3
        loss_of(part).backward()
    accelerator.save_state(str(tmp_path))
    names = {file.name for file in tmp_path.iterdir() if file.suffix == ".safetensors"}
    assert names == {"model.safetensors", "default_1.safetensors", "default_2.safetensors"}
    before = [values(part) for part in parts]
    head = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for part in parts:
        adapter = ll.adapters(part)["default"]
        perturb(adapter, seed=9)
        adapter.steps = 0
    accelerator.load_state(str(tmp_path))
    assert torch.equal(model.lm_head.weight, head)
    assert [ll.adapters(part)["default"].steps for part in parts] == [3, 3]
    assert all(torch.equal(t, b[key]) for part, b in zip(parts, before, strict=True) for key, t in values(part).items())


def test_what_no_file_would_hold_is_refused_and_so_is_another_folder(tmp_path: Path) -> None:
    accelerator, model, _, _ = prepared("default")
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ll.TargetError, match=r"1 parameters would be trained and are in no adapter.*lm_head\.weight"):
        accelerator.save_state(str(tmp_path / "a"))
    assert not list((tmp_path / "a").glob("*.safetensors"))
    model.lm_head.weight.requires_grad_(False)
    accelerator.save_state(str(tmp_path / "b"))
    (tmp_path / "b" / "default.safetensors").unlink()
    with pytest.raises(ll.CheckpointError, match=r"no checkpoint of these adapters\n  missing: .*default\.safetensors"):
        accelerator.load_state(str(tmp_path / "b"))


def test_files_of_one_name_are_refused_and_a_second_call_changes_nothing(tmp_path: Path) -> None:
    def of(*names: str | None) -> Accelerator:
        accelerator = Accelerator(cpu=True)
        keep_adapters(accelerator)
        keep_adapters(accelerator)
        for name in names:
            model = tiny_llama(num_hidden_layers=1)
            if name is not None:
                perturb(ll.attach(model, config("lora"), name))
            accelerator.prepare(model)
        return accelerator

    with pytest.raises(
        ll.ConfigError, match=r"fr_1\.safetensors would be the file of two adapters\n  give the adapter"
    ):
        of("fr_1", "fr").save_state(str(tmp_path / "two"))
    for names in (("model",), (None, "model")):
        with pytest.raises(ll.ConfigError, match=r"model(_1)?\.safetensors would be the file of a model, too"):
            of(*names).save_state(str(tmp_path / "model"))
    for folder in ("two", "model"):
        assert not list((tmp_path / folder).glob("*.safetensors"))
    accelerator = of("default", None)  # the second model's weights are its own
    accelerator.save_state(str(tmp_path / "twice"))
    names = {file.name for file in (tmp_path / "twice").iterdir() if file.suffix == ".safetensors"}
    assert names == {"default.safetensors", "model.safetensors"}
    accelerator.load_state(str(tmp_path / "twice"))


def test_another_hook_may_have_taken_models_before(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    first, second = (tiny_llama(num_hidden_layers=1) for _ in range(2))
    adapter = ll.attach(second, config("lora"))
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.pop(0))
    accelerator.register_load_state_pre_hook(lambda models, folder: models.remove(first))
    keep_adapters(accelerator)
    accelerator.prepare(first, second)
    perturb(adapter)
    before = values(second)
    accelerator.save_state(str(tmp_path))
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {"default_1.safetensors"}
    perturb(adapter, seed=3)
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(t, before[key]) for key, t in values(second).items())


@pytest.mark.slow
def test_in_two_processes(tmp_path: Path) -> None:
    both_pass("accelerate_worker.py", tmp_path, folder=tmp_path)
