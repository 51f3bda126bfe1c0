"""Files of a run that were edited or cut off are refused by a sentence that says where."""

from __future__ import annotations

import json
from typing import TypedDict

import pytest
from _fake_runs import fake_run

from tokenprune.evals.io.picture_reader import BadPicture, read_frames
from tokenprune.evals.io.shapes import check_shape
from tokenprune.evals.results.run_folder import read_run


class _Inner(TypedDict, total=False):
    n: float | None


class _Outer(TypedDict):
    name: str
    inner: dict[str, list[_Inner]]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], r"it must be a mapping, got \[\]"),
        ({"inner": {}}, "it lacks 'name'"),
        ({"name": 3, "inner": {}}, r"it\['name'\] must be a str, got 3"),
        ({"name": "a", "inner": {"x": [{"n": 1}, {"n": True}]}}, r"it\['inner'\]\['x'\]\[1\]\['n'\] must be a float"),
    ],
)
def test_the_place_of_what_is_wrong_is_named(value, says):
    with pytest.raises(ValueError, match=says):
        check_shape(value, _Outer, "it", ["name"])


def test_what_is_right_passes():
    check_shape({"name": "a", "inner": {"x": [{"n": None}, {"n": 2}, {}]}, "more": 3}, _Outer, "it")


def test_damaged_files_of_a_run(tmp_path):
    folder = fake_run(tmp_path / "run", ("none", "random", "holov"), (64,), samples=6, pictured=2)
    assert len(read_run(folder).records) == 3
    for name, change, says in (
        ("results.jsonl", lambda data: data[:-9], "Line 3 of .*results.jsonl is no JSON object"),
        ("results.jsonl", lambda data: b"\xff" + data, "Line 1 of"),
        ("results.jsonl", lambda data: data.replace(b'"overall"', b'"overal"', 1), "Record 1 of .* lacks 'overall'"),
        ("samples.parquet", lambda data: data[: len(data) // 2], "samples.parquet cannot be read"),
        ("pictures/index.json", lambda data: data[1:], "index.json is no JSON"),
        (
            "pictures/index.json",
            lambda data: json.dumps([{"model": 3}]).encode(),
            r"index.json\[0\]\['model'\] must be a str",
        ),
    ):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(change(before))
        with pytest.raises(ValueError, match=says):
            read_run(folder)
        (folder / name).write_bytes(before)


def test_a_video_without_frames():
    with pytest.raises(BadPicture, match="A video has no frames"):
        read_frames([])
