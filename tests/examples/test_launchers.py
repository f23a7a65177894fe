"""The examples of launchers, run as they are on a tiny model."""

import copy
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


def test_ray_train_where_it_is_installed(tiny_chat: str, tmp_path: Path) -> None:
    pytest.importorskip("ray.train")
    command = [sys.executable, str(EXAMPLES / "ray_train.py"), "--model", tiny_chat, "--out", str(tmp_path / "ray")]
    done = subprocess.run([*command, "--steps", "2"], capture_output=True, text=True, timeout=280, cwd=EXAMPLES)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "ray").rglob("adapter.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tiny_chat, dtype=torch.float32)
    assert any(t.any() for key, t in ll.load(model, file).state_dict().items() if key.endswith("lora_B"))
