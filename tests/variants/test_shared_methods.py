"""Methods whose layers share tensors, against PEFT's layers: RandLoRA, PVeRA, VB-LoRA, Uni-LoRA, TinyLoRA, Lily."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from models import moe, perturb
from oracles import ORACLES
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import lora_lite as ll

Pick = Callable[[Any], Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(24, 32), nn.Linear(32, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(x)))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def toy(dtype: torch.dtype = torch.float32) -> Toy:
    torch.manual_seed(0)
    return Toy().to(dtype)


PATHS = [f"layers.{n}.{name}" for n in range(2) for name in ("fc1", "fc2")]
X = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))
NAMES = ["fc1", "fc2"]

# our method, fields; PEFT's config class, fields
CASES: list[tuple[str, dict[str, Any], Any, dict[str, Any]]] = [
    ("randlora", {"r": 5, "alpha": 20.0}, peft.RandLoraConfig, {"r": 5, "randlora_alpha": 20}),
    (
        "randlora",
        {"r": 4, "alpha": 8.0, "sparse": True},
        peft.RandLoraConfig,
        {"r": 4, "randlora_alpha": 8, "sparse": True},
    ),
    ("randlora", {"r": 40, "very_sparse": True}, peft.RandLoraConfig, {"r": 40, "very_sparse": True}),
    ("pvera", {"r": 6}, peft.PveraConfig, {"r": 6}),
    ("vblora", {"num_vectors": 16, "vector_length": 8}, peft.VBLoRAConfig, {"num_vectors": 16, "vector_length": 8}),
    (
        "vblora",
        {"r": 3, "num_vectors": 9, "vector_length": 4, "topk": 3},
        peft.VBLoRAConfig,
        {"r": 3, "num_vectors": 9, "vector_length": 4, "topk": 3},
    ),
    ("unilora", {"theta_d_length": 60}, peft.UniLoraConfig, {"theta_d_length": 60}),
    ("tinylora", {"u": 5}, peft.TinyLoraConfig, {"u": 5}),
    ("tinylora", {"u": 5, "r": 3, "weight_tying": 0.5}, peft.TinyLoraConfig, {"u": 5, "r": 3, "weight_tying": 0.5}),
    ("lily", {"r": 4, "scaling": 0.7}, peft.LilyConfig, {"r": 4, "scaling": 0.7}),
    ("lily", {"r": 3, "num_B": 3, "stride_A": 2}, peft.LilyConfig, {"r": 3, "num_B": 3, "stride_A": 2}),
    # PEFT's layers with full paths as names share nothing.
    ("lily", {"r": 3, "share": False}, peft.LilyConfig, {"r": 3, "target_modules": PATHS}),
]
per_case = pytest.mark.parametrize(("variant", "fields", "cls", "theirs"), CASES)


def theirs_of(model: nn.Module, cls: Any, fields: dict[str, Any]) -> Any:
    theirs = peft.get_peft_model(model, cls(**{"target_modules": NAMES, **fields}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return theirs.eval()


def tensors_of(theirs: Any, variant: str, cfg: Any, pick: Pick = lambda t: t.detach()) -> dict[str, Tensor]:
    """PEFT's tensors, or their gradients, by our keys."""
    base, out = theirs.base_model, {}
    modules = dict(base.model.named_modules())
    for path in PATHS:
        layer: Any = modules[path]

        def at(name: str, layer: Any = layer) -> Tensor:
            return pick(getattr(layer, f"{variant}_{name}")["default"])

        if variant == "randlora":
            out |= {f"{path}.lora_lambda": at("lambda"), f"{path}.lora_gamma": at("gamma")}
        if variant == "pvera":
            out |= {f"{path}.lora_d": at("lambda_d"), f"{path}.lora_b": at("lambda_b")}
        if variant == "vblora":
            out |= {f"{path}.lora_logits_{name}": at(f"logits_{name}") for name in "AB"}
        if variant == "lily":
            a, b, router = (pick(getattr(layer, f"lily_{n}")["default"].weight) for n in ("A", "B", "router"))
            place = "lora_shared." if cfg.share else f"{path}.lora_"
            name_a, name_b = (place + name for name in shared_names(path, cfg))
            out |= {f"{path}.lora_router": router, name_a: a, name_b: b}
    if variant == "tinylora":
        groups = base.tinylora_v["default"]
        out["lora_shared.v"] = torch.stack([pick(groups[str(n)]) for n in range(len(groups))])
    if variant == "vblora":
        out["lora_shared.bank"] = pick(base.vblora_vector_bank["default"])
    if variant == "unilora":
        out["lora_shared.theta"] = pick(base.unilora_theta_d["default"])
    return out


