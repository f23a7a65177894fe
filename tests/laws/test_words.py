"""The library's words: local names say what a thing is, docstrings are sentences, comments say why."""

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lora_lite"
FILES = sorted(PACKAGE.rglob("*.py"))
NO_NAMES = {"held", "made", "here", "at", "found", "own", "odd"}
"""They say how a thing got where it is, not what it is."""
COMMENTS = 4.5
"""At least, per hundred lines."""


def notes(tree: ast.Module) -> Iterator[str]:
    """Docstrings, and the string notes under constants and fields."""
    for node in ast.walk(tree):
        for statement in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                yield str(statement.value.value)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_names_and_docstrings(file: Path) -> None:
    tree = ast.parse(file.read_text())
    fields = {id(node.target) for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)}  # files hold their names
    stores = (node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    stored = {node.id for node in stores if id(node) not in fields}
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    assert not (stored | arguments) & NO_NAMES
    riddles = [note.strip().splitlines()[0] for note in notes(tree) if re.match(r"\s*(Of|What|Whether)\b", note)]
    assert not riddles


def test_comments_say_enough() -> None:
    lines = comments = 0
    for file in FILES:
        lines += len(file.read_text().splitlines())
        with file.open("rb") as handle:
            comments += sum(token.type == tokenize.COMMENT for token in tokenize.tokenize(handle.readline))
    assert comments >= COMMENTS * lines / 100, f"{comments} comments in {lines} lines"
