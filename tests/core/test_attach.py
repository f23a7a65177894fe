"""Attach, detach and scale: several adapters, bad input, and models that are left exactly as they were."""

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from models import IDS, OneLinear, config, loss_of, perturb, tiny_llama
from test_laws import logits, same_snapshot, snapshot
from torch import nn

import lora_lite as ll
from lora_lite.core.resolve import checked_config
from lora_lite.ops.svd import leading_svd


def test_adapters_stack_each_with_its_own_config_scale_and_parameters() -> None:
    model = tiny_llama()
    base = logits(model)
    first = ll.attach(model, ll.LoRAConfig(r=2))
    second = ll.attach(model, ll.DoRAConfig(r=4, target_names="up_proj"), name="fr")
    assert "model.layers.0.mlp.up_proj.lora_A__fr" in model.state_dict()
    assert list(ll.adapters(model)) == ["default", "fr"]
    assert all(p.requires_grad for a in (first, second) for p in a.parameters())
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    perturb(first)
    one = logits(model)
    perturb(second)
    both = logits(model)
    second.scale = 0.0
    assert torch.equal(logits(model), one)
    second.scale = 1.0
    ll.detach(model, "default")
    assert list(ll.adapters(model)) == ["fr"]
    assert not any(p.requires_grad for path, p in model.named_parameters() if "__fr" not in path)
    assert not torch.equal(logits(model), both)
    ll.detach(model)
    assert torch.equal(logits(model), base)
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_come_off_in_any_order() -> None:
    model = tiny_llama()
    before = snapshot(model)
    for name in ("a", "b", "c"):
        ll.attach(model, config("lora"), name=name)
    for name in ("b", "a", "c"):
        ll.detach(model, name)
    assert same_snapshot(before, snapshot(model))


@pytest.mark.parametrize("name", ["", "a b", "a.b", "a__b", "_a", "a-", "é", "a/b"])
def test_odd_adapter_names_are_refused(name: str) -> None:
    model = OneLinear()
    with pytest.raises(ll.ConfigError, match="use letters and digits, with single '_' or '-' between them"):
        ll.attach(model, config("lora", target_names="proj"), name=name)
    assert list(model.state_dict()) == ["proj.weight", "proj.bias"]


@pytest.mark.parametrize("name", ["fr", "round_2", "a-b", "2"])
def test_plain_adapter_names_work(name: str) -> None:
    model = OneLinear()
    perturb(ll.attach(model, config("lora", target_names="proj"), name=name))
    assert f"proj.lora_A__{name}" in model.state_dict()


def test_attaching_a_name_twice_is_refused_and_keeps_the_first() -> None:
    model = tiny_llama()
    perturb(ll.attach(model, config("lora")))
    before = snapshot(model)
    with pytest.raises(ll.TargetError, match="adapter 'default' is attached to this LlamaForCausalLM already"):
        ll.attach(model, config("ia3"))
    assert same_snapshot(before, snapshot(model))


def bad_rank(model: Any) -> None:
    ll.attach(model, config("pissa", r=33))


