"""`tokenprune compare`: the pairs it makes, what it prints, what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _fake_runs import fake_run

from tokenprune.cli import main
from tokenprune.evals.results.compare import OVERALL, compare
from tokenprune.evals.results.run_folder import read_run
from tokenprune.evals.statistics.significance import compare_paired, holm


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("compare")
    fake_run(root / "a", methods=("none", "random", "holov", "vtc_cls"))
    fake_run(root / "b", methods=("none", "random", "holov"), seed=1, samples=45)
    fake_run(root / "text", methods=("none", "random"), task="other")
    return root


def test_two_points_over_common_samples(runs):
    (found,) = compare(f"{runs}/a:vtc_cls@64", f"{runs}/b:holov@64")
    a, b = (read_run(runs / name).rows for name in "ab")
    ours = [row["correct"] for row in a["pocket-llava|pocket|vtc_cls@64"]][:45]
    theirs = [row["correct"] for row in b["pocket-llava|pocket|holov@64"]]
    assert found.families[OVERALL] == compare_paired(ours, theirs)
    assert (found.only_first, found.only_second, found.holm) == (15, 0, None)
    assert list(found.families) == ["count", "read", "global", OVERALL]
    assert sum(each.n for each in found.families.values()) == 2 * 45
    (back,) = compare(f"{runs}/b:holov@64", f"{runs}/a:vtc_cls@64")
    assert back.families[OVERALL].difference == -found.families[OVERALL].difference
    assert back.families[OVERALL].p == found.families[OVERALL].p


def test_two_folders_compare_every_common_point(runs):
    found = compare(f"{runs}/a", f"{runs}/b")
    assert [each.first for each in found] == ["none", "random@192", "random@64", "holov@192", "holov@64"]
    assert all(each.first == each.second for each in found)
    assert [each.holm for each in found] == holm([each.families[OVERALL].p for each in found])
    some = compare(f"{runs}/a", f"{runs}/b", method="holov")
    assert [each.first for each in some] == ["holov@192", "holov@64"]
    assert [each.first for each in compare(f"{runs}/a:holov@64", f"{runs}/b")] == ["holov@64"]


def test_printed(runs, capsys):
    assert main(["compare", f"{runs}/a:vtc_cls@64", f"{runs}/b:holov@64"]) == 0
    printed = capsys.readouterr().out
    (found,) = compare(f"{runs}/a:vtc_cls@64", f"{runs}/b:holov@64")
    last = next(line for line in printed.splitlines() if line.startswith("overall"))
    whole = found.families[OVERALL]
    parts = (f"{100 * whole.difference:+.1f}", f"{whole.won} / {whole.lost}", f"{whole.p:.2g}")
    assert all(part in last for part in parts)
    assert "15 samples are only in A and 0 only in B; they were left out." in printed
    assert main(["compare", f"{runs}/a", f"{runs}/b"]) == 0
    assert "p, Holm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "second", "more", "sentence"),
    [
        ("a", "text", [], "The two have no task in common: pocket in"),
        ("a:holv@64", "b", [], "has no point 'holv@64'. Did you mean"),
        ("nothing", "b", [], "There is no run folder"),
        ("a:vtc_cls@64", "b", [], "No point is in both: vtc_cls@64 in"),
        ("a", "b", ["--method", "vtc_cls"], "has no method 'vtc_cls'"),
        ("a:none", "text:none", [], "no task in common"),
    ],
)
def test_what_does_not_match_is_refused(runs, capsys, first, second, more, sentence):
    assert main(["compare", f"{runs}/{first}", f"{runs}/{second}", *more]) == 2
    assert sentence in capsys.readouterr().err


def rewritten(run: Path, copy: Path, **columns: Callable[[str], str | None]) -> Path:
    """A copy of a run with some columns of its answers changed; what a function gives no value for stays."""
    shutil.copytree(run, copy)
    rows = pq.read_table(copy / "samples.parquet").to_pylist()
    for row in rows:
        row |= {name: change(row[name]) or row[name] for name, change in columns.items()}
    pq.write_table(pa.Table.from_pylist(rows), copy / "samples.parquet")
    return copy


def test_other_data_under_the_same_names_is_refused(runs, tmp_path, capsys):
    other = rewritten(runs / "b", tmp_path / "c", question={"what is number 7?": "what else?"}.get)
    assert main(["compare", f"{runs}/a", str(other)]) == 2
    error = capsys.readouterr().err
    assert "Sample s7 of pocket is 'what is number 7?' in one run and 'what else?' in the other" in error


def test_no_common_sample_is_refused(runs, tmp_path, capsys):
    other = rewritten(runs / "b", tmp_path / "d", sample_id="x{}".format)
    assert main(["compare", f"{runs}/a:holov@64", str(other)]) == 2
    assert "have no sample of pocket in common: 60 and 45" in capsys.readouterr().err
