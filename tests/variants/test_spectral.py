"""The methods that train entries, coefficients or directions of the weight, against PEFT's own layers and oracles."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import OneLinear, moe, perturb
from oracles import ORACLES
from peft.tuners.waveft.wavelet import _WAVELET_COEFFS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import lora_lite as ll
from lora_lite.families import sparse
from lora_lite.ops.wavelets import DIGITS, scaling_filter

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

# Our config, PEFT's, and our tensors by PEFT's names. D_IN and D_OUT are no powers of 2, and odd where they may be.
SPECTRUM = {"lora_spectrum": "spectrum"}
DEFT_PAIR = {"lora_P": "P", "lora_R": "R"}
LORA_PAIR = {"lora_A": "lora_A", "lora_B": "lora_B"}
CASES: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "shira": (ll.SHiRAConfig(r=2, seed=5), peft.ShiraConfig(r=2, random_seed=5), {"lora_weight": "weight"}),
    "supertuning": (
        ll.SuperTuningConfig(sparsity=0.9),
        peft.SupertuningConfig(sparsity=0.9),
        {"lora_values": "values"},
    ),
    "supra": (
        ll.SuperTuningConfig(sparsity=0.8, select_top=False, r=3, alpha=2.0),
        peft.SupertuningConfig(sparsity=0.8, select_top=False, r=3, lora_alpha=2),
        {"lora_values": "values", **LORA_PAIR},
    ),
    "fourierft": (
        ll.FourierFTConfig(n_frequency=40, scaling=30.0, seed=3),
        peft.FourierFTConfig(n_frequency=40, scaling=30.0, random_loc_seed=3),
        SPECTRUM,
    ),
    **{
        f"waveft-{family}": (
            ll.WaveFTConfig(n_frequency=40, wavelet_family=family),
            peft.WaveFTConfig(n_frequency=40, wavelet_family=family),
            SPECTRUM,
        )
        for family in ("db1", "db3", "sym4", "coif2")
    },
    "waveft-direct": (
        ll.WaveFTConfig(n_frequency=40, use_idwt=False, seed=9),
        peft.WaveFTConfig(n_frequency=40, use_idwt=False, random_loc_seed=9),
        SPECTRUM,
    ),
    "delora": (
        ll.DeLoRAConfig(r=3, strength=2.0),
        peft.DeloraConfig(r=3, delora_lambda=2),
        {"lora_A": "A", "lora_B": "B", "lora_lambda": "lambda"},
    ),
    "deft": (ll.DEFTConfig(r=3), peft.DeftConfig(r=3), DEFT_PAIR),
    "deft-qr": (
        ll.DEFTConfig(r=3, decomposition="qr", alpha=2.0),
        peft.DeftConfig(r=3, decomposition_method="qr", alpha=2),
        DEFT_PAIR,
    ),
    "para": (ll.DEFTConfig(r=3, para=True), peft.DeftConfig(r=3, para=True), {"lora_P": "P"}),
    "c3a": (ll.C3AConfig(block_size=3), peft.C3AConfig(block_size=3), {"lora_kernel": "kernel"}),
}
D_IN, D_OUT = 15, 21


def pair(case: str, d_in: int = D_IN, d_out: int = D_OUT) -> tuple[OneLinear, ll.Adapter, Any, dict[str, nn.Parameter]]:
    """Our model and its adapter, PEFT's, and PEFT's parameters by our names; with the same numbers, and no start's."""
    cfg, theirs, names = CASES[case]
    torch.manual_seed(1)
    model = OneLinear(d_in, d_out)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(theirs)
    theirs.target_modules = {"proj"}
    model_of_peft = peft.get_peft_model(model, theirs)
    adapter = ll.attach(ours, replace(cfg, target_names="^proj$"))
    layer, kind = model_of_peft.base_model.model.proj, theirs.peft_type.lower()
    parameters = {name: getattr(layer, f"{kind}_{end}")["default"] for name, end in names.items()}
    parameters = {name: p.weight if isinstance(p, nn.Module) else p for name, p in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(torch.randn_like(parameter) * 0.2)
            dict(adapter.named_tensors())[f"proj.{name}"].copy_(parameter)
    return ours, adapter, model_of_peft, parameters


def step(model: Any, x: Tensor, u: Tensor) -> tuple[Tensor, Any]:
    """The output, and the gradient of x; parameters have theirs."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y * u).sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("case", CASES)
def test_three_steps_are_pefts(case: str) -> None:
    ours, adapter, theirs, parameters = pair(case)
    mine = {name.removeprefix("proj."): p for name, p in adapter.named_tensors() if p.requires_grad}
    assert mine.keys() == parameters.keys()
    optimizers = [torch.optim.AdamW(list(ps.values()), lr=1e-2) for ps in (mine, parameters)]
    for seed in range(3):
        torch.manual_seed(seed)
        x, u = torch.randn(2, 3, D_IN), torch.randn(2, 3, D_OUT)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (y, gx), (wanted, wanted_gx) = step(ours, x, u), step(theirs, x, u)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=2e-5)
        if case != "c3a":
            torch.testing.assert_close(gx, wanted_gx, rtol=1e-4, atol=2e-5)
        for name, parameter in parameters.items():
            torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-3, atol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(mine[name], parameter, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_pefts_to_its_rounding(case: str) -> None:
    ours, _, theirs, _ = pair(case)
    x = torch.randn(6, D_IN).bfloat16()
    with torch.no_grad():
        exact = ours(x.float())
        for model in (ours, theirs):
            layer = model.proj if model is ours else model.base_model.model.proj.base_layer
            for name in ("weight", "bias"):
                getattr(layer, name).data = getattr(layer, name).data.bfloat16()
        mine, wanted = ours(x), theirs(x)
        assert mine.dtype == torch.bfloat16
        errors = [(y.float() - exact).norm() / exact.norm() for y in (mine, wanted)]
    assert errors[0] < max(1.5 * errors[1], 4e-3)


def test_pefts_gradient_of_x_is_wrong_for_c3a_and_ours_is_not() -> None:
    ours, _, theirs, _ = pair("c3a")
    layer = theirs.base_model.model.proj
    x, u = torch.randn(4, D_IN), torch.randn(4, D_OUT)
    wanted = u @ (layer.base_layer.weight + layer.get_delta_weight("default"))
    torch.testing.assert_close(step(ours, x, u)[1], wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(step(theirs, x, u)[1], wanted, rtol=1e-2, atol=1e-3)  # else load's gradients may be equal


def kept(model: Any, x: Tensor) -> int:
    """Bytes that a forward keeps for the backward and are no parameter or buffer, by storage."""
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> None:
        for t in (tensor._values(), tensor._indices()) if tensor.is_sparse else (tensor,):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()

    with saved_tensors_hooks(pack, lambda nothing: nothing):
        loss = model(x).sum()
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    del loss
    return sum(storage.nbytes() for address, storage in storages.items() if address not in known)


@pytest.mark.parametrize("case", CASES)
def test_the_backward_keeps_x_and_no_more_than_pefts(case: str) -> None:
    """Of 8 tokens, and of 1, where ΔW isn't formed; 64 tokens at 576 -> 1536 are in docs."""
    ours, _, theirs, _ = pair(case, 30, 48)
    for rows in (1, 8):
        x = torch.randn(rows, 30, requires_grad=True)
        inputs = 4 * rows * (30 + 48 * (case in ("deft", "deft-qr", "para")))  # DEFT takes its part out of y
        rank = 4 * 3 * rows if case == "supra" else 0  # h of its LoRA
        assert kept(ours, x) <= inputs + rank + 4  # and a zero for no bias
        assert kept(ours, x) <= kept(theirs, x)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("shira", "supertuning", "four", "wave"))])
