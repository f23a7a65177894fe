"""A plain loop in several processes: DDP, or FSDP2 with --fsdp, on SmolLM2, whose checkpoint holds the adapter alone.

    torchrun --nproc-per-node 2 examples/torchrun.py --steps 4
    torchrun --nproc-per-node 2 examples/torchrun.py --steps 8 --resume     # goes on from --out, to the same bits

On machines without an accelerator the processes talk by gloo, with accelerators by the backend that torch has for them.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from smollm2 import smollm2_folder
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_lite as ll

ADAPTERS = StateDictOptions(ignore_frozen_params=True, strict=False)  # what is frozen is the base
TEXT = Path(__file__).with_name("smollm2.py")  # something to learn: this folder's own code


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; returns the loss of each step, averaged over the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder; SmolLM2-135M-Instruct if none is given")
    parser.add_argument("--out", type=Path, default=Path("torchrun-out"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(arguments)

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    dist.init_process_group(dist.get_default_backend_for_device(device))
    rank = dist.get_rank()
    if device.type != "cpu":
        torch.accelerator.set_device_index(rank % torch.accelerator.device_count())

    folder = args.model or str(smollm2_folder())
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device)
    torch.manual_seed(0)  # before attach: each process starts from the same numbers
    adapter = ll.attach(model, ll.LoRAConfig(r=8))  # before the model is wrapped
    if args.fsdp:
        for block in model.model.layers:
            fully_shard(block)
        wrapped = fully_shard(model)
    else:
        wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)

    def state() -> dict[str, Any]:
        tensors = get_model_state_dict(wrapped, options=ADAPTERS)
        tensors = {key: t for key, t in tensors.items() if ".lora_" in key}  # a tied weight's second name stays there
        moments = get_optimizer_state_dict(wrapped, optimizer, options=ADAPTERS)
        return {"adapter": tensors, "optimizer": moments, "step": torch.tensor(len(losses))}

    losses: list[float] = []
    first = 0
    if args.resume:
        stored = state()
        dcp.load(stored, checkpoint_id=args.out / "checkpoint")
        set_model_state_dict(wrapped, stored["adapter"], options=ADAPTERS)
        set_optimizer_state_dict(wrapped, optimizer, stored["optimizer"], options=ADAPTERS)
        first = int(stored["step"])

    tokens = AutoTokenizer.from_pretrained(folder)(TEXT.read_text(), return_tensors="pt").input_ids[0]
    rows = tokens[: len(tokens) // args.tokens * args.tokens].view(-1, args.tokens).to(device)
    for step in range(first, args.steps):
        batch = rows[[(dist.get_world_size() * step + rank) % len(rows)]]
        optimizer.zero_grad()
        loss = wrapped(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
        if rank == 0:
            print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)

    dcp.save(state() | {"step": torch.tensor(args.steps)}, checkpoint_id=args.out / "checkpoint")  # to go on from
    if args.fsdp or rank == 0:  # sharded tensors are gathered: there all processes call it, and the first one writes
        ll.save(model, args.out / "adapter.safetensors")  # to load anywhere
    dist.barrier()
    # Gloo's threads let go of the barrier in this time: they need Python's lock, which a group's end holds as it waits.
    time.sleep(1)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
