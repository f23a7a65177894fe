"""LoHa, LoKr, HiRA, GraLoRA, GLoRA, MiSS, BEFT and PEANuT against PEFT's layers, and what is theirs alone."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import config, perturb, quantized, tiny_folder
from oracles import ORACLES
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

import lora_lite as ll
from lora_lite.ops.activations import ACTIVATIONS
from lora_lite.ops.kronecker import split

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LINEAR, CONV1, CONV2, EMBEDDING = "0|1", "conv1", "conv2", "embedding"
SIGMOID = {"depth": 2, "act_fn": "sigmoid"}
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [  # variant, model, our fields, PEFT's
    ("loha", LINEAR, {"r": 3, "alpha": 6.0}, {"r": 3, "alpha": 6}),
    ("loha", CONV1, {"r": 3}, {"r": 3}),
    (
        "loha",
        CONV1,
        {"r": 3, "alpha": 3.0, "use_effective_conv2d": True},
        {"r": 3, "alpha": 3, "use_effective_conv2d": True},
    ),
    (
        "loha",
        CONV2,
        {"r": 3, "alpha": 3.0, "use_effective_conv2d": True},
        {"r": 3, "alpha": 3, "use_effective_conv2d": True},
    ),
    ("lokr", LINEAR, {"r": 8}, {"r": 8}),
    ("lokr", LINEAR, {"r": 2, "alpha": 8.0}, {"r": 2}),
    ("lokr", LINEAR, {"r": 1, "alpha": 1.0, "decompose_both": True}, {"r": 1, "alpha": 1, "decompose_both": True}),
    ("lokr", LINEAR, {"r": 2, "alpha": 2.0, "decompose_factor": 4}, {"r": 2, "alpha": 2, "decompose_factor": 4}),
    ("lokr", LINEAR, {"r": 2, "alpha": 2.0, "decompose_factor": 7}, {"r": 2, "alpha": 2, "decompose_factor": 7}),
    ("lokr", CONV1, {"r": 2, "alpha": 2.0}, {"r": 2, "alpha": 2}),
    (
        "lokr",
        CONV1,
        {"r": 2, "alpha": 2.0, "use_effective_conv2d": True},
        {"r": 2, "alpha": 2, "use_effective_conv2d": True},
    ),
    ("lokr", CONV2, {"r": 8}, {"r": 8}),
    (
        "lokr",
        CONV2,
        {"r": 2, "alpha": 2.0, "use_effective_conv2d": True},
        {"r": 2, "alpha": 2, "use_effective_conv2d": True},
    ),
    ("hira", LINEAR, {"r": 4}, {"r": 4}),
    ("hira", CONV2 + "_whole", {"r": 4}, {"r": 4}),
    ("hira", EMBEDDING, {"r": 4}, {"r": 4}),
    ("gralora", LINEAR, {"r": 4}, {"r": 4}),
    (
        "gralora",
        LINEAR,
        {"r": 8, "k": 4, "hybrid_r": 3, "alpha": 5.0},
        {"r": 8, "gralora_k": 4, "hybrid_r": 3, "alpha": 5},
    ),
    *(
        (
            "glora",
            LINEAR,
            {"r": 3, "a_b": ab, "c": c, "d_e": de},
            {"r": 3, "config_A_B": ab, "config_C": c, "config_D_E": de},
        )
        for ab, c, de in [
            ("lora", "lora", "constant"),
            ("vector", "vector", "vector"),
            ("constant", "none", "vector"),
            ("lora", "none", "none"),
        ]
    ),
    ("glora", "0", {"a_b": "none", "c": "vector", "d_e": "constant"}, {"config_A_B": "none", "config_C": "vector"}),
    ("miss", LINEAR, {"r": 7}, {"r": 7}),
    ("miss", LINEAR, {"r": 8}, {"r": 8}),
    ("miss", LINEAR, {"r": 5, "form": "mini", "mini_r": 4}, {"r": 5, "init_weights": "mini", "mini_r": 4}),
    ("miss", LINEAR, {"r": 4, "form": "bat"}, {"r": 4, "init_weights": "bat"}),
    ("beft", LINEAR, {}, {}),
    ("peanut", LINEAR, {"r": 4}, {"r": 4}),
    ("peanut", LINEAR, {"r": 4, "scaling": 0.5, **SIGMOID}, {"r": 4, "scaling": 0.5, **SIGMOID}),
]
PEFT = {
    "loha": peft.LoHaConfig,
    "lokr": peft.LoKrConfig,
    "hira": peft.HiraConfig,
    "gralora": peft.GraloraConfig,
    "glora": peft.GloraConfig,
    "miss": peft.MissConfig,
    "beft": peft.BeftConfig,
    "peanut": peft.PeanutConfig,
}
per_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, [*case[:2], *case[2].values()])))


def built(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    layers: dict[str, tuple[list[nn.Module], Tensor]] = {
        CONV1: ([nn.Conv1d(32, 24, 3, groups=2, padding=1)], torch.randn(2, 32, 7)),
        CONV2: ([nn.Conv2d(32, 24, (3, 2), groups=2)], torch.randn(2, 32, 5, 5)),
        CONV2 + "_whole": ([nn.Conv2d(4, 6, (3, 2), stride=2)], torch.randn(2, 4, 5, 5)),
        EMBEDDING: ([nn.Embedding(9, 6)], torch.tensor([[1, 3], [8, 1]])),
    }
    linear = [nn.Linear(24, 32), nn.Linear(32, 24, bias=False)], torch.randn(3, 5, 24)
    modules, x = layers.get(kind, linear)
    return nn.Sequential(*modules).to(dtype), x.to(dtype) if x.is_floating_point() else x


def theirs_of(variant: str, name: str, is_embedding: bool) -> str:
    """PEFT's name of a tensor of ours, after the layer's path."""
    rest = name.removeprefix("lora_")
    kind, _, number = rest.partition("_")
    if variant == "glora":
        return f"glora_{kind}.default.{number}"
    if variant == "peanut" and kind in ("encoder", "decoder"):
        return f"peanut_{kind}s.default.{number}.weight"
    names = {
        "gralora": {"a": "A.default", "b": "B.default", "general_a": "A_general.default.weight"}
        | {"general_b": "B_general.default.weight"},
        "peanut": {"P": "A.default.weight", "Q": "B.default.weight"},
        "beft": {"shift": "bias.default"},
    }.get(variant, {})
    start = {"loha": "hada", "hira": "hira_embedding" if is_embedding else "hira"}.get(variant, variant)
    return f"{start}_{names.get(rest, f'{rest}.default')}"


def pair(case: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, list[tuple[Any, Any]], Tensor]:
    """Our model, PEFT's, and their parameters side by side, with equal values away from the start."""
    variant, kind, fields, others = case
    (ours, x), targets = built(kind, dtype), kind.split("|") if kind in (LINEAR, "0") else ["0"]
    theirs = peft.get_peft_model(built(kind, dtype)[0], PEFT[variant](target_modules=targets, **others))
    kinds = ("conv",) if kind.startswith("conv") else ("embedding",) if kind == EMBEDDING else ("linear",)
    names = f"^({kind})$" if len(targets) > 1 else "^0$"
    adapter = ll.attach(ours, ll.config_for(variant)(target_names=(names,), target_roles=(), kinds=kinds, **fields))
    named, pairs = dict(theirs.named_parameters()), []
    for key, tensor in adapter.named_tensors():
        path, _, name = key.rpartition(".")
        pairs.append((tensor, named[f"base_model.model.{path}.{theirs_of(variant, name, kind == EMBEDDING)}"]))
    assert len(pairs) == sum(p.requires_grad for p in named.values())
    perturb(adapter, 0.3)
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine.reshape(other.shape))
    return ours, theirs, pairs, x


