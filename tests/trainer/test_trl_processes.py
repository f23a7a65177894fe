"""References of preference training in two processes: DDP, ZeRO-2 and ZeRO-3 give the same figures."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl_tiny import PAIRS

JOBS = ("ddp", "zero2", "zero3")


def figures_of(job: str, folder: Path) -> Any:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(Path(__file__).with_name("trl_worker.py")), job, str(folder)]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ExitStack() as stack:
        processes = []
        for rank in ("0", "1"):
            log = stack.enter_context((folder / f"{job}{rank}.log").open("w"))
            env = {**os.environ, **shared, "DS_ACCELERATOR": "cpu", "RANK": rank, "LOCAL_RANK": rank}
            process = stack.enter_context(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
            stack.callback(process.kill)
            processes.append(process)
        codes = [process.wait(timeout=300) for process in processes]
    assert codes == [0, 0], "\n".join((folder / f"{job}{rank}.log").read_text()[-3000:] for rank in range(2))
    return json.loads((folder / f"{job}.json").read_text())


@pytest.mark.slow
def test_the_figures_are_those_of_ddp(tmp_path: Path) -> None:
    Dataset.from_list(PAIRS * 2).save_to_disk(tmp_path / "pairs")
    ddp, *sharded = (figures_of(job, tmp_path) for job in JOBS)
    assert ddp["start"]["rewards/margins"][0] == 0 != ddp["dpo"]["rewards/margins"][0]
    for job, figures in zip(JOBS[1:], sharded, strict=True):
        assert figures.keys() == ddp.keys() - ({"start"} if job == "zero3" else set())
        for kind, by_name in figures.items():
            for name, values in by_name.items():
                assert values == pytest.approx(ddp[kind][name], rel=1e-4, abs=1e-5), (job, kind, name)
