"""calibrate_scale: the budget met at either pole, by name, nothing left behind; its warnings where it can't be; and
find_root, its search, on plain functions."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import IDS, perturb, tiny_llama
from test_evaluate import Calls

import lora_lite as ll
from lora_lite.measure.calibrate_scale import find_root

BATCHES = [IDS[:, :7], IDS[:, 3:], IDS]


def sure(dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model that is as sure of its next token as trained ones are, so that it can diverge by some nats."""
    model = tiny_llama(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def adapted(size: float = 0.02, dtype: torch.dtype = torch.float32) -> tuple[Any, ll.Adapter]:
    model = sure(dtype)
    adapter = ll.attach(model, ll.LoRAConfig())
    perturb(adapter, size)
    adapter.scale = 0.37
    return model, adapter


def measured(model: Any, c: float, statistic: str = "mean", name: str | None = None) -> float:
    with ll.scaled(model, c, name):
        kl = ll.kl_divergence(model, BATCHES, name, positions="all")
    return float(kl.mean() if statistic == "mean" else kl.quantile(0.95))


def calibrated(model: Any, target: float, **options: Any) -> ll.Calibrated:
    return ll.calibrate_scale(model, BATCHES, target, positions="all", **options)


# ---- the budget is met --------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [8.0, -8.0])
@pytest.mark.parametrize("statistic", ["mean", "p95"])
@pytest.mark.parametrize("target", [0.3, 0.002])
def test_the_divergence_at_c_is_the_target(target: float, statistic: str, limit: float) -> None:
    model, adapter = adapted()
    result = calibrated(model, target, statistic=statistic, limit=limit)
    assert result.met
    assert result.monotone
    assert result.c * limit > 0
    assert result.kl == pytest.approx(target, rel=0.02)
    assert measured(model, result.c, statistic) == pytest.approx(result.kl, rel=1e-6)
    assert result.evaluations <= 10
    assert [abs(c) for c, _ in result.curve] == sorted(abs(c) for c, _ in result.curve)
    assert (result.c, result.kl) in result.curve
    assert adapter.scale == 0.37


def test_a_narrow_tolerance_takes_more_evaluations() -> None:
    model, _ = adapted(dtype=torch.float64)
    rough, fine = (calibrated(model, 0.05, tolerance=tolerance) for tolerance in (0.1, 1e-4))
    assert fine.kl == pytest.approx(0.05, rel=1e-4)
    assert rough.evaluations < fine.evaluations <= 30


def test_the_target_may_lie_beyond_the_first_c() -> None:
    model, _ = adapted()
    target = measured(model, 3.0)
    assert calibrated(model, target).c == pytest.approx(3.0, rel=0.02)
    assert calibrated(model, target, limit=3.0).curve[-1][0] <= 3.0


def test_one_adapter_is_turned_and_the_others_stay() -> None:
    model, adapter = adapted()
    other = ll.attach(model, ll.LoRAConfig(), "other")
    perturb(other, 0.02, seed=7)
    other.scale = -0.8
    result = calibrated(model, 0.05, name="other")
    assert result.met
    assert (adapter.scale, other.scale) == (0.37, -0.8)
    assert measured(model, result.c, name="other") == pytest.approx(result.kl, rel=1e-6)
    together = calibrated(model, 0.05)
    assert together.met
    assert together.c != result.c
    assert measured(model, together.c) == pytest.approx(together.kl, rel=1e-6)
    assert calibrated(model, 0.05, name="other", apply=True).c == result.c
    assert (adapter.scale, other.scale) == (0.37, result.c)
    assert calibrated(model, 0.05, apply=True) == together
    assert (adapter.scale, other.scale) == (together.c, together.c)


def test_a_generator_is_read_once_and_the_base_runs_once_for_each_batch() -> None:
    model, _ = adapted()
    expected, read = calibrated(model, 0.05), []

    def batches() -> Iterator[Any]:
        for batch in BATCHES:
            read.append(batch)
            yield batch

    ll.attach(model, ll.LoRAConfig(), "idle")  # takes part in the base's side, which then is remembered nowhere else
    calls = Calls(model)
    result = ll.calibrate_scale(model, batches(), 0.05, name="default", positions="all")
    assert result == expected
    assert len(read) == len(BATCHES)
    assert calls.count == len(BATCHES) * (1 + result.evaluations)


# ---- the search, without a model ----------------------------------------------------------------


def searched(f: Callable[[float], float], target: float, limit: float = 8.0, **options: Any) -> dict[float, float]:
    """The points of find_root; each but 0 is evaluated once, and lies between 0 and the limit."""
    calls: list[float] = []

    def counted(x: float) -> float:
        calls.append(x)
        return f(x)

    points = find_root(counted, target, limit, **({"tolerance": 0.02, "max_evaluations": 30} | options))
    assert list(points) == [0.0, *calls]
    assert all(x * limit > 0 and abs(x) <= abs(limit) for x in calls)
    assert all(points[x] == f(x) for x in calls)
    return points


def last(points: dict[float, float]) -> tuple[float, float]:
    return list(points.items())[-1]


@pytest.mark.parametrize("limit", [8.0, -8.0, 0.5])
@pytest.mark.parametrize("tolerance", [0.1, 1e-9])
def test_a_parabola_is_met_by_one_line_through_its_roots(limit: float, tolerance: float) -> None:
    points = searched(lambda x: 3 * x * x, 0.12, limit, tolerance=tolerance)
    assert list(points) == [0.0, math.copysign(min(1.0, abs(limit)), limit), pytest.approx(math.copysign(0.2, limit))]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("root", [1e-3, 0.3, 1.0, 7.0])
def test_a_power_is_met_within_the_tolerance(power: float, root: float) -> None:
    rough, fine = (searched(lambda x: abs(x) ** power, root**power, tolerance=tolerance) for tolerance in (0.1, 1e-9))
    assert last(rough)[1] == pytest.approx(root**power, rel=0.1)
    assert last(fine)[1] == pytest.approx(root**power, rel=1e-9)
    assert len(rough) <= len(fine) <= 31


def test_it_stops_at_the_first_value_within_the_tolerance() -> None:
    assert list(searched(abs, 1.1, tolerance=0.1)) == [0.0, 1.0]
    assert len(searched(abs, 1.1, tolerance=0.09)) > 2


def test_x_doubles_up_to_the_limit_and_no_further() -> None:
    assert list(searched(lambda x: 1e-3 * x * x, 1.0, 6.0)) == [0.0, 1.0, 2.0, 4.0, 6.0]
    assert list(searched(lambda x: 1e-3 * x * x, 1.0, -0.5)) == [0.0, -0.5]
    assert last(searched(lambda x: x * x, 30.0, 6.0, tolerance=1e-6)) == pytest.approx((math.sqrt(30), 30.0))


def test_it_stops_after_max_evaluations_wherever_it_is() -> None:
    for most in (1, 2, 3, 5):
        assert len(searched(lambda x: abs(x) ** 0.3, 1e-3, max_evaluations=most)) == 1 + most
        assert len(searched(lambda x: 1e-9, 1.0, 1e6, max_evaluations=most)) == 1 + most


def test_a_jump_over_the_target_is_narrowed_to_neighbouring_numbers() -> None:
    points = searched(lambda x: 0.0 if x < math.pi / 4 else 1.0, 0.5, max_evaluations=1000)
    below = max(x for x, y in points.items() if y == 0.0)
    assert math.nextafter(below, 1.0) == min(x for x, y in points.items() if y == 1.0)
    assert len(points) < 100


def test_a_cut_takes_off_a_tenth_at_least_and_a_half_if_the_same_end_has_moved_twice() -> None:
    assert list(searched(lambda x: 1e6, 1.0, max_evaluations=5)) == pytest.approx([0, 1, 0.1, 0.01, 0.005, 0.0025])
    assert list(searched(lambda x: float(x >= 1), 0.9, max_evaluations=4)) == pytest.approx([0, 1, 0.9, 0.99, 0.995])


def test_an_infinite_value_is_above_the_target() -> None:
    points = searched(lambda x: math.inf if x > 0.05 else x * x, 1e-4)
    assert math.inf in points.values()
    assert last(points)[1] == pytest.approx(1e-4, rel=0.02)


def test_a_value_that_rounding_leaves_below_0_is_0() -> None:
    assert last(searched(lambda x: x * x if x > 1.5 else -1e-9, 3.0)) == pytest.approx((math.sqrt(3), 3.0), rel=0.02)


# ---- it can't be met ----------------------------------------------------------------------------


def test_too_little_divergence_is_said_and_c_is_the_limit(log: list[str]) -> None:
    model, adapter = adapted()
    result = calibrated(model, 5.0, limit=-2.0)
    assert (result.met, result.monotone, result.c) == (False, True, -2.0)
    assert result.kl == pytest.approx(measured(model, -2.0), rel=1e-6)
    (warning,) = [line for line in log if line.startswith("WARNING")]
    assert f"no c with a divergence of 5 was found: at c = -2 it is {result.kl:.4g}" in warning
    assert adapter.scale == 0.37


def test_of_too_few_evaluations_the_largest_c_within_the_budget_is_kept(log: list[str]) -> None:
    model, _ = adapted()
    result = calibrated(model, 0.002, max_evaluations=2)
    assert not result.met
    assert result.evaluations == 2
    assert result.kl <= 0.002
    assert result.c in (0.0, *(c for c, kl in result.curve if kl <= 0.002))
    assert "it jumps, or max_evaluations is too small" in "\n".join(log)
    only = calibrated(model, 0.002, max_evaluations=1, apply=True)
    assert (only.c, only.kl, only.met) == (0.0, 0.0, False)
    assert ll.adapters(model)["default"].scale == 0.0


def test_a_jump_over_the_target_is_said(log: list[str]) -> None:
    """At 8 a bfloat16 goes up by 1/16, so a smaller vector changes nothing until it has half that length."""
    model = sure(torch.bfloat16)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)[:, 0] = 8
    data = {"directions": torch.nn.functional.one_hot(torch.tensor(0), 64).float()}
    ll.attach(model, ll.SteerConfig(layers=[1], strength=0.02), calibration_data=data)
    with ll.scaled(model, 8.0):
        most = float(ll.kl_divergence(model, [IDS[:1]]))
    result = ll.calibrate_scale(model, [IDS[:1]], most / 20)
    assert not result.met
    assert result.kl < most / 40
    after = result.curve.index((result.c, result.kl)) + 1
    assert result.curve[after][1] > most / 10  # the next c on the curve, however near
    assert result.curve[after][0] == pytest.approx(result.c, rel=0.01)
    assert "it jumps, or max_evaluations is too small" in "\n".join(log)


