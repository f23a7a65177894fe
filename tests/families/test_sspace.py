"""S-space: which singular directions are chosen, from what; the two methods that work in them; bad data."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contrasts import FITTED, sides
from learning_rates import learning_rate
from models import IDS, OneLinear, config, loss_of, perturb, quantized, tiny_llama, train
from oracles import skew
from test_laws import logits, same_snapshot, snapshot
from torch import nn

import lora_lite as ll
from lora_lite.families import sspace
from lora_lite.variants.antipasto import cayley_less_identity

per_method = pytest.mark.parametrize("variant", ["ssteer", "antipasto"])


def batches(seed: int, n: int = 3) -> list[dict[str, torch.Tensor]]:
    """Ragged batches: two rows of up to seven tokens, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        ids = torch.randint(1, 96, (2, 7), generator=generator)
        mask = torch.ones_like(ids)
        ids[0, : i + 1] = mask[0, : i + 1] = 0
        out.append({"input_ids": ids, "attention_mask": mask})
    return out


SIDES = {"positive": batches(1), "negative": batches(2, n=2)}
DATA = {"wanda": batches(1), "act": batches(1), "min_std": SIDES}


def made(variant: str = "ssteer", model: Any = None, data: Any = None, **fields: Any) -> tuple[Any, ll.Adapter]:
    model = tiny_llama() if model is None else model
    return model, ll.attach(model, config(variant, **({"r": 6} | fields)), calibration_data=data)


