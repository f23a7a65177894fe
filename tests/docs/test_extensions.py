"""Docstrings as the site shows them: nothing in their text is markup, and their sections are lists."""

import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from docutils import nodes
from docutils.core import publish_doctree
from pages import DOCS
from sphinx.addnodes import desc_content, pending_xref

import lora_lite as ll

TEXT = """Fill `lora_B` with zeros, *x and y_ |z| `s`es too.

    y = W x + b        B (o, r)
    n² = ‖W‖²

name        of the adapter; `None` for all, as
            in `detach`
rank, alpha    at every layer

It goes on.

Raises:
    ConfigError: for a bad
        `rank`.
    TargetError, VariantError: for a layer.
    After these it is as it was.
"""


@pytest.fixture(autouse=True)
def _extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))


def tree(text: str) -> Any:
    from docstrings import as_rst

    return publish_doctree(
        "\n".join(as_rst(text.splitlines())), settings_overrides={"report_level": 1, "halt_level": 1}
    )


def test_a_docstring_is_read_as_it_is_meant() -> None:
    document = tree(TEXT)
    code = [node.astext() for node in document.findall(nodes.literal)]
    assert code == ["lora_B", "s", "name", "None", "detach", "rank, alpha", "rank"]
    assert next(iter(document.findall(nodes.paragraph))).astext() == "Fill lora_B with zeros, *x and y_ |z| ses too."
    assert [block.astext() for block in document.findall(nodes.literal_block)] == [
        "y = W x + b        B (o, r)\nn² = ‖W‖²"
    ]
    entries = [node.astext() for node in document.findall(nodes.definition)]
    assert entries == ["of the adapter; None for all, as\nin detach", "at every layer"]
    names = [node.astext() for node in document.findall(nodes.field_name)]
    assert names == ["raises ConfigError", "raises TargetError, VariantError"]
    assert document.children[-1].astext() == "After these it is as it was."


@pytest.mark.parametrize("name", sorted(ll.__all__))
def test_every_public_docstring_is_read_without_a_complaint(name: str) -> None:
    tree(inspect.cleandoc(getattr(ll, name).__doc__ or ""))


def test_prose_of_a_method_is_plain_markdown() -> None:
    from method_pages import prose

    assert prose("a*b _c_ `d*e` <f> [g] x|y") == r"a\*b \_c\_ `d*e` \<f\> \[g\] x\|y"


def test_code_is_what_is_below_the_imports() -> None:
    from method_pages import code

    text = code(Path(sys.modules["lora_lite.variants.lora"].__file__ or ""))
    assert text.startswith("@dataclass(frozen=True, kw_only=True)\nclass LoRAConfig")
    assert text.rstrip().endswith("dropout)")


def test_the_arenas_rows_are_read_whole() -> None:
    """Every number of a row is in a cell, in its order: none is lost, or taken for another column's."""
    from method_pages import TABLES, arena_rows

    text = (DOCS / "arena.md").read_text()
    tables = arena_rows(text)
    assert list(tables) == list(TABLES)
    for rows in tables.values():
        assert {"lora", "dora"} <= rows.keys()
        for name, cells in rows.items():
            words = [name, *(word for _, cell in cells for word in cell.split())]
            assert words in [line.split() for line in text.splitlines()]
    reference = dict(tables["At about equal parameters"]["lora"])
    assert list(reference) == ["rank", "trained", "learning rate", "loss"]  # it isn't compared with itself


def test_a_public_name_in_a_docstring_is_a_link() -> None:
    from docstrings import link

    document = tree("As `detach` does, and `nothing`.")
    link(SimpleNamespace(env=SimpleNamespace(docname="api/attach")), document)
    assert not list(document.findall(pending_xref))  # outside of an entry it is code
    document[0].replace_self(desc_content("", document[0].deepcopy()))
    link(SimpleNamespace(env=SimpleNamespace(docname="api/attach")), document)
    assert [node["reftarget"] for node in document.findall(pending_xref)] == ["lora_lite.detach"]
