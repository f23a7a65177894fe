"""Two gloo processes in which transformers loads a model by its tensor-parallel plan: what adapters are on it.

python tests/tp_worker.py FOLDER [JOB ...]

Every law compares with one process, which each of the two is as well: the same folder, loaded without a plan.
"""

import faulthandler
import json
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  puts the folders of the tests on the path, and switches shape checks on
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import ParallelismConfig
from loguru import logger
from models import SIZES, config, moe, tiny_llama
from processes import leave
from test_ecosystem import Tokens, arguments
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor import parallel as torch_parallel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.distributed import DistributedConfig

import lora_lite as ll
from lora_lite.trainer import AdapterTrainer

WORLD, SECONDS = 2, 600  # for all jobs; alone on two cores they take 90
BATCH = torch.arange(96).reshape(4, 24) * 7 % 96
EVERYWHERE: dict[str, Any] = {"target_names": ("_proj$",), "target_roles": ()}
FOLDER = Path(sys.argv[1])


# ---- models -------------------------------------------------------------------------------------


def write_folders() -> None:
    torch.manual_seed(0)
    sizes = dict(SIZES, intermediate_size=128)
    models = {
        "llama": tiny_llama(),
        "tied": tiny_llama(tie_word_embeddings=True),
        "biases": tiny_llama(bias=True),
        "uneven": tiny_llama(intermediate_size=101, vocab_size=97),  # halves of 51 and 50, of 49 and 48
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16)),
        "phi3": Phi3ForCausalLM(Phi3Config(**sizes)),
        "mixtral": moe("mixtral"),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, n_positions=32)),
    }
    with torch.no_grad():
        for name, parameter in models["qwen2"].named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    for name, model in models.items():
        model.save_pretrained(FOLDER / name)


def whole(name: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32, **options)


def tensor_parallel(name: str, plan: Any = "auto") -> Any:
    """The model of a folder as a plan parts it; "auto" is its own."""
    return whole(name, distributed_config=DistributedConfig(tp_plan=plan, tp_size=WORLD))


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def both(name: str, cfg: Any, seed: int = 5, **options: Any) -> Iterator[tuple[Any, ll.Adapter]]:
    """The model in one process, then in two, with an adapter. The second process draws other numbers."""
    for load in (whole, tensor_parallel):
        model = load(name)
        torch.manual_seed(seed + (dist.get_rank() if load is tensor_parallel else 0))
        yield model, ll.attach(model, cfg, **options)


@torch.no_grad()
def move(adapter: ll.Adapter, size: float = 0.1, seed: int = 1) -> None:
    """Every trainable tensor away from its start, in each process alike."""
    generator, state = torch.Generator().manual_seed(seed), adapter.state_dict()
    moved = {k: full(t) + size * torch.randn(t.shape, generator=generator) for k, t in state.items()}
    adapter.load_state_dict(moved)


def same_in_all_processes(tensor: torch.Tensor) -> None:
    """Bit for bit."""
    others = [torch.empty_like(tensor) for _ in range(WORLD)]
    dist.all_gather(others, tensor.detach().contiguous())
    assert all(torch.equal(tensor, other) for other in others)


# ---- training -----------------------------------------------------------------------------------