def nan_in_weight(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    ll.attach(model, config("dora"))


def zero_row(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = 0
    ll.attach(model, config("dora"))


def meta_target(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.to("meta")
    ll.attach(model, config("lora"))


def taken_name(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.lora_B = None
    ll.attach(model, config("lora"))


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (bad_rank, ll.ConfigError, r"k_proj: PiSSAConfig\(r=33\): a \(32, 64\) weight has 32 directions"),
        (nan_in_weight, ll.BaseModelError, r"layers.1.mlp.up_proj: 1 of 8192 base weights are NaN or infinite"),
        (zero_row, ll.BaseModelError, r"layers.1.mlp.up_proj: 1 rows of the weight are zero"),
        (meta_target, ll.TargetError, r"layers.1.mlp.up_proj: its weight is on the meta device"),
        (taken_name, ll.TargetError, r"layers.1.mlp.up_proj: it has lora_B already, put there by something else"),
    ],
)
def test_bad_input_is_a_clear_error_and_changes_nothing(break_it: Any, error: Any, message: str) -> None:
    model = tiny_llama()
    flags = {path: p.requires_grad for path, p in model.named_parameters()}
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        break_it(model)
    assert list(model.state_dict()) == keys
    assert {path: p.requires_grad for path, p in model.named_parameters()} == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert ll.adapters(model) == {}


def test_a_rank_above_the_layers_is_fine_where_the_method_can() -> None:
    assert ll.attach(OneLinear(), config("lora", r=99, target_names="proj")).targets


def test_a_failing_attach_keeps_the_adapters_that_were_there() -> None:
    model = tiny_llama()
    perturb(ll.attach(model, config("lora")))
    model.model.norm.weight.requires_grad_(True)  # a flag of the user's own, set since
    before, out = snapshot(model), logits(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ll.BaseModelError, match="down_proj"):
        ll.attach(model, config("dora"), name="b")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.copy_(before["state"]["model.layers.1.mlp.down_proj.weight"][0])
    assert same_snapshot(before, snapshot(model))
    assert torch.equal(logits(model), out)
    ll.detach(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_attach_leaves_a_base_parameter_that_the_user_trains() -> None:
    """What the user unfroze between two attaches is frozen by the second and given back by the last detach."""
    model = tiny_llama()
    ll.attach(model, config("lora"))
    model.model.norm.weight.requires_grad_(True)
    ll.attach(model, config("lora"), name="b")
    assert not model.model.norm.weight.requires_grad
    ll.detach(model)
    assert all(p.requires_grad for p in model.parameters())


def test_the_same_module_must_be_given_each_time() -> None:
    model = tiny_llama()
    ll.attach(model.model, config("lora"))
    with pytest.raises(ll.TargetError, match="model: adapters were attached to this part alone"):
        ll.attach(model, config("lora"), name="b")
    with pytest.raises(
        ll.TargetError, match="this LlamaDecoderLayer is a part of a model that adapters were attached to"
    ):
        ll.attach(model.model.layers[0], config("lora"), name="b")
    with pytest.raises(ll.TargetError, match="give the whole model"), ll.disabled(model.model.layers[0]):
        pass
    with pytest.raises(ll.TargetError, match="give the whole model"):
        ll.detach(model.model.layers[0])
    assert list(ll.adapters(model)) == ["default"]


def test_parts_with_adapters_of_their_own_are_not_taken_for_one(tmp_path: Any) -> None:
    both = nn.ModuleDict({"a": OneLinear(), "b": OneLinear()})
    for part in both.values():
        ll.attach(part, config("lora", target_names="proj"))
    with pytest.raises(ll.TargetError, match="attached to several parts of this ModuleDict: a, b"):
        ll.save(both, tmp_path / "a.safetensors")
    ll.save(both["a"], tmp_path / "a.safetensors")


@pytest.mark.parametrize("copied", [False, True])
def test_what_replaced_a_frozen_parameter_is_not_ours_to_change(copied: bool) -> None:
    model = tiny_llama()
    ll.attach(model, config("lora", layers=(0,)))
    model = copy.deepcopy(model) if copied else model
    first, second = (block.mlp for block in model.model.layers)
    codes = nn.Parameter(torch.ones(128, 64, dtype=torch.int8), requires_grad=False)
    second.up_proj.weight, old = codes, weakref.ref(second.up_proj.weight)
    second.gate_proj.weight = nn.Parameter(second.gate_proj.weight.detach(), requires_grad=False)
    second.down_proj.weight.data = torch.ones(64, 128, dtype=torch.int8)  # the same object, which can have no gradient
    assert old() is None  # fully_shard relies on that to free what it has sharded
    ll.detach(model)
    replaced = [second.up_proj.weight, second.gate_proj.weight, second.down_proj.weight]
    assert not any(parameter.requires_grad for parameter in replaced)
    assert all(p.requires_grad for p in model.parameters() if not any(p is each for each in replaced))
    assert first.up_proj.weight.requires_grad
    assert ll.adapters(model) == {}
    assert not any("lora" in key for module in model.modules() for key in module.__dict__)


def wrap_inner(model: Any) -> None:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

    model.model.layers[0] = torch.compile(model.model.layers[0])
    checkpoint_wrapper.apply_activation_checkpointing(
        model, check_fn=lambda module: module is model.model.layers[1].mlp or module is model.lm_head
    )


@pytest.mark.parametrize("twin", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_wrappers_of_inner_modules_hide_nothing_from_detach(twin: Any) -> None:
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    ll.attach(model, config("lora"))
    model = twin(model)
    wrap_inner(model)
    ll.detach(model)
    frozen = [path for path, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]
    assert not any("lora_" in key for key in model.state_dict())


def test_detach_takes_off_a_tensor_that_is_parametrized() -> None:
    """Nothing raises halfway."""
    model = tiny_llama()
    ll.attach(model, config("lora"))
    nn.utils.parametrize.register_parametrization(model.model.layers[1].mlp.up_proj, "lora_A", nn.Identity())
    ll.detach(model)
    assert ll.adapters(model) == {}
    assert not any(module._forward_hooks for module in model.modules())
    assert model.model.layers[1].mlp.up_proj.weight.requires_grad


def test_detach_of_an_unknown_name() -> None:
    model = tiny_llama()
    ll.attach(model, config("lora"), name="fr")
    with pytest.raises(ll.TargetError, match="no adapter 'default' on this LlamaForCausalLM\n  attached: fr"):
        ll.detach(model, "default")
    ll.detach(model)
    ll.detach(model)  # nothing left is fine


def test_scaled_nests_by_name_and_restores_after_an_error() -> None:
    model = OneLinear()
    a = ll.attach(model, config("lora", target_names="proj"), name="a")
    b = ll.attach(model, config("lora", target_names="proj"), name="b")
    a.scale = 0.5
    with pytest.raises(ZeroDivisionError), ll.scaled(model, 2.0):
        assert (a.scale, b.scale) == (2.0, 2.0)
        with ll.scaled(model, -1.0, "a"):
            assert (a.scale, b.scale) == (-1.0, 2.0)
        assert (a.scale, b.scale) == (2.0, 2.0)
        raise ZeroDivisionError
    assert (a.scale, b.scale) == (0.5, 1.0)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ll.ConfigError, match="wanted a finite number"), ll.scaled(model, bad):
            pass
    with pytest.raises(ll.TargetError, match="no adapter 'c'"), ll.scaled(model, 1.0, "c"):
        pass
    assert (a.scale, b.scale) == (0.5, 1.0)


def test_load_state_dict_is_whole_or_nothing() -> None:
    adapter = ll.attach(OneLinear(), config("lora", r=2, target_names="proj"))
    good = {key: value.clone() for key, value in adapter.state_dict().items()}
    bad = {**good, "proj.lora_A": torch.ones(3, 16)}
    with pytest.raises(
        ll.CheckpointError, match=r"1 wrong shapes; .*\n  such as proj.lora_A \(3, 16\), wanted \(2, 16\)"
    ):
        adapter.load_state_dict({**bad, "proj.lora_B": good["proj.lora_B"] + 1})
    assert all(torch.equal(value, good[key]) for key, value in adapter.state_dict().items())


def test_a_detach_inside_scaled_leaves_the_rest_restored() -> None:
    model = OneLinear()
    for name in ("a", "b"):
        ll.attach(model, config("lora", target_names="proj"), name=name)
    with ll.scaled(model, 0.0):
        ll.detach(model, "a")
    assert ll.adapters(model)["b"].scale == 1.0


def test_an_adapter_attached_in_inference_mode_trains() -> None:
    model = OneLinear()
    with torch.inference_mode():
        adapter = ll.attach(model, config("pissa", target_names="proj"))
    model(torch.ones(2, 16)).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_what_is_no_config_is_refused() -> None:
    with pytest.raises(ll.ConfigError, match=r"'lora' is not a config\n  use one such as lora_lite.LoRAConfig"):
        checked_config("lora")


def test_dropout_acts_in_train_mode_only() -> None:
    for variant in ("lora", "dora"):
        model = OneLinear()
        perturb(ll.attach(model, config(variant, target_names="proj", dropout=0.5)))
        x = torch.randn(4, 16)
        model.eval()
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))
        mean = torch.stack([model(x) for _ in range(500)]).mean(0)
        model.eval()
        assert (mean - model(x)).norm() < 0.1 * model(x).norm()


def test_one_log_line_an_operation(log: list[str], tmp_path: Any) -> None:
    model = tiny_llama()
    ll.attach(model, ll.LoRAConfig(r=4))
    ll.save(model, tmp_path / "a.safetensors")
    ll.detach(model)
    ll.load(model, tmp_path / "a.safetensors")
    about = "lora 'default': 14 layers, 8,192 trainable parameters in float32, on LlamaForCausalLM (float32)"
    about = about.replace("8,192", f"{sum(4 * (i + o) for i, o in ll.adapters(model)['default'].targets.values()):,}")
    counts = ", ".join(f"2 {n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down"))
    assert log[0] == f"INFO attached {about}: {counts}"
    assert log[1].startswith(f"INFO saved {about} to {tmp_path / 'a.safetensors'} (")
    assert log[2] == "INFO detached default from LlamaForCausalLM"
    assert log[3] == f"INFO loaded {about} from {tmp_path / 'a.safetensors'}"
    assert len(log) == 4


