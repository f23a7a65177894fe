"""The site's notebooks, run: `python tests/docs/notebooks.py` writes what they give into the site's files."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "notebooks"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BEFORE = """import os, sys, warnings
os.environ |= {{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}}
os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed says what it looked for otherwise
sys.path.insert(0, {root!r})
warnings.simplefilter("ignore")
import loguru, transformers
loguru.logger.remove()
transformers.logging.disable_progress_bar()
"""
"""Quiet and offline, and with the library of this checkout: what a reader sees as well, without lines of a log."""


def joined(outputs: list[Any]) -> list[Any]:
    """What a cell printed as one text, without stderr: a kernel gives it in pieces, by the time."""
    whole: list[Any] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if whole and output.output_type == whole[-1].output_type == "stream":
            whole[-1].text += output.text
        else:
            whole.append(output)
        if "execution_count" in output:
            output.execution_count = None
    return whole


def run(file: Path, model: str) -> Any:
    """A notebook as it is after a run in an empty folder, with `model` in place of the name that it has."""
    notebook = nbformat.read(file, as_version=4)
    setup = nbformat.v4.new_code_cell(BEFORE.format(root=str(ROOT)))
    cells = notebook.cells
    for cell in cells:
        cell.source = cell.source.replace(MODEL, model)
    notebook.cells = [setup, *cells]
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    notebook.cells = notebook.cells[1:]
    for cell in notebook.cells:
        cell.source = cell.source.replace(model, MODEL)
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)  # the times of the run
            cell.outputs = joined(cell.outputs)
            cell.execution_count = None
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "examples"))
    from smollm2 import smollm2_folder

    for file in sorted(FOLDER.glob(f"{sys.argv[1] if len(sys.argv) > 1 else '*'}.ipynb")):
        nbformat.write(run(file, str(smollm2_folder())), file)
        print(file)
