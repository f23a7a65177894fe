"""The notebooks run end to end on the real model, and the site shows what they gave."""

import base64
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from notebooks import FOLDER, MODEL, run

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 60_000
"""Of a picture."""


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook: Any) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_committed_with_what_it_gave(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    pictures = [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert all(len(base64.b64decode(picture)) < MOST_BYTES for picture in pictures)
    assert pictures or "merge" in file.stem
    assert len(printed(notebook)) > 200
    assert any(MODEL in cell.source for cell in notebook.cells)
    assert not re.search(r"/(root|home|tmp|work)/", file.read_text())  # no path of the machine that ran it


@pytest.mark.filterwarnings("ignore")  # of Jupyter's own libraries
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(file: Path, smollm2: str) -> None:
    shown, again = nbformat.read(file, as_version=4), run(file, smollm2)
    kinds = [[output.output_type for output in outputs(notebook)] for notebook in (shown, again)]
    assert kinds[0] == kinds[1]
    words = [[line.split()[:1] for line in printed(notebook).splitlines()] for notebook in (shown, again)]
    assert len(words[0]) == len(words[1])
    if file.stem == "merge_4bit":
        kl = dict(re.findall(r"^(.+?) {2,}(\d+\.\d+)$", printed(again), re.M))
        assert float(kl["merge_checkpoint, as_trained"]) < float(kl["merge, requantize"]) / 100
        assert float(kl["merge, requantize"]) > float(kl["untrained"]) / 3
    else:
        assert "the same bits: True" in printed(again) or file.stem == "steer"
