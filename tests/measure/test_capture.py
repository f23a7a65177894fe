"""Streaming statistics of activations: numbers, positions, places, limits, and a model that is left as it was."""

from typing import Any

import pytest
import torch
from models import IDS, moe, quantized, tiny_llama
from torch import nn

import lora_lite as ll
from lora_lite.measure.contrast import geometric_median, orthonormal

PAD = 0


def ragged(side: str) -> dict[str, torch.Tensor]:
    """Rows of 3, 7 and 5 tokens, padded on one side."""
    ids, mask = torch.full((3, 7), PAD), torch.zeros(3, 7, dtype=torch.long)
    for row, n in enumerate((3, 7, 5)):
        columns = slice(0, n) if side == "right" else slice(7 - n, 7)
        ids[row, columns] = torch.arange(1, n + 1) + 10 * row
        mask[row, columns] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@torch.no_grad()
def residuals(model: Any, block: int) -> list[torch.Tensor]:
    """The stream after a block, for each ragged row by itself and without padding: (t, d) each."""
    out = []
    for row, n in enumerate((3, 7, 5)):
        ids = (torch.arange(1, n + 1) + 10 * row)[None]
        states = model.model(input_ids=ids, output_hidden_states=True).hidden_states
        out.append(states[block + 1][0])  # of all blocks but the last, whose entry is after the norm
    return out


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_never_seen(side: str) -> None:
    model = tiny_llama(num_hidden_layers=3)
    rows = residuals(model, 1)
    path = "model.layers.1"
    last = ll.capture(model, [ragged(side)], [path], reduce="samples")[path]
    torch.testing.assert_close(last.kept_samples(), torch.stack([row[-1] for row in rows]), rtol=1e-4, atol=1e-5)
    everything = ll.capture(model, [ragged(side)], [path], positions="all", reduce=("mean", "std"))[path]
    tokens = torch.cat(rows).double()
    assert everything.count == 15
    torch.testing.assert_close(everything.mean, tokens.mean(0), rtol=1e-4, atol=1e-5)
    assert everything.std is not None
    torch.testing.assert_close(everything.std, tokens.std(0, correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(12,), (5, 4, 3), (1,) * 12])