def backward(model: Any, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y.detach()


@per_case
def test_outputs_gradients_and_three_adamw_steps_are_pefts(case: Any) -> None:
    ours, theirs, pairs, x = pair(case)
    torch.testing.assert_close(backward(ours, x), backward(theirs, x), rtol=1e-5, atol=1e-5)
    if case[0] == "loha" and "use_effective_conv2d" in case[2]:
        return  # PEFT's gradient of both w_a is made with the other core: below
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad.view(mine.shape), rtol=1e-4, atol=1e-4)
    optimizers = [torch.optim.AdamW([p[i] for p in pairs], lr=1e-3, eps=1e-3) for i in range(2)]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            backward(model, x)
            optimizer.step()
    for mine, other in pairs:
        torch.testing.assert_close(mine, other.view(mine.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [CONV1, CONV2])
def test_the_gradients_of_a_kernel_by_its_core_are_those_of_the_formula(kind: str) -> None:
    fields = {"r": 3, "alpha": 3.0, "use_effective_conv2d": True}
    ours, theirs, pairs, x = pair(("loha", kind, fields, {"r": 3, "alpha": 3, "use_effective_conv2d": True}))
    layer = ours[0]
    names = ("t1", "w1_a", "w1_b", "t2", "w2_a", "w2_b")
    tensors = [getattr(layer, f"lora_{name}").detach().clone().requires_grad_() for name in names]
    halves = [torch.einsum("jkyz,jo,ki->oiyz", *part) for part in (tensors[:3], tensors[3:])]
    kernel = layer.weight + (halves[0] * halves[1]).reshape(layer.weight.shape)
    y = torch.func.functional_call(built(kind)[0][0], {"weight": kernel}, x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    backward(ours, x)
    backward(theirs, x)
    of_peft = {id(mine): other.grad for mine, other in pairs}
    for name, tensor in zip(names, tensors, strict=True):
        mine = getattr(layer, f"lora_{name}")
        torch.testing.assert_close(mine.grad, tensor.grad, rtol=1e-4, atol=1e-4)
        assert torch.allclose(of_peft[id(mine)], tensor.grad, rtol=1e-3, atol=1e-3) != name.endswith("_a")


@per_case
def test_a_bfloat16_base_gives_pefts_output_to_its_rounding(case: Any) -> None:
    ours, theirs, _, x = pair(case, torch.bfloat16)
    exact = copy.deepcopy(ours).double()
    with torch.no_grad():
        got, wanted, true = ours(x), theirs(x), exact(x.double() if x.is_floating_point() else x)
    assert got.dtype == torch.bfloat16
    error, other = ((y.double() - true).norm() / true.norm() for y in (got, wanted))
    assert error < 0.012
    assert error < 2 * other + 0.002


@per_case
def test_the_backward_keeps_at_most_what_pefts_does(case: Any) -> None:
    ours, theirs, _, x = pair(case)
    assert kept(ours, x) <= kept(theirs, x)


def kept(model: Any, x: Tensor) -> int:
    """The bytes that autograd keeps of one forward, parameters and buffers aside."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = x.detach().requires_grad_() if x.is_floating_point() else x  # as within a model: its gradient needs the weight
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model.train()(x)
    assert y.requires_grad
    of_model = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    return sum(size for address, size in storages.items() if address not in of_model)


# ---- what is theirs alone -------------------------------------------------------------------------

FORMS = [
    ("loha", {"r": 3}),
    ("lokr", {"r": 1}),
    ("lokr", {"r": 8}),
    ("hira", {"r": 3}),
    ("gralora", {"r": 4, "hybrid_r": 2}),
    ("glora", {"r": 3}),
    ("miss", {"r": 5}),
    ("miss", {"r": 4, "form": "mini", "mini_r": 2}),
    ("miss", {"r": 2, "form": "bat"}),
    ("beft", {}),
    ("peanut", {"r": 3, "depth": 1, "act_fn": "tanh"}),
]
per_form = pytest.mark.parametrize(("variant", "fields"), FORMS, ids=lambda value: str(value))


class Experts(nn.Module):
    """Two matrices in one parameter, each for the rows of one half of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:1] @ self.weight[0].T, x[1:] @ self.weight[1].T])


