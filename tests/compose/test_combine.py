"""Combinations: equal to sums on dense float64 matrices, whatever the methods, ranks, scales and layers are."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import IDS, acts_everywhere, config, keep, moe, one_layer, perturb, quantized_llama, tiny_llama, trained
from test_laws import logits, same_snapshot, snapshot
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.core.effective import delta_weight
from lora_lite.core.state import sites_of

EXACT: dict[str, Any] = {"dtype": torch.float64}
SETTINGS: list[dict[str, Any]] = [
    {"r": 3, "alpha": 2.0, "target_names": "q_proj|mlp"},
    {"r": 5, "alpha": 7.0, "rslora": True, "target_names": "q_proj|o_proj", "per_layer": {"0.*o_proj": {"r": 2}}},
    {"r": 1, "target_names": "down_proj|q_proj"},
]
"""Ranks, scalings and sets of layers; q_proj is in all, k_proj in none."""
NAMES = ("a", "b", "c")


def with_three(dtype: torch.dtype = torch.float64, adapter_dtype: torch.dtype = torch.float64) -> Any:
    """A tiny Llama with LoRAs a, b and c, and b at another scale."""
    model = tiny_llama(dtype)
    for seed, (name, fields) in enumerate(zip(NAMES, SETTINGS, strict=True), 1):
        trained(model, "lora", name, seed=seed, dtype=adapter_dtype, **fields)
    ll.adapters(model)["b"].scale = -1.7
    return model


def deltas(model: Any, name: str) -> dict[str, Tensor]:
    """W' - W of one adapter by itself, from its factors or, of any other method, from the merge's maths."""
    result = {}
    for site in ll.adapters(model)[name].sites():
        if site.cfg.variant == "lora":
            a, b = site.tensor("lora_A").detach().double(), site.tensor("lora_B").detach().double()
            s = (site.cfg.alpha or site.cfg.r) / (site.cfg.r**0.5 if site.cfg.rslora else site.cfg.r)
            result[site.path] = site.state.scale * s * (b @ a)
        else:
            result[site.path] = delta_weight([site])[0]
    return result


def summed(model: Any, weights: dict[str, float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for path, delta in deltas(model, name).items():
            total[path] = total.get(path, 0) + weight * delta
    return total


def is_close(got: dict[str, Tensor], wanted: dict[str, Tensor], bound: float = 1e-6) -> bool:
    assert got.keys() == wanted.keys()
    return all((got[path] - wanted[path]).norm() <= bound * wanted[path].norm() for path in wanted)


def alone(model: Any, name: str) -> Tensor:
    """The logits with one adapter at work."""
    for other, adapter in ll.adapters(model).items():
        adapter.scale = 1.0 if other == name else 0.0
    return logits(model)


# ---- exact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_exact_is_the_sum_of_the_deltas_in_float64(dtype: torch.dtype) -> None:
    model, weights = with_three(adapter_dtype=dtype), {"a": 1.0, "b": -0.5, "c": 2.25}
    combined = ll.combine(model, weights, "all")
    assert is_close(deltas(model, "all"), summed(model, weights), 1e-12 if dtype == torch.float64 else 1e-6)
    assert combined.adapter.config.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    ranks = {site.path: site.cfg.r for site in combined.adapter.sites()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 3 + 5 + 1
    assert ranks["model.layers.0.self_attn.o_proj"] == 2
    assert ranks["model.layers.1.self_attn.o_proj"] == 5
    assert ranks["model.layers.0.mlp.up_proj"] == 3
    assert {site.cfg.scaling for site in combined.adapter.sites()} == {1.0}
    assert combined.error < 1e-7


def test_minus_one_is_the_opposite() -> None:
    model = with_three()
    combined = ll.combine(model, {"a": -1.0}, "minus")
    assert is_close(deltas(model, "minus"), {path: -delta for path, delta in deltas(model, "a").items()}, 1e-12)
    nothing = ll.combine(model, {"a": 1.0, "minus": 1.0}, "nothing")
    assert all(delta.abs().max() < 1e-15 for delta in deltas(model, "nothing").values())
    assert (combined.error, nothing.error) == (pytest.approx(0, abs=1e-12), 0.0)


def test_the_given_ones_stay_as_they_are() -> None:
    model = with_three()
    out, before = logits(model), snapshot(model)
    ll.combine(model, {"a": 1.0, "b": -0.5}, "both")
    assert {name: adapter.scale for name, adapter in ll.adapters(model).items()} == {
        "a": 1,
        "b": -1.7,
        "c": 1,
        "both": 1,
    }
    assert not torch.allclose(logits(model), out)  # all are at work
    ll.detach(model, "both")
    assert torch.equal(logits(model), out)
    assert same_snapshot(before, snapshot(model))


def test_the_outputs_are_those_of_all_side_by_side() -> None:
    model = with_three()
    out = logits(model)
    ll.combine(model, {"a": 1.0, "b": 1.0, "c": 1.0}, "all")
    assert torch.allclose(alone(model, "all"), out, rtol=0, atol=1e-12)


def test_a_combination_is_combined_again() -> None:
    model = with_three()
    ll.combine(model, {"a": 1.0, "b": -0.5}, "ab")
    ll.combine(model, {"ab": 2.0, "c": 3.0, "a": -1.0}, "again")
    assert is_close(deltas(model, "again"), summed(model, {"a": 1.0, "b": -1.0, "c": 3.0}), 1e-12)


def test_a_combination_is_trained_and_saved(tmp_path: Path) -> None:
    model = with_three(torch.float32, torch.float32)
    adapter = ll.combine(model, {"a": 1.0, "b": -0.5, "c": 0.1}, "all").adapter
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    perturb(adapter)
    out = alone(model, "all")
    ll.save(model, tmp_path / "all.safetensors", "all")
    fresh = tiny_llama()
    ll.load(fresh, tmp_path / "all.safetensors")
    assert torch.equal(logits(fresh), out)
    again = tiny_llama()
    assert list(ll.attach(again, adapter.config).targets) == list(adapter.targets)


def test_constants_are_summed_too() -> None:
    model = tiny_llama(torch.float64)
    for seed, (name, fields) in enumerate({"a": {"bias": True}, "b": {}, "c": {"bias": True}}.items()):
        trained(model, "lora", name, seed=seed, **EXACT, **fields)
    out = logits(model)
    ll.combine(model, dict.fromkeys(NAMES, 1.0), "all")
    assert torch.allclose(alone(model, "all"), out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", [name for name in ll.REGISTRY if acts_everywhere(name)])
def test_every_method_is_combined_with_a_lora(variant: str) -> None:
    """Alone, the combination gives the outputs of the two deltas' sum."""
    model, x = one_layer(variant, dtype=torch.float64)
    trained(model, variant, "a", target_names="proj", **EXACT)
    names = {"a": 2.0}
    if variant not in ("norm",):
        trained(model, "lora", "b", seed=2, r=2, target_names="proj", kinds=("linear", "embedding"), **EXACT)
        names["b"] = -0.5
    with torch.no_grad():
        outputs = {}
        for name in names:
            others = [adapter for other, adapter in ll.adapters(model).items() if other != name]
            for adapter in others:
                adapter.scale = 0.0
            outputs[name] = model(x)
            for adapter in others:
                adapter.scale = 1.0
        with ll.disabled(model):
            base = model(x)
        combined = ll.combine(model, names, "both")
        for name in names:
            ll.adapters(model)[name].scale = 0.0
        wanted = base + sum(weight * (outputs[name] - base) for name, weight in names.items())
        assert torch.allclose(model(x), wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))
    assert combined.error < 1e-8


