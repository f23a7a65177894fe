"""torch.compile(fullgraph=True), DDP and FSDP2 in processes of their own: what each goes through, workers.py says."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("job", ["compile", "ddp", "fsdp"])
def test_in_processes(job: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("workers.py")
    done = subprocess.run(
        [sys.executable, str(script), job, str(tmp_path)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
