"""One of two processes under Lightning's DDP: python lightning_worker.py FOLDER."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import conftest  # noqa: F401  puts the folders of the tests on the path
import torch
import torch.distributed as dist
from processes import in_two
from test_lightning import fit, module, values

import lora_lite as ll

FOLDER = Path(sys.argv[1])


def main() -> None:
    """Both train one adapter; a training that goes on from the end of an epoch has the same losses and values."""
    whole = module(default=0.5)
    trainer = fit(whole, FOLDER / "whole", 4, strategy="ddp", devices=2)
    assert trainer.world_size == dist.get_world_size() == 2
    others: list[list[float]] = [[], []]
    dist.all_gather_object(others, whole.losses)
    assert others[0] != others[1]  # each has its own batches
    for tensor in values(whole).values():
        both = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(both, tensor)
        assert torch.equal(*both)
    again = module(default=1.0)
    fit(again, FOLDER / "again", 4, resume=FOLDER / "whole" / "step=2.ckpt", strategy="ddp", devices=2)
    assert again.losses == whole.losses[2:]
    assert ll.adapters(again)["default"].scale == 0.5
    assert all(torch.equal(t, values(whole)[key]) for key, t in values(again).items())


if __name__ == "__main__":
    in_two(main, 150)
