"""What runs in processes of its own: compiled models (runtime shape checks can't be traced), two gloo processes, and
a merge that is killed.

python tests/workers.py compile|ddp|fsdp|killed FOLDER

To start a process takes longer than to check a variant, so each goes through several. Every variant is compiled on a
layer; what takes seconds for each goes through one variant of each mechanism (`models.covering`).
"""

import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loguru import logger
from models import IDS, OneLinear, attach, config, covering, is_trained, keep, moe, one_layer, perturb
from models import trained as moved
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from trainer.processes import leave
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import lora_lite as ll
from lora_lite.io.adapter_file import read_file
from lora_lite.measure.audit import watched_step
from lora_lite.merging.on_disk import MARKER

tiny_llama = partial(models.tiny_llama, bias=True)  # with a bias for every method

WORLD, STEPS = 2, 3
ALL_BUT_Q_V_DOWN = r"(k|o|gate|up)_proj"
"""`exclude_names` for graphs: the time to trace one goes by its layers."""
GENERATED = ("lora", "dora", "antipasto", "steer")
"""Variants that go through the code generator as well, which takes ten seconds for each."""
BATCH = torch.arange(48).reshape(4, 12)


def gradients(adapter: ll.Adapter) -> list[torch.Tensor]:
    return [p.grad for p in adapter.parameters() if p.grad is not None]


# ---- compile ------------------------------------------------------------------------------------


@functools.cache
def generates_code() -> bool:
    """Does inductor work here where there is no adapter? It needs a C++ compiler, and libraries for it."""
    try:
        torch.compile(nn.Linear(3, 4))(torch.randn(2, 3)).square().mean().backward()
    except torch._inductor.exc.InductorError as error:
        print(f"no code is generated: {error}", file=sys.stderr)
        return False
    return True


def layers(variant: str, folder: Path) -> None:
    """One graph of one layer, forward and backward, and none more for another scale; of some variants to code, too."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer, x = one_layer(variant)
    adapter = attach(layer, config(variant, target_names="proj"))
    perturb(adapter, 0.2)
    fast, graphs = torch.compile(layer, fullgraph=True, backend="aot_eager"), []
    for c in (1.0, 0.5, -2.0):
        adapter.scale, both = c, []
        for one in (fast, layer):
            layer.zero_grad()
            y = one(x)
            if is_trained(variant):
                y.square().mean().backward()
            both.append((y, gradients(adapter)))
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 3, f"a new scale recompiles: {graphs}"
    if variant in GENERATED and generates_code():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=1e-4, atol=1e-5)


def compiled(variant: str, folder: Path) -> None:
    """One graph of a whole model, forward and backward; an attach, a new scale and a detach after the first call are
    all seen."""
    torch._dynamo.reset()
    model = tiny_llama(num_hidden_layers=1)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        base = fast(input_ids=IDS).logits
    cls = ll.config_for(variant)
    fields = cls.__dataclass_fields__.keys() - set(cls.SAME_AT_ALL_LAYERS)
    differ = {field: value for field, value in {"r": 3, "alpha": 2.0, "strength": 0.5}.items() if field in fields}
    adapter = attach(
        fast, config(variant, exclude_names=ALL_BUT_Q_V_DOWN, per_layer={r"down_proj$": differ} if differ else {})
    )
    perturb(adapter)

    model.train()
    both = []
    for each in (fast, model):
        model.zero_grad()
        out = each(input_ids=IDS, labels=IDS)
        if is_trained(variant):
            out.loss.backward()
        both.append((out.logits, gradients(adapter)))
    torch.testing.assert_close(both[0], both[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both[0][0], base, atol=1e-4)

    model.eval()
    graphs = []
    with torch.no_grad():
        for c in (1.0, 0.5, -2.0, 0.0, 3.0, 0.0, -1.0):
            perturb(adapter, seed=len(graphs))
            with torch.inference_mode(), ll.scaled(model, c):  # in which no tensor may be made that training meets
                wanted = model(input_ids=IDS).logits
            with ll.scaled(model, c):
                torch.testing.assert_close(fast(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-5)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        first = graphs[0]
        assert graphs == [first, first, first, *4 * [first + 1]], f"a new scale recompiles: {graphs}"
        if "strength" in ll.REGISTRY[variant].live:
            before = model(input_ids=IDS).logits
            for strength in (0.9, 0.4):
                adapter.configure(strength=strength)
                torch.testing.assert_close(
                    fast(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5
                )
            assert not torch.allclose(model(input_ids=IDS).logits, before, atol=1e-3)
        ll.detach(model)
        torch.testing.assert_close(fast(input_ids=IDS).logits, base)


def blocks(variant: str, folder: Path) -> None:
    """Blocks that are compiled one by one share a graph, as the base's do: none has its own name in it."""
    for grad in (True, False):
        graphs = []
        for way in ("base", "adapted"):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            model = tiny_llama(num_hidden_layers=3)
            if way == "adapted":
                perturb(attach(model, config(variant)))
            with torch.set_grad_enabled(grad):
                wanted = model(input_ids=IDS, use_cache=False).logits
                for layer in model.model.layers:
                    layer.mlp.compile(fullgraph=True, backend="eager")
                torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, wanted)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        # Where the names of shared tensors are by the layer's path, each block has a graph of its own (docs/limits.md).
        most = 3 if shares_by_name(variant) else graphs[0]
        assert graphs[1] <= most, f"graphs of a base and with adapters, with gradients {grad}: {graphs}"


