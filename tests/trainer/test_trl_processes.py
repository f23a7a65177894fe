"""References of preference training in two processes: DDP, ZeRO-2 and ZeRO-3 give the same figures."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from processes import both_pass
from trl_tiny import PAIRS

JOBS = ("ddp", "zero2", "zero3")


@pytest.mark.slow
def test_the_figures_are_those_of_ddp(tmp_path: Path) -> None:
    for job in JOBS:  # one each: the log-probabilities of another would be taken from there
        Dataset.from_list(PAIRS * 2).save_to_disk(tmp_path / f"pairs-{job}")
    both_pass("trl_worker.py", tmp_path, folder=tmp_path, timeout=600)
    ddp, *sharded = (json.loads((tmp_path / f"{job}.json").read_text()) for job in JOBS)
    assert ddp["start"]["rewards/margins"][0] == 0 != ddp["dpo"]["rewards/margins"][0]
    for job, figures in zip(JOBS[1:], sharded, strict=True):
        assert figures.keys() == ddp.keys() - ({"start"} if job == "zero3" else set())
        for kind, by_name in figures.items():
            for name, values in by_name.items():
                assert values == pytest.approx(ddp[kind][name], rel=1e-4, abs=1e-5), (job, kind, name)
