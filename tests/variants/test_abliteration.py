"""Abliteration: hooks against weight forms on every kind of layer, directions, depth, live changes, and bad data."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_laws
import torch
from contrasts import FITTED, HELD_OUT, NEUTRAL, chats, gap, random_direction, sides
from models import IDS, SIZES, OneLinear, attach, config, moe, quantized, tiny_llama
from oracles import weight_form
from torch import nn
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

import lora_lite as ll
from lora_lite.base.kinds import EXPERTS
from lora_lite.base.layer import layer_of

MODES = ["none", "pre", "full", "column"]
per_mode = pytest.mark.parametrize("mode", MODES)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=IDS).logits
    return out


def directions(k: int = 1, d: int = 64, blocks: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {"directions": torch.randn(blocks, k, d, generator=generator, dtype=torch.float64)}


def edited(model: Any, adapter: ll.Adapter, mode: str) -> Any:
    """A copy with the weight form written into each target's matrices: what the hooks must equal."""
    twin = copy.deepcopy(model)
    tensors = adapter.state_dict()
    ll.detach(twin)
    with torch.no_grad():
        for path in adapter.targets:
            layer = twin.get_submodule(path)
            v, s = tensors[f"{path}.lora_v"], tensors[f"{path}.lora_strength"]
            matrices = layer_of(layer).oriented(layer.down_proj) if EXPERTS.size(layer) else None
            if matrices is None:
                layer.weight.copy_(weight_form(layer.weight, v, s, mode))
                continue
            for e in range(len(matrices)):
                own = (v, s) if mode == "none" else (v[e], s[e])
                matrices[e].copy_(weight_form(matrices[e], *own, mode))
            if mode == "none" and hasattr(layer, "down_proj_bias"):
                layer.down_proj_bias.copy_(layer.down_proj_bias - s * layer.down_proj_bias @ v.T @ v)
    return twin


# ---- the four modes equal their weight forms ----------------------------------------------------


@per_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("strength", "rank"), [(1.0, 1), (0.6, 1), (1.4, 3), (-0.5, 1)])
def test_every_mode_is_its_weight_form(mode: str, dtype: torch.dtype, strength: float, rank: int) -> None:
    model = tiny_llama(dtype, bias=True)
    cfg = ll.AbliterationConfig(normalization=mode, strength=strength, rank=rank, dtype=dtype)
    adapter = ll.attach(model, cfg, calibration_data=directions(rank))
    assert set(adapter.targets) == {
        f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.o_proj", "mlp.down_proj")
    }
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(logits(model), logits(edited(model, adapter, mode)), rtol=tolerance, atol=tolerance)
    with ll.disabled(model):
        assert torch.equal(logits(model), logits(tiny_llama(dtype, bias=True)))


@per_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gpt_oss"])
def test_every_mode_is_its_weight_form_on_fused_experts(
    mode: str, dtype: torch.dtype, name: str, tmp_path: Path
) -> None:
    model = moe(name, dtype, experts_implementation="eager")  # the others know no float64
    base = logits(model)
    cfg = ll.AbliterationConfig(normalization=mode, strength=0.8, rank=2, dtype=dtype)
    adapter = ll.attach(model, cfg, calibration_data=directions(2))
    assert {path.rpartition(".")[2] for path in adapter.targets} == {"o_proj", "experts"}
    ours = logits(model)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(ours, logits(edited(model, adapter, mode)), rtol=tolerance, atol=tolerance)
    assert not torch.allclose(ours, base, atol=1e-3)
    ll.save(model, tmp_path / "a.safetensors")
    fresh = moe(name, dtype, experts_implementation="eager")
    ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh), ours)
    ll.detach(model)
    assert torch.equal(logits(model), base)


@per_mode
def test_every_implementation_of_experts_sees_the_same(mode: str) -> None:
    """transformers chooses among several ways to compute the same block."""
    outputs = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = moe("qwen3", experts_implementation=implementation)
        ll.attach(model, ll.AbliterationConfig(normalization=mode), calibration_data=directions())
        outputs.append(logits(model))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-5)


