"""The blocks of code in Markdown pages, and how a test runs them: in order, in one scope, as a reader would."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model that pages name. A test puts a folder in its place, since nothing is downloaded."""
GENERATED = DOCS / "methods"
"""Made anew by each build of the site: the lines there are checked where they are made."""


@dataclass(frozen=True)
class Block:
    page: Path
    language: str
    line: int
    """Of its first line in the page, counted from 1."""
    heading: str
    """The nearest above it."""
    text: str

    def run(self, scope: dict[str, Any], instead: Mapping[str, str]) -> None:
        """Run it, so that a traceback names the page and its line; `instead` says what stands for a name in it."""
        text = self.text
        for name, value in instead.items():
            text = text.replace(name, value)
        exec(compile("\n" * (self.line - 1) + text, str(self.page), "exec"), scope)


def pages() -> list[Path]:
    """Every page of docs/ that is written by hand."""
    return sorted(page for page in DOCS.rglob("*.md") if not {GENERATED, DOCS / "_build"} & set(page.parents))


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    """The fenced blocks of a page in these languages."""
    heading, language, first, lines = "", "", 0, list[str]()
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = re.match(r"\s*```+(.*)", line)
        if not language and fence is None and (title := re.match(r"#+ (.*)", line)):
            heading = title[1]
        elif not language and fence is not None:
            language, first, lines = fence[1].strip() or "text", number + 1, []
        elif language and fence is not None:
            if language in languages:
                yield Block(page, language, first, heading, "\n".join(lines) + "\n")
            language = ""
        elif language:
            lines.append(line)


def python_blocks(page: Path) -> list[str]:
    return [block.text for block in blocks(page, "python")]
