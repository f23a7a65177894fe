"""MiCA, KaSA, BD-LoRA, OSF, FRoD and AdaMSS: beside PEFT's live layers, their options, other kinds of layer, memory."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import attach, config, moe, perturb
from oracles import ORACLES
from peft.tuners.lora.config import BdLoraConfig
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import lora_lite as ll
from lora_lite.families.joint import joint_tensors
from lora_lite.ops.clusters import kmeans
from lora_lite.ops.joint import joint_columns, joint_directions, off_diagonal, sparse_product

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
X = torch.randn(5, 24, generator=torch.Generator().manual_seed(5))
LORA = {"r": 4, "lora_alpha": 6}
BLOCKS = BdLoraConfig(target_modules_bd_a=["up"], target_modules_bd_b=["down"], nblocks=2)
PEFT: dict[str, Any] = {
    "mica": lambda names: peft.LoraConfig(target_modules=names, init_lora_weights="mica", **LORA),
    "kasa": lambda names: peft.LoraConfig(target_modules=names, kasa_config=peft.KasaConfig(), **LORA),
    "bdlora": lambda names: peft.LoraConfig(target_modules=names, use_bdlora=BLOCKS, **LORA),
    "osf": lambda names: peft.OSFConfig(target_modules=names, effective_rank=10),
    "frod": lambda names: peft.FrodConfig(target_modules=names, sparse_rate=0.05, progressbar=False),
    "adamss": lambda names: peft.AdamssConfig(target_modules=names, r=12, num_subspaces=3, subspace_rank=2),
}


for _start in ("random", "batch_average"):
    PEFT[f"velora-{_start}"] = lambda names, start=_start: peft.LoraConfig(
        target_modules=names, velora_config=peft.VeloraConfig(num_groups=5, init_type=start, scale=0.7), **LORA
    )


class Mlp(nn.Module):
    def __init__(self, d: int = 24, inner: int = 32) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(d, inner), nn.SiLU(), nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def both(
    variant: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    names: tuple[str, ...] = ("up", "down"),
    **sizes: int,
) -> tuple[Any, Any]:
    """PEFT's model with every trained tensor away from its start, and ours with the same adapter."""
    torch.manual_seed(0)
    base = Mlp(**sizes).to(dtype)
    # FRoD's V of a weight with fewer rows than columns has directions of rounding.
    names = ("up",) if variant == "frod" else names
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), PEFT[variant](list(names)))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(str(folder))
    ll.load_peft(base, folder)
    return base, theirs