# ---- it falls again -----------------------------------------------------------------------------


def gates() -> Any:
    """Values and what attention makes of them through gates 1 - c each: (1 - c)² of it, so c = 2 is the base again."""
    model = sure(torch.float64)
    adapter = ll.attach(model, ll.IA3Config(target_names=r"(v|o)_proj$", dtype=torch.float64))
    with torch.no_grad():
        for gate in adapter.parameters():
            gate.zero_()
    assert measured(model, 2.0) < 1e-6 < 1 < measured(model, 1.0) < measured(model, 8.0)
    return model


def test_a_divergence_that_falls_as_c_grows_is_said(log: list[str]) -> None:
    model = gates()
    target = (measured(model, 1.0) + measured(model, 8.0)) / 2
    result = calibrated(model, target)
    assert (result.met, result.monotone) == (True, False)
    assert measured(model, result.c) == pytest.approx(target, rel=0.02)
    (warning,) = [line for line in log if line.startswith("WARNING")]
    assert f"the divergence falls as c grows: {measured(model, 1.0):.3g} at 1, 0 at 2, " in warning.replace("-0 ", "0 ")
    assert f"other c may meet {target:g} as well" in "\n".join(log)

    log.clear()
    short = calibrated(model, target, limit=2.0)
    assert (short.met, short.monotone, short.c) == (False, False, 2.0)
    assert ["no c with a divergence" in line for line in log if line.startswith("WARNING")] == [True, False]


