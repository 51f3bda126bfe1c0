"""What can happen to a run: samples that raise, memory and disks that are full, a second process, torn lines."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import textwrap

import pytest
import torch
from _paths import ROOT
from _runs import QUIET, answers_of, config, rows_of, table_of

from tokenprune.evals.errors import UserError
from tokenprune.evals.evaluation import applied_method as runner
from tokenprune.evals.evaluation.retry import Failure, retry_in_halves
from tokenprune.evals.io.atomic_files import DiskRefuses, replace_file
from tokenprune.evals.io.folder_lock import lock_folder
from tokenprune.evals.io.row_store import RowStore, folder_store
from tokenprune.evals.sweep.sweep import run

ANSWER = runner.answer_batch


@pytest.fixture(autouse=True, scope="module")
def no_plot():
    """A dozen runs without the second that matplotlib takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenprune.evals.report.plots.plot_pareto", lambda records, path: path)
        yield


@pytest.fixture(scope="module")
def undisturbed(no_plot, tmp_path_factory, tiny_folder, tiny_task):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(config(folder, tiny_folder, tiny_task), QUIET)
    return folder


def breaking(monkeypatch, breaks):
    """Let `breaks(point, samples)` raise before a batch is answered; returns the sizes of all batches asked."""
    asked: list[int] = []

    def answer(loaded, point, samples, *rest):
        asked.append(len(samples))
        breaks(point, samples)
        return ANSWER(loaded, point, samples, *rest)

    monkeypatch.setattr("tokenprune.evals.evaluation.evaluate.answer_batch", answer)
    return asked


def test_a_sample_that_raises_fails_alone_and_is_asked_again(
    tmp_path, tiny_folder, tiny_task, undisturbed, monkeypatch
):
    def breaks(point, samples):
        if point.method == "vtc_cls" and any(sample.sample_id == "s5" for sample in samples):
            raise ValueError("this picture\nbites")

    asked = breaking(monkeypatch, breaks)
    settings = config(tmp_path, tiny_folder, tiny_task)
    done = run(settings, QUIET)
    failed = [row for row in rows_of(tmp_path) if "error" in row]
    assert [(row["sample_id"], row["error"]) for row in failed] == [("s5", "ValueError: this picture bites")]
    assert failed[0]["raised_at"].startswith("test_survival.py:") and failed[0]["correct"] is None
    assert [(r["label"], r["failed"], r["overall"]["n"]) for r in done.records] == [
        ("none", 0, 9), ("random@9", 0, 9), ("vtc_cls@9", 1, 9),
    ]  # fmt: skip
    assert any("vtc_cls@9 failed on 1 of 10 samples" in note and "s5" in note for note in done.warnings)
    assert any("over the 9 of 10 samples that all of its points answered" in note for note in done.warnings)
    page = (tmp_path / "report.html").read_text()
    assert "this picture bites" in page and "over the 9 of 10 samples" in page
    assert table_of(tmp_path)[-1]["failed"] == "1" and table_of(tmp_path)[0]["failed"] == "0"
    import pyarrow.parquet as pq

    kept = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    assert len(kept) == 30 and sum(row["counted"] for row in kept) == 27
    assert [row["error"] for row in kept if row["error"]] == ["ValueError: this picture bites"]

    # nothing but the batch of the failed sample is computed again, whole, and then it is an undisturbed run
    asked.clear()
    monkeypatch.setattr("tokenprune.evals.evaluation.evaluate.answer_batch", ANSWER)
    asked = breaking(monkeypatch, lambda point, samples: None)
    run(settings, QUIET)
    assert asked == [4]
    assert table_of(tmp_path) == table_of(undisturbed)
    assert len([row for row in rows_of(tmp_path) if "error" not in row]) == 30


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_batch_that_does_not_fit_is_answered_in_halves(
    tmp_path, tiny_folder, tiny_task, undisturbed, monkeypatch, error
):
    def breaks(point, samples):
        if len(samples) > 1:
            raise error("too much")

    asked = breaking(monkeypatch, breaks)
    done = run(config(tmp_path, tiny_folder, tiny_task, methods=["none"]), QUIET)
    assert asked == [4, 2, 1, 1, 2, 1, 1] * 2 + [2, 1, 1]
    assert done.warnings == [] and done.records[0]["failed"] == 0
    whole = answers_of(undisturbed)
    for key, row in answers_of(tmp_path).items():
        assert row["batch"] == 1 and row["prediction"] == whole[key]["prediction"]