def train(model: Any, x: Tensor, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(x).float()
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", PEFT)
def test_three_steps_are_those_of_peft(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ours, theirs = both(variant, tmp_path, dtype)
    x = X.to(dtype)
    if variant.startswith("velora"):  # x is compressed in training alone
        ours.train(), theirs.train()
    wide = dtype == torch.float32
    close: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5} if wide else {"rtol": 0.03, "atol": 0.03}
    torch.testing.assert_close(ours(x), theirs(x), **close)
    before = ours(x)
    if variant == "osf" and not wide:
        return  # on a 16-bit base PEFT's cast of its parameters loses the hooks that project their gradients
    torch.testing.assert_close(
        train(ours, x), train(theirs, x), rtol=1e-4 if wide else 0.05, atol=1e-4 if wide else 0.2
    )
    assert not torch.allclose(ours(x), before, atol=0.02)
    torch.testing.assert_close(ours(x), theirs(x), **close)


def kept(model: Any, layer: Any, x: Tensor) -> int:
    """Bytes that autograd keeps of a layer for its backward, of what isn't the model's own."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> None:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage()

    with saved_tensors_hooks(pack, lambda nothing: nothing):
        y = layer(x)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    del y
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


@pytest.mark.parametrize("variant", PEFT)
def test_the_backward_keeps_x_and_no_more_than_pefts(variant: str, tmp_path: Path) -> None:
    """One layer, 64 tokens. AdaMSS's x is N [x; 1], since N is frozen; VeLoRA keeps a number of each group, and A x."""
    ours, theirs = both(variant, tmp_path, names=("up",), d=32, inner=48)
    x = torch.randn(64, 32, requires_grad=True)
    if variant.startswith("velora"):
        ours.train(), theirs.train()
    one, other = kept(ours, ours.up, x), kept(theirs, theirs.base_model.model.up, x)
    start = {"velora-random": 0, "velora-batch_average": 7}.get(variant, 0)  # e (w,)
    assert one == 4 * (64 * {"adamss": 12, "velora-random": 9, "velora-batch_average": 9}.get(variant, 32) + start)
    assert one <= other + 4 * start


# ---- options --------------------------------------------------------------------------------------------


def one(variant: str, bias: bool = True, **fields: Any) -> tuple[Any, ll.Adapter, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24, bias)).double()
    adapter = attach(model, config(variant, target_names="0", dtype=torch.float64, **fields))
    return model, adapter, torch.randn(7, 16, dtype=torch.float64)


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("mica", {"r": 16, "alpha": 3.0, "rslora": True}),
        ("kasa", {"r": 15, "alpha": 3.0}),
        ("bdlora", {"blocks": "A", "nblocks": 4}),
        ("bdlora", {"blocks": "none", "nblocks": 5}),
        ("osf", {"effective_rank": 15, "project": "gradient"}),
        ("osf", {"effective_rank": 0.1}),
        ("frod", {"sparse_rate": 1.0}),
        ("adamss", {"subspace_rank": 5, "num_subspaces": 9, "use_dynamic_rank": True}),
        ("adamss", {"r": 3, "num_subspaces": 99}),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_each_option_is_the_formula(variant: str, fields: dict[str, Any], bias: bool) -> None:
    model, adapter, x = one(variant, bias, **fields)
    perturb(adapter, 0.3)
    tensors = {key.removeprefix("0."): value.detach() for key, value in adapter.named_tensors()}
    b = model[0].bias if bias else torch.zeros(24, dtype=torch.float64)
    wanted = ORACLES[variant](model[0].weight, b, adapter.config, tensors, x)
    torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)
    with torch.no_grad():  # what is remembered, or done otherwise for few tokens
        torch.testing.assert_close(model.eval()(x), wanted, rtol=1e-6, atol=1e-6)
    if variant == "frod":
        torch.testing.assert_close(model(x.repeat(30, 1)), wanted.repeat(30, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["mica", "kasa", "bdlora", "frod", "velora"])
def test_dropout_is_of_the_branch_and_is_made_again(variant: str) -> None:
    model, adapter, x = one(variant, dropout=0.5)
    perturb(adapter, 0.3)
    wanted = model.eval()(x)
    rows = x.repeat(400, 1).requires_grad_()
    model.train()
    torch.manual_seed(3)
    y = model(rows)
    outputs = y.detach().view(400, *wanted.shape)
    assert not torch.equal(outputs[0], outputs[1])
    assert ((outputs.mean(0) - wanted).abs() <= 6 * outputs.std(0) / 20 + 1e-9).all()
    (dx,) = torch.autograd.grad(y.square().sum(), rows)
    step = 1e-6 * torch.randn_like(rows)
    torch.manual_seed(3)  # the same masks: the gradient is of the function that ran
    moved = model(rows.detach() + step)
    torch.testing.assert_close(moved.square().sum() - y.square().sum(), (dx * step).sum(), rtol=1e-2, atol=1e-7)


def test_osfs_update_stays_in_its_subspace_under_adam() -> None:
    """And its first gradient is the projected one; PEFT's steps leave the subspace."""
    changes = {}
    for project in ("update", "gradient"):
        model, adapter, x = one("osf", project=project)
        weight, t = model[0].weight.detach().clone(), dict(adapter.named_tensors())
        uh, vh = t["0.lora_Uh"], t["0.lora_Vh"]
        model(x).square().sum().backward()
        u, v = t["0.lora_U"].grad, t["0.lora_V"].grad
        assert u is not None
        assert v is not None
        assert max((uh.mT @ u).norm() / u.norm(), (v @ vh.mT).norm() / v.norm()) < 1e-5
        train(model.float(), x.float(), 5)
        delta = delta_of(model, weight)
        changes[project] = float((uh.mT.float() @ delta @ vh.mT.float()).norm() / delta.norm())
    assert changes["update"] < 1e-5 < 1e-3 < changes["gradient"]


def delta_of(model: Any, weight: Tensor) -> Tensor:
    with torch.no_grad():
        y = model(torch.eye(16)) - model(torch.zeros(16))
        return y.mT - weight.float()


def test_kasas_penalty_is_pefts(tmp_path: Path) -> None:
    ours, theirs = both("kasa", tmp_path)
    penalty = ll.adapters(ours)["default"].penalty()
    assert penalty is not None
    assert penalty > 0
    torch.testing.assert_close(penalty, theirs._get_kasa_loss())


def test_frods_shared_tensors_are_pefts() -> None:
    torch.manual_seed(0)
    base = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 12), "down": nn.Linear(12, 6)}) for _ in "abc")
    fields = {"sparse_rate": 0.1, "regularization_alpha": 0.01}
    cfg = peft.FrodConfig(target_modules=["up", "down"], progressbar=False, **fields)
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), cfg)
    model: Any = base
    ll.attach(model, ll.FRoDConfig(target_names="up|down", **fields))
    shared = dict(model.lora_shared.named_buffers())
    assert {name for name in shared if name[0] == "V"} == {"V_up", "V_down"}
    for name in ("up", "down"):
        v = theirs.base_model.frod_V[name]["default"]
        torch.testing.assert_close(shared[f"V_{name}"].abs(), v.abs(), rtol=1e-3, atol=1e-4)  # LAPACK's signs
        assert torch.equal(shared[f"places_{name}"], theirs.base_model.frod_s_indices[name]["default"])


