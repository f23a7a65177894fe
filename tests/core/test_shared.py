"""Tensors that an adapter has once: one place on the model, one key in the file, one gradient."""

import copy
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import perturb, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_lite as ll
from lora_lite.cli.stored import read_stored
from lora_lite.core.variant import ParamSpec, Variant, seeded

IDS = torch.arange(1, 13).reshape(2, 6)


@dataclass(frozen=True, kw_only=True)
class SharedConfig(ll.AdapterConfig):
    variant: str = "shared_toy"
    saved: str = "always"
    seed: int = 0


def uniform(tensor: torch.Tensor, generator: torch.Generator) -> None:
    tensor.uniform_(-1, 1, generator=generator)


class SharedToy(Variant):
    """VeRA with a bank of trained gains: d and b at each layer; A, B, a table of rows and the gains once."""

    name, config = "shared_toy", SharedConfig
    handles_scale = False

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ParamSpec]:
        return {"lora_d": ParamSpec((cfg.r,), "ones"), "lora_b": ParamSpec((d_out,))}

    @staticmethod
    def shared_specs(targets: Any, cfg: Any) -> dict[str, ParamSpec]:
        most_in, most_out = max(t.d_in for t in targets), max(t.d_out for t in targets)
        fixed = {"trainable": False, "saved": cfg.saved}
        return {
            "A": ParamSpec((cfg.r, most_in), seeded(uniform, cfg.seed), **fixed),
            "B": ParamSpec((most_out, cfg.r), seeded(uniform, cfg.seed + 1), **fixed),
            "rows": ParamSpec((cfg.r,), lambda t: t.copy_(torch.arange(len(t)).flip(0)), dtype=torch.int64),
            "gain": ParamSpec((cfg.r,), "ones"),
            "steps": ParamSpec((1,), trainable=False, saved="resume"),
        }

    @staticmethod
    def forward(layer: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = layer.lora_A[layer.lora_rows, : layer.in_features], layer.lora_B[: layer.out_features]
        return y + (x @ a.mT * layer.lora_d * layer.lora_gain) @ b.mT * layer.lora_b


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the time of a test: others ask for every method that there is."""
    monkeypatch.setitem(ll.REGISTRY, SharedToy.name, SharedToy)


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def attached(name: str = "default", **fields: Any) -> Any:
    model = tiny_llama()
    perturb(ll.attach(model, SharedConfig(r=4, **fields), name), 0.2)
    return model


def test_it_lies_on_the_model_once_and_its_gradient_is_the_sum_over_the_layers() -> None:
    model = attached()
    adapter = ll.adapters(model)["default"]
    keys = [key for key in model.state_dict() if "lora_shared" in key]
    assert set(keys) == {f"lora_shared.{name}" for name in ("gain", "A", "B", "rows", "steps")}
    assert model.lora_shared.rows.tolist() == [3, 2, 1, 0]
    assert {"lora_shared.A", "lora_shared.rows"} <= adapter.state_dict().keys()
    gain = model.lora_shared.gain
    assert sum(p is gain for p in adapter.parameters()) == 1
    loss = logits(model).square().mean()
    (gradient,) = torch.autograd.grad(loss, gain)
    assert gradient.abs().min() > 0
    step = 1e-3
    with torch.no_grad():
        gain[2] += step
        moved = logits(model).square().mean()
        gain[2] -= 2 * step
        torch.testing.assert_close(
            (moved - logits(model).square().mean()) / (2 * step), gradient[2], rtol=1e-2, atol=1e-5
        )


@pytest.mark.parametrize("saved", ["always", "never"])
def test_save_and_load_are_bit_equal(saved: str, tmp_path: Path) -> None:
    model = attached(saved=saved)
    wanted = logits(model)
    ll.save(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        shared = {key for key in file.keys() if key.startswith("lora_shared.")}  # noqa: SIM118
    always = {"lora_shared.gain", "lora_shared.rows"}
    assert shared == (always if saved == "never" else always | {"lora_shared.A", "lora_shared.B"})
    torch.manual_seed(7)
    torch.randn(5)
    fresh = tiny_llama()
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        ll.load(fresh, tmp_path / "a.safetensors", name="other")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(logits(fresh), wanted)
    assert torch.equal(fresh.lora_shared__other.A, model.lora_shared.A)
    with torch.no_grad():
        fresh.lora_shared__other.gain.zero_()
    ll.restore(fresh, tmp_path / "a.safetensors", "other")
    assert torch.equal(logits(fresh), wanted)


def test_what_only_a_resume_needs_is_saved_for_one(tmp_path: Path) -> None:
    model = attached()
    model.lora_shared.steps.fill_(7)
    ll.save(model, tmp_path / "final.safetensors")
    ll.save(model, tmp_path / "resume.safetensors", resume=True)
    for file, steps in (("final", 0), ("resume", 7)):
        fresh = tiny_llama()
        ll.load(fresh, tmp_path / f"{file}.safetensors")
        assert fresh.lora_shared.steps.item() == steps
        assert torch.equal(logits(fresh), logits(model))
    fresh.lora_shared.steps.fill_(3)
    ll.restore(fresh, tmp_path / "final.safetensors")
    assert fresh.lora_shared.steps.item() == 3
    ll.restore(fresh, tmp_path / "resume.safetensors")
    assert fresh.lora_shared.steps.item() == 7


@pytest.mark.parametrize("saved", ["always", "never"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_raw_tensors_of_a_checkpoint(saved: str, prefix: str, tmp_path: Path) -> None:
    model = attached("fr", saved=saved)
    tensors = {f"{prefix}{key}": t.clone() for key, t in model.state_dict().items() if "lora_" in key}
    if saved == "never":
        tensors = {key: t for key, t in tensors.items() if not key.endswith((".A", ".B", ".steps"))}
    save_file(tensors, tmp_path / "raw.safetensors")
    fresh = tiny_llama()
    ll.load(fresh, tmp_path / "raw.safetensors", cfg=SharedConfig(r=4, saved=saved))
    assert torch.equal(logits(fresh), logits(model))
    del tensors[f"{prefix}lora_shared__fr.gain"]
    save_file(tensors, tmp_path / "raw.safetensors")
    with pytest.raises(ll.CheckpointError, match=r"lora_shared\.gain"):
        ll.load(tiny_llama(), tmp_path / "raw.safetensors", cfg=SharedConfig(r=4, saved=saved))


def test_copies_casts_and_detach() -> None:
    model, base = attached(), logits(tiny_llama())
    one = logits(model)
    perturb(ll.attach(model, SharedConfig(r=3, seed=5), "second"), 0.2)
    wanted = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), wanted)
        with torch.no_grad():
            other.lora_shared.gain.mul_(2)
        assert not torch.equal(logits(other), wanted)
        ll.detach(other)
        assert torch.equal(logits(other), base)
        assert not any("lora" in name for name, _ in other.named_modules())
    assert torch.equal(logits(model), wanted)
    parameters = {key: t * 2 if key == "lora_shared.gain" else t for key, t in model.named_parameters()}
    assert not torch.equal(torch.func.functional_call(model, parameters, (IDS,)).logits, wanted)
    ll.detach(model, "second")
    assert torch.equal(logits(model), one)
    model.to(torch.bfloat16)
    assert model.lora_shared.rows.dtype == torch.int64
    torch.testing.assert_close(logits(model).float(), one, rtol=0.1, atol=0.1)


def test_merge_in_memory_and_plan() -> None:
    model = attached()
    wanted = logits(model)
    assert ll.plan(tiny_llama(), SharedConfig(r=4)).parameters == sum(
        p.numel() for p in ll.adapters(model)["default"].parameters()
    )
    assert ll.plan(model, ll.LoRAConfig()).unadapted == ll.plan(tiny_llama(), ll.LoRAConfig()).unadapted
    ll.merge(model)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    ll.unmerge(model)
    assert torch.equal(logits(model), wanted)


def test_a_model_that_runs_its_children_in_a_row() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    x = torch.randn(2, 6)
    base = model(x)
    adapter = ll.attach(model, SharedConfig(r=4, target_names=["."]))
    assert torch.equal(model(x), base)
    perturb(adapter, 0.3)
    assert not torch.equal(model(x), base)
    ll.detach(model)
    assert torch.equal(model(x), base)
    assert len(model) == 3


def test_a_place_that_is_taken_and_a_failure_leave_nothing() -> None:
    model = tiny_llama()
    model.lora_shared = torch.nn.Identity()
    with pytest.raises(ll.TargetError, match="an attribute 'lora_shared'"):
        ll.attach(model, SharedConfig(r=4))
    del model.lora_shared
    assert not any("lora" in key for key in model.state_dict())


def test_specs_that_can_not_be() -> None:
    with pytest.raises(ll.VariantError, match="dtype"):
        ParamSpec((2,), dtype=torch.float32)
    with pytest.raises(ll.VariantError, match="saved"):
        ParamSpec((2,), saved="never")


@pytest.mark.parametrize("saved", ["always", "never"])
def test_merge_on_disk_is_merge_in_memory(saved: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = attached(saved=saved)
    ll.save(model, tmp_path / "a.safetensors")
    ll.merge_checkpoint(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "merged", base_weights="original")
    ll.merge(model, keep=False)
    merged = type(model).from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(merged[key], tensor) for key, tensor in model.state_dict().items())


def test_what_is_not_as_it_would_be_made_is_saved(tmp_path: Path) -> None:
    """Of another seed, or rounded: the file has it, and a load gives the same outputs."""
    raw = {k: t.clone() for k, t in attached(saved="always", seed=3).state_dict().items() if "lora_" in k}
    save_file(raw, tmp_path / "raw.safetensors")
    other, cast = tiny_llama(), attached(saved="never")
    ll.load(other, tmp_path / "raw.safetensors", cfg=SharedConfig(r=4, saved="never"))  # of seed 0
    assert torch.equal(other.lora_shared.A, raw["lora_shared.A"])
    cast.to(torch.bfloat16).float()
    for model in (other, cast):
        ll.save(model, tmp_path / "a.safetensors")
        fresh = copy.deepcopy(model)
        ll.detach(fresh)
        ll.load(fresh, tmp_path / "a.safetensors")
        assert torch.equal(logits(fresh), logits(model))


def test_names_that_can_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("training", "a.b", "lora_A", "d"):  # a layer has lora_d
        monkeypatch.setattr(
            SharedToy, "shared_specs", staticmethod(lambda targets, cfg, name=name: {name: ParamSpec((2,))})
        )
        model = tiny_llama()
        with pytest.raises(ll.VariantError, match="wanted a name like A"):
            ll.attach(model, SharedConfig(r=4))
        assert not any("lora" in key for key in model.state_dict())
        assert not ll.adapters(model)
        assert all(p.requires_grad for p in model.parameters())


def test_an_audit_finds_a_shared_parameter_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ll.audit(attached(), {"input_ids": IDS}).layers
    specs = SharedToy.shared_specs
    unused = {"unused": ParamSpec((2,))}
    monkeypatch.setattr(SharedToy, "shared_specs", staticmethod(lambda targets, cfg: specs(targets, cfg) | unused))
    with pytest.raises(ll.TargetError, match=r"no gradient, .*lora_shared\.unused"):
        ll.audit(attached(), {"input_ids": IDS})


def test_a_small_file_takes_no_large_memory(tmp_path: Path) -> None:
    """Its metadata alone says how large A is: 80 kB would have taken 84 GB."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    ll.attach(model, ll.VeRAConfig(r=2, target_names="0"))
    ll.save(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    ours, tensors = json.loads(metadata["lora_lite"]), load_file(tmp_path / "a.safetensors")
    ours["targets"], ours["config"]["r"] = {"0": [1 << 20, 8]}, 20_000
    tensors["0.lora_d"] = torch.full((20_000,), 0.1)
    save_file(tensors, tmp_path / "b.safetensors", metadata | {"lora_lite": json.dumps(ours)})
    with pytest.raises(ll.CheckpointError, match=r"lora_shared\.A isn't in the file .* \(20000, 1048576\)"):
        read_stored(tmp_path / "b.safetensors")


def test_a_history_of_it_is_refused() -> None:
    model = attached()
    with pytest.raises(ll.TargetError, match="all its layers share"):
        ll.freeze_into(model)