@pytest.mark.parametrize("how", [{}, {"how": "svd", "energy": 0.9}, {"how": "ties", "density": 0.3}])
def test_fused_experts(how: dict[str, Any]) -> None:
    model = moe("qwen3")
    for seed, (name, r) in enumerate({"a": 2, "b": 3}.items(), 1):
        trained(model, "lora", name, seed=seed, r=r, kinds="experts", target_names="experts")
    out = logits(model)
    combined = ll.combine(model, {"a": 1.0, "b": 1.0}, "both", **how)
    assert len(combined.errors) == 4
    if not how:
        assert torch.allclose(alone(model, "both"), out, rtol=0, atol=1e-5)
    elif how["how"] == "svd":
        for site in combined.adapter.sites():
            others = [s for name in "ab" for s in ll.adapters(model)[name].sites() if s.path == site.path]
            factors = [(s.tensor("lora_B").detach().double(), s.tensor("lora_A").detach()) for s in (site, *others)]
            got, *given = (b @ a.double() for b, a in factors)
            error = float((got - sum(given)).norm() / sum(given).norm())
            assert combined.errors[site.path] == pytest.approx(error, rel=1e-6)
            assert error**2 < 0.1
    else:
        assert combined.adapter.variant == "full"


class Mixed(nn.Module):
    """A convolution, one with groups, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(20, 8), nn.Conv1d(8, 12, 3, padding=1)
        self.groups = nn.Conv1d(12, 8, 3, groups=4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.groups(self.conv(self.embed(ids).mT))


@pytest.mark.parametrize("variants", [("lora", "lora"), ("lora", "dora"), ("full", "lora")])
def test_convolutions_and_embeddings(variants: tuple[str, str]) -> None:
    model: Any = Mixed().double()
    for seed, (name, variant) in enumerate(zip("ab", variants, strict=True)):
        trained(model, variant, name, seed=seed, kinds=("conv", "embedding"), target_names="", **EXACT)
    wanted = summed(model, {"a": 0.5, "b": -2.0})
    ll.combine(model, {"a": 0.5, "b": -2.0}, "both")
    assert is_close(deltas(model, "both"), wanted, 1e-11)
    model(IDS % 20)


def test_tied_embeddings_stay_together() -> None:
    model = tiny_llama(torch.float64, tie_word_embeddings=True)
    for seed, name in enumerate(NAMES[:2]):
        trained(
            model, "lora", name, seed=seed, kinds="embedding", target_names="embed", tied_weights="together", **EXACT
        )
    out = logits(model)
    combined = ll.combine(model, {"a": 1.0, "b": 1.0}, "both")
    assert combined.adapter.config.tied_weights == "together"
    assert torch.allclose(alone(model, "both"), out, rtol=0, atol=1e-12)
    model = tiny_llama(torch.float64, tie_word_embeddings=True)
    for name, tied in (("a", "together"), ("b", "apart")):
        trained(model, "lora", name, kinds="embedding", target_names="embed", tied_weights=tied)
    refused(
        model, {"a": 1.0, "b": 1.0}, ll.TargetError, r"embed_tokens: .* \(tied_weights\)\n  attach all of them with one"
    )


# ---- svd ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [{"rank": 2}, {"energy": 0.8}, {"rank": 100}, {"energy": 1.0}])
def test_svd_is_the_best_of_its_rank_and_tells_its_error(bound: dict[str, Any]) -> None:
    model, weights = with_three(), {"a": 1.0, "b": -0.5, "c": 1.0}
    wanted = summed(model, weights)
    combined = ll.combine(model, weights, "svd", how="svd", **bound)
    squares = 0.0
    for site in combined.adapter.sites():
        s = torch.linalg.svdvals(wanted[site.path])
        left = (deltas(model, "svd")[site.path] - wanted[site.path]).norm()
        size = wanted[site.path].norm()
        assert combined.errors[site.path] == pytest.approx(float(left / size), rel=1e-9, abs=1e-14)
        assert float(left) == pytest.approx(float(s[site.cfg.r :].norm()), rel=1e-9, abs=1e-12)
        if "energy" in bound:
            shares = s.square().cumsum(0) / s.square().sum()
            assert shares[site.cfg.r - 1] >= bound["energy"] - 1e-12
            assert site.cfg.r == 1 or shares[site.cfg.r - 2] < bound["energy"]
        squares += float(left) ** 2
    total = sum(float(delta.norm()) ** 2 for delta in wanted.values())
    assert combined.error == pytest.approx((squares / total) ** 0.5, rel=1e-9, abs=1e-14)
    ranks = {"rank 2": {"rank": 2}, "rank 2 to 4": {"energy": 0.8}}.get(str(combined).split(", ")[2])
    assert ranks == bound or "rank 2 to 9" in str(combined)


def test_svd_of_a_method_that_is_no_low_rank_update() -> None:
    model = tiny_llama(torch.float64)
    trained(model, "dora", "a", target_names="q_proj", **EXACT)
    trained(model, "ia3", "b", target_names="k_proj", **EXACT)
    wanted = summed(model, {"a": 1.0, "b": 0.5})
    combined = ll.combine(model, {"a": 1.0, "b": 0.5}, "svd", how="svd", rank=3)
    assert combined.adapter.variant == "lora"
    for path, delta in deltas(model, "svd").items():
        assert combined.errors[path] == pytest.approx(float((delta - wanted[path]).norm() / wanted[path].norm()))


# ---- sums of parts ------------------------------------------------------------------------------


def top(delta: np.ndarray, density: float) -> np.ndarray:
    """The `density` part that is greatest in size; others 0."""
    threshold = np.sort(np.abs(delta), axis=None)[::-1][max(1, round(density * delta.size)) - 1]
    return np.where(np.abs(delta) >= threshold, delta, 0.0)


def ties_by_the_paper(tasks: list[np.ndarray], density: float) -> np.ndarray:
    """Algorithm 1 of arXiv:2306.01708 element by element, for one λ = 1: trim, elect signs, disjoint merge."""
    left = [top(task, density) for task in tasks]
    result = np.zeros_like(tasks[0])
    for index in np.ndindex(*result.shape):
        positive = sum(task[index] for task in left if task[index] > 0)
        negative = -sum(task[index] for task in left if task[index] < 0)
        sign = np.sign(positive - negative)
        agreeing = [task[index] for task in left if np.sign(task[index]) == sign and sign != 0]
        result[index] = np.mean(agreeing) if agreeing else 0.0
    return result


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
def test_ties_is_the_papers(density: float) -> None:
    model, weights = with_three(), {"a": 1.0, "b": -0.5, "c": 0.8}
    path = "model.layers.0.self_attn.q_proj"
    tasks = [weight * deltas(model, name)[path].numpy() for name, weight in weights.items()]
    combined = ll.combine(model, weights, "ties", how="ties", density=density)
    assert combined.adapter.variant == "full"
    got = deltas(model, "ties")[path].numpy()
    assert np.abs(got - ties_by_the_paper(tasks, density)).max() < 1e-14


def test_magnitude_is_the_sum_of_the_largest() -> None:
    model, weights = with_three(), {"a": 1.0, "b": -0.5}
    wanted = {
        path: sum(
            (
                torch.from_numpy(top((weights[n] * d[path]).numpy(), 0.3))
                for n in weights
                if path in (d := deltas(model, n))
            ),
            torch.zeros(()),
        )
        for path in summed(model, weights)
    }
    ll.combine(model, weights, "magnitude", how="magnitude", density=0.3)
    assert is_close(deltas(model, "magnitude"), wanted, 1e-14)
    kept = deltas(model, "magnitude")["model.layers.0.mlp.up_proj"].count_nonzero()
    assert kept == round(0.3 * 64 * 128)


def test_dare_is_right_on_average_and_the_same_for_a_seed() -> None:
    model, _ = one_layer("lora", dtype=torch.float64)
    for seed, name in enumerate(NAMES[:2]):
        trained(model, "lora", name, seed=seed, r=2, target_names="proj", **EXACT)
    weights, n, runs = {"a": 1.0, "b": -0.5}, 400, []
    wanted = summed(model, weights)["proj"]
    for seed in range(n):
        ll.combine(model, weights, "dare", how="dare", density=0.4, seed=seed)
        runs.append(deltas(model, "dare")["proj"])
        ll.detach(model, "dare")
    stack = torch.stack(runs)  # (n, o, i)
    z = (stack.mean(0) - wanted) / (stack.std(0) / n**0.5)
    assert z.abs().max() < 5  # of 384 normal numbers
    assert abs(float(z.square().mean()) - 1) < 0.3
    share = float(stack.count_nonzero() / stack.numel())
    assert share == pytest.approx(1 - 0.6**2, abs=0.01)  # an element of one of the two is left
    ll.combine(model, weights, "again", how="dare", density=0.4, seed=3)
    assert torch.equal(deltas(model, "again")["proj"], runs[3])
    ll.combine(model, weights, "whole", how="dare", density=1.0)
    assert is_close(deltas(model, "whole"), summed(model, weights), 1e-12)


@pytest.mark.parametrize("how", ["ties", "dare", "magnitude"])
def test_a_sum_of_parts_as_a_lora(how: str) -> None:
    model, weights = with_three(), {"a": 1.0, "b": -0.5}
    ll.combine(model, weights, "full", how=how, density=0.5)
    combined = ll.combine(model, weights, "lora", how=how, density=0.5, rank=6)
    assert combined.adapter.variant == "lora"
    full, lora = deltas(model, "full"), deltas(model, "lora")
    for path, error in combined.errors.items():
        assert error == pytest.approx(float((full[path] - lora[path]).norm() / full[path].norm()), rel=1e-9)


# ---- PEFT ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"how": "svd", "energy": 0.9}, {"how": "ties", "density": 0.3, "rank": 4}])
def test_peft_reads_a_combination_with_its_ranks(how: dict[str, Any], tmp_path: Path) -> None:
    import peft

    model = with_three(torch.float32, torch.float32)
    adapter = ll.combine(model, {"a": 1.0, "b": -0.5, "c": 2.0}, "all", **how).adapter
    out = alone(model, "all")
    ll.save_peft(model, tmp_path, "all")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    settings = theirs.peft_config["default"]
    patterns = [dict(p) for p in (settings.rank_pattern, settings.alpha_pattern)]
    assert patterns[0] == patterns[1]
    assert bool(patterns[0]) == (len({site.cfg.r for site in adapter.sites()}) > 1)
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=IDS).logits, out, rtol=0, atol=2e-6)


# ---- what is refused ----------------------------------------------------------------------------


def refused(model: Any, weights: Any, error: type[Exception], match: str, into: str = "both", **how: Any) -> None:
    """It raises, and the model is as it was."""
    out, before, known = logits(model), snapshot(model), list(ll.adapters(model))
    with pytest.raises(error, match=match):
        ll.combine(model, weights, into, **how)
    assert list(ll.adapters(model)) == known
    assert same_snapshot(before, snapshot(model))
    assert torch.equal(logits(model), out)


@pytest.mark.parametrize(
    ("weights", "how", "error", "match"),
    [
        ({}, {}, ll.ConfigError, r"weights=\{\}: wanted \{name of an adapter: finite weight\}, one at least"),
        ({"a": float("nan")}, {}, ll.ConfigError, r"weights=\{'a': nan\}"),
        ({"a": float("inf")}, {}, ll.ConfigError, r"weights=\{'a': inf\}"),
        ({"a": True}, {}, ll.ConfigError, r"weights=\{'a': True\}"),
        ({"a": 1.0, "z": 1.0}, {}, ll.TargetError, r"no adapter 'z' on this .*\n  attached: a, b, c"),
        ({"a": 1.0}, {"into": "b"}, ll.TargetError, r"adapter 'b' is attached to this .* already"),
        ({"a": 1.0}, {"into": "b c"}, ll.ConfigError, r"adapter name 'b c'"),
        ({"a": 1.0}, {"how": "linear"}, ll.ConfigError, r"how='linear'\): wanted how one of \('exact', 'svd', 'ties'"),
        ({"a": 1.0}, {"rank": 2}, ll.ConfigError, r"how='exact' with rank=2, energy=None: wanted neither"),
        ({"a": 1.0}, {"how": "svd"}, ll.ConfigError, r"how='svd' with rank=None, energy=None: wanted one of them"),
        ({"a": 1.0}, {"how": "svd", "rank": 2, "energy": 0.5}, ll.ConfigError, r"rank=2, energy=0.5: wanted one"),
        ({"a": 1.0}, {"how": "svd", "rank": 0}, ll.ConfigError, r"rank=0\): wanted rank 1 at least"),
        ({"a": 1.0}, {"how": "svd", "rank": True}, ll.ConfigError, r"rank=True\)"),
        ({"a": 1.0}, {"how": "svd", "energy": 1.5}, ll.ConfigError, r"energy=1.5\): wanted energy above 0, at most 1"),
        ({"a": 1.0}, {"how": "ties"}, ll.ConfigError, r"density=None\): wanted density a number with ties, dare"),
        ({"a": 1.0}, {"how": "ties", "density": 0}, ll.ConfigError, r"density=0\): wanted density above 0"),
        ({"a": 1.0}, {"density": 0.5}, ll.ConfigError, r"density=0.5\): wanted density a number with ties"),
        ({"a": 1.0}, {"seed": 1}, ll.ConfigError, r"seed=1\): wanted seed None, but for how='dare'"),
        ({"a": 1.0}, {"how": "dare", "density": 0.5, "seed": -1}, ll.ConfigError, r"seed=-1\): wanted seed 0 or more"),
    ],
)
def test_bad_arguments(weights: Any, how: dict[str, Any], error: type[Exception], match: str) -> None:
    refused(with_three(), weights, error, match, **how)


def test_an_adapter_that_is_off_is_no_part() -> None:
    model = with_three()
    ll.adapters(model)["a"].scale = 0.0
    refused(model, {"a": 1.0}, ll.ConfigError, r"adapter 'a' is off \(scale 0\).*\n  set its scale first")


def test_merged_adapters_are_no_parts() -> None:
    model = with_three()
    ll.merge(model)
    refused(model, {"a": 1.0}, ll.TargetError, r"can't combine adapters: a, b, c are merged")


@pytest.mark.parametrize(
    ("variant", "fields", "match"),
    [
        ("lora", {"invocation_tokens": (5, 6)}, r"q_proj: .*some positions"),
        ("reft", {"kinds": "block", "target_names": ()}, r"layers\.0: .*positions|block's output"),
        ("steer", {"kinds": "block", "target_names": ()}, r"the residual stream at a block's output"),
    ],
)
def test_what_is_no_change_of_a_weight(variant: str, fields: dict[str, Any], match: str) -> None:
    model = tiny_llama()
    trained(model, variant, "a", **fields)
    with pytest.raises(ll.TargetError, match=match):
        ll.combine(model, {"a": 1.0}, "b")
    assert list(ll.adapters(model)) == ["a"]


def test_the_output_of_fused_experts_is_no_matrix() -> None:
    model = moe("qwen3")
    trained(model, "abliteration", "a", target_names="experts$")
    refused(model, {"a": 1.0}, ll.TargetError, r"experts: 'abliteration' is on the block of fused experts.*\n  keep it")


def test_a_quantised_base_for_a_method_that_depends_on_the_weight() -> None:
    model = quantized_llama("nf4")
    trained(model, "lora", "a", target_names="q_proj")
    trained(model, "full", "b", target_names="q_proj")
    trained(model, "ia3", "c", target_names="q_proj")
    trained(model, "dora", "d", target_names="q_proj")
    for name in ("c", "d"):
        with pytest.raises(ll.QuantizedWeightError, match=r"q_proj: what '.*' changes depends on the weight.* nf4"):
            ll.combine(model, {"a": 1.0, name: 1.0}, "both")
    wanted = summed(model, {"a": 1.0, "b": -1.0})
    ll.combine(model, {"a": 1.0, "b": -1.0}, "both")  # neither reads it
    assert is_close(deltas(model, "both"), wanted)


def test_a_nan_is_refused() -> None:
    model = with_three()
    with torch.no_grad():
        next(ll.adapters(model)["a"].parameters())[0, 0] = torch.nan
    with pytest.raises(ll.CheckpointError, match=r"adapter 'a' in memory"):
        ll.combine(model, {"a": 1.0}, "both")


def test_adapters_of_two_bases(tmp_path: Path) -> None:
    other = tiny_llama(seed=1)
    trained(other, "dora", target_names="q_proj")
    ll.save(other, tmp_path / "other.safetensors")
    model = tiny_llama()
    trained(model, "lora", "a")
    ll.load(model, tmp_path / "other.safetensors", "b", verify_base=False)
    refused(model, {"a": 1.0, "b": 1.0}, ll.BaseModelError, r"adapters 'a' and 'b' belong to different bases\n  a: ")


def test_a_low_rank_that_isnt_what_the_forward_does() -> None:
    @ll.register
    class Wrong:
        name = "wrong_low_rank"
        handles_scale = True
        param_specs = staticmethod(ll.REGISTRY["lora"].param_specs)
        config = ll.LoRAConfig
        forward = staticmethod(ll.REGISTRY["lora"].forward)

        @staticmethod
        def low_rank(layer: Any) -> Any:
            return layer.lora_A, layer.lora_B, 2 * layer.scale

    model = tiny_llama()
    perturb(ll.attach(model, ll.LoRAConfig(variant="wrong_low_rank", target_names="q_proj"), "a"))
    refused(model, {"a": 1.0}, ll.VariantError, r"q_proj: low_rank of 'wrong_low_rank' gave another change than its")


def test_a_history_is_combined() -> None:
    model = tiny_llama(torch.float64)
    keep(model, c=0.5, target_names="q_proj", **EXACT)
    keep(model, "dora", c=-1.0, target_names="q_proj", **EXACT)
    out = logits(model)
    ll.combine(copy.deepcopy(model), {"history": 1.0}, "a", how="svd", rank=4)
    ll.combine(model, {"history": 1.0}, "b")
    assert torch.allclose(alone(model, "b"), out, rtol=0, atol=1e-9)
    assert list(sites_of(model.model.layers[0].self_attn.q_proj)) == ["history", "b"]


def test_what_was_combined_is_logged(log: list[str]) -> None:
    ll.combine(with_three(), {"a": 1.0, "b": -0.5}, "both", how="svd", rank=2)
    assert any(
        "combined a 1, b -0.5 into 'both' (svd): lora, 10 layers, rank 2, relative error" in line for line in log
    )
    assert config("lora").r == 8
