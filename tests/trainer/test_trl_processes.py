"""References of preference training in two processes: DDP, ZeRO-2 and ZeRO-3 give the same figures."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from processes import both_pass
from trl_tiny import PAIRS

JOBS = ("ddp", "zero2", "zero3")


def figures_of(job: str, folder: Path) -> Any:
    both_pass("trl_worker.py", job, folder, folder=folder)
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