def test_below_the_first_fall_the_nearest_c_is_found() -> None:
    model = gates()
    result = calibrated(model, 0.5)
    assert (result.met, result.monotone) == (True, True)
    assert 0 < result.c < 1


# ---- bad input ----------------------------------------------------------------------------------


def test_bad_arguments_are_refused_before_anything_runs() -> None:
    model, adapter = adapted()
    calls = Calls(model)
    for options, message in (
        ({"target_kl": 0.0}, r"calibrate_scale\(target_kl=0.0\): wanted a number of nats above 1e-5"),
        ({"target_kl": -1.0}, r"target_kl=-1.0"),
        ({"target_kl": float("nan")}, r"target_kl=nan"),
        ({"target_kl": float("inf")}, r"target_kl=inf"),
        ({"statistic": "max"}, r"statistic='max'\): wanted one of \('mean', 'p95'\)"),
        ({"limit": 0.0}, r"limit=0.0\): wanted a finite number, below 0 for the other pole"),
        ({"limit": float("inf")}, r"limit=inf"),
        ({"tolerance": 0.0}, r"tolerance=0.0\): wanted a fraction of the target"),
        ({"tolerance": float("nan")}, r"tolerance=nan"),
        ({"max_evaluations": 0}, r"max_evaluations=0\): wanted at least 1"),
    ):
        with pytest.raises(ll.ConfigError, match=message):
            ll.calibrate_scale(model, BATCHES, **({"target_kl": 0.1} | options))  # type: ignore[arg-type]
    with pytest.raises(ll.TargetError, match="no adapter 'fr'"):
        ll.calibrate_scale(model, BATCHES, 0.1, name="fr")
    assert calls.count == 0
    assert adapter.scale == 0.37


