"""`capturable`: a recorded step goes on with scales and values that are set later, or the block refuses by name.

A CUDA graph isn't at hand everywhere. `make_fx` stands in for it: it too records each operation once, on these very
tensors, with every number as it is, and refuses what asks for a tensor's value.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import attach, config, perturb, tiny_llama, trained
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import lora_lite as ll
from lora_lite.core.variant import reason_for_no_graph

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gpu_decode import StaticDecoder, captured

PROMPTS = torch.tensor([[5, 7, 9], [11, 3, 2]])
WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique", "_linalg_check_errors", "lift")
"""Operations that would copy from the host, or wait for the device: none can be captured."""


def recorded(decoder: StaticDecoder) -> tuple[Callable[[], None], set[str]]:
    """A step as a graph of operations on the tensors that it ran on, and the names of the operations."""
    graph = make_fx(lambda unused: decoder.step())(torch.zeros(()))
    decoder.rewind()
    names = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    return lambda: graph(torch.zeros(())), names


def logits(decoder: StaticDecoder, step: Callable[[], None] | None = None, tokens: int = 2) -> Tensor:
    """(tokens, b, vocabulary), from the end of the prompt on."""
    decoder.rewind()
    steps = []
    for _ in range(tokens):
        (step or decoder.step)()
        steps.append(decoder.logits.clone())
    return torch.stack(steps)


def adapted(variant: str, **fields: Any) -> tuple[Any, ll.Adapter, StaticDecoder]:
    model = tiny_llama(num_hidden_layers=1, bias=True)
    adapter = trained(model, variant, **fields)
    return model, adapter, StaticDecoder(model, PROMPTS, 8)


def refusal(variant: str) -> str:
    """Why the block can't take an adapter of this method; nothing where it can."""
    if reason := reason_for_no_graph(config(variant)):
        return reason
    return {"reft": "acts at positions", "tokens": "its module reads the weight"}.get(variant, "")


# ---- a law over the registry ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", [name for name in sorted(ll.REGISTRY) if not refusal(name)])
def test_a_recorded_step_goes_on_with_other_scales_and_values(variant: str) -> None:
    model, adapter, decoder = adapted(variant)
    plain = logits(decoder)
    with ll.disabled(model):
        base = logits(decoder)
    with ll.capturable(model):
        graph, names = recorded(decoder)
        assert not [name for name in names if any(wait in name for wait in WAITS)]
        assert torch.equal(first := logits(decoder, graph), logits(decoder))
        assert torch.allclose(first, plain, atol=1e-5)
        adapter.scale = 0.7
        assert torch.equal(other := logits(decoder, graph), logits(decoder))
        assert not torch.equal(other, first)
        with ll.disabled(model):
            assert torch.equal(logits(decoder, graph), base)  # bit for bit, as without the adapter
        assert torch.equal(logits(decoder, graph), other)
        moved = {key: 1.1 * t if t.is_floating_point() else t for key, t in adapter.state_dict().items()}
        adapter.load_state_dict(moved)
        assert torch.equal(new := logits(decoder, graph), logits(decoder))
        assert not torch.equal(new, other)
    after = logits(decoder)
    assert torch.allclose(after, new, atol=1e-5)
    assert not after.isnan().any()
    assert logits(decoder, graph).isnan().all()  # a replay after the block can't pass for a result
    assert adapter.scale == 0.7


@pytest.mark.parametrize("variant", [name for name in sorted(ll.REGISTRY) if refusal(name)])
def test_what_a_graph_cant_follow_is_refused_by_name(variant: str) -> None:
    model = tiny_llama(num_hidden_layers=1)
    attach(model, config(variant))
    wanted = f"(?s)can't be captured: .*{refusal(variant)}.*\n  merge the adapter, or run it without a graph"
    with pytest.raises(ll.TargetError, match=wanted), ll.capturable(model):
        pass


@pytest.mark.parametrize("variant", [name for name in sorted(ll.REGISTRY) if reason_for_no_graph(config(name))])
def test_what_is_refused_as_a_method_does_bring_numbers_from_the_host(variant: str) -> None:
    decoder = adapted(variant)[2]
    assert any("lift" in name for name in recorded(decoder)[1])


# ---- scales, values, files --------------------------------------------------------------------------


