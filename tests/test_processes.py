"""torch.compile(fullgraph=True), DDP, FSDP2 and tensor parallelism in processes of their own: what each goes through,
workers.py and tp_worker.py say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("job", ["compile", "ddp", "fsdp"])
def test_in_processes(job: str, tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("workers.py")), job, str(tmp_path)]
    # A compiler that the machine names may be one for C alone, and what /tmp holds may come from it.
    environment = {key: value for key, value in os.environ.items() if key != "CXX"}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_a_model_that_its_plan_parts(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("tp_worker.py")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