def shared_names(path: str, cfg: Any) -> tuple[str, str]:
    if not cfg.share:
        return "down", "up"
    _, block, name = path.split(".")
    return f"A_layers_{int(block) // cfg.stride_A}_{name}", f"B_layers_{name}"


def frozen_of(theirs: Any, variant: str) -> dict[str, Tensor]:
    """What PEFT draws or computes by itself, where ours differs."""
    modules, out = dict(theirs.base_model.model.named_modules()), {}
    for path in PATHS:
        layer: Any = modules[path]
        if variant == "tinylora":
            out |= {f"{path}.lora_V": layer.tinylora_A["default"], f"{path}.lora_U": layer.tinylora_B["default"]}
        if variant == "unilora":
            for name in "AB":
                indices = getattr(layer, f"unilora_indices_{name}")["default"]
                scales = getattr(layer, f"unilora_scales_{name}")["default"]
                out[f"{path}.lora_indices_{name}"] = indices.to(torch.uint8)
                norms = out.setdefault("lora_shared.norms", torch.ones(60))
                norms[indices.flatten()] = scales.flatten().float()
    return out


def pair(variant: str, fields: dict[str, Any], cls: Any, theirs: dict[str, Any], dtype: torch.dtype) -> Any:
    """Ours, its adapter, and PEFT's with the same values."""
    ours, other = toy(dtype), theirs_of(toy(dtype), cls, theirs)
    cfg = ll.config_for(variant)(target_names="fc", **fields)
    adapter = ll.attach(ours, cfg)
    values = adapter.state_dict()
    adapter.load_state_dict(values | tensors_of(other, variant, cfg) | frozen_of(other, variant))
    return ours.eval(), adapter, other


@per_case
def test_outputs_gradients_and_three_steps_are_pefts(variant: str, fields: Any, cls: Any, theirs: Any) -> None:
    ours, adapter, other = pair(variant, fields, cls, theirs, torch.float32)
    close = {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close(ours(X), other(X), **close)
    assert not torch.allclose(ours(X), toy()(X), atol=1e-2)
    steps = [
        torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, eps=1e-4)
        for model in (ours, other)
    ]
    for n in range(3):
        for model, step in zip((ours, other), steps, strict=True):
            step.zero_grad()
            model(X).square().mean().backward()
        gradients = {key: t.grad for key, t in adapter.named_tensors() if t.requires_grad}
        wanted = tensors_of(other, variant, adapter.config, lambda t: t.grad)
        assert gradients.keys() == wanted.keys()
        for key, gradient in gradients.items():
            assert n or gradient.abs().max() > 0
            torch.testing.assert_close(
                gradient, wanted[key], rtol=2e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}"
            )
        for step in steps:
            step.step()
    torch.testing.assert_close(ours(X), other(X), rtol=2e-3, atol=2e-4)


