"""Trainers: the first step is audited, and no trained head is lost."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, config, perturb, tiny_llama
from processes import both_pass
from test_audit import FEW, SMALL, Experts, X, gpt2, jamba
from test_ecosystem import Tokens, arguments
from test_laws import logits
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, MambaConfig, MambaForCausalLM

import lora_lite as ll
from lora_lite.trainer import AdapterTrainer

# torch's, on a machine without an accelerator
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")


def values(adapter: ll.Adapter) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in adapter.state_dict().items()}


# ---- the first step -----------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_layer_that_is_read_and_not_called_stops_before_the_first_step(
    accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the model's code didn't show it: by way of a list, or in another function.
    monkeypatch.setattr("lora_lite.base.layer.readers", lambda modules: {})
    model = MambaForCausalLM(MambaConfig(**SMALL, state_size=8))
    adapter = ll.attach(model, ll.LoRAConfig(r=4))
    start = values(adapter)
    trainer = AdapterTrainer(model, arguments(tmp_path, gradient_accumulation_steps=accumulate), train_dataset=Tokens())
    with pytest.raises(
        ll.TargetError, match=r"first training step\n.*reads the weight itself: .*mixer\.dt_proj \(2\)\n"
    ):
        trainer.train()
    assert all(torch.equal(tensor, start[key]) for key, tensor in adapter.state_dict().items())
    assert trainer.state.global_step == 0
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_only_the_first_step_is_watched(tmp_path: Path, log: list[str]) -> None:
    model = jamba()
    ll.attach(model, ll.LoRAConfig(r=4, target_names="_proj$", exclude_names="dt_proj"))
    hooks = []

    class Counting(AdapterTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            hooks.append(sum(len(module._forward_pre_hooks) for module in model.modules()))
            return super().compute_loss(*args, **kwargs)

    Counting(model, arguments(tmp_path, max_steps=3, save_strategy="no"), train_dataset=Tokens()).train()
    assert hooks[0] > 0
    assert hooks[1:] == [0, 0]
    assert not any("WARNING" in line for line in log)


class Conditional(nn.Module):
    """A layer that only some batches call, as BLIP-2's projection of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, image: torch.Tensor | None = None) -> dict[str, Any]:
        y = self.text(x)
        if image is not None:
            y = y + self.image(image)
        return {"loss": (y - labels).square().mean()}


def test_a_layer_that_another_batch_may_call_is_a_warning(tmp_path: Path, log: list[str]) -> None:
    model = Conditional()
    ll.attach(model, config("lora", target_names="^(text|image)$"))
    trainer = AdapterTrainer(model, arguments(tmp_path, save_strategy="no"), train_dataset=Rows())
    trainer.train()
    assert trainer.state.global_step > 1
    assert sum("not called in this forward, although the module around it was: image\n" in line for line in log) == 1


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"x": X[i % len(X)], "labels": X[i % len(X)]}


class Regression(nn.Module):
    """The experts of `Experts` that a batch takes, with a loss."""

    def __init__(self, cut: bool = False) -> None:
        super().__init__()
        self.inner, self.cut = Experts(), cut

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        first: Any = self.inner.layers[0]
        y = first["experts"][0](x)
        y = first["experts"][1](y.detach() if self.cut else y)
        return {"loss": (y - labels).square().mean()}


def test_what_a_first_batch_does_not_reach_is_a_warning(tmp_path: Path, log: list[str]) -> None:
    model = Regression()
    ll.attach(model, config("lora", target_names=r"experts\.\d\.proj"))
    AdapterTrainer(model, arguments(tmp_path, save_strategy="no"), train_dataset=Rows()).train()
    warned = [line for line in log if "WARNING" in line]
    assert len(warned) == 1
    assert (
        "not every adapter took part in the first training step\n  not reached by this batch: inner.layers.*.experts.2"
        in warned[0]
    )


def test_a_parameter_without_a_gradient_stops_the_first_step(tmp_path: Path) -> None:
    model = Regression(cut=True)
    ll.attach(model, config("lora", target_names=r"experts\.[01]\.proj"))
    trainer = AdapterTrainer(model, arguments(tmp_path), train_dataset=Rows())
    with pytest.raises(ll.TargetError, match=r"no gradient, although the layer ran: .*experts\.0\.proj\.lora_A"):
        trainer.train()


