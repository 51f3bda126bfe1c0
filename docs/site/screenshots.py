"""Photographs of the built site: `python docs/site/screenshots.py site docs/site_pictures`, after `make site`.

Takes the pictures that docs/site_pictures holds, opened from file:// as a reader would, and says of every page whether
it is wider than a phone's screen. Needs playwright and a Chromium that is there already.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 180_000
"""Milliseconds until a page that does not answer is given up: a busy machine is slow, not broken."""
SIZES = {"desktop": (1280, 860), "phone": (390, 844)}
PICTURES = (
    ("home", "index.html", "desktop", "light"),
    ("how-it-works-dark", "how_it_works.html", "desktop", "dark"),
    ("method", "methods/tops.html#how-it-works", "desktop", "light"),
    ("choosing-phone", "choosing.html#by-model-and-budget", "phone", "light"),
    ("method-phone-dark", "methods/vtc_cls.html#how-it-works", "phone", "dark"),
)


@contextmanager
def browser() -> Iterator[Any]:
    """A Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("chromium-browser"), args=["--no-sandbox"]
        )
        yield chromium
        chromium.close()


def opened(chromium: Any, site: Path, path: str, size: str, scheme: str) -> Any:
    """A page, at an anchor if `path` has one, in a window of that size, in light or dark."""
    wide, high = SIZES[size]
    context = chromium.new_context(viewport={"width": wide, "height": high}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(f"{site.resolve().as_uri()}/{path}")
    page.wait_for_load_state("load")
    return page


def too_wide(chromium: Any, site: Path) -> list[str]:
    """Pages that a phone would have to scroll sideways."""
    page = opened(chromium, site, "index.html", "phone", "light")
    found = []
    for file in sorted(site.rglob("*.html")):
        page.goto(file.resolve().as_uri())
        wide = page.evaluate("document.scrollingElement.scrollWidth")
        if wide > SIZES["phone"][0]:
            found.append(f"{file.relative_to(site)} is {wide} pixels wide")
    page.context.close()
    return found


def found_by_search(chromium: Any, site: Path, words: str) -> list[str]:
    """Titles that the search of the site gives, opened from file://."""
    page = opened(chromium, site, "index.html", "desktop", "light")
    page.click(".md-search__input")
    page.type(".md-search__input", words)  # the search listens to keys
    page.wait_for_selector(".md-search-result__item h1")
    titles = page.eval_on_selector_all(".md-search-result__item h1", "found => found.map(one => one.textContent)")
    page.context.close()
    return titles


def _shrink(file: Path) -> None:
    """The same picture with 96 colours: a third of the bytes."""
    from PIL import Image

    Image.open(file).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> int:
    """Write the pictures; 1 where a page is too wide."""
    site, target = Path(sys.argv[1]), Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    with browser() as chromium:
        for name, path, size, scheme in PICTURES:
            page = opened(chromium, site, path, size, scheme)
            page.wait_for_timeout(500)  # the menu fades in
            page.screenshot(path=target / f"{name}.png")
            _shrink(target / f"{name}.png")
            page.context.close()
        print("The search finds:", ", ".join(found_by_search(chromium, site, "farthest point")))
        wide = too_wide(chromium, site)
    print("\n".join(wide) or "No page is wider than a phone's screen.")
    return 1 if wide else 0


if __name__ == "__main__":
    sys.exit(main())