def test_few_tokens_and_many_have_one_output(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ΔW for few, with it for many; in training, too."""
    model = OneLinear(80, 112)
    adapter = ll.attach(model, replace(CASES[case][0], target_names="^proj$"))
    perturb(adapter, 0.3)
    x, u = torch.randn(200, 80), torch.randn(200, 112)
    u[3:] = 0
    y, gx = step(model, x, u)
    many = {name: p.grad for name, p in adapter.named_tensors() if p.requires_grad}
    for p in adapter.parameters():
        p.grad = None
    monkeypatch.setattr(sparse, "add_dense", None)
    for row in range(3):
        torch.testing.assert_close(step(model, x[row], u[row]), (y[row], gx[row]), rtol=1e-4, atol=1e-4)
    for name, tensor in adapter.named_tensors():
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, many[name], rtol=1e-3, atol=1e-3)


def one_block(cfg: Any) -> dict[str, Any]:
    return {"block_size": None} if cfg.variant == "c3a" else {}


METHODS = {cfg.variant: cfg for cfg, _, _ in CASES.values()}


class Kinds(nn.Module):
    """A convolution with groups and one without, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 12)
        self.conv = nn.Conv1d(12, 18, 2, padding=1)
        self.grouped = nn.Conv1d(18, 12, 3, groups=3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.grouped(self.conv(self.embed(ids).mT))


@pytest.mark.parametrize("variant", METHODS)
def test_convolutions_and_embeddings_are_the_papers_formula_on_their_matrix(variant: str) -> None:
    torch.manual_seed(0)
    ids, model = torch.randint(24, (2, 7)), Kinds().double()
    twin: Any = copy.deepcopy(model)
    base = model(ids)
    cfg = METHODS[variant]
    fields: dict[str, Any] = {"kinds": ("conv", "embedding"), "dtype": torch.float64, "target_names": "."}
    if variant == "deft":  # it mixes outputs, and no kernel with groups does
        fields["target_names"] = "embed|conv"
    adapter = ll.attach(model, replace(cfg, **fields | one_block(cfg)))
    perturb(adapter, 0.3)
    tensors = dict(adapter.named_tensors())
    for name, layer in twin.named_children():
        if name not in adapter.targets:
            continue
        weight: Tensor = layer.weight.T if name == "embed" else layer.weight.flatten(1)
        of_layer = {
            key.removeprefix(f"{name}."): t.detach() for key, t in tensors.items() if key.startswith(f"{name}.")
        }
        zero, eye = torch.zeros(len(weight)).double(), torch.eye(weight.shape[1]).double()
        changed = ORACLES[variant](weight.detach(), zero, adapter.config, of_layer, eye).T
        layer.weight = nn.Parameter((changed.T if name == "embed" else changed).reshape(layer.weight.shape))
    torch.testing.assert_close(model(ids), twin(ids), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(ids), base, atol=1e-3)
    (model(ids) ** 2).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize("variant", METHODS)
def test_experts_of_their_own_have_merged_equal_to_attached(variant: str) -> None:
    model, ids = moe("mixtral"), torch.arange(10)[None]
    cfg = METHODS[variant]
    fields = {"kinds": "experts", "target_names": r"experts\.down_proj$"} | one_block(cfg)
    perturb(ll.attach(model, replace(cfg, **fields)), 0.2)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        ll.merge(model)
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-4)


