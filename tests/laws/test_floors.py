"""The house: imports run down its floors only, and in no circle; who must not know of whom."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lora_lite"
FLOORS = {
    "errors": 0,
    "dtypes": 0,
    "version": 0,
    "ops": 1,
    "base": 2,
    "core": 3,
    "measure": 4,
    "io": 4,
    "training": 4,
    "merging": 5,
    "compose": 5,
    "families": 5,
    "variants": 6,
    "trainer": 6,
    "play": 6,
    "cli": 7,
    "__init__": 8,
    "__main__": 8,
}
"""Each room (a folder, or a file beside them) and its floor; rooms of one floor don't import each other."""
SEEN_BY_VARIANTS = {"errors", "dtypes", "ops", "core", "families", "variants"}
FILES = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str, at_work: bool = False) -> Iterator[str]:
    """The files of the library that a file imports, also within functions; at work, without those for type checkers."""
    package, tree = name.split(".")[:-1], ast.parse(FILES[name].read_text())
    checked = {
        id(n)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for n in ast.walk(block)
    }
    for node in ast.walk(tree):
        if at_work and id(node) in checked:
            continue
        if not (isinstance(node, ast.ImportFrom) and node.level):
            assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_lite")), name
            continue
        module = [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]
        path = ".".join(part for part in module if part)
        for alias in () if path in FILES else node.names:
            inner = f"{path}.{alias.name}".strip(".")
            yield next(p for p in (inner, f"{inner}.__init__", f"{path}.__init__") if p in FILES)
        if path in FILES:
            yield path


GRAPH = {name: set(imported(name)) for name in FILES}


def room(name: str) -> str:
    return name.partition(".")[0]


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in FILES} == FLOORS.keys()


@pytest.mark.parametrize("name", FILES)
def test_imports_run_down(name: str) -> None:
    for other in GRAPH[name]:
        inside = room(other) == room(name)
        assert inside or FLOORS[room(other)] < FLOORS[room(name)], f"{name} imports {other}"
        if room(name) == "variants" and other != "variants.__init__":
            assert room(other) in SEEN_BY_VARIANTS, f"{name} imports {other}"


def test_no_import_goes_in_a_circle() -> None:
    graph = {name: set(imported(name, at_work=True)) for name in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)


def test_the_runtime_knows_of_no_history() -> None:
    tenants = {"compose", "__init__", "cli"}
    knowing = [name for name in FILES if room(name) not in tenants and any(room(o) == "compose" for o in GRAPH[name])]
    assert not knowing