@per_mode
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_every_mode_is_its_weight_form_on_dequantised_values(mode: str, quantization: str, tiny: str) -> None:
    model = ll.load_base(tiny, torch.float32, quantization, compute_dtype=torch.float32)
    layer = model.model.layers[0].mlp.down_proj
    cfg = ll.AbliterationConfig(normalization=mode, rank=2)
    ll.attach(model, cfg, calibration_data=directions(2, 128))
    x = torch.randn(5, layer.in_features)
    dense = layer_of(layer, "here").dense_weight().double()
    wanted = x.double() @ weight_form(dense, layer.lora_v.double(), layer.lora_strength.double(), mode).T
    with torch.no_grad():
        got = layer(x).double()
        with ll.disabled(model):
            base = layer(x).double()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base, wanted, atol=1e-3)


@per_mode
def test_int8_values_are_right_whatever_its_kernel_rounds(mode: str, tiny: str) -> None:
    """bitsandbytes' 8-bit kernel rounds x to int8; the adapter's own share of the error is below that."""
    model = quantized(tiny, "int8")
    layer = model.model.layers[0].mlp.down_proj
    dense = layer_of(layer, "here").dense_weight().double()
    ll.attach(model, ll.AbliterationConfig(normalization=mode), calibration_data=directions(1, 128))
    x = torch.randn(64, layer.in_features).bfloat16()
    wanted = x.double() @ weight_form(dense, layer.lora_v.double(), layer.lora_strength.double(), mode).T
    with torch.no_grad():
        error = (layer(x).double() - wanted).norm() / wanted.norm()
        with ll.disabled(model):
            rounding = (layer(x).double() - x.double() @ dense.T).norm() / wanted.norm()
    assert error < 1.5 * rounding + 0.005


@pytest.mark.parametrize("mode", ["none", "column"])
def test_full_strength_leaves_nothing_of_the_directions(mode: str) -> None:
    model = tiny_llama(torch.float64)
    cfg = ll.AbliterationConfig(normalization=mode, rank=2, dtype=torch.float64)
    ll.attach(model, cfg, calibration_data=directions(2))
    for block in model.model.layers:
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            out = layer(torch.randn(9, layer.in_features, dtype=torch.float64))
            assert (out @ layer.lora_v.T).abs().max() < 1e-13
            torch.testing.assert_close(layer.lora_v @ layer.lora_v.T, torch.eye(2, dtype=torch.float64))


def test_a_row_or_column_of_zeros_stays_zero() -> None:
    for mode in MODES:
        model = OneLinear(bias=False).double()
        with torch.no_grad():
            model.proj.weight[3] = 0
            model.proj.weight[:, 5] = 0
        cfg = ll.AbliterationConfig(target_names="proj", target_roles=(), normalization=mode, dtype=torch.float64)
        ll.attach(model, cfg, calibration_data={"directions": random_direction(24, 1)})
        W = model(torch.eye(16, dtype=torch.float64)).T
        assert W.isfinite().all()
        assert not W[:, 5].any()
        assert mode in ("none", "column") or not W[3].any()


def test_a_row_of_which_nothing_is_left_raises() -> None:
    model = OneLinear(16, 24, bias=False)
    with torch.no_grad():
        model.proj.weight.normal_()
        model.proj.weight[3] *= 0
        model.proj.weight[:, 2] = torch.eye(24)[7]
    cfg = ll.AbliterationConfig(target_names="proj", target_roles=(), normalization="column")
    with pytest.raises(ll.BaseModelError, match="proj: almost nothing of a row or column is left"):
        ll.attach(model, cfg, calibration_data={"directions": torch.eye(24)[7]})
    assert not hasattr(model.proj, "lora_v")


@per_mode
@pytest.mark.parametrize("c", [0.5, -1.0, 2.0])
def test_scale_multiplies_the_strength(mode: str, c: float) -> None:
    model, other = tiny_llama(), tiny_llama()
    ll.attach(model, ll.AbliterationConfig(normalization=mode), calibration_data=directions()).scale = c
    ll.attach(other, ll.AbliterationConfig(normalization=mode, strength=c), calibration_data=directions())
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-6)


# ---- what it goes on ----------------------------------------------------------------------------


