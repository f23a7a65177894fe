"""Every page of the built site in Chromium, at three widths: none may be wider than its window. Three are kept.

make docs && python tests/docs/shots.py     writes docs/_static/shots
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[2]
SITE, SHOTS = ROOT / "docs" / "_build" / "html", ROOT / "docs" / "_static" / "shots"
KEPT = {390: "guides/merge", 820: "start", 1440: "methods/dora"}
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def main() -> int:
    """The number of pages that are too wide."""
    wide = 0
    SHOTS.mkdir(exist_ok=True)
    pages = sorted(str(file.relative_to(SITE).with_suffix("")) for file in SITE.rglob("*.html"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ARGUMENTS)
        for width, kept in KEPT.items():
            tab = browser.new_page(viewport={"width": width, "height": 900})
            asked: list[str] = []
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            for page in pages:
                if page.startswith("_modules"):  # Sphinx's own pages of sources
                    continue
                tab.goto(f"file://{SITE / page}.html")
                over = tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
                if over > 0:
                    wide += 1
                    print(f"{page} is {over} px wider than {width}")
                if page == kept:
                    tab.screenshot(path=SHOTS / f"{page.replace('/', '-')}-{width}.png")
            away = [url for url in asked if not url.startswith(("file:", "data:"))]
            assert not away, away
            print(f"{width}: {len(pages)} pages, {len(asked)} requests, none to another machine")
        browser.close()
    return wide


if __name__ == "__main__":
    sys.exit(main())