def weights_of(variant: str, adapter: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """W' (o, i) and b' of an adapter at one layer, by the oracle."""
    tensors = {key.rpartition(".")[2]: value.detach() for key, value in adapter.named_tensors()}
    b, inputs = torch.zeros(len(weight)) if bias is None else bias, torch.eye(weight.shape[1])
    shift = ORACLES[variant](weight, b, adapter.config, tensors, 0 * inputs[:1])
    return (ORACLES[variant](weight, b, adapter.config, tensors, inputs) - shift).T, shift[0]


@per_form
@pytest.mark.parametrize("kind", ["conv", "embedding"])
def test_a_convolution_and_an_embedding_have_the_oracles_weight(variant: str, fields: Any, kind: str) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Conv2d(4, 12, (2, 1)) if kind == "conv" else nn.Embedding(8, 12)
    x = torch.randn(2, 4, 5, 3) if kind == "conv" else torch.tensor([[1, 7], [3, 1]])
    if variant == "lokr":
        fields = {**fields, "decompose_factor": 2}
    model = nn.Sequential(layer)
    base, wanted_class = model(x), ll.config_for(variant)
    adapter = ll.attach(model, wanted_class(target_names="0", target_roles=(), kinds=(kind,), **fields))
    assert torch.equal(model(x), base)
    perturb(adapter, 0.3)
    if kind == "conv":
        weight, bias = weights_of(variant, adapter, layer.weight.flatten(1), layer.bias)
        wanted = nn.functional.conv2d(x, weight.view(layer.weight.shape), bias)
    else:
        weight, bias = weights_of(variant, adapter, layer.weight.T, None)
        wanted = weight.T[x] + bias
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, base, atol=1e-2)


