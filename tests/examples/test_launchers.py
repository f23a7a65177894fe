"""The examples of launchers, run as they are on a tiny model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lora_lite as ll

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.slow


def torchrun(*arguments: str) -> list[str]:
    """The losses that two processes print."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(EXAMPLES / "torchrun.py"), *arguments], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return re.findall(r"step \d+: loss [\d.]+", done.stdout)


def test_torchrun_by_ddp_and_by_fsdp_and_from_a_checkpoint(tiny_chat: str, tmp_path: Path) -> None:
    common = ("--model", tiny_chat, "--tokens", "16")
    whole = torchrun(*common, "--steps", "4", "--out", str(tmp_path / "ddp"))
    assert len(whole) == 4
    assert torchrun(*common, "--steps", "2", "--fsdp", "--out", str(tmp_path / "fsdp")) == whole[:2]
    again = torchrun(*common, "--steps", "4", "--fsdp", "--resume", "--out", str(tmp_path / "fsdp"))
    assert again == whole[2:]
    states = []
    for run in ("ddp", "fsdp"):
        model = AutoModelForCausalLM.from_pretrained(tiny_chat, dtype=torch.float32)
        states.append(ll.load(model, tmp_path / run / "adapter.safetensors").state_dict())
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-5)


def test_ray_train_where_it_is_installed(tiny_chat: str, tmp_path: Path) -> None:
    pytest.importorskip("ray.train")
    command = [sys.executable, str(EXAMPLES / "ray_train.py"), "--model", tiny_chat, "--out", str(tmp_path / "ray")]
    done = subprocess.run([*command, "--steps", "2"], capture_output=True, text=True, timeout=280, cwd=EXAMPLES)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "ray").rglob("adapter.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tiny_chat, dtype=torch.float32)
    assert any(t.any() for key, t in ll.load(model, file).state_dict().items() if key.endswith("lora_B"))