def test_it_goes_on_all_writers_of_a_hybrid_model_and_says_how_many(log: list[str]) -> None:
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **SIZES,
            head_dim=16,
            intermediate_size=96,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            shared_expert_intermediate_size=48,
            layer_types=["linear_attention", "full_attention"],
        )
    ).eval()
    adapter = ll.attach(model, ll.AbliterationConfig(), calibration_data=directions())
    assert set(adapter.targets) == {
        "model.layers.0.linear_attn.out_proj",
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.shared_expert.down_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.experts",
        "model.layers.1.mlp.shared_expert.down_proj",
    }
    assert "1 out_proj, 2 blocks of fused experts, 2 down_proj, 1 o_proj" in log[-1]
    with torch.no_grad():
        for path, layer in ((path, model.get_submodule(path)) for path in adapter.targets if "experts" not in path):
            out = layer(torch.randn(7, layer.in_features))
            assert (out @ layer.lora_v.T).abs().max() < 1e-5, path


def test_nothing_that_may_write_is_left_out_in_silence() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wo = nn.Parameter(torch.randn(4, 48, 64))

    model = tiny_llama()
    model.model.layers[1].mlp.experts = Fused()
    with pytest.raises(
        ll.TargetError, match=r"layers.1.mlp.experts: this Fused may write .*'abliteration' can't go on it\n.*'experts'"
    ):
        ll.attach(model, ll.AbliterationConfig(), calibration_data=directions())
    adapter = ll.attach(model, ll.AbliterationConfig(exclude_names="experts"), calibration_data=directions())
    assert len(adapter.targets) == 4
    with pytest.raises(ll.TargetError, match=r"GptOssExperts may write to the residual stream, and 'lora' can't"):
        ll.attach(moe("gpt_oss"), ll.LoRAConfig(target_roles="writer"))


def test_an_error_in_a_block_of_experts_leaves_its_own_matrices() -> None:
    model = moe("mixtral")
    base = logits(model)
    adapter = ll.attach(model, ll.AbliterationConfig(normalization="full"), calibration_data=directions())
    block = model.model.layers[0].mlp.experts
    with pytest.raises(RuntimeError):
        block(torch.randn(3, 7), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2))
    assert "down_proj" not in block.__dict__
    adapter.scale = 0.0
    assert torch.equal(logits(model), base)


@per_mode
def test_two_adapters_stack_on_fused_experts(mode: str) -> None:
    """The second works on what the first has made of the matrices, with the norms of the base."""
    model = moe("qwen3", torch.float64, experts_implementation="eager")
    block = model.model.layers[0].mlp.experts
    base = block.down_proj.detach().clone()
    cfg = ll.AbliterationConfig(normalization=mode, dtype=torch.float64)
    adapters = [
        ll.attach(model, cfg, name, calibration_data={"directions": random_direction(64, seed).double()})
        for name, seed in (("default", 1), ("more", 2))
    ]
    x = torch.randn(9, 64, dtype=torch.float64)
    chosen, weights = torch.randint(0, 4, (9, 2)), torch.rand(9, 2, dtype=torch.float64)
    with torch.no_grad():
        both = block(x, chosen, weights)
        path = "model.layers.0.mlp.experts"
        matrices = base
        for adapter in adapters:
            t = {key.rpartition(".lora_")[2]: v for key, v in adapter.state_dict().items() if key.startswith(path)}
            matrices = torch.stack([after(t, e, matrices[e], base[e], mode) for e in range(4)])
        with ll.disabled(model):
            block.down_proj.copy_(matrices)
            torch.testing.assert_close(both, block(x, chosen, weights))


def after(t: dict[str, torch.Tensor], e: int, W: torch.Tensor, base: torch.Tensor, mode: str) -> torch.Tensor:
    """One expert's W with an adapter on it whose norms are those of `base`."""
    v, s = (t["v"], t["strength"]) if mode == "none" else (t["v"][e], t["strength"][e])
    ratio = weight_form(base, v, s, mode)
    if mode == "none":
        return W - s * v.T @ v @ W
    if mode == "column":
        plain = base - s * v.T @ v @ base
        return (W - s * v.T @ v @ W) * (base.norm(dim=0) / plain.norm(dim=0))
    D = base.norm(dim=1, keepdim=True)
    pre = W - s * (D * v.T) @ (v / D.T) @ W
    return pre if mode == "pre" else pre * (ratio / (base - s * (D * v.T) @ (v / D.T) @ base)).mean(1, keepdim=True)


