"""The site is built without a warning, each link and anchor leads somewhere, and it asks for nothing elsewhere."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from pages import DOCS, ROOT
from sphinx.util.inventory import InventoryFile

import lora_lite as ll
import lora_lite.trainer

FETCHED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src")}
NO_FETCH = {"canonical", "license", "index", "search", "next", "prev", "author"}
"""Relations of a <link> that no browser follows by itself."""


class Page(HTMLParser):
    """The ids of a page, its links, and what a browser fetches for it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.fetched: set[str] = set()
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.ids |= {attributes[name] for name in ("id", "name") if name in attributes}
        if tag == "a" and "href" in attributes:
            self.links.add(attributes["href"])
        for name in ("src", "href"):
            if (tag, name) in FETCHED and name in attributes and attributes.get("rel") not in NO_FETCH:
                self.fetched.add(attributes[name])


def build(out: Path) -> None:
    """The site, built anew as `make docs` does."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-b", "html", str(DOCS), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    warnings = [line for line in done.stderr.splitlines() if re.search(r"(WARNING|ERROR|CRITICAL): ", line)]
    assert done.returncode == 0, "\n".join(warnings) or done.stderr[-3000:]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_is_whole(tmp_path: Path) -> None:
    """One test, so that several processes don't build it at once."""
    site = tmp_path.resolve()
    build(site)
    read = {file: Page(file) for file in sorted(site.rglob("*.html"))}
    assert len(read) > 100
    assert not sorted(set(broken(site, read)))
    assert not sorted(fetched_from_elsewhere(site, read))
    missing = sorted(public_names() - entries(site))
    assert not missing, f"no entry for {missing}: add them to a page of docs/api"
    check_method_pages(site)
    for link in re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text()):
        assert (site / link).is_file(), link


def broken(site: Path, read: dict[Path, Page]) -> Iterator[str]:
    """Each link within the site that leads nowhere, and each one out of it that is no address."""
    for file, page in read.items():
        for link in page.links | page.fetched:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                if not re.fullmatch(r"[\w-]+(\.[\w-]+)+(:\d+)?", parts.netloc) or " " in link:
                    yield f"{file.name}: {link}"
            elif parts.scheme not in ("data", "mailto"):
                target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
                target = target / "index.html" if target.is_dir() else target
                anchor = unquote(parts.fragment)
                missing = not target.is_file() or (target in read and anchor and anchor not in read[target].ids)
                if missing:
                    yield f"{file.relative_to(site)}: {link}"


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    texts = {
        "a.html": '<a href="b.html#x">',
        "b.html": '<p id="y"><a href="c.html"><a href="https://a b">',
        "d.html": "",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    pages = {file.resolve(): Page(file) for file in tmp_path.glob("*.html")}
    assert sorted(set(broken(tmp_path.resolve(), pages))) == [
        "a.html: b.html#x",
        "b.html: c.html",
        "b.html: https://a b",
    ]


def fetched_from_elsewhere(site: Path, read: dict[Path, Page]) -> set[str]:
    """No CDN, no fonts, no trackers: scripts, styles, images, and what a style names."""
    away = {f"{file.name}: {link}" for file, page in read.items() for link in page.fetched if urlsplit(link).netloc}
    for style in site.rglob("*.css"):
        links = re.findall(r"""(?:@import\s+|url\()\s*['"]?((?:https?:)?//[^'")]+)""", style.read_text())
        away |= {f"{style.name}: {link}" for link in links}
    return away


def test_what_is_fetched_from_elsewhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<script src="https://cdn.org/a.js"></script><img src="a.png"><a href="https://b.org">'
    )
    (tmp_path / "a.css").write_text("@import 'https://fonts.org/a'; p { background: url(//c.org/a.png) url(a.png) }")
    away = fetched_from_elsewhere(tmp_path, {tmp_path / "a.html": Page(tmp_path / "a.html")})
    assert away == {"a.html: https://cdn.org/a.js", "a.css: https://fonts.org/a", "a.css: //c.org/a.png"}


def public_names() -> set[str]:
    names = {f"lora_lite.{name}" for name in ll.__all__ if name != "__version__"}
    return names | {f"lora_lite.trainer.{name}" for name in lora_lite.trainer.__all__}


def entries(site: Path) -> set[str]:
    """Every Python name that has an entry in the API or on a method's page."""
    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, path: path)
    return {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}


def check_method_pages(site: Path) -> None:
    for name in ll.REGISTRY:
        text = (site / "methods" / f"{name}.html").read_text()
        for part in ('class="pair docutils container"', "Identity", "What it can do", "The arena"):
            assert part in text, (name, part)
