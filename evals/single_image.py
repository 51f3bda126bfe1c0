"""One picture, one question: what the model says with and without pruning, and where the kept tokens are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenprune import cost
from tokenprune.evals.config.points import NONE
from tokenprune.evals.errors import as_user_error
from tokenprune.evals.io.picture_reader import read_picture
from tokenprune.evals.models.load import LoadedModel, load_model
from tokenprune.evals.one_prompt.ask import Outcome, ask, make_ready
from tokenprune.evals.one_prompt.picture import Panel, sheet
from tokenprune.evals.one_prompt.samples import frames_note, own_picture_note, suite_sample
from tokenprune.evals.report.overlay import draw_places, seen_views
from tokenprune.evals.tasks.load import default_task, load_task
from tokenprune.evals.tasks.task import Sample
from tokenprune.plan.parse import Spec, parse_method


def run_single(
    model: str,
    method: str,
    keep: int | float | str | None,
    options: dict[str, Any],
    image: str | None,
    question: str | None,
    sample: int | None,
    output: str,
    dtype: str = "float32",
    device: str | None = None,
    max_new_tokens: int = 32,
) -> int:
    """Answer, print both answers, what they cost and what interventions did, write the overlay. Names were checked by
    the caller.

    Args:
        method: as `parse_method` takes it, or "none".
        image: path of a picture; None takes sample number `sample` of the model's pocket suite, with its question.
        sample: None takes a sign, which pruning can make unreadable.

    Raises:
        UserError: no such picture or sample, a method that needs hints which a picture of one's own does not have, or
            that cannot work on the model.
    """
    from transformers.utils import logging

    console = Console()
    with as_user_error():
        spec = None if method == NONE else parse_method(method, keep, **options)
        asked = _asked(model, spec, image, question, sample)
        said = [] if image is None else [frames_note(Path(image), Path(image).name), own_picture_note(model)]
    for line in filter(None, said):
        _print(console, f"note      {line}")
    logging.disable_progress_bar()
    target = Path(output)
    with as_user_error():
        target.parent.mkdir(parents=True, exist_ok=True)
        loaded = load_model(model, dtype, device)
        inputs = dict(loaded.inputs([asked.question], [asked.image]))
        prepared = None if spec is None else make_ready(loaded, spec, load_task(default_task(model)))
    name = Path(method).name if method.endswith((".yaml", ".yml")) else None
    outcomes = {"unpruned": ask(loaded, None, asked, inputs, max_new_tokens)}
    if prepared is not None:
        outcomes[name or prepared.label] = ask(loaded, prepared, asked, inputs, max_new_tokens)
    _print(console, f"question  {asked.question}")
    if asked.answer is not None:
        _print(console, f"expected  {asked.answer}")
    console.print(costs_table(outcomes))
    for line in dict.fromkeys(note for outcome in outcomes.values() for note in outcome.notes):
        _print(console, line)
    overlay(loaded, asked, inputs, outcomes).save(target, optimize=True)
    _print(console, f"overlay   {target}")
    return 0


def _asked(model: str, spec: Spec | None, image: str | None, question: str | None, sample: int | None) -> Sample:
    if image is None:
        return suite_sample(model, sample)[1]
    if not os.path.isfile(image):
        raise FileNotFoundError(f"There is no picture {image}.")
    for entry in () if spec is None else spec.entries:
        if "boxes" in entry.pruner.hints:
            raise ValueError(f"{entry.pruner.name} needs boxes that suffice for the answer; leave --image out.")
    return Sample("picture", "all", str(question), None, read_picture(image))


def costs_table(outcomes: dict[str, Outcome]) -> Table:
    """Answers, tokens, FLOPs, KV bytes and times; a column each."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in outcomes:
        table.add_column(escape(name), justify="right", overflow="fold")
    first = next(iter(outcomes.values()))
    rows: list[tuple[str, Any, Any]] = [
        ("visual tokens, last layer", lambda one: one.kept, str),
        ("FLOPs to the first token", lambda one: one.flops, lambda value: f"{cost_text(value)}FLOP"),
        ("KV cache of the prompt", lambda one: one.kv_bytes, lambda value: f"{cost_text(value)}B"),
        ("first token after", lambda one: one.first_token, seconds_text),
        ("whole answer after", lambda one: one.seconds, seconds_text),
    ]
    if any(one.average != one.kept for one in outcomes.values()):
        rows.insert(1, ("visual tokens, mean of layers", lambda one: one.average, lambda value: f"{value:.4g}"))
    table.add_row("answer", *(escape(one.answer) for one in outcomes.values()))
    for title, value_of, written in rows:
        cells = []
        for one in outcomes.values():
            value, whole = value_of(one), value_of(first)
            share = None if one is first else cost.share(value, whole)
            text = cost.NOT_MODELLED if value is None else written(value)
            cells.append(text if share is None else f"{text} ({share:.0%})")
        table.add_row(title, *cells)
    return table


def overlay(loaded: LoadedModel, asked: Sample, inputs: dict[str, Any], outcomes: dict[str, Outcome]) -> Any:
    """The picture as the model saw it and, beside it, what was kept, each with its answer."""
    views = seen_views(loaded, inputs, asked.visuals[0])
    panels = []
    for name, one in outcomes.items():
        title = f"{one.visual} visual tokens" if one is outcomes.get("unpruned") else f"{one.kept} of {one.visual} kept"
        panels.append(Panel(f"{name}: {title}", draw_places(views, one.places, one.shrinks), f"answer: {one.answer}"))
    expected = "" if asked.answer is None else f" (expected: {asked.answer})"
    return sheet(f"{asked.question}{expected}", panels)


def cost_text(value: float) -> str:
    """A number with the prefix of its unit: 8.53 G."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 or unit == "T":
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g}"


def seconds_text(value: float) -> str:
    """Seconds, or milliseconds of what is shorter."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)
