"""OFT, BOFT, HRA, RoAd and PSOFT beside PEFT's, by their options, and on other kinds of layer."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import OneLinear, moe, perturb
from oracles import ORACLES
from peft.tuners.boft import layer as boft_layer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import lora_lite as ll
from lora_lite.ops.cayley import rotation_less_identity, skew

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own words

HALF = {"lora_R": "psoft_R.default.weight", "lora_vector_a": "psoft_R.default.vector_a"}
NAMES: dict[str, dict[str, str]] = {
    "oft": {"lora_R": "oft_R.default.weight"},
    "boft": {"lora_R": "boft_R.default", "lora_s": "boft_s.default"},
    "hra": {"lora_u": "hra_u.default"},
    "road": {"lora_theta": "road_theta.default", "lora_alpha": "road_alpha.default"},
    "psoft": {**HALF, "lora_vector_b": "psoft_R.default.vector_b"},
}
KINDS = {"oft": "OFT", "boft": "BOFT", "hra": "HRA", "road": "Road", "psoft": "Psoft"}
NEUMANN: dict[str, Any] = {"use_cayley_neumann": True}
EXACT: dict[str, Any] = {"use_cayley_neumann": False}

# variant, our fields, PEFT's
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("oft", {"block_size": 4}, {"oft_block_size": 4}),
    ("oft", {"block_size": 4, "num_cayley_neumann_terms": 4}, {"oft_block_size": 4, "num_cayley_neumann_terms": 3}),
    ("oft", {"block_size": 8, **EXACT}, {"oft_block_size": 8, **EXACT}),
    ("oft", {"block_size": 8, "block_share": True}, {"oft_block_size": 8, "block_share": True}),
    ("boft", {}, {}),
    ("boft", {"block_size": 8}, {"boft_block_size": 8}),
    ("hra", {}, {}),
    ("hra", {"r": 4}, {"r": 4}),
    ("road", {"group_size": 8}, {"group_size": 8}),
    ("road", {"group_size": 4, "form": 2}, {"group_size": 4, "variant": "road_2"}),
    ("road", {"group_size": 24, "form": 4}, {"group_size": 24, "variant": "road_4"}),
    ("psoft", {"r": 5}, {"r": 5, "psoft_alpha": 2}),
    ("psoft", {"r": 4, "ab_svd_init": "pissa_init", **NEUMANN}, {"r": 4, "ab_svd_init": "pissa_init", **NEUMANN}),
    (
        "psoft",
        {"r": 4, "cayley_neumann_eps": 0.3, "mag_a": False, **NEUMANN},
        {"r": 4, "cayley_neumann_eps": 0.3, "psoft_mag_a": False, **NEUMANN},
    ),
    ("psoft", {"r": 3, "orth": False, "svd": "lowrank"}, {"r": 3, "psoft_orth": False, "psoft_svd": "lowrank"}),
]
IDS = [f"{variant}-{'-'.join(fields)}" for variant, fields, _ in CASES]
STARTS: list[tuple[str, dict[str, Any]]] = [
    *((variant, fields) for variant, fields, _ in CASES),
    ("oft", {"block_size": 8, "coft": True, "side": "output"}),
    ("boft", {"n_butterfly_factor": 3}),
    ("boft", {"block_size": 8, "n_butterfly_factor": 2, "dropout": 0.5}),
    ("hra", {"r": 6, "apply_GS": True}),
]


def config(variant: str, **fields: Any) -> Any:
    return ll.config_for(variant)(variant=variant, **{"target_names": "proj", **fields})


def both(
    variant: str, ours: dict[str, Any], theirs: dict[str, Any], dtype: torch.dtype = torch.float32, size: float = 0.2
) -> tuple[Any, Any, dict[str, tuple[Tensor, Tensor, float]]]:
    """A layer with our adapter, one with PEFT's at the same values, and the trained tensors of both, with the sign that
    PEFT's has."""
    torch.manual_seed(0)
    base = OneLinear(dtype=dtype)
    mine, other = copy.deepcopy(base), copy.deepcopy(base)
    adapter = ll.attach(mine, config(variant, **ours))
    perturb(adapter, size)
    other = peft.get_peft_model(other, getattr(peft, f"{KINDS[variant]}Config")(target_modules=["proj"], **theirs))
    sign = -1.0 if variant == "oft" and "use_cayley_neumann" in ours else 1.0
    pairs = {}
    tensors = dict(adapter.named_tensors())
    for name, end in NAMES[variant].items():
        if (tensor := tensors.get(f"proj.{name}")) is not None:
            peer = other.get_parameter(f"base_model.model.proj.{end}")
            with torch.no_grad():
                peer.copy_(sign * tensor)
            pairs[name] = tensor, peer, sign
    return mine, other, pairs


