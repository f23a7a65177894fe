"""Docstrings of this library as reStructuredText: they are plain text with sections, which autodoc would misread.

A paragraph stays one, its `names` become code. Lines of "name    what it is" are a list of definitions, "Raises:" is a
list of errors, and a block that is indented (an equation) is shown as it stands.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from docutils import nodes
from sphinx.addnodes import desc_content, pending_xref
from sphinx.application import Sphinx

import lora_lite as ll

ENTRY = re.compile(r"(\w[\w, ()=*]{0,30}?) {2,}(\S.*)")
ERRORS = re.compile(r" *((?:[A-Z]\w+(?:Error|Exception|Interrupt))(?:, [A-Z]\w+)*): ?(.*)")


def escape(text: str) -> str:
    """Prose as reStructuredText: `code`, and no other character means anything."""
    joined = ""
    for n, part in enumerate(re.split(r"`([^`]+)`", text)):
        is_code = n % 2 == 1
        # A space that isn't shown, where code touches a letter.
        touches = (joined[-1:].isalnum() if is_code else part[:1].isalnum()) and joined
        piece = f"``{part}``" if is_code else re.sub(r"([\\*|_`])", r"\\\1", part)
        joined += f"\\ {piece}" if touches else piece
    return joined


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
    if obj is ll.REGISTRY:  # Sphinx shows a dict's own
        lines[:] = ["The class of each method, by its name; `register` adds one."]
    if isinstance(obj, type) and issubclass(obj, ll.BaseConfig):
        # A config of a family (directions, rotations, ...) says there what it shares with others.
        for parent in obj.__mro__[1:]:
            if ".families." in parent.__module__:
                lines += ["", *(parent.__doc__ or "").splitlines()[:1]]
                lines += textwrap.dedent(
                    "\n".join((parent.__doc__ or "").splitlines()[1:])
                ).splitlines()
    lines[:] = as_rst(lines)


def signature(
    app: Sphinx, what: str, name: str, obj: Any, *rest: Any
) -> tuple[str, None] | None:
    """Without the twenty fields of a config, which the docstring and a method's page have."""
    if isinstance(obj, type) and issubclass(obj, ll.BaseConfig):
        return "(*, ...)", None
    return None


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


def link(app: Sphinx, document: nodes.document) -> None:
    """A public name that a docstring has as code leads to its entry."""
    for content in document.findall(desc_content):
        for literal in list(content.findall(nodes.literal)):
            name, parent = literal.astext(), literal.parent
            if name in ll.__all__ and not isinstance(parent, pending_xref):
                options = {"refdomain": "py", "reftype": "obj", "refdoc": app.env.docname}
                target = f"lora_lite.{name}"
                reference = pending_xref(
                    "", literal.deepcopy(), reftarget=target, **options
                )
                parent.replace(literal, reference)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-process-signature", signature)
    app.connect("missing-reference", public)
    app.connect("doctree-read", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