def test_without_the_block_a_graph_has_the_number_of_its_capture() -> None:
    model, _, decoder = adapted("lora")
    graph = recorded(decoder)[0]
    before = logits(decoder, graph)
    with ll.scaled(model, 0.5):
        assert torch.equal(logits(decoder, graph), before)
        assert not torch.equal(logits(decoder), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_in_the_block_the_scale_is_as_exact_as_a_number(variant: str, dtype: torch.dtype) -> None:
    """For few tokens, and for more, whose products are in the layers' dtype."""
    model = tiny_llama(dtype, num_hidden_layers=1)
    trained(model, variant).scale = 0.7
    for tokens in (4, 24):
        with torch.no_grad():
            ids = torch.arange(tokens)[None]
            plain = model(ids).logits
            with ll.capturable(model):
                assert torch.allclose(model(ids).logits, plain, atol=1e-5 if dtype == torch.float32 else 0.02)


def test_one_graph_serves_several_files(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=1)
    cfg = ll.LoRAConfig(r=4, target_names="q_proj|down_proj")
    for i, r in enumerate((2, 4)):
        perturb(adapter := ll.attach(model, ll.LoRAConfig(r=r, alpha=2.0, target_names="q_proj")), seed=i)
        adapter.scale = (0.5, 1.0)[i]
        ll.save(model, tmp_path / f"{i}.safetensors")
        ll.detach(model)
    ll.attach(model, cfg, max_rank=4)
    decoder = StaticDecoder(model, PROMPTS, 8)
    with ll.capturable(model):
        graph = recorded(decoder)[0]
        outputs = []
        for i in (0, 1):
            ll.load(model, tmp_path / f"{i}.safetensors", replace=True)
            outputs.append(logits(decoder, graph))
            assert torch.equal(outputs[-1], logits(decoder))
    assert not torch.equal(*outputs)
    ll.detach(model)
    ll.load(model, tmp_path / "0.safetensors")
    assert torch.allclose(logits(decoder), outputs[0], atol=1e-5)


@pytest.mark.parametrize("c", [0.0, 1.0])
@pytest.mark.parametrize("variant", ["double", "lora"])
def test_a_step_that_is_recorded_at_0_or_1_goes_on_elsewhere(variant: str, c: float, double: Any) -> None:
    """Also of a method that leaves the blend of base and method to the runtime, which has no blend at 0 and at 1."""
    model, adapter, decoder = adapted(variant)
    plain = {}
    for other in (0.7, 1.0, 0.0):
        with ll.scaled(model, other):
            plain[other] = logits(decoder)
    adapter.scale = c
    with ll.capturable(model):
        graph = recorded(decoder)[0]
        for other, wanted in plain.items():
            adapter.scale = other
            assert torch.allclose(logits(decoder, graph), wanted, atol=1e-5)


def test_each_of_several_adapters_has_a_scale_of_its_own() -> None:
    model, _, decoder = adapted("lora")
    trained(model, "ia3", "gain", seed=2)
    with ll.capturable(model):
        graph = recorded(decoder)[0]
        for c in (0.0, -1.5):
            with ll.scaled(model, c, "gain"):
                assert torch.equal(logits(decoder, graph), logits(decoder))


@pytest.mark.parametrize("names", ["norm$", "block"])
def test_norms_and_the_stream_are_recorded_too(names: str) -> None:
    model = tiny_llama(num_hidden_layers=1)
    cfg: Any = ll.SteerConfig(kinds="block") if names == "block" else ll.IA3Config(kinds="norm", target_names=names)
    perturb(adapter := attach(model, cfg))
    decoder = StaticDecoder(model, PROMPTS, 8)
    with ll.capturable(model):
        graph = recorded(decoder)[0]
        adapter.scale = 0.3
        assert torch.equal(logits(decoder, graph), logits(decoder))


def test_the_scale_and_its_history_are_as_before_after_the_block() -> None:
    model, adapter, _ = adapted("lora")
    model.activation_checkpointing_enable({"use_reentrant": False})
    gradients = []
    for enters in (False, True):
        with ll.scaled(model, 0.5):
            loss = model.train()(input_ids=PROMPTS, labels=PROMPTS, use_cache=False).loss
        if enters:
            with ll.capturable(model):
                adapter.scale = 3.0
            assert adapter.scale == 3.0
        loss.backward()  # what is run again goes by 0.5
        gradients.append([p.grad.clone() for p in adapter.parameters()])
        model.zero_grad()
    assert all(map(torch.equal, *gradients))


def test_an_error_in_the_block_ends_it_and_a_copy_is_out_of_it() -> None:
    model, adapter, decoder = adapted("lora")
    plain = logits(decoder)
    with pytest.raises(ZeroDivisionError), ll.capturable(model):
        other = copy.deepcopy(model)
        raise ZeroDivisionError
    assert torch.equal(logits(decoder), plain)
    adapter.scale = 0.5
    assert ll.adapters(other)["default"].scale == 1.0
    other.train()(input_ids=PROMPTS, labels=PROMPTS).loss.backward()  # no gradients in the block
    ll.detach(other)


# ---- refusals ---------------------------------------------------------------------------------------


def test_a_call_has_no_gradients_no_training_and_stays_on_its_device() -> None:
    model, _, _ = adapted("lora")
    with ll.capturable(model):
        with pytest.raises(ll.ConfigError, match=r"a call with gradients\n  call the model under torch.no_grad\(\)"):
            model(PROMPTS)
        with torch.no_grad():
            with pytest.raises(ll.ConfigError, match=r"training mode, .*repeat\n  model.eval\(\) first"):
                model.train()(PROMPTS)
            model.eval().to("meta")
            with pytest.raises(ll.ConfigError, match=r"has left cpu\n  move it first, then enter the block"):
                model(PROMPTS.to("meta"))


def test_what_would_leave_a_graph_with_old_tensors_raises(tmp_path: Path) -> None:
    model, adapter, _ = adapted("lora")
    ll.save(model, file := tmp_path / "a.safetensors")
    tries: dict[str, Callable[[], Any]] = {
        "attach another adapter": lambda: ll.attach(model, config("ia3"), "gain"),
        "detach": lambda: ll.detach(model),
        "merge": lambda: ll.merge(model),
        "unload": lambda: ll.unload_to(model, "cpu", "default"),
        "configure": lambda: adapter.configure(r=3),
        "replace 'default'": lambda: ll.load(model, file, replace=True),
        "keep a round": lambda: ll.freeze_into(model),
        "combine adapters": lambda: ll.combine(model, {"default": 1.0}, into="both"),
        "give rows adapters of their own": lambda: ll.rows(model, ["default", None]).__enter__(),
        "give rows scales of their own": lambda: ll.scaled(model, [0.0, 1.0]).__enter__(),
    }
    with ll.capturable(model):
        for action, run in tries.items():
            with pytest.raises(ll.TargetError, match=rf"can't {action} within `capturable`.*\n  leave the block first"):
                run()
        with pytest.raises(ll.TargetError, match="in a block of `capturable` already\n  capture within that one"):
            ll.capturable(model).__enter__()
        with torch.no_grad():
            assert model(PROMPTS).logits.isfinite().all()  # and nothing has changed
    with torch.no_grad(), ll.scaled(model, [0.0, 1.0]):
        model(PROMPTS)


def test_there_has_to_be_an_adapter_at_work_on_one_device() -> None:
    model = tiny_llama(num_hidden_layers=1)
    with pytest.raises(ll.TargetError, match=r"no adapter at work on this LlamaForCausalLM.*\n  attach first"):
        ll.capturable(model).__enter__()
    trained(model, "lora")
    ll.merge(model)
    with pytest.raises(ll.TargetError, match="can't capture: default is merged into the weights"):
        ll.capturable(model).__enter__()
    ll.unmerge(model)
    ll.unload_to(model, "cpu", "default")
    with pytest.raises(ll.TargetError, match="no adapter at work"):
        ll.capturable(model).__enter__()
    ll.bring_back(model, "default")
    model.model.layers[0].mlp.to("meta")
    with pytest.raises(ll.TargetError, match="layers are on cpu and meta\n  a CUDA graph is of one device"):
        ll.capturable(model).__enter__()


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])


