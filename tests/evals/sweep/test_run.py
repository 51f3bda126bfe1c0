"""The driver from end to end on a tiny model: files, comparisons, resuming after a kill."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _paths import ROOT
from rich.console import Console

from tokenprune.evals.config.measure import Measure, Overlays
from tokenprune.evals.config.points import Point
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.errors import UserError
from tokenprune.evals.evaluation import applied_method
from tokenprune.evals.io.row_store import RowStore
from tokenprune.evals.io.rows import CostsRow, FlopsCosts, KvCosts, Quartiles, SampleRow
from tokenprune.evals.report.tables import result_tables
from tokenprune.evals.results.records import Picture, ResultRecord, Scores, View
from tokenprune.evals.sweep.sweep import run
from tokenprune.registry import METHODS

QUIET = Console(quiet=True)


def config(folder: Path, model: str, task: str, **changes) -> RunConfig:
    quick = Measure(samples=1, repeats=2, warmup=0, decode_tokens=2)
    settings = {"methods": ["none", "uniform"], "keep": [9], "limit": 12, "batch_size": 5, "measure": quick, **changes}
    return RunConfig("test", model, [task], output=str(folder), **settings)


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder, tiny_task):
    folder = tmp_path_factory.mktemp("run")
    methods = ["none", "uniform", "downsample", {"method": "holov", "variant": "official"}, "oracle"]
    settings = config(folder, tiny_folder, tiny_task, methods=methods, keep=[9, 0.5])
    return run(settings, QUIET), folder


def test_files_and_columns(finished):
    done, folder = finished
    names = {file.name for file in done.files}
    assert names >= {"config.yaml", "results.jsonl", "samples.parquet", "summary.csv", "pareto.png", "report.html"}
    with (folder / "summary.csv").open() as stream:
        table = list(csv.DictReader(stream))
    last = table[-1]
    assert (last["family"], last["method"], last["n"]) == ("overall", "oracle", "12")
    assert 0.0 <= float(last["accuracy"]) <= 1.0
    assert float(last["ci_low"]) <= float(last["accuracy"]) <= float(last["ci_high"])
    families = {row["family"] for row in table}
    assert families == {"even", "odd", "overall"}
    for column in ("equivalent_tokens", "gflops_vision", "gflops_decode_measured", "kv_bytes", "prefill_to_ideal"):
        assert float(last[column]) > 0
    import pyarrow.parquet as pq

    samples = pq.read_table(folder / "samples.parquet").to_pylist()
    assert len(samples) == 12 * len(done.records)
    assert {"question", "answer", "prediction", "correct", "kept_tokens", "visual_tokens"} <= set(samples[0])


def test_records_carry_everything(finished):
    done, folder = finished
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [record["label"] for record in records][:3] == ["none", "random@9", "random@0.5"]
    for record in records:
        assert record["flops"]["agree"], record["flops"]["difference"]
        assert record["kv"]["measured"] == record["kv"]["analytic"]
        assert record["kv"]["equivalent_tokens"] == record["kept_tokens"]
        assert record["overall"]["relative"] is not None or records[0]["overall"]["accuracy"] == 0
        origin = record["provenance"]
        assert {"config", "versions", "hardware", "seed", "commit", "date"} <= set(origin)
        compared = record["overall"]["vs_random"] is not None
        assert compared == (record["method"] not in ("none", "random"))
    assert records[1]["kept_tokens"] == 9 and records[2]["kept_tokens"] == 18


def lines_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_what_is_written_is_what_is_documented(finished):
    """Every key of every row and record is one of its type, and none that the type requires is missing."""
    import pyarrow.parquet as pq

    _, folder = finished
    of_the_point = {"model", "task", "method", "seed", "keep", "options"}
    assert {key for row in rows_of(folder) for key in row} == SampleRow.__required_keys__
    assert SampleRow.__optional_keys__ == {"error", "raised_at", "counted", *of_the_point}
    table = pq.read_table(folder / "samples.parquet").column_names
    assert set(table) == {*SampleRow.__required_keys__, *SampleRow.__optional_keys__} - {"raised_at"}

    for row in lines_of(folder, "measures.jsonl"):
        assert set(row) == {*CostsRow.__required_keys__, *CostsRow.__optional_keys__} - {"error", "raised_at"}
    for record in lines_of(folder, "results.jsonl"):
        # one budget spans no area, and one point of random is no curve
        of_curves = {"equal_cost", "area"}
        assert set(record) | of_curves == {*ResultRecord.__required_keys__, *ResultRecord.__optional_keys__}
        assert set(record["kv"]) == KvCosts.__required_keys__
        assert set(record["flops"]) == FlopsCosts.__required_keys__
        assert all(set(times) == Quartiles.__required_keys__ for times in record["times"].values())
        for scores in (record["overall"], *record["families"].values()):
            assert set(scores) == Scores.__required_keys__
    for picture in json.loads((folder / "pictures" / "index.json").read_text()):
        assert set(picture) == Picture.__required_keys__
        assert all(set(view) == View.__required_keys__ for view in picture["views"])


def test_a_failure_is_written_as_documented(tmp_path, tiny_folder, tiny_task, monkeypatch):
    from tokenprune.evals.evaluation import evaluate

    answer = evaluate.answer_batch

    def fails_on_the_second(loaded, point, samples, *rest):
        if point.method == "uniform" and any(sample.sample_id == "s1" for sample in samples):
            raise ValueError("no")
        return answer(loaded, point, samples, *rest)

    monkeypatch.setattr(evaluate, "answer_batch", fails_on_the_second)
    monkeypatch.setattr("tokenprune.evals.profiling.timing.measure_times", None)
    done = run(config(tmp_path, tiny_folder, tiny_task, limit=3), QUIET)
    failed = [row for row in rows_of(tmp_path) if "error" in row]
    assert [set(row) for row in failed] == [{*SampleRow.__required_keys__, "error", "raised_at"}]
    unmeasured = lines_of(tmp_path, "measures.jsonl")
    assert unmeasured and all(set(row) == {*CostsRow.__required_keys__, "error", "raised_at"} for row in unmeasured)
    assert all({"kv", "times", "flops"}.isdisjoint(record) for record in done.records)


def test_report_is_one_file_without_a_network(finished):
    _, folder = finished
    page = (folder / "report.html").read_text()
    assert "http://" not in page and "https://" not in page
    assert "<link" not in page and "@import" not in page and "holov(variant=official)" in page
    assert page.count("data:image/jpeg;base64,") == 3  # a picture is there once, however many methods are drawn over it
    drawn = json.loads((folder / "pictures" / "index.json").read_text())
    assert [entry["sample_id"] for entry in drawn] == ["s0", "s1", "s2"]
    assert drawn[0]["views"][0] | {"file": ""} == {"file": "", "rows": 6, "cols": 6, "start": 0, "kind": "image",
                                                "visual": 0}  # fmt: skip


def test_a_second_run_asks_nothing_again(finished, monkeypatch):
    done, folder = finished
    before = (folder / "samples.jsonl").read_bytes()
    monkeypatch.setattr("tokenprune.evals.evaluation.evaluate.answer_batch", None)
    again = run(done.config, QUIET)
    assert (folder / "samples.jsonl").read_bytes() == before
    assert [r["overall"] for r in again.records] == [r["overall"] for r in done.records]


def test_sharing_the_tower_changes_no_answer(tmp_path, tiny_folder, tiny_task):
    methods = ["none", *METHODS.names(), "imbalance", "holov+imbalance"]
    answers = []
    for share in (True, False):
        settings = config(
            tmp_path / str(share), tiny_folder, tiny_task, methods=methods, limit=4, share_tower=share,
            measure=Measure(samples=1, times=False, flops=False), overlays=Overlays(samples=6),
        )  # fmt: skip
        run(settings, QUIET)
        rows = rows_of(tmp_path / str(share))
        answers.append({(r["point"], r["sample_id"]): (r["prediction"], r["kept"]) for r in rows})
    assert answers[0] == answers[1]
    assert len(answers[0]) == 4 * len(methods)


def test_batch_size_changes_no_answer(tmp_path, tiny_folder, tiny_task):
    answers = []
    for size in (1, 4):
        settings = config(
            tmp_path / str(size), tiny_folder, tiny_task, methods=["none", "random", "vtc_cls"], batch_size=size,
            limit=8, measure=Measure(samples=1, times=False, flops=False),
        )  # fmt: skip
        run(settings, QUIET)
        rows = rows_of(tmp_path / str(size))
        answers.append({(r["point"], r["sample_id"]): (r["prediction"], r["kept"]) for r in rows})
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_a_folder_of_older_code_says_why_it_is_asked_again(tmp_path, tiny_folder, tiny_task, monkeypatch):
    settings = config(tmp_path, tiny_folder, tiny_task, methods=["uniform"], limit=2, references=False)

    def said() -> str:
        console = Console(file=io.StringIO(), width=1000)
        run(settings, console)
        return console.file.getvalue()

    assert "asked again" not in said() and "asked again" not in said()
    monkeypatch.setattr(applied_method, "code_fingerprint", lambda: "older")
    assert f"2 answers in {tmp_path} were given 2 by other code or weights" in said()
    assert len(rows_of(tmp_path)) == 4, "the older rows stay"


def test_a_run_killed_three_times_ends_as_an_undisturbed_one(tmp_path, tiny_folder, tiny_task):
    sweep = tmp_path / "sweep.yaml"
    settings = {
        "model": tiny_folder, "tasks": [tiny_task], "methods": ["uniform"], "keep": [9], "limit": 24, "batch_size": 1,
        "measure": {"samples": 1, "repeats": 1, "warmup": 0, "decode_tokens": 1}, "overlays": {"samples": 1},
    }  # fmt: skip
    sweep.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "tokenprune.evals.bench.survive", "--fork", "--kills", "3", "--config", str(sweep)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()[-2000:]
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["kills"] == 3 and figures["rows"] == 72 == figures["asked_undisturbed"]
    assert figures["equal"] == {"summary.csv": True, "results.jsonl": True, "samples.jsonl": True}
    assert 0 <= figures["asked_again"] <= 3, "a kill costs one batch at most"


def test_store_drops_a_torn_line_and_refuses_a_broken_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    store = RowStore(path, ("id",))
    store.append([{"id": 1, "x": "é"}, {"id": 2}])
    store.append([{"id": 2, "x": "later"}, {"id": 3}])
    with path.open("ab") as stream:
        stream.write(b'{"id": 4, "x"')
    again = RowStore(path, ("id",))
    assert [row["id"] for row in again.rows()] == [1, 2, 3] and again.get((2,)) == {"id": 2}
    assert path.read_bytes().endswith(b"\n")
    path.write_bytes(b"no json\n" + path.read_bytes())
    with pytest.raises(UserError, match="Line 1 of .* is no JSON"):
        RowStore(path, ("id",))


def test_other_weights_are_asked_anew(tmp_path, tiny_folder, tiny_task):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    settings = config(
        tmp_path / "run", str(model), tiny_task, methods=["none"], limit=3, measure=Measure(samples=1, times=False)
    )
    run(settings, QUIET)
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    done = run(settings, QUIET)
    assert len(rows_of(tmp_path / "run")) == 6
    assert done.records[0]["overall"]["n"] == 3


def test_a_method_that_cannot_work_here_fails_before_the_work(tmp_path, tiny_folder, tiny_task):
    with pytest.raises(UserError, match="no option"):
        run(config(tmp_path, tiny_folder, tiny_task, methods=[{"method": "uniform", "start_layer": 3}]), QUIET)
    settings = config(tmp_path, tiny_folder, tiny_task, methods=[{"method": "vtc_cls", "start_layer": 9}])
    with pytest.raises(UserError, match="start_layer"):
        run(settings, QUIET)
    assert not (tmp_path / "samples.jsonl").exists() or not (tmp_path / "samples.jsonl").read_bytes()


def test_several_tasks_end_with_all_of_them(tmp_path, tiny_folder, tiny_task):
    copy = tmp_path / "second.yaml"
    data = json.loads(Path(tiny_task).read_text())
    copy.write_text(json.dumps({**data, "data": str(Path(tiny_task).with_name("questions.parquet"))}))
    measure = Measure(samples=1, times=False, flops=False)
    settings = config(tmp_path / "run", tiny_folder, tiny_task, methods=["none"], limit=4, measure=measure)
    settings.tasks.append(str(copy))
    done = run(settings, QUIET)
    assert [(record["task"], record["overall"]["n"]) for record in done.records][2:] == [("all", 8)]
    last = (tmp_path / "run" / "summary.csv").read_text().splitlines()[-1]
    assert ",all,none," in last and ",overall,8," in last
    # tables call a task what its file calls it
    copied = {**data, "name": "another"}
    copy.write_text(json.dumps({**copied, "data": str(Path(tiny_task).with_name("questions.parquet"))}))
    tables = result_tables(run(settings, QUIET).records)
    assert [str(table.title) for table in tables] == ["tiny on toy", "tiny on another", "tiny on all"]
    assert "tiny on another" in (tmp_path / "run" / "report.html").read_text()


def test_point_names():
    from tokenprune.evals.config.points import spoken

    assert spoken(Point("m", "t", "none", None).label) == "unpruned" and spoken("holov@64") == "holov@64"
    point = Point("m", "t", "holov", 64, (("variant", "official"),))
    assert (point.label, point.series) == ("holov(variant=official)@64", "holov(variant=official)")