# ---- directions and depth -----------------------------------------------------------------------


def test_each_layer_uses_its_own_block_or_one_that_is_named_or_what_lies_between() -> None:
    model = tiny_llama(num_hidden_layers=3)
    given = directions(1, blocks=3)["directions"]
    unit = torch.nn.functional.normalize(given[:, 0], dim=-1).float()
    adapter = ll.attach(model, ll.AbliterationConfig(), calibration_data={"directions": given})

    def used() -> list[torch.Tensor]:
        return [block.mlp.down_proj.lora_v[0] for block in model.model.layers]

    torch.testing.assert_close(torch.stack(used()), unit)
    adapter.configure(layer=2)
    assert all(torch.equal(v, model.model.layers[2].mlp.down_proj.lora_own[0]) for v in used())
    adapter.configure(layer=0.25)
    between = 0.75 * unit[0] + 0.25 * unit[1] * (unit[0] @ unit[1]).sign()
    torch.testing.assert_close(used()[2], between / between.norm())
    adapter.configure(layer=None)
    torch.testing.assert_close(torch.stack(used()), unit)
    with pytest.raises(ll.ConfigError, match=r"layer=2.5: no direction is kept for it\n  blocks with one: \[0, 1, 2\]"):
        adapter.configure(layer=2.5)
    assert adapter.config.layer is None
    torch.testing.assert_close(torch.stack(used()), unit)


def test_the_kernel_gives_each_component_its_weight_over_depth(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=4)
    kernels = {"attn": ll.Kernel(1.0, 1.0, 0.5, 2.0), "mlp": ll.Kernel(2.0, 2.5, 0.0, 0.5)}
    adapter = ll.attach(
        model, ll.AbliterationConfig(strength=0.5, kernels=kernels), calibration_data=directions(blocks=4)
    )

    def weights(part: str) -> list[float]:
        return [block.get_submodule(part).lora_strength.item() for block in model.model.layers]

    assert weights("self_attn.o_proj") == [0.375, 0.5, 0.375, 0.25]
    assert weights("mlp.down_proj") == [0.0, 0.0, 0.0, 0.0]
    adapter.configure(kernels={"": ll.Kernel(1.0, 0.0, 1.0, 1.0)}, strength=2.0)
    assert weights("mlp.down_proj") == [2.0, 2.0, 0.0, 0.0]
    ll.save(model, tmp_path / "a.safetensors")
    fresh = tiny_llama(num_hidden_layers=4)
    loaded = ll.load(fresh, tmp_path / "a.safetensors")
    assert loaded.config == adapter.config
    assert torch.equal(logits(fresh), logits(model))
    for each, twin in ((adapter, model), (loaded, fresh)):  # a loaded one is as live as the first
        each.configure(kernels=kernels, layer=1.5, strength=0.7)
        assert not torch.equal(logits(twin), logits(tiny_llama(num_hidden_layers=4)))
    assert torch.equal(logits(fresh), logits(model))
    with pytest.raises(ll.ConfigError, match=r"kernels: 0 of \['attn'\] match model.layers.0.mlp.down_proj"):
        adapter.configure(kernels={"attn": ll.Kernel(1.0, 0.0, 1.0, 1.0)})
    assert torch.equal(logits(fresh), logits(model))


@per_mode
def test_a_live_change_is_the_same_as_a_fresh_attach(mode: str) -> None:
    for make in (tiny_llama, lambda: moe("gpt_oss")):
        model, other = make(), make()
        adapter = ll.attach(model, ll.AbliterationConfig(normalization=mode), calibration_data=directions())
        adapter.configure(strength=0.4, layer=0.5)
        ll.attach(
            other, ll.AbliterationConfig(normalization=mode, strength=0.4, layer=0.5), calibration_data=directions()
        )
        assert torch.equal(logits(model), logits(other))


