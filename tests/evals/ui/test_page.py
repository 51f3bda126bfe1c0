"""The page of `tokenprune ui`: in a real browser, at its routes, and what the command refuses before it starts."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokenprune.cli import main
from tokenprune.evals.report.screenshots import PATIENCE, browser, chromium_path

pytest.importorskip("uvicorn", reason="uvicorn is not installed; the extra [ui] brings it")
pytest.importorskip("starlette", reason="starlette is not installed; the extra [ui] brings it")

CHROMIUM = chromium_path()
SIGN = {"picture": "sample:4", "question": "what does the sign say?"}


@pytest.fixture(scope="module")
def url():
    """The page of pocket-llava."""
    from tokenprune.evals.models.load import load_model
    from tokenprune.evals.ui.desk import Desk
    from tokenprune.evals.ui.run import address, listen, make_server, serve

    opened = listen("127.0.0.1", 0)
    server = make_server(Desk(load_model("pocket-llava"), 8), "127.0.0.1")
    thread = threading.Thread(target=serve, args=(server, opened), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield address(opened, "127.0.0.1")
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def post(url: str, path: str, given: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and answer of a request that the page could send."""
    body = given if isinstance(given, bytes) else json.dumps(given).encode()
    request = urllib.request.Request(url + path, body, {"X-Tokenprune": "page", **headers})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE / 1000) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def png(picture: Image.Image) -> bytes:
    held = io.BytesIO()
    picture.save(held, format="PNG")
    return held.getvalue()


