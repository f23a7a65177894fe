"""Steering: the vector in its place and of the length asked for, positions, given and fitted directions, bad data."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, SIZES, OneLinear, moe, quantized, tiny_llama
from sklearn.linear_model import LogisticRegression
from test_laws import logits, same_snapshot, snapshot
from torch import Tensor, nn
from transformers import GraniteConfig, GraniteForCausalLM

import lora_lite as ll

SIDES = {"positive": [IDS[:, :6], IDS[:, 2:8]], "negative": [IDS[:, 6:], IDS[:, 5:11]]}
METHODS = ["difference", "pca", "probe"]
DOWN = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
per_method = pytest.mark.parametrize("method", METHODS)


def rows(d: int = 64, blocks: int = 2) -> Tensor:
    return torch.randn(blocks, 1, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def steered(model: Any = None, data: Any = None, **fields: Any) -> tuple[Any, ll.Adapter]:
    """In float64, with directions that are given for each block."""
    model = tiny_llama(torch.float64) if model is None else model
    data = {"directions": rows()} if data is None else data
    return model, ll.attach(model, ll.SteerConfig(**{"dtype": torch.float64} | fields), calibration_data=data)


@contextmanager
def added(model: Any, vectors: dict[int, Tensor], start: int = 0) -> Iterator[None]:
    """Within the block, these vectors are added at the outputs of these blocks, from a position on."""

    def hook(v: Tensor) -> Any:
        return lambda module, args, y: torch.cat([y[:, :start], y[:, start:] + v], dim=1)

    handles = [model.model.layers[i].register_forward_hook(hook(v)) for i, v in vectors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def vector(model: Any, block: int) -> Tensor:
    found: Tensor = model.model.layers[block].mlp.down_proj.lora_v
    return found


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


# ---- where, and how much ------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, [1], [0], [-2]])
@pytest.mark.parametrize("c", [1.0, -0.5])
def test_it_is_adding_c_v_at_the_outputs_of_the_chosen_blocks(layers: list[int] | None, c: float) -> None:
    plain = tiny_llama(torch.float64)
    model, adapter = steered(layers=layers, strength=3.0)
    chosen = [0, 1] if layers is None else [i % 2 for i in layers]
    assert list(adapter.targets) == [DOWN[i] for i in chosen]
    adapter.scale = c
    with added(plain, {i: c * 3.0 * rows()[i, 0] for i in chosen}):
        close(logits(model), logits(plain))
    assert (logits(model) - logits(tiny_llama(torch.float64))).abs().max() > 0.01


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gpt_oss"])
def test_it_goes_on_blocks_of_fused_experts(name: str) -> None:
    plain = moe(name)
    model, adapter = steered(moe(name), dtype=torch.float32)
    assert all(path.endswith("experts") for path in adapter.targets)
    with added(plain, dict(enumerate(rows().float()[:, 0]))):
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    with pytest.raises(ll.ConfigError, match="start=2: fused experts see tokens without a position"):
        steered(moe(name), start=2)


def test_layer_and_kernels_choose_whose_direction_and_how_much_of_it(tmp_path: Path) -> None:
    model, adapter = steered(layer=0.25)
    between = torch.lerp(*rows()[:, 0], 0.25)
    for block in (0, 1):
        close(vector(model, block), between)
    adapter.configure(layer=1, strength=2.0, kernels={r"mlp": ll.Kernel(1.0, 1.0, 0.4, 2.0)})
    close(vector(model, 1), 2.0 * rows()[1, 0])
    close(vector(model, 0), 2.0 * 0.7 * rows()[1, 0])
    ll.save(model, tmp_path / "a.safetensors")
    adapter.configure(layer=None, strength=1.0, kernels={})
    close(vector(model, 0), rows()[0, 0])
    with pytest.raises(ll.ConfigError, match=r"0 of \['attn'\] match model.layers.0.mlp.down_proj"):
        adapter.configure(kernels={"attn": ll.Kernel(1.0, 1.0, 0.4, 2.0)})
    close(vector(model, 0), rows()[0, 0])
    fresh = tiny_llama(torch.float64)
    ll.load(fresh, tmp_path / "a.safetensors").configure(strength=4.0)
    close(vector(fresh, 0), 4.0 * 0.7 * rows()[1, 0])


@per_method
def test_its_units_are_the_distance_of_the_sides_and_the_length_of_the_activations(method: str) -> None:
    plain = tiny_llama(torch.float64)
    found = ll.contrast(plain, SIDES, method=method, progress=False)
    everything = SIDES["positive"] + SIDES["negative"]
    seen = ll.capture(plain, everything, reduce=("samples",), progress=False)
    model, adapter = steered(data=SIDES, method=method, strength=0.5)
    for block, (path, side) in enumerate(found.items()):
        distance = side.directions[0].double() @ (side.positive - side.negative)
        assert distance > 0
        torch.testing.assert_close(
            vector(model, block), (0.5 * distance * side.directions[0]).double(), rtol=1e-6, atol=1e-8
        )
        length = seen[path].kept_samples().double().square().sum(1).mean().sqrt()
        adapter.configure(unit="norm")
        expected = (0.5 * length * side.directions[0]).double()
        torch.testing.assert_close(vector(model, block), expected, rtol=1e-6, atol=1e-8)
        adapter.configure(unit=ll.Unit.DIFFERENCE)
    if method == "difference":  # the whole way from one centre to the other
        first = next(iter(found.values()))
        torch.testing.assert_close(vector(model, 0), 0.5 * (first.positive - first.negative), rtol=1e-6, atol=1e-8)


def test_what_the_layer_itself_puts_out_may_be_contrasted() -> None:
    found = ll.contrast(tiny_llama(torch.float64), SIDES, DOWN, what="output", progress=False)
    model = steered(data=SIDES, what="output")[0]
    for block, path in enumerate(DOWN):
        torch.testing.assert_close(vector(model, block), found[path].step, rtol=1e-6, atol=1e-9)
    assert not torch.equal(vector(model, 0), vector(steered(data=SIDES)[0], 0))


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_every_kind_of_base_adds_the_same_vector(quantization: str | None, tiny: str, tmp_path: Path) -> None:
    model = ll.load_base(tiny, dtype=torch.bfloat16, quantization=quantization)
    data = {"directions": rows(128)}
    adapter = ll.attach(model, ll.SteerConfig(layers=[1]), calibration_data=data)
    adapter.scale = -0.7
    layer, x = model.model.layers[1].mlp.down_proj, torch.randn(2, 3, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        with ll.disabled(model):
            y = layer(x)
        assert torch.equal(layer(x), y + (-0.7 * rows(128)[1, 0].float()).bfloat16())
    ll.save(model, tmp_path / "a.safetensors")
    fresh = ll.load_base(tiny, dtype=torch.bfloat16, quantization=quantization)
    assert ll.load(fresh, tmp_path / "a.safetensors").scale == -0.7
    assert torch.equal(logits(fresh), logits(model))


@per_method
def test_a_file_needs_no_data(method: str, tmp_path: Path) -> None:
    model, adapter = steered(tiny_llama(), SIDES, method=method, unit="norm", strength=0.2, dtype=torch.float32)
    ll.save(model, tmp_path / "a.safetensors")
    fresh = tiny_llama()
    loaded = ll.load(fresh, tmp_path / "a.safetensors")
    assert loaded.config == adapter.config
    assert torch.equal(logits(fresh), logits(model))
    loaded.configure(unit="difference", strength=1.0)
    adapter.configure(unit="difference", strength=1.0)
    assert torch.equal(logits(fresh), logits(model))


# ---- positions ----------------------------------------------------------------------------------


def test_start_adds_from_a_position_on_with_a_cache_and_without() -> None:
    plain = tiny_llama(torch.float64)
    model, _ = steered(start=4)
    with added(plain, dict(enumerate(rows()[:, 0])), start=4):
        wanted = logits(plain)
    close(logits(model), wanted)
    with torch.no_grad():
        out = model(input_ids=IDS[:, :6], use_cache=True)
        close(out.logits, wanted[:, :6])
        for t in range(6, IDS.shape[1]):
            out = model(input_ids=IDS[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            close(out.logits, wanted[:, t : t + 1])
    base = logits(tiny_llama(torch.float64))
    assert torch.equal(logits(model)[:, :4], base[:, :4])
    close(logits(steered(start=0)[0]), logits(steered()[0]))
    assert torch.equal(logits(steered(start=IDS.shape[1])[0]), base)


@pytest.mark.parametrize("start", [None, 5])
def test_answers_are_the_same_with_a_cache_and_without(start: int | None) -> None:
    model, _ = steered(start=start, strength=2.0)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(IDS)
    with_cache, without = (
        model.generate(IDS, attention_mask=mask, use_cache=cache, **options) for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_what_acts_by_position_needs_positions() -> None:
    model = OneLinear()
    data, everything = {"directions": torch.ones(24)}, {"target_names": "proj", "target_roles": ()}
    ll.attach(model, ll.SteerConfig(start=1, **everything), calibration_data=data)
    assert model(torch.ones(2, 3, 16)).shape == (2, 3, 24)
    with pytest.raises(ll.ConfigError, match=r"proj: start=1: wanted \(batch, positions, d\), got \(5, 24\)"):
        model(torch.ones(5, 16))
    with pytest.raises(ll.ConfigError, match=r"can't go on a layer that sees a flattened batch, nor into a weight"):
        ll.merge(model)
    with pytest.raises(ll.TargetError, match="nothing is merged"):
        ll.unmerge(model)


# ---- how directions are found -------------------------------------------------------------------


def planted(distractor: float, spread: float) -> tuple[Any, dict[str, list[Tensor]], Tensor]:
    """(model, two sides of 32 prompts, u): at the embedding, pair i differs by (1 + spread·g_i) u + distractor · w,
    w at right angles to u, and both of a pair share something large along w."""
    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    u, w = torch.linalg.qr(torch.randn(64, 2, generator=generator)).Q.T
    shared = torch.randn(32, 64, generator=generator) * 0.05 + torch.randn(32, 1, generator=generator) * 5.0 * w
    step = 1 + spread * torch.randn(32, 1, generator=generator)
    with torch.no_grad():
        model.model.embed_tokens.weight[:32] = shared
        model.model.embed_tokens.weight[32:64] = shared + step * u + distractor * w
    ids = torch.arange(32)[:, None]
    return model, {"positive": list((ids + 32).split(8)), "negative": list(ids.split(8))}, u


def at_embedding(model: nn.Module, data: Any, **how: Any) -> ll.Contrast:
    where = ["model.embed_tokens"]
    return ll.contrast(model, data, where, what="output", progress=False, **how)["model.embed_tokens"]


@per_method
def test_a_planted_direction_is_found_and_turned_to_the_positive_side(method: str) -> None:
    model, data, u = planted(distractor=0.0, spread=0.1)
    found = at_embedding(model, data, method=method)
    assert found.directions.shape == (1, 64)
    assert float(found.directions[0] @ u) > 0.98
    other = at_embedding(model, {"positive": data["negative"], "negative": data["positive"]}, method=method)
    assert float(other.directions[0] @ u) < -0.98
    assert float(found.step @ u.double()) == pytest.approx(1.0, rel=0.05)


def test_the_methods_find_what_they_are_for() -> None:
    """The probe is not led astray by what varies within the sides, the principal direction not by a constant."""
    model, data, u = planted(distractor=1.0, spread=3.0)
    cosines = {method: abs(float(at_embedding(model, data, method=method).directions[0] @ u)) for method in METHODS}
    assert cosines["difference"] < 0.9 < min(cosines["pca"], cosines["probe"])

    seen = [
        ll.capture(model, data[side], ["model.embed_tokens"], what="output", reduce="samples", progress=False)
        for side in ("positive", "negative")
    ]
    p, n = (each["model.embed_tokens"].kept_samples().double() for each in seen)
    principal = torch.linalg.eigh((p - n).mT @ (p - n)).eigenvectors[:, -1]
    pca = at_embedding(model, data, method="pca").directions[0].double()
    torch.testing.assert_close(pca, principal * (principal @ pca).sign(), rtol=0, atol=1e-6)

    x = torch.cat([p, n])
    x = (x - x.mean(0)) / x.std(0).norm()
    normal = torch.from_numpy(LogisticRegression().fit(x.numpy(), [1] * 32 + [0] * 32).coef_[0])
    probe = at_embedding(model, data, method="probe").directions[0].double()
    torch.testing.assert_close(probe, normal / normal.norm(), rtol=0, atol=1e-5)


def test_a_norm_or_a_factor_after_the_layer_is_warned_of(log: list[str]) -> None:
    steered(data=SIDES)
    assert not [line for line in log if line.startswith("WARNING")]
    torch.manual_seed(0)
    granite = GraniteForCausalLM(GraniteConfig(**SIZES, intermediate_size=96, residual_multiplier=0.25)).double().eval()
    steered(granite, SIDES)
    (warning,) = [line for line in log if line.startswith("WARNING")]
    assert "moves the output of model.layers.0 by another one (75% off)" in warning
    assert not granite.model.layers[0].mlp.down_proj._forward_hooks.keys() - {
        handle.id for handle in next(ll.adapters(granite)["default"].sites()).handles
    }


# ---- bad input ----------------------------------------------------------------------------------


BAD_DATA = [
    ({}, None, ll.ConfigError, "'steer' is computed from data"),
    ({}, {"positive": [IDS]}, ll.ConfigError, r"got \['positive'\]; wanted \{\"positive\": batches"),
    ({}, {"positive": [IDS], "negative": []}, ll.ConfigError, "there are no batches to calibrate on"),
    ({}, {"positive": [IDS[:1]], "negative": [IDS]}, ll.ConfigError, r"'positive'\] has 1 vectors: wanted 2 at least"),
    ({}, {"positive": [IDS], "negative": iter([IDS])}, ll.ConfigError, r"'negative'\] is an iterator"),
    ({}, {"positive": [IDS], "negative": [IDS]}, ll.BaseModelError, "layers.0: both sides have the same centre"),
    ({}, {"directions": torch.ones(3)}, ll.ConfigError, r"wanted directions \(1, 64\) for its block 0, got \(3,\)"),
    ({}, {"directions": torch.full((64,), torch.nan)}, ll.BaseModelError, "zero, not finite"),
    ({}, {"directions": torch.zeros(64)}, ll.BaseModelError, "some are zero"),
    ({"unit": "norm"}, {"directions": torch.ones(64)}, ll.ConfigError, "given directions say nothing of the activ"),
    ({"layer": 1.5}, {"directions": torch.ones(64)}, ll.ConfigError, r"layer=1.5: no direction is kept for it"),
    (
        {"method": "pca"},
        {"positive": [IDS], "negative": [IDS[:, 3:], IDS[:, 4:]]},
        ll.ConfigError,
        "method 'pca' is taken of pairs, so wanted equal numbers",
    ),
]


@pytest.mark.parametrize(("fields", "data", "error", "message"), BAD_DATA)
def test_bad_data_is_a_clear_error_and_changes_nothing(
    fields: dict[str, Any], data: Any, error: type[Exception], message: str
) -> None:
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        ll.attach(model, ll.SteerConfig(**fields), calibration_data=data)
    assert same_snapshot(before, snapshot(model))
    assert not ll.adapters(model)


def test_a_probe_without_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    before = snapshot(model)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ll.ConfigError, match=r"needs scikit-learn\n  pip install 'lora-lite\[probe\]'"):
        ll.attach(model, ll.SteerConfig(method="probe"), calibration_data=SIDES)
    assert same_snapshot(before, snapshot(model))
    ll.attach(model, ll.SteerConfig(method="pca"), calibration_data=SIDES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": float("nan")}, r"strength=nan\): wanted a finite number"),
        ({"strength": float("inf")}, r"strength=inf"),
        ({"method": "mean"}, r"method='mean'\): wanted"),
        ({"method": "pca", "center": "median"}, r"center=.*\): wanted 'mean' for"),
        ({"method": "probe", "center": "median"}, r"center=.*\): wanted 'mean' for"),
        ({"unit": "sigma"}, r"unit='sigma'\): wanted"),
        ({"what": "input"}, r"what='input'\): wanted \"residual\" or \"output\""),
        ({"what": "output", "layer": 3}, r"layer=3\): wanted None with what='output'"),
        ({"start": -1}, r"start=-1\): wanted a position from 0, or None"),
        ({"start": True}, r"start=True\): wanted a position"),
        ({"winsorize": 1.5}, r"winsorize=1.5\): wanted a quantile"),
        ({"layer": -1}, r"layer=-1\): wanted a depth"),
    ],
)
def test_bad_configs_say_what_was_wanted(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        ll.SteerConfig(**fields)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"method": "mean"}, "method='mean': wanted 'difference' or 'pca' or 'probe'"),
        ({"method": "pca", "rank": 2}, "method='pca' finds one direction, by no centres; got rank=2"),
        ({"method": "probe", "center": "median"}, "method='probe' finds one direction.*center='median'"),
    ],
)
def test_a_method_has_one_direction_and_no_centre(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        ll.contrast(tiny_llama(), SIDES, **how)


def test_a_bad_change_while_attached_changes_nothing() -> None:
    model, adapter = steered()
    wanted = logits(model)
    for changes, message in (
        ({"strength": float("nan")}, "strength=nan"),
        ({"unit": "norm"}, "given directions say nothing"),
        ({"layer": 7}, "layer=7: no direction is kept for it"),
        ({"method": "pca"}, "method"),
    ):
        with pytest.raises(ll.ConfigError, match=message):
            adapter.configure(**changes)
        assert torch.equal(logits(model), wanted)
        assert (adapter.config.strength, adapter.config.unit) == (1.0, "difference")


# ---- merged -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_merged_it_is_a_bias(bias: bool) -> None:
    model, adapter = steered(tiny_llama(torch.float64, bias=bias), layers=[1])
    adapter.scale = -1.5
    wanted, layer = logits(model), model.model.layers[1].mlp.down_proj
    weight, own = layer.weight.clone(), layer.bias.clone() if bias else torch.zeros(64, dtype=torch.float64)
    ll.merge(model)
    close(logits(model), wanted)
    close(layer.weight, weight)
    close(layer.bias, own - 1.5 * rows()[1, 0])
    ll.unmerge(model)
    assert torch.equal(logits(model), wanted)
    assert torch.equal(layer.bias, own) if bias else layer.bias is None
    ll.merge(model, keep=False)
    close(logits(model), wanted)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_merged_into_a_quantised_layer_it_is_a_bias_of_a_dense_one(quantization: str, tiny: str) -> None:
    model = quantized(tiny, quantization)
    ll.attach(model, ll.SteerConfig(layers=[1]), calibration_data={"directions": rows(128)})
    ll.merge(model, quantized="dequantize")
    bias = model.model.layers[1].mlp.down_proj.bias
    assert torch.equal(bias, rows(128)[1, 0].to(bias.dtype))


def test_on_disk_it_wants_a_bias_to_go_into(tmp_path: Path) -> None:
    for bias in (True, False):
        folder, file = tmp_path / f"base-{bias}", tmp_path / f"{bias}.safetensors"
        model = tiny_llama(bias=bias)
        model.save_pretrained(folder)
        ll.attach(model, ll.SteerConfig(layers=[1]), calibration_data={"directions": rows()})
        ll.save(model, file)
        if bias:
            ll.merge_checkpoint(folder, file, tmp_path / "merged", base_weights="original")
            torch.testing.assert_close(logits(ll.load_base(str(tmp_path / "merged"))), logits(model))
        else:
            with pytest.raises(ll.CheckpointError, match=r"'steer' adds a constant there, and this model has no bias"):
                ll.merge_checkpoint(folder, file, tmp_path / "other", base_weights="original")
            assert not (tmp_path / "other").exists()
