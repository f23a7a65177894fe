"""One of two processes under Accelerate: python accelerate_worker.py FOLDER."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import conftest  # noqa: F401  puts the folders of the tests on the path
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from models import config, tiny_llama
from processes import in_two
from torch.nn.parallel import DistributedDataParallel

import lora_lite as ll
from lora_lite.trainer.accelerate import keep_adapters

FOLDER = Path(sys.argv[1])
BATCH = torch.arange(48).reshape(4, 12)


def prepared() -> tuple[Accelerator, Any, Any]:
    accelerator = Accelerator(cpu=True)
    keep_adapters(accelerator)
    model = tiny_llama()
    torch.manual_seed(5)
    adapter = ll.attach(model, config("dora"))
    return accelerator, *accelerator.prepare(model.train(), torch.optim.AdamW(adapter.parameters(), lr=1e-2))


def train(accelerator: Accelerator, model: Any, optimizer: Any, steps: int) -> list[float]:
    batch, losses = BATCH.chunk(2)[accelerator.process_index], []
    for _ in range(steps):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    whole = prepared()
    assert isinstance(whole[1], DistributedDataParallel)
    train(*whole, 2)
    whole[0].save_state(str(FOLDER / "state"))
    dist.barrier()
    names = {file.name for file in (FOLDER / "state").iterdir()}
    assert names == {"default.safetensors", "optimizer.bin", "random_states_0.pkl", "random_states_1.pkl"}
    last = train(*whole, 2)
    again = prepared()
    again[0].load_state(str(FOLDER / "state"))
    assert train(*again, 2) == last
    pairs = zip(*(ll.adapters(parts[1])["default"].parameters() for parts in (whole, again)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)

    # What fails in one process fails in both.
    file = FOLDER / "taken"
    if dist.get_rank() == 0:
        file.write_text("")
    with pytest.raises((OSError, ll.LoraLiteError)):
        save_into(whole[0], file)
    private = FOLDER / f"of{dist.get_rank()}"  # as on disks of their own: the first process wrote to its own
    whole[0].save_state(str(private))
    with pytest.raises(ll.LoraLiteError, match=r"missing: .*of1/default\.safetensors"):
        whole[0].load_state(str(private))
    assert len(train(*whole, 1)) == 1


def save_into(accelerator: Accelerator, file: Path) -> None:
    """Accelerate makes the folder itself, so the first process finds that it can't write when the hook runs."""
    for hook in accelerator._save_model_state_pre_hook.values():
        hook(accelerator._models, [{}], str(file))


if __name__ == "__main__":
    in_two(main, 150)
