"""The report page from the files of run folders: what it holds, what it leaves out, several runs merged."""

from __future__ import annotations

import base64
import csv
import io
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
from tokenprune.evals.results.equal_cost import CONTROLS, equal_cost_verdict
from tokenprune.evals.results.run_folder import point_of, read_run
from tokenprune.evals.results.summary import summarise

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
        assert float(row[3]) == pytest.approx(record["overall"]["accuracy"])
        entry = record.get("equal_cost", {}).get("tokens", {}).get("random")
        assert row[19] == ("" if entry is None else f"{entry['holm']:.9g}")


def test_points_stand_by_their_cost_best_first(folder):
    table = rows_of_table(write_report(folder / "report.html", [read_run(folder)]).read_text())
    assert [float(row[1]) for row in table] == [576.0, *[192.0] * 6, *[64.0] * 6]
    for rows in (table[1:7], table[7:]):
        accuracies = [float(row[3]) for row in rows]
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
        "unpruned", "control", "control", "reference", "method", "method",
    ]  # fmt: skip
    beside = [f"{name}shortv(layers=[1])" for name in ("random+", "", "oracle+")]  # which is what is looked at
    assert [kind_of(name) for name in (*beside, "random(seed=3)")] == ["method", "method", "reference", "control"]


def test_the_leaderboard_as_markdown_says_what_the_records_say(folder, tmp_path, capsys):
    path = tmp_path / "board.md"
    assert main(["report", str(folder), "--output", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    text = path.read_text()
    assert max(map(len, text.split("\n\n")[-1].splitlines())) <= 120
    records = [record for record in read_run(folder).records if record["keep"] is not None]
    section = text.partition("### Every point, by its cost")[2].partition("\n### ")[0]
    tables = re.findall(r"^\| (?!method)(.+) \|$", section, re.MULTILINE)
    assert len(tables) == len(records) == 12
    order = sorted(records, key=lambda r: (-r["kept_tokens"], -r["overall"]["accuracy"]))
    for line, record in zip(tables, order, strict=True):
        cells = [cell.strip() for cell in line.split(" | ")]
        assert cells[0].strip("*") == record["series"]
        assert (cells[0][0] == "*") == (kind_of(record["method"]) == "control")
        assert cells[1] == str(record["keep"]) and cells[2] == f"{record['kept_tokens']:.4g}"
        assert cells[3].startswith(f"{100 * record['overall']['accuracy']:.1f} (")
        assert (cells[4] == "") == (record["method"] == "random")
        at_cost = record.get("equal_cost", {}).get("tokens", {}).get("random")
        if at_cost is not None:
            told = equal_cost_verdict(record, "random").told_apart
            assert cells[4].startswith("**") == told and f"{100 * at_cost['difference']:+.1f} (" in cells[4]


def test_markdown_says_of_each_method_what_the_corrected_test_says_at_its_cost(tmp_path):
    folder, path = fake_run(tmp_path / "run", samples=150, pictured=2), tmp_path / "board.md"
    main(["report", str(folder), "--output", str(path)])
    text = path.read_text()
    methods = [r for r in read_run(folder).records if kind_of(r["method"]) == "method"]
    for axis, words in (("tokens", "mean tokens"), ("flops", "FLOPs to the first token")):
        for control in CONTROLS:
            for kind, title in (("better", "Better than"), ("alike", "Not told apart from"), ("worse", "Worse than")):
                said = [r["label"] for r in methods if equal_cost_verdict(r, control, axis).kind == kind]
                line = re.search(rf"^- {title} {control} at the same {words}: (.*)\.$", text, re.M)
                assert line is not None and set(line.group(1).split(", ")) == set(said or ["none"])
    assert any(equal_cost_verdict(r, "random").kind == "better" for r in methods), "else this shows nothing"
    defaults = json.loads(path.with_suffix(".defaults.json").read_text())
    ((_, rows),) = defaults.items()
    assert [row["keep"] for row in rows] == [192, 64] and all(row["enough"] for row in rows)


def test_six_samples_never_yield_a_verdict(tmp_path, capsys):
    """On no page, in no table, in no sentence."""
    folder = fake_run(tmp_path / "few", samples=6, pictured=2)
    path = tmp_path / "few.md"
    main(["report", str(folder), "--output", str(path)])
    main(["report", str(folder), "--output", str(tmp_path / "few.html")])
    main(["compare", f"{folder}:vtc_cls@64", f"{folder}:random@64"])
    said = [path.read_text(), (tmp_path / "few.html").read_text(), capsys.readouterr().out]
    for text in said:
        visible = re.sub(r"<script.*?</script>", "", text, flags=re.S)
        visible = re.sub(r' title="[^"]*"', "", visible)
        assert "not enough samples (needs about" in visible
        for word in ("told apart from", "etter than", "orse than"):
            assert word not in visible.replace("machine better than times do", "")
        assert not re.search(r'class="[^"]*\b(good|bad|won|lost|sure)\b', visible)
        assert 'class="good"' not in visible and 'class="bad"' not in visible and "**" not in visible
    for record in read_run(folder).records:
        for axis in ("tokens", "flops"):
            for control in CONTROLS:
                assert equal_cost_verdict(record, control, axis).kind in ("few", "unknown")


def test_terminal_and_csv_give_no_verdict_from_six_samples(tmp_path):
    from rich.console import Console

    from tokenprune.evals.report.tables import result_tables

    folder = fake_run(tmp_path / "few", samples=6, pictured=1)
    console = Console(width=200, record=True, file=io.StringIO())
    for table in result_tables(read_run(folder).records, 200):
        console.print(table)
    text = console.export_text()
    assert "not enough samples (needs about" in text
    for head, explained in (("verdict*", "* at the same visual tokens"), ("/ ideal", "/ ideal: the prefill against")):
        assert (head in text.splitlines()[1]) == (explained in text)
    summary = (folder / "summary.csv").read_text()
    verdicts = {row[f"at_{axis}_vs_{control}_verdict"] for row in csv.DictReader(summary.splitlines())
                for axis in ("tokens", "flops") for control in CONTROLS}  # fmt: skip
    assert verdicts <= {"few", ""} and "few" in verdicts
    assert not re.search(r"better|worse|told apart", text)


def test_a_family_is_corrected_for_all_families(tmp_path, capsys):
    """Of two points, the verdict on a question family goes by Holm's p over the families."""
    from types import SimpleNamespace

    from tokenprune.commands.compare import _corrected

    rows = [(name, (0.0, 0.0), SimpleNamespace(p=p), None) for name, p in (("a", 0.01), ("b", 0.04), ("c", 0.03))]
    assert _corrected([*rows, ("overall", (0.0, 0.0), SimpleNamespace(p=0.02), None)]) == [0.03, 0.06, 0.06, 0.02]
    assert _corrected([("x@64", (0.0, 0.0), SimpleNamespace(p=0.02), 0.08)]) == [0.08]


def test_a_row_off_its_budget_says_so(tmp_path):
    folder = fake_run(tmp_path / "run", methods=("none", "random", "holov"), samples=120, pictured=2)
    run = read_run(folder)
    like = next(record for record in run.records if record["label"] == "holov@64")
    like["kept_tokens"] = 235.0
    text = write_markdown(tmp_path / "board.md", [run]).read_text()
    assert "| holov | 64 | 235 (not 64) |" in text and "| holov | 192 | 192 |" in text
    assert "235 <small>not 64</small>" in write_report(tmp_path / "page.html", [run]).read_text()
    like["kept_tokens"] = 64.5
    assert "(not" not in write_markdown(tmp_path / "board.md", [run]).read_text()


def test_a_cost_without_a_control_has_no_verdict(tmp_path):
    folder = fake_run(tmp_path / "run", methods=("none", "random", "holov"), samples=120, pictured=2)
    run = read_run(folder)
    rows = {key: [{**row, "kept_tokens": 20.0} if key.endswith("holov@64") else row for row in answers]
            for key, answers in run.rows.items()}  # fmt: skip
    records = summarise([point_of(record) for record in run.records], rows, {}, 0)
    mine = next(record for record in records if record["label"] == "holov@64")
    assert equal_cost_verdict(mine, "random").kind == "unknown"
    run.records, run.rows = records, rows
    line = next(x for x in write_markdown(tmp_path / "board.md", [run]).read_text().splitlines() if "(not 64)" in x)
    assert "no control measured at this cost" in line


def test_a_method_that_holds_more_than_was_asked_is_held_against_what_it_holds(tmp_path):
    """As good as random at 192 tokens, asked for 64: better than random@64, and no better at its own cost."""
    folder = fake_run(tmp_path / "run", methods=("none", "random", "holov"), samples=400, pictured=2)
    run = read_run(folder)
    by_label = {record["label"]: record for record in run.records}
    cheap, like = by_label["holov@64"], by_label["random@192"]
    rows = {**run.rows, cheap["point"]: [{**row, "kept_tokens": 192.0} for row in run.rows[like["point"]]]}
    records = summarise([point_of(record) for record in run.records], rows, {}, 0)
    mine = next(record for record in records if record["label"] == "holov@64")
    assert mine["kept_tokens"] == 192
    assert mine["equal_cost"]["tokens"]["random"]["difference"] == 0
    assert equal_cost_verdict(mine, "random").kind == "alike"
    assert (mine["overall"]["vs_random"] or 0) > 0, "at the asked budget it would have won"


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


@pytest.mark.parametrize("parts", [("vision", "projector"), ("prefill", "decode", "vision")])
def test_what_is_not_modelled_has_no_number_anywhere(tmp_path, monkeypatch, parts):
    import _fake_runs

    from tokenprune.evals.report.plots import plot_pareto

    whole = _fake_runs._measures

    def measures(point):
        costs = whole(point)
        nothing = dict.fromkeys((*parts, "total"))
        for name in ("analytic", "unpruned"):
            costs["flops"][name] = {**costs["flops"][name], **nothing}
        costs["flops"]["paper"] = None
        if "prefill" in parts:
            costs["kv"] |= {"analytic": None, "unpruned": None}
        return costs

    monkeypatch.setattr(_fake_runs, "_measures", measures)
    run = read_run(fake_run(tmp_path / "run", methods=("none", "random", "holov"), samples=12, pictured=1))
    assert all(record.get("equal_cost", {}).keys() <= {"tokens"} for record in run.records)
    assert any(record.get("equal_cost") for record in run.records)
    assert plot_pareto(run.records, tmp_path / "plot.png").is_file()
    write_report(tmp_path / "page.html", [run])
    page = (tmp_path / "page.html").read_text()
    assert "not modelled" in page and "NaN" not in json.dumps(data_of(page))
    assert "| *random* |" in write_markdown(tmp_path / "board.md", [run]).read_text()
    with (tmp_path / "run" / "summary.csv").open() as file:
        row = next(csv.DictReader(file))
    assert row["gflops_total"] == row["flops_share"] == row["gflops_paper_formula"] == ""
    assert (row["kv_share"] == "") == ("prefill" in parts) and row["kv_bytes"]


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


def test_numbers_of_large_models_have_no_powers_of_ten(tmp_path, monkeypatch):
    import _fake_runs

    whole = _fake_runs._measures

    def measures(point):
        costs = whole(point)
        for name in ("analytic", "unpruned"):
            costs["flops"][name] = {part: 1e4 * value for part, value in costs["flops"][name].items()}
        return costs

    monkeypatch.setattr(_fake_runs, "_measures", measures)
    run = read_run(fake_run(tmp_path / "run", methods=("none", "random", "holov"), samples=12, pictured=1))
    write_report(tmp_path / "page.html", [run])
    page = (tmp_path / "page.html").read_text()
    board = page[page.index("leaderboard show-g-acc") : page.index('id="data"')]
    assert "e+" not in re.sub("<[^>]+>", " ", board) and ">111,670<" in board
    assert "e+" not in write_markdown(tmp_path / "board.md", [run]).read_text()