@pytest.mark.parametrize(("variant", "ours", "theirs"), CASES, ids=IDS)
def test_outputs_gradients_and_steps_are_those_of_peft(
    variant: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    mine, other, pairs = both(variant, ours, theirs)
    x, u = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 5, 24)
    optimizers = [torch.optim.AdamW([pair[i] for pair in pairs.values()], lr=1e-2) for i in (0, 1)]
    for _ in range(3):
        y, wanted = mine(x), other(x)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad((out * u).sum(), x)[0] for out in (mine(x), other(x))]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
        for out, optimizer in zip((y, wanted), optimizers, strict=True):
            optimizer.zero_grad()
            (out * u).sum().backward()
        for tensor, peer, sign in pairs.values():
            torch.testing.assert_close(tensor.grad, sign * peer.grad, rtol=1e-4, atol=2e-5)
        for optimizer in optimizers:
            optimizer.step()
    for tensor, peer, sign in pairs.values():
        torch.testing.assert_close(tensor, sign * peer, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("variant", "ours", "theirs"), CASES, ids=IDS)
def test_in_bfloat16_outputs_and_gradients_are_those_of_peft_to_its_rounding(
    variant: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    mine, other, pairs = both(variant, ours, theirs, torch.bfloat16)
    x, u = torch.randn(64, 16, dtype=torch.bfloat16), torch.randn(64, 24, dtype=torch.bfloat16)
    y, wanted = mine(x), other(x)
    assert y.dtype == torch.bfloat16
    assert (y - wanted).float().norm() < 0.01 * wanted.float().norm()
    for out in (y, wanted):
        (out * u).sum().backward()
    for tensor, peer, sign in pairs.values():
        assert (tensor.grad - sign * peer.grad).norm() < 0.02 * peer.grad.norm()


class BlockDiagonal:
    """The op of BOFT's CUDA extension."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*row) for row in blocks])]

    @staticmethod
    def backward(u: Tensor, blocks: Tensor) -> list[Tensor]:
        k = blocks.shape[-1]
        return [
            torch.stack([torch.stack([m[n * k : n * k + k, n * k : n * k + k] for n in range(len(m) // k)]) for m in u])
        ]


@pytest.mark.parametrize(("m", "k"), [(2, 4), (3, 4), (3, 2), (2, 8)])
def test_several_butterfly_factors_are_those_of_pefts_extension(
    m: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: BlockDiagonal)
    fields = {"boft_block_size": k, "boft_n_butterfly_factor": m}
    mine, other, pairs = both("boft", {"block_size": k, "n_butterfly_factor": m}, fields)
    x, u = torch.randn(7, 16), torch.randn(7, 24)
    torch.testing.assert_close(mine(x), other(x), rtol=1e-5, atol=1e-5)
    for out in (mine(x), other(x)):
        (out * u).sum().backward()
    for tensor, peer, _ in pairs.values():
        torch.testing.assert_close(tensor.grad, peer.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_share", [False, True])
def test_coft_steps_are_those_of_peft(block_share: bool) -> None:
    """PEFT's forward writes the bounded numbers, ours takes them, and `Adapter.step` writes them."""
    more: dict[str, Any] = {"coft": True, "eps": 0.3, "block_share": block_share}
    mine, other, pairs = both("oft", {"block_size": 4, **more}, {"oft_block_size": 4, **more})
    adapter, ((tensor, peer, _),) = ll.adapters(mine)["default"], pairs.values()
    before = tensor.detach().clone()
    x, u = torch.randn(5, 16), torch.randn(5, 24)
    torch.testing.assert_close(mine(x), other(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(tensor, before)
    assert not torch.allclose(peer, before)
    adapter.step()
    torch.testing.assert_close(tensor, peer)
    optimizers = [torch.optim.AdamW([p], lr=3e-2) for p in (tensor, peer)]
    for _ in range(3):
        for out, optimizer in zip((mine(x), other(x)), optimizers, strict=True):
            optimizer.zero_grad()
            (out * u).sum().backward()
            optimizer.step()
        adapter.step()
    other(x)
    torch.testing.assert_close(tensor, peer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("variant", "fields"), STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_option_starts_as_the_identity_bit_for_bit(
    variant: str, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    model, x = OneLinear(dtype=dtype), torch.randn(9, 16, dtype=dtype)
    base = model(x)
    ll.attach(model, config(variant, **fields))
    assert torch.equal(model(x), base)
    assert torch.equal(model.train()(x), base)
    model.to(torch.bfloat16)
    with ll.disabled(model):
        base = model(x.bfloat16())
    assert torch.equal(model(x.bfloat16()), base)


@pytest.mark.parametrize(("variant", "fields"), STARTS)
def test_each_option_is_the_papers_formula_and_every_tensor_moves(variant: str, fields: dict[str, Any]) -> None:
    model, x = OneLinear(dtype=torch.float64), torch.randn(9, 16, dtype=torch.float64)
    adapter = ll.attach(model.eval(), config(variant, dtype=torch.float64, **fields))
    (model(x) * torch.randn(9, 24)).sum().backward()
    assert all(p.grad.any() for p in adapter.parameters())  # at the start, too
    perturb(adapter, 0.3)
    tensors = {key.removeprefix("proj."): value.detach() for key, value in adapter.named_tensors()}
    wanted = ORACLES[variant](model.proj.weight, model.proj.bias, adapter.config, tensors, x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(model(x), wanted)  # by the op that keeps little for the backward


@pytest.mark.parametrize("s", [2, 5, 8])
def test_the_exact_rotation_is_orthogonal_and_the_series_nears_it(s: int) -> None:
    q = skew(0.05 * torch.randn(3, s * (s - 1) // 2, dtype=torch.float64), s)
    eye = torch.eye(s, dtype=torch.float64)
    exact = eye + rotation_less_identity(q)
    torch.testing.assert_close(exact @ exact.mT, eye.expand(3, s, s))
    errors = [float((eye + rotation_less_identity(q, terms) - exact).norm()) for terms in (2, 3, 4, 5, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1.5 * float(q.norm())  # the same turn, and not its inverse
    assert errors[-1] < 1e-3 * errors[0]


@pytest.mark.parametrize("fields", [{"r": 2}, {"r": 6}, {"r": 6, "apply_GS": True}])
def test_hra_keeps_lengths(fields: dict[str, Any]) -> None:
    model = nn.Sequential()
    model.proj = nn.Linear(16, 16, bias=False)
    nn.init.eye_(model.proj.weight)
    perturb(ll.attach(model, config("hra", **fields)), 1.0)
    x = torch.randn(9, 16)
    y = model(x)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    assert (y - x).norm() > 0.5


def test_an_odd_number_of_reflections_is_refused_at_attach_and_loads(tmp_path: Path) -> None:
    model = OneLinear()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ll.ConfigError, match=r"HRAConfig\(r=3\): an odd number of reflections is never the identity"):
        ll.attach(model, config("hra", r=3))
    assert model.state_dict().keys() == before.keys()
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.HRAConfig(r=3, target_modules=["proj"]))
    theirs.save_pretrained(str(tmp_path))
    ll.load_peft(model, tmp_path)
    x = torch.randn(4, 16)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_boft_dropout_leaves_out_a_share_of_one_factors_blocks() -> None:
    model = OneLinear(bias=False).train()
    adapter = ll.attach(model, config("boft", n_butterfly_factor=2, dropout=0.6))
    perturb(adapter, 0.5)
    view, x = adapter.views()["proj"], torch.randn(4, 16)
    with torch.no_grad():
        view.lora_s.fill_(1)
        whole = view.lora_R.clone()
        torch.manual_seed(3)
        y = model(x)
        wanted = []
        for j in range(2):  # 2 of 4 blocks, as int(0.6 · 4) says
            for a in range(4):
                for b in range(a):
                    view.lora_R.copy_(whole)
                    view.lora_R[j, [a, b]] = 0
                    wanted.append(model.eval()(x))
        assert sum(torch.allclose(y, other, atol=1e-5) for other in wanted) == 1
        view.lora_R.copy_(whole)
        assert not torch.allclose(model.eval()(x), y, atol=1e-3)
        assert len({float(model.train()(x).sum()) for _ in range(6)}) > 1


LAYERS: dict[str, Any] = {
    "conv": lambda: (nn.Conv2d(4, 24, 3, stride=2, padding=1), torch.randn(2, 4, 7, 7)),
    "groups": lambda: (nn.Conv1d(9, 24, 4, groups=3, dilation=2), torch.randn(2, 9, 12)),
    "embedding": lambda: (nn.Embedding(36, 24), torch.randint(36, (3, 7))),
}
FIELDS: dict[str, dict[str, Any]] = {
    "oft": {"block_size": 4},
    "boft": {"block_size": 4},
    "hra": {"r": 4},
    "road": {"group_size": 8},
    "psoft": {"r": 3},
}


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("variant", list(FIELDS))
def test_convolutions_turn_patches_and_embeddings_rows(variant: str, kind: str) -> None:
    layer, x = LAYERS[kind]()
    model = nn.Sequential()
    model.proj = layer.double()
    x = x if kind == "embedding" else x.double()
    base = model(x)
    is_conv = kind != "embedding"
    adapter = ll.attach(model, config(variant, kinds=("conv", "embedding"), dtype=torch.float64, **FIELDS[variant]))
    torch.testing.assert_close(model(x), base)
    perturb(adapter, 0.3)
    y = model(x)
    (y * torch.randn_like(y)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    tensors = {key.removeprefix("proj."): value.detach() for key, value in adapter.named_tensors()}
    matrix = layer.weight.flatten(1) if is_conv else layer.weight.mT
    # as a matrix: what the unit vectors become
    d_in, bias = matrix.shape[1], layer.bias if is_conv else torch.zeros(24, dtype=torch.float64)
    rows = torch.cat([torch.eye(d_in, dtype=torch.float64), torch.zeros(1, d_in, dtype=torch.float64)])
    image = ORACLES[variant](matrix, bias, adapter.config, tensors, rows)
    other = copy.deepcopy(model)
    ll.detach(other)
    with torch.no_grad():
        weight = image[:-1] - image[-1]
        other.proj.weight.copy_(weight.mT.reshape(layer.weight.shape) if is_conv else weight)
        if is_conv:
            other.proj.bias.copy_(image[-1])
    torch.testing.assert_close(y, other(x))
    with torch.no_grad():
        ll.merge(model)
        torch.testing.assert_close(model(x), y)


def test_a_turn_of_outputs_of_two_groups_of_a_convolution_is_in_no_kernel() -> None:
    model, x = nn.Sequential(), torch.randn(2, 8, 12, dtype=torch.float64)
    model.proj = nn.Conv1d(8, 24, 4, groups=2).double()
    y = model(x)
    fields: dict[str, Any] = {"kinds": ("conv",), "dtype": torch.float64}
    adapter = ll.attach(model, config("road", group_size=24, **fields))
    perturb(adapter, 0.3)
    tensors = {key.removeprefix("proj."): value.detach() for key, value in adapter.named_tensors()}
    eye, none = torch.eye(24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
    wanted = ORACLES["road"](eye, none, adapter.config, tensors, y.movedim(1, -1).flatten(0, 1))
    torch.testing.assert_close(model(x), wanted.view(2, 9, 24).movedim(-1, 1))
    with pytest.raises(
        ll.TargetError, match="mixes outputs of different groups of this convolution, and no kernel does"
    ):
        ll.merge(model)
    ll.attach(model, config("oft", block_size=4, **fields), "turned")  # by the kernel
    with pytest.raises(ll.TargetError, match="'road' mixes outputs of different groups"):
        model(x)


@pytest.mark.parametrize("variant", list(FIELDS))
def test_each_expert_has_a_turn_of_its_own(variant: str) -> None:
    model = moe("qwen3")
    ids = torch.arange(12).reshape(1, 12)
    base = model(input_ids=ids).logits
    names = r"layers\.0\.mlp\.experts\.gate_up_proj$"
    adapter = ll.attach(model, config(variant, target_names=names, kinds=("experts",), **FIELDS[variant]))
    torch.testing.assert_close(model(input_ids=ids).logits, base, rtol=0, atol=0)
    perturb(adapter, 0.3)
    y = model(input_ids=ids).logits
    assert not torch.allclose(y, base, atol=1e-2)
    ll.merge(model)
    torch.testing.assert_close(model(input_ids=ids).logits, y, rtol=1e-3, atol=1e-4)


def kept(model: nn.Module, x: Tensor) -> int:
    """The bytes that a forward keeps for its backward, beside parameters and buffers."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> None:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    model.train()
    with saved_tensors_hooks(pack, lambda nothing: nothing):
        out = model(x)
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    del out
    return sum(size for address, size in storages.items() if address not in known)


TOKENS, D_IN, D_OUT = 64, 576, 1536
BYTES = {  # x (64, 576) in float32, y (64, 1536)
    "oft": TOKENS * D_IN * 4,
    "boft": TOKENS * (D_IN + D_OUT) * 4,
    "hra": TOKENS * D_IN * 4,
    "road": TOKENS * D_OUT * 4,
    "psoft": TOKENS * 32 * 4,  # V x
}


@pytest.mark.parametrize("variant", list(BYTES))
def test_little_is_kept_for_the_backward_and_no_more_than_in_peft(variant: str) -> None:
    base = OneLinear(D_IN, D_OUT)
    theirs = copy.deepcopy(base)
    fast = {"svd": "lowrank", "svd_lowrank_niter": 0} if variant == "psoft" else {}
    ll.attach(base, config(variant, **fast))
    settings = {f"psoft_{name}": value for name, value in fast.items()}
    theirs = peft.get_peft_model(theirs, getattr(peft, f"{KINDS[variant]}Config")(target_modules=["proj"], **settings))
    hidden = torch.randn(TOKENS, D_IN, requires_grad=True)
    assert kept(base, hidden * 1) == BYTES[variant] < kept(theirs, hidden * 1)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("oft", {"block_size": 1}, r"block_size=1\): wanted at least 2"),
    ("oft", {"eps": 0.0}, r"eps=0.0\): wanted a number above 0"),
    ("oft", {"side": "left"}, r'side=\'left\'\): wanted "input" or "output"'),
    ("oft", {"num_cayley_neumann_terms": 1}, r"num_cayley_neumann_terms=1\): wanted 2 or more"),
    ("boft", {"n_butterfly_factor": 0}, r"n_butterfly_factor=0\): wanted the number of factors"),
    ("boft", {"block_size": 3, "n_butterfly_factor": 2}, r"block_size=3\): wanted 2 or more; even for m > 1"),
    ("boft", {"dropout": 1.0}, r"dropout=1.0\): wanted a probability below 1"),
    ("road", {"form": 3}, r"form=3\): wanted 1, 2 or 4"),
    ("road", {"group_size": 7}, r"group_size=7\): wanted an even number"),
    ("psoft", {"dropout": -1.0}, r"dropout=-1.0\): wanted a probability"),
    ("psoft", {"ab_svd_init": "lora"}, r"ab_svd_init='lora'\): wanted one of"),
    ("psoft", {"svd": "fast"}, r'svd=\'fast\'\): wanted "full" or "lowrank"'),
    ("psoft", {"random_seed": -1}, r"random_seed=-1\): wanted 0 or more"),
    ("oft", {"num_cayley_neumann_terms": 10**9}, r"wanted 2 or more, up to 1000"),
    ("psoft", {"svd_lowrank_niter": 10**9}, r"svd_lowrank_niter=1000000000\): wanted 0 to 1000"),
    ("psoft", {"cayley_neumann_eps": 1.0}, r"cayley_neumann_eps=1.0\): wanted between 0 and 1"),
]


@pytest.mark.parametrize(("variant", "fields", "message"), WRONG)
def test_fields_that_can_not_be(variant: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        config(variant, **fields)


@pytest.mark.parametrize(
    ("variant", "field"),
    [("oft", "coft"), ("oft", "block_share"), ("oft", "use_cayley_neumann"), ("hra", "apply_GS"), ("psoft", "mag_a")],
)
def test_flags_are_true_or_false(variant: str, field: str) -> None:
    with pytest.raises((ll.ConfigError, TypeError)):  # of the library, or of the types that tests check
        config(variant, **{field: 1})


@pytest.mark.parametrize(
    ("variant", "fields", "message"),
    [
        ("oft", {"block_size": 5}, r"OFTConfig\(block_size=5\): 5 doesn't divide a layer's 16 channels"),
        ("boft", {"n_butterfly_factor": 4}, r"BOFTConfig\(block_size=4\): 32 doesn't divide a layer's 16 channels"),
        ("road", {}, r"RoAdConfig\(group_size=64\): 64 doesn't divide a layer's 24 channels"),
        ("psoft", {}, r"PSOFTConfig\(r=32\): a \(24, 16\) weight has 16 directions"),
        ("hra", {"r": 18, "apply_GS": True}, r"HRAConfig\(r=18\): a \(16, 16\) weight has 16 directions"),
    ],
)
def test_layers_that_can_not_be(variant: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        ll.attach(OneLinear(), config(variant, **fields))