def inputs_of(model: Any, path: str, data: list[dict[str, torch.Tensor]]) -> np.ndarray:
    """What a layer sees at every token that is no padding, (n, i)."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for batch in data:
        model(**batch)
    handle.remove()
    return np.concatenate([x[b["attention_mask"].bool()].double().numpy() for x, b in zip(seen, data, strict=True)])


def chosen_of(adapter: ll.Adapter, path: str) -> list[int]:
    return adapter.state_dict()[f"{path}.lora_chosen"].nonzero()[:, 0].tolist()


# ---- which directions ---------------------------------------------------------------------------


@per_method
@pytest.mark.parametrize("select", sspace.SELECT)
def test_the_choice_is_that_of_a_direct_computation(select: str, variant: str) -> None:
    model = tiny_llama(torch.float64)
    paths = [target.path for target in ll.plan(model, config(variant))]
    before = {path: [inputs_of(model, path, side) for side in SIDES.values()] for path in paths}
    _, adapter = made(variant, model, DATA.get(select), select=select, dtype=torch.float64)
    for path in paths:
        weight = model.get_submodule(path).weight.numpy()
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        positive, negative = (x @ vt.T for x in before[path])
        score = {
            "top_s": s,
            "wanda": s * np.abs(positive).mean(0),
            "act": np.abs(positive).mean(0),
            "min_std": np.minimum(positive.std(0), negative.std(0)),
        }[select]
        wanted = sorted(np.argsort(-score)[:6])
        assert chosen_of(adapter, path) == wanted
        tensors = {key: adapter.state_dict()[f"{path}.lora_{key}"] for key in ("U", "S", "V", "chosen")}
        part = (u[:, wanted] * s[wanted]) @ vt[wanted]  # singular vectors have no sign of their own
        torch.testing.assert_close(tensors["U"] @ tensors["S"].diag() @ tensors["V"].T, torch.from_numpy(part))
        torch.testing.assert_close(tensors["S"], torch.from_numpy(s[wanted]))
        assert tensors["chosen"].tolist() == [float(i in wanted) for i in range(len(s))]
    if select != "top_s":
        assert any(chosen_of(adapter, path) != list(range(6)) for path in paths)


@pytest.mark.parametrize("select", ["wanda", "act"])
def test_two_sides_are_taken_together_where_one_set_is_looked_at(select: str) -> None:
    _, apart = made(data=SIDES, select=select)
    _, together = made(data=[*SIDES["positive"], *SIDES["negative"]], select=select)
    assert all(torch.equal(t, apart.state_dict()[key]) for key, t in together.state_dict().items())


@pytest.mark.parametrize("select", ["wanda", "min_std"])
def test_how_much_is_held_at_a_time_changes_nothing(select: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, at_once = made(data=DATA[select], select=select)
    monkeypatch.setattr(sspace, "SVD_BYTES", 4 * 64 * 128 * 3)
    _, in_parts = made(data=DATA[select], select=select)
    assert all(torch.equal(t, at_once.state_dict()[key]) for key, t in in_parts.state_dict().items())


def test_equal_scores_go_to_the_first_and_the_order_is_the_weights() -> None:
    assert sspace.top(torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0]), 3).tolist() == [True, True, False, False, True]
    assert sspace.top(torch.ones(100), 40).nonzero()[:, 0].tolist() == list(range(40))
    _, adapter = made(data=DATA["act"], select="act")
    for path in adapter.targets:
        s = adapter.state_dict()[f"{path}.lora_S"]
        assert torch.equal(s, s.sort(descending=True).values)


@pytest.mark.parametrize(
    ("chosen", "depth"), [([1, 1, 0, 0, 0], 0), ([0, 0, 0, 1, 1], 1), ([1, 0, 0, 0, 1], 0.5), ([1, 1], 0), ([0, 1], 1)]
)
def test_tail_depth(chosen: list[int], depth: float) -> None:
    assert sspace.tail_depth(torch.tensor(chosen).bool()) == depth


def test_the_tail_depth_is_logged(log: list[str]) -> None:
    _, adapter = made(data=DATA["act"], select="act", target_names="up_proj")
    depths = []
    for path in adapter.targets:
        depth = (np.mean(chosen_of(adapter, path)) - 2.5) / (64 - 6)
        assert f"DEBUG {path}: 6 of 64 directions by act, tail depth {depth:.2f}" in log
        depths.append(depth)
    line = rf"INFO directions by act: tail depth {np.mean(depths):.2f} on average, {max(depths):.2f} in model.layers.\d"
    assert sum(bool(re.match(line, each)) for each in log) == 1


@per_method
def test_the_rank_is_clamped_to_what_a_layer_has(variant: str, log: list[str]) -> None:
    model, adapter = made(variant, r=50)
    ranks = {path: len(adapter.state_dict()[f"{path}.lora_S"]) for path in adapter.targets}
    assert ranks == {path: min(50, *shape) for path, shape in adapter.targets.items()}
    assert set(ranks.values()) == {32, 50}
    assert "INFO 4 of 14 layers have fewer directions than r, such as model.layers.0.self_attn.k_proj: all are" in str(
        log
    )
    planned = ll.plan(model, config(variant, r=50)).parameters
    assert planned == sum(p.numel() for p in adapter.parameters())


def test_all_directions_are_the_whole_weight() -> None:
    model, adapter = made(r=10**9, model=tiny_llama(torch.float64), dtype=torch.float64)
    for path in adapter.targets:
        u, s, v = (adapter.state_dict()[f"{path}.lora_{key}"] for key in "USV")
        torch.testing.assert_close(u @ s.diag() @ v.T, model.get_submodule(path).weight.detach())


# ---- data that doesn't fit ----------------------------------------------------------------------


@per_method
@pytest.mark.parametrize(
    ("select", "data", "message"),
    [
        (
            "min_std",
            DATA["act"],
            r"select='min_std' .* two sets of activations, and got one\n  give calibration_data={",
        ),
        ("min_std", {"positive": DATA["act"]}, r"got \['positive'\]; wanted {\"positive\": batches, \"negative\""),
        ("min_std", {**SIDES, "negative": []}, r"there are no batches to calibrate on"),
        ("min_std", {**SIDES, "negative": [IDS[:1, :1]]}, r"one side has a single token, which has no spread"),
        ("act", [], r"there are no batches to calibrate on"),
        ("wanda", {"positive": [], "negative": []}, r"there are no batches to calibrate on"),
        ("wanda", iter(DATA["wanda"]), r"calibration_data is an iterator, which can be read once"),
        ("wanda", {**SIDES, "positive": iter([])}, r"calibration_data\['positive'\] is an iterator"),
        ("wanda", IDS, r"calibration_data is a Tensor: wanted a list of batches"),
        ("wanda", "text", r"calibration_data is a str: wanted a list of batches"),
        ("wanda", ["text"], r"a batch is a str: wanted a tensor of ids"),
        ("wanda", None, r"is computed from data: use attach\(..., calibration_data=...\)"),
        (
            "top_s",
            DATA["act"],
            r"takes no calibration_data as it is configured\n  leave it out, or change what the con",
        ),
    ],
)
def test_data_that_does_not_fit_is_an_error_and_changes_nothing(
    variant: str, select: str, data: Any, message: str
) -> None:
    model = tiny_llama()
    before, base = snapshot(model), logits(model)
    with pytest.raises(ll.ConfigError, match=message):
        made(variant, model, data, select=select)
    assert same_snapshot(before, snapshot(model))
    assert torch.equal(logits(model), base)


@per_method
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"select": "best"}, r"Config\(select='best'\): wanted one of \('top_s', 'wanda', 'act', 'min_std'\)"),
        ({"r": 0}, r"Config\(r=0\): wanted a rank of at least 1"),
        ({"svd_of": "both"}, r"Config\(svd_of='both'\): wanted \"base\" or \"history\""),
        ({"per_layer": {"up": {"select": "act"}}}, r"\['select'\] can't differ by layer"),
    ],
)
def test_a_bad_field_is_named(variant: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        config(variant, **fields)


@pytest.mark.parametrize("fields", [{"rotate": "both"}, {"block": 1}, {"block": -4}, {"block": True}])
def test_a_bad_rotation_is_named(fields: dict[str, Any]) -> None:
    ((name, value),) = fields.items()
    with pytest.raises(ll.ConfigError, match=rf"AntiPaSTOConfig\({name}={re.escape(repr(value))}\): wanted"):
        ll.AntiPaSTOConfig(**fields)


@per_method
def test_new_data_chooses_anew_until_something_is_trained(variant: str) -> None:
    model, adapter = made(variant, data=DATA["act"], select="act")
    _, other = made(variant, data=batches(7), select="act")
    old = {key: value.clone() for key, value in adapter.state_dict().items()}
    adapter.configure(calibration_data=batches(7))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in adapter.state_dict().items())
    assert not all(torch.equal(value, old[key]) for key, value in adapter.state_dict().items())
    train(model, adapter)
    kept = {key: value.clone() for key, value in adapter.state_dict().items()}
    for data, message in ((batches(8), "it was trained in the directions that it has"), ([], "was trained|no batches")):
        with pytest.raises(ll.ConfigError, match=message):
            adapter.configure(calibration_data=data)
        assert all(torch.equal(value, kept[key]) for key, value in adapter.state_dict().items())


@per_method
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_is_refused_before_anything_is_computed(variant: str, quantization: str, tiny: str) -> None:
    model = quantized(tiny, quantization)
    before = sorted(model.state_dict())
    with pytest.raises(ll.QuantizedWeightError, match=rf"q_proj: '{variant}' needs a dense weight, and this one is"):
        made(variant, model, SIDES, select="min_std")
    assert sorted(model.state_dict()) == before


@per_method
def test_c_is_a_finite_number(variant: str) -> None:
    model, adapter = made(variant)
    perturb(adapter)
    wanted = logits(model)
    for c in (float("nan"), float("inf")):
        with pytest.raises(ll.ConfigError, match=r"scale .*: wanted a finite number"):
            adapter.scale = c
        with pytest.raises(ll.ConfigError, match=r"scale .*: wanted a finite number"), ll.scaled(model, c):
            pass
    assert adapter.scale == 1.0
    assert torch.equal(logits(model), wanted)


def test_a_rotation_alone_is_training_too() -> None:
    model, adapter = made("antipasto", data=DATA["act"], select="act")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_theta[0, 0] = 0.1
    wanted = logits(model)
    with pytest.raises(ll.ConfigError, match=r"layers.1.mlp.up_proj: it was trained in the directions that it has"):
        adapter.configure(calibration_data=batches(7))
    assert torch.equal(logits(model), wanted)


# ---- the two methods ----------------------------------------------------------------------------


@per_method
@pytest.mark.parametrize("select", ["wanda", "act", "min_std"])
def test_a_reload_after_calibration_is_bit_exact(
    variant: str, select: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = made(variant, data=DATA[select], select=select)
    train(model, adapter)
    adapter.scale = -0.5
    wanted = logits(model)
    ll.save(model, tmp_path / "a.safetensors")

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("load computed something")

    monkeypatch.setattr(torch.linalg, "svd", forbidden)
    monkeypatch.setattr(sspace, "capture", forbidden)
    fresh = tiny_llama()
    loaded = ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh), wanted)
    assert loaded.config == adapter.config
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in adapter.state_dict().items())
    with pytest.raises(ll.CheckpointError, match="trained on another base"):
        ll.load(tiny_llama(seed=5), tmp_path / "a.safetensors")


def test_a_sign_of_c_turns_ssteers_change_over() -> None:
    model = OneLinear(dtype=torch.float64)
    x = torch.randn(5, 16, dtype=torch.float64)
    adapter = ll.attach(model, config("ssteer", target_names="proj", dtype=torch.float64))
    perturb(adapter, 0.3)
    outputs = {}
    for c in (1.0, 0.0, -1.0):
        adapter.scale = c
        outputs[c] = model(x)
    torch.testing.assert_close(outputs[1.0] - outputs[0.0], outputs[0.0] - outputs[-1.0], rtol=1e-12, atol=1e-13)
    assert (outputs[1.0] - outputs[-1.0]).abs().max() > 0.1


def test_ssteer_takes_a_direction_out() -> None:
    model = OneLinear(dtype=torch.float64, bias=False)
    adapter = ll.attach(model, config("ssteer", target_names="proj", r=3, dtype=torch.float64))
    u, s, v = (getattr(model.proj, f"lora_{key}") for key in "USV")
    with torch.no_grad():
        next(adapter.parameters()).copy_(-s)
    torch.testing.assert_close(model(v.T), torch.zeros(3, 24, dtype=torch.float64))
    with ll.disabled(model):
        torch.testing.assert_close(model(v.T).T, u * s)


@pytest.mark.parametrize(("r", "b"), [(8, 4), (7, 3), (5, 5), (2, 2)])
def test_minus_c_is_the_inverse_rotation_and_the_transpose(r: int, b: int) -> None:
    theta = torch.randn(r // b, b * (b - 1) // 2, dtype=torch.float64)
    eye = torch.eye(r, dtype=torch.float64)
    for c in (0.1, 1.0, 30.0):
        there, back = (eye + cayley_less_identity(sign * c * theta, b, r) for sign in (1, -1))
        torch.testing.assert_close(back, there.T, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(back @ there, eye, rtol=1e-12, atol=1e-13)
        a = c * skew(theta, b, r)
        torch.testing.assert_close(there, (eye - a / 2) @ torch.linalg.inv(eye + a / 2), rtol=1e-10, atol=1e-11)
        assert torch.linalg.det(there) > 0
    assert torch.equal(cayley_less_identity(0 * theta, b, r), 0 * eye)


@pytest.mark.parametrize("rotate", ["U", "V"])
def test_c_turns_antipasto_forth_and_back(rotate: str) -> None:
    """Without Δs the singular values stay as they are, and W' = U_k S_k V_kᵀ with a basis turned by R(c)."""
    model = OneLinear(dtype=torch.float64, bias=False)
    adapter = ll.attach(model, config("antipasto", target_names="proj", rotate=rotate, r=16, dtype=torch.float64))
    perturb(adapter, 0.5)
    with torch.no_grad():
        model.proj.lora_ds.zero_()
    u, s, v = (getattr(model.proj, f"lora_{key}") for key in "USV")
    eye = torch.eye(16, dtype=torch.float64)
    turns = {}
    for c in (1.0, -1.0):
        adapter.scale = c
        with torch.no_grad():
            weight = model(eye).T
        torch.testing.assert_close(torch.linalg.svdvals(weight), s)
        core = u.T @ weight @ v
        turns[c] = core / s if rotate == "U" else (core / s[:, None]).T
    torch.testing.assert_close(turns[1.0] @ turns[1.0].T, eye)
    torch.testing.assert_close(turns[-1.0], turns[1.0].T)
    assert (turns[1.0] - eye).abs().max() > 0.1


