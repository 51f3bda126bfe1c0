"""The settings of a run, checked before anything runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenprune.evals.models import check_dtype, model_source
from tokenprune.evals.points import NONE, Point, check_method_name, read_entry
from tokenprune.evals.tasks import check_task


class Refused(Exception):
    """What was asked for cannot be run; the message is a sentence for whoever asked."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turn errors of the checks before the work into `Refused`; an error during the work keeps its traceback."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise Refused(str(error)) from error


@dataclass
class Measure:
    """How times and FLOPs are measured, on the first samples of a task, one at a time.

    Attributes:
        samples: prompts to measure on.
        repeats: timed rounds per prompt; a round runs unpruned, pruned and ideal once each.
        warmup: rounds before that, not counted.
        decode_tokens: generated tokens per prompt from which the time per token is taken; 0 skips it.
        times: whether to measure times.
        flops: whether to count FLOPs with FlopCounterMode, beside the analytic count.
    """

    samples: int = 2
    repeats: int = 5
    warmup: int = 1
    decode_tokens: int = 8
    times: bool = True
    flops: bool = True


@dataclass
class Overlays:
    """Pictures of kept tokens.

    Attributes:
        samples: how many samples of a task get one, spread over its families; 0 means no pictures.
        keep: the budget that is drawn; None draws the smallest of the run.
    """

    samples: int = 3
    keep: int | float | None = None


@dataclass
class RunConfig:
    """A run: everything in its folder follows from this and the code.

    Attributes:
        name: of the run; its folder is `runs/NAME` unless `output` says otherwise.
        model: pocket name, folder or hub id, or a list of them.
        tasks: task names or task files.
        methods: names, several joined by plus signs ("vtc_cls+var"), or mappings with `method`, optionally `keep`
            (its own budgets) and the method's options, or the paths of YAML files with such a mapping.
        keep: budgets: ints are tokens per image, floats are kept fractions.
        limit: samples per task, None for all.
        seed: of methods that draw, and of the bootstrap.
        batch_size: prompts generated together; does not change what is measured.
        dtype: float32, bfloat16 or float16.
        device: torch device; None takes a GPU where there is one.
        max_new_tokens: length of an answer; None leaves it to the task.
        share_tower: compute the vision tower once per image for all methods that cut after it. Changes no answer, and
            times and FLOPs are measured without it.
        references: also run the unpruned model and `random` at every budget, if they are not among the methods.
        output: folder to write to.
        measure: see `Measure`.
        overlays: see `Overlays`.
    """

    name: str
    model: str | list[str]
    tasks: list[str]
    methods: list[Any]
    keep: list[Any] = field(default_factory=list)
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    dtype: str = "float32"
    device: str | None = None
    max_new_tokens: int | None = None
    share_tower: bool = True
    references: bool = True
    output: str | None = None
    measure: Measure = field(default_factory=Measure)
    overlays: Overlays = field(default_factory=Overlays)

    @property
    def folder(self) -> Path:
        """Where results go."""
        return Path(self.output) if self.output else Path("runs") / self.name

    @property
    def models(self) -> list[str]:
        """`model` as a list."""
        return [self.model] if isinstance(self.model, str) else list(self.model)

    def points(self) -> list[Point]:
        """The grid, unpruned first, then random, then the methods as they are listed; no point twice."""
        grid: list[Point] = []
        for model in self.models:
            for task in self.tasks:
                grid += self._points(model, task)
        return grid

    def _points(self, model: str, task: str) -> list[Point]:
        asked: list[Point] = []
        for entry in self.methods:
            method, options, budgets = read_entry(entry, self.keep)
            if method == NONE:
                asked.append(Point(model, task, NONE, None))
            else:
                asked += [Point(model, task, method, keep, options) for keep in budgets]
        points: dict[str, Point] = {}
        if self.references and any(point.method != NONE for point in asked):
            budgets = dict.fromkeys(point.keep for point in asked if point.keep is not None)
            references = [Point(model, task, NONE, None, reference=True)]
            references += [Point(model, task, "random", keep, reference=True) for keep in budgets]
            points = {point.key: point for point in references}
        # an asked point takes the place of its reference, so the order stays: what is compared with comes first
        points.update({point.key: point for point in asked})
        return list(points.values())

    def check(self) -> None:
        """Refuse every name, option and number that would fail later. Imports the methods, loads no model or data.

        Raises:
            UnknownName, TypeError, ValueError, FileNotFoundError: with a sentence on what to write instead.
        """
        for name in ("model", "tasks", "methods"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one entry, got {getattr(self, name)!r}.")
        for name in ("batch_size",):
            _positive(name, getattr(self, name))
        for name in ("limit", "max_new_tokens"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        for name in ("samples", "repeats"):
            _positive(f"measure.{name}", getattr(self.measure, name))
        for name in ("warmup", "decode_tokens"):
            _positive(f"measure.{name}", getattr(self.measure, name), least=0)
        _positive("overlays.samples", self.overlays.samples, least=0)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, got {self.seed!r}.")
        check_dtype(self.dtype)
        for model in self.models:
            model_source(model)
        for task in self.tasks:
            check_task(task)
        # names and budgets first: they need no import of torch, so a typo is answered at once
        entries = [read_entry(entry, self.keep) for entry in self.methods]
        for method, options, budgets in entries:
            check_method_name(method)
            if method == NONE and options:
                raise ValueError(f"The unpruned model has no options, got {dict(options)}.")
            if method != NONE and not budgets:
                raise ValueError(f"Say how many visual tokens {method!r} keeps: keep: [192, 128, 64].")
        from tokenprune.spec import parse_method

        for method, options, budgets in entries:
            for keep in budgets if method != NONE else ():
                parse_method(method, keep, **dict(options))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for result files."""
        return dataclasses.asdict(self)


def _positive(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")


def digest(data: Any) -> str:
    """A short digest of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]