@per_case
def test_in_bfloat16_it_is_pefts_to_rounding(variant: str, fields: Any, cls: Any, theirs: Any) -> None:
    ours, _, other = pair(variant, fields, cls, theirs, torch.bfloat16)
    exact = copy.deepcopy(ours).double()
    x = X.bfloat16()
    with torch.no_grad():
        wanted = exact(x.double())
        # Both round a few times; PEFT's factors are in float32, so ours may be a little further off.
        errors = [(model(x).double() - wanted).norm() for model in (ours, other)]
        assert errors[0] < 3 * errors[1] + 2**-8 * wanted.norm()


def test_what_pvera_and_randlora_draw_is_pefts_bit_for_bit() -> None:
    for variant, fields, cls, theirs in CASES[:4]:
        other = theirs_of(toy(), cls, theirs | {"projection_prng_key": 7})
        ours = toy()
        ll.attach(ours, ll.config_for(variant)(target_names="fc", seed=7, **fields))
        for name in "AB":
            wanted = getattr(other.base_model, f"{variant}_{name}")["default"].float()
            assert torch.equal(getattr(ours.lora_shared, name), wanted) or fields.get(
                "sparse", fields.get("very_sparse")
            )
            torch.testing.assert_close(getattr(ours.lora_shared, name), wanted)  # PEFT's std rounds in float32


def test_what_tinylora_draws_is_pefts_bit_for_bit() -> None:
    ours, other = toy(), theirs_of(toy(), peft.TinyLoraConfig, {"u": 5, "projection_seed": 9})
    adapter = ll.attach(ours, ll.TinyLoRAConfig(target_names="fc", u=5, seed=9))
    modules = dict(other.base_model.model.named_modules())
    for path in PATHS:
        layer: Any = modules[path]
        stored = {key.rpartition(".")[2]: t for key, t in adapter.named_tensors() if key.startswith(f"{path}.")}
        assert torch.equal(stored["lora_P"], layer.tinylora_P["default"])
        product = layer.tinylora_B["default"] @ layer.tinylora_A["default"]  # of singular pairs, signs drop out
        torch.testing.assert_close(stored["lora_U"] @ stored["lora_V"], product, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("weight_tying", "groups"), [(0.0, [0, 1, 2, 3]), (0.5, [0, 0, 1, 1]), (0.25, [0, 1, 2, 2]), (1.0, [0] * 4)]
)
def test_tinyloras_layers_share_by_groups_in_order(weight_tying: float, groups: list[int]) -> None:
    ours = toy()
    adapter = ll.attach(ours, ll.TinyLoRAConfig(target_names="fc", u=5, weight_tying=weight_tying))
    tensors = dict(adapter.named_tensors())
    assert [int(tensors[f"{path}.lora_group"]) for path in PATHS] == groups
    assert len(ours.lora_shared.v) == 1 + groups[-1]


def test_pveras_samples_are_pefts_of_the_same_noise() -> None:
    """And the backward draws them again."""
    ours, _, other = pair("pvera", {"r": 6}, peft.PveraConfig, {"r": 6}, torch.float32)
    path, x = "layers.0.fc1", torch.randn(7, 24)
    layer, their_layer = ours.get_submodule(path).train(), other.base_model.model.get_submodule(path).train()
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, ()))
    their_layer.pvera_generator["default"] = torch.Generator().manual_seed(seed)
    torch.manual_seed(5)
    y, wanted = layer(x), their_layer(x)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y, layer.eval()(x), atol=1e-3)
    y.square().sum().backward()
    wanted.square().sum().backward()
    for name, theirs in (("lora_d", "pvera_lambda_d"), ("lora_b", "pvera_lambda_b")):
        gradient = getattr(their_layer, theirs)["default"].grad
        torch.testing.assert_close(getattr(layer, name).grad, gradient, rtol=1e-4, atol=1e-4)


def test_pvera_draws_the_same_samples_under_checkpointing() -> None:
    gradients = []
    for run in (lambda layer, x: layer(x), lambda layer, x: checkpoint(layer, x, use_reentrant=False)):
        ours = toy().train()
        perturb(ll.attach(ours, ll.PVeRAConfig(target_names="fc", r=6)), 0.3)
        torch.manual_seed(4)
        x = X
        for layer in ours.layers:
            x = run(layer, x)
        x.square().mean().backward()
        gradients.append(ours.layers[0].fc1.lora_d.grad)
    torch.testing.assert_close(*gradients)