@pytest.mark.parametrize("fields", [{"rotate": "none"}, {"r": 1}])
def test_without_a_rotation_antipasto_is_ssteer(fields: dict[str, Any]) -> None:
    model, adapter = made("antipasto", **fields)
    twin, plain = made("ssteer", **{key: value for key, value in fields.items() if key == "r"})
    assert adapter.state_dict().keys() == plain.state_dict().keys()
    perturb(adapter)
    plain.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-5, atol=1e-6)


@per_method
def test_both_poles_train_in_one_step(variant: str) -> None:
    """Two forwards and one backward give the sum of the gradients of two models."""
    model, adapter = made(variant)
    perturb(adapter)
    twin = copy.deepcopy(model)
    poles = {1.0: IDS, -1.0: IDS + 40}
    total = torch.zeros(())
    for c, ids in poles.items():
        with ll.scaled(model, c):
            total = total + c * loss_of(model, ids)
    total.backward()
    wanted = [torch.zeros_like(p) for p in adapter.parameters()]
    for c, ids in poles.items():
        with ll.scaled(twin, c):
            (c * loss_of(twin, ids)).backward()
        for sum_, p in zip(wanted, ll.adapters(twin)["default"].parameters(), strict=True):
            sum_ += p.grad
            p.grad = None
    torch.testing.assert_close([p.grad for p in adapter.parameters()], wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_a_real_model_is_calibrated_trains_and_loads(
    real_base: Callable[..., Any], real_tokenizer: Any, tmp_path: Path
) -> None:
    ids = real_tokenizer("The capital of France is Paris.", return_tensors="pt").input_ids
    data = sides(real_tokenizer, FITTED[:4])
    model, fresh = real_base(), real_base()
    with torch.no_grad():
        base = model(input_ids=ids).logits
    for variant in ("ssteer", "antipasto"):
        cfg = ll.config_for(variant)(select="min_std", layers=(10, 20))
        adapter = ll.attach(model, cfg, calibration_data=data)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, base)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=learning_rate(variant))
        losses = []
        for _ in range(4):
            loss = loss_of(model, ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"\n{variant} on {model.dtype}: loss", *(f"{loss:.3f}" for loss in losses), end="")
        assert losses[-1] < losses[0] - 0.05
        ll.save(model, tmp_path / "a.safetensors")
        ll.load(fresh, tmp_path / "a.safetensors")
        with torch.no_grad():
            assert torch.equal(fresh(input_ids=ids).logits, model(input_ids=ids).logits)
            ll.detach(model)
            assert torch.equal(model(input_ids=ids).logits, base)
        ll.detach(fresh)