def test_joint_directions_are_those_of_one_weight() -> None:
    weights = [torch.randn(9, 6).double() for _ in "abc"]
    v = joint_directions(weights, 1e-3)
    columns = [w @ v.mT.inverse() for w in weights]  # W V⁻ᵀ = U Λ: E diagonalises what they have in common
    inverses = [torch.linalg.inv(u.mT @ u + 1e-3 * torch.eye(6).double()) for u in columns]
    mean = torch.stack(inverses).mean(0)
    assert (mean - mean.diag().diag()).norm() < 1e-8 * mean.norm()
    wide = joint_directions([torch.randn(2, 6)], 1e-3)
    torch.testing.assert_close(wide.mT @ wide, torch.eye(6))


def test_places_are_drawn_once_and_never_on_the_diagonal() -> None:
    rows, columns = off_diagonal(7, 42, torch.Generator().manual_seed(0))
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [
        (i, j) for i in range(7) for j in range(7) if i != j
    ]
    places, values, z = torch.stack([rows, columns])[:, :9], torch.randn(9), torch.randn(40, 7)
    s = torch.zeros(7, 7).index_put((places[0], places[1]), values)
    for n in (1, 40):  # with and without the matrix
        torch.testing.assert_close(sparse_product(z[:n], values, places), z[:n] @ s.mT)


# ---- AdaMSS's clusters and schedule -----------------------------------------------------------------------


def test_clusters_are_found_and_none_is_empty() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = torch.tensor([[0.0, 9.0], [9.0, 0.0], [-9.0, -9.0]])
    points = (centres[:, None] + torch.randn(3, 20, 2, generator=generator)).flatten(0, 1)
    labels = kmeans(points, 3, seed=2)
    assert [len(set(part.tolist())) for part in labels.split(20)] == [1, 1, 1]
    assert len(set(labels.tolist())) == 3
    assert torch.equal(labels, kmeans(points, 3, seed=2))
    same = torch.zeros(6, 2)  # all centres in one place
    assert sorted(kmeans(same, 4, seed=0).unique().tolist()) == [0, 1, 2, 3]
    assert sorted(kmeans(points[:5], 5, seed=0).tolist()) == [0, 1, 2, 3, 4]


ASA = {"use_asa": True, "asa_target_subspaces": 2, "init_warmup": 1, "final_warmup": 9, "mask_interval": 3}


def test_the_least_important_subspaces_freeze_as_pefts(tmp_path: Path) -> None:
    """PEFT's threshold is the last one that should stay, and freezes it, too."""
    torch.manual_seed(0)
    base = Mlp()
    fields = {"r": 12, "num_subspaces": 4, "subspace_rank": 2, **ASA}
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), peft.AdamssConfig(target_modules=["up", "down"], **fields))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 * parameter.requires_grad)
    theirs.save_pretrained(str(tmp_path))
    ours = base
    adapter = ll.load_peft(ours, tmp_path)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=3e-2) for m in (ours, theirs)]
    for step in range(1, 6):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            y = model(X)
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
            optimizer.step()
        adapter.step()
        theirs.base_model.update_and_allocate(step)
        if step == 3:
            layers = [theirs.base_model.model.up, theirs.base_model.model.down]
            theirs_frozen = torch.cat(
                [torch.tensor([not p.requires_grad for p in m.adamss_A["default"]]) for m in layers]
            )
            tables = {key: t for key, t in adapter.named_tensors() if key.endswith("lora_frozen")}
            frozen = torch.cat([tables["up.lora_frozen"], tables["down.lora_frozen"]]).bool()
            left = int(2 + (8 - 2) * (1 - (3 - 1) / 8) ** 3)
            assert int((~frozen).sum()) == left
            assert int((~theirs_frozen).sum()) == left - 1
            assert not (frozen & ~theirs_frozen).any()
            at_freeze = {key: t.detach().clone() for key, t in adapter.named_tensors()}
    for path in ("up", "down"):  # AdamW's momentum moved them, and the schedule put them back
        rows = tables[f"{path}.lora_frozen"].bool()
        stack = dict(adapter.named_tensors())[f"{path}.lora_As"].detach()
        assert torch.equal(stack[rows], at_freeze[f"{path}.lora_As"][rows])
        assert not torch.equal(stack[~rows], at_freeze[f"{path}.lora_As"][~rows])