def test_fast_svd_is_seeded_close_and_reports_its_error(log: list[str]) -> None:
    left, right = (torch.linalg.qr(torch.randn(512, 512))[0] for _ in range(2))
    model = OneLinear(512, 512)
    with torch.no_grad():
        model.proj.weight.copy_(left @ torch.diag(0.99 ** torch.arange(512.0)) @ right)
    products = []
    for svd in ("exact", "fast", "fast"):
        state = torch.random.get_rng_state()
        tensors = ll.attach(model, config("pissa", target_names="proj", svd=svd)).state_dict()
        assert torch.equal(torch.random.get_rng_state(), state)
        products.append(tensors["proj.lora_B0"] @ tensors["proj.lora_A0"])
        ll.detach(model)
    exact, fast, again = products
    assert torch.equal(fast, again)
    assert (fast - exact).norm() < 1e-3 * exact.norm()
    reports = [line for line in log if "randomised SVD" in line]
    assert len(reports) == 2
    assert float(reports[0].rpartition("= ")[2]) < 1e-3


@pytest.mark.parametrize("shape", [(512, 512), (700, 512), (512, 700), (40, 30)])
@pytest.mark.parametrize("rank", [600, 100, 3])
def test_leading_singular_triplets(shape: tuple[int, int], rank: int) -> None:
    """Of close singular values, of a matrix with fewer directions than the space has, and of a small one."""
    generator = torch.Generator().manual_seed(1)
    full = min(*shape, rank)
    values = 2 * 0.99 ** torch.arange(float(full))
    left, right = (torch.linalg.qr(torch.randn(n, full, generator=generator)).Q for n in shape)
    w = (left * values) @ right.mT
    u, s, v = leading_svd(w, 8)
    held = min(8, full)
    torch.testing.assert_close(s[:held], values[:held], rtol=1e-3, atol=1e-4)
    assert s[held:].abs().sum() < 2e-3
    assert ((u * s) @ v.mT - (left[:, :held] * values[:held]) @ right[:, :held].mT).norm() < 0.05
    torch.testing.assert_close(u.mT @ u, torch.eye(8), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("d_in", "d_out"), [(96, 64), (64, 64), (64, 96)])
