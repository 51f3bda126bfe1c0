"""A tuned file is called by its name wherever people read: its options have 17 digits each."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from _fake_runs import fake_run
from _paths import ROOT

from tokenprune.evals.config.grid import expand
from tokenprune.evals.config.points import Point, named_by_file, read_entry
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.config.sweep_file import read_config
from tokenprune.evals.report.markdown import write_markdown
from tokenprune.evals.report.merge import merge
from tokenprune.evals.report.page import write_report
from tokenprune.evals.report.plots import series_of
from tokenprune.evals.report.tables import result_tables
from tokenprune.evals.results.compare import compare
from tokenprune.evals.results.run_folder import point_of, read_run

TUNED = ROOT / "configs" / "tuned" / "vflowopt_pocket_llava.yaml"
LONG = re.compile(r"\d\.\d{7,}")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return fake_run(
        tmp_path_factory.mktemp("tuned") / "tuned", ("none", "random", "holov"), (0.25,), files=(str(TUNED),)
    )


def test_the_file_names_it_and_every_digit_is_still_what_runs(run):
    tuned = next(record for record in read_run(run).records if record["method"] == "vflowopt")
    assert tuned["series"] == "vflowopt_pocket_llava" and tuned["label"] == "vflowopt_pocket_llava@0.1962"
    written = yaml.safe_load(TUNED.read_text())
    assert tuned["keep"] == written["keep"] and tuned["options"]["cell"] == written["cell"]
    point = point_of(tuned)
    assert point.key == tuned["point"] and repr(written["cell"]) in point.key, "what is filed is the setting itself"
    assert point.compile().label == "vflowopt@0.1962"


def test_no_table_plot_or_page_shows_seventeen_digits(run, tmp_path):
    finished = read_run(run)
    assert list(series_of(finished.records)) == ["random", "holov", "vflowopt_pocket_llava"]
    (table,) = result_tables(finished.records)
    (column,) = (column for column in table.columns if column.header == "method")
    assert "vflowopt_pocket_llava" in list(column.cells)
    assert not LONG.search(write_markdown(tmp_path / "board.md", [finished]).read_text())
    text = write_report(tmp_path / "report.html", [finished]).read_text()
    shown, (data,) = text.partition("<footer>")[0], re.findall(r'id="data">(.*?)</script>', text)
    assert not LONG.search(re.sub(r'data-v="[^"]*"', "", shown)) and "vflowopt_pocket_llava" in shown
    (panel,) = json.loads(data.replace("<\\/", "</"))["panels"]
    assert [budget["keep"] for budget in panel["budgets"]] == ["0.25", "0.1962"]
    assert panel["budgets"][1]["title"] == "19.62 % of the tokens"
    assert {point["label"] for point in panel["points"]} >= {"vflowopt_pocket_llava@0.1962", "random@0.1962"}


def test_compare_takes_the_short_name_and_the_whole_setting(run):
    whole = next(point_of(record).written for record in read_run(run).records if record["method"] == "vflowopt")
    for name in ("vflowopt_pocket_llava@0.1962", whole):
        (row,) = compare(f"{run}:{name}", f"{run}:random@0.25")
        assert row.first == "vflowopt_pocket_llava@0.1962"


def test_names_that_would_be_confused(tmp_path):
    one, other = tmp_path / "a" / "best.yaml", tmp_path / "b" / "best.yaml"
    for file, variant in ((one, "official"), (other, "paper")):
        file.parent.mkdir()
        file.write_text(f"method: holov\nkeep: 64\nvariant: {variant}\n")
    config = RunConfig("two", "pocket-llava", ["pocket"], [str(one), str(other)])
    with pytest.raises(ValueError, match=r"would both be called 'best@64'.*holov\(variant=official\)@64 and holov"):
        config.points()
    # a file called like a method keeps its suffix; one without options is the method itself
    taken, plain = tmp_path / "holov.yaml", tmp_path / "recommended.yaml"
    taken.write_text("method: holov\nkeep: 64\nvariant: paper\n")
    plain.write_text("method: vtc_cls\nkeep: 96\n")
    points = RunConfig("x", "pocket-llava", ["pocket"], [str(taken), str(plain), "holov@64"]).points()
    assert {point.label for point in points} >= {"holov.yaml@64", "vtc_cls@96", "holov@64"}
    # two runs whose files have one name
    runs = [
        fake_run(tmp_path / name, ("none", "random"), (64,), files=(str(file),))
        for name, file in (("first", one), ("second", other))
    ]
    names = [record["series"] for record in merge([read_run(run) for run in runs]).records]
    assert names == ["none", "random", "best", "best of second"]


def test_a_name_of_ones_own(tmp_path):
    (entry,) = read_entry({"method": "holov", "variant": "paper", "as": "HoloV, paper"}, [64])
    (point,) = [p for p in expand(["m"], ["t"], [entry], [], [], True) if p.method == "holov"]
    assert point.label == "HoloV, paper@64" and point.key == Point("m", "t", "holov", 64, (("variant", "paper"),)).key
    for wrong, says in (("a@b", "without @"), ("vtc_cls", "another method"), (3, "a text")):
        with pytest.raises(ValueError, match=says):
            read_entry({"method": "holov", "as": wrong}, [64])
    with pytest.raises(ValueError, match="its grid has several"):
        read_entry({"method": "holov", "as": "x", "grid": {"variant": ["paper", "official"]}}, [64])
    # what a run writes down is read again as the same points
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"model: pocket-llava\ntasks: pocket\nmethods: [{TUNED}]\npoints: [{{method: fastv, keep: 64, as: F}}]\n"
    )
    labels = [point.label for point in read_config(file).points()]
    assert "vflowopt_pocket_llava@0.1962" in labels and "F@64" in labels
    assert named_by_file(str(TUNED))["as"] == "vflowopt_pocket_llava"


def test_eighty_columns_keep_the_interval(run):
    """An accuracy without its interval says little; what goes is what costs least to look up."""
    (table,) = result_tables(read_run(run).records, 80)
    heads = [str(column.header) for column in table.columns]
    assert heads[:4] == ["method", "tokens", "accuracy %", "95 % interval"]
    wide = sum(max(len(str(column.header)), *map(len, column.cells)) + 2 for column in table.columns)
    assert wide <= 82, "as wide as the terminal"
    assert "576" in list(table.columns[1].cells) and not any(cell.endswith(".0") for cell in table.columns[1].cells)
