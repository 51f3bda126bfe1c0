"""The report page in a real browser: it loads from disk, sorts, filters, draws what was kept. Needs Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest
from _fake_runs import GRID, fake_run

from tokenprune.evals.report.page import write_report
from tokenprune.evals.report.screenshots import PATIENCE, Shot, browser, chromium_path, take
from tokenprune.evals.results.run_folder import read_run

pytest.importorskip("playwright", reason="playwright is not installed; the extra [dev] brings it")
CHROMIUM = chromium_path()
MISSING = "no Chromium on this machine; on Debian: apt-get install chromium"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return fake_run(tmp_path_factory.mktemp("browser") / "run", samples=24, pictured=3)


@pytest.fixture(scope="module")
def chromium():
    with browser(str(CHROMIUM)) as running:
        yield running


@pytest.fixture(scope="module")
def page(run, chromium):
    file = write_report(run / "report.html", [read_run(run)])
    page = chromium.new_page(viewport={"width": 1300, "height": 900}, color_scheme="light")
    page.set_default_timeout(PATIENCE)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.requests = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector(".plot svg .mark")
    yield page
    assert page.errors == []


def column(page, number: int) -> list[str]:
    rows = "[...document.querySelectorAll('table.leaderboard tbody tr:not([hidden])')]"
    return page.evaluate(f"{rows}.map(row => row.cells[{number}].dataset.v)")


def test_nothing_but_the_file_is_asked_for(page):
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []


def test_pressing_a_heading_sorts(page):
    heads = page.locator("table.leaderboard thead button")
    heads.nth(3).click()
    down = [float(value) for value in column(page, 3)]
    assert down == sorted(down, reverse=True) and len(set(down)) > 3
    heads.nth(3).click()
    assert [float(value) for value in column(page, 3)] == sorted(down)
    heads.nth(0).click()
    names = column(page, 0)
    assert names == sorted(names) and len(set(names)) == 7
    heads.nth(6).click()  # what has no value stays below
    differences = column(page, 6)
    assert differences[-3:] == ["", "", ""] and "" not in differences[:-3]


def test_columns_budget_and_search(page):
    assert not page.locator("table.leaderboard th", has_text="p, Holm").first.is_visible()
    page.locator('[data-group="g-test"]').click()
    assert page.locator("table.leaderboard th", has_text="p, Holm").first.is_visible()
    page.locator('[data-group="g-acc"]').click()
    page.locator(".only").check()
    page.locator('.budgets [data-keep="192"]').click()
    assert {float(tokens) for tokens in column(page, 1)} == {576.0, 192.0}
    page.locator(".find").fill("vtc")
    assert column(page, 0) == ["vtc_cls"]
    page.locator(".find").fill("")
    page.locator(".only").uncheck()
    page.locator('.budgets [data-keep="64"]').click()
    assert len(column(page, 0)) == 13


def test_legend_hides_and_the_pointer_names(page):
    marks = page.locator(".plot svg .mark")
    assert marks.count() == 13
    page.locator('.legend [data-name="holov"]').click()
    assert marks.count() == 11 and page.locator('.plot [data-point="holov@64"]').count() == 0
    page.locator('.legend [data-name="holov"]').click()
    page.locator('.plot [data-point="holov@64"]').hover()
    assert "holov@64" in page.locator(".tip").inner_text()
    for axis in ("flops", "kv", "prefill", "tokens", "decoder"):
        page.locator(".axis").select_option(axis)
        assert marks.count() == 13


def test_the_front_is_what_nothing_beats(page, run):
    page.locator(".axis").select_option("kv")
    ends = page.evaluate("document.querySelector('.plot path.front').getAttribute('d').split('L').length")
    records = [record for record in read_run(run).records if record["method"] != "oracle"]
    front, best = 0, -1.0
    for record in sorted(records, key=lambda r: (r["kv"]["measured"], -r["overall"]["accuracy"])):
        if record["overall"]["accuracy"] > best:
            front, best = front + 1, record["overall"]["accuracy"]
    assert ends == front


def test_a_sample_shows_what_was_kept_and_said(page, run):
    page.locator(".drawn").check()
    assert page.locator(".list button").count() == 3
    page.locator('.list [data-id="s1"]').click()
    assert page.locator(".sample h4").inner_text() == "what is number 1?"
    page.wait_for_function("document.querySelectorAll('.sample canvas').length === 7")
    row = read_run(run).rows["pocket-llava|pocket|holov@64"][1]
    figure = page.locator(".sample figure", has_text="holov")
    said = figure.locator(".said")
    assert said.inner_text().strip("✓✗ ") == row["prediction"]
    assert ("right" in said.get_attribute("class")) == bool(row["correct"])
    # the picture is at least 80 in red and green everywhere; what was dropped is dark
    bright = figure.locator("canvas").evaluate(
        f"""canvas => {{ const brush = canvas.getContext("2d"), found = [];
        for (let i = 0; i < {GRID * GRID}; i++) {{
          const pixel = brush.getImageData((i % {GRID}) * 14 + 7, Math.floor(i / {GRID}) * 14 + 7, 1, 1).data;
          if (pixel[0] > 60) found.push(i); }}
        return found; }}"""
    )
    assert bright == row["kept"][0]
    page.locator(".drawn").uncheck()


def test_filters_of_samples(page, run):
    page.locator(".filters .family").select_option("read")
    assert page.locator(".list button").count() == 8
    page.locator(".filters .family").select_option("")
    page.locator(".filters .method").select_option("random")
    page.locator(".filters .right").select_option("wrong")
    rows = read_run(run).rows
    wrong = [row["sample_id"] for row in rows["pocket-llava|pocket|random@64"] if not row["correct"]]
    listed = page.evaluate("[...document.querySelectorAll('.list button')].map(button => button.dataset.id)")
    assert listed == wrong
    page.locator(".filters .method").select_option("")
    page.locator(".filters .right").select_option("")
    page.locator(".disagree").check()
    keys = [key for key in rows if key.endswith(("@64", "none"))]
    differ = [i for i in range(24) if len({rows[key][i]["correct"] for key in keys}) > 1]
    assert page.locator(".list button").count() == len(differ)
    page.locator(".disagree").uncheck()


def test_narrow_and_dark_windows(run, chromium, page, tmp_path):
    shots = (Shot("wide", 1300, 700), Shot("narrow-dark", 400, 700, "dark"))
    files = take(chromium, run / "report.html", shots, tmp_path)
    from PIL import Image

    light, dark = (Image.open(file).convert("L") for file in files)
    assert (light.size, dark.size) == ((1300, 700), (400, 700))
    assert light.resize((1, 1)).getpixel((0, 0)) > 200 > 90 > dark.resize((1, 1)).getpixel((0, 0))


def test_a_narrow_window_does_not_scroll_sideways(page):
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.set_viewport_size({"width": 1300, "height": 900})