def shares_by_name(variant: str) -> bool:
    """Do layers share other tensors than layers of another name?"""
    targets = [ll.Target(f"model.layers.0.{name}", 32, 64, "float32") for name in ("q_proj", "k_proj")]
    one, other = (set(ll.REGISTRY[variant].shared_specs([target], config(variant))) for target in targets)
    return one != other


def rows(variant: str, folder: Path) -> None:
    """Rows with adapters of their own have one graph whatever the assignment, and another for scales of their own."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, x = tiny_llama(num_hidden_layers=1, hidden_size=32), torch.randn(4, 5, 32)
    block, turned = model.model.layers[0], model.model.rotary_emb(x, torch.arange(5)[None])
    for seed, name in enumerate("ab", 1):
        perturb(attach(model, config(variant, exclude_names=ALL_BUT_Q_V_DOWN), name), 0.2, seed)
    ll.adapters(model)["b"].scale = 0.7
    fast = torch.compile(block, fullgraph=True, backend="eager")  # a block is traced three times as fast as a model

    def same() -> None:
        with torch.no_grad():
            both = [each(x, position_embeddings=turned) for each in (fast, block)]
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)

    for names in (["a", None, "b", "a"], ["b"] * 4, [None] * 4, ["a", "b", None, None]):
        with ll.rows(model, names):
            same()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, dict(torch._dynamo.utils.counters["stats"])
    with ll.disabled(model), ll.rows(model, names), ll.scaled(model, 1.5):
        same()
    for scales in ([1.0, 0.5, 0.0, -1.0], [0.0] * 4, [1.0] * 4):
        with ll.scaled(model, scales, "a"):
            same()
    labels = torch.tensor([[0, 1, 1, 0, 0]] * 4)
    with ll.rows(model, ["a", "b"], tokens=labels):
        same()
    with ll.rows(model, ["a", "b"], tokens=1 - labels):
        same()
    unsupported = torch._dynamo.exc.Unsupported
    for lead in ((4, 5), (1, 6)):
        x = torch.randn(*lead, 32)
        turned = model.model.rotary_emb(x, torch.arange(lead[1])[None])
        with ll.rows(model, ["a", "b"]), pytest.raises(unsupported, match="wanted hidden states of 2 rows"):
            fast(x, position_embeddings=turned)


def rows_of_whole_models() -> None:
    """Whole models, one of which gives its shared expert all tokens in one row: with rows, with labels, and
    refused for another batch."""
    sizes = models.SIZES | {"num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 48}
    for model in (tiny_llama(num_hidden_layers=1), Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes)).eval()):
        torch._dynamo.reset()
        for seed, name in enumerate("ab", 1):
            perturb(ll.attach(model, ll.LoRAConfig(r=2, target_names=r"q_proj$|down_proj$"), name), 0.2, seed)
        model.set_experts_implementation("batched_mm")
        fast = torch.compile(model, fullgraph=True, backend="eager")
        labels = (torch.arange(BATCH.numel()) % 2).reshape(BATCH.shape)
        for options in ({"names": ["a", None, "b", "a"]}, {"names": ["a", "b"], "tokens": labels}):
            with torch.no_grad(), ll.rows(model, **options):
                both = [each(input_ids=BATCH).logits for each in (fast, model)]
            torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)
        with ll.rows(model, ["a"] * 2), pytest.raises(torch._dynamo.exc.Unsupported, match="called with 4"):
            fast(input_ids=BATCH)


def room(folder: Path) -> None:
    """A compiled model goes on with its graph where a LoRA with room takes another file's values, of any rank below."""
    torch._dynamo.reset()
    model, other, wanted = tiny_llama(num_hidden_layers=1), tiny_llama(num_hidden_layers=1), {}
    for r, alpha in ((8, 4.0), (1, 3.0), (5, 5.0)):
        perturb(ll.attach(other, config("lora", r=r, alpha=alpha, target_names="q_proj|mlp")), 0.2, r)
        ll.save(other, folder / f"{r}.safetensors")
        wanted[r] = other(input_ids=IDS).logits.detach()
        ll.detach(other)
    ll.attach(model, config("lora", r=3, alpha=6.0), max_rank=8)
    fast = torch.compile(model, fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        fast(input_ids=IDS)
        for r, logits in wanted.items():
            ll.load(model, folder / f"{r}.safetensors", replace=True)
            torch.testing.assert_close(fast(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def in_place() -> None:
    """Within `capturable` a compiled model has one graph for all scales: what eager mode makes of them there."""
    for variant in ("lora", "dora", "ia3"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = tiny_llama(num_hidden_layers=1)
        perturb(adapter := ll.attach(model, config(variant)), 0.2)
        fast = torch.compile(model, fullgraph=True, backend="eager")
        with ll.capturable(model), torch.no_grad():
            for c in (1.0, 0.0, 0.4):
                adapter.scale = c
                torch.testing.assert_close(fast(input_ids=IDS).logits, model(input_ids=IDS).logits)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def late() -> None:
    """A compiled model sees adapters, and histories, that come to layers that had none, the base frozen or not."""
    for is_frozen in (False, True):
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(not is_frozen)
        fast, x = torch.compile(model, backend="eager"), torch.randn(4, 8)
        fast(x)
        for path in ("0", "1"):
            perturb(ll.attach(model, ll.LoRAConfig(r=2, target_names=path), f"on_{path}"), 1.0)
            torch.testing.assert_close(fast(x), model(x))
        ll.detach(model)
        torch.testing.assert_close(fast(x), model(x))
        for path in ("0", "1"):
            perturb(ll.attach(model, ll.LoRAConfig(r=2, target_names=path)), 1.0)
            ll.freeze_into(model)
            torch.testing.assert_close(fast(x), model(x))


def beside() -> None:
    """Of two models of one class, compiled in any order, each goes on with its own adapters, or with none."""
    layers = [config("lora", target_names="proj"), config("dora", target_names="proj"), None]
    for of_first, of_second in permutations(layers, 2):
        torch._dynamo.reset()
        first, second = OneLinear(bias=False), OneLinear(bias=False)
        for model, cfg in ((first, of_first), (second, of_second)):
            model.requires_grad_(False)
            if cfg is not None:
                perturb(ll.attach(model, cfg), 1.0)
        x, fast = torch.randn(5, 16), [torch.compile(m.forward, backend="eager") for m in (first, second)]
        with ThreadPoolExecutor(1) as threads:  # options of torch.compile are of the thread that sets them
            for run in (map, threads.map, map):
                torch.testing.assert_close([*run(lambda f, x=x: f(x), fast)], [first(x), second(x)])


def vanishing() -> None:
    """DoRA's factored norm has no digits where W + s B A vanishes: eager mode takes the direct one, a graph refuses."""
    for backend in ("aot_eager", "inductor") if generates_code() else ("aot_eager",):
        torch._dynamo.reset()
        layer = OneLinear(bias=False)
        adapter = ll.attach(layer, config("dora", target_names="proj"))
        fast = torch.compile(layer, fullgraph=True, backend=backend)
        x = torch.randn(5, 16)
        torch.testing.assert_close(fast(x), layer(x))
        u, s, vt = torch.linalg.svd(layer.proj.weight.detach(), full_matrices=False)
        with torch.no_grad():  # a weight of rank r, taken away
            rank = len(layer.proj.lora_A)
            layer.proj.lora_A.copy_(vt[:rank])
            layer.proj.lora_B.copy_(-u[:, :rank] * s[:rank] / adapter.config.scaling)
            layer.proj.weight.copy_((u[:, :rank] * s[:rank]) @ vt[:rank] * 1.001)
            layer.proj.lora_n0.copy_(layer.proj.weight.norm(dim=1))
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert layer(x).isfinite().all()
                with pytest.raises(RuntimeError, match="all but vanishes"):
                    fast(x)


def poles(folder: Path) -> None:
    """Compiled with its checkpoints, a model has the gradients of both poles; a whole step may be one graph, too."""
    torch._dynamo.reset()
    found = []
    for way in ("plain", "compiled"):
        model = tiny_llama(num_hidden_layers=1).train()
        adapter = ll.attach(model, config("lora"))
        perturb(adapter)
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        run: Any = model if way == "plain" else torch.compile(model, backend="aot_eager")
        losses = []
        for c in (1.0, -1.0, 0.5):
            with ll.scaled(model, c):
                losses.append(run(input_ids=IDS, labels=IDS).loss)
        sum(losses).backward()
        found.append(gradients(adapter))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)

    layer, x = OneLinear(), torch.randn(5, 16)
    perturb(ll.attach(layer, config("lora", target_names="proj")))

    def step(x: torch.Tensor) -> torch.Tensor:
        with ll.scaled(layer, -0.5):
            return layer(x)

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x))
    assert ll.adapters(layer)["default"].scale == 1.0


def rounds_of_many_methods(folder: Path) -> None:
    """They are one graph at any scale of the history, forward and backward; a round that is kept later is seen."""
    torch._dynamo.reset()
    layer, x = OneLinear(), torch.randn(5, 16)
    for variant, c in (("lora", 0.7), ("ia3", 1.5), ("lora", -0.4), ("dora", 0.9), ("pissa", 2.0)):
        keep(layer, variant, c, target_names="proj")
    adapter = moved(layer, "lora", target_names="proj")
    fast, graphs = torch.compile(layer, fullgraph=True, backend="aot_eager"), []
    for c in (1.0, 0.5, -2.0, 3.0, 0.0):
        found = []
        for each in (fast, layer):
            layer.zero_grad()
            with ll.scaled(layer, c, "history"):
                out = each(x)
            out.square().sum().backward()
            found.append((out, gradients(adapter)))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [*4 * graphs[:1], graphs[0] + 1], f"a new scale recompiles: {graphs}"
    with torch.no_grad():
        before = fast(x)
        ll.freeze_into(layer)
        torch.testing.assert_close(fast(x), before, rtol=1e-4, atol=1e-5)
        ll.drop_round(layer, "default")
        torch.testing.assert_close(fast(x), layer(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(fast(x), before, atol=1e-2)


class HalfCompiled(nn.Module):
    """Inside of a graph but for one layer; whoever has the model alone sees no wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(self.run_a(x))
        return y

    @torch.compiler.disable
    def run_a(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.a(x)
        return y


class ReadsOne(nn.Module):
    """It multiplies by the weight of one layer and calls the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(x @ self.a.weight.mT)
        return y


def parts_that_run(folder: Path) -> None:
    """In a graph no hook can note that it ran: layers there aren't taken for such that the model never calls, and a
    checkpoint is no break of the graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_llama(num_hidden_layers=1)
    perturb(ll.attach(model, config("lora")))
    model.model.layers[0].mlp.compile(fullgraph=True, backend="eager")
    with torch.no_grad():
        attached = model(input_ids=IDS).logits
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, dict(torch._dynamo.utils.counters["stats"])
    assert len(ll.audit(model, {"input_ids": IDS}).layers) == 7
    ll.detach(model)
    perturb(ll.attach(model, config("lora")))
    with torch.no_grad():
        attached = model(input_ids=IDS).logits
    ll.save(model, folder / "parts.safetensors")
    assert read_file(folder / "parts.safetensors").never_ran == []
    ll.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, attached, rtol=1e-4, atol=1e-5)

    halves, x = HalfCompiled(), torch.randn(5, 16)
    adapter = ll.attach(halves, config("lora", target_names="^[ab]$"))
    perturb(adapter)
    with torch.no_grad():
        attached = torch.compile(halves, backend="eager")(x)
    assert [site.ran for site in adapter.sites()] == [True, False]
    ll.save(halves, folder / "halves.safetensors")
    assert read_file(folder / "halves.safetensors").never_ran == []
    ll.merge(halves)
    torch.testing.assert_close(halves(x), attached)

    reads = ReadsOne()
    with pytest.MonkeyPatch.context() as patch:  # as if its code didn't show what it reads
        patch.setattr("lora_lite.base.layer.readers", lambda modules: {})
        ll.attach(reads, config("lora", target_names="^[ab]$"))
    reads(x)
    with pytest.raises(ll.TargetError, match=r"1 of 2 adapted layers were never called, .*: a\n"):
        ll.merge(reads)
    torch.compile(ReadsOne(), backend="eager")(x)  # of the same class: what trains is watched all the same
    with pytest.raises(ll.TargetError, match=r"training step\n.*reads the weight itself: a\n"), watched_step(reads):
        reads(x).square().mean().backward()

    layer, x = OneLinear(), torch.randn(5, 16, requires_grad=True)
    perturb(ll.attach(layer, config("lora", target_names="proj")))

    def run(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(layer, x, use_reentrant=False)

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


def experts_in_4_bits() -> None:
    """In a graph W' stands in the place of what bitsandbytes' parametrisation gives."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    model = moe("mixtral", intermediate_size=64, num_hidden_layers=1)
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(layer.mlp.experts, name)
    model.set_experts_implementation("batched_mm")
    adapter = ll.attach(model, ll.LoRAConfig(r=2, kinds=["experts"]))
    perturb(adapter, 0.2)
    fast = torch.compile(model, backend="aot_eager")
    for scale in (1.0, 0.0):
        adapter.scale, both = scale, []
        for either in (model, fast):
            model.zero_grad()
            out = either(input_ids=IDS, labels=IDS)
            if scale:
                out.loss.backward()
            both.append((out.logits, gradients(adapter)))
        (eager, eager_gradients), (compiled, compiled_gradients) = both
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled_gradients, eager_gradients, rtol=1e-3, atol=1e-5)


# ---- two processes ------------------------------------------------------------------------------


def train(model: Any, adapter: ll.Adapter, batch: torch.Tensor) -> list[float]:
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, eps=1e-4)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def alone(variant: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training in one process."""
    model = tiny_llama()
    adapter = ll.attach(model, config(variant))
    return train(model, adapter, BATCH), adapter.state_dict()


def same_as_alone(losses: list[float], variant: str, file: Path) -> None:
    mine = torch.tensor(losses)
    dist.all_reduce(mine)
    wanted, state = alone(variant)
    torch.testing.assert_close(mine / WORLD, torch.tensor(wanted), rtol=1e-4, atol=1e-5)
    fresh = tiny_llama()
    loaded = ll.load(fresh, file).state_dict()
    for key, value in state.items():
        torch.testing.assert_close(loaded[key], value, rtol=1e-3, atol=1e-4)


def ddp(variant: str, folder: Path) -> None:
    if not is_trained(variant):
        return  # DDP refuses a model without gradients
    rank, file = dist.get_rank(), folder / f"{variant}.safetensors"
    model = tiny_llama()
    adapter = ll.attach(model, config(variant))
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    losses = train(wrapped, adapter, BATCH.chunk(WORLD)[rank])
    with pytest.raises(ll.TargetError, match="attach first, then wrap"):
        ll.attach(wrapped, config("lora"), name="late")
    ll.save(wrapped, file)
    dist.barrier()
    same_as_alone(losses, variant, file)
    with torch.no_grad():
        out = wrapped(input_ids=BATCH).logits
        fresh = tiny_llama()
        ll.load(fresh, file)
        assert torch.equal(fresh(input_ids=BATCH).logits, out)
    if variant == "adalora":
        same_ranks_as_alone()


def same_ranks_as_alone() -> None:
    """A schedule goes by the gradients of all processes."""
    ranks = []
    for batch in (BATCH, BATCH.chunk(WORLD)[dist.get_rank()]):
        model = tiny_llama()
        adapter = ll.attach(model, ll.AdaLoRAConfig(init_r=4, target_r=2, total_step=STEPS))
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, eps=1e-4)
        wrapped = model if batch is BATCH else torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(STEPS):
            optimizer.zero_grad()
            (wrapped(input_ids=batch, labels=batch).loss + adapter.penalty()).backward()
            optimizer.step()
            adapter.step()
        ranks.append([key for key, t in adapter.named_tensors() if key.endswith("lora_E") for on in t if on != 0])
    assert ranks[0] == ranks[1]
    assert len(ranks[0]) == 2 * len(adapter.targets)


def fsdp(variant: str, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def shard(model: Any) -> Any:
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    mesh = init_device_mesh("cpu", (WORLD,))
    rank, file = dist.get_rank(), folder / f"{variant}.safetensors"
    model = tiny_llama()
    if not is_trained(variant):
        computed(variant, shard, file)
        return
    adapter = ll.attach(model, config(variant))
    shard(model)
    assert adapter.is_sharded
    assert all(isinstance(t, DTensor) for _, t in adapter.named_tensors() if isinstance(t, torch.nn.Parameter))
    losses = train(model, adapter, BATCH.chunk(WORLD)[rank])
    ll.save(model, file)
    if variant in ("lora", "dora"):
        checkpoints(variant, folder, shard)
    with pytest.raises(ll.CheckpointError, match=r"is sharded\n.*load it in one process"):
        ll.save_peft(model, folder / "peft")
    same_as_alone(losses, variant, file)
    with pytest.raises(ll.LoraLiteError, match=r"was not written: (FileExists|NotADirectory)Error"):
        ll.save(model, file / "a.safetensors")  # which the first process alone can know

    with torch.no_grad():
        out = model(input_ids=BATCH).logits
        for first in ("load, then shard", "attach, shard, then restore"):
            other = tiny_llama()
            if first.startswith("load"):
                ll.load(other, file)
                shard(other)
            else:
                ll.attach(other, config(variant))
                shard(other)
                ll.restore(other, file)
            torch.testing.assert_close(other(input_ids=BATCH).logits, out)
        model.eval()
        model(input_ids=BATCH)  # what a variant remembers of its parameters is of those before
        for parameter in adapter.parameters():
            parameter.mul_(1.2)
        ll.save(model, file.with_suffix(".later"))
        alone = tiny_llama().eval()
        ll.load(alone, file.with_suffix(".later"))
        torch.testing.assert_close(model(input_ids=BATCH).logits, alone(input_ids=BATCH).logits)
        assert not torch.allclose(alone(input_ids=BATCH).logits, out)
        with ll.disabled(model):
            torch.testing.assert_close(model(input_ids=BATCH).logits, tiny_llama()(input_ids=BATCH).logits)
    half = tiny_llama()
    ll.attach(half, config(variant))
    twin, policy = tiny_llama(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for each in (half, twin):
        for block in each.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(each, mesh=mesh, mp_policy=policy)
    with torch.no_grad():  # a cast of parameters, and not of buffers: a fresh adapter stays the identity
        is_identity = torch.equal(half(input_ids=BATCH).logits, twin(input_ids=BATCH).logits)
    assert is_identity or not ll.REGISTRY[variant].has_identity_init
    with pytest.raises(ll.TargetError, match="sharded by fully_shard"):
        ll.detach(model)
    with (
        pytest.raises(ll.TargetError, match=r"sharded by fully_shard, which moves numbers\n  run it without"),
        ll.capturable(model),
    ):
        pass
    with pytest.raises(ll.TargetError, match="attach first, then fully_shard"):
        ll.attach(shard(tiny_llama()), config("lora"))


def checkpoints(variant: str, folder: Path, shard: Callable[[Any], Any]) -> None:
    """torch.distributed.checkpoint, of adapters and the optimizer: the next step has the same bits."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    adapters_only = StateDictOptions(ignore_frozen_params=True, strict=False)

    def sharded(seed: int) -> tuple[Any, ll.Adapter, torch.optim.Optimizer]:
        model = tiny_llama()
        torch.manual_seed(seed)
        adapter = ll.attach(model, config(variant))
        shard(model)
        return model, adapter, torch.optim.AdamW(adapter.parameters(), lr=1e-2, eps=1e-4)

    def state(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        tensors = get_model_state_dict(model, options=adapters_only)
        return {"adapters": tensors, "optimizer": get_optimizer_state_dict(model, optimizer, options=adapters_only)}

    def step(model: Any, optimizer: torch.optim.Optimizer) -> float:
        batch = BATCH.chunk(WORLD)[dist.get_rank()]
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        return float(loss.item())

    model, adapter, optimizer = sharded(1)
    step(model, optimizer)
    before = state(model, optimizer)
    assert before["adapters"]
    assert all(".lora_" in key for key in before["adapters"])
    dcp.save(before, checkpoint_id=folder / f"{variant}-dcp")
    last = [step(model, optimizer) for _ in range(2)]

    again, other, optimizer = sharded(2)
    stored = state(again, optimizer)
    dcp.load(stored, checkpoint_id=folder / f"{variant}-dcp")
    set_model_state_dict(again, stored["adapters"], options=adapters_only)
    set_optimizer_state_dict(again, optimizer, stored["optimizer"], options=adapters_only)
    assert [step(again, optimizer) for _ in range(2)] == last
    pairs = zip(adapter.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in pairs)  # type: ignore[attr-defined]


def computed(variant: str, shard: Callable[[Any], Any], file: Path) -> None:
    """What is computed on a sharded model is what it is on a whole one: statistics, outputs, divergence, the file."""
    whole, model = tiny_llama(), shard(tiny_llama())
    for path, seen in ll.capture(model, [BATCH], reduce=("std",), progress=False).items():
        wanted = ll.capture(whole, [BATCH], reduce=("std",), progress=False)[path]
        torch.testing.assert_close((seen.mean, seen.std), (wanted.mean, wanted.std), rtol=1e-5, atol=1e-6)
    attach(whole, config(variant))
    model = tiny_llama()
    attach(model, config(variant))
    shard(model)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=BATCH).logits, whole(input_ids=BATCH).logits)
    torch.testing.assert_close(ll.kl_divergence(model, [BATCH]), ll.kl_divergence(whole, [BATCH]), rtol=1e-3, atol=1e-5)
    ll.save(model, file)
    fresh = tiny_llama()
    ll.load(fresh, file)
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=BATCH).logits, whole(input_ids=BATCH).logits)
    with pytest.raises(ll.TargetError, match="sharded by fully_shard"):
        ll.detach(model)
    live(shard)


