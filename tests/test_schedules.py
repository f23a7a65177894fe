"""What a method does between steps, and what it adds to the loss: by hand, by AdapterTrainer, and after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, perturb, tiny_llama
from safetensors import safe_open
from test_ecosystem import Tokens, arguments

import lora_lite as ll
from lora_lite.core.variant import ParamSpec, Variant
from lora_lite.trainer import AdapterTrainer


class Shrinking(Variant):
    """A LoRA whose columns of B are switched off one by one, those with the least remembered gradient first."""

    name, config, handles_scale = "shrinking_toy", ll.AdapterConfig, True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ParamSpec]:
        return {
            "lora_a": ParamSpec((cfg.r, d_in), "kaiming"),
            "lora_b": ParamSpec((d_out, cfg.r)),
            "lora_on": ParamSpec((cfg.r,), "ones", trainable=False),
            "lora_seen": ParamSpec((cfg.r,), trainable=False, saved="resume"),
        }

    @staticmethod
    def forward(layer: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + layer.scale * ((x @ layer.lora_a.mT) * layer.lora_on) @ layer.lora_b.mT

    @staticmethod
    def on_step(targets: Any, cfg: Any, step: int) -> None:
        for layer in targets.values():
            layer.lora_seen.mul_(0.9).add_(layer.lora_b.grad.norm(dim=0) + 1)
            if step % 2 == 0:
                layer.lora_on[torch.where(layer.lora_on > 0, layer.lora_seen, torch.inf).argmin()] = 0

    @staticmethod
    def penalty(targets: Any, cfg: Any) -> torch.Tensor:
        return 0.1 * torch.stack([layer.lora_b.square().sum() for layer in targets.values()]).sum()


CONFIG = ll.AdapterConfig(variant="shrinking_toy", r=4)


@pytest.fixture(autouse=True)
def in_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the time of a test: others ask for every method that there is."""
    monkeypatch.setitem(ll.REGISTRY, Shrinking.name, Shrinking)


def attached() -> Any:
    torch.manual_seed(0)
    model = tiny_llama()
    perturb(ll.attach(model, CONFIG), 0.1)
    return model


def test_a_step_and_a_penalty_by_hand(tmp_path: Path) -> None:
    model = attached()
    adapter = ll.adapters(model)["default"]
    penalty = adapter.penalty()
    assert penalty is not None
    wanted = 0.1 * sum(p.square().sum() for key, p in adapter.named_tensors() if key.endswith("lora_b"))
    torch.testing.assert_close(penalty, wanted)
    (model(input_ids=IDS, labels=IDS).loss + penalty).backward()
    for _ in range(2):
        adapter.step()
    assert adapter.steps == 2
    on = [t for key, t in adapter.named_tensors() if key.endswith("lora_on")]
    assert all(t.sum() == 3 for t in on)
    ll.save(model, tmp_path / "final.safetensors")
    ll.save(model, tmp_path / "resume.safetensors", resume=True)
    with safe_open(tmp_path / "final.safetensors", "pt") as file:
        assert not any(key.endswith("lora_seen") for key in file.keys())  # noqa: SIM118
    for name, steps in (("final", 0), ("resume", 2)):
        fresh = tiny_llama()
        assert ll.load(fresh, tmp_path / f"{name}.safetensors").steps == steps
        assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert ll.restore(model, tmp_path / "final.safetensors").steps == 2
    again = ll.load(fresh := tiny_llama(), tmp_path / "final.safetensors")  # which says nothing of steps
    ll.save(fresh, tmp_path / "again.safetensors", resume=True)
    assert not again.never_stepped
    assert not ll.load(tiny_llama(), tmp_path / "again.safetensors").never_stepped
    tiny_llama().save_pretrained(tmp_path / "base")
    ll.merge_checkpoint(tmp_path / "base", tmp_path / "final.safetensors", tmp_path / "out", base_weights="original")
    merged = type(model).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    plain = ll.attach(tiny_llama(), ll.LoRAConfig())
    plain.step()
    assert plain.penalty() is None
    ll.merge(model)
    with pytest.raises(ll.TargetError, match="can't take a step"):
        adapter.step()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
def test_a_resumed_training_ends_as_one_that_went_through(tmp_path: Path) -> None:
    model = attached()
    AdapterTrainer(model, arguments(tmp_path), train_dataset=Tokens()).train()
    adapter = ll.adapters(model)["default"]
    assert adapter.steps == 6
    assert all(t.sum() == 1 for key, t in adapter.named_tensors() if key.endswith("lora_on"))
    again = attached()
    resumed = AdapterTrainer(again, arguments(tmp_path), train_dataset=Tokens())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    a, b = (ll.adapters(each)["default"] for each in (model, again))
    assert a.steps == b.steps
    assert all(
        torch.equal(one, other) for one, other in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
@pytest.mark.parametrize("state", ["off", "frozen", "merged"])
def test_an_adapter_that_takes_no_part_has_no_penalty_and_no_step(state: str, tmp_path: Path) -> None:
    model = attached()
    adapter = ll.adapters(model)["default"]
    trained = ll.attach(model, ll.LoRAConfig(r=2), "trained") if state != "merged" else None
    if state == "off":
        adapter.scale = 0
    elif state == "frozen":
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
    else:
        ll.merge(model)
    assert adapter.penalty() is None
    if trained is None:
        return
    before = {key: t.clone() for key, t in adapter.named_tensors()}
    AdapterTrainer(model, arguments(tmp_path, max_steps=2, weight_decay=0.0), train_dataset=Tokens()).train()
    assert (adapter.steps, trained.steps) == (0, 2)
    assert all(torch.equal(before[key], t) for key, t in adapter.named_tensors())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
@pytest.mark.parametrize("is_scaled", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_trainer_adds_the_penalty_once_a_step(parts: int, is_scaled: bool, tmp_path: Path) -> None:
    """However many batches the step is made of: with plain SGD it takes 2 lr 0.1 B off B."""
    model, other = attached(), attached()
    own_penalty, gradients = Shrinking.penalty, []
    fields = {"max_steps": 1, "gradient_accumulation_steps": parts, "per_device_train_batch_size": 2 // parts}
    for each, penalty in ((model, own_penalty), (other, lambda targets, cfg: None)):
        registered: Any = ll.REGISTRY["shrinking_toy"]
        registered.penalty = staticmethod(penalty)
        try:
            args = arguments(
                tmp_path, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant", **fields
            )
            trainer: Any = AdapterTrainer(each, args, train_dataset=Tokens())
            trainer.loss_is_scaled_for_ga = None if is_scaled else False  # Llama's own loss is
            trainer.train()
        finally:
            registered.penalty = staticmethod(own_penalty)
        gradients.append(
            {k: t.clone() for k, t in ll.adapters(each)["default"].named_tensors() if k.endswith("lora_b")}
        )
    start = dict(ll.adapters(attached())["default"].named_tensors())
    for key, with_penalty in gradients[0].items():
        torch.testing.assert_close(gradients[1][key] - with_penalty, 0.2 * start[key], rtol=1e-3, atol=1e-5)
