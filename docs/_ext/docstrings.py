"""Docstrings of this library as reStructuredText: they are plain text with sections, which autodoc would misread.

A paragraph stays one, its `names` become code. Lines of "name    what it is" are a list of definitions, "Raises:" is a
list of errors, and a block that is indented (an equation) is shown as it stands.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

import lora_lite as ll

ENTRY = re.compile(r"(\w[\w, ()=*]{0,30}?) {2,}(\S.*)")
ERRORS = re.compile(r" *((?:[A-Z]\w+(?:Error|Exception|Interrupt))(?:, [A-Z]\w+)*): ?(.*)")


def escape(text: str) -> str:
    """Prose as reStructuredText: `code`, and no other character means anything."""
    parts = re.split(r"`([^`]+)`", text)
    plain = [re.sub(r"([\\*|_`])", r"\\\1", part) for part in parts[::2]]
    code = [f"``{part}``" for part in parts[1::2]] + [""]
    joined = "".join(
        # A space that isn't shown, where code touches a letter.
        f"{before}{chr(92) + ' ' if after and before[-1:].isalnum() else ''}{after}"
        for before, after in zip(plain, code, strict=True)
    )
    return re.sub(r"(``[^`]+``)(?=\w)", r"\1\\ ", joined)


def blocks(lines: Sequence[str]) -> Iterator[list[str]]:
    """Runs of lines that have no empty line between them."""
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def raises(lines: Sequence[str]) -> Iterator[str]:
    """The section under "Raises:", as fields; what is no error's line goes on, or stands below the list."""
    after: list[str] = []
    for line in textwrap.dedent("\n".join(lines)).splitlines():
        if match := ERRORS.match(line):
            yield f":raises {match[1]}: {escape(match[2])}"
        elif line.startswith(" "):
            yield f"    {escape(line.strip())}"
        else:
            after.append(escape(line))
    yield from ["", *after]


def definitions(lines: Sequence[str]) -> Iterator[str]:
    """Lines of "name    what it is", with what goes on below them further in."""
    for line in lines:
        if (match := ENTRY.match(line)) is not None and not line.startswith(" "):
            yield from [f"``{match[1]}``", f"    {escape(match[2])}"]
        else:
            yield f"    {escape(line.strip())}"


def is_definitions(block: Sequence[str]) -> bool:
    column = ENTRY.match(block[0])
    return column is not None and all(
        ENTRY.match(line) or line.startswith("    ") for line in block
    )


def as_rst(lines: Sequence[str]) -> list[str]:
    """A docstring as reStructuredText.

    A line of errors within a block of text begins the section, whether an empty line is before it or not.
    """
    text: list[str] = []
    for block in blocks(lines):
        if block[0].strip() in ("Raises:", "Raises"):
            text += [*raises(block[1:]), ""]
        elif is_definitions(block):
            text += [*definitions(block), ""]
        elif all(line.startswith("    ") for line in block):
            text += ["::", "", *block, ""]
        else:
            begins = next(
                (
                    n
                    for n, line in enumerate(block)
                    if n and ENTRY.match(line) and is_definitions(block[n:])
                ),
                None,
            )
            text += [*map(escape, (line.strip() for line in block[:begins])), ""]
            text += [*definitions(block[begins:]), ""] if begins is not None else []
    return text


def process(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = as_rst(lines)


def public(
    app: Sphinx, env: Any, node: pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """A class by the name under which the site has it: lora_lite.core.config.BaseConfig is lora_lite.BaseConfig."""
    target = str(node.get("reftarget", ""))
    name = target.rpartition(".")[2]
    if (
        node.get("refdomain") != "py"
        or target == f"lora_lite.{name}"
        or name not in ll.__all__
    ):
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(
        env, node.get("refdoc"), app.builder, "obj", f"lora_lite.{name}", node, content
    )


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process)
    app.connect("missing-reference", public)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