def test_what_cannot_change_live_is_refused_and_a_bad_value_changes_nothing() -> None:
    model = tiny_llama()
    adapter = ll.attach(model, ll.AbliterationConfig(), calibration_data=directions())
    before, wanted = adapter.config, logits(model)
    with pytest.raises(ll.ConfigError, match=r"normalization, rank can't change while .*\n.*strength, layer, kernels"):
        adapter.configure(rank=2, normalization="full")
    with pytest.raises(ll.ConfigError, match=r"strength=nan\): wanted a finite number"):
        adapter.configure(strength=float("nan"))
    lora = ll.attach(model, ll.LoRAConfig(), "lora")
    with pytest.raises(ll.ConfigError, match=r"'lora' can follow no field"):
        lora.configure(alpha=2.0)
    assert adapter.config == before
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"normalization": "rows"}, r"normalization='rows'\): wanted one of \['none', 'pre', 'full', 'column'\]"),
        ({"center": "mode"}, r"center='mode'\): wanted one of \['mean', 'median'\]"),
        ({"rank": 0}, r"rank=0\): wanted a number of directions"),
        ({"layer": -1.0}, r"layer=-1.0\): wanted a depth"),
        ({"winsorize": 1.5}, r"winsorize=1.5\): wanted a quantile"),
        ({"kernels": {"attn": (1.0, 2.0)}}, r"wanted \{regex: Kernel\(four finite numbers"),
        ({"kernels": {"attn": (1.0, 2.0, 0.0, 0.0)}}, r"the distance above 0"),
        ({"kernels": {"(": (1.0, 2.0, 0.0, 1.0)}}, r"wanted \{regex"),
    ],
)
def test_bad_configs_say_what_was_wanted(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        ll.AbliterationConfig(**fields)


def test_the_config_survives_json() -> None:
    cfg = ll.AbliterationConfig(
        normalization=ll.Normalization.FULL, kernels={"a": ll.Kernel(1.0, 2.0, 3.0, 4.0)}, layer=1.5, center="median"
    )
    assert ll.AbliterationConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_one_layers_directions_suit_one_width() -> None:
    model = tiny_llama()
    adapter = attach(model, config("abliteration"))  # with k_proj, which is narrower
    before = logits(model)
    with pytest.raises(ll.ConfigError, match=r"layer=1: its directions are \(1, 64\), and .*k_proj wants \(1, 32\)"):
        adapter.configure(layer=1)
    assert torch.equal(logits(model), before)


# ---- data ---------------------------------------------------------------------------------------


def test_it_is_fitted_on_two_sides_without_itself_in_the_way() -> None:
    model = tiny_llama()
    data = {"positive": [IDS[:, :6], IDS[:, 2:8]], "negative": [IDS[:, 6:], IDS[:, 5:11]]}
    wanted = {path: found.directions for path, found in ll.contrast(model, data, projected=True).items()}
    ll.attach(model, ll.AbliterationConfig(projected=True), calibration_data=data)
    for path, rows in wanted.items():
        assert torch.equal(model.get_submodule(path).mlp.down_proj.lora_own, rows)
    assert not list(ll.adapters(model)["default"].parameters())


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (None, ll.ConfigError, "'abliteration' is computed from data"),
        ({"positive": [IDS]}, ll.ConfigError, r"got \['positive'\]; wanted \{\"positive\": batches"),
        ([IDS], ll.ConfigError, "calibration_data: got list"),
        ({"positive": [IDS], "negative": []}, ll.ConfigError, "there are no batches to calibrate on"),
        (
            {"positive": [IDS], "negative": iter([IDS])},
            ll.ConfigError,
            r"'negative'\] is an iterator, which can be read",
        ),
        ({"positive": IDS, "negative": [IDS]}, ll.ConfigError, r"'positive'\] is a Tensor: wanted a list of batches"),
        ({"positive": [IDS[:1]], "negative": [IDS]}, ll.ConfigError, r"'positive'\] has 1 vectors: wanted 2 at least"),
        ({"positive": [IDS], "negative": [IDS]}, ll.BaseModelError, r"layers.0: both sides have the same centre"),
        ({"directions": torch.ones(3)}, ll.ConfigError, r"wanted directions \(1, 64\) for its block 0, got \(3,\)"),
        ({"directions": torch.ones(1, 1, 64)}, ll.ConfigError, r"layers.1.*for its block 1, got NoneType"),
        ({"directions": torch.zeros(64)}, ll.BaseModelError, r"1 directions of which some are zero"),
        ({"directions": {"elsewhere": torch.ones(64)}}, ll.ConfigError, r"block 0, got NoneType\n  give a tensor"),
    ],
)
def test_bad_data_is_a_clear_error_and_changes_nothing(data: Any, error: type[Exception], message: str) -> None:
    model = tiny_llama()
    before = sorted(model.state_dict())
    base = logits(model)
    with pytest.raises(error, match=message):
        ll.attach(model, ll.AbliterationConfig(), calibration_data=data)
    assert sorted(model.state_dict()) == before
    assert torch.equal(logits(model), base)
    assert not ll.adapters(model)


