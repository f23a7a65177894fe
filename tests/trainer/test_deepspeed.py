"""DeepSpeed by each way to it, and no process that waits for another's error: in two gloo processes each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import both_pass, two_processes

pytestmark = pytest.mark.slow
BUILD = (
    "import deepspeed.ops; deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False;"
    "import torch; from deepspeed.ops.adam import DeepSpeedCPUAdam;"
    "DeepSpeedCPUAdam([torch.nn.Parameter(torch.ones(1))])"
)
"""One process compiles the operator, as two would wait for each other's lock."""


@pytest.mark.parametrize("stage", [2, 3])
def test_training_goes_on_from_a_checkpoint_to_the_same_bits(stage: int, tmp_path: Path) -> None:
    jobs = [f"{way} {stage}" for way in ("plain", "accelerate", "trainer")]
    both_pass("deepspeed_worker.py", tmp_path, *jobs, folder=tmp_path, timeout=900)


@pytest.mark.skipif(
    "LORA_LITE_CPU_ADAM" not in os.environ or shutil.which("g++") is None,
    reason="DeepSpeed compiles its CPUAdam for minutes: set LORA_LITE_CPU_ADAM=1, where there is a g++",
)
def test_states_and_parameters_on_the_cpu_with_deepspeeds_own_adam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    subprocess.run([sys.executable, "-c", BUILD], check=True, timeout=900, capture_output=True)
    both_pass("deepspeed_worker.py", tmp_path, "cpu-adam", folder=tmp_path)


@pytest.mark.parametrize("kind", ["zero", "fsdp"])
def test_all_processes_raise_what_one_of_them_does(kind: str, tmp_path: Path) -> None:
    both_pass("errors_worker.py", kind, "raises", tmp_path, folder=tmp_path, timeout=150)


@pytest.mark.parametrize("kind", ["zero", "fsdp"])
def test_an_attach_that_fails_in_one_process_ends_both(kind: str, tmp_path: Path) -> None:
    ended = two_processes("errors_worker.py", kind, "attach", tmp_path, folder=tmp_path, timeout=150)
    assert 0 not in ended.codes
    assert "out of memory, here alone" in ended.logs[1]
    assert ended.apart < 30  # seconds; without a launcher, which would end it at once
