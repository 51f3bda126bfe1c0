"""Pictures of a run: a sample whose picture cannot be made costs a note, and runs of several tasks share one index."""

from __future__ import annotations

import dataclasses

from tokenprune.evals.config.measure import Overlays
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.report.pictures import save_pictures
from tokenprune.evals.results.run_folder import read_pictures
from tokenprune.evals.tasks.load import load_task


def test_a_picture_that_cannot_be_made_is_a_note(tiny, tiny_task, tmp_path):
    task = load_task(tiny_task)

    def load(start, stop):
        if start == 1:
            raise OSError("cannot identify image file")
        return task.load(start, stop)

    def wanting(samples):
        return RunConfig("r", "m", ["t"], ["none"], limit=12, output=str(tmp_path), overlays=Overlays(samples=samples))

    notes = save_pictures(tiny, dataclasses.replace(task, load=load), "toy", wanting(3))
    assert notes == ["Sample 1 of toy has no picture: OSError: cannot identify image file"]
    assert [entry["sample_id"] for entry in read_pictures(tmp_path)] == ["s0", "s2"]
    save_pictures(tiny, task, "other", wanting(1))
    save_pictures(tiny, task, "toy", wanting(2))  # a run that goes on writes its entries anew
    found = [(entry["task"], entry["sample_id"]) for entry in read_pictures(tmp_path)]
    assert sorted(found) == [("other", "s0"), ("toy", "s0"), ("toy", "s1")]
    assert all((tmp_path / "pictures" / view["file"]).is_file() for e in read_pictures(tmp_path) for view in e["views"])


def test_a_folder_without_pictures(tmp_path):
    assert read_pictures(tmp_path) == []
