"""LoHa, LoKr, HiRA, GraLoRA, GLoRA, MiSS, BEFT and PEANuT against PEFT's layers, and what is theirs alone."""

from typing import Any

import peft
import pytest
import torch
from models import perturb
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import lora_lite as ll

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LINEAR, CONV1, CONV2, EMBEDDING = "0|1", "conv1", "conv2", "embedding"
SIGMOID = {"depth": 2, "act_fn": "sigmoid"}
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [  # variant, model, our fields, PEFT's
    ("loha", LINEAR, {"r": 3, "alpha": 6.0}, {"r": 3, "alpha": 6}),
    ("loha", CONV1, {"r": 3}, {"r": 3, "alpha": 3}),
    ("loha", CONV1, {"r": 3, "use_effective_conv2d": True}, {"r": 3, "alpha": 3, "use_effective_conv2d": True}),
    ("loha", CONV2, {"r": 3, "use_effective_conv2d": True}, {"r": 3, "alpha": 3, "use_effective_conv2d": True}),
    ("lokr", LINEAR, {"r": 8}, {"r": 8}),
    ("lokr", LINEAR, {"r": 2, "alpha": 8.0}, {"r": 2}),
    ("lokr", LINEAR, {"r": 1, "decompose_both": True}, {"r": 1, "alpha": 1, "decompose_both": True}),
    ("lokr", LINEAR, {"r": 2, "decompose_factor": 4}, {"r": 2, "alpha": 2, "decompose_factor": 4}),
    ("lokr", LINEAR, {"r": 2, "decompose_factor": 7}, {"r": 2, "alpha": 2, "decompose_factor": 7}),
    ("lokr", CONV1, {"r": 2}, {"r": 2, "alpha": 2}),
    ("lokr", CONV1, {"r": 2, "use_effective_conv2d": True}, {"r": 2, "alpha": 2, "use_effective_conv2d": True}),
    ("lokr", CONV2, {"r": 8}, {"r": 8}),
    ("lokr", CONV2, {"r": 2, "use_effective_conv2d": True}, {"r": 2, "alpha": 2, "use_effective_conv2d": True}),
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
    fields = {"r": 3, "use_effective_conv2d": True}
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
    exact, *_, x64 = pair(case, torch.float64)
    with torch.no_grad():
        got, wanted, true = ours(x), theirs(x), exact(x64)
    assert got.dtype == torch.bfloat16
    error, other = ((y.double() - true).norm() / true.norm() for y in (got, wanted))
    assert error < 0.012
    assert error < 2 * other + 0.002


@per_case
def test_the_backward_keeps_at_most_what_pefts_does(case: Any) -> None:
    ours, theirs, _, x = pair(case)
    assert kept(ours, x) <= kept(theirs, x)


def kept(model: Any, x: Tensor) -> int:
    """The bytes that autograd keeps of one forward, parameters aside."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model.train()(x)
    assert y.requires_grad
    of_model = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    return sum(size for address, size in storages.items() if address not in of_model)
