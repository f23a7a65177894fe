"""The runtime around sites that are reached through their weight: files, scales, copies, several adapters, cost."""

import copy
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from models import gradients_of, moe, perturb
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lora_lite as ll

IDS = torch.arange(1, 13).reshape(2, 6)
EXPERTS = ll.LoRAConfig(r=2, kinds=["experts"])


def mixtral(**fields) -> nn.Module:
    model = moe("mixtral", **fields).requires_grad_(False)
    model.set_experts_implementation("eager")
    return model


spread = partial(perturb, size=0.2)


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_a_file_is_read_bit_equal_and_its_keys_name_the_parameter(tmp_path: Path) -> None:
    model = mixtral()
    adapter = ll.attach(model, EXPERTS)
    spread(adapter)
    attached = logits(model)
    assert set(adapter.state_dict()) == {
        f"model.layers.{i}.mlp.experts.{p}.lora_{x}"
        for i in (0, 1)
        for p in ("gate_up_proj", "down_proj")
        for x in "AB"
    }
    assert "model.layers.0.mlp.experts.lora_gate_up_proj_A" in model.state_dict()
    ll.save(model, tmp_path / "a.safetensors")
    fresh = mixtral()
    ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(logits(fresh), attached)
    ll.restore(model, tmp_path / "a.safetensors")


def test_scale_copies_pickles_and_two_adapters_on_one_weight() -> None:
    model, base = mixtral(), logits(mixtral())
    spread(ll.attach(model, EXPERTS))
    one = logits(model)
    assert not torch.equal(one, base)
    with ll.scaled(model, 0.0):
        assert torch.equal(logits(model), base)
    spread(ll.attach(model, ll.IA3Config(kinds=["experts"], target_names=["gate_up_proj$"]), "second"))
    two = logits(model)
    assert not torch.equal(two, one)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), two)
        ll.detach(other)
        assert torch.equal(logits(other), base)
    ll.detach(model, "second")
    assert torch.equal(logits(model), one)
    ll.detach(model)
    assert torch.equal(logits(model), base)
    assert not any("lora" in key for key in model.state_dict())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_forward_that_fails_leaves_the_parameter_in_its_place() -> None:
    model = mixtral()
    ll.attach(model, EXPERTS)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[1000]]))
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(TypeError):
        experts(None)
    assert "gate_up_proj" not in vars(experts)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_under_checkpointing(reentrant: bool) -> None:
    gradients = [gradients_of(mixtral(), EXPERTS, IDS, each) for each in (None, reentrant)]
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_update_costs_what_its_routed_tokens_cost(implementation: str) -> None:
    """64 experts, 4 for the one token: at most 1.1 · 4/64 of the multiplications of a delta for every expert."""
    model = mixtral(num_local_experts=64, num_experts_per_tok=4, num_hidden_layers=1)
    model.set_experts_implementation(implementation)
    one = torch.tensor([[5]])

    def flops() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=one)
        return counter.get_total_flops()

    without = flops()
    spread(ll.attach(model, EXPERTS))
    added = flops() - without
    r, h, f = 2, model.config.hidden_size, model.config.intermediate_size
    every = 2 * 64 * r * (2 * f * h + h * f)  # B A of both projections, for all experts
    routed = 2 * 4 * r * ((h + 2 * f) + (f + h))
    assert 0 < added <= 1.1 * 4 / 64 * every
    assert added == routed


def test_dropout_where_no_input_is_seen_is_refused_in_training_only() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    ll.attach(model, ll.LoRAConfig(r=2, dropout=0.5))
    x = torch.randn(2, 3, 8)
    model.eval()(x)
    with pytest.raises(ll.TargetError, match=r"self_attn.in_proj_weight: dropout acts on a layer's input"):
        model.train()(x)


def test_a_method_that_adds_a_constant_is_refused_where_the_weight_has_no_output() -> None:
    @ll.register
    class Adds:
        name = "adds_a_constant"

        @staticmethod
        def param_specs(d_in, d_out, cfg):
            return {"lora_c": ll.ParamSpec((d_out,), init="ones")}

        @staticmethod
        def forward(layer, x, y):
            return y + layer.lora_c

    try:
        model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        ll.attach(model, ll.AdapterConfig(variant="adds_a_constant", target_names=["in_proj"]))
        with pytest.raises(ll.VariantError, match="adds a constant, and no weight holds one"):
            model(torch.randn(2, 3, 8))
    finally:
        del ll.REGISTRY["adds_a_constant"]


