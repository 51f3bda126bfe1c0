"""Pictures of the page for the docs:

    python -m tokenprune.evals.ui.screenshots docs/ui

Needs a Chromium on the machine (Debian: `apt-get install chromium`) and playwright, which the extra [dev] brings.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from typing import Any

from PIL import Image

from tokenprune.evals.io.picture_reader import read_picture
from tokenprune.evals.models.load import load_model
from tokenprune.evals.report.screenshots import PATIENCE, browser, chromium_path
from tokenprune.evals.ui.desk import Desk
from tokenprune.evals.ui.run import address, listen, make_server, serve

ANSWERED = "state.columns.length && state.columns.every(c => c.last && !c.box.classList.contains('waiting'))"


def until(page: Any, what: str) -> None:
    """Wait for an expression. Playwright's own wait compiles it in the page, which the page's policy forbids.

    Raises:
        TimeoutError: it did not come true.
    """
    ends = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(what):
        if time.monotonic() > ends:
            raise TimeoutError(f"{what} did not come true within {PATIENCE // 1000} s.")
        page.wait_for_timeout(50)


def take(running: Any, url: str, folder: Path) -> list[Path]:
    """The page on a desk, on a phone, and in the dark with a photograph that the pocket model knows nothing of."""
    import matplotlib

    photograph = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    files = []
    for name, width, height, scheme in (("wide", 1300, 1110, "light"), ("phone", 390, 1900, "light"),
                                        ("photograph-dark", 1300, 1180, "dark")):  # fmt: skip
        page = running.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(PATIENCE)
        page.goto(url)
        until(page, ANSWERED)
        if name.startswith("photograph"):
            page.locator(".file").set_input_files(photograph)
            until(page, f"state.sample === null && {ANSWERED}")
        page.mouse.move(0, 0)
        page.wait_for_timeout(400)
        file = folder / f"{name}.png"
        page.screenshot(path=file, timeout=PATIENCE)
        page.close()
        read_picture(file).quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)  # a quarter of the bytes
        files.append(file)
    return files


def main() -> None:
    """Start the page of pocket-llava and photograph it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    options = parser.parse_args()
    chromium = chromium_path()
    if chromium is None:
        parser.error("There is no Chromium here. On Debian: apt-get install chromium.")
    options.folder.mkdir(parents=True, exist_ok=True)
    opened = listen("127.0.0.1", 0)
    server = make_server(Desk(load_model("pocket-llava"), 8), "127.0.0.1")
    thread = threading.Thread(target=serve, args=(server, opened), daemon=True)
    thread.start()
    with browser(chromium) as running:
        for file in take(running, address(opened, "127.0.0.1"), options.folder):
            print(file)
    server.should_exit = True
    thread.join(30)


if __name__ == "__main__":
    main()