def test_a_number_is_no_direction_at_any_rank() -> None:
    with pytest.raises(ll.ConfigError, match=r"wanted directions \(2, 64\) for its block 0, got \(\)"):
        ll.attach(tiny_llama(), ll.AbliterationConfig(rank=2), calibration_data={"directions": torch.tensor(1.0)})


def test_a_rank_above_one_takes_the_pairs_principal_directions() -> None:
    model = tiny_llama()
    data = {"positive": [IDS[:, :t] for t in (3, 5, 7, 9)], "negative": [IDS[:, t:] for t in (2, 4, 6, 8)]}
    path = "model.layers.1"
    found = ll.contrast(model, data, rank=3)[path]
    pairs = [ll.capture(model, data[side], [path], reduce="samples")[path].kept_samples().double() for side in data]
    first = found.directions[0].double()
    torch.testing.assert_close(first, torch.nn.functional.normalize(found.positive - found.negative, dim=0))
    rest = pairs[0] - pairs[1]
    rest = rest - rest.mean(0)
    rest = rest - (rest @ first)[:, None] * first
    spread = torch.linalg.svdvals(rest)
    torch.testing.assert_close((rest @ found.directions[1:].double().T).norm(dim=0), spread[:2], rtol=1e-4, atol=1e-6)
    with pytest.raises(ll.ConfigError, match=r"'positive'\] has 8 vectors: wanted 9 at least for rank 9"):
        ll.contrast(model, data, rank=9)
    data["negative"].pop()
    with pytest.raises(ll.ConfigError, match="rank 2 is taken of pairs, so wanted equal numbers"):
        ll.contrast(model, data, rank=2)


def test_equal_sides_have_no_direction_however_they_are_batched() -> None:
    ids = torch.randint(1, 96, (12, 6), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ll.BaseModelError, match=r"layers.0: both sides have the same centre"):
        ll.contrast(tiny_llama(), {"positive": [ids], "negative": list(ids.split([5, 5, 2]))})


def test_new_data_can_be_given_while_it_is_attached() -> None:
    model, other = moe("qwen3"), moe("qwen3")
    adapter = ll.attach(model, ll.AbliterationConfig(normalization="full"), calibration_data=directions())
    wanted = logits(model)
    with pytest.raises(ll.ConfigError, match="there are no batches"):
        adapter.configure(calibration_data={"positive": [IDS], "negative": []}, strength=0.5)
    assert torch.equal(logits(model), wanted)
    given = {"directions": random_direction(64, 9)}
    adapter.configure(calibration_data=given, strength=0.5)
    ll.attach(other, ll.AbliterationConfig(normalization="full", strength=0.5), calibration_data=given)
    assert torch.equal(logits(model), logits(other))
    lora = ll.attach(model, ll.LoRAConfig(r=2), "lora")
    with pytest.raises(ll.ConfigError, match="'lora' takes no calibration_data"):
        lora.configure(calibration_data=given)


# ---- the laws, in every mode, on dense layers and fused experts ---------------------------------


