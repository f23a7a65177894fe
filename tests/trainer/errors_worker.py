"""One of two processes in which one of them fails: python errors_worker.py zero|fsdp attach|raises FOLDER."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import conftest  # noqa: F401  puts the folders of the tests on the path
import pytest
import torch
import torch.distributed as dist
from models import config, perturb, tiny_llama
from processes import in_two
from safetensors.torch import load_file
from torch import nn

import lora_lite as ll

KIND, JOB, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
STAGE_3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": 2,
}


def sharded(model: Any) -> Any:
    if KIND == "zero":
        import deepspeed

        deepspeed.zero.Init(module=model, config_dict_or_path=STAGE_3)
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def attached() -> tuple[Any, ll.Adapter]:
    model = tiny_llama()
    if KIND == "zero":
        return model, ll.attach(sharded(model), config("dora"))
    adapter = ll.attach(model, config("dora"))
    return sharded(model), adapter


def fails(rank: int, reason: str) -> Any:
    """All processes raise: this one with its reason, the others with its name."""
    mine = dist.get_rank() == rank
    return pytest.raises(ll.LoraLiteError, match=reason if mine else rf"(?s)process {rank} failed.*{reason}")


def raises() -> None:
    """Each process raises when one has failed, and they go on in step: the next call works."""
    model, _ = attached()
    rank, good = dist.get_rank(), FOLDER / "good.safetensors"
    ll.save(model, good)
    if rank == 0:
        (FOLDER / "file").write_text("")
        (FOLDER / "folder").mkdir()
    dist.barrier()
    with fails(0, "was not written: (FileExists|NotADirectory)Error"):  # only the first process writes
        ll.save(model, FOLDER / "file" / "a.safetensors")
    with fails(0, "is a folder"):
        ll.save(model, FOLDER / "folder")
    norm = model.model.layers[0].mlp.up_proj.lora_n0  # a buffer, of which each process has a copy
    before = norm.clone()
    if rank == 1:
        norm[0] = torch.nan
    with fails(1, "hold NaN"):
        ll.save(model, FOLDER / "nan.safetensors")
    assert not (FOLDER / "nan.safetensors").exists()
    norm.copy_(before)
    with fails(1, "is not a file"):
        ll.restore(model, good if rank == 0 else FOLDER / "nowhere")
    ll.restore(model, good)
    if KIND == "fsdp":
        audits()
        beside_a_whole_one()
        on_a_history()
    else:
        fresh = sharded(tiny_llama())
        with fails(1, "is not a file"):
            ll.load(fresh, good if rank == 0 else FOLDER / "nowhere")
        ll.load(fresh, good)
    ll.save(model, FOLDER / "again.safetensors")
    dist.barrier()
    before, after = (load_file(file) for file in (good, FOLDER / "again.safetensors"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


class Conditional(nn.Module):
    """A layer that the first process's batches call alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.a(x)
        return self.b(y) if x[0, 0] == 0 else y


def audits() -> None:
    """An audit of a sharded model is one of all its processes."""
    from torch.distributed.fsdp import fully_shard

    model = Conditional()
    for parameter in ll.attach(model, config("lora", target_names="^[ab]$")).parameters():
        parameter.requires_grad_(False)  # or FSDP2 itself would wait for a gradient that one process hasn't
    fully_shard(model)
    with fails(1, "not called in this forward"):
        ll.audit(model, torch.full((2, 8), float(dist.get_rank())))
    assert len(ll.audit(model, torch.zeros(2, 8)).layers) == 2


def beside_a_whole_one() -> None:
    """Of a trainer's checkpoint, where one adapter is sharded and another isn't."""
    from torch.distributed.fsdp import fully_shard

    from lora_lite.trainer.files import restore_all, save_all

    model, rank = tiny_llama(), dist.get_rank()
    for name, block in (("sharded", 0), ("whole", 1)):
        ll.attach(model, config("lora", target_names=rf"layers\.{block}\..*up_proj"), name=name)
    fully_shard(model.model.layers[0])
    assert [adapter.is_sharded for adapter in ll.adapters(model).values()] == [True, False]
    both = FOLDER / f"both{rank}"
    save_all(model, FOLDER / "both0", rank == 0, together=True)
    if rank == 0:
        (FOLDER / "blocked" / "whole.safetensors").mkdir(parents=True)
    else:
        both.mkdir()
        (both / "sharded.safetensors").write_bytes((FOLDER / "both0" / "sharded.safetensors").read_bytes())
        (both / "whole.safetensors").write_bytes(b"no file of safetensors")
    dist.barrier()
    with fails(0, "is a folder"):
        save_all(model, FOLDER / "blocked", rank == 0, together=True)
    with fails(1, "both1/whole.safetensors"):
        restore_all(model, both, together=True)
    restore_all(model, FOLDER / "both0", together=True)


def on_a_history() -> None:
    """The first process saves a whole adapter alone, and digests the history on sharded layers, whose tensors are
    buffers, which fully_shard leaves whole."""
    from torch.distributed.fsdp import fully_shard

    from lora_lite.trainer.files import restore_all, save_all

    model = tiny_llama()
    for block in range(2):
        perturb(ll.attach(model, config("lora", target_names=rf"layers\.{block}\..*up_proj")))
        if block == 0:
            ll.freeze_into(model)
    fully_shard(model.model.layers[0])
    assert [adapter.is_sharded for adapter in ll.adapters(model).values()] == [True, False]
    save_all(model, FOLDER / "kept", dist.get_rank() == 0, together=True)
    restore_all(model, FOLDER / "kept", together=True)


@ll.register
class Broken:
    """A method whose start fails in the second process, between the others' reads of partitioned weights."""

    name = "broken"
    base_weight = "read"

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ll.ParamSpec]:
        return {"lora_d": ll.ParamSpec((d_out,), init="zeros")}

    @staticmethod
    def init(layer: Any, cfg: Any) -> None:
        if dist.get_rank() == 1 and layer.path.endswith("down_proj"):
            raise RuntimeError("out of memory, here alone")
        layer.lora_d.copy_(layer.dense_weight().mean(1))

    @staticmethod
    def forward(layer: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + layer.lora_d


def main() -> None:
    if KIND == "zero":
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    else:
        dist.init_process_group("gloo")
    if JOB == "raises":
        raises()
    else:
        model = sharded(tiny_llama()) if KIND == "zero" else tiny_llama()
        ll.attach(model, ll.AdapterConfig(variant="broken"))  # of DDP and FSDP2 it comes before any collective call
        print("attached", flush=True)
        dist.all_reduce(torch.ones(1))  # as the next step of a training


if __name__ == "__main__":
    if KIND == "zero":
        import deepspeed
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # both processes would compile it
    in_two(main, 150)
