"""Pictures of a report page for the docs:

    python -m tokenprune.evals.report.screenshots runs/demo/report.html docs/report

Needs a Chromium on the machine (Debian: `apt-get install chromium`) and playwright, which the extra [dev] brings.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 180_000
"""Milliseconds until a page that does not answer is given up: a busy machine is slow, not broken."""


@dataclass(frozen=True)
class Shot:
    """One picture: the window, light or dark, what is pressed before, and the part of the page at its top."""

    name: str
    width: int
    height: int
    scheme: str = "light"
    press: tuple[str, ...] = ()
    at: str = ""


SHOTS = (
    Shot("top", 1360, 1180),
    Shot("tests", 1360, 960, press=('[data-group="g-test"]',), at="#board-0"),
    Shot("samples-dark", 1360, 1000, "dark", press=(".disagree",), at="#samples-0"),
    Shot("families-agreement", 1360, 860, press=('.budgets [data-keep="128"]',), at="#families-0"),
    Shot("narrow", 420, 1500),
    Shot("narrow-samples-dark", 420, 1300, "dark", at="#samples-0"),
)


def chromium_path() -> str | None:
    """The Chromium of this machine, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def browser(path: str) -> Iterator[Any]:
    """A headless Chromium, as playwright gives it."""
    from playwright.sync_api import sync_playwright

    # Chromium refuses its sandbox to root, which is who runs in a container
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=path, args=flags, timeout=PATIENCE)
        try:
            yield running
        finally:
            running.close()


def take(running: Any, page_file: Path, shots: tuple[Shot, ...], folder: Path) -> list[Path]:
    """Write one PNG per shot into `folder`.

    Args:
        running: see `browser`.

    Raises:
        RuntimeError: a script of the page failed.
    """
    from tokenprune.evals.io.picture_reader import read_picture

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for shot in shots:
        size = {"width": shot.width, "height": shot.height}
        page = running.new_page(viewport=size, color_scheme=shot.scheme, reduced_motion="reduce")
        page.set_default_timeout(PATIENCE)
        errors: list[str] = []
        page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
        page.goto(page_file.resolve().as_uri())
        page.wait_for_selector(".plot svg .mark")
        page.wait_for_selector(".sample figure, .browse .empty")
        for selector in shot.press:
            page.locator(selector).first.click()
        if shot.at:
            page.evaluate("at => document.querySelector(at).scrollIntoView()", shot.at)
        page.mouse.move(0, 0)  # what is under the pointer is lit
        page.wait_for_timeout(400)
        file = folder / f"{shot.name}.png"
        page.screenshot(path=file, timeout=PATIENCE)
        page.close()
        if errors:
            raise RuntimeError(f"A script of {page_file} failed: {errors[0]}")
        read_picture(file).save(file, optimize=True)
        files.append(file)
    return files


def main() -> None:
    """Take every shot of a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="a report.html")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    options = parser.parse_args()
    chromium = chromium_path()
    if chromium is None:
        parser.error("There is no Chromium here. On Debian: apt-get install chromium.")
    with browser(chromium) as running:
        files = take(running, options.page, SHOTS, options.folder)
    for file in files:
        print(f"{file}  {file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