LAWS = [
    lambda v, path: test_laws.test_the_base_is_read_only(v),
    lambda v, path: test_laws.test_detach_restores_everything(v, True),
    lambda v, path: test_laws.test_scale_zero_is_the_base_and_one_the_method(v),
    lambda v, path: test_laws.test_deepcopy_and_pickle_are_independent_copies(v),
    lambda v, path: test_laws.test_functional_call_uses_the_given_tensors(v),
    lambda v, path: test_laws.test_eval_outputs_follow_every_way_to_change_a_parameter(v),
    lambda v, path: test_laws.test_an_adapter_that_was_cast_is_saved_as_it_is(v, path),
]


@per_mode
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("experts_too", [False, True])
def test_the_laws_hold_in_every_mode(
    mode: str, law: Any, experts_too: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everywhere = {"target_names": ("o_proj", "down_proj", "experts"), "normalization": mode}
    monkeypatch.setattr(test_laws, "config", lambda variant, **more: config(variant, **everywhere | more))
    if experts_too:
        monkeypatch.setattr(test_laws, "tiny_llama", lambda dtype=torch.float32, **sizes: moe("gpt_oss", dtype))
    law("abliteration", tmp_path)


# ---- kinds of models ----------------------------------------------------------------------------


def test_of_a_multimodal_model_it_goes_on_the_language_model_alone() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(**SIZES, intermediate_size=96)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=95)
    ).eval()
    data = {"positive": [IDS[:, :6]], "negative": [IDS[:, 6:]]}
    adapter = ll.attach(model, ll.AbliterationConfig(), calibration_data=data)
    assert len(adapter.targets) == 4
    assert all("language_model" in path for path in adapter.targets)


def test_a_model_with_two_sequences_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4))
    with pytest.raises(ll.ConfigError, match="T5ForConditionalGeneration has an encoder and a decoder"):
        ll.capture(model, [{"input_ids": IDS, "decoder_input_ids": IDS}])


def test_packed_weights_without_a_layers_weight_are_not_left_out_in_silence() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 128, 64
            self.register_buffer("qweight", torch.zeros(16, 64, dtype=torch.int32))

    class PackedExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("blocks", torch.zeros(4, 64, 24, dtype=torch.uint8))

    model = tiny_llama()
    model.model.layers[1].mlp.down_proj = Packed()  # a layer of a quantiser: the plain ablation acts on its output
    assert "model.layers.1.mlp.down_proj" in [target.path for target in ll.plan(model, ll.AbliterationConfig())]
    model = tiny_llama()
    model.model.layers[1].mlp.experts = PackedExperts()
    with pytest.raises(ll.TargetError, match=r"layers.1.mlp.experts: this PackedExperts may write to the residual"):
        ll.attach(model, ll.AbliterationConfig(), calibration_data=directions())


def test_a_block_that_is_packed_whole_and_what_stands_beside_an_exclusion_are_not_left_out_either() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4, 48, 64))

    model = tiny_llama()
    model.model.layers[1] = Bare()
    with pytest.raises(ll.TargetError, match=r"model.layers.1: this Bare may write to the residual"):
        ll.plan(model, ll.AbliterationConfig())
    assert len(ll.plan(model, ll.AbliterationConfig(layers=[0]))) == 2
    model = tiny_llama()
    model.model.layers[1].mlp.first, model.model.layers[1].mlp.second = Bare(), Bare()
    with pytest.raises(ll.TargetError, match=r"layers.1.mlp.second: this Bare may write"):
        ll.plan(model, ll.AbliterationConfig(exclude_names="first"))
    assert len(ll.plan(model, ll.AbliterationConfig(exclude_names=("first", "second")))) == 4