def test_experts_and_convolutions_are_refused_by_name() -> None:
    model = Routed()
    ll.attach(model, ll.LoRAConfig(r=2, target_names="experts"))
    with pytest.raises(ll.TargetError, match=r"experts.0.0: .*an expert is called where a token is routed to it"):
        ll.capturable(model).__enter__()
    convolution = nn.Sequential(nn.Conv1d(4, 4, 3))
    ll.attach(convolution, ll.LoRAConfig(r=2, kinds="conv", target_names="0"))
    with pytest.raises(ll.TargetError, match=r"0: .*its module reads the weight"):
        ll.capturable(convolution).__enter__()


# ---- the real thing ---------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA device")
@pytest.mark.parametrize("variant", ["lora", "dora", "ia3"])
def test_a_cuda_graph_goes_on_with_other_scales_and_values(variant: str) -> None:
    model = tiny_llama(num_hidden_layers=1).cuda()
    adapter = trained(model, variant)
    decoder = StaticDecoder(model, PROMPTS.cuda(), 8)
    with ll.capturable(model):
        replay = captured(decoder)
        for c in (1.0, 0.7, 0.0):
            adapter.scale = c
            assert torch.allclose(logits(decoder, replay), logits(decoder), atol=1e-5)
        perturb(adapter, 0.1, seed=2)
        adapter.scale = 1.0
        assert torch.allclose(logits(decoder, replay), logits(decoder), atol=1e-5)


def test_a_scale_that_changes_within_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fills would be a part of the graph."""
    model, adapter, _ = adapted("lora")
    with ll.capturable(model):
        adapter.scale = 0.5
        with monkeypatch.context() as capturing:
            capturing.setattr(torch.cuda, "is_available", lambda: True)
            capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            wanted = "that is being captured(?s:.*)\n  capture a step for one scale, and set it before each replay"
            with pytest.raises(ll.TargetError, match=wanted), ll.scaled(model, 0.1):
                pass
            with pytest.raises(ll.TargetError, match=wanted):
                adapter.scale = 0.1
        assert adapter.scale == 0.5


def test_a_sampling_method_a_part_in_training_and_a_cast_are_refused() -> None:
    model = adapted("pvera", sample_at_inference=True)[0]
    with pytest.raises(ll.TargetError, match="draws numbers"), ll.capturable(model):
        pass
    model, adapter, decoder = adapted("lora", dropout=0.5)
    with ll.capturable(model), torch.no_grad():
        assert not adapter._state.is_idle
        logits(decoder)
        model.get_submodule(next(iter(adapter.targets))).train()
        with pytest.raises(ll.ConfigError, match=r"training mode.*\n  model.eval\(\) first"):
            logits(decoder)
        model.eval()
        model.to(torch.float64)
        with pytest.raises(ll.ConfigError, match="have moved in memory\n  cast the model first"):
            logits(decoder)