@per_form
def test_each_of_several_experts_has_its_own(variant: str, fields: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Experts()), torch.randn(2, 8)
    base, cfg = model(x), ll.config_for(variant)(target_names="weight", target_roles=(), kinds=("experts",), **fields)
    adapter = ll.attach(model, cfg)
    perturb(adapter, 0.3)
    for n, row in enumerate(x):
        tensors = {key.rpartition("weight_")[2]: value[n].detach() for key, value in adapter.named_tensors()}
        tensors = {key.rpartition(".")[2]: value for key, value in tensors.items()}
        wanted = ORACLES[variant](model[0].weight[n], torch.zeros(12), cfg, tensors, row[None])[0]
        torch.testing.assert_close(model(x)[n], wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(x), base, atol=1e-2)


@pytest.mark.parametrize("variant", ["loha", "lokr"])
def test_rank_dropout_drops_rows_and_module_dropout_all_of_them(variant: str) -> None:
    model, x = built(LINEAR)
    model, rescaled = model[:1].eval(), {"rank_dropout_scale": True} if variant == "lokr" else {}
    base, cfg = model(x), {"target_names": "0", "r": 2, "rank_dropout": 0.5, **rescaled}
    adapter = ll.attach(model, ll.config_for(variant)(**cfg))
    perturb(adapter, 0.3)
    whole = model(x) - base
    model.train()
    change = (model(x) - base) / whole  # 0, or 1 over the share that stays
    rows = change.flatten(0, 1).mean(0)
    assert 0 < (rows.abs() < 1e-4).sum() < len(rows)
    stays = rows.abs() > 1e-4
    torch.testing.assert_close(rows[stays], (len(rows) / stays.sum()).expand(int(stays.sum())), rtol=1e-3, atol=1e-3)
    ll.detach(model)
    adapter = ll.attach(model, ll.config_for(variant)(target_names="0", r=2, module_dropout=0.5))
    perturb(adapter, 0.3)
    zero = [torch.equal(model(x), base) for _ in range(40)]
    assert 8 < sum(zero) < 32


def test_a_draw_without_rows_is_zero_and_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = built(LINEAR)
    base, adapter = model(x), ll.attach(model, ll.LoHaConfig(target_names="0", rank_dropout=0.9))
    perturb(adapter, 0.3)
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.zeros(n))
    assert torch.equal(model.train()(x), base)


