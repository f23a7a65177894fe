"""Files that stand outside of docs/: DEVELOPER.md, CHANGELOG.md and AGENTS.md as pages, llms.txt at the site's root."""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
PAGES = {"DEVELOPER.md": "developer", "CHANGELOG.md": "changelog", "AGENTS.md": "agents"}


def as_page(app: Sphinx, name: str, source: list[str]) -> None:
    """A page's links as they are in a checkout, to pages of the site; and a file's text in the page of its own."""
    files = {page: file for file, page in PAGES.items()}
    if name in files:
        source[0] = (ROOT / files[name]).read_text().replace("](docs/", "](")
    for page, file in files.items():
        source[0] = re.sub(rf"\]\((?:\.\./)?{re.escape(file)}", f"]({page}.md", source[0])
    # A file of the sources has no page: its path is what helps.
    source[0] = re.sub(
        r"\[([^\]]+)\]\((?:\.\./)*(?:lora_lite|tests|examples|benchmarks)/[^)]*\)",
        r"\1",
        source[0],
    )


def write_llms_txt(app: Sphinx, error: Exception | None) -> None:
    """llms.txt for whoever fetches the site: the links lead to the pages' sources, which are served as text."""
    if error is None and app.builder.name == "html":
        text = re.sub(
            r"\]\(docs/([\w/-]+)\.md\)",
            r"](_sources/\1.md.txt)",
            (ROOT / "llms.txt").read_text(),
        )
        (Path(app.outdir) / "llms.txt").write_text(text)
        (Path(app.outdir) / "AGENTS.md").write_text((ROOT / "AGENTS.md").read_text())


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", as_page)
    app.connect("build-finished", write_llms_txt)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
