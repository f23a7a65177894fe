"""The starts of LoRA: each against its paper's formula, and PEFT's where it has one."""

import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import IDS, OneLinear, attach, calibration, config, loss_of, perturb, quantized, tiny_folder, tiny_llama
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.families import calibration as families_calibration
from lora_lite.families.calibration import gradients
from lora_lite.ops.svd import iterated_svd

SOME = r"q_proj|down_proj"
RESIDUAL = ["pissa", "olora", "milora", "corda", "lora_ga", "orthogonal"]
DATA = [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:]}]


def svd(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(w.detach().double(), full_matrices=False)


def taken(adapter: ll.Adapter, path: str, s: float = 1.0) -> Tensor:
    """s B0 A0 of a layer."""
    tensors = adapter.state_dict()
    return s * tensors[f"{path}.lora_B0"].double() @ tensors[f"{path}.lora_A0"].double()


def inputs_at(model: Any, path: str, ids: Tensor = IDS) -> Tensor:
    """What a layer sees of these tokens: (n, i) float64."""
    seen: list[Tensor] = []
    with model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0])), torch.no_grad():
        model(input_ids=ids)
    return seen[0].flatten(0, 1).double()


@pytest.mark.parametrize("variant", RESIDUAL)
def test_the_difference_from_the_start_is_all_that_acts(variant: str) -> None:
    """So scale c is the blend, and A, B = A0, B0 is the base in every dtype of the file."""
    model = tiny_llama(bias=True)
    base = model(input_ids=IDS).logits
    adapter = attach(model, config(variant, dtype=torch.bfloat16, alpha=16.0))
    start = adapter.state_dict()
    assert all(torch.equal(start[key], start[f"{key}0"]) for key in start if not key.endswith("0"))
    assert all(start[key].any() for key in start)
    assert torch.equal(model(input_ids=IDS).logits, base)


# ---- from the weight ------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 12.0])
def test_milora_takes_the_last_directions_out_and_pissa_the_first(alpha: float | None) -> None:
    torch.manual_seed(0)
    model: Any = OneLinear()
    u, s, vt = svd(model.proj.weight)
    for variant, k in (("milora", slice(-4, None)), ("pissa", slice(0, 4))):
        adapter = ll.attach(model, config(variant, r=4, alpha=alpha, target_names="proj"))
        wanted = u[:, k] * s[k] @ vt[k]
        torch.testing.assert_close(taken(adapter, "proj", adapter.config.scaling), wanted, rtol=1e-4, atol=1e-5)
        tensors = adapter.state_dict()
        for norms in (tensors["proj.lora_A0"].norm(dim=1), tensors["proj.lora_B0"].norm(dim=0)):  # √(S/s) each
            torch.testing.assert_close(norms.double(), (s[k] / adapter.config.scaling).sqrt(), rtol=1e-4, atol=1e-5)
        ll.detach(model)


def test_the_start_of_olora_is_pefts() -> None:
    model, theirs = tiny_llama(), peft.get_peft_model(tiny_llama(), lora_config(init_lora_weights="olora"))
    adapter = ll.attach(model, ll.OLoRAConfig(r=4, alpha=6.0, target_names=SOME))
    for path in adapter.targets:
        layer: Any = theirs.base_model.model.get_submodule(path)
        for name in ("lora_A", "lora_B"):
            other = getattr(layer, name)["default"].weight
            torch.testing.assert_close(adapter.state_dict()[f"{path}.{name}"], other, rtol=1e-4, atol=1e-5)


def lora_config(**fields: Any) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], **fields)


