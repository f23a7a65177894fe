"""The examples of launchers, run as they are on a tiny model."""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

import lora_lite as ll

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.slow


def torchrun(*arguments: str) -> int:
    """How many steps two processes print the loss of."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(EXAMPLES / "torchrun.py"), *arguments], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return len(re.findall(r"step \d+: loss [\d.]+", done.stdout))


def contents(run: Path) -> dict[str, list[float]]:
    return {key: tensor.tolist() for key, tensor in load_file(run / "adapter.safetensors").items()}


def test_torchrun_by_ddp_and_by_fsdp_and_from_a_checkpoint(tiny_chat: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_chat, dtype=torch.float32, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    for file in Path(tiny_chat).glob("*token*"):
        shutil.copy(file, tmp_path / "model")
    common = ("--model", str(tmp_path / "model"), "--tokens", "16")
    wholes = []
    for way in ((), ("--fsdp",)):
        whole, part = (tmp_path / f"{name}{len(way)}" for name in ("whole", "part"))
        assert torchrun(*common, *way, "--steps", "4", "--out", str(whole)) == 4
        assert torchrun(*common, *way, "--steps", "2", "--out", str(part)) == 2
        assert torchrun(*common, *way, "--steps", "4", "--resume", "--out", str(part)) == 2
        assert contents(whole) == contents(part)
        stored = FileSystemReader(part / "checkpoint").read_metadata().state_dict_metadata
        keys = [key for key in stored if key.startswith("adapter.")]
        assert keys
        assert all(".lora_" in key for key in keys)  # no tied weight
        wholes.append(ll.load(copy.deepcopy(model), whole / "adapter.safetensors").state_dict())
    torch.testing.assert_close(*wholes, rtol=1e-3, atol=1e-5)


LOST = """
import os, sys
from pathlib import Path
import ray_train

train, mark = ray_train.train, Path(sys.argv.pop(1))

def lost_once(settings):
    import ray.train

    report, rank = ray.train.report, ray.train.get_context().get_world_rank()

    def reported(metrics, **options):
        report(metrics, **options)
        steps = mark.with_name(f"steps{rank}")
        steps.open("a").write(f"{metrics['loss']} ")
        if rank == 1 and len(steps.read_text().split()) == 2 and not mark.exists():
            mark.touch()
            os._exit(1)

    ray.train.report = reported
    train(settings)

ray_train.train = lost_once
ray_train.main(sys.argv[1:])
"""
"""The second worker dies once, after its second step."""


def test_ray_train_where_it_is_installed_goes_on_when_a_worker_is_lost(tiny_chat: str, tmp_path: Path) -> None:
    pytest.importorskip("ray.train")
    options = ["--model", tiny_chat, "--out", str(tmp_path / "ray"), "--steps", "4"]
    command = [sys.executable, "-c", LOST, str(tmp_path / "mark"), *options]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, cwd=EXAMPLES, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "mark").exists()
    losses = (tmp_path / "steps1").read_text().split()
    assert losses[2] == losses[1] or len(losses) == 4  # the lost step again, unless its checkpoint was there in time
    assert len(losses) <= 5  # without a checkpoint it would be 2 + 4
    (file,) = (path.with_name("adapter.safetensors") for path in tmp_path.rglob("steps") if path.read_text() == "4")
    model = AutoModelForCausalLM.from_pretrained(tiny_chat, dtype=torch.float32)
    assert any(t.any() for key, t in ll.load(model, file).state_dict().items() if key.endswith("lora_B"))