def test_a_mask_survives_every_cast() -> None:
    model = nn.Sequential(nn.Linear(600, 600))
    adapter = ll.attach(model, ll.SSteerConfig(r=300, target_names="0"))
    mask = adapter.state_dict()["0.lora_chosen"].clone()
    model.to(torch.bfloat16)
    assert torch.equal(adapter.state_dict()["0.lora_chosen"].float(), mask)


# ---- the mechanisms that they brought -----------------------------------------------------------


def test_needing_data_may_depend_on_the_config() -> None:
    def declared(needs: Any) -> Any:
        body = {
            "name": "made",
            "param_specs": staticmethod(lambda d_in, d_out, cfg: {"lora_g": ll.ParamSpec((1,))}),
            "forward": staticmethod(lambda layer, x, y: y),
            "group_init": staticmethod(lambda model, targets, cfg, data: None),
            "needs_calibration": needs,
        }
        return ll.register(type("Made", (), body))

    with pytest.raises(ll.VariantError, match="needs_calibration is True, False or a function of the config, got 'no'"):
        declared("no")
    declared(staticmethod(lambda cfg: cfg.r > 2))
    with pytest.raises(ll.ConfigError, match="'made' is computed from data"):
        ll.attach(OneLinear(), config("made", target_names="proj", r=3))
    with pytest.raises(ll.ConfigError, match="'made' takes no calibration_data as it is configured"):
        ll.attach(OneLinear(), config("made", target_names="proj", r=2), calibration_data=[1])
    ll.attach(OneLinear(), config("made", target_names="proj", r=2))
    ll.attach(OneLinear(), config("made", target_names="proj", r=3), calibration_data=[1])


def test_capture_takes_a_transform_for_each_place() -> None:
    model = tiny_llama()
    paths = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    narrow: dict[str, Any] = {path: lambda x, i=i: x[:, : i + 1] for i, path in enumerate(paths)}
    seen = ll.capture(model, [IDS], paths, what="input", transform=narrow)
    whole = ll.capture(model, [IDS], paths, what="input")
    for i, path in enumerate(paths):
        assert torch.equal(seen[path].mean, whole[path].mean[: i + 1])
    with pytest.raises(
        ll.ConfigError, match=r"transform: got some for \['model.layers.0.mlp.down_proj'\]; wanted one f"
    ):
        ll.capture(model, [IDS], paths, what="input", transform={paths[0]: narrow[paths[0]]})
