"""The report page from the files of run folders: what it holds, what it leaves out, several runs merged."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from _fake_runs import fake_run
from _paths import ROOT
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.cli import main
from tokenprune.evals.config.targets import Target
from tokenprune.evals.report import explorer as explorer_file
from tokenprune.evals.report.agreement import agreement, cohen_kappa
from tokenprune.evals.report.markdown import write_markdown
from tokenprune.evals.report.page import write_report
from tokenprune.evals.report.series import kind_of
from tokenprune.evals.results.run_folder import read_run

TARGET = Target("random", 64, "pocket", 50.0, "made up for this test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return fake_run(tmp_path_factory.mktemp("runs") / "whole")


def data_of(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def rows_of_table(page: str) -> list[list[str]]:
    table = page.partition('class="sort leaderboard')[2].partition("</table>")[0]
    return [re.findall(r'<td[^>]*data-v="([^"]*)"', row) for row in re.findall(r"<tr .*?</tr>", table)]


def test_report_rebuilds_the_page_from_files_alone(folder, capsys, monkeypatch):
    monkeypatch.setattr("tokenprune.evals.tasks.load.load_task", None)
    monkeypatch.setattr("tokenprune.evals.models.load.load_model", None)
    assert main(["report", str(folder)]) == 0
    assert "report.html" in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert "http://" not in page and "https://" not in page and "<link" not in page and "@import" not in page
    assert "@@" not in page
    records = read_run(folder).records
    table = rows_of_table(page)
    assert len(table) == len(records) == 13
    by_name = {(row[0], float(row[1])): row for row in table}
    for record in records:
        row = by_name["unpruned" if record["method"] == "none" else record["series"], record["kept_tokens"]]
        assert float(row[2]) == pytest.approx(record["overall"]["accuracy"])
        p = record["overall"]["vs_random_holm"]
        assert row[16] == ("" if p is None else f"{p:.9g}")


def test_points_of_a_budget_stand_together_best_first(folder):
    table = rows_of_table(write_report(folder / "report.html", [read_run(folder)]).read_text())
    assert [float(row[1]) for row in table] == [576.0, *[192.0] * 6, *[64.0] * 6]
    for rows in (table[1:7], table[7:]):
        accuracies = [float(row[2]) for row in rows]
        assert accuracies == sorted(accuracies, reverse=True)


def test_pictures_are_there_once_and_kept_tokens_are_bits(folder):
    page = write_report(folder / "report.html", [read_run(folder)]).read_text()
    assert page.count("data:image/jpeg;base64,") == 6
    found = data_of(page)["panels"][0]["explorer"]
    assert len(found["samples"]) == 60 and found["left_out"] == 0
    label = found["labels"].index("holov@64")
    run = read_run(folder)
    row = run.rows["pocket-llava|pocket|holov@64"][2]
    sample = found["samples"][2]
    bits = np.unpackbits(np.frombuffer(base64.b64decode(sample["kept"][label]), dtype=np.uint8))
    assert np.flatnonzero(bits).tolist() == row["kept"][0]
    assert sample["said"][sample["by"][label]] == [row["prediction"], row["correct"]]
    assert sample["kept"][found["labels"].index("none")] == ""


def test_a_large_run_keeps_the_page_small(folder, monkeypatch):
    monkeypatch.setattr(explorer_file, "MOST_PICTURES", 2)
    monkeypatch.setattr(explorer_file, "MOST_TEXT_BYTES", 6000)
    found = data_of(write_report(folder / "small.html", [read_run(folder)]).read_text())["panels"][0]["explorer"]
    assert sum("views" in sample for sample in found["samples"]) == 2
    assert 0 < len(found["samples"]) < 60 and found["left_out"] == 60 - len(found["samples"])
    shown = {sample["id"] for sample in found["samples"]}
    everything = data_of((folder / "report.html").read_text())["panels"][0]["explorer"]["samples"]
    disagree = [s["id"] for s in everything if len({score for _, score in s["said"]}) > 1]
    drawn = [f"s{i}" for i in range(6)]
    rest = [name for name in shown if name not in drawn]
    assert set(rest) <= set(disagree)  # those on which methods differ come first


def test_words_of_a_task_cannot_break_the_page(tmp_path):
    run = read_run(fake_run(tmp_path / "run", samples=9, pictured=0, methods=("none", "random", "holov")))
    for rows in run.rows.values():
        rows[0]["question"] = "what is </script><b>@@title@@?"
    run.origin["config"]["name"] = "<i>run"
    page = write_report(tmp_path / "report.html", [run]).read_text()
    assert "<b>@@" not in page.replace("<\\/script><b>@@title@@", "") and "<h1>&lt;i&gt;run</h1>" in page
    assert data_of(page)["panels"][0]["explorer"]["samples"][0]["question"] == "what is </script><b>@@title@@?"


def test_failed_samples_are_shown_as_failed(tmp_path):
    run = read_run(fake_run(tmp_path / "run", samples=9, pictured=0, methods=("none", "random", "holov")))
    run.rows["pocket-llava|pocket|holov@64"][4] |= {"error": "out of memory", "prediction": None, "correct": None}
    found = data_of(write_report(tmp_path / "report.html", [run]).read_text())["panels"][0]
    sample = found["explorer"]["samples"][4]
    answer = sample["said"][sample["by"][found["explorer"]["labels"].index("holov@64")]]
    assert answer == ["failed: out of memory", None]


def test_merged_runs_are_compared_anew(tmp_path):
    one = fake_run(tmp_path / "one", methods=("none", "random", "holov"), keeps=(64,))
    two = fake_run(tmp_path / "two", methods=("none", "random", "vtc_cls", "oracle"), keeps=(64,), samples=40)
    whole = fake_run(tmp_path / "whole", methods=("none", "random", "holov"), keeps=(64,))
    assert main(["report", str(one), str(two), "--output", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    panel = data_of(page)["panels"][0]
    labels = [point["label"] for point in panel["points"]]
    assert labels == ["none", "random@64", "holov@64", "vtc_cls@64", "oracle@64"]
    assert "ran in several of these runs; shown are those of one" in page and "different numbers of samples" in page
    points = {point["label"]: point for point in panel["points"]}
    assert points["holov@64"]["n"] == 60 and points["vtc_cls@64"]["n"] == 40
    alone = {r["label"]: r["overall"] for r in read_run(whole).records}
    assert points["holov@64"]["vs_random"] == pytest.approx(alone["holov@64"]["vs_random"], abs=1e-6)
    # three tests against random share the table now, where it was one
    assert points["holov@64"]["holm"] == pytest.approx(min(1, 3 * alone["holov@64"]["vs_random_p"]), abs=1e-6)
    with pytest.raises(ValueError, match="not runs of the same data"):
        other = read_run(two)
        other.rows["pocket-llava|pocket|vtc_cls@64"][3]["question"] = "something else?"
        write_report(tmp_path / "x.html", [read_run(one), other])


def test_no_finished_run_is_a_sentence(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no finished run: there is no results.jsonl in it." in capsys.readouterr().err
    (tmp_path / "samples.jsonl").write_text("")
    assert main(["report", str(tmp_path)]) == 2
    assert "it goes on where it was" in capsys.readouterr().err


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_kappa_is_its_definition(pairs):
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    n = len(pairs)
    observed = sum(a == b for a, b in pairs) / n
    expected = (sum(first) * sum(second) + (n - sum(first)) * (n - sum(second))) / n**2
    found = cohen_kappa(first, second)
    assert found is None if expected == 1 else found == pytest.approx((observed - expected) / (1 - expected))
    assert cohen_kappa(second, first) == found
    if found is not None:
        assert found <= 1 and cohen_kappa(first, first) in (None, 1.0)


def test_agreement_counts_equal_answers(folder):
    run = read_run(folder)
    found = agreement(run.records, run.rows)
    assert set(found) == {"192", "64"}
    names = found["64"]["names"]
    i, j = names.index("holov"), names.index("random")
    a, b = (run.rows[f"pocket-llava|pocket|{name}@64"] for name in ("holov", "random"))
    same = sum(x["prediction"] == y["prediction"] for x, y in zip(a, b)) / len(a)
    assert found["64"]["equal"][i][j] == found["64"]["equal"][j][i] == pytest.approx(same, abs=1e-4)
    assert found["64"]["equal"][i][i] == 1.0 and "unpruned" in names


def test_kinds_of_methods():
    assert [kind_of(name) for name in ("none", "random", "downsample", "oracle", "holov", "vtc_cls+var")] == [
        "unpruned", "control", "control", "bound", "method", "method",
    ]  # fmt: skip


def test_the_leaderboard_as_markdown_says_what_the_records_say(folder, tmp_path, capsys):
    path = tmp_path / "board.md"
    assert main(["report", str(folder), "--output", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    text = path.read_text()
    assert max(map(len, text.split("\n\n")[-1].splitlines())) <= 120
    records = [record for record in read_run(folder).records if record["keep"] is not None]
    tables = re.findall(r"^\| (?!method)(.+) \|$", text, re.MULTILINE)
    assert len(tables) == len(records) == 12
    order = sorted(records, key=lambda r: (-r["keep"], -r["overall"]["accuracy"]))
    for line, record in zip(tables, order, strict=True):
        cells = [cell.strip() for cell in line.split(" | ")]
        assert cells[0].strip("*") == record["series"]
        assert (cells[0][0] == "*") == (kind_of(record["method"]) == "control")
        assert cells[1] == f"{record['kept_tokens']:.4g}"
        assert cells[2].startswith(f"{100 * record['overall']['accuracy']:.1f} (")
        assert (cells[3] == "") == (record["method"] == "random")


def test_markdown_sorts_methods_by_what_the_interval_to_random_says(folder, tmp_path):
    path = tmp_path / "board.md"
    main(["report", str(folder), "--output", str(path)])
    found = dict(re.findall(r"^- (Better than|Not told apart from|Worse than) random: (.*)\.$", path.read_text(), re.M))
    at = [r for r in read_run(folder).records if r["keep"] == 64 and kind_of(r["method"]) == "method"]
    better = {r["series"] for r in at if r["overall"]["vs_random_low"] > 0}
    worse = {r["series"] for r in at if r["overall"]["vs_random_high"] < 0}
    assert better, "else this shows nothing"
    assert set(found["Better than"].split(", ")) == better
    assert set(found["Worse than"].split(", ")) == (worse or {"none"})


def test_markdown_shows_points_without_a_budget(folder, tmp_path):
    from dataclasses import replace

    run = read_run(folder)
    like = next(record for record in run.records if record["series"] == "holov")
    others = [{**like, "keep": None, "method": name, "series": name} for name in ("var", "holov@64+fastv@9")]
    text = write_markdown(tmp_path / "board.md", [replace(run, records=[*run.records, *others])]).read_text()
    section = text.partition("### Without a budget of the run")[2].partition("\n#")[0]
    assert re.findall(r"^\| (var|holov@64\+fastv@9|unpruned) \|", section, re.M) == ["var", "holov@64+fastv@9"]
    plain = write_markdown(tmp_path / "plain.md", [run]).read_text()
    assert "Without a budget" not in plain


def test_line_separators_inside_a_text_end_no_line(tmp_path):
    """`str.splitlines` takes U+2028 and U+0085 for the end of a JSON line."""
    from tokenprune.evals.results import parity
    from tokenprune.evals.tasks.unlabelled import draw_samples

    folder = fake_run(tmp_path / "run", methods=("none", "random"), keeps=(64,), samples=6, pictured=2)
    path = folder / "results.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"count"', '"co\u2028u\x85nt"'), encoding="utf-8")
    assert all("co\u2028u\x85nt" in record["families"] for record in read_run(folder).records)
    assert len(parity.read_run(folder)[0]) == len(read_run(folder).records) == 2
    line = '{"image": "s%d.jpg", "question": "what\u2028is\x85this"}\n'
    (folder / "pictures" / "questions.jsonl").write_text("".join(line % i for i in range(2)), encoding="utf-8")
    first, rest = draw_samples(str(folder / "pictures"), 1, 1, 0)
    assert first[0].question == rest[0].question == "what\u2028is\x85this"


def test_a_run_without_costs_has_a_plot_and_a_page(tmp_path, monkeypatch):
    """As that of a task of texts."""
    import _fake_runs

    from tokenprune.evals.report.plots import plot_pareto

    monkeypatch.setattr(_fake_runs, "_measures", lambda point: {})
    run = read_run(fake_run(tmp_path / "run", methods=("none", "random"), keeps=(64,), samples=6, pictured=1))
    assert plot_pareto(run.records, tmp_path / "plot.png").is_file()
    write_report(tmp_path / "page.html", [run])
    assert "| *random* |" in write_markdown(tmp_path / "board.md", [run]).read_text()


def test_tables_are_written_whole_or_not_at_all(tmp_path):
    from tokenprune.evals.io.atomic_files import write_csv

    path = write_csv(tmp_path / "t.csv", [{"a": 1 / 3, "b": None}, {"a": "x, y", "b": True}])
    before = path.read_bytes()
    assert before == b'a,b\r\n0.333333333,\r\n"x, y",True\r\n'
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        write_csv(path, [{"a": 1}, {"c": 2}])
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["t.csv"]


def test_result_files_are_written_in_one_place():
    """What is written elsewhere is written in place, and a kill leaves half of it."""
    evals = ROOT / "evals"
    apart = ("bench", "pocket", "pocket_training")  # tables of their own, data and recipes
    sources = [file for file in evals.rglob("*.py") if file.relative_to(evals).parts[0] not in apart]
    # the README is no result
    own = {"atomic_files.py", "readme.py"}
    writes = re.compile(r"open\(\"w|write_text\(|DictWriter")
    assert {path.name for path in sources if writes.search(path.read_text(encoding="utf-8"))} - own == set()


def test_every_table_of_a_run_goes_through_it(tmp_path, monkeypatch):
    """An interrupted write leaves the old file."""
    from tokenprune.evals.results import parity
    from tokenprune.evals.results.over_seeds import write_seeds

    run = read_run(fake_run(tmp_path / "run", methods=("none", "random"), keeps=(64,), samples=6, pictured=1))
    seeded = [{**run.records[1], "seed": seed} for seed in (1, 2)]
    (seeds,) = write_seeds(run.folder, seeded)
    there = parity.write_parity(run.folder / "parity.csv", [parity.Parity(TARGET, 1.0, None, None, None, 6)])
    before = seeds.read_bytes(), there.read_bytes()

    def dies(self, row):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("csv.DictWriter.writerow", dies)
        for write in (
            lambda: write_seeds(run.folder, seeded),
            lambda: parity.write_parity(there, [parity.Parity(TARGET, 2.0, None, None, None, 6)]),
        ):
            with pytest.raises(KeyboardInterrupt):
                write()
    assert (seeds.read_bytes(), there.read_bytes()) == before
    # without seeds, what an earlier run said of them is gone
    assert write_seeds(run.folder, run.records) == [] and not seeds.exists()
