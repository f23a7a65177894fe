"""Histories: kept rounds equal their explicit sum, listing, dropping, one file, order, anchors, and what is refused."""

import copy
import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    IDS,
    MIXED,
    OneLinear,
    attach,
    config,
    keep,
    keep_rounds,
    loss_of,
    moe,
    quantized,
    tiny_llama,
    train,
    trained,
)
from oracles import ORACLES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_laws import logits, same_snapshot, snapshot
from torch import nn
from transformers import AutoModelForCausalLM

import lora_lite as ll

EXACT: dict[str, Any] = {"dtype": torch.float64}
METHODS = [{"variant": v} for v in ("lora", "dora", "ia3", "ia3_ff", "abliteration", "steer", "antipasto")]
METHODS += [{"variant": "abliteration", "normalization": mode} for mode in ("pre", "full", "column")]


def bare(dtype: torch.dtype = torch.float32) -> Any:
    """What `mixed` has its history on."""
    return tiny_llama(dtype, bias=True, num_hidden_layers=1)


@cache
def _mixed(dtype: torch.dtype, rounds: int) -> Any:
    return keep_rounds(mixed(dtype, rounds - 1), [rounds - 1]) if rounds else bare(dtype)


def mixed(dtype: torch.dtype = torch.float32, rounds: int = len(MIXED)) -> Any:
    """A model with a history of many methods: MIXED, or the first of it."""
    return copy.deepcopy(_mixed(dtype, rounds))


LABELS = [f"default-{i}" if i > 1 else "default" for i in range(1, len(MIXED) + 1)]


def unchanged(model: Any, call: Callable[[], Any], error: type[Exception], match: str) -> None:
    """The call raises, and the model is as it was: outputs, tensors, hooks, adapters, rounds."""
    out, before, known = logits(model), snapshot(model), list(ll.adapters(model))
    rounds = ll.history(model) if "history" in known else []
    with pytest.raises(error, match=match):
        call()
    assert list(ll.adapters(model)) == known
    assert same_snapshot(before, snapshot(model))
    assert torch.equal(logits(model), out)
    assert not rounds or ll.history(model) == rounds


# ---- the sum ------------------------------------------------------------------------------------


def test_two_rounds_are_the_explicit_sum_in_float64() -> None:
    """Two ranks, scalings and sets of layers; the weights are summed by the papers' formulas."""
    model, summed = tiny_llama(torch.float64, bias=True), tiny_llama(torch.float64, bias=True)
    for c, fields in ((0.7, {"r": 3, "alpha": 2.0}), (-1.3, {"r": 5, "rslora": True, "target_names": "mlp"})):
        adapter = trained(model, "lora", seed=int(10 * c), **fields, **EXACT)
        for path, (d_in, d_out) in adapter.targets.items():
            tensors = {k.removeprefix(f"{path}."): v for k, v in adapter.state_dict().items() if k.startswith(path)}
            zeros, eye = torch.zeros(d_out, d_in).double(), torch.eye(d_in).double()
            delta = ORACLES["lora"](zeros, torch.zeros(d_out).double(), adapter.config, tensors, eye).T
            summed.get_submodule(path).weight.data += c * delta
        ll.freeze_into(model, c=c)
    torch.testing.assert_close(logits(model), logits(summed), rtol=1e-12, atol=1e-13)
    assert [type(step) for step in ll.adapters(model)["history"].views()["model.layers.0.mlp.up_proj"].cfg.steps] == [
        slice
    ]


def test_many_rounds_of_any_method_are_those_rounds_side_by_side() -> None:
    kept, beside = mixed(torch.float64), bare(torch.float64)
    for seed, (variant, fields, c) in enumerate(MIXED):
        trained(beside, variant, f"r{seed}", seed=seed, **fields).scale = c
    torch.testing.assert_close(logits(kept), logits(beside), rtol=1e-10, atol=1e-12)
    with ll.scaled(kept, 0.5, "history"):  # which multiplies every coefficient
        for adapter in ll.adapters(beside).values():
            adapter.scale *= 0.5
        torch.testing.assert_close(logits(kept), logits(beside), rtol=1e-10, atol=1e-12)
    with ll.scaled(kept, 0.0, "history"):
        assert torch.equal(logits(kept), logits(bare(torch.float64)))
    assert [round_.c for round_ in ll.history(kept)] == [c for *_, c in MIXED]
    steps = ll.adapters(kept)["history"].views()["model.layers.0.mlp.down_proj"].cfg.steps
    assert sum(isinstance(step, slice) for step in steps) == 4  # of five low-rank rounds there two are consecutive