@pytest.mark.parametrize("batches", [[], iter(())])
def test_nothing_to_calibrate_on_is_an_error_and_changes_nothing(batches: Any) -> None:
    model, adapter = adapted()
    with pytest.raises(ll.ConfigError, match="there are no batches to evaluate on"):
        ll.calibrate_scale(model, batches, 0.1, apply=True)
    assert adapter.scale == 0.37


@pytest.mark.parametrize("batch", [IDS, {"input_ids": IDS}, "text"])
def test_one_batch_in_place_of_a_list_is_an_error(batch: Any) -> None:
    model, adapter = adapted()
    for call in (
        lambda: ll.calibrate_scale(model, batch, 0.1),
        lambda: ll.kl_divergence(model, batch),
        lambda: ll.capture(model, batch),
    ):
        with pytest.raises(ll.ConfigError, match=f"batches is a {type(batch).__name__}: wanted a list of batches"):
            call()
    assert adapter.scale == 0.37


def test_a_model_without_an_adapter_is_an_error() -> None:
    with pytest.raises(ll.TargetError, match="no adapter is attached to this LlamaForCausalLM"):
        ll.calibrate_scale(tiny_llama(), BATCHES, 0.1)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_scale_is_restored_whatever_stops_it(error: type[BaseException]) -> None:
    model, adapter = adapted()
    other = ll.attach(model, ll.LoRAConfig(), "other")
    calls = Calls(model)

    def fail(*_: Any) -> None:
        if calls.count == 8:
            raise error

    model.register_forward_pre_hook(fail)
    with pytest.raises(error):
        ll.calibrate_scale(model, BATCHES, 0.05, apply=True)
    assert (adapter.scale, other.scale) == (0.37, 1.0)
    assert calls.count == 8


class Saturating:
    """At once just above the target, whatever c."""

    name = "saturating"
    handles_scale = True

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ll.ParamSpec]:
        return {"lora_v": ll.ParamSpec((d_out,), init="normal")}

    @staticmethod
    def forward(layer: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + math.tanh(2000 * layer.scale) * 30 * layer.lora_v


def test_a_curve_that_saturates_just_above_the_target_is_halved() -> None:
    ll.register(Saturating)
    model = tiny_llama()
    ll.attach(model, ll.AdapterConfig(variant="saturating", target_names="down_proj"))
    whole = ll.kl_divergence(model, BATCHES).mean().item()
    result = ll.calibrate_scale(model, BATCHES, 0.9 * whole)
    assert result.met
    assert result.evaluations < 25
    assert 0 < result.c < 1e-2


def test_an_overflow_counts_as_above_the_target() -> None:
    model = tiny_llama()
    adapter = ll.attach(model, ll.LoRAConfig(r=2))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 1e19)
    with pytest.raises(ll.BaseModelError, match="not finite"):
        ll.kl_divergence(model, BATCHES)
    result = ll.calibrate_scale(model, BATCHES, 0.5, max_evaluations=20)
    assert result.c < 1
    assert result.kl <= 0.5
    assert max(kl for _, kl in result.curve) == math.inf
