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


def test_a_name_opens_what_it_is_and_how_to_apply_it(page, run):
    row = page.locator('table.leaderboard tr[data-point="vtc_cls@64"]')
    row.locator("button.name").click()
    sheet = page.locator("dialog.about")
    assert sheet.is_visible() and "arXiv 2412.05819" in sheet.inner_text()
    assert sheet.locator("a").get_attribute("href") == "https://arxiv.org/abs/2412.05819"
    said = sheet.locator("pre").all_inner_texts()
    assert "handle = tokenprune.apply(model, 'vtc_cls', keep=64)" in said[0]
    assert said[1] == "tokenprune eval --model pocket-llava --tasks pocket --method vtc_cls --keep 64"
    sheet.locator(".close").click()
    assert not sheet.is_visible()


def test_the_snippet_of_a_row_applies_the_very_point(tmp_path):
    """With every digit of a tuned file."""
    from _paths import ROOT

    from tokenprune.evals.report.about import about
    from tokenprune.evals.results.run_folder import point_of

    tuned = ROOT / "configs" / "tuned" / "vflowopt_pocket_llava.yaml"
    records = read_run(
        fake_run(tmp_path, ("none", "random"), (64,), samples=8, pictured=0, files=(str(tuned),))
    ).records
    record = next(each for each in records if each["method"] == "vflowopt")
    applied = []
    space = {"model": "m", "tokenprune": type("T", (), {"apply": lambda *args, **given: applied.append((args, given))})}
    exec(about(record)["apply"].replace("import tokenprune", ""), space)
    ((model, method), given), point = applied[0], point_of(record)
    assert (model, method, given.pop("keep")) == ("m", "vflowopt", point.keep) and given == dict(point.options)
    from tokenprune.commands._shared import parse_options

    words = about(record)["command"].split(" --set ")
    assert parse_options([word.strip("'") for word in words[1:]]) == dict(point.options)


def test_the_rows_that_are_shown_download_as_csv(page):
    page.locator(".find").fill("vtc")
    with page.expect_download() as waiting:
        page.locator(".csv").click()
    lines = Path(waiting.value.path()).read_text().splitlines()
    page.locator(".find").fill("")
    assert waiting.value.suggested_filename == "run.csv" and lines[0].startswith("label,series,budget,n,accuracy")
    assert [line.split(",")[0] for line in lines[1:]] == ["vtc_cls@192", "vtc_cls@64"]


def test_the_address_holds_what_is_chosen(page, run, chromium):
    page.locator('.budgets [data-keep="192"]').click()
    page.locator('[data-group="g-cost"]').click()
    page.locator("select.axis").select_option("kv")
    page.locator('.legend [data-name="random"]').click()
    page.locator(".find").fill("vtc")
    page.wait_for_function("location.hash.includes('find=vtc')")
    other = chromium.new_page(viewport={"width": 1300, "height": 900})
    other.set_default_timeout(PATIENCE)
    other.goto(page.url)
    other.wait_for_selector(".plot svg .mark")
    assert other.locator('.budgets [aria-pressed="true"]').inner_text() == "192"
    assert other.locator('.groups [aria-pressed="true"]').get_attribute("data-group") == "g-cost"
    assert other.locator("select.axis").input_value() == "kv" and other.locator(".find").input_value() == "vtc"
    assert other.locator('.legend [data-name="random"]').get_attribute("aria-pressed") == "false"
    assert set(column(other, 0)) == {"vtc_cls"}
    assert other.title() == "run · tokenprune" and other.locator("h1").inner_text() == "run"
    other.close()
    page.locator(".find").fill("")
    page.locator('[data-group="g-acc"]').click()
    page.locator('.legend [data-name="random"]').click()
    page.locator("select.axis").select_option("decoder")


def test_what_is_moved_sideways_says_so(page):
    moved = page.locator(".plot line.moved").count()
    said = page.locator("p .moved-note").inner_text()
    assert moved > 0 and said.startswith(f"{moved} of 13 points would hide each other and stand beside their cost")
    for key in page.locator(".legend button[data-name]").all()[1:]:
        key.click()
    assert page.locator("p .moved-note").inner_text() == "Every point stands at its cost."
    page.locator(".legend .all").click()


def test_on_a_phone_a_tap_explains_and_tables_fit(run, chromium):
    context = chromium.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto((run / "report.html").as_uri())
    page.wait_for_selector(".plot svg .mark")
    head = page.locator("table.leaderboard thead th").nth(1)
    head.tap()
    bubble = page.locator(".bubble")
    assert bubble.is_visible() and bubble.inner_text() == head.get_attribute("title")
    page.locator("h1").tap()
    assert not bubble.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    matrix = page.locator(".matrix").first
    matrix.scroll_into_view_if_needed()
    tops = matrix.evaluate(
        "box => [...box.querySelectorAll('th[scope=col] span')].map("
        "each => each.getBoundingClientRect().top - box.getBoundingClientRect().top)"
    )
    assert min(tops) >= 0, "no label sticks out of the top"
    widths = matrix.evaluate("box => [box.scrollWidth, box.clientWidth]")
    assert widths[0] <= widths[1], "seven methods fit without scrolling"
    context.close()