def test_pvera_that_samples_at_inference_has_no_weight() -> None:
    ours = toy().eval()
    perturb(ll.attach(ours, ll.PVeRAConfig(target_names="fc1", r=6, sample_at_inference=True)), 0.3)
    assert not torch.equal(ours(X), ours(X))
    with pytest.raises(ll.VariantError, match="not affine in x"):
        ll.merge(ours)


def test_lilys_output_is_of_the_whole_batch_and_a_merge_refuses_it() -> None:
    ours = toy().eval()
    perturb(ll.attach(ours, ll.LilyConfig(target_names="fc", r=4)), 0.5)
    assert not torch.allclose(ours(X)[:1], ours(X[:1]), atol=1e-4)
    with pytest.raises(ll.VariantError, match="'lily' is not affine in x"):
        ll.merge(ours)


def test_lilys_layers_share_by_name_and_stride() -> None:
    shared = {}
    for fields in ({}, {"stride_A": 2}):
        ours = toy()
        ll.attach(ours, ll.LilyConfig(target_names="fc", r=4, **fields))
        shared[str(fields)] = {name for name, _ in ours.lora_shared.tensors()}
    apart = ll.attach(ours, ll.LilyConfig(target_names="fc", r=4, share=False), "apart")
    assert {key.rpartition(".")[2] for key, _ in apart.named_tensors()} == {"lora_down", "lora_up", "lora_router"}
    names = ["B_layers_fc1", "B_layers_fc2"]
    own = [f"A_layers_{n}_fc{k}" for n in range(2) for k in (1, 2)]
    assert shared["{}"] == {*own, *names}
    assert shared["{'stride_A': 2}"] == {"A_layers_0_fc1", "A_layers_0_fc2", *names}


@pytest.mark.parametrize("variant", ["tinylora", "unilora"])
def test_the_backward_is_of_the_tensors_that_the_forward_had(variant: str) -> None:
    model: Any = nn.Sequential(nn.Linear(8, 12))
    adapter = ll.attach(model, ll.config_for(variant)(target_names="0"))
    perturb(adapter, 0.3)
    other = {name: 2 * tensor for name, tensor in model.named_buffers() if tensor.is_floating_point()}
    x, trained = torch.randn(5, 8), list(adapter.parameters())
    out = torch.func.functional_call(model, other, (x,))
    got = torch.autograd.grad(out.square().sum(), trained)
    assert not model.load_state_dict(other, strict=False).unexpected_keys
    torch.testing.assert_close(got, torch.autograd.grad(model(x).square().sum(), trained))


def test_lily_is_on_layers_that_are_called_alone() -> None:
    """A kernel or a projection has no tokens, so their mean would be that of the unit vectors."""
    cfg = ll.LilyConfig(r=2, target_names="0", kinds=("linear", "conv", "embedding"))
    for layer in (nn.Conv2d(4, 8, 1), nn.Embedding(12, 8), nn.MultiheadAttention(8, 2)):
        with pytest.raises(ll.ConfigError, match="no call shows the tokens"):
            ll.attach(nn.Sequential(layer), cfg)


def test_lilys_layers_of_one_name_have_one_size_or_tensors_of_their_own() -> None:
    blocks = [nn.ModuleDict({"q": nn.Linear(8, n), "o": nn.Linear(n, 8)}) for n in (12, 6, 12)]
    model = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
    with pytest.raises(ll.ConfigError, match=r"layers\.1\.q: other layers of its name have another size"):
        ll.attach(model, ll.LilyConfig(r=2, target_names="q$"))
    assert ll.attach(model, ll.LilyConfig(r=2, target_names="q$", share=False)).layers


