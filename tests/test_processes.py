"""torch.compile(fullgraph=True), DDP and FSDP2, each in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_laws import VARIANTS


def run(*args: str) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("workers.py")), *args],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("variant", VARIANTS)
def test_compile_fullgraph(variant: str) -> None:
    run("compile", variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("job", ["ddp", "fsdp"])
def test_two_processes_train_as_one(job: str, variant: str, tmp_path: Path) -> None:
    run(job, str(tmp_path), variant)
