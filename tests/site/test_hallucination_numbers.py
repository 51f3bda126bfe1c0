"""A page of an intervention shows what the files of the hallucination bench hold, whichever are there."""

from __future__ import annotations

import csv

from _paths import ROOT

BENCH = ROOT / "docs" / "bench"
HEADS = ("task", "family", "method", "options", "keep", "n", "accuracy", "ci_low", "ci_high", "vs_unpruned_won",
         "vs_unpruned_lost", "metric:CHAIR_i %", "metric:CHAIR_s %", "metric:things found %")  # fmt: skip
TASKS = ("random", "popular", "adversarial", "listing")


def write(path, points: dict[tuple[str, str], float], won: int = 0) -> None:
    """A file as the sweep writes it, with `accuracy` a point and a CHAIR_i of a tenth of it."""
    with path.open("w", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(HEADS)
        for (method, keep), value in points.items():
            for task in TASKS:
                listing = [10 * value, "", ""] if task == "listing" else ["", "", ""]
                rows.writerow([f"suite:{task}", "overall", method, "", keep, 30, value, value, value, won, 0, *listing])
                rows.writerow([f"suite:{task}", task, method, "", keep, 30, 0.5, 0.5, 0.5, "", "", "", "", ""])


def test_the_newest_file_of_each_model_is_read_and_each_point_stands_beside_the_same_without(tmp_path):
    from pages.hallucination import benches, section

    old = {("none", ""): 0.25, ("gift", ""): 0.25}
    new = {("none", ""): 1.0, ("gift", ""): 0.9, ("zerotuning(gamma=2.0)", ""): 0.8, ("holov", "64"): 0.7}
    new |= {("holov+zerotuning(gamma=2.0)", "64"): 0.6, ("holov", "16"): 0.4, ("random", "64"): 0.3}
    write(tmp_path / "hallucination-small-2026-01-02.csv", old)
    write(tmp_path / "hallucination-small-2026-01-10.csv", new)
    write(tmp_path / "hallucination-other.csv", old)
    assert [(bench.model, bench.file.name) for bench in benches(tmp_path)] == [
        ("other", "hallucination-other.csv"),
        ("small", "hallucination-small-2026-01-10.csv"),
    ]
    lines = "\n".join(section("zerotuning", tmp_path)).splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith(("| unpruned", "| `"))]
    assert [row[0] for row in rows] == [
        "| unpruned", "| `zerotuning(gamma=2.0)`", "| `holov@64`", "| `holov+zerotuning(gamma=2.0)@64`"
    ]  # fmt: skip
    assert [row[1] for row in rows] == ["100.0 (100 to 100)", "80.0 (80 to 80)", "70.0 (70 to 70)", "60.0 (60 to 60)"]
    assert [row[4] for row in rows] == ["10.0", "8.0", "7.0", "6.0"]
    assert sum("**other**" in line for line in "\n".join(section("gift", tmp_path)).splitlines()) == 1
    assert "not run" in section("act", tmp_path)[2]


def test_a_run_that_changed_nothing_is_called_so_and_no_other(tmp_path):
    from pages.hallucination import section

    points = {("none", ""): 0.5, ("var", ""): 0.5}
    write(tmp_path / "hallucination-a.csv", points)
    assert "turned no answer of the 90 from" in "\n".join(section("var", tmp_path))
    write(tmp_path / "hallucination-a.csv", points, won=1)
    assert "turned no answer" not in "\n".join(section("var", tmp_path))


def test_pages_of_interventions_show_what_is_in_the_files():
    from pages import interventions
    from pages.hallucination import benches

    found = benches()
    assert {bench.model for bench in found} == {"pocket-llava", "pocket-qwen"}
    for bench in found:
        with bench.file.open(encoding="utf-8") as stream:
            rows = [row for row in csv.DictReader(stream) if row["method"] == "var" and row["family"] == "overall"]
        (row,) = (row for row in rows if row["task"].endswith(":random"))
        low, high = (f"{100 * float(row[key]):.0f}" for key in ("ci_low", "ci_high"))
        assert f"| `var` | {100 * float(row['accuracy']):.1f} ({low} to {high}) |" in interventions.page("var")
