"""Every check of an adapter on one tiny model of each of the architectures that are used most.

architectures.json holds for each type the class of the model, its config and the shapes of its inputs; a check that
isn't "ok" has its outcome and the reason under "expected".
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lora_lite as ll

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from checks import CHECKS, OK, SILENT, WRONG, results_of  # noqa: E402

CASES = json.loads((Path(__file__).parent / "architectures.json").read_text())
PAIRS = [(name, variant) for name, case in CASES.items() for variant in case.get("variants", ["lora"])]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # transformers warns of its own models


def folder_of(name: str, folder: Path) -> Path:
    """The case as the script reads it."""
    case = CASES[name]
    inputs = {key: spec if isinstance(spec, dict) else drawn(key, spec) for key, spec in case["inputs"].items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case["config"]))
    (folder / "inputs.json").write_text(json.dumps({"class": case["class"], "inputs": inputs}))
    return folder


def drawn(key: str, shape: list[int]) -> dict[str, Any]:
    """Token ids, which all these vocabularies have, or numbers from 0 to 1."""
    return {"t": "int", "shape": shape, "high": 90} if key.endswith("_ids") else {"t": "float", "shape": shape}


@pytest.mark.parametrize(("name", "variant"), PAIRS)
def test_checks(name: str, variant: str, tmp_path: Path) -> None:
    results = list(results_of(folder_of(name, tmp_path / name), variant))
    expected = {check: outcome for check, (outcome, _) in CASES[name].get("expected", {}).items()}
    assert {check: outcome for check, outcome, _ in results if outcome != OK} == expected, results
    assert len(results) == (1 if "plan" in expected else len(CHECKS))


def test_a_target_that_nobody_misses_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ll, "audit", lambda model, batch: None)
    monkeypatch.setattr("lora_lite.base.layer.readers", lambda modules: {})  # as if no code showed what is read
    results = {result.check: result for result in results_of(folder_of("jamba", tmp_path / "jamba"), "lora")}
    assert results["ran"].outcome == SILENT
    assert "model.layers.0.mamba.dt_proj" in results["ran"].message


def test_wrong_numbers_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = ll.load

    def load_less(model: Any, path: Path) -> None:
        load(model, path).scale = 0.99

    monkeypatch.setattr(ll, "load", load_less)
    results = {result.check: result.outcome for result in results_of(folder_of("llama", tmp_path / "llama"), "lora")}
    assert [check for check, outcome in results.items() if outcome != OK] == ["load"]
    assert results["load"] == WRONG


def test_the_script_goes_on_and_reports(tmp_path: Path) -> None:
    """What a line is there for isn't run again; what can't be built is skipped."""
    cases, lines = tmp_path / "cases", tmp_path / "lines.jsonl"
    cases.mkdir()
    for name in ("llama", "resnet"):
        folder_of(name, cases / name)
    (cases / "broken").mkdir()
    (cases / "broken" / "inputs.json").write_text('{"class": "NoModel", "inputs": {}}')
    before = {"case": "llama", "variant": "lora", "seconds": 1.0, "results": [["plan", SILENT, "from before"]]}
    lines.write_text(json.dumps(before) + "\n")
    command = [sys.executable, BENCHMARKS / "architectures.py", "--cases", cases, "--json", lines]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    table = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert len(lines.read_text().splitlines()) == 3
    assert "lora: 3 models" in table
    assert "plan              -             -        1             -        1        1" in table
    assert "silent: from before\n  plan (1): llama" in table
    assert "refusal: TargetError in lora_lite: no layer matched the defaults" in table
    assert max(map(len, table.splitlines())) <= 80
