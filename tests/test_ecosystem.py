"""What people train with: a plain loop, autocast, gradient checkpointing, Accelerate, generate, casts, Trainer."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    IDS,
    OneLinear,
    acts_everywhere,
    attach,
    config,
    covering,
    is_trained,
    loss_of,
    one_layer,
    perturb,
    quantized,
    tiny_llama,
)
from test_laws import VARIANTS, logits, per_identity, small
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from lora_lite.trainer import AdapterCheckpoints, AdapterTrainer

COVERING = covering()
"""What a whole model adds is a matter of mechanisms; the maths of each method goes through a layer, in milliseconds."""
per_variant = pytest.mark.parametrize("variant", VARIANTS)
per_trained = pytest.mark.parametrize("variant", [v for v in VARIANTS if is_trained(v)])


def attached(variant: str = "lora", model: Any = None) -> tuple[Any, ll.Adapter]:
    model = small() if model is None else model
    adapter = attach(model, config(variant))
    perturb(adapter)
    return model, adapter


def gradients(adapter: ll.Adapter) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])


def test_a_plain_loop_learns() -> None:
    model = tiny_llama()
    adapter = ll.attach(model, config("lora"))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("variant", [v for v in COVERING if is_trained(v)])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_a_model_gives_the_same_gradients(variant: str, use_reentrant: bool) -> None:
    model, adapter = attached(variant)
    model.train()
    loss_of(model).backward()
    wanted = gradients(adapter)
    twin, twin_adapter = attached(variant)
    twin.train()
    twin.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    loss_of(twin).backward()
    torch.testing.assert_close(gradients(twin_adapter), wanted)


@per_trained
def test_gradient_checkpointing_of_a_layer_gives_the_same_gradients(variant: str) -> None:
    layer, x = one_layer(variant)
    adapter = attach(layer, config(variant, target_names="proj"))
    perturb(adapter)
    layer.train()
    grads = []
    for run in (layer, partial(checkpoint, layer, use_reentrant=False)):
        layer.zero_grad()
        torch.manual_seed(7)  # of what a method draws
        run(x).square().mean().backward()
        grads.append(gradients(adapter))
    torch.testing.assert_close(*grads)


def test_gradient_checkpointing_repeats_the_dropout_mask() -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny_llama()
        adapter = ll.attach(model, config("lora", dropout=0.5))
        perturb(adapter)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(7)
        loss_of(model).backward()
        grads.append(gradients(adapter))
    torch.testing.assert_close(*grads)


@per_trained
def test_autocast_computes_in_its_dtype_and_keeps_float32_gradients(variant: str) -> None:
    layer, x = one_layer(variant)
    with torch.autocast("cpu", torch.bfloat16):
        dtype = layer(x).dtype  # bfloat16 of a product, float32 of a norm and of a lookup
    adapter = attach(layer, config(variant, target_names="proj"))
    perturb(adapter)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.float().square().mean().backward()
    assert y.dtype == dtype
    assert (y.float() - exact).norm() < 0.02 * exact.norm()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


@per_identity
def test_autocast_keeps_a_fresh_adapter_the_identity(variant: str) -> None:
    layer, x = one_layer(variant)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        base = layer(x)
        attach(layer, config(variant, target_names="proj"))
        assert torch.equal(layer(x), base)


@pytest.mark.parametrize("variant", COVERING)
def test_autocast_of_a_model(variant: str) -> None:
    model = small()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        base = model(input_ids=IDS).logits
        adapter = attach(model, config(variant))
        assert torch.equal(model(input_ids=IDS).logits, base) == ll.REGISTRY[variant].has_identity_init
    perturb(adapter)
    exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=IDS).logits
    assert (out.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("variant", [v for v in COVERING if acts_everywhere(v)])  # others refuse to go without a cache
def test_generate_with_a_cache_is_generate_without(variant: str) -> None:
    model, _ = attached(variant)
    with_cache, without = (
        model.generate(IDS[:, :4], max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if acts_everywhere(v)])
def test_a_token_alone_is_as_among_many(variant: str) -> None:
    layer, x = one_layer(variant, rows=96)  # some methods go another way for many
    perturb(attach(layer, config(variant, target_names="proj")), 0.2)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.cat([layer(row) for row in x[:3].split(1)]), layer(x)[:3], rtol=1e-4, atol=1e-5
        )


@per_variant
def test_the_model_can_be_cast_and_cast_back(variant: str) -> None:
    layer, x = one_layer(variant)
    adapter = attach(layer, config(variant, target_names="proj"))
    perturb(adapter)
    for dtype in (torch.float64, torch.bfloat16):
        layer.to(dtype)
        assert {t.dtype for _, t in adapter.named_tensors() if t.is_floating_point()} == {dtype}
        y = layer(x.to(dtype) if x.is_floating_point() else x)
        assert y.dtype == dtype
        assert y.isfinite().all()


def test_accelerate() -> None:
    from accelerate import Accelerator

    model, adapter = attached()
    loss_of(model).backward()
    wanted = gradients(adapter)
    twin, twin_adapter = attached()
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(twin, torch.optim.AdamW(twin_adapter.parameters(), lr=1e-2))
    accelerator.backward(loss_of(prepared))
    torch.testing.assert_close(gradients(twin_adapter), wanted)
    before = [p.detach().clone() for p in twin_adapter.parameters()]
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, twin_adapter.parameters(), strict=True))
    assert "default" in ll.adapters(accelerator.unwrap_model(prepared))


def test_weights_cannot_be_reached_through_a_data_parallel_wrapper_that_came_first() -> None:
    wrapped = torch.nn.DataParallel(OneLinear())
    with pytest.raises(ll.TargetError, match="DataParallel has registered the parameters already"):
        ll.attach(wrapped, config("lora", target_names="proj"))


# ---- transformers' Trainer ----------------------------------------------------------------------


class Tokens(torch.utils.data.Dataset):
    """Counting from different starts: something to learn in a few steps; counting down, to unlearn it."""

    def __init__(self, n: int = 32, step: int = 1) -> None:
        self.ids = (step * torch.arange(12) + torch.arange(n)[:, None]) % 95 + 1

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def arguments(folder: Path, **overrides: Any) -> Any:
    from transformers import TrainingArguments

    options: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(str(folder), **(options | overrides))


def training_base(kind: str, folder: str) -> Any:
    return ll.load_base(folder, torch.float32) if kind == "dense" else quantized(folder, kind)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # torch's, on a machine without an accelerator
@pytest.mark.parametrize("kind", ["dense", "nf4", "int8"])
def test_trainer_saves_adapters_alone_and_resumes_to_the_same_end(kind: str, tiny: str, tmp_path: Path) -> None:
    model = training_base(kind, tiny)
    ll.attach(model, config("lora"))
    start = ll.adapters(model)["default"].state_dict()
    start = {key: value.clone() for key, value in start.items()}
    trainer = AdapterTrainer(model, arguments(tmp_path), train_dataset=Tokens())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    names = {file.name for file in (tmp_path / "checkpoint-3").iterdir()}
    assert "default.safetensors" in names
    assert not any(name.startswith(("model", "pytorch_model", "adapter_model")) for name in names)
    assert (tmp_path / "checkpoint-3" / "default.safetensors").stat().st_size < 300_000

    again = training_base(kind, tiny)
    ll.attach(again, config("lora"))
    resumed = AdapterTrainer(again, arguments(tmp_path), train_dataset=Tokens())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    a, b = (ll.adapters(each)["default"].state_dict() for each in (model, again))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], start[key]) for key in a)

    fresh = training_base(kind, tiny)
    ll.load(fresh, tmp_path / "checkpoint-6" / "default.safetensors")
    assert torch.equal(logits(fresh), logits(model.eval()))


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
def test_trainer_loads_the_best_adapter_at_the_end(tiny: str, tmp_path: Path) -> None:
    model = training_base("dense", tiny)
    ll.attach(model, config("lora"), name="fr")
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, learning_rate=0.1)
    trainer = AdapterTrainer(model, args, train_dataset=Tokens(), eval_dataset=Tokens(8, step=-1))
    trainer.train()
    best = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert Path(best).name == "checkpoint-3"  # the more it learns to count up, the worse it counts down
    twin = training_base("dense", tiny)
    ll.load(twin, Path(best) / "fr.safetensors")
    assert torch.equal(logits(twin), logits(model.eval()))


def test_trainer_takes_no_model_init(tmp_path: Path) -> None:
    with pytest.raises(ll.TargetError, match="given a model with an adapter on it, not a model_init"):
        AdapterTrainer(None, arguments(tmp_path), model_init=tiny_llama)  # type: ignore[arg-type]


def test_the_mixin_serves_a_trainer_of_ones_own(tiny: str, tmp_path: Path) -> None:
    from transformers import Trainer

    class Loud(Trainer):
        steps = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            return super().training_step(*args, **kwargs)

    class LoudAdapterTrainer(AdapterCheckpoints, Loud):
        pass

    model = training_base("nf4", tiny)
    ll.attach(model, config("lora"))
    trainer = LoudAdapterTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=Tokens())
    trainer.train()
    trainer.save_model(str(tmp_path / "end"))
    assert trainer.steps == 2
    assert {file.name for file in (tmp_path / "end").iterdir()} == {"default.safetensors", "training_args.bin"}


def test_trainer_without_an_adapter_or_with_another_checkpoint(tiny: str, tmp_path: Path) -> None:
    model = training_base("dense", tiny)
    with pytest.raises(ll.TargetError, match="has no adapter to train"):
        AdapterTrainer(model, arguments(tmp_path))
    ll.attach(model, config("lora"), name="fr")
    trainer = AdapterTrainer(model, arguments(tmp_path / "run"), train_dataset=Tokens())
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(
        ll.CheckpointError, match=r"checkpoint-1 is no checkpoint of these adapters\n  missing: .*fr.safetensors"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_trainer_with_gradient_checkpointing_on_a_quantised_base(
    use_reentrant: bool, tiny: str, tmp_path: Path
) -> None:
    model = quantized(tiny, "nf4")
    ll.attach(model, config("lora"))
    args = arguments(
        tmp_path,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": use_reentrant},
        save_strategy="no",
    )
    trainer = AdapterTrainer(model, args, train_dataset=Tokens())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert "_hf_peft_config_loaded" not in model.__dict__


def test_two_poles_in_one_step_give_the_gradients_of_two_models() -> None:
    model, adapter = attached()
    total = torch.zeros(())
    for c in (1.0, -1.0):
        with ll.scaled(model, c):
            total = total + loss_of(model)
    total.backward()
    wanted = torch.zeros_like(gradients(adapter))
    for c in (1.0, -1.0):
        twin = copy.deepcopy(model)
        twin.zero_grad()
        twin_adapter = ll.adapters(twin)["default"]
        twin_adapter.scale = c
        loss_of(twin).backward()
        wanted += gradients(twin_adapter)
    torch.testing.assert_close(gradients(adapter), wanted)