def test_places_are_pefts_bit_for_bit() -> None:
    for case in CASES:
        _, adapter, theirs, _ = pair(case)
        tensors, layer = dict(adapter.named_tensors()), theirs.base_model.model.proj
        places: Any = next((t for t in tensors.values() if t.dtype == torch.int32), None)
        if case == "shira":
            rows, columns = layer.shira_indices["default"]
            assert torch.equal(places, rows * D_IN + columns)
        elif case.startswith("sup"):
            assert torch.equal(places, layer.supertuning_indices["default"])


def test_wavelets_are_pefts_where_those_are_wavelets() -> None:
    for name in DIGITS:
        h = torch.tensor(scaling_filter(name), dtype=torch.float64)
        gram = torch.stack([(h[2 * m :] * h[: len(h) - 2 * m]).sum() for m in range(len(h) // 2)])
        torch.testing.assert_close(gram, torch.eye(len(h) // 2, dtype=torch.float64)[0], rtol=0, atol=1e-14)
        theirs = torch.tensor(_WAVELET_COEFFS[name], dtype=torch.float64) * (2**0.5 if "coif" in name else 1)
        if name in ("coif4", "coif5"):
            assert len(theirs) != len(h) or not torch.allclose(theirs, h, atol=1e-3)  # else they can be read
        else:
            torch.testing.assert_close(theirs, h, rtol=0, atol=1e-11)


@pytest.mark.parametrize("decomposition", ["relu", "qr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deft_starts_as_the_identity_in_both_decompositions(decomposition: str, dtype: torch.dtype) -> None:
    model, x = OneLinear(D_IN, D_OUT, dtype=dtype), torch.randn(50, D_IN, dtype=dtype)
    base = model(x)
    adapter = ll.attach(model, ll.DEFTConfig(decomposition=decomposition, alpha=3.0, target_names="proj"))
    assert torch.equal(model(x), base)
    for parameter in adapter.parameters():  # as mixed precision under FSDP2 casts them
        parameter.data = parameter.data.bfloat16()
    assert torch.equal(model(x), base)


def test_defts_rank_is_at_most_the_outputs() -> None:
    model = OneLinear(D_IN, 2)
    adapter = ll.attach(model, ll.DEFTConfig(r=8, alpha=8.0, target_names="proj"))
    tensors = {name.removeprefix("proj."): t for name, t in adapter.named_tensors()}
    assert tensors["lora_P"].shape == (2, 2)
    torch.testing.assert_close(tensors["lora_R"], tensors["lora_P"].relu().T @ model.proj.weight / 4)  # s = α/2


def test_c3as_block_fits_common_widths() -> None:
    for d_in, d_out, wanted in ((576, 576, 192), (576, 192, 192), (576, 1536, 192), (4096, 11008, 256), (24, 16, 8)):
        specs = ll.REGISTRY["c3a"].param_specs(d_in, d_out, ll.C3AConfig())
        assert specs["lora_kernel"].shape == (d_out // wanted, d_in // wanted, wanted)


@pytest.mark.parametrize(
    ("cfg", "match"),
    [
        (ll.C3AConfig(block_size=4), r"block_size=4.*divisor of both sides of \(21, 15\), that is of 3"),
        (ll.SHiRAConfig(), r"r=32.*1152 places of a \(21, 15\) weight, which has 315"),
        (ll.FourierFTConfig(), "n_frequency=1000.*which has 315\n.*per_layer"),
        (ll.WaveFTConfig(), "n_frequency=2592.*which has 315"),
        (ll.SuperTuningConfig(sparsity=0.999), "sparsity=0.999.*0 places"),
    ],
)
def test_a_layer_that_is_too_small_is_named(cfg: Any, match: str) -> None:
    with pytest.raises(ll.ConfigError, match=f"(?s){match}"):
        ll.attach(OneLinear(D_IN, D_OUT), replace(cfg, target_names="^proj$"))
    with pytest.raises(ll.ConfigError, match="wanted a divisor"):  # sides without a common divisor
        ll.attach(OneLinear(15, 22), ll.C3AConfig(target_names="proj"))


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (ll.SHiRAConfig, {"seed": -1}),
        (ll.SuperTuningConfig, {"sparsity": 1.0}),
        (ll.SuperTuningConfig, {"r": 0}),
        (ll.SuperTuningConfig, {"alpha": 0.0}),
        (ll.SuperTuningConfig, {"dropout": 1.0}),
        (ll.FourierFTConfig, {"n_frequency": 0}),
        (ll.FourierFTConfig, {"scaling": 0.0}),
        (ll.FourierFTConfig, {"seed": -1}),
        (ll.FourierFTConfig, {"init": "ones"}),
        (ll.WaveFTConfig, {"density": 2.0}),
        (ll.WaveFTConfig, {"wavelet_family": "db11"}),
        (ll.WaveFTConfig, {"seed": -1}),
        (ll.WaveFTConfig, {"n_frequency": 0}),
        (ll.WaveFTConfig, {"scaling": 0.0}),
        (ll.DeLoRAConfig, {"strength": 0.0}),
        (ll.DeLoRAConfig, {"dropout": -0.1}),
        (ll.DEFTConfig, {"decomposition": "svd"}),
        (ll.DEFTConfig, {"alpha": -1.0}),
        (ll.DEFTConfig, {"dropout": 1.0}),
        (ll.C3AConfig, {"block_size": 0}),
        (ll.C3AConfig, {"init": "identity"}),
    ],
)
def test_a_field_that_is_not_valid_is_named(cls: Any, fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ll.ConfigError, match=rf"{name}=.*: wanted"):
        cls(**fields)


def test_wavefts_density_is_a_part_of_each_layer() -> None:
    model: Any = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 2))
    ll.attach(model, ll.WaveFTConfig(density=0.1, target_names="."))
    assert [len(layer.lora_spectrum) for layer in model] == [20, 4]


@pytest.mark.parametrize("variant", ["fourierft", "c3a"])
def test_zeros_start_as_the_identity(variant: str) -> None:
    cfg, model, x = METHODS[variant], OneLinear(D_IN, D_OUT), torch.randn(4, D_IN)
    base = model(x)
    ll.attach(model, replace(cfg, init="zeros", target_names="proj", **one_block(cfg)))
    assert torch.equal(model(x), base)


@pytest.mark.parametrize(("row", "column"), [(D_OUT, 0), (D_OUT - 2, 2 * D_IN - 1), (-1, 3)])
def test_a_mask_of_pefts_that_leaves_the_weight_is_refused(row: int, column: int, tmp_path: Path) -> None:
    """Also where the row-major index of the two is a valid one."""
    _, _, theirs, _ = pair("shira")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(file := tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.proj.shira_indices"][:, -1] = torch.tensor([row, column], dtype=torch.int32)
    save_file(tensors, file)
    with pytest.raises(ll.CheckpointError, match="lora_indices"):
        ll.load_peft(OneLinear(D_IN, D_OUT), tmp_path)


@pytest.mark.filterwarnings("ignore:save_precomputed_indices=False:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_places_that_a_folder_lacks_are_pefts_of_this_base(dtype: torch.dtype, tmp_path: Path) -> None:
    """In bfloat16 many |W| are equal, and which of them are chosen must be the same."""
    model, x = OneLinear(64, 96, dtype=dtype), torch.randn(5, 64, dtype=dtype)
    base = copy.deepcopy(model)
    cfg = peft.SupertuningConfig(sparsity=0.8, target_modules=["proj"], save_precomputed_indices=False)
    theirs: Any = peft.get_peft_model(model, cfg)
    layer = theirs.base_model.model.proj
    torch.nn.init.normal_(layer.supertuning_values["default"])
    theirs.save_pretrained(tmp_path)
    adapter = ll.load_peft(base, tmp_path)
    places = dict(adapter.named_tensors())["proj.lora_indices"]
    assert torch.equal(places, layer.supertuning_indices["default"])
    torch.testing.assert_close(base(x), theirs(x), rtol=2e-2, atol=5e-2)