def test_a_schedule_goes_on_from_a_file(tmp_path: Path) -> None:
    models = [Mlp() for _ in "ab"]
    models[1].load_state_dict(models[0].state_dict())
    cfg = config("adamss", target_names="up|down", **ASA)
    adapters = [ll.attach(models[0], cfg)]
    perturb(adapters[0])
    for _ in range(3):
        train_step(models[0], adapters[0])
    ll.save(models[0], tmp_path / "a.safetensors", resume=True)
    adapters.append(ll.load(models[1], tmp_path / "a.safetensors"))
    for model, adapter in zip(models, adapters, strict=True):
        train_step(model, adapter)
    state = adapters[0].state_dict()
    assert any(t.any() for key, t in state.items() if key.endswith("lora_frozen"))
    assert all(torch.equal(tensor, state[key]) for key, tensor in adapters[1].state_dict().items())
    ll.save(models[0], tmp_path / "b.safetensors")
    ll.detach(models[1])
    assert "up.lora_frozen" not in ll.load(models[1], tmp_path / "b.safetensors").state_dict(resume=False)


def train_step(model: Any, adapter: ll.Adapter) -> None:
    for parameter in adapter.parameters():
        parameter.grad = None
    model(X).square().sum().backward()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter -= 1e-3 * parameter.grad
    adapter.step()


def test_a_schedule_without_gradients_is_an_error() -> None:
    model = Mlp()
    adapter = ll.attach(model, config("adamss", target_names="up", **ASA | {"mask_interval": 1}))
    perturb(adapter)
    with pytest.raises(ll.TargetError, match=r"step 1 of 'adamss': none of its layers has had a gradient"):
        adapter.step()


