"""Two gloo processes in which transformers loads a model by its tensor-parallel plan: what adapters are on it.

python tests/tp_worker.py FOLDER

Every law compares with one process, which each of the two is as well: the same folder, loaded without a plan.
"""

import faulthandler
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  puts the folders of the tests on the path, and switches shape checks on
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loguru import logger
from models import SIZES, config, moe, tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import parallel as torch_parallel
from transformers import (
    AutoModelForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.distributed import DistributedConfig

import lora_lite as ll
from lora_lite.io.safetensors import read_any

WORLD, SECONDS = 2, 150  # for all jobs; they take a tenth of it
BATCH = torch.arange(96).reshape(4, 24) * 7 % 96
EVERYWHERE: dict[str, Any] = {"target_names": ("_proj$",), "target_roles": ()}
FOLDER = Path(sys.argv[-1])


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
    }
    with torch.no_grad():
        for name, parameter in models["qwen2"].named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    for name, model in models.items():
        model.save_pretrained(FOLDER / name)


def whole(name: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32, **options)


def parted(name: str) -> Any:
    """The model of a folder as its own plan parts it."""
    return whole(name, distributed_config=DistributedConfig(tp_plan="auto", tp_size=WORLD))


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def both(name: str, cfg: Any, seed: int = 5, **options: Any) -> Iterator[tuple[Any, ll.Adapter]]:
    """The model in one process, then in two, with an adapter; the second process is at another place in its generator."""
    for load in (whole, parted):
        model = load(name)
        torch.manual_seed(seed + (dist.get_rank() if load is parted else 0))
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
        torch.manual_seed(11)  # of dropout
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
    trains_as_one("mixtral", ll.LoRAConfig(r=4, target_names="self_attn", target_roles=()))
    for is_reentrant in (True, False):
        trains_as_one("llama", ll.LoRAConfig(r=4, dropout=0.3, **EVERYWHERE), checkpointed(is_reentrant))


def checkpointed(is_reentrant: bool) -> Any:
    def prepare(model: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
        model.enable_input_require_grads()

    return prepare


def members() -> list[Any]:
    return [training]


def member(rank: int) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.set_num_threads(1)
    logger.disable("lora_lite")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    store = f"file://{FOLDER}/rendezvous"
    dist.init_process_group("gloo", store, timeout=timedelta(seconds=60), rank=rank, world_size=WORLD)
    for job in members():
        try:
            job()
        except Exception as error:
            raise RuntimeError(job.__name__) from error
    dist.destroy_process_group()


if __name__ == "__main__":
    write_folders()
    mp.spawn(member, nprocs=WORLD)