def test_twenty_low_rank_rounds_are_one_pair_of_products() -> None:
    model, total = OneLinear().double(), 0.0
    x = torch.randn(5, 16, dtype=torch.float64)
    base = model(x)
    for i in range(20):
        variant = "lora" if i % 3 else "pissa"
        trained(model, variant, seed=i, r=1 + i % 4, target_names="proj", **EXACT).scale = 0.1 * i - 0.95
        if i:
            ll.adapters(model)["history"].scale = 0.0
        total = total + model(x) - base
        if i:
            ll.adapters(model)["history"].scale = 1.0
        ll.freeze_into(model)
    torch.testing.assert_close(model(x), base + total, rtol=1e-12, atol=1e-12)
    # Ranks 1 to 4, and twice that of the seven PiSSAs, whose change takes two pairs.
    assert {name: tuple(b.shape) for name, b in model.proj.named_buffers()} == {
        "lora_A__history": (68, 16),
        "lora_B__history": (24, 68),
        "lora_s__history": (68,),
    }
    assert len(model.proj._forward_hooks) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(method.values()))
def test_no_bit_changes_as_a_round_is_kept(method: dict[str, Any], dtype: torch.dtype) -> None:
    model = bare(dtype)
    keep(model, "lora", 0.7, target_names="q_proj")
    ranks = {"r": 3, "alpha": 7.0} if method["variant"] in ("lora", "dora") else {}
    adapter = trained(model, target_names="k_proj|mlp", **method, **ranks)
    adapter.scale = 0.3
    out = logits(model)
    ll.freeze_into(model)
    if method["variant"] == "lora":  # now one pair of products with what was kept before
        torch.testing.assert_close(logits(model), out, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    else:
        assert torch.equal(logits(model), out)


@pytest.mark.parametrize(("variant", "fields", "rank"), [("pissa", {"alpha": 2.0}, 6), ("ssteer", {}, 3)])
def test_other_low_rank_methods_are_kept_by_their_exact_factors(
    variant: str, fields: dict[str, Any], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(torch.float64)
    trained(model, variant, r=3, **fields, **EXACT).scale = -0.6
    out = logits(model)
    monkeypatch.setattr(torch.linalg, "svd", None)
    ll.freeze_into(model)
    torch.testing.assert_close(logits(model), out, rtol=1e-12, atol=1e-13)
    assert set(ll.history(model)[0].ranks.values()) == {rank}


def test_the_history_is_stored_so_that_its_rounds_stay_exact() -> None:
    model = tiny_llama(torch.bfloat16)
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        history = keep(model, dtype=dtype)
        assert {tensor.dtype for _, tensor in history.named_tensors()} == {history.config.dtype} == {wanted}


# ---- a session ----------------------------------------------------------------------------------


def test_rounds_are_listed_by_labels() -> None:
    model = tiny_llama()
    keep(model, c=0.5, r=3)
    keep(model, "ia3", target_names="k_proj")
    trained(model, "pissa", "formal", r=2, target_names="mlp")
    ll.freeze_into(model, "formal", c=-2.0)
    trained(model, "lora", per_layer={"mlp": {"r": 2}})
    ll.freeze_into(model, label="last")
    assert [str(round_) for round_ in ll.history(model)] == [
        "default: lora, c 0.5, 14 layers, rank 3",
        "default-2: ia3, c 1, 2 layers, by its own method",
        "formal: pissa, c -2, 6 layers, rank 4",
        "last: lora, c 1, 14 layers, rank 2 to 8",
    ]
    first = ll.history(model)[0]
    assert (first.label, first.variant, first.c, first.config.r) == ("default", "lora", 0.5, 3)
    assert first.ranks["model.layers.0.self_attn.q_proj"] == 3


def test_a_kept_round_comes_off_its_name_is_free_and_it_gets_no_gradient() -> None:
    model = tiny_llama()
    before, base = snapshot(model), logits(model)
    other = trained(model, "lora", "other", seed=5)
    values = {key: value.clone() for key, value in other.state_dict().items()}
    keep(model)
    adapter = ll.attach(model, config("dora", r=2))
    assert list(ll.adapters(model)) == ["history", "other", "default"]
    assert not list(ll.adapters(model)["history"].parameters())
    loss_of(model).backward()
    with_gradient = {path for path, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {path for path, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in path and "history" not in path for path in with_gradient)
    assert all(torch.equal(value, values[key]) for key, value in other.state_dict().items())
    kept = {key: value.clone() for key, value in ll.adapters(model)["history"].state_dict().items()}
    train(model, adapter)
    assert all(torch.equal(value, kept[key]) for key, value in ll.adapters(model)["history"].state_dict().items())
    ll.detach(model)
    for parameter in model.parameters():
        parameter.grad = None
    assert same_snapshot(before, snapshot(model))
    assert torch.equal(logits(model), base)


def test_the_anchors_are_base_plus_history_and_the_pristine_base() -> None:
    model = tiny_llama()
    base = logits(model)[:, -1].double().log_softmax(-1)
    keep(model, c=2.0)
    on_history = logits(model)[:, -1].double().log_softmax(-1)
    trained(model, "lora", seed=2)
    now = logits(model)[:, -1].double().log_softmax(-1)
    with ll.scaled(model, 0.0, "default"):
        assert torch.equal(logits(model)[:, -1].double().log_softmax(-1), on_history)
    with ll.disabled(model):
        assert torch.equal(logits(model)[:, -1].double().log_softmax(-1), base)
    for name, anchor in (("default", on_history), (None, base)):
        wanted = (anchor.exp() * (anchor - now)).sum(-1)
        torch.testing.assert_close(ll.kl_divergence(model, [IDS], name), wanted, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(ll.kl_divergence(model, [IDS], "default"), ll.kl_divergence(model, [IDS]), rtol=0.01)


def test_a_history_comes_first_whenever_it_was_loaded(tmp_path: Path) -> None:
    model = tiny_llama()
    keep(model)
    ll.save(model, tmp_path / "h.safetensors", "history")
    trained(model, "ia3", target_names="_proj$")
    wanted = logits(model)
    other = tiny_llama()
    trained(other, "ia3", target_names="_proj$")
    ll.load(other, tmp_path / "h.safetensors", "history")
    assert list(ll.adapters(other)) == ["history", "default"]
    assert torch.equal(logits(other), wanted)


def test_a_round_may_pass_an_adapter_that_does_not_notice() -> None:
    model = tiny_llama(torch.float64)
    trained(model, "lora", "style", seed=3, target_names="q_proj|up_proj", **EXACT)
    trained(model, "lora", **EXACT)
    out = logits(model)
    ll.freeze_into(model)
    assert list(ll.adapters(model)) == ["history", "style"]
    torch.testing.assert_close(logits(model), out, rtol=1e-12, atol=1e-13)

    trained(model, "ia3", "gain", target_names="down_proj").scale = 0.0
    trained(model, "lora", target_names="q_proj")
    ll.freeze_into(model)
    trained(model, "lora", target_names="down_proj")
    match = (
        r"down_proj: 'gain' came before 'default', and would act diff.*\n  a history comes first: keep 'gain' before"
    )
    unchanged(model, lambda: ll.freeze_into(model), ll.TargetError, match)
    ll.freeze_into(model, "gain", c=1.0)
    ll.freeze_into(model)
    assert len(ll.history(model)) == 4

    trained(model, "steer", "late", target_names="down_proj", start=3)
    trained(model, "abliteration", target_names="down_proj")
    with pytest.raises(ll.TargetError, match=r"down_proj: 'late' came before 'default', and would act differently"):
        ll.freeze_into(model)


# ---- dropping, one file, merging ----------------------------------------------------------------


@pytest.mark.parametrize("at", [2, 5])
def test_a_dropped_round_is_as_if_it_had_not_been_kept(at: int) -> None:
    """A low-rank one, with others before and after it in the pair of products; one of another method."""
    model, without = mixed(), keep_rounds(mixed(rounds=at), range(at + 1, len(MIXED)))
    round_ = ll.history(model)[at]
    ll.drop_round(model, round_.label)
    assert torch.equal(logits(model), logits(without))
    ours, theirs = (ll.adapters(each)["history"] for each in (model, without))
    assert ours.targets == theirs.targets
    assert ours.base == theirs.base
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())
    assert [r.label for r in ll.history(model)] == [label for i, label in enumerate(LABELS) if i != at]


def test_adding_and_dropping_leaves_every_bit_and_the_last_round_takes_the_history_along() -> None:
    model = tiny_llama()
    before, base = snapshot(model), logits(model)
    keep(model, c=0.3, target_names="mlp")
    one, shown = logits(model), snapshot(model)
    keep(model, "dora", seed=2)
    keep(model, "pissa", seed=3, target_names="q_proj")
    assert not torch.equal(logits(model), one)
    for label in ("default-3", "default-2"):
        ll.drop_round(model, label)
    assert torch.equal(logits(model), one)
    assert same_snapshot(shown, snapshot(model))
    ll.drop_round(model, "default")
    assert not ll.adapters(model)
    assert same_snapshot(before, snapshot(model))
    assert torch.equal(logits(model), base)


def test_one_file_holds_the_whole_history_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed()
    ll.save(model, tmp_path / "h.safetensors", "history")

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("load computed something")

    for variant in ("dora", "pissa", "abliteration"):
        monkeypatch.setattr(ll.REGISTRY[variant], "init", staticmethod(forbidden))
    monkeypatch.setattr(torch.linalg, "svd", forbidden)
    fresh = bare()
    ll.load(fresh, tmp_path / "h.safetensors", "history")
    assert torch.equal(logits(fresh), logits(model))
    assert ll.history(fresh) == ll.history(model)
    monkeypatch.undo()
    for each in (model, fresh):
        ll.drop_round(each, "default-3")
        keep(each, "lora", 0.1, seed=9)
    assert torch.equal(logits(fresh), logits(model))
    ll.save(model, tmp_path / "h.safetensors", "history")
    ll.restore(fresh, tmp_path / "h.safetensors", "history")


def test_a_history_with_a_round_that_reads_the_base_wants_its_own(tmp_path: Path) -> None:
    model = tiny_llama()
    keep(model)
    ll.save(model, tmp_path / "lora.safetensors", "history")
    keep(model, "dora")
    ll.save(model, tmp_path / "dora.safetensors", "history")
    other = tiny_llama(seed=1)
    unchanged(
        other, lambda: ll.load(other, tmp_path / "dora.safetensors"), ll.CheckpointError, "trained on another base"
    )
    ll.load(other, tmp_path / "lora.safetensors", "history")
    ll.drop_round(other, "default")
    ll.load(other, tmp_path / "dora.safetensors", "history", verify_base=False)
    trained(other, "lora")
    match = r"adapters 'history' and 'default' belong to different bases\n  history: .*\n  default: "
    unchanged(other, lambda: ll.freeze_into(other), ll.BaseModelError, match)
    ll.freeze_into(other, into="here")
    assert list(ll.adapters(other)) == ["history", "here"]
    assert [site.state.name for site in other.model.layers[0].mlp.up_proj._lora_lite.values()] == ["history", "here"]


@pytest.mark.parametrize("variant", ["shira", "supertuning"])
def test_a_round_may_have_a_table_of_indices(variant: str, tmp_path: Path) -> None:
    model = tiny_llama()
    trained(model, variant)
    out = logits(model)
    ll.freeze_into(model)
    assert torch.equal(logits(model), out)
    ll.save(model, tmp_path / "h.safetensors", "history")
    fresh = tiny_llama()
    ll.load(fresh, tmp_path / "h.safetensors", "history")
    assert torch.equal(logits(fresh), out)


def test_a_merged_history_is_the_attached_one(tmp_path: Path) -> None:
    model = mixed(torch.float64)
    attached, before = logits(model), snapshot(model)
    ll.merge(model)
    torch.testing.assert_close(logits(model), attached, rtol=1e-10, atol=1e-12)
    with pytest.raises(ll.TargetError, match="can't drop a round: history is merged into the weights"):
        ll.drop_round(model, "default")
    ll.unmerge(model)
    assert torch.equal(logits(model), attached)
    assert same_snapshot(before, snapshot(model))

    lora = tiny_llama(torch.float64)
    keep(lora, **EXACT)
    adapter = trained(lora, "lora", seed=4, **EXACT)
    attached = logits(lora)
    ll.merge(lora, "history")
    torch.testing.assert_close(logits(lora), attached, rtol=1e-10, atol=1e-12)
    match = "can't keep a round: history is merged into the weights"
    unchanged(lora, lambda: ll.freeze_into(lora), ll.TargetError, match)
    train(lora, adapter, 1)


def test_a_history_is_merged_on_disk_and_written_as_a_lora(tmp_path: Path) -> None:
    """Of rounds that read the base, turn or scale inputs and add constants, too; a LoRA has no room for constants."""
    bare().save_pretrained(tmp_path / "base")
    model = mixed()
    ll.save(model, tmp_path / "h.safetensors", "history")
    ll.merge_checkpoint(tmp_path / "base", tmp_path / "h.safetensors", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(bare()), logits(model), atol=0.1)

    for label, round_ in zip(LABELS, MIXED, strict=True):
        if round_[0] in ("steer", "ia3_ff", "ia3", "abliteration", "dora"):  # these change a bias, or all of a weight
            ll.drop_round(model, label)
    ll.save_peft(model, tmp_path / "peft", "history", rank=32)
    fresh = bare()
    ll.load_peft(fresh, tmp_path / "peft")
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_history_on_a_quantised_base(tiny: str, quantization: str, tmp_path: Path) -> None:
    model = quantized(tiny, quantization)
    for seed, variant in enumerate(("lora", "dora", "ia3")):
        trained(model, variant, seed=seed).scale = 0.7
        out = logits(model)
        ll.freeze_into(model)
        if variant == "lora":
            torch.testing.assert_close(logits(model), out, rtol=0.02, atol=0.02)
        else:
            assert torch.equal(logits(model), out)
    ll.save(model, tmp_path / "h.safetensors", "history")
    fresh = quantized(tiny, quantization)
    ll.load(fresh, tmp_path / "h.safetensors", "history")
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("modes", [("none", "none"), ("pre", "full")])
def test_rounds_on_fused_experts(modes: tuple[str, str], tmp_path: Path) -> None:
    model = moe("qwen3", experts_implementation="eager")
    for mode in modes:
        cfg = ll.AbliterationConfig(normalization=mode, strength=0.6)
        attach(model, cfg)
        out = logits(model)
        ll.freeze_into(model, c=1.0)
        assert torch.equal(logits(model), out)
    ll.save(model, tmp_path / "h.safetensors", "history")
    fresh = moe("qwen3", experts_implementation="eager")
    ll.load(fresh, tmp_path / "h.safetensors", "history")
    assert torch.equal(logits(fresh), out)
    other = "pre" if modes[0] == "none" else "none"
    attach(model, ll.AbliterationConfig(normalization=other))
    match = "rounds that act on the output of fused experts and rounds that act on each matrix can't share a history"
    unchanged(model, lambda: ll.freeze_into(model), ll.TargetError, match)
    ll.drop_round(model, "default")
    assert torch.equal(logits(fresh), out)


def test_copies_pickles_and_casts_of_a_mixed_history() -> None:
    model = mixed()
    out = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), out)
        ll.drop_round(twin, "default-4")
        assert not torch.equal(logits(twin), out)
        assert torch.equal(logits(model), out)
    assert logits(model.to(torch.bfloat16)).dtype == torch.bfloat16


def test_the_round_in_training_has_the_same_gradients_through_checkpoints() -> None:
    """Which run each block once more in the backward, after the scale of the history is what it was."""
    found = []
    for checkpoints in (False, True):
        model = mixed(torch.float64)
        adapter = trained(model, "lora", **EXACT)
        model.train()
        if checkpoints:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        losses = []
        for c in (1.0, 0.0, -0.5):
            with ll.scaled(model, c, "history"):
                losses.append(loss_of(model))
        sum(losses).backward()
        found.append([p.grad for p in adapter.parameters()])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_a_round_on_another_history_is_told(tmp_path: Path, log: list[str]) -> None:
    """Its file remembers the history that it was trained on: a load on another one warns, a resume is refused."""
    model = bare()
    keep(model, "lora", 0.7)
    trained(model, "lora")
    ll.save(model, tmp_path / "round.safetensors")
    ll.save(model, tmp_path / "history.safetensors", "history")

    def warnings() -> list[str]:
        return [line for line in log if "on top of" in line]

    fresh = bare()
    ll.load(fresh, tmp_path / "history.safetensors", "history")
    ll.load(fresh, tmp_path / "round.safetensors")
    assert not warnings()
    assert torch.equal(logits(fresh), logits(model))
    ll.restore(fresh, tmp_path / "round.safetensors")
    ll.adapters(fresh)["history"].scale = 0.5
    with pytest.raises(ll.CheckpointError, match="another history than this model has"):
        ll.restore(fresh, tmp_path / "round.safetensors")
    ll.load(bare(), tmp_path / "round.safetensors")
    assert len(warnings()) == 1


# ---- the next round's SVD -----------------------------------------------------------------------


def test_the_next_svd_is_of_the_base_or_of_base_and_history() -> None:
    def check(of: str, w: torch.Tensor) -> None:
        for variant in ("pissa", "ssteer", "antipasto"):
            adapter = ll.attach(model, config(variant, r=2, target_names="proj", svd_of=of, **EXACT))
            held = {key.removeprefix("proj.lora_"): value for key, value in adapter.state_dict().items()}
            part = held["B0"] @ held["A0"] if variant == "pissa" else held["U"] * held["S"] @ held["V"].T
            u, s, vt = torch.linalg.svd(w, full_matrices=False)
            torch.testing.assert_close(part, u[:, :2] * s[:2] @ vt[:2])
            ll.detach(model, "default")

    model = OneLinear().double()
    w, x = model.proj.weight.detach().clone(), torch.randn(4, 16, dtype=torch.float64)
    check("history", w)  # nothing is kept yet
    for variant, fields in (("lora", {"r": 3}), ("ia3", {}), ("ia3_ff", {}), ("lora", {"r": 1})):
        keep(model, variant, 1.7, target_names="proj", **fields, **EXACT)
    with torch.no_grad():
        worked_in = (model(torch.eye(16).double()) - model(torch.zeros(16).double())).T
        out = model(x)
    assert not torch.allclose(w, worked_in, atol=0.1)
    trained(model, "lora", "style", target_names="proj")  # which is no history
    for of, wanted in (("base", w), ("history", worked_in)):
        check(of, wanted)
    ll.detach(model, "style")
    assert torch.equal(model(x), out)
    ll.adapters(model)["history"].scale = 0.0
    check("history", w)


def test_a_pissa_file_from_before_the_choice_loads(tmp_path: Path) -> None:
    model = tiny_llama()
    trained(model, "pissa", r=2)
    ll.save(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["lora_lite"])
    del meta["config"]["svd_of"]
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors", {"lora_lite": json.dumps(meta)})
    fresh = tiny_llama()
    assert ll.load(fresh, tmp_path / "a.safetensors").config.svd_of == "base"
    assert torch.equal(logits(fresh), logits(model))
    with pytest.raises(ll.ConfigError, match=r"svd_of='both'\): wanted \"base\" or \"history\""):
        ll.PiSSAConfig(svd_of="both")


# ---- what is refused ----------------------------------------------------------------------------

BAD: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (lambda m: ll.freeze_into(m, c=float("nan")), ll.ConfigError, "c=nan: wanted a finite number, the coefficient"),
    (lambda m: ll.freeze_into(m, c=float("inf")), ll.ConfigError, "c=inf: wanted a finite number"),
    (lambda m: ll.freeze_into(m, "fr"), ll.TargetError, "no adapter 'fr' on this LlamaForCausalLM"),
    (lambda m: ll.freeze_into(m, into="default"), ll.TargetError, "adapter 'default' is no history: its method is 'l"),
    (lambda m: ll.freeze_into(m, into="a b"), ll.ConfigError, "adapter name 'a b'"),
    (lambda m: ll.freeze_into(m, "history"), ll.TargetError, "adapter 'history' is a history itself"),
    (lambda m: ll.freeze_into(m, "history", "other"), ll.TargetError, "adapter 'history' is a history itself"),
    (lambda m: ll.freeze_into(m, label="a b"), ll.ConfigError, "label='a b': wanted letters and digits"),
    (lambda m: ll.freeze_into(m, label="default"), ll.ConfigError, r"none of \['default', 'default-2'\]"),
    (lambda m: ll.drop_round(m, "fr"), ll.TargetError, "no round 'fr' in 'history'\n  it has default, default-2"),
    (lambda m: ll.drop_round(m, "default", "fr"), ll.TargetError, "no adapter 'fr'"),
    (lambda m: ll.drop_round(m, "default", "default"), ll.TargetError, "adapter 'default' is no history"),
    (lambda m: ll.history(m, "default"), ll.TargetError, "adapter 'default' is no history"),
    (lambda m: ll.attach(m, ll.HistoryConfig(), "h"), ll.ConfigError, "made of rounds.*\n  use lora_lite.freeze_into"),
    (lambda m: ll.adapters(m)["history"].configure(rounds=()), ll.ConfigError, "rounds can't change while it is att"),
    (lambda m: ll.freeze_into(nn.DataParallel(m)), ll.TargetError, "attach first, then wrap"),
]