@pytest.mark.pocket
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; on Debian: apt-get install chromium")
def test_in_a_browser(url, tmp_path):
    pytest.importorskip("playwright", reason="playwright is not installed; the extra [dev] brings it")
    from tokenprune.evals.ui.screenshots import until

    with browser(str(CHROMIUM)) as chromium:
        page = chromium.new_page(viewport={"width": 1300, "height": 900}, color_scheme="light")
        page.set_default_timeout(PATIENCE)
        errors: list[str] = []
        asked: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)

        def settled() -> list[str]:
            until(
                page,
                "state.columns.length === 4 && state.columns.every(column => column.turn && column.last && "
                "!column.box.classList.contains('waiting'))",
            )
            return page.locator(".column .said").all_inner_texts()

        # a ninth of the tokens: the sign is read unpruned and with vtc_cls alone
        first = settled()
        assert page.locator(".tokens").inner_text() == "64 of 576 (11 %)"
        assert [said.strip("✓✗ ") == "PA4" for said in first] == [True, False, False, True]
        assert page.locator(".said.right").count() == 2 and page.locator(".said.wrong").count() == 2
        overlays = page.locator(".column img").evaluate_all("images => images.map(image => image.src)")
        assert len(set(overlays)) == 4
        # the slider, to its end: nothing is dropped, so every answer is the unpruned one
        page.locator(".slide").fill("1000")
        assert page.locator(".tokens").inner_text() == "576 of 576 (100 %)"
        until(page, "state.columns.every(column => column.last && column.last.kept === 576)")
        assert {said.strip("✓✗ ") for said in settled()} == {"PA4"}
        page.locator('.quick [data-keep="128"]').click()
        until(page, "state.columns.slice(1).every(column => column.last && column.last.kept === 128)")
        # another picture of the suite, and another method
        page.locator(".gallery button").nth(1).click()
        until(page, "state.picture === 'sample:0' && state.columns.every(c => c.last && c.last.right !== null)")
        page.locator(".column select").nth(0).select_option("oracle")
        until(page, "state.columns[1].last && state.columns[1].last.label.startsWith('oracle')")
        # a picture of one's own: the pocket model is out of its depth, and oracle has no boxes
        own = tmp_path / "own.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(own)
        page.locator(".file").set_input_files(own)
        until(page, "state.columns[1].problem.textContent && state.columns[2].last")
        assert "pocket-llava is out of its depth" in page.locator(".notes").inner_text()
        assert "oracle needs boxes" in page.locator(".column .problem").nth(1).inner_text()
        page.locator(".file").set_input_files({"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
        page.wait_for_selector(".trouble:not([hidden])")
        assert "cannot be read as a picture" in page.locator(".trouble").inner_text()
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        # a refused request is an error line of the browser's own, and nothing but this server was asked
        assert all("status of 400" in line for line in errors)
        assert {one.split("/")[2] for one in asked if not one.startswith(("data:", "blob:"))} == {url.split("/")[2]}


@pytest.mark.pocket
def test_requests_at_once_do_not_mix(url):
    jobs = [(method, keep) for keep in (16, 320) for method in ("vtc_cls", "fastv")] + [("none", None)]

    def answer(job: tuple[str, Any]) -> tuple[Any, ...]:
        status, said = post(url, "/answer", {**SIGN, "method": job[0], "keep": job[1]})
        assert status == 200, said
        return tuple(said[key] for key in ("label", "answer", "kept", "average", "flops", "kv", "picture"))

    alone = list(map(answer, jobs))
    assert len(set(alone)) == len(jobs) and [one[2] for one in alone] == [job[1] or 576 for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(answer, jobs)) == alone


@pytest.mark.pocket
def test_an_animation_and_a_photograph_are_spoken_of(url):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    held = io.BytesIO()
    frames[0].save(held, format="GIF", save_all=True, append_images=frames[1:])
    status, said = post(url, "/picture", held.getvalue())
    assert status == 200 and "has 2 frames; only the first" in said["notes"][0]
    assert "out of its depth" in said["notes"][1]
    _, one = post(url, "/answer", {"picture": said["id"], "question": "what is it", "method": "uniform", "keep": 9})
    shown = Image.open(io.BytesIO(base64.b64decode(one["picture"].partition(",")[2])))
    assert one["right"] is None and one["kept"] == 9 and shown.size == (336, 336)
    _, whole = post(url, "/answer", {"picture": said["id"], "question": "what is it", "method": "none"})
    assert whole["kept"] == 576


@pytest.mark.pocket
@pytest.mark.parametrize(
    ("path", "given", "status", "says"),
    [
        ("/answer", {**SIGN, "method": "hollov", "keep": 64}, 400, "no method called 'hollov'. Did you mean 'holov'"),
        ("/answer", {**SIGN, "method": "holov", "keep": 0}, 400, "keep"),
        ("/answer", {**SIGN, "method": "holov", "keep": "many"}, 400, "a number of tokens or a fraction, got 'many'"),
        ("/answer", {**SIGN, "method": "holov(varant=paper)", "keep": 9}, 400, "no option 'varant'"),
        ("/answer", {**SIGN, "method": "/etc/x.yaml", "keep": 9}, 400, "reads no files"),
        ("/answer", {**SIGN, "question": "a <image> b", "method": "none"}, 400, "'<image>', a token of the model's"),
        ("/answer", {**SIGN, "question": " ", "method": "none"}, 400, "Give a question"),
        ("/answer", {**SIGN, "question": "a" * 3000, "method": "none"}, 400, "has 3000 letters"),
        ("/answer", {**SIGN, "picture": "sample:9999", "method": "none"}, 400, "offers no picture"),
        ("/answer", {**SIGN, "picture": "f00", "method": "none"}, 400, "not held any more"),
        ("/answer", [1], 400, "a mapping"),
        ("/answer", b"{", 400, "no JSON"),
        ("/picture", b"\x89PNG\r\n\x1a\n half", 400, "cannot be read as a picture"),
        ("/picture", bytes(20_000_001), 413, "more than 20 MB"),
        ("/picture", png(Image.new("1", (8000, 6000))), 400, "8000 x 6000 pixels"),
        ("/picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", 400, "a PostScript program"),
        ("/picture", png(Image.new("1", (201, 1))), 400, "201 x 1 pixels and is too narrow"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_a_sentence(path, given, status, says, url):
    got, said = post(url, path, given)
    assert got == status and says in said["error"] and "Traceback" not in said["error"]


@pytest.mark.pocket
def test_other_sites_are_turned_away(url):
    assert post(url, "/answer", {**SIGN, "method": "none"}, Host="evil.example:80")[0] == 403
    assert post(url, "/answer", {**SIGN, "method": "none"}, **{"X-Tokenprune": ""})[0] == 403
    with urllib.request.urlopen(url) as response:
        policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "http" not in policy


def test_the_command_refuses_before_it_loads(monkeypatch, capsys):
    from tokenprune.commands import ui
    from tokenprune.evals.ui.run import is_local, listen

    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        for argv, says in (
            (["--port", port], f"Nothing can listen at 127.0.0.1:{port}"),
            (["--port", "70000"], "0 to 65535"),
            (["--host", "no.such.host.invalid"], "is no address of this machine"),
            (["--model", "pocket-lava"], "Did you mean 'pocket-llava'"),
            (["--max-new-tokens", "0"], "must be at least 1"),
        ):
            assert main(["ui", *argv]) == 2
            assert says in capsys.readouterr().err
    monkeypatch.setattr(ui, "find_spec", lambda name: None)
    assert main(["ui"]) == 2
    assert "pip install 'tokenprune-vlm[ui]'" in capsys.readouterr().err
    assert [is_local(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "192.168.0.2")] == [True] * 3 + [
        False
    ] * 2
