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
        (
            "results.jsonl",
            lambda data: data.replace(b'"unpruned":', b'"unpruned_":', 1),
            r"Record 1 of .*\['flops'\] lacks 'unpruned'. .* another version wrote it",
        ),
        ("results.jsonl", lambda data: data.replace(b'"q25"', b'"q2"', 1), r"\['times'\]\['prefill'\] lacks 'q25'"),
        (
            "results.jsonl",
            lambda data: data.replace(b'"projector"', b'"project"', 1),
            r"flops\['analytic'\] in record 1 of .* lacks 'projector'",
        ),
        (
            "results.jsonl",
            lambda data: data.replace(b'"headroom_won"', b'"headroom"', 1),
            r"\['overall'\] lacks 'headroom_won'",
        ),
        (
            "results.jsonl",
            lambda data: data.replace(b'"vs_unpruned_lost": 0', b'"vs_unpruned_lost": null', 1),
            "has 'vs_unpruned' without 'vs_unpruned_lost'",
        ),
        (
            "results.jsonl",
            lambda data: data.replace(b'"versions"', b'"version"'),
            "provenance in record 1 of .* lacks 'versions'",
        ),
        (
            "results.jsonl",
            lambda data: data.replace(b'"dtype"', b'"d"'),
            "config of the provenance in record 1 of .* lacks 'dtype'",
        ),
        ("results.jsonl", lambda data: data.replace(b'"provenance"', b'"p"'), "Record 1 of .* lacks 'provenance'"),
        (
            "pictures/index.json",
            lambda data: data.replace(b'"rows": 24', b'"rows": 240000000', 1),
            "A view of entry 0 of .* has a raster that no picture has: 240000000 x 24 from 0",
        ),
        (
            "pictures/index.json",
            lambda data: data.replace(b'"s0.jpg"', b'"../../s0.jpg"', 1),
            "A view of entry 0 of .* names a file outside of pictures: '../../s0.jpg'",
        ),
        (
            "results.jsonl",
            lambda data: data.replace(b'"keep": 64', b'"keep": "avg"', 1),
            "keep in record 2 of .* is no budget, got 'avg'",
        ),
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