@pytest.fixture(scope="module")
def session() -> Any:
    model = tiny_llama(num_hidden_layers=1)
    keep(model, "lora", target_names="q_proj")
    keep(model, "dora", target_names="mlp")
    trained(model, "lora")
    return model


@pytest.mark.parametrize(("call", "error", "match"), BAD)
def test_bad_input_is_refused_and_changes_nothing(session: Any, call: Any, error: Any, match: str) -> None:
    unchanged(session, lambda: call(session), error, match)


def test_odd_states_are_refused(session: Any) -> None:
    model = copy.deepcopy(session)
    ll.adapters(model)["history"].scale = 0.5
    match = r"'history' is at scale 0.5, which multiplies what it keeps\n  set it to 1 first"
    unchanged(model, lambda: ll.freeze_into(model), ll.ConfigError, match)
    ll.adapters(model)["history"].scale = 1.0
    ll.adapters(model)["default"].scale = 0.0
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.lora_B[0, 0] = float("nan")
    with pytest.raises(ll.CheckpointError, match="adapter 'default' in memory: 1 tensors hold NaN"):
        ll.freeze_into(model, c=1.0)
    ll.detach(model, "default")
    model.model.layers[0].self_attn.o_proj.lora_A__history = torch.ones(1)
    trained(model, "lora", target_names="o_proj")
    unchanged(model, lambda: ll.freeze_into(model), ll.TargetError, "o_proj: it has lora_A__history already")