def test_an_interrupt_in_a_block_of_experts_leaves_nothing_behind() -> None:
    """torch runs the hooks that clear up after an Exception only, and Ctrl-C is none."""
    for after in ("forward", "detach", "scale"):
        model = moe("mixtral")
        base = logits(model)
        adapter = ll.attach(model, ll.AbliterationConfig(normalization="full"), calibration_data=directions())
        wanted = logits(model)
        block = model.model.layers[0].mlp.experts
        act = block.act_fn

        class Stop(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                raise KeyboardInterrupt

        block.act_fn = Stop()
        with pytest.raises(KeyboardInterrupt):
            logits(model)
        block.act_fn = act
        if after == "forward":
            assert torch.equal(logits(model), wanted)
        elif after == "scale":
            adapter.scale = 0.0
            assert torch.equal(logits(model), base)
        else:
            ll.detach(model)
            assert torch.equal(logits(model), base)


# ---- the real model -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_french_is_ablated_on_the_real_model(
    quantization: str | None, real_base: Callable[..., Any], real_tokenizer: Any, tmp_path: Path
) -> None:
    """All figures are compared with others of the same run: kernels, and with them the figures, differ by machine."""
    model, nouns = real_base(quantization), HELD_OUT[:10]
    neutral, french = (
        ll.prompt_batches(real_tokenizer, prompts, 20) for prompts in (NEUTRAL[:16], chats("French", nouns))
    )
    asked = {language: gap(model, real_tokenizer, language, nouns) for language in ("French", "English")}
    apart = asked["French"] - asked["English"]
    cfg = ll.AbliterationConfig(projected=True, layer=18)
    adapter = ll.attach(model, cfg, calibration_data=sides(real_tokenizer, FITTED[:10]))
    assert len(adapter.targets) == 60
    fallen = asked["French"] - gap(model, real_tokenizer, "French", nouns)
    divergence = [ll.kl_divergence(model, batches).mean().item() for batches in (neutral, french)]
    with torch.no_grad():
        on = model(**neutral[0]).logits
        with ll.disabled(model):
            off = model(**neutral[0]).logits
    if quantization is None:
        ll.save(model, tmp_path / "a.safetensors")
    ll.detach(model)
    with torch.no_grad():
        assert torch.equal(model(**neutral[0]).logits, off)
    control = []
    for seed in range(3):
        given = {"directions": random_direction(576, seed)}
        ll.attach(model, ll.AbliterationConfig(), calibration_data=given)
        control.append(asked["French"] - gap(model, real_tokenizer, "French", nouns))
        ll.detach(model)
    how = quantization or model.dtype
    print(f"\n{how}: the gap of {asked['French']:+.2f} falls by {fallen:.2f} of {apart:.2f}, random", end=" ")
    print(*(f"{each:+.2f}" for each in control), "KL neutral {:.3f}, French {:.3f}".format(*divergence))
    assert fallen > apart / 2, "more than half of what asking for French does is gone"
    assert fallen > 3 * max(map(abs, control)), "and not because any direction would do"
    assert divergence[0] < divergence[1] / 3, "it changes French prompts, and others little"
    if quantization is None:
        fresh = real_base()
        ll.load(fresh, tmp_path / "a.safetensors")
        with torch.no_grad():
            assert torch.equal(fresh(**neutral[0]).logits, on)


def test_autocast_ablates_in_its_dtype() -> None:
    for mode in MODES:
        for make in (tiny_llama, lambda: moe("qwen3")):
            model = make()
            ll.attach(model, ll.AbliterationConfig(normalization=mode), calibration_data=directions())
            exact = logits(model)
            with torch.autocast("cpu", torch.bfloat16):
                out = logits(model)
            assert (out.float() - exact).norm() < 0.03 * exact.norm()


@per_mode
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_oss"])
def test_low_precision_bases(mode: str, name: str) -> None:
    """A block alone: in a whole model, rounding may send a token to another expert."""
    x = torch.randn(64, 128 if name == "llama" else 64)
    chosen, weights = torch.randint(0, 4, (64, 2)), torch.rand(64, 2)
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama().to(dtype) if name == "llama" else moe(name).to(dtype)
        ll.attach(model, ll.AbliterationConfig(normalization=mode), calibration_data=directions())
        mlp = model.model.layers[1].mlp
        with torch.no_grad():
            if name == "llama":
                outputs.append(mlp.down_proj(x.to(dtype)))
            else:
                outputs.append(mlp.experts(x.to(dtype), chosen, weights.to(dtype)))
    assert outputs[1].dtype == torch.bfloat16
    assert (outputs[1].float() - outputs[0]).norm() < 0.01 * outputs[0].norm()
