"""LoRA+, LoRA-FA, and the rank and learning rate that `suggest` gives."""

from functools import partial
from typing import Any

import peft
import pytest
import torch
from models import IDS, OneLinear, attach, config, is_trained, loss_of, moe, tiny_llama, train
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, lorafa
from test_low_rank import kept, operands

import lora_lite as ll
from lora_lite.ops.low_rank import add_low_rank

# ---- LoRA+ ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [v for v in sorted(ll.REGISTRY) if v != "history" and is_trained(v)])
def test_every_trained_tensor_is_in_exactly_one_group(variant: str) -> None:
    model = tiny_llama(bias=True)
    adapter = attach(model, config(variant))
    groups = ll.param_groups(adapter, 1e-3, ratio=8.0)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in adapter.parameters()}
    fast = {id(p) for group in groups if group["lr"] == 8e-3 for p in group["params"]}
    assert fast == {id(t) for key, t in adapter.named_tensors() if key.endswith("lora_B") and t.requires_grad}
    torch.optim.AdamW(groups).step()


def test_the_groups_are_pefts() -> None:
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    names = {id(p): name for name, p in theirs.named_parameters()}
    wanted = {names[id(p)].split(".")[-3]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    model = tiny_llama()
    adapter = ll.attach(model, ll.LoRAConfig(r=4, target_names="q_proj"))
    mine = {id(t): key.rpartition(".")[2] for key, t in adapter.named_tensors()}
    groups = ll.param_groups(adapter, 1e-3)
    assert {mine[id(p)]: g["lr"] for g in groups for p in g["params"]} == wanted


def test_of_several_methods_each_b_counts() -> None:
    adapter = ll.attach(tiny_llama(), [ll.LoRAConfig(r=2), ll.PiSSAConfig(r=2, target_names="q_proj")])
    slow, fast = ll.param_groups(adapter, 1.0)
    assert len(fast["params"]) == len(slow["params"]) == 14 + 2


@pytest.mark.parametrize(
    ("lr", "ratio", "name"), [(0.0, 16.0, "lr=0.0"), (1e-3, -1.0, "ratio=-1.0"), (float("nan"), 1.0, "lr=nan")]
)
def test_rates_are_numbers_above_zero(lr: float, ratio: float, name: str) -> None:
    adapter = ll.attach(tiny_llama(), ll.LoRAConfig(r=2))
    with pytest.raises(ll.ConfigError, match=rf"{name}: wanted a number above 0"):
        ll.param_groups(adapter, lr, ratio)


# ---- LoRA-FA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_with_a_frozen_r_numbers_a_token_are_all_that_is_kept(dtype: torch.dtype, dropout: float) -> None:
    y, x, *_ = operands(dtype)
    _, _, a, b, gain, _ = operands(torch.float32)
    a = a.detach()
    h = x.numel() // x.shape[-1] * len(a) * x.itemsize
    for more, besides in (({}, ()), ({"gain": gain}, (y,))):
        bytes_kept = kept(lambda more=more: add_low_rank(y, x, a, b, 2.0, dropout, **more), a, b, gain)
        assert all(bytes_kept.pop(t.untyped_storage().data_ptr()) for t in besides)
        assert sorted(bytes_kept.values()) == [0, h]  # and not x


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("gained", [False, True])
def test_the_other_gradients_are_what_they_are_with_a_trained(dropout: float, gained: bool) -> None:
    results = []
    for frozen in (False, True):
        y, x, a, b, gain, bias = operands()
        a = a.detach() if frozen else a
        torch.manual_seed(0)
        more: dict[str, Any] = {"gain": gain, "c": 0.5, "bias": bias} if gained else {}
        add_low_rank(y, x, a, b, 1.7, dropout, **more).square().sum().backward()
        results.append([t.grad for t in (y, x, b, *((gain, bias) if gained else ()))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_second_derivative_with_a_frozen_is_right_or_refused() -> None:
    y, x, a, b, *_ = operands(rows=(2,))
    a, b_frozen = a.detach(), b.detach()
    assert torch.autograd.gradgradcheck(lambda y, x: add_low_rank(y, x, a, b_frozen, 1.7), (y, x))  # as a history
    (db,) = torch.autograd.grad(add_low_rank(y, x, a, b, 1.7).square().sum(), b)
    with pytest.raises(RuntimeError, match="a second derivative with A frozen: x isn't kept"):
        torch.autograd.grad(add_low_rank(y, x, a, b, 1.7).square().sum(), b, create_graph=True)
    assert db.any()


def test_what_a_layer_keeps_falls_with_its_width() -> None:
    """x (50, 512) and h (50, 4) with A trained; h alone with it frozen."""
    sizes = []
    for freeze_a in (False, True):
        model = OneLinear(512, 16).train()
        adapter = ll.attach(model, ll.LoRAConfig(r=4, freeze_a=freeze_a, target_names="proj"))
        assert len(list(adapter.parameters())) == 2 - freeze_a
        tensors = [*(tensor for _, tensor in adapter.named_tensors()), *model.parameters()]
        sizes.append(sum(kept(partial(model, torch.randn(50, 512)), *tensors).values()))
    assert sizes == [50 * 4 * (512 + 4), 50 * 4 * 4]


def test_only_b_is_trained_and_a_is_in_the_file(tmp_path: Any) -> None:
    model = tiny_llama()
    adapter = ll.attach(model, ll.LoRAConfig(r=4, freeze_a=True))
    start = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    train(model, adapter)
    moved = {key.rpartition(".")[2] for key, t in adapter.state_dict().items() if not torch.equal(t, start[key])}
    assert moved == {"lora_B"}
    ll.save(model, tmp_path / "a.safetensors")
    assert ll.load(tiny_llama(), tmp_path / "a.safetensors").config.freeze_a
    ll.save_peft(model, tmp_path / "peft")
    theirs: Any = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "peft").eval()
    torch.testing.assert_close(theirs(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    assert "freeze_a" not in ll.LoRAConfig().to_dict()  # older versions read what doesn't use it


def test_the_corrected_step_is_the_full_ones_nearest() -> None:
    """s ΔB A = G P, with P the projection on A's rows, for ΔB = dB (A Aᵀ)⁻¹/s²."""
    torch.manual_seed(0)
    model: Any = OneLinear(16, 24)
    adapter = ll.attach(model, ll.LoRAConfig(r=4, alpha=12.0, freeze_a=True, target_names="proj"))
    adapter.scale = 0.5
    x = torch.randn(32, 16)
    weight = model.proj.weight.detach().clone().requires_grad_()
    (full,) = torch.autograd.grad((x @ weight.T + model.proj.bias).square().sum(), weight)
    model(x).square().sum().backward()
    ll.correct_gradients(adapter)
    a, b = (tensor for _, tensor in adapter.named_tensors())
    projection = a.mT @ torch.linalg.inv(a @ a.mT) @ a
    torch.testing.assert_close(0.5 * 3 * b.grad @ a, full @ projection, rtol=1e-3, atol=1e-2)


def test_the_correction_is_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first moment in their optimiser after a step, without the bfloat16 that it rounds the correction to."""
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    theirs: Any = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    optimizer = create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=1e-3)
    model = tiny_llama()
    adapter = ll.attach(model, ll.LoRAConfig(r=4, alpha=8.0, freeze_a=True, target_names="q_proj"))
    named = dict(theirs.named_parameters())
    for key, tensor in adapter.named_tensors():
        tensor.data.copy_(named[f"base_model.model.{key}.default.weight"].data)
    loss_of(theirs).backward()
    optimizer.step()
    loss_of(model).backward()
    ll.correct_gradients(adapter)
    for key, tensor in adapter.named_tensors():
        if tensor.grad is not None:
            state = optimizer.state[f"base_model.model.{key.removesuffix('_B')}"]
            torch.testing.assert_close(tensor.grad, state["exp_avg_B"] / 0.1, rtol=1e-3, atol=1e-6)
    assert len(optimizer.state) == len(adapter.targets)


def test_the_correction_of_experts_is_one_for_each() -> None:
    model = moe("qwen3")
    cfg = ll.LoRAConfig(r=2, freeze_a=True, kinds="experts", target_names="down_proj")
    adapter = ll.attach(model, cfg)
    loss_of(model).backward()
    before = {key: t.grad.clone() for key, t in adapter.named_tensors() if t.grad is not None}
    ll.correct_gradients(adapter)
    tensors = dict(adapter.named_tensors())
    for key, gradient in before.items():
        a = tensors[key.replace("lora_B", "lora_A")]
        wanted = torch.stack([g @ torch.linalg.inv(m @ m.mT) for g, m in zip(gradient, a, strict=True)])
        torch.testing.assert_close(tensors[key].grad, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (ll.LoRAConfig(r=2), r"'default': no A of it is frozen\n  use LoRAConfig\(freeze_a=True\)"),
        (ll.DoRAConfig(r=2, freeze_a=True), r"correction is of s B A alone, not of 'dora'"),
        (ll.IA3Config(), r"no A of it is frozen"),
    ],
)
def test_what_has_no_correction(cfg: Any, message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        ll.correct_gradients(ll.attach(tiny_llama(), cfg))


# ---- suggest --------------------------------------------------------------------------------------


class Wide(OneLinear):
    """A model that says how wide it is, and of which family."""

    def __init__(self, family: str, width: int) -> None:
        super().__init__(64, 64)
        self.config = type("Config", (), {"model_type": family, "hidden_size": width})()


@pytest.mark.parametrize(
    ("family", "width", "steps", "lr"),
    [
        ("llama", 4096, None, 2.86e-4),  # Llama-3.1-8B: 5e-4 (2000/4096)^0.781
        ("qwen3", 4096, None, 4.73e-4),
        ("qwen3", 2000, None, 5e-4),
        ("llama", 2000, 99, 7.5e-4),
        ("llama", 2000, 100, 5e-4),
        ("gpt2", 768, None, 5.38e-4),  # no family of the rule's: Qwen's exponent
    ],
)
def test_the_learning_rate_is_the_rules(family: str, width: int, steps: int | None, lr: float) -> None:
    suggestion = ll.suggest(Wide(family, width), steps=steps)
    assert suggestion.lr == pytest.approx(lr, rel=5e-3)
    assert (suggestion.rank, suggestion.alpha) == (32, 32.0)
    assert ("not fitted for gpt2" in str(suggestion)) == (family == "gpt2")
    assert "thinkingmachines.ai" in str(suggestion)


@pytest.mark.parametrize(
    ("tokens", "rank", "says"),
    [
        (None, 32, "its default; 4,096 parameters hold about 8,192 bits"),
        (8192, 32, "4,096 parameters hold about 8,192 bits, 8,192 tokens tell about one each"),
        (8193, 64, "8,192 parameters hold about 16,384 bits"),
        (10**9, 256, "65,536 bits for 1,000,000,000 tokens, about a bit each: too few"),
    ],
)
def test_the_rank_holds_the_data(tokens: int | None, rank: int, says: str) -> None:
    suggestion = ll.suggest(Wide("llama", 64), tokens=tokens)  # a layer of 64 x 64: 128 parameters a rank
    assert (suggestion.rank, suggestion.parameters) == (rank, 128 * rank)
    assert says in suggestion.text
    assert ll.suggest(Wide("llama", 64), "rl", tokens=tokens).rank == 8


def test_it_can_be_attached() -> None:
    model = tiny_llama()
    suggestion = ll.suggest(model)
    adapter = ll.attach(model, ll.LoRAConfig(r=suggestion.rank, alpha=suggestion.alpha))
    assert sum(p.numel() for p in adapter.parameters()) == suggestion.parameters
    assert adapter.config.scaling == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "dpo"}, r"task='dpo': wanted 'sft' or 'rl'"),
        ({"tokens": 0}, r"tokens=0: wanted a number above 0, or None"),
        ({"steps": -1}, r"steps=-1: wanted a number above 0, or None"),
    ],
)
def test_what_suggest_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        ll.suggest(tiny_llama(), **arguments)
    with pytest.raises(ll.ConfigError, match="OneLinear has no config with a hidden size"):
        ll.suggest(OneLinear())
