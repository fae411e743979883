"""Look at every page of the built site as on a phone, in light and dark: does anything reach past the edge?

    mkdocs build --site-dir site
    pip install playwright
    python docs/screens.py site screens

Prints each page that scrolls sideways, or has something past the edge that cannot be scrolled to, and ends with 1 if
there is one. Writes screenshots to the second folder. Needs Chromium: the one in the PATH, or playwright's own.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

WIDTH, HEIGHT = 390, 844

PAST_THE_EDGE = """width => [...document.querySelectorAll('article *')].filter(element => {
    if (element.getBoundingClientRect().right <= width + 1) return false
    for (let parent = element.parentElement; parent && parent.tagName != 'ARTICLE'; parent = parent.parentElement)
        if (getComputedStyle(parent).overflowX != 'visible') return false
    return true
}).slice(0, 3).map(element => element.tagName + ' ' + element.textContent.trim().slice(0, 50))"""


def main(site: Path, screens: Path) -> int:
    """Return how many pages are too wide; write a screenshot of each page in each scheme."""
    from playwright.sync_api import sync_playwright

    pages = sorted(site.rglob("index.html"))
    if not pages:
        raise SystemExit(f"{site}: must be a built site, got no page; run: mkdocs build --site-dir {site}")
    screens.mkdir(parents=True, exist_ok=True)
    wide = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
            for page in pages:
                tab.goto(page.resolve().as_uri())
                scrolls = tab.evaluate("document.documentElement.scrollWidth")
                found = tab.evaluate(PAST_THE_EDGE, WIDTH)
                name = page.parent.relative_to(site).as_posix().replace("/", "-").strip(".") or "home"
                tab.screenshot(path=screens / f"{name}-{scheme}.png")
                if scrolls > WIDTH or found:
                    wide += 1
                    print(f"{name}, {scheme}: {scrolls} px wide; past the edge: {', '.join(found) or 'nothing'}")
            tab.close()
        browser.close()
    print(f"{len(pages)} pages in light and dark, {wide} too wide")
    return wide


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    raise SystemExit(1 if main(Path(sys.argv[1]), Path(sys.argv[2])) else 0)
