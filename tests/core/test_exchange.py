"""Other adapters in the place of attached ones, LoRAs with room, and adapters that are unloaded."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BUT_THREE, IDS, attach, config, is_trained, keep, moe, perturb, tiny_llama
from test_laws import logits, same_snapshot, snapshot
from torch import nn

import lora_lite as ll
from lora_lite.core import exchange
from lora_lite.core.state import session_at
from lora_lite.errors import CheckpointError

VARIANTS = [variant for variant in sorted(ll.REGISTRY) if is_trained(variant)]


def saved(path: Path, variant: str = "lora", seed: int = 1, model: Any = None, **fields: Any) -> torch.Tensor:
    """A file with an adapter; the logits with it alone."""
    model = small() if model is None else model
    torch.manual_seed(seed)
    perturb(attach(model, config(variant, **fields)), 0.2, seed)
    ll.adapters(model)["default"].scale = 0.8
    ll.save(model, path)
    return logits(model)


def small() -> Any:
    return tiny_llama(num_hidden_layers=1, bias=True)


def second(model: Any) -> None:
    torch.manual_seed(9)
    perturb(attach(model, config("dora"), "b"), 0.2, 2)


def hooks(model: nn.Module) -> dict[str, Any]:
    return {path: (list(m._forward_hooks), list(m._forward_pre_hooks)) for path, m in model.named_modules()}


# ---- replace --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_method_takes_the_place_of_any_other(variant: str, tmp_path: Path) -> None:
    wanted = saved(tmp_path / "a", variant, exclude_names=BUT_THREE)
    other = saved(tmp_path / "b", r=3, target_names="down_proj|v_proj")
    model, alone = small(), small()
    ll.load(model, tmp_path / "b")
    assert torch.equal(logits(model), other)
    adapter = ll.load(model, tmp_path / "a", replace=True)
    assert torch.equal(logits(model), wanted)
    assert adapter.scale == 0.8
    ll.load(alone, tmp_path / "a")
    assert same_snapshot(snapshot(model), snapshot(alone))
    ll.load(model, tmp_path / "b", replace=True)
    assert torch.equal(logits(model), other)
    ll.detach(model)
    assert torch.equal(logits(model), logits(small()))
    assert not any("lora" in key for key in model.state_dict())


def test_the_order_and_what_was_trainable_stay(tmp_path: Path) -> None:
    saved(tmp_path / "dora", "dora", r=2)
    model, other = small(), small()
    for each in (model, other):
        torch.manual_seed(2)
        perturb(ll.attach(each, config("lora"), "first"), 0.2)
        ll.load(each, tmp_path / "dora", "second")
        perturb(ll.attach(each, config("ia3"), "third"), 0.2, 3)
    wanted = logits(other)
    model.lm_head.weight.requires_grad_(True)
    saved(tmp_path / "ia3", "ia3", seed=4)
    ll.load(model, tmp_path / "ia3", "second", replace=True)
    assert (logits(model) - wanted).abs().max() > 1e-3
    ll.load(model, tmp_path / "dora", "second", replace=True)
    assert torch.equal(logits(model), wanted), "an adapter comes back to its place in the order"
    assert list(ll.adapters(model)) == ["first", "second", "third"]
    assert model.lm_head.weight.requires_grad
    assert not model.model.norm.weight.requires_grad
    ll.detach(model)
    assert model.model.norm.weight.requires_grad


def test_a_failed_replacement_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "a", "vera")
    saved(tmp_path / "b", "dora")
    model = small()
    ll.load(model, tmp_path / "a")
    perturb(ll.attach(model, config("ia3"), "other"), 0.2)
    before, wanted, tensors = snapshot(model), logits(model), list(ll.adapters(model)["default"].named_tensors())

    def unchanged() -> None:
        assert torch.equal(logits(model), wanted)
        assert same_snapshot(snapshot(model), before)
        assert all(
            a is b for (_, a), (_, b) in zip(tensors, ll.adapters(model)["default"].named_tensors(), strict=True)
        )

    calls = []

    def fails(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return hold(*args)

    from lora_lite.core import attach as module

    hold = module.hold
    monkeypatch.setattr(module, "hold", fails)
    with pytest.raises(KeyboardInterrupt):
        ll.load(model, tmp_path / "b", replace=True)
    unchanged()
    with pytest.raises(CheckpointError):
        ll.load(model, tmp_path / "none", replace=True)
    with pytest.raises(ll.TargetError, match="no adapter 'c' on this LlamaForCausalLM"):
        ll.load(model, tmp_path / "b", "c", replace=True)
    unchanged()


def test_an_interrupt_while_the_old_one_is_taken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "b", "dora")
    model = small()
    perturb(ll.attach(model, config("lora")), 0.2)
    before, wanted, calls, uninstall = snapshot(model), logits(model), [], exchange.uninstall

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        uninstall(*args)

    monkeypatch.setattr(exchange, "uninstall", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ll.load(model, tmp_path / "b", replace=True)
    assert torch.equal(logits(model), wanted)
    assert same_snapshot(snapshot(model), before)


def test_a_history_comes_first_in_any_place_and_merges_as_it_acts(tmp_path: Path) -> None:
    model = small()
    keep(model, "lora", 0.7)
    ll.save(model, tmp_path / "history", "history")
    model = small()
    perturb(ll.attach(model, config("dora"), "x"), 0.3, 3)
    perturb(ll.attach(model, config("lora", r=2), "h"), 0.2, 4)
    for _ in range(2):
        ll.load(model, tmp_path / "history", "h", replace=True)
    assert [adapter.leads for adapter in ll.adapters(model).values()] == [True, False]
    assert len(session_at(model).changes) == 2  # of two attaches
    wanted = logits(model)
    ll.merge(model)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)


# ---- room -----------------------------------------------------------------------------------------

FILES: list[tuple[dict[str, Any], str]] = [
    ({"r": 3, "alpha": 12.0}, "other rank and alpha"),
    ({"r": 8, "rslora": True, "alpha": 5.0}, "the largest rank, rsLoRA"),
    ({"r": 2, "target_names": "q_proj|down_proj"}, "fewer layers"),
    ({"r": 4, "per_layer": {"q_proj": {"r": 7, "alpha": 3.0}}}, "ranks by layer"),
]


@pytest.mark.parametrize("way", ["attach", "load"])
def test_a_lora_with_room_takes_others_into_its_tensors(way: str, tmp_path: Path, log: list[str]) -> None:
    model = small()
    if way == "attach":
        ll.attach(model, config("lora", r=2, alpha=1.0, rslora=True), max_rank=8)
    else:
        saved(tmp_path / "first")
        ll.load(model, tmp_path / "first", max_rank=8)
    adapter = ll.adapters(model)["default"]
    parameters, before = list(adapter.parameters()), hooks(model)
    for fields, name in FILES:
        wanted = saved(tmp_path / name, seed=len(name), **fields)
        adapter = ll.load(model, tmp_path / name, replace=True)
        torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-6)
        assert all(a is b for a, b in zip(parameters, adapter.parameters(), strict=True))
        assert hooks(model) == before
        ll.save(model, tmp_path / "again")
        other = small()
        ll.load(other, tmp_path / "again")
        assert torch.equal(logits(other), logits(model))
    assert not [line for line in log if "another base" in line]
    wanted = saved(tmp_path / "large", r=9)
    ll.load(model, tmp_path / "large", replace=True)  # it doesn't fit
    assert torch.equal(logits(model), wanted)
    wanted = saved(tmp_path / "dora", "dora")
    ll.load(model, tmp_path / "dora", replace=True)
    assert torch.equal(logits(model), wanted)


def test_room_is_the_identity_and_trains_as_without() -> None:
    models = [small(), small()]
    for model, room in zip(models, (None, 8), strict=True):
        torch.manual_seed(0)
        adapter = ll.attach(model, config("lora", r=3, alpha=6.0), max_rank=room)
        assert torch.equal(logits(model), logits(small()))
        if room is None:
            values = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
        else:
            with torch.no_grad():
                for key, tensor in adapter.named_tensors():
                    if key.endswith("lora_A"):
                        tensor[:3] = values[key]
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
    torch.testing.assert_close(logits(models[1]), logits(models[0]), rtol=1e-4, atol=1e-5)
    for key, tensor in ll.adapters(models[1])["default"].named_tensors():
        assert not (tensor[3:] if key.endswith("lora_A") else tensor[:, 3:]).any()


def test_room_for_factors_of_16_bits_rounds_nothing(tmp_path: Path) -> None:
    wanted = saved(tmp_path / "a", r=3, alpha=5.0, dtype=torch.bfloat16)
    model = small()
    ll.attach(model, config("lora", dtype=torch.bfloat16), max_rank=8)
    ll.load(model, tmp_path / "a", replace=True)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-6)


def test_room_on_experts(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"kinds": ("experts",), "target_names": ()}
    wanted = saved(tmp_path / "a", model=moe("mixtral"), r=2, alpha=3.0, **fields)
    model = moe("mixtral")
    ll.attach(model, config("lora", **fields), max_rank=8)
    ll.load(model, tmp_path / "a", replace=True)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_what_has_no_room_is_refused(tmp_path: Path) -> None:
    for cfg, match in (
        (config("dora"), r"variant 'dora' has no rank that zeros could fill up; it is for 'lora'"),
        (config("lora", r=9), "wanted a whole number of at least the rank, 9"),
        (config("lora", r=2, per_layer={"q_proj": {"r": 3}}), "ranks that differ by layer"),
        ([config("lora"), config("ia3", target_names="down_proj")], "is for one LoRA, and these are 2 methods"),
    ):
        model = small()
        before = snapshot(model)
        with pytest.raises(ll.ConfigError, match=match):
            ll.attach(model, cfg, max_rank=8)
        assert same_snapshot(snapshot(model), before)
    saved(tmp_path / "dora", "dora")
    saved(tmp_path / "large", r=9)
    wanted = saved(tmp_path / "dropout", per_layer={"q_proj": {"dropout": 0.5}})
    ll.attach(model := small(), config("lora"), max_rank=8)
    adapter = ll.load(model, tmp_path / "dropout", replace=True)
    assert torch.equal(logits(model), wanted)
    assert len(adapter.per_layer) == 1
    for name in ("dora", "large", "dropout"):
        with pytest.raises(ll.ConfigError, match="max_rank=8: "):
            ll.load(small(), tmp_path / name, max_rank=8)


# ---- unloaded adapters ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_unloaded_adapters_have_no_part_and_come_back(variant: str) -> None:
    model = small()
    perturb(attach(model, config(variant, exclude_names=BUT_THREE), "a"), 0.2)
    alone = logits(model)
    second(model)
    both, tensors = logits(model), list(ll.adapters(model)["a"].named_tensors())
    state = {key: t.clone() for key, t in ll.adapters(model)["a"].state_dict().items()}
    before = hooks(model)
    ll.unload_to(model, "cpu", "b")
    assert torch.equal(logits(model), alone)
    assert sum(len(h) for pair in hooks(model).values() for h in pair) < sum(
        len(h) for pair in before.values() for h in pair
    )
    ll.bring_back(model, "b")
    ll.unload_to(model, "cpu", ["a"])
    other = small()
    second(other)
    assert torch.equal(logits(model), logits(other))
    copied = copy.deepcopy(model)
    for each in (model, copied):
        ll.bring_back(each, ["a"])
        assert torch.equal(logits(each), both)
    assert all(x is y for (_, x), (_, y) in zip(tensors, ll.adapters(model)["a"].named_tensors(), strict=True))
    assert all(torch.equal(t, ll.adapters(model)["a"].state_dict()[key]) for key, t in state.items())


def test_unloaded_gradients_stay_and_watches_come_once() -> None:
    model = small()
    adapter = ll.attach(model, ll.LoRAConfig(r=2, invocation_tokens=[3]), "a")
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in adapter.parameters()]
    ll.unload_to(model, "cpu", "a")
    for _ in range(2):
        ll.bring_back(model, "a")
    assert len(model._forward_pre_hooks) == 1
    pairs = zip(gradients, adapter.parameters(), strict=True)
    assert all(torch.equal(g, p.grad) for g, p in pairs if g is not None and p.grad is not None)
    with pytest.raises(ll.ConfigError, match=r"would lose the numbers"):
        ll.unload_to(model, "meta", "a")


def test_an_unloaded_history_takes_no_round_and_no_values(tmp_path: Path) -> None:
    model = small()
    for seed in (1, 2):
        keep(model, "lora", 0.7, seed=seed, r=seed)
    perturb(ll.attach(model, config("lora", r=2), "new"), 0.2)
    ll.save(model, tmp_path / "new", "new")
    ll.unload_to(model, "cpu", ["history", "new"])
    before = {key: t.clone() for key, t in ll.adapters(model)["new"].state_dict().items()}
    label = ll.history(model)[0].label
    for action in (lambda: ll.drop_round(model, label), lambda: ll.restore(model, tmp_path / "new", "new")):
        with pytest.raises(ll.TargetError, match="is unloaded"):
            action()
    ll.bring_back(model, "new")
    with pytest.raises(ll.TargetError, match="adapter 'history' is unloaded"):
        ll.freeze_into(model, "new")
    assert all(torch.equal(t, before[key]) for key, t in ll.adapters(model)["new"].state_dict().items())


def test_an_unloaded_adapter_can_not_be_asked_for(tmp_path: Path) -> None:
    model = small()
    for name in "ab":
        perturb(ll.attach(model, config("lora"), name), 0.2)
    ll.unload_to(model, "cpu", "a")
    match = r"adapter 'a' is unloaded\n  use lora_lite.bring_back\(model, 'a'\)"
    handle = ll.adapters(model)["a"]
    with pytest.raises(ll.TargetError, match=match), ll.rows(model, ["a", "b"]):
        pass
    with pytest.raises(ll.TargetError, match=match), ll.scaled(model, 0.5, "a"):
        pass
    with pytest.raises(ll.TargetError, match=match):
        handle.scale = 0.5
    with pytest.raises(ll.TargetError, match=match):
        ll.merge(model)
    assert not handle.in_training
    with ll.rows(model, ["b", None]):
        assert torch.isfinite(logits(model)).all()
    with ll.disabled(model):
        assert torch.equal(logits(model), logits(small()))
    ll.save(model, tmp_path / "a.safetensors", "a")
    ll.detach(model)
    with pytest.raises(ll.TargetError, match="no adapter 'a'"):
        ll.unload_to(model, "cpu", "a")


def test_positions_are_watched_again() -> None:
    model = small()
    perturb(ll.attach(model, ll.LoRAConfig(r=2, invocation_tokens=[3]), "a"), 0.3)
    wanted = logits(model)
    ll.unload_to(model, "cpu", "a")
    assert torch.equal(logits(model), logits(small()))
    assert not model._forward_pre_hooks
    ll.bring_back(model, "a")
    assert torch.equal(logits(model), wanted)
    assert (wanted - logits(small())).abs().max() > 1e-4