@pytest.mark.parametrize("variant", ["loha", "lokr"])
def test_a_checkpoint_draws_the_same_rows_again(variant: str) -> None:
    model, x = built(LINEAR)
    adapter = ll.attach(model, ll.config_for(variant)(r=2, rank_dropout=0.5, module_dropout=0.2))
    perturb(adapter, 0.3)
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.train().zero_grad()
        torch.manual_seed(3)
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("variant", ["hira", "gralora", "miss"])
def test_dropout_is_of_the_branch_alone(variant: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    x, fields = torch.ones(40_000, 16), {"k": 2} if variant == "gralora" else {}
    adapter = ll.attach(model, ll.config_for(variant)(r=4, dropout=0.5, **fields))
    assert torch.equal(model.train()(x), nn.functional.linear(x, model[0].weight, model[0].bias))
    perturb(adapter, 0.3)
    trained = model(x)
    assert trained.std(0).min() > 0.01
    with torch.no_grad():
        torch.testing.assert_close(trained.mean(0), model.eval()(x)[0], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("variant", "fields"),
    [("hira", {}), ("glora", {"c": "vector"}), ("miss", {"r": 8, "form": "bat"}), ("peanut", {"depth": 1})],
)
def test_a_quantised_layer_is_read_as_the_numbers_it_computes_with(
    variant: str, fields: Any, quantization: str, tmp_path: Path
) -> None:
    model = quantized(tiny_folder(tmp_path, bias=True), quantization)
    adapter = ll.attach(model, config(variant, target_names=(r"0\.self_attn\.q_proj$",), **fields))
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(64, 128, dtype=torch.bfloat16)
    base = layer(x).double()
    perturb(adapter, 0.1)
    (site,) = adapter.sites()
    tensors = {key.rpartition(".")[2]: value.detach().double() for key, value in adapter.named_tensors()}
    plain = site.base.dense_weight().double(), layer.bias.double(), adapter.config
    with torch.no_grad():
        change = layer(x).double() - base
        wanted = ORACLES[variant](*plain, tensors, x.double()) - (x.double() @ plain[0].T + plain[1])
    assert (change - wanted).norm() < 0.05 * wanted.norm()


def test_a_side_is_split_as_peft_splits_it() -> None:
    for side in range(1, 700):
        for factor in (-1, 1, 2, 3, 4, 8, 16, 100):
            assert split(side, factor) == factorization(side, factor)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_activations_are_those_of_transformers(name: str) -> None:
    x = torch.linspace(-12, 12, 241, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ll.LoHaConfig(rank_dropout=1.0), r"rank_dropout=1\.0\): wanted a probability below 1"),
        (lambda: ll.LoKrConfig(decompose_factor=0), r"decompose_factor=0\): wanted a size, or -1"),
        (lambda: ll.LoKrConfig(init="peft"), r'init=.*wanted "default" or "lycoris"'),
        (lambda: ll.HiRAConfig(init="normal"), r'init=.*wanted "kaiming" or "gaussian"'),
        (lambda: ll.GraLoRAConfig(r=8, k=3), r"k=3\): wanted a number that divides r"),
        (lambda: ll.GLoRAConfig(d_e="lora"), r"d_e='lora'\): wanted one of \('vector'"),
        (lambda: ll.GLoRAConfig(a_b="none", c="none", d_e="none"), r"wanted a form for one of the parts"),
        (lambda: ll.MissConfig(form="bat", dropout=0.1), r"dropout=0\.1\): wanted 0 in the form bat"),
        (lambda: ll.PeanutConfig(act_fn="prelu"), r"act_fn='prelu'\): wanted one of relu"),
    ],
)
def test_a_wrong_field_is_an_error(make: Any, text: str) -> None:
    with pytest.raises(ll.ConfigError, match=text):
        make()


@pytest.mark.parametrize(
    ("cfg", "text"),
    [
        (ll.GraLoRAConfig(r=10, k=5), r"k=5\): doesn't divide the sides of a \(32, 24\) weight"),
        (ll.MissConfig(r=25), r"r=25, mini_r=1\): can't part a \(32, 24\) weight\n  wanted at most d_in for r"),
        (ll.MissConfig(r=8, form="mini", mini_r=5), r"a mini_r that divides d_out"),
        (ll.MissConfig(r=6, form="bat"), r"an r that divides both sides"),
        (
            ll.GLoRAConfig(a_b="none", target_names="1"),
            r"1: without a bias, nothing is trained there at a_b=.none.\n  leave it out",
        ),
    ],
)
def test_a_layer_that_a_method_can_not_part_is_an_error(cfg: Any, text: str) -> None:
    model, x = built(LINEAR)
    base = model(x)
    with pytest.raises(ll.ConfigError, match=text):
        ll.attach(model, cfg)
    assert torch.equal(model(x), base)