class Halved(nn.Linear):
    """W x + b, with half of the gradient, as a base that rounds its activations might have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward((x + x.detach()) / 2)


def halved() -> Any:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.__class__ = Halved
    return model


def test_what_is_loaded_on_a_base_with_wrong_gradients_serves_and_does_not_train(tmp_path: Path) -> None:
    lora, path, wrong = config("lora", target_names="q_proj"), tmp_path / "a.safetensors", r"up_proj.*50% off"
    plain = tiny_llama()
    perturb(ll.attach(plain, lora))
    ll.save(plain, path)
    with pytest.raises(ll.QuantizedWeightError, match=wrong):
        ll.attach(halved(), lora)
    model = halved()
    adapter = ll.load(model, path)
    assert torch.equal(logits(model), logits(plain))
    start = values(adapter)
    with pytest.raises(ll.QuantizedWeightError, match=wrong):
        ll.audit(model, {"input_ids": IDS, "labels": IDS})
    trainer = AdapterTrainer(model, arguments(tmp_path), train_dataset=Tokens())
    with pytest.raises(ll.QuantizedWeightError, match=wrong):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(tensor, start[key]) for key, tensor in adapter.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("job", ["ddp", "zero"])
def test_two_processes(job: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "llama")
    gpt2().save_pretrained(tmp_path / "gpt2-base")
    both_pass("../trainer_worker.py", job, tmp_path, folder=tmp_path)


# ---- a trained head -----------------------------------------------------------------------------


def classifier() -> Any:
    sizes = {**FEW, "intermediate_size": 48, "num_key_value_heads": 2, "num_labels": 2}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes))
    ll.attach(model, config("lora"))
    return model


def test_a_trained_head_in_no_adapter_is_refused(tmp_path: Path) -> None:
    match = r"1 parameters would be trained and are in no adapter, .*: score\.weight\n  .*"
    match += r"attach\(model, \[cfg, ll\.FullConfig\(target_names='score'\)\]\); or freeze"
    model = classifier()
    AdapterTrainer(model, arguments(tmp_path))
    model.score.requires_grad_(True)
    with pytest.raises(ll.TargetError, match=match):
        AdapterTrainer(model, arguments(tmp_path))
    model.score.requires_grad_(False)
    trainer = AdapterTrainer(model, arguments(tmp_path), train_dataset=Labelled())
    model.score.requires_grad_(True)
    with pytest.raises(ll.TargetError, match=match):
        trainer.train()
    with pytest.raises(ll.TargetError, match=match):
        trainer.save_model(str(tmp_path / "end"))
    assert not (tmp_path / "end").exists()


class Bare(nn.Module):
    """A layer and two bare parameters, of which one is a matrix that no layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.matrix = nn.Linear(4, 4), nn.Parameter(torch.ones(4, 4))
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * (self.proj(x) @ self.matrix)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("matrix", r"put .*, ll.FullConfig\(target_names='matrix', kinds='matrix'\)\]\); or freeze them"),
        ("factor", "freeze them"),
    ],
)
def test_the_cure_for_a_bare_parameter_can_be_followed(name: str, cure: str, tmp_path: Path) -> None:
    model = nn.Sequential(Bare())
    ll.attach(model, ll.LoRAConfig(target_names="proj"))
    getattr(model[0], name).requires_grad_(True)
    with pytest.raises(ll.TargetError, match=rf"adapter, .*: 0.{name}\n  {cure}"):
        AdapterTrainer(model, arguments(tmp_path))
    if name == "matrix":
        ll.detach(model)
        ll.attach(model, [ll.LoRAConfig(target_names="proj"), ll.FullConfig(target_names="matrix", kinds="matrix")])
        AdapterTrainer(model, arguments(tmp_path))


class Labelled(Tokens):
    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": torch.tensor(i % 2)}


def test_an_adapter_on_the_head_is_saved_with_it(tmp_path: Path) -> None:
    model = classifier()
    ll.attach(model, config("lora", target_names="score"), name="head")
    trainer = AdapterTrainer(model, arguments(tmp_path, max_steps=1, save_steps=1), train_dataset=Labelled())
    trainer.train()
    assert {f.stem for f in (tmp_path / "checkpoint-1").glob("*.safetensors")} == {"default", "head"}


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ll.TargetError, match=r"^AdapterTrainer is given .*, not 'org/name'\n  .*load_base\('org/name'\) and"
    ):
        AdapterTrainer("org/name", arguments(tmp_path))