def live(shard: Callable[[Any], Any]) -> None:
    """A change that reads the weights gathers them; and no process skips a forward that others wait in."""
    cfg = ll.AbliterationConfig(normalization="full")
    given = {"directions": torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0))}
    whole, model = tiny_llama(), tiny_llama()
    adapters = [ll.attach(each, cfg, calibration_data=given) for each in (whole, model)]
    shard(model)
    for adapter in adapters:
        adapter.configure(layer=1, strength=0.5)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=BATCH).logits, whole(input_ids=BATCH).logits)
    batches = [BATCH, BATCH] if dist.get_rank() == 0 else [BATCH, BATCH + 1]
    torch.testing.assert_close(ll.kl_divergence(model, batches), ll.kl_divergence(whole, batches), rtol=1e-3, atol=1e-5)


def through(variants: Iterable[str], job: Callable[[str, Path], None], folder: str) -> None:
    logger.disable("lora_lite")
    for variant in variants:
        try:
            job(variant, Path(folder))
        except Exception as error:
            raise RuntimeError(f"{job.__name__}: {variant}") from error


def member(rank: int, job: Callable[[str, Path], None], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    through(covering(), job, folder)
    leave()


def killed(folder: Path, points: int = 16) -> None:
    """`merge_checkpoint` with kill -9 at many points between the first and the last thing that it does on disk, then
    run again: the folder is the same as from one whole run, and until then there is none."""
    torch.set_num_threads(1)  # a fork has no threads
    arguments = folder / "base", folder / "a.safetensors"
    steps = in_a_fork(lambda: merge_until(*arguments, folder / "whole", None))
    resumed = 0
    for at in sorted({round(i * (steps - 1) / points) for i in range(points + 1)}):
        out = folder / f"out{at}"
        assert in_a_fork(lambda out=out, at=at: merge_until(*arguments, out, at)) is None, "not killed"
        assert not out.exists() or same_files(out, folder / "whole")
        finished = {path.name: path.stat().st_ino for path in folder.glob(f"{out.name}.partial/model-*")}
        in_a_fork(lambda out=out: merge_until(*arguments, out, None))
        assert same_files(out, folder / "whole")
        assert not [path.name for path in folder.iterdir() if path.name.startswith((f"{out.name}.", f".{out.name}"))]
        kept = {name for name, inode in finished.items() if (out / name).stat().st_ino == inode}
        assert kept == finished.keys(), "a whole shard was written again"
        resumed += len(kept)
    assert resumed > points


def merge_until(base: Path, adapter: Path, out: Path, last: int | None) -> int:
    """The number of steps; killed before the one numbered `last`. A step is what changes the disk."""
    steps = 0

    def step(*_: Any) -> None:
        nonlocal steps
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1

    def audit(event: str, args: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
        if changes or (event == "open" and str(args[1]).startswith(("x", "w", "a"))):
            step()

    sync = os.fsync
    os.fsync = lambda handle: (step(), sync(handle))[1]
    sys.addaudithook(audit)
    ll.merge_checkpoint(base, adapter, out, progress=step)
    return steps


def in_a_fork(work: Callable[[], int]) -> int | None:
    """What it returns in a process of its own; None if that was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, str(work()).encode())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(reading) as answer:
        text = answer.read()
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return None if os.WIFSIGNALED(status) else int(text)


def same_files(a: Path, b: Path) -> bool:
    names = {path.name for path in a.iterdir()}
    return names == {path.name for path in b.iterdir()} and all(
        (a / name).read_bytes() == (b / name).read_bytes()
        for name in names - {MARKER}  # which has times
    )


if __name__ == "__main__":
    _, name, folder = sys.argv
    if name == "compile":
        through(sorted(ll.REGISTRY), layers, folder)
        through(covering(), compiled, folder)
        through(covering(), blocks, folder)
        through(covering(), rows, folder)
        rows_of_whole_models()
        poles(Path(folder))
        room(Path(folder))
        in_place()
        late()
        beside()
        vanishing()
        rounds_of_many_methods(Path(folder))
        parts_that_run(Path(folder))
        experts_in_4_bits()
    elif name == "killed":
        killed(Path(folder))
    else:
        job = {"ddp": ddp, "fsdp": fsdp}[name]
        mp.start_processes(member, args=(job, folder), nprocs=WORLD, start_method="fork")