def test_kinds_are_checked_and_named_in_errors() -> None:
    with pytest.raises(ll.ConfigError, match="kinds"):
        ll.LoRAConfig(kinds=["convolution"])
    with pytest.raises(ll.TargetError, match=r"kinds=\('conv',\)"):
        ll.plan(mixtral(), ll.LoRAConfig(kinds=["conv"]))


def test_merging_experts_equals_the_attached_adapter_and_unmerges() -> None:
    model = mixtral()
    before = logits(model)
    spread(ll.attach(model, ll.DoRAConfig(r=2, kinds=["experts"])))
    attached = logits(model)
    ll.merge(model)
    torch.testing.assert_close(logits(model), attached, atol=1e-5, rtol=1e-5)
    ll.unmerge(model)
    assert torch.equal(logits(model), attached)
    ll.merge(model, keep=False)
    torch.testing.assert_close(logits(model), attached, atol=1e-5, rtol=1e-5)
    assert not torch.equal(logits(model), before)


def test_a_history_keeps_rounds_on_bare_parameters() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    x = torch.randn(2, 3, 8)
    spread(ll.attach(model, ll.LoRAConfig(r=2)))
    attached = model(x)
    ll.freeze_into(model, "default")
    torch.testing.assert_close(model(x), attached, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cfg", [ll.LoRAConfig, ll.DoRAConfig, ll.IA3Config], ids=lambda c: c.__name__)
def test_an_embedding_in_16_bits_gives_16_bits(cfg) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 3)).bfloat16().eval()
    rank = {} if cfg is ll.IA3Config else {"r": 2}
    spread(ll.attach(model, cfg(kinds=["embedding"], target_names=["."], **rank)))
    out = model(torch.tensor([[1, 2]]))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.proj.weight.T


class ByAnother(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class ByMethod(Reads):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def inner(this, x: torch.Tensor) -> torch.Tensor:  # noqa: N805  a first argument of another name
        return torch.nn.functional.linear(x, this.proj.weight)


class Questions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) if isinstance(self.proj.weight, torch.Tensor) and self.proj.weight.dtype else x


class CallsToo(Questions):
    """As Bloom's dense layers: one branch calls, another reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) if x.ndim < 3 else x @ self.proj.weight.T


@pytest.mark.parametrize(
    ("cls", "read"), [(Reads, True), (ByAnother, True), (ByMethod, True), (Questions, False), (CallsToo, False)]
)
def test_readers_are_found_in_code(cls, read: bool) -> None:
    model = nn.Sequential(cls()).eval()
    x = torch.randn(2, 4)
    adapter = ll.attach(model, ll.LoRAConfig(r=2, target_names=["proj"]))
    assert [target.by_weight for target in adapter.layers] == [read]
    before = model(x)
    spread(adapter)
    assert not torch.allclose(model(x), before)


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.a.T @ self.b.T @ self.c.T


def test_three_parameters_of_one_module_go_through_pefts_format(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("three", Three())
    fresh = copy.deepcopy(model)
    spread(ll.attach(model, ll.LoRAConfig(r=2, kinds=["matrix"])))
    x = torch.randn(2, 4)
    ll.save_peft(model, tmp_path)
    ll.load_peft(fresh, tmp_path)
    torch.testing.assert_close(fresh(x), model(x))


def test_a_replica_of_data_parallel_computes_the_same() -> None:
    """Its parameters are plain attributes: `nn.DataParallel` makes it so, and needs several devices to run."""
    model = mixtral()
    spread(ll.attach(model, ll.DoRAConfig(r=2, kinds=["experts"], target_names=["down_proj$"])))
    wanted = logits(model)
    experts = model.model.layers[0].mlp.experts
    replica = experts._replicate_for_data_parallel()
    for name, parameter in experts.named_parameters(recurse=False):
        setattr(replica, name, parameter.detach())
    for name, buffer in experts.named_buffers(recurse=False):
        setattr(replica, name, buffer)
    model.model.layers[0].mlp._modules["experts"] = replica
    torch.testing.assert_close(logits(model), wanted)
    assert type(vars(replica)["down_proj"]) is torch.Tensor