def test_halves_find_every_culprit():
    def work(numbers):
        if any(number in (3, 4, 9) for number in numbers):
            raise RuntimeError(f"got {numbers}")
        return [10 * number for number in numbers]

    found = retry_in_halves(list(range(11)), work)
    assert [f if isinstance(f, int) else f.error for f in found] == [
        0, 10, 20, "RuntimeError: got [3]", "RuntimeError: got [4]", 50, 60, 70, 80, "RuntimeError: got [9]", 100,
    ]  # fmt: skip
    assert isinstance(found[3], Failure) and found[3].raised_at.startswith("test_survival.py:")

    def broken_device(numbers):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):  # nothing after it can be trusted
        retry_in_halves([1, 2], broken_device)


def test_a_picture_that_cannot_be_read_fails_at_every_point(tmp_path, tiny_folder):
    lines = [{"image": f"{i}.png", "question": "what is this", "answer": "yes"} for i in range(6)]
    from PIL import Image

    for i in range(6):
        Image.new("RGB", (42, 42), (40 * i, 90, 30)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    for line in lines:
        line["image"] = str(tmp_path / line["image"])
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "own.yaml").write_text("data: data.jsonl")
    folder = tmp_path / "run"
    done = run(config(folder, tiny_folder, str(tmp_path / "own.yaml"), methods=["none", "uniform"]), QUIET)
    assert [(record["failed"], record["overall"]["n"]) for record in done.records] == [(1, 5)] * 3
    assert {row["sample_id"] for row in rows_of(folder) if "error" in row} == {"#2"}


def test_a_point_that_answers_nothing_is_left_out_and_named(tmp_path, tiny_folder, tiny_task, monkeypatch):
    def breaks(point, samples):
        if point.method == "uniform":
            raise RuntimeError("never")

    breaking(monkeypatch, breaks)
    settings = config(tmp_path, tiny_folder, tiny_task, methods=["none", "uniform"], references=False)
    done = run(settings, QUIET)
    assert [(record["label"], record["overall"]["n"]) for record in done.records] == [("none", 10)]
    assert "uniform@9 has answered no sample of tiny" in " ".join(done.warnings)
    breaking(monkeypatch, lambda point, samples: 1 / 0)
    with pytest.raises(UserError, match="No point has answered a sample. none failed on 4 of 4 samples .*ZeroDivision"):
        run(config(tmp_path / "none", tiny_folder, tiny_task, methods=["none"], limit=4), QUIET)


def test_costs_may_fail(tmp_path, tiny_folder, tiny_task, monkeypatch):
    from tokenprune.evals.profiling import timing

    real = timing.measure_times

    def broken(loaded, point, *rest):
        if point.method == "vtc_cls":
            raise RuntimeError("no clock")
        return real(loaded, point, *rest)

    monkeypatch.setattr(timing, "measure_times", broken)
    settings = config(tmp_path, tiny_folder, tiny_task, limit=4)
    done = run(settings, QUIET)
    assert [(record["overall"]["n"], "kv" in record) for record in done.records] == [(4, True), (4, True), (4, False)]
    assert any("vtc_cls@9" in note and "no clock" in note for note in done.warnings)
    assert "no clock" in (tmp_path / "report.html").read_text()
    monkeypatch.setattr(timing, "measure_times", real)
    again = run(settings, QUIET)
    assert all("kv" in record for record in again.records) and again.warnings == []