# ---- errors, kinds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "fields", "message"),
    [
        ("mica", {"r": 25}, r"MiCAConfig\(r=25\): a \(32, 24\) weight has 24 directions"),
        ("mica", {"alpha": 0.0}, r"alpha=0\.0\): wanted a number above 0, or None"),
        ("mica", {"dropout": 1.0}, r"dropout=1\.0\): wanted a probability below 1"),
        ("kasa", {"r": 24}, r"KaSAConfig\(r=24\): a \(32, 24\) weight has 23 directions"),
        ("kasa", {"beta": -1.0}, r"beta=-1\.0\): wanted a number, 0 or more"),
        ("bdlora", {"nblocks": 5}, r"nblocks=5, r=8, blocks='B'\): they don't divide a \(32, 24\) weight"),
        ("bdlora", {"nblocks": 16, "r": 16, "blocks": "A"}, r"they don't divide"),
        ("bdlora", {"blocks": "C"}, r"blocks='C'\): wanted"),
        ("bdlora", {"nblocks": 0}, r"nblocks=0\): wanted a number of blocks"),
        ("osf", {"effective_rank": 24}, r"of the 24 directions of a \(32, 24\) weight 24 would be kept"),
        ("osf", {"effective_rank": 0.01}, r"0 would be kept"),
        ("osf", {"effective_rank": 0}, r"effective_rank=0\): wanted a rank of at least 1, a fraction"),
        ("osf", {"effective_rank": 1.5}, r"effective_rank=1\.5\): wanted"),
        ("osf", {"project": "both"}, r"project='both'\): wanted"),
        ("frod", {"sparse_rate": 0.0}, r"sparse_rate=0\.0\): wanted"),
        ("frod", {"regularization_alpha": 0.0}, r"regularization_alpha=0\.0\): wanted"),
        ("velora", {"num_groups": 0}, r"num_groups=0\): wanted a number of at least 1"),
        ("velora", {"init_type": "once"}, r"init_type='once'\): wanted"),
        ("velora", {"compression_scale": float("nan")}, r"compression_scale=nan\): wanted a number"),
        ("frod", {"seed": -1}, r"seed=-1\): wanted an integer from 0"),
        ("adamss", {"num_subspaces": 0}, r"num_subspaces=0\): wanted a whole number, 1 or more"),
        ("adamss", {"svd_threshold": 1.0}, r"svd_threshold=1\.0\): wanted a share"),
        ("adamss", {"final_warmup": 50}, r"final_warmup=50\): wanted a step after init_warmup = 50"),
        ("adamss", {"asa_importance_beta": 1.0}, r"asa_importance_beta=1\.0\): wanted"),
        ("adamss", {"asa_schedule_exponent": 0.0}, r"asa_schedule_exponent=0\.0\): wanted"),
        ("adamss", {"mask_interval": 0}, r"mask_interval=0\): wanted a whole number, 1 or more"),
    ],
)
def test_errors(variant: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        ll.attach(Mlp(), ll.config_for(variant)(target_names="up", **fields))


def test_a_folder_of_pefts_that_has_all_tensors_runs_no_svd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = peft.get_peft_model(Mlp(), PEFT["mica"](["up", "down"]))
    theirs.save_pretrained(str(tmp_path))
    monkeypatch.setattr(torch.linalg, "svd", None)
    adapter = ll.load_peft(Mlp(), tmp_path)
    assert torch.equal(adapter.state_dict()["up.lora_B"], theirs.base_model.model.up.lora_B["default"].weight)


def test_frods_directions_are_those_of_all_experts() -> None:
    model = moe("mixtral", num_hidden_layers=1, num_local_experts=2)
    adapter = ll.attach(model, ll.FRoDConfig(target_names="experts", kinds=("experts",), sparse_rate=0.05))
    for view in adapter.views().values():
        v = joint_tensors(view)[0]
        torch.testing.assert_close(
            view.lora_l0, joint_columns(view.dense_weight(), v).norm(dim=1).float(), rtol=1e-3, atol=1e-4
        )


def test_frod_wants_one_width_for_a_name() -> None:
    model = nn.ModuleDict({"1": nn.ModuleDict({"q": nn.Linear(4, 6)}), "2": nn.ModuleDict({"q": nn.Linear(6, 4)})})
    with pytest.raises(ll.ConfigError, match=r"2\.q: other layers of its name have another size"):
        ll.attach(model, ll.FRoDConfig(target_names="q$"))
    with pytest.raises(ll.ConfigError, match=r"a \(6, 1\) weight has no S"):
        ll.attach(nn.Sequential(nn.Linear(1, 6)), ll.FRoDConfig(target_names="0"))


@pytest.mark.parametrize("variant", ["mica", "kasa", "bdlora", "osf", "frod", "adamss", "velora"])
@pytest.mark.parametrize("kind", ["conv", "embedding"])
def test_other_kinds_of_layer(variant: str, kind: str) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Conv2d(3, 14, 2) if kind == "conv" else nn.Embedding(12, 14)
    model, x = nn.Sequential(layer), torch.randn(2, 3, 4, 4) if kind == "conv" else torch.arange(12)
    model = model.double()
    x = x.double() if kind == "conv" else x
    fields = {"adamss": {"num_subspaces": 3}, "frod": {"sparse_rate": 0.1}}.get(variant, {"r": 4})
    fields = {} if variant == "osf" else fields
    base = model(x)
    cfg = ll.config_for(variant)(target_names="0", kinds=(kind,), dtype=torch.float64, **fields)
    adapter = ll.attach(model, cfg)
    assert torch.equal(model(x), base) == ll.REGISTRY[variant].has_identity_init
    perturb(adapter, 0.3)
    tensors = {key.removeprefix("0."): value.detach() for key, value in adapter.named_tensors()}
    bias = layer.bias if kind == "conv" else torch.zeros(14, dtype=torch.float64)
    if kind == "conv":
        patches = nn.functional.unfold(x, 2).mT  # (2, positions, 12)
        wanted = ORACLES[variant](layer.weight.flatten(1), bias, cfg, tensors, patches.flatten(0, 1))
        wanted = wanted.view(2, 9, 14).mT.reshape(2, 14, 3, 3)
    else:
        wanted = ORACLES[variant](layer.weight.mT, bias, cfg, tensors, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", ["random", "batch_average"])
def test_veloras_gradients_are_pefts(start: str, tmp_path: Path) -> None:
    """Three steps of Adam don't show their size."""
    ours, theirs = both(f"velora-{start}", tmp_path)
    for model in (ours.train(), theirs.train()):
        (model(X) * torch.linspace(-1, 1, 120).view(5, 24)).sum().backward()
    live = dict(theirs.named_parameters())
    for path in ("up", "down"):
        for name in ("A", "B"):
            wanted = live[f"base_model.model.{path}.lora_{name}.default.weight"].grad
            got = getattr(ours.get_submodule(path), f"lora_{name}").grad
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