def test_uniloras_indices_are_balanced_at_each_layer_and_know_no_other_layer() -> None:
    tables = []
    for names in ("fc", "fc2"):
        ours = toy()
        adapter = ll.attach(ours, ll.UniLoRAConfig(target_names=names, theta_d_length=60))
        tensors = dict(adapter.named_tensors())
        tables.append(tensors["layers.1.fc2.lora_indices_A"])
        entries = torch.cat(
            [t.flatten() for key, t in tensors.items() if "fc2.lora_indices" in key and "layers.1" in key]
        )
        counts = entries.int().bincount(minlength=60)
        assert counts.max() - counts.min() == 1
    assert torch.equal(*tables)
    assert tables[0].dtype == torch.uint8
    every = torch.cat([t.flatten() for key, t in tensors.items() if "indices" in key]).int().bincount(minlength=60)
    torch.testing.assert_close(ours.lora_shared.norms, every.float().rsqrt())


@pytest.mark.parametrize(("length", "dtype"), [(256, torch.uint8), (257, torch.int16), (1 << 16, torch.int32)])
def test_uniloras_tables_are_as_small_as_their_numbers(length: int, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(200, 100))
    adapter = ll.attach(model, ll.UniLoRAConfig(target_names="0", theta_d_length=length))
    tensors = dict(adapter.named_tensors())
    table = tensors["0.lora_indices_A"]
    assert table.dtype == dtype
    assert int(table.max()) < length
    perturb(adapter)
    y = model(torch.randn(3, 200))
    assert y.isfinite().all()


@pytest.mark.parametrize(
    ("cfg", "match"),
    [
        (lambda: ll.VBLoRAConfig(topk=300), "topk=300.*at most num_vectors, 256"),
        (lambda: ll.VBLoRAConfig(init_logits_std=0.0), "init_logits_std=0.0.*above 0"),
        (lambda: ll.RandLoRAConfig(alpha=0.0), "alpha=0.0.*above 0"),
        (lambda: ll.RandLoRAConfig(seed=1 << 31), "seed=2147483648.*from 0 to"),
        (lambda: ll.UniLoRAConfig(theta_d_length=0), "theta_d_length=0.*at least 1"),
        (lambda: ll.UniLoRAConfig(seed=-1), "seed=-1.*from 0 to"),
        (lambda: ll.UniLoRAConfig(dropout=1.0), "dropout=1.0.*below 1"),
        (lambda: ll.TinyLoRAConfig(u=0), "u=0.*at least 1"),
        (lambda: ll.TinyLoRAConfig(weight_tying=1.5), "weight_tying=1.5.*from 0 to 1"),
        (lambda: ll.LilyConfig(num_B=1), "num_B=1.*at least 2"),
        (lambda: ll.LilyConfig(stride_A=0), "stride_A=0.*at least 1"),
        (lambda: ll.LilyConfig(scaling=0.0), "scaling=0.0.*other than 0"),
    ],
)
def test_a_bad_field_is_named(cfg: Any, match: str) -> None:
    with pytest.raises(ll.ConfigError, match=match):
        cfg()


def test_vblora_wants_sides_that_its_vectors_divide() -> None:
    with pytest.raises(
        ll.ConfigError, match=r"layers.0.fc1: vector_length 16 divides not both of its sides, 24 and 32"
    ):
        ll.attach(toy(), ll.VBLoRAConfig(target_names="fc", vector_length=16))


FIELDS: dict[str, dict[str, Any]] = {
    "randlora": {"r": 3, "alpha": 6.0},
    "pvera": {"r": 4},
    "vblora": {"num_vectors": 8, "vector_length": 4},
    "unilora": {"theta_d_length": 20},
    "tinylora": {"u": 4},
}
KINDS: list[tuple[nn.Module, Tensor]] = [
    (nn.Conv1d(4, 8, 3, padding=1), torch.randn(2, 4, 6)),
    (nn.Conv2d(8, 12, 3, groups=2, stride=2), torch.randn(2, 8, 7, 7)),
    (nn.Conv2d(4, 8, 1), torch.randn(2, 4, 5, 5)),
    (nn.Embedding(12, 8), torch.arange(10).reshape(2, 5)),
]