@pytest.mark.parametrize("call", [ll.freeze_into, lambda m: ll.drop_round(m, "default"), lambda m: new(m)])
@pytest.mark.parametrize("at", [1, 4, 12])
def test_a_failure_in_the_middle_changes_nothing(
    session: Any, call: Any, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, real = copy.deepcopy(session), [], nn.Module.register_buffer

    def failing(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == at:
            raise ZeroDivisionError("in the middle")
        real(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "register_buffer", failing)
    unchanged(model, lambda: call(model), ZeroDivisionError, "in the middle")
    assert len(calls) >= at


def new(model: Any) -> None:
    ll.freeze_into(model, into="new")


def test_a_low_rank_that_is_not_what_forward_does_is_refused() -> None:
    class Odd:
        name = "odd"
        param_specs = staticmethod(
            lambda d_in, d_out, cfg: {"lora_A": ll.ParamSpec((8, d_in)), "lora_B": ll.ParamSpec((d_out, 8))}
        )
        forward = staticmethod(lambda layer, x, y: y + 2 * (x @ layer.lora_A.mT) @ layer.lora_B.mT)
        low_rank = staticmethod(lambda layer: (layer.lora_A, layer.lora_B, 1.0))

    ll.register(Odd)
    model = tiny_llama()
    trained(model, "odd")
    match = "q_proj: low_rank of 'odd' gave another change than its forward makes"
    unchanged(model, lambda: ll.freeze_into(model), ll.VariantError, match)
    for wrong, found in (
        (lambda layer: (layer.lora_A, layer.lora_B.mT, 2.0), r"A \(8, 64\), B \(8, 64\) and s \(\)"),
        (lambda layer: (layer.lora_A, layer.lora_B, torch.ones(3)), r"B \(64, 8\) and s \(3,\)"),
        (lambda layer: (layer.lora_A, layer.lora_B, 3.0 * layer.scale), "another change"),
    ):
        ll.REGISTRY["odd"].low_rank = staticmethod(wrong)
        with pytest.raises(ll.VariantError, match=found):
            ll.freeze_into(model, c=0.5)
    ll.REGISTRY["odd"].low_rank = staticmethod(lambda layer: (layer.lora_A, layer.lora_B, 2.0 * layer.scale))
    out = logits(model)
    ll.freeze_into(model)
    torch.testing.assert_close(logits(model), out)
    assert set(ll.history(model)[0].ranks.values()) == {8}


def test_a_method_of_ones_own_is_kept_as_it_is(double: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    trained(model, "double").scale = 0.5
    out = logits(model)
    ll.freeze_into(model)
    assert torch.equal(logits(model), out)
    assert set(ll.history(model)[0].ranks.values()) == {None}
    ll.save(model, tmp_path / "h.safetensors", "history")
    fresh = tiny_llama()
    ll.load(fresh, tmp_path / "h.safetensors")
    assert torch.equal(logits(fresh), out)


LORA = ll.LoRAConfig().to_dict()
KEPT = {"label": "a", "c": 1.0, "config": LORA}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"rounds": "ab"}, "wanted a list of rounds"),
        ({"rounds": [3]}, "wanted a label, a finite c and a config for each"),
        ({"rounds": [KEPT | {"c": float("nan")}]}, "a finite c"),
        ({"rounds": [KEPT | {"label": "a b"}]}, "wanted a label"),
        ({"rounds": [KEPT | {"label": "a" * 101}]}, "wanted a label"),
        ({"rounds": [KEPT | {"config": {"variant": ["lora"]}}]}, "a config for each"),
        ({"rounds": [KEPT | {"config": LORA | {"r": 0}}]}, r"LoRAConfig\(r=0\)"),
        ({"rounds": [KEPT | {"config": ll.HistoryConfig().to_dict()}]}, "no history within a history"),
        ({"rounds": [KEPT | {"label": f"a{i}"} for i in range(257)]}, "wanted at most 256"),
        ({"rounds": [KEPT, KEPT]}, "labels of which no two are alike"),
        ({"rounds": [KEPT], "here": {"b": 3}}, "wanted {label of a round: rank, or fields}"),
        ({"rounds": [KEPT], "here": {"a": 0}}, "a rank of at least 1, or fields, for each"),
        ({"rounds": [KEPT], "here": {"a": True}}, "a rank of at least 1"),
        ({"rounds": [KEPT], "here": {"a": 2**40}}, "a rank of at least 1"),
        ({"rounds": [KEPT], "here": {"a": {"dropout": 3.0}}}, r"dropout=3.0\)"),
        ({"rounds": [KEPT], "here": {"a": {"target_names": "x"}}}, r"\['target_names'\] can't differ by layer"),
    ],
)
def test_what_a_file_says_of_rounds_is_checked(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ll.ConfigError, match=match):
        ll.HistoryConfig(**fields)


def test_a_files_regexes_are_not_compiled_where_fields_differ_by_layer() -> None:
    kept = KEPT | {"config": LORA | {"target_names": ["("]}}
    cfg = ll.HistoryConfig.from_dict(ll.HistoryConfig().to_dict() | {"rounds": [kept], "here": {"a": {"r": 3}}})
    assert cfg.own_methods[0].cfg.r == 3
    assert cfg.own_methods[0].cfg.target_names == ("(",)
    assert ll.HistoryConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