def test_a_batch_with_a_torn_row_is_computed_whole(tmp_path, tiny_folder, tiny_task, undisturbed, monkeypatch):
    lines = (undisturbed / "samples.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 30
    # of the second batch of the unpruned model two rows are there and half of a third one
    (tmp_path / "samples.jsonl").write_bytes(b"".join(lines[:14]) + lines[14][:50])
    asked = breaking(monkeypatch, lambda point, samples: None)
    run(config(tmp_path, tiny_folder, tiny_task), QUIET)
    assert asked == [4, 4, 4, 2, 2, 2]
    assert (tmp_path / "samples.jsonl").read_bytes() == (undisturbed / "samples.jsonl").read_bytes()
    assert table_of(tmp_path) == table_of(undisturbed)


def test_a_full_disk_says_so_and_the_next_run_goes_on(tmp_path, tiny_folder, tiny_task, undisturbed, monkeypatch):
    whole = (undisturbed / "samples.jsonl").read_bytes()
    room = 5000
    write = os.write

    def full(stream, data):
        size = os.fstat(stream).st_size
        if size + len(data) <= room:
            return write(stream, data)
        if size < room:  # as a real disk does: what fits is taken, the next call fails
            return write(stream, data[: room - size])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    settings = config(tmp_path, tiny_folder, tiny_task)
    monkeypatch.setattr("tokenprune.evals.io.row_store.os.write", full)
    with pytest.raises(UserError, match="Could not write .*samples.jsonl: No space left on device. What was finished"):
        run(settings, QUIET)
    monkeypatch.undo()
    left = (tmp_path / "samples.jsonl").read_bytes()
    assert 0 < len(left) <= room and left.endswith(b"\n") and whole.startswith(left)
    run(settings, QUIET)
    assert (tmp_path / "samples.jsonl").read_bytes() == whole
    assert table_of(tmp_path) == table_of(undisturbed)


LIMITED = """
    import resource, sys
    from pathlib import Path
    from tokenprune.evals.io.atomic_files import DiskRefuses, replace_file
    from tokenprune.evals.io.row_store import RowStore
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    folder = Path(sys.argv[1])
    store = RowStore(folder / "rows.jsonl", ("id",))
    replace_file(folder / "table.csv", "old")
    try:
        for number in range(100):
            store.append([{"id": f"{number}-{part}", "text": "x" * 40} for part in range(4)])
    except DiskRefuses as error:
        print(error)
    try:
        replace_file(folder / "table.csv", "new" * 1000)
    except DiskRefuses as error:
        print(error)
"""


def test_what_was_written_before_the_kernel_refused_is_whole(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("File too large. What was finished before is whole") == 2
    rows = list(RowStore(tmp_path / "rows.jsonl", ("id",)).rows())
    assert [row["id"] for row in rows] == [f"{number}-{part}" for number in range(len(rows) // 4) for part in range(4)]
    assert rows and (tmp_path / "rows.jsonl").read_bytes().endswith(b"\n")
    assert (tmp_path / "table.csv").read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.jsonl", "table.csv"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY  # only the child was limited


HOLDING = """
    import sys, time
    from pathlib import Path
    from tokenprune.evals.io.folder_lock import lock_folder
    with lock_folder(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(600)
"""


def test_a_second_process_is_refused_and_a_dead_one_is_not_waited_for(tmp_path, tiny_folder, tiny_task):
    command = [sys.executable, "-c", textwrap.dedent(HOLDING), str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        settings = config(tmp_path, tiny_folder, tiny_task, methods=["none"], limit=2)
        with pytest.raises(UserError, match=f"is being written by process {process.pid} on .* since"):
            run(settings, QUIET)
        assert not (tmp_path / "samples.jsonl").exists()
        with lock_folder(tmp_path, "rank1"):  # another writer has files of its own
            pass
    finally:
        process.kill()
        process.wait()
    assert run(settings, QUIET).records[0]["overall"]["n"] == 2


def test_files_of_other_writers_are_read_but_never_cut(tmp_path):
    torn = b'{"id": 2, "x": 2}\n{"id": 3, "x'
    (tmp_path / "samples.rank1.jsonl").write_bytes(torn)
    store = folder_store(tmp_path, "samples", ("id",))
    store.append([{"id": 1, "error": "first"}, {"id": 2, "error": "late"}])
    store.append([{"id": 1, "error": "first"}, {"id": 1, "x": 1}, {"id": 1, "x": 5}])
    assert (tmp_path / "samples.rank1.jsonl").read_bytes() == torn
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"id": 1, "error": "first"}, {"id": 1, "x": 1}]
    again = folder_store(tmp_path, "samples", ("id",), "rank1")
    assert again.get((1,)) == {"id": 1, "x": 1} and again.get((2,)) == {"id": 2, "x": 2}
    assert (tmp_path / "samples.rank1.jsonl").read_bytes() == b'{"id": 2, "x": 2}\n'


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = replace_file(tmp_path / "table.csv", "old")
    with pytest.raises(UnicodeEncodeError):
        replace_file(path, "new \ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(DiskRefuses, match="Could not write"):
        replace_file(tmp_path / "missing" / "table.csv", "new")