def test_fast_svd_reports_how_bad_a_bad_run_is(
    d_in: int, d_out: int, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In either orientation one of the two residuals is zero by construction."""
    model = OneLinear(d_in, d_out)
    monkeypatch.setattr("lora_lite.ops.svd.OVERSAMPLE", 0)
    monkeypatch.setattr("lora_lite.ops.svd.DEPTH", 1)
    ll.attach(model, config("pissa", target_names="proj", svd="fast"))
    (report,) = (line for line in log if "randomised SVD" in line)
    assert float(report.rpartition("= ")[2]) > 0.1


def test_doras_norm_is_right_where_the_terms_cancel() -> None:
    """W + sBA nearly vanishes: the factored form has no digits left, the direct one does."""
    torch.manual_seed(0)
    model = OneLinear(bias=False)
    b, a = torch.randn(24, 8), torch.randn(8, 16)
    with torch.no_grad():
        model.proj.weight.copy_(b @ a + 1e-4 * torch.randn(24, 16))
    adapter = ll.attach(model, config("dora", target_names="proj"))
    tensors = adapter.state_dict() | {"proj.lora_A": -a, "proj.lora_B": b}
    adapter.load_state_dict(tensors)
    x = torch.randn(5, 16, dtype=torch.float64)
    small = model.proj.weight.double() - b.double() @ a.double()
    wanted = x @ (tensors["proj.lora_m"].double()[:, None] * small / small.norm(dim=1, keepdim=True)).T
    g = tensors["proj.lora_m"].double() / small.norm(dim=1)
    rounding = 1e-6 * g * (model.proj.weight.double().norm(dim=1) * x.norm())
    for train in (True, False):
        model.train(train)
        assert ((model(x.float()) - wanted).abs() <= rounding).all()


def test_doras_norm_is_float32_under_autocast() -> None:
    ratios = []
    for enabled in (True, False):
        torch.manual_seed(0)
        model = OneLinear(bias=False)
        perturb(ll.attach(model, config("dora", target_names="proj")), 0.5)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model.eval()(torch.randn(2, 16))
        site = next(iter(model.proj._lora_lite.values()))
        assert site.memo["n"][1].dtype == torch.float32
        ratios.append(site.memo["n"][1])
    assert torch.equal(*ratios)


def test_dora_remembers_its_norm_in_eval_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    linear = ll.Layer.linear
    monkeypatch.setattr(ll.Layer, "linear", lambda self, t: calls.append(1) or linear(self, t))
    model = OneLinear()
    perturb(ll.attach(model, config("dora", target_names="proj")))
    for train, count in ((False, 1), (True, 4)):
        model.train(train)
        with torch.no_grad():
            for _ in range(3):
                model(torch.ones(1, 16))
        assert len(calls) == count


def test_only_trainable_tensors_of_the_adapter_are_optimised() -> None:
    model = tiny_llama()
    adapter = ll.attach(model, config("pissa"))
    frozen = {key: t.clone() for key, t in adapter.state_dict().items() if key.endswith("0")}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    loss_of(model, IDS).backward()
    optimizer.step()
    after = adapter.state_dict()
    assert len(frozen) == 28
    assert all(torch.equal(after[key], value) for key, value in frozen.items())


def test_a_forward_without_the_registered_variant_says_what_to_import(double: Any) -> None:
    model = OneLinear()
    ll.attach(model, ll.AdapterConfig(variant="double", target_names="proj"))
    del ll.REGISTRY["double"]
    with pytest.raises(ll.VariantError, match=r"no variant is registered as 'double'(.|\n)*import the file"):
        model(torch.randn(2, 16))