@pytest.mark.parametrize("r", [1, 4, 5])
def test_the_product_of_orthogonal_factors_is_zero_and_they_are_not(r: int) -> None:
    model = OneLinear(64, 48)
    adapter = ll.attach(model, ll.OrthogonalLoRAConfig(r=r, target_names="proj"))
    tensors = adapter.state_dict()
    a, b = tensors["proj.lora_A"], tensors["proj.lora_B"]
    assert (b @ a).norm() <= 1e-6 * b.norm() * a.norm()
    assert 0.5 < a.norm() / (64 * ((r + 1) // 2)) ** 0.5 * 10 < 2
    assert r == 1 or 0.5 < b.norm() / (48 * (r // 2)) ** 0.5 * 10 < 2


def test_an_orthogonal_one_goes_to_peft_as_it_is(tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = ll.attach(model, ll.OrthogonalLoRAConfig(r=4, alpha=6.0, target_names=SOME, per_layer={"down": {"r": 2}}))
    perturb(adapter, 0.1)
    assert ll.save_peft(model, tmp_path) is None
    theirs: Any = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", RESIDUAL)
def test_a_lora_of_twice_the_rank_is_exact(variant: str, tmp_path: Path) -> None:
    model = tiny_llama()
    perturb(attach(model, config(variant, r=3, target_names=SOME)), 0.1)
    assert (ll.save_peft(model, tmp_path, rank=6) or 0.0) < 1e-6
    theirs: Any = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_rounds_of_iteration_come_nearer_to_the_svd() -> None:
    w = torch.randn(96, 80, generator=torch.Generator().manual_seed(0))
    best = svd(w)[1][8:].norm()
    errors = []
    for rounds in (0, 2, 16):
        u, s, v = iterated_svd(w, 8, rounds)
        assert torch.equal(u, iterated_svd(w, 8, rounds)[0])  # seeded
        torch.testing.assert_close(u.mT @ u, torch.eye(8), rtol=0, atol=1e-5)
        errors.append(float((w - u * s @ v.mT).norm() / best))
    assert 1 <= errors[2] < errors[1] < errors[0]
    assert errors[2] < 1.01
    model = OneLinear(80, 96)
    adapter = ll.attach(model, ll.PiSSAConfig(r=8, svd="fast", niter=2, target_names="proj"))
    u, s, v = iterated_svd(model.proj.weight.detach(), 8, 2)
    torch.testing.assert_close(taken(adapter, "proj").float(), u * s @ v.mT, rtol=1e-4, atol=1e-5)
    assert "niter" not in ll.PiSSAConfig().to_dict()  # older versions read what doesn't use it
    with pytest.raises(ll.ConfigError, match=r'niter=2\): wanted a number of rounds with svd="fast"'):
        ll.PiSSAConfig(niter=2)


# ---- from the layers' inputs ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_the_svd_of_w_c(mode: str) -> None:
    model = tiny_llama()
    path = "model.layers.1.self_attn.k_proj"  # (32, 64)
    x, w = inputs_at(model, path), model.get_submodule(path).weight.detach().double()
    c = x.mT @ x / len(x)
    c = c + 0.01 * c.diagonal().mean() * torch.eye(64)
    u, s, vt = torch.linalg.svd(w @ c)
    k = slice(0, 4) if mode == "ipm" else slice(28, 32)
    wanted = u[:, k] * s[k] @ vt[k] @ torch.linalg.inv(c)
    adapter = ll.attach(model, config("corda", r=4, alpha=6.0, mode=mode, target_names=path), calibration_data=DATA)
    torch.testing.assert_close(taken(adapter, path, 1.5), wanted, rtol=1e-3, atol=1e-5)


def test_corda_takes_out_what_pefts_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """From one call, whose scaling by its largest element doesn't change the product."""
    # PEFT imports attrs, which it doesn't ask for
    monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    theirs = tiny_llama()
    cfg = lora_config(init_lora_weights="corda", corda_config=peft.tuners.lora.config.CordaConfig(corda_method="ipm"))
    preprocess_corda(theirs, cfg, run_model=lambda: theirs(input_ids=IDS[:1]))
    wrapped: Any = peft.get_peft_model(theirs, cfg)
    ours = tiny_llama()
    adapter = ll.attach(ours, config("corda", r=4, alpha=6.0, target_names=SOME), calibration_data=DATA[:1])
    for path in adapter.targets:
        rest = wrapped.base_model.model.get_submodule(path).base_layer.weight
        part = ours.get_submodule(path).weight - rest
        torch.testing.assert_close(taken(adapter, path, 1.5).float(), part, rtol=1e-2, atol=1e-4)


def test_eva_is_the_inputs_principal_directions() -> None:
    model = tiny_llama()
    adapter = ll.attach(model, ll.EVAConfig(r=4, target_names=SOME), calibration_data=DATA)
    for path in adapter.targets:
        x = inputs_at(tiny_llama(), path)
        wanted = svd(x - x.mean(0))[2][:4]
        a = adapter.state_dict()[f"{path}.lora_A"].double()
        torch.testing.assert_close((a * wanted).sum(1).abs(), torch.ones(4).double(), rtol=0, atol=1e-5)
        assert not adapter.state_dict()[f"{path}.lora_B"].any()


def test_eva_and_its_ranks_are_pefts() -> None:
    """Of one batch, on which PEFT's incremental PCA is exact."""
    theirs: Any = peft.get_peft_model(
        tiny_llama(), lora_config(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0)), low_cpu_mem_usage=True
    )
    mask = torch.ones_like(IDS)
    peft.initialize_lora_eva_weights(theirs, [{"input_ids": IDS, "attention_mask": mask}] * 3)
    ours = tiny_llama()
    data = [{"input_ids": IDS, "attention_mask": mask}]
    cfg = ll.eva_ranks(ours, ll.EVAConfig(r=4, alpha=6.0, target_names=SOME), data)
    adapter = ll.attach(ours, cfg, calibration_data=data)
    ranks = {
        path: layer.lora_A["default"].weight
        for path, layer in theirs.base_model.model.named_modules()
        if hasattr(layer, "lora_A") and "default" in layer.lora_A
    }
    mine = {path: adapter.state_dict()[f"{path}.lora_A"] for path in adapter.targets}
    assert {path: len(a) for path, a in mine.items()} == {path: len(a) for path, a in ranks.items()}
    for path, a in mine.items():
        torch.testing.assert_close((a * ranks[path]).sum(1).abs(), torch.ones(len(a)), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("rslora", "alpha"), [(False, 6.0), (True, 6.0), (False, None)])
def test_evas_ranks_keep_the_budget_and_the_scale(rslora: bool, alpha: float | None) -> None:
    model = tiny_llama()
    cfg = ll.EVAConfig(r=3, alpha=alpha, rslora=rslora, per_layer={"down_proj": {"r": 2}})
    before = sum(cfg.with_overrides({"r": 2} if "down" in t.path else {}).r for t in ll.plan(model, cfg))
    new = ll.eva_ranks(model, cfg, DATA, rho=3.0)
    adapter = ll.attach(model, new, calibration_data=DATA)
    configs = {site.path: site.cfg for site in adapter.sites()}
    assert sum(config.r for config in configs.values()) == before
    assert len({config.r for config in configs.values()}) > 1
    for path, at_layer in configs.items():
        old = cfg.with_overrides({"r": 2} if "down" in path else {})
        assert at_layer.scaling == pytest.approx(old.scaling)
        assert at_layer.r <= 3 * old.r


def test_a_layer_whose_inputs_hardly_vary_gets_no_rank() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.steep = nn.Linear(32, 8), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.flat(x) + self.steep(x * torch.tensor([100.0] * 2 + [1e-3] * 30))

    x = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(0))
    given = ll.EVAConfig(r=1, target_names="flat|steep", per_layer={"flat": {"dropout": 0.1}})
    cfg = ll.eva_ranks(Two(), given, [{"x": x}])
    ll.attach(Two(), cfg, calibration_data=[{"x": x}])  # an entry of per_layer that finds no layer would raise
    assert cfg.exclude_names == ("^flat$",)
    assert cfg.per_layer == {"^steep$": {"r": 2}}
    with pytest.raises(ll.ConfigError, match=r"rho=0.5: wanted a number of at least 1"):
        ll.eva_ranks(Two(), cfg, [{"x": x}], rho=0.5)


def test_layers_are_read_in_lots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large model not all moments are in memory together; the result is the same."""
    results = []
    for limit in (1 << 30, 1):
        monkeypatch.setattr(families_calibration, "MOST_BYTES", limit)
        model = tiny_llama()
        count: list[int] = []
        calls = model.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        adapter = attach(model, config("lora_ga", r=2, target_names=SOME))
        calls.remove()
        results.append((adapter.state_dict(), len(count)))
    assert (results[0][1], results[1][1]) == (2, 8)  # two batches, once or for each of four layers
    for key, tensor in results[0][0].items():
        torch.testing.assert_close(tensor, results[1][0][key])


# ---- from gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True])
def test_gradients_are_autograds_and_touch_nothing(adapted: bool) -> None:
    model = tiny_llama(bias=True).requires_grad_(not adapted)
    if adapted:  # another adapter on the same layers changes the gradient, and keeps its own flags and grads
        perturb(ll.attach(model, config("lora", target_names=SOME), "other"), 0.2)
    sizes = {t.path: (t.d_in, t.d_out) for t in ll.plan(model, config("lora", target_names=SOME))}
    flags = {path: (p.requires_grad, p.grad, p._version) for path, p in model.named_parameters()}
    mine = dict(gradients(model, sizes, [{"input_ids": IDS}]))
    assert {path: (p.requires_grad, p.grad, p._version) for path, p in model.named_parameters()} == flags
    for path in sizes:
        weight = model.get_submodule(path).weight.requires_grad_(True)
        (wanted,) = torch.autograd.grad(loss_of(model), weight)
        torch.testing.assert_close(mine[path], wanted, rtol=1e-4, atol=1e-7)


def test_the_gradient_is_of_tokens_that_are_attended() -> None:
    model, path = tiny_llama(), "model.layers.0.mlp.down_proj"
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    sums = dict(gradients(model, {path: (128, 64)}, [{"input_ids": IDS, "attention_mask": mask}]))
    weight = model.get_submodule(path).weight.requires_grad_(True)
    loss = model(input_ids=IDS, attention_mask=mask, labels=IDS.masked_fill(mask == 0, -100)).loss
    torch.testing.assert_close(sums[path], torch.autograd.grad(loss, weight)[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("scale", ["stable", "gd", "unit"])
def test_lora_ga_is_the_papers_formula(direction: str, scale: str) -> None:
    model, path = tiny_llama(), "model.layers.1.self_attn.k_proj"  # (32, 64)
    weight = model.get_submodule(path).weight
    (gradient,) = torch.autograd.grad(loss_of(model), weight)
    u, _, vt = svd(gradient)
    cfg = ll.LoRAGAConfig(r=4, alpha=6.0, direction=direction, scale=scale, target_names=path)
    adapter = ll.attach(model, cfg, calibration_data=[{"input_ids": IDS}])
    c = {"stable": 32**0.25 / 4, "gd": 1 / 1.5, "unit": 1.0}[scale]
    k, m = {"ArB2r": (range(4), range(4, 8)), "A2rBr": (range(4, 8), range(4)), "ArBr": ([1, 3, 5, 7], [0, 2, 4, 6])}[
        direction
    ]
    a, b = (adapter.state_dict()[f"{path}.lora_{name}"].double() for name in "AB")
    for got, wanted in ((a, vt[list(k)]), (b.mT, u[:, list(m)].mT)):
        torch.testing.assert_close((got * wanted).sum(1).abs(), torch.full((4,), c).double(), rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_the_directions_of_lora_ga_are_pefts() -> None:
    theirs, cfg = tiny_llama(), lora_config(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(scale="unit"))
    preprocess_loraga(theirs, cfg, lambda: loss_of(theirs).backward())
    wrapped: Any = peft.get_peft_model(theirs, cfg)
    adapter = ll.attach(
        tiny_llama(), ll.LoRAGAConfig(r=4, scale="unit", target_names=SOME), calibration_data=[{"input_ids": IDS}]
    )
    for path in adapter.targets:
        other = wrapped.base_model.model.get_submodule(path).lora_A["default"].weight
        mine = adapter.state_dict()[f"{path}.lora_A"]
        torch.testing.assert_close((mine * other).sum(1).abs(), torch.ones(4), rtol=0, atol=1e-2)


def test_lora_ga_on_a_4_bit_base_is_the_identity(tmp_path: Path) -> None:
    model = quantized(tiny_folder(tmp_path / "base"), "nf4")
    with torch.no_grad():
        base = model(input_ids=IDS).logits
        adapter = attach(model, config("lora_ga", target_names=SOME))
        assert torch.equal(model(input_ids=IDS).logits, base)
        perturb(adapter, 0.1)
        assert not torch.equal(model(input_ids=IDS).logits, base)


# ---- LoftQ ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["model", "folder", "weights"])
def test_loftq_moves_a_quantised_model_towards_the_dense_one(given: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    dense, model = ll.load_base(folder, dtype=torch.bfloat16), quantized(folder, "nf4")
    names = {t.path for t in ll.plan(model, ll.LoftQConfig(r=2))}
    data = {
        "model": dense,
        "folder": folder,
        "weights": {path: dense.get_submodule(path).weight.detach() for path in names},
    }[given]
    errors = []
    with torch.no_grad():
        wanted = dense(input_ids=IDS).logits.float()
        for r in (0, 8, 64):
            if r:
                ll.attach(model, ll.LoftQConfig(r=r, alpha=2.0 * r, rslora=True), f"r{r}", calibration_data=data)
            errors.append(float((model(input_ids=IDS).logits.float() - wanted).norm()))
            if r:
                ll.detach(model, f"r{r}")
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.5 * errors[0]


def test_loftq_starts_as_the_svd_of_what_is_lacking() -> None:
    model, w = OneLinear(), torch.randn(24, 16)
    adapter = ll.attach(model, config("loftq", r=3, alpha=6.0, target_names="proj"), calibration_data={"proj": w})
    tensors = adapter.state_dict()
    u, s, vt = svd(w - model.proj.weight)
    product = 2 * tensors["proj.lora_B"].double() @ tensors["proj.lora_A"].double()
    torch.testing.assert_close(product, u[:, :3] * s[:3] @ vt[:3], rtol=1e-4, atol=1e-5)
    ll.detach(model)
    same = {"proj": model.proj.weight.detach().clone()}
    start = ll.attach(model, config("loftq", target_names="proj"), calibration_data=same).state_dict()
    assert start["proj.lora_A"].any()
    assert not start["proj.lora_B"].any()


@pytest.mark.parametrize("variant", ["eva", "loftq"])
def test_plain_loras_go_to_peft_as_they_are(variant: str, tmp_path: Path) -> None:
    model = tiny_llama()
    perturb(attach(model, config(variant, target_names=SOME, alpha=3.0, rslora=True)), 0.1)
    assert ll.save_peft(model, tmp_path) is None
    theirs: Any = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


# ---- what is refused ------------------------------------------------------------------------------


class Reads(nn.Module):
    """It multiplies by a layer's weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x)[0]


@pytest.mark.parametrize(
    ("cfg", "data", "error", "message"),
    [
        (ll.EVAConfig(r=2), None, ll.ConfigError, r"'eva' is computed from data: use attach\(..., calibration_data"),
        (
            ll.EVAConfig(r=2),
            {"input_ids": IDS},
            ll.ConfigError,
            r"calibration_data is a dict: wanted a list of batches",
        ),
        (ll.EVAConfig(r=2), [], ll.ConfigError, r"there are no batches"),
        (ll.EVAConfig(r=13), [IDS[:1]], ll.ConfigError, r"r=13 directions of 64, from 12 tokens\n  give more data"),
        (ll.LoRAGAConfig(r=17), [IDS], ll.ConfigError, r"k_proj.*LoRAGAConfig\(r=17\): it takes 2r of the 32 direc"),
        (ll.MiLoRAConfig(r=33), None, ll.ConfigError, r"MiLoRAConfig\(r=33\): a \(32, 64\) weight has 32 directions"),
        (ll.LoftQConfig(), [1], ll.ConfigError, r"calibration_data is a list: wanted the dense model, its folder"),
        (ll.LoftQConfig(), {}, ll.ConfigError, r"wanted its dense weight \(64, 64\) in calibration_data, got none"),
        (ll.OLoRAConfig(), [IDS], ll.ConfigError, r"'olora' takes no calibration_data"),
    ],
)
def test_what_is_refused(cfg: Any, data: Any, error: Any, message: str) -> None:
    model = tiny_llama()
    with pytest.raises(error, match=message):
        ll.attach(model, cfg, calibration_data=data)
    assert not any("lora" in key for key in model.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ll.EVAConfig(kinds="conv"), r"kinds=\('conv',\)\): wanted 'linear' alone: its start is computed"),
        (lambda: ll.EVAConfig(bias=True), r"bias=True\): wanted False"),
        (lambda: ll.LoftQConfig(invocation_tokens=[1]), r"invocation_tokens=\(1,\)\): wanted None: they are LoRA's"),
        (lambda: ll.CorDAConfig(mode="both"), r"mode='both'\): wanted \"ipm\" or \"kpm\""),
        (lambda: ll.LoRAGAConfig(scale="svd"), r"scale='svd'\): wanted"),
        (lambda: ll.LoRAGAConfig(direction="rBA"), r"direction='rBA'\): wanted"),
        (lambda: ll.LoRAGAConfig(gamma=0.0), r"gamma=0.0\): wanted a number above 0"),
        (lambda: ll.OrthogonalLoRAConfig(alpha=-1.0), r"alpha=-1.0\): wanted a number above 0"),
    ],
)
def test_configs_are_valid_when_made(make: Any, message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        make()


def test_a_layer_that_no_call_shows_and_a_model_without_a_loss() -> None:
    with pytest.raises(ll.TargetError, match=r"mha.in_proj_weight: the model multiplies by this weight itself"):
        ll.attach(Reads(), ll.EVAConfig(r=2, target_names="in_proj"), calibration_data=[{"x": torch.randn(2, 3, 16)}])
    batches = [{"x": torch.randn(2, 3, 16)}]
    with pytest.raises(ll.ConfigError, match=r"the output of this OneLinear has no loss\n.*\"loss\": lambda model"):
        ll.attach(OneLinear(), ll.LoRAGAConfig(r=2, target_names="proj"), calibration_data=batches)
    zero = {"batches": batches, "loss": lambda model, inputs: model(**inputs).sum() * 0}
    with pytest.raises(ll.BaseModelError, match=r"proj: its weight's gradient is 0, NaN or infinite"):
        ll.attach(OneLinear(), ll.LoRAGAConfig(r=2, target_names="proj"), calibration_data=zero)
    constant = {"batches": batches, "loss": lambda model, inputs: torch.zeros(())}
    with pytest.raises(ll.TargetError, match=r"proj: the model's loss doesn't depend on it"):
        ll.attach(OneLinear(), ll.LoRAGAConfig(r=2, target_names="proj"), calibration_data=constant)
    with pytest.raises(ll.BaseModelError, match=r"proj: its inputs are 0 in all of the data"):
        data = [{"x": torch.zeros(2, 3, 16)}]
        ll.attach(OneLinear(), ll.CorDAConfig(r=2, target_names="proj"), calibration_data=data)


@pytest.mark.parametrize("variant", ["eva", "corda", "lora_ga", "loftq"])
def test_new_data_never_overwrites_what_was_trained(variant: str) -> None:
    model = tiny_llama()
    adapter = attach(model, config(variant, target_names=SOME))
    data = calibration(model, adapter.config)
    if variant != "loftq":  # which has moved its B already
        adapter.configure(calibration_data=data)
    perturb(adapter)
    before = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    with pytest.raises(ll.ConfigError, match=r"q_proj: it was trained from the start that it has, so"):
        adapter.configure(calibration_data=data)
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter.state_dict().items())