def test_statistics_do_not_depend_on_the_batches(sizes: tuple[int, ...]) -> None:
    model = tiny_llama(torch.float64)
    ids = torch.randint(1, 96, (12, 6), generator=torch.Generator().manual_seed(0))
    seen = ll.capture(
        model, list(ids.split(sizes)), positions="all", reduce=("mean", "std", "second_moment", "samples")
    )
    assert list(seen) == ["model.layers.0", "model.layers.1"]
    for statistics in seen.values():
        x = statistics.kept_samples().double()
        assert statistics.count == len(x) == 72
        assert statistics.std is not None
        assert statistics.second_moment is not None
        torch.testing.assert_close(statistics.mean, x.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(statistics.std, x.std(0, correction=0), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(statistics.second_moment, x.T @ x / len(x), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(statistics.covariance, torch.cov(x.T, correction=0), rtol=1e-9, atol=1e-12)


def test_a_large_mean_costs_the_spread_no_digits() -> None:
    """Where the mean is a thousand times the spread, a sum of squares in float32 would have no digit left."""
    layer = nn.Linear(4, 4)
    nn.init.eye_(layer.weight)
    nn.init.constant_(layer.bias, 1000.0)
    x = torch.randn(8, 50, 4)
    seen = ll.capture(
        layer, [{"input": part} for part in x.split(1)], [""], what="output", positions="all", reduce="std"
    )
    y = (x + 1000).reshape(-1, 4).double()
    assert seen[""].std is not None
    torch.testing.assert_close(seen[""].std, y.std(0, correction=0), rtol=1e-6, atol=0)


def test_places_inputs_outputs_and_the_stream_around() -> None:
    model = tiny_llama()
    cfg = ll.LoRAConfig(target_names=r"layers\.1.*(down|k)_proj")
    paths = ["model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
    inputs = ll.capture(model, [IDS], cfg, what="input", positions="all")
    outputs = ll.capture(model, [IDS], cfg, what="output", positions="all")
    around = ll.capture(model, [IDS], cfg, what="residual")
    assert list(inputs) == list(outputs) == list(around) == paths
    weight = model.get_submodule(paths[1]).weight.double()
    torch.testing.assert_close(outputs[paths[1]].mean, inputs[paths[1]].mean @ weight.T, rtol=1e-4, atol=1e-6)
    block = ll.capture(model, [IDS])["model.layers.1"]
    assert all(torch.equal(statistics.mean, block.mean) for statistics in around.values())
    before = ll.capture(model, [IDS], ["model.layers.1"], what="input")["model.layers.1"]
    assert torch.equal(before.mean, ll.capture(model, [IDS])["model.layers.0"].mean)


def test_fused_experts_see_every_token_though_flat() -> None:
    model = moe("qwen3")
    seen = ll.capture(model, [ragged("left")], ["model.layers.0.mlp", "model.layers.0.mlp.experts"], what="output")
    block, experts = seen.values()
    torch.testing.assert_close(block.mean, experts.mean)
    with pytest.raises(
        ll.TargetError, match=r"layers.0.mlp.experts.act_fn: it sees activations \(\d+, 48\), not one for"
    ):
        ll.capture(model, [IDS], ["model.layers.0.mlp.experts.act_fn"], what="output")


def test_a_mask_or_a_function_chooses_positions() -> None:
    model = tiny_llama()
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 3:5] = True
    masked = ll.capture(model, [IDS], ["model.layers.0"], positions=mask, reduce="samples")["model.layers.0"]
    again = ll.capture(model, [IDS], ["model.layers.0"], positions=lambda batch: mask, reduce="samples")
    everything = ll.capture(model, [IDS], ["model.layers.0"], positions="all", reduce="samples")["model.layers.0"]
    assert torch.equal(masked.kept_samples(), everything.kept_samples()[3:5])
    assert torch.equal(again["model.layers.0"].kept_samples(), masked.kept_samples())


def test_the_model_is_left_as_it_was_on_an_error_too(tiny: str) -> None:
    model = quantized(tiny, "nf4")
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    layer = model.model.layers[1].mlp.up_proj
    layout, rng = layer.support_avx512bf16_for_cpu, torch.get_rng_state()

    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    before = hooks()

    def breaks(vectors: torch.Tensor) -> torch.Tensor:
        torch.rand(3)
        raise ZeroDivisionError

    ll.capture(model, [IDS])
    with pytest.raises(ZeroDivisionError):
        ll.capture(model, [IDS], transform=breaks)
    assert [module.training for module in model.modules()] == modes
    assert hooks() == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert layer.support_avx512bf16_for_cpu == layout
    ll.attach(model.eval(), ll.LoRAConfig(r=2))  # nothing was repacked


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_quantised_models(quantization: str, tiny: str) -> None:
    model = quantized(tiny, quantization)
    with torch.no_grad():
        ll.attach(model, ll.LoRAConfig(r=2))  # keeps the layout for the reference below
        states = model.model(input_ids=IDS, output_hidden_states=True).hidden_states[1][:, -1].double()
    captured = ll.capture(model, [IDS])["model.layers.0"]
    torch.testing.assert_close(captured.mean, states.mean(0))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batches": []}, ll.ConfigError, "there are no batches to calibrate on\n  a generator"),
        ({"batches": ["text"]}, ll.ConfigError, "a batch is a str: wanted a tensor of ids"),
        ({"reduce": "median"}, ll.ConfigError, r"reduce=\['median'\]: wanted any of"),
        ({"reduce": ()}, ll.ConfigError, r"reduce=\[\]: wanted any of"),
        ({"what": "state"}, ll.ConfigError, r"what=\['state'\]: wanted any of \('input', 'output', 'residual'\)"),
        ({"positions": "first"}, ll.ConfigError, "positions='first': wanted 'last', 'all', a mask"),
        ({"positions": torch.ones(2, 3)}, ll.ConfigError, r"a mask \(2, 3\) with 6 positions for tokens\s+\(2, 12\)"),
        ({"positions": torch.zeros(2, 12)}, ll.ConfigError, "with 0 positions"),
        ({"where": ["model.layer.0"]}, ll.TargetError, "nowhere to look .*: model.layer.0\n  its blocks are model.la"),
        ({"where": ["lm_head"]}, ll.TargetError, "what='residual': lm_head is in no block"),
        ({"reduce": "samples", "max_bytes": 9}, ll.ConfigError, "samples need more than max_bytes=9"),
    ],
)
def test_bad_arguments_say_what_was_wanted(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ll.capture(tiny_llama(), **({"batches": [IDS]} | arguments))


def test_padding_is_no_position_and_an_empty_row_no_prompt() -> None:
    model, batch = tiny_llama(), ragged("left")
    with pytest.raises(ll.ConfigError, match="some positions, none of them padding"):
        ll.capture(model, [batch], positions=torch.ones(3, 7))
    batch["attention_mask"][1] = 0
    with pytest.raises(ll.ConfigError, match=r"a row of the batch \(3, 7\) has no token"):
        ll.capture(model, [batch])


def test_a_nan_and_a_module_that_never_runs_are_errors() -> None:
    model = tiny_llama()
    model.model.unused = nn.Linear(2, 2)
    with pytest.raises(ll.TargetError, match=r"model.unused: the model's forward never called it"):
        ll.capture(model, [IDS], ["model.unused"], what="output")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ll.BaseModelError, match=r"model.layers.1: an activation is NaN or infinite"):
        ll.capture(model, [IDS])


# ---- directions ---------------------------------------------------------------------------------


def test_winsorising_clamps_each_vector_at_its_own_quantile() -> None:
    model = tiny_llama()
    data = {"positive": [IDS[:, :5], IDS[:, 2:]], "negative": [IDS[:, 5:], IDS[:, 3:7]]}
    clamped = ll.contrast(model, data, winsorize=0.75)["model.layers.1"]
    raw = ll.capture(model, data["positive"], ["model.layers.1"], reduce="samples")["model.layers.1"].kept_samples()
    limits = torch.stack([row.abs().quantile(0.75) for row in raw])[:, None]
    torch.testing.assert_close(clamped.positive, raw.clamp(-limits, limits).double().mean(0))
    untouched = ll.contrast(model, data, winsorize=1.0)["model.layers.1"]
    torch.testing.assert_close(untouched.positive, raw.double().mean(0))


def test_a_projected_direction_leaves_the_negative_centre_alone() -> None:
    data = {"positive": [IDS[:, :5], IDS[:, 2:]], "negative": [IDS[:, 5:], IDS[:, 3:7]]}
    for center in ("mean", "median"):
        for rank in (1, 2):
            contrasts = ll.contrast(tiny_llama(), data, projected=True, center=center, rank=rank)
            for contrast in contrasts.values():
                assert (contrast.directions.double() @ contrast.negative).abs().max() < 1e-5 * contrast.negative.norm()
                torch.testing.assert_close(contrast.directions @ contrast.directions.T, torch.eye(rank))


def test_the_geometric_median_minimises_distances_and_shrugs_at_an_outlier() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    median = geometric_median(x)
    pull = torch.nn.functional.normalize(x.double() - median, dim=1).sum(0)  # the gradient of the sum of distances
    assert pull.norm() < 1e-6
    x[0] = 1e6
    assert (geometric_median(x) - median).norm() < 0.2
    torch.testing.assert_close(geometric_median(x[1:2]), x[1].double())


def test_orthonormal_keeps_order_and_sides() -> None:
    rows = torch.tensor([[0.0, -2.0, 0.0], [1.0, -1.0, 0.0]])
    torch.testing.assert_close(orthonormal(rows, "here"), torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]).double())
    with pytest.raises(
        ll.BaseModelError, match="here: 2 directions of which some are zero, not finite, or in the span"
    ):
        orthonormal(torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]]), "here")
