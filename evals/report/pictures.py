"""Pictures of a run: what the model saw of some samples, and where its visual tokens lie over them.

A run folder keeps each picture once, `pictures/*.jpg`, and `pictures/index.json`. What a method kept are raster indices
in its row; whoever shows them draws them over the picture, so ten methods at three budgets cost one file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.io.atomic_files import DiskRefuses, replace_file, replaced
from tokenprune.evals.models.load import LoadedModel
from tokenprune.evals.report.overlay import seen_views
from tokenprune.evals.results.records import Picture, View
from tokenprune.evals.results.run_folder import PICTURE_INDEX, PICTURES, read_pictures
from tokenprune.evals.tasks.task import Task, drawn_samples


def save_pictures(loaded: LoadedModel, task: Task, task_name: str, config: RunConfig) -> list[str]:
    """Save the views of as many samples of a run as its config wants and add them to the index.

    Args:
        task_name: as the run's points call the task.

    Returns:
        Sentences on the samples of which there is no picture; none of them is worth the page.

    Raises:
        DiskRefuses: the disk takes no more.
    """
    folder = config.folder
    target = folder / PICTURES
    target.mkdir(parents=True, exist_ok=True)
    others = [entry for entry in read_pictures(folder) if (entry["model"], entry["task"]) != (loaded.name, task_name)]
    entries: list[Picture] = []
    notes: list[str] = []
    for number in drawn_samples(task, config.overlays.samples, config.limit):
        try:
            drawn = _picture(loaded, task, number, target)
            if drawn is not None:
                sample_id, views = drawn
                entries.append({"model": loaded.name, "task": task_name, "sample_id": sample_id, "views": views})
        except DiskRefuses:
            raise
        except Exception as error:
            notes.append(f"Sample {number} of {task.name} has no picture: {type(error).__name__}: {error}")
    replace_file(target / PICTURE_INDEX, json.dumps([*others, *entries], indent=1))
    return notes


def _picture(loaded: LoadedModel, task: Task, number: int, target: Path) -> tuple[str, list[View]] | None:
    """The id of a sample and the views of its first picture; None for a text alone."""
    sample = next(task.load(number, number + 1))
    if not sample.visuals:
        return None
    inputs = dict(loaded.inputs([sample.question], [sample.image]))
    views: list[View] = []
    for place, (picture, raster, visual) in enumerate(seen_views(loaded, inputs, sample.visuals[0])):
        stem = f"{Path(loaded.name).name}-{task.name}-{sample.sample_id}-{place}"
        file = re.sub(r"[^\w.@-]+", "_", stem) + ".jpg"
        with replaced(target / file) as partial:
            picture.save(partial, format="JPEG", quality=88, optimize=True)
        rows, cols = raster.grid
        views.append(
            {"file": file, "rows": rows, "cols": cols, "start": raster.start, "kind": raster.kind, "visual": visual}
        )
    return sample.sample_id, views