def steps(model: Any, adapter: ll.Adapter, count: int = 2, clip: float = 0.5) -> tuple[list[float], dict[str, Any]]:
    """The losses, and what the tensors and their last gradients are; each step of two backward passes."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, eps=1e-4)
    losses, gradients = [], {}
    model.train()
    for _ in range(count):
        optimizer.zero_grad()
        for batch in BATCH.chunk(2):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            losses.append(loss.item())
        gradients = {f"{key}.grad": t.grad for key, t in adapter.named_tensors() if t.grad is not None}
        gradients = {key: full(gradient).clone() for key, gradient in gradients.items()}
        torch.nn.utils.clip_grad_norm_(list(adapter.parameters()), clip)
        optimizer.step()
    model.eval()
    for tensor in dict(adapter.named_tensors()).values():
        if isinstance(tensor, DTensor) and tensor.placements == (Replicate(),):
            same_in_all_processes(tensor.to_local())
    values = {key: full(tensor).detach() for key, tensor in adapter.named_tensors()}
    return losses, gradients | values


def trains_as_one(name: str, cfg: Any, prepare: Any = lambda model: None) -> None:
    (alone, one), (model, adapter) = both(name, cfg)
    results = []
    for trained, its in ((alone, one), (model, adapter)):
        prepare(trained)
        torch.manual_seed(11 + (dist.get_rank() if trained is model else 0))  # of dropout
        results.append(steps(trained, its))
    (wanted_losses, wanted), (losses, got) = results
    torch.testing.assert_close(losses, wanted_losses, rtol=1e-5, atol=1e-6)
    assert got.keys() == wanted.keys()
    assert sum(key.endswith(".grad") for key in got) == len(list(adapter.parameters()))
    for key, tensor in wanted.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-4, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=BATCH).logits, alone(input_ids=BATCH).logits, rtol=1e-5, atol=1e-5)


def training() -> None:
    """Losses, gradients and values after two steps of two batches are those of one process."""
    lora = ll.LoRAConfig(r=4, **EVERYWHERE)
    trains_as_one("llama", lora)
    trains_as_one("llama", ll.LoRAConfig(r=4, dropout=0.3, bias=True, rslora=True, **EVERYWHERE))
    trains_as_one("llama", ll.LoRAConfig(r=4, freeze_a=True, **EVERYWHERE))
    with_head = ll.LoRAConfig(r=4, target_names=("_proj$", "lm_head"), target_roles=(), dropout=0.2)
    for name in ("llama", "biases", "uneven"):
        trains_as_one(name, with_head)
    for name in ("tied", "qwen2"):
        trains_as_one(name, lora)
        trains_as_one(name, ll.LoRAConfig(r=4, target_names="lm_head", target_roles=(), tied_weights="apart"))
    trains_as_one("qwen3", lora)
    trains_as_one("phi3", ll.LoRAConfig(r=4, dropout=0.2, bias=True, **EVERYWHERE))
    trains_as_one("mixtral", ll.LoRAConfig(r=4, target_names="self_attn", target_roles=()))
    trains_as_one("qwen2", ll.config_for("reft")(r=3, kinds="block", first=4, last=0))
    trains_as_one("qwen3", config("norm", target_names=r"layernorm$|model\.norm$"))
    for is_reentrant in (True, False):
        trains_as_one("llama", ll.LoRAConfig(r=4, dropout=0.3, **EVERYWHERE), checkpointed(is_reentrant))


def checkpointed(is_reentrant: bool) -> Any:
    def prepare(model: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
        model.enable_input_require_grads()

    return prepare


# ---- files, and what else an attached adapter can do -----------------------------------------------


def contents(file: Path) -> tuple[Any, bytes]:
    """The header and the tensors' bytes: a header's keys come in any order."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def files() -> None:
    """A file is that of one process, byte for byte; a whole file's values are sharded by load and restore."""
    cfg = ll.LoRAConfig(r=4, bias=True, target_names=("_proj$", "lm_head"), target_roles=())
    for name in ("qwen3", "uneven"):
        mine, theirs = FOLDER / f"{name}.one.{dist.get_rank()}", FOLDER / f"{name}.two"
        for (model, adapter), file in zip(both(name, cfg), (mine, theirs), strict=True):
            ll.save(model, file)  # fresh: A is as it was drawn
            assert adapter.is_sharded == (file is theirs)
        dist.barrier()
        assert contents(mine) == contents(theirs)
        (alone, one), (model, adapter) = both(name, cfg)
        move(one)
        ll.save(alone, mine)
        wanted = alone(input_ids=BATCH).logits
        for put in (ll.restore, ll.load):
            if put is ll.load:
                ll.detach(model)
                assert not ll.adapters(model)
            put(model, mine)
            with torch.no_grad():
                torch.testing.assert_close(model(input_ids=BATCH).logits, wanted.detach(), rtol=1e-5, atol=1e-5)
            ll.save(model, theirs)
            dist.barrier()
            assert contents(mine) == contents(theirs)
        with pytest.raises(ll.CheckpointError, match=r"is sharded\n.*load it in one process"):
            ll.save_peft(model, FOLDER / "peft")
        error = ll.LoraLiteError if dist.get_rank() else ll.CheckpointError  # which the first process has
        with pytest.raises(error, match=r"was not written: (FileExists|NotADirectory)Error"):
            ll.save(model, mine / "a.safetensors")
        ll.detach(model)
        with pytest.raises(ll.LoraLiteError, match="is not a file"):  # in the process that has it as well
            ll.load(model, FOLDER / "nowhere" if dist.get_rank() else mine)
        room = ll.load(model, mine, max_rank=8)
        assert {tuple(t.shape) for k, t in room.named_tensors() if k.endswith("q_proj.lora_A")} == {(8, 64)}
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=BATCH).logits, wanted.detach(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def life() -> None:
    """Off is the base bit for bit, detach leaves nothing, scales and several adapters add up, generation goes on."""
    cfg = ll.LoRAConfig(r=4, target_names=("_proj$", "lm_head"), target_roles=())
    base = tensor_parallel("llama")
    plain, keys = base(input_ids=BATCH).logits, list(base.state_dict())
    (alone, _), (model, _) = both("llama", cfg)
    assert torch.equal(model(input_ids=BATCH).logits, plain)  # the identity at the start
    for m in (alone, model):
        torch.manual_seed(6)
        ll.attach(m, ll.LoRAConfig(r=2, target_names="(v|down)_proj$"), name="fr").scale = -0.7
        for its in ll.adapters(m).values():
            move(its)
    on = alone(input_ids=BATCH).logits
    assert not torch.allclose(on, plain, atol=0.1)
    torch.testing.assert_close(model(input_ids=BATCH).logits, on, rtol=1e-5, atol=1e-5)
    with ll.disabled(model):
        assert torch.equal(model(input_ids=BATCH).logits, plain)
    results: list[torch.Tensor] = []
    halves: list[torch.Tensor] = []
    for m in (alone, model):
        with ll.rows(m, ["fr", None, "default", "fr"]):
            results.append(m(input_ids=BATCH).logits)
        with ll.scaled(m, [0.0, 1.0, -2.0, 0.5], "default"):
            results.append(m(input_ids=BATCH).logits)
        results.append(m.generate(BATCH[:, :6], max_new_tokens=8, do_sample=False))
        results.append(torch.as_tensor(ll.kl_divergence(m, [BATCH])))
        with torch.autocast("cpu", torch.bfloat16):
            halves.append(m.model.layers[0].mlp.up_proj(torch.linspace(-1, 1, 20 * 64).view(20, 64)))
    part = halves[0].chunk(WORLD, dim=-1)[dist.get_rank()]
    torch.testing.assert_close(halves[1], part, rtol=2e-2, atol=1e-2)  # bfloat16, too
    for got, wanted in zip(results[4:], results[:4], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for its in ll.adapters(model).values():  # 0 times an infinity is no base
        its.load_state_dict({key: torch.full(t.shape, torch.inf) for key, t in its.state_dict().items()})
    with ll.disabled(model):
        assert torch.equal(model(input_ids=BATCH).logits, plain)
    ll.detach(model, "fr")
    ll.detach(model)
    assert torch.equal(model(input_ids=BATCH).logits, plain)
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def positions() -> None:
    """A LoRA that acts from some tokens on."""
    logits = []
    for model, adapter in both("llama", ll.LoRAConfig(r=4, invocation_tokens=[3, 10], **EVERYWHERE)):
        move(adapter)
        logits.append(model(input_ids=BATCH).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)


def refusals() -> None:
    """Everything that isn't right on parts is refused by name, before anything changes."""
    model = tensor_parallel("qwen3")
    modules, keys = [vars(module).copy() for module in model.modules()], list(model.state_dict())
    for variant in sorted(ll.REGISTRY.keys() - {"lora", "history", "norm", "tokens", "bias"}):
        with pytest.raises(ll.TargetError, match=rf"_proj: '{variant}' isn't two factors .*\n  use lora, or leave"):
            ll.plan(model, config(variant))
    with pytest.raises(ll.TargetError, match=r"q_proj: 'bias' isn't two factors"):
        ll.plan(tensor_parallel("biases"), config("bias"))
    hooked = r"each process has the whole layer, and a part of its gradients alone\n.*load the model without tp_plan"
    for method, named, reason in (
        ("norm", r"self_attn\.q_norm", hooked),
        ("tokens", "embed_tokens", "tensor parallelism has sharded this embedding, and adapters go on its linear"),
    ):
        with pytest.raises(ll.TargetError, match=f"{named}: {reason}"):
            ll.attach(model, config(method))
    with pytest.raises(ll.TargetError, match=r"embed_tokens: tensor parallelism has sharded this embedding"):
        ll.attach(model, ll.LoRAConfig(r=2, kinds="embedding", target_names="embed_tokens"))
    assert list(model.state_dict()) == keys
    assert modules == [vars(module) for module in model.modules()]
    with pytest.raises(ll.TargetError, match=r"placed as \(_StridedShard.*, and factors follow shards of its rows"):
        ll.attach(tensor_parallel("phi3", {"model.layers.*.mlp.gate_up_proj": "packed_colwise"}), ll.LoRAConfig(r=2))
    experts = tensor_parallel("mixtral")
    with pytest.raises(ll.TargetError, match=r"mlp\.experts\S*: tensor parallelism has sharded this experts"):
        ll.attach(experts, ll.LoRAConfig(r=2, kinds="experts"))


def afterwards() -> None:
    """What would read or move a part alone is refused on an attached adapter; an audit and a graph go on."""
    one_process = r"sharded by tensor parallelism\n  save it, and"
    sharded = "sharded by tensor parallelism"
    sharded_weight = r"sharded by tensor parallelism\n  lora_lite\.save the adapter"
    model = tensor_parallel("llama")
    adapter = ll.attach(model, ll.LoRAConfig(r=2, **EVERYWHERE))
    up, down = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    file = FOLDER / "afterwards"
    ll.save(model, file)
    dist.barrier()
    for action, error, message in (
        (lambda: ll.merge(model), ll.TargetError, f"{sharded_weight}, then merge in one process"),
        (lambda: ll.merged(model).__enter__(), ll.TargetError, sharded_weight),
        (lambda: ll.freeze_into(model), ll.TargetError, f"{one_process} keep it in one process"),
        (lambda: ll.combine(model, {"default": 1.0}, into="c"), ll.TargetError, f"{one_process} combine it in one"),
        (lambda: ll.capturable(model).__enter__(), ll.TargetError, f"{sharded}, which moves"),
        (lambda: ll.unload_to(model, "cpu", "default"), ll.TargetError, rf"{sharded}\n  keep it where it is"),
        (lambda: ll.load(model, file, replace=True), ll.TargetError, rf"{sharded}\n.* detach it, then load"),
        (lambda: ll.capture(model, [BATCH], [up], what="output"), ll.TargetError, f"{up}: .* sees a part of its out"),
        (lambda: ll.capture(model, [BATCH], [down], what="input"), ll.TargetError, f"{down}: .* a part of its input"),
    ):
        with pytest.raises(error, match=message):
            action()
    audit = ll.audit(model, {"input_ids": BATCH, "labels": BATCH})
    assert all(layer.ran and layer.gradients == layer.parameters == 2 for layer in audit.layers)
    for path, what in ((up, "input"), (down, "output"), ("model.layers.0", "residual")):
        seen, wanted = (ll.capture(m, [BATCH], [path], what=what)[path].mean for m in (model, whole("llama")))
        torch.testing.assert_close(seen, wanted, rtol=1e-5, atol=1e-6)
    move(adapter)
    with torch.no_grad():
        fast = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(fast(input_ids=BATCH).logits, model(input_ids=BATCH).logits, rtol=1e-5, atol=1e-5)


def room() -> None:
    """Room for other ranks: a whole file's factors are put in place, and what is beyond them stays zero."""
    cfg, logits, files = ll.LoRAConfig(r=2, **EVERYWHERE), [], []
    for i, (model, adapter) in enumerate(both("llama", cfg, max_rank=4)):
        files.append(FOLDER / f"room{i}.{dist.get_rank() * (1 - i)}")
        assert not any(full(t)[2:].any() for k, t in adapter.named_tensors() if k.endswith("lora_A"))
        if i == 0:
            other = whole("llama")
            move(ll.attach(other, ll.LoRAConfig(r=3, **EVERYWHERE)))
            ll.save(other, file := FOLDER / f"other.{dist.get_rank()}")
        ll.load(model, file, replace=True)
        logits.append(model(input_ids=BATCH).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)


def by_torch() -> None:
    """torch's own parallelize_module, whose layers are called with DTensors and give plain tensors."""
    styles = torch_parallel
    plan: dict[str, Any] = {f"model.layers.*.self_attn.{n}_proj": styles.ColwiseParallel() for n in "qkv"}
    plan |= {f"model.layers.*.mlp.{n}_proj": styles.ColwiseParallel() for n in ("gate", "up")}
    plan |= {f"model.layers.*.{n}_proj": styles.RowwiseParallel() for n in ("self_attn.o", "mlp.down")}
    plan |= {"lm_head": styles.ColwiseParallel(output_layouts=Replicate())}
    mesh = init_device_mesh("cpu", (WORLD,))
    cfg = ll.LoRAConfig(r=4, dropout=0.3, target_names=("_proj$", "lm_head"), target_roles=())

    def parallelized(name: str) -> Any:
        return torch_parallel.parallelize_module(whole(name), mesh, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "tensor_parallel", parallelized)
        trains_as_one("llama", cfg)
    odd = {"model.layers.0.mlp.up_proj": styles.ColwiseParallel(use_local_output=False)}
    model = torch_parallel.parallelize_module(whole("llama"), mesh, odd)
    ll.attach(model, ll.LoRAConfig(r=2, target_names="layers.0.mlp.up_proj"))
    up = model.model.layers[0].mlp.up_proj
    with pytest.raises(ll.TargetError, match=r"up_proj: a tensor-parallel layer of 64 -> 128 was called with"):
        up(torch.ones(1, 64))
    small = torch_parallel.parallelize_module(
        torch.nn.Sequential(torch.nn.Linear(8, 1)), mesh, {"0": styles.ColwiseParallel()}
    )
    with pytest.raises(ll.TargetError, match=r"0: it is too small for 2 processes: the last has no shard of it\n"):
        ll.attach(small, ll.LoRAConfig(r=1, target_names="0"))
    transposed = whole("gpt2")
    distribute_module(transposed.transformer.h[0].mlp.c_fc, mesh, by_columns)
    with pytest.raises(ll.TargetError, match=r"mlp\.c_fc: tensor parallelism has sharded this Conv1D, and"):
        ll.attach(transposed, ll.LoRAConfig(r=2, target_names="c_fc"))
    norms = {"model.norm": styles.SequenceParallel()}
    with pytest.raises(
        ll.TargetError, match=r"model\.norm: each process computes it for a part of the tokens .*\n  leave"
    ):
        ll.attach(torch_parallel.parallelize_module(whole("llama"), mesh, norms), ll.LoRAConfig(r=1))
    odd = {"model.layers.0.mlp.down_proj": styles.RowwiseParallel(output_layouts=Shard(0))}
    model = torch_parallel.parallelize_module(whole("llama"), mesh, odd)
    ll.attach(model, ll.LoRAConfig(r=2, target_names="layers.0.mlp.down_proj"))
    with pytest.raises(
        ll.TargetError, match=r"down_proj: .* with, and gave, \(4, 64\) and \(2, 64\)\n  wanted the same"
    ):
        model.model.layers[0].mlp.down_proj(torch.ones(4, 64))


def by_columns(name: str, module: torch.nn.Module, mesh: Any) -> None:
    for key, tensor in module.named_parameters():
        shard = distribute_tensor(tensor.detach(), mesh, [Shard(tensor.ndim - 1)])
        module.register_parameter(key, torch.nn.Parameter(shard))


def by_trainer() -> None:
    """transformers' Trainer: batches are the same in all processes, and losses and values those of one."""
    model = tensor_parallel("llama")
    cfg = ll.LoRAConfig(r=4, **EVERYWHERE)
    torch.manual_seed(5)
    adapter = ll.attach(model, cfg)
    batches: list[torch.Tensor] = []
    seen = model.register_forward_pre_hook(
        lambda module, args, options: batches.append(options["input_ids"].clone()), with_kwargs=True
    )
    options = {"max_grad_norm": 0.05, "adam_epsilon": 1e-4, "lr_scheduler_type": "constant", "save_only_model": True}
    with pytest.MonkeyPatch.context() as patch:  # Accelerate asks for an accelerator; what it does needs none
        patch.setattr(ParallelismConfig, "_validate_accelerator", lambda *_: None)
        args = arguments(FOLDER / "trained", max_steps=3, save_steps=3, logging_steps=1, **options)
        trainer = AdapterTrainer(model, args, train_dataset=Tokens())
        trainer.train()
    seen.remove()
    for batch in batches:
        same_in_all_processes(batch)
    logs = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]

    alone = whole("llama").train()
    torch.manual_seed(5)
    one = ll.attach(alone, cfg)
    optimizer, wanted = torch.optim.AdamW(one.parameters(), lr=args.learning_rate, eps=1e-4, weight_decay=0), []
    for batch in batches[:3]:
        loss = alone(input_ids=batch, labels=batch).loss
        loss.backward()
        wanted.append((loss.item(), float(torch.nn.utils.clip_grad_norm_(list(one.parameters()), 0.05))))
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(torch.tensor(logs), torch.tensor(wanted), rtol=1e-4, atol=1e-5)
    assert wanted[0][1] > 0.05  # the norm over all processes is clipped
    again = whole("llama")
    file = ll.load(again, FOLDER / "trained" / "checkpoint-3" / "default.safetensors").state_dict()
    for key, tensor in one.named_tensors():
        torch.testing.assert_close(full(dict(adapter.named_tensors())[key]), tensor, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(file, one.state_dict(), rtol=1e-4, atol=2e-6)


def member(rank: int) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.set_num_threads(1)
    logger.disable("lora_lite")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # asked for, and not used: the group is there
    store = f"file://{FOLDER}/rendezvous"
    dist.init_process_group("gloo", store, timeout=timedelta(seconds=60), rank=rank, world_size=WORLD)
    jobs = (training, files, life, positions, refusals, afterwards, room, by_torch, by_trainer)
    for job in jobs if len(sys.argv) == 2 else [job for job in jobs if job.__name__ in sys.argv[2:]]:
        try:
            job()
        except Exception as error:
            raise RuntimeError(job.__name__) from error
    leave()


if __name__ == "__main__":
    write_folders()
    mp.start_processes(member, nprocs=WORLD, start_method="fork")  # their imports are done