@pytest.mark.parametrize("variant", FIELDS)
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_a_convolution_or_an_embedding_is_its_matrix(variant: str, kind: int) -> None:
    layer, x = KINDS[kind]
    model: Any = nn.Sequential(copy.deepcopy(layer)).eval()
    kinds = ("embedding",) if isinstance(layer, nn.Embedding) else ("conv",)
    adapter = ll.attach(model, ll.config_for(variant)(target_names="0", kinds=kinds, **FIELDS[variant]))
    perturb(adapter, 0.4)
    tensors = {key.removeprefix("0."): t.detach() for key, t in adapter.named_tensors()}
    stored = layer.weight.detach()
    matrix = stored.mT if kinds == ("embedding",) else stored.flatten(1)  # (o, i)
    unit = torch.eye(matrix.shape[1])
    new = ORACLES[variant](matrix, torch.zeros(len(matrix)), adapter.config, tensors, unit).mT
    plain = copy.deepcopy(layer)
    plain.weight.data = new.mT if kinds == ("embedding",) else new.view(stored.shape)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(x), layer(x), atol=1e-3)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())


@pytest.mark.parametrize("variant", [*FIELDS, "lily"])
def test_fused_experts_have_tensors_of_their_own_and_share(variant: str) -> None:
    model = moe("mixtral", num_hidden_layers=1, num_local_experts=2)
    cfg = ll.config_for(variant)(target_names="experts", kinds=("experts",), **FIELDS.get(variant, {"r": 4}))
    adapter = ll.attach(model, cfg)
    perturb(adapter, 0.2)
    ids = torch.arange(12).reshape(2, 6)
    before = model(input_ids=ids).logits
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
    with ll.disabled(model):
        assert not torch.allclose(before, model(input_ids=ids).logits, atol=1e-4)
    if variant == "lily":
        return
    ll.merge(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-3, atol=1e-4)


# ---- memory ---------------------------------------------------------------------------------------


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps of one forward in training, parameters and buffers aside; each storage once."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model.train()(x)
    of_model = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    total = sum(s.nbytes() for address, s in storages.items() if address not in of_model)
    del y
    return total


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(576, 1536)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


INPUT = 64 * 576 * 4
KEPT = {  # bytes at 64 tokens: x itself; of PVeRA A x in its place, of Lily h and p too, of TinyLoRA h and v alone
    "randlora": (INPUT, peft.RandLoraConfig, {}, {}),
    "pvera": (64 * 2 * 256 * 4, peft.PveraConfig, {}, {}),
    "vblora": (INPUT, peft.VBLoRAConfig, {"vector_length": 192}, {"vector_length": 192}),
    "unilora": (INPUT, peft.UniLoraConfig, {}, {}),
    "tinylora": (None, peft.TinyLoraConfig, {}, {}),
    "lily": (INPUT + 64 * 32 * 4 + 2 * 4, peft.LilyConfig, {}, {}),
}


@pytest.mark.parametrize("variant", KEPT)
def test_the_backward_keeps_no_more_than_pefts(variant: str) -> None:
    wanted, cls, fields, theirs = KEPT[variant]
    x = torch.randn(64, 576)
    ours = One()
    ll.attach(ours, ll.config_for(variant)(target_names="fc", **fields))
    other = peft.get_peft_model(One(), cls(target_modules=["fc"], **theirs))
    bytes_kept = kept(ours, x), kept(other, x)
    print(variant, *bytes_kept)
    assert bytes_kept[0] <= bytes_kept[1]
    assert wanted is None or bytes_kept[0] == wanted
