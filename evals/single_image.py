"""One picture, one question: what the model says with and without pruning, and where the kept tokens are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenprune.api import applied
from tokenprune.evals.config.points import NONE, Point
from tokenprune.evals.errors import as_user_error
from tokenprune.evals.evaluation.applied_method import (
    answer_batch,
    calibrate_interventions,
    give_boxes,
    method_of,
    visual_tokens,
)
from tokenprune.evals.io.picture_reader import read_picture
from tokenprune.evals.models.load import LoadedModel, load_model
from tokenprune.evals.report.overlay import draw_kept, seen_views
from tokenprune.evals.tasks.load import default_task, load_task
from tokenprune.evals.tasks.task import Sample
from tokenprune.plan.expression import pruner_parts, split_name
from tokenprune.registry import METHODS


def run_single(
    model: str,
    method: str,
    keep: int | float | str | None,
    options: dict[str, Any],
    image: str | None,
    question: str | None,
    sample: int,
    output: str,
    dtype: str = "float32",
    device: str | None = None,
    max_new_tokens: int = 32,
) -> int:
    """Answer, print both answers, the cost and what interventions did, write the overlay PNG. Names were checked by the
    caller.

    Args:
        image: path of a picture; None takes sample number `sample` of the model's pocket suite, with its question.

    Raises:
        FileNotFoundError: no such picture.
        ValueError: the method needs hints that a picture of one's own does not have, or there is no such sample.
    """
    from transformers.utils import logging

    with as_user_error():
        if image is not None and not os.path.isfile(image):
            raise FileNotFoundError(f"There is no picture {image}.")
        pruners = [METHODS.get(split_name(part)[0]) for part in pruner_parts(method)]
        if image is not None and any("boxes" in pruner.hints for pruner in pruners):
            raise ValueError(f"{method} needs boxes that suffice for the answer; leave --image out.")
        if image is not None:
            asked = Sample("picture", "all", str(question), None, read_picture(image))
        else:
            task = load_task(default_task(model))
            if not 0 <= sample < task.size:
                raise ValueError(f"--sample must be in 0 to {task.size - 1}, got {sample}.")
            asked = next(task.load(sample, sample + 1))
    logging.disable_progress_bar()
    target = Path(output)
    with as_user_error():
        target.parent.mkdir(parents=True, exist_ok=True)
        loaded = load_model(model, dtype, device)
        inputs = dict(loaded.inputs([asked.question], [asked.image]))
    point = Point(model, "pocket", method, keep, tuple(sorted(options.items())))
    before = visual_tokens(loaded, inputs)[0]
    plain, _, _ = answer_batch(loaded, Point(model, "pocket", NONE, None), [asked], inputs, 0, max_new_tokens)
    said = _calibrate(loaded, point, asked, inputs)
    pruned, counts, kept = answer_batch(loaded, point, [asked], inputs, 0, max_new_tokens)

    console = Console()
    console.print(f"question  {asked.question}", highlight=False, markup=False)
    if asked.answer is not None:
        console.print(f"expected  {asked.answer}", highlight=False, markup=False)
    table = Table(box=None, pad_edge=False)
    for head in ("", "visual tokens", "answer"):
        table.add_column(head, justify="right" if head == "visual tokens" else "left")
    table.add_row("unpruned", str(before), escape(plain[0]))
    table.add_row(escape(method_of(point, 0).label), str(counts[0]), escape(pruned[0]))
    console.print(table)
    for line in said:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    draw_kept(seen_views(loaded, inputs, asked.visuals[0]), point, kept[0]).save(target, optimize=True)
    console.print(f"overlay   {target}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _calibrate(loaded: LoadedModel, point: Point, asked: Sample, inputs: dict[str, Any]) -> tuple[str, ...]:
    """Let interventions see prompts of the model's pocket suite before they act, as `tokenprune eval` does; a line each
    on what they then do to this prompt. () without interventions."""
    if point.method == NONE:
        return ()
    with applied(loaded.model, method_of(point, 0)) as handle:
        if not handle.interventions:
            return ()
        calibrate_interventions(loaded, load_task(default_task(loaded.name)), point, handle, 0)
        give_boxes(handle, point, [asked])
        with torch.inference_mode():
            loaded.model(**inputs, logits_to_keep=1)
        return handle.report().interventions
