"""What to run: a grid of models, tasks, methods and budgets, from YAML or the CLI, checked before anything runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenprune.budget import read_budget
from tokenprune.evals.models import check_dtype, model_source
from tokenprune.evals.tasks import check_task
from tokenprune.notation import pruner_parts, split_name, split_outside
from tokenprune.registry import INTERVENTIONS, METHODS, UnknownName, near

NONE = "none"
"""The method name of the unpruned model."""


class Refused(Exception):
    """What was asked for cannot be run; the message is a sentence for whoever asked."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turn errors of the checks before the work into `Refused`; an error during the work keeps its traceback."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
        raise Refused(str(error)) from error


@dataclass(frozen=True)
class Point:
    """One model x task x method x budget.

    Attributes:
        method: a name, or several parts as written on one line ("vtc_cls+var"), the budget taken out.
        keep: visual tokens kept of each image (int), or the kept fraction (float), or their mean over the decoder's
            layers ("avg64"); None for the unpruned model, and where nothing prunes or all parts have their own budget.
        options: the method's options that were set, as a sorted tuple of pairs.
        reference: run only so that others can be compared with it.
    """

    model: str
    task: str
    method: str
    keep: int | float | str | None
    options: tuple[tuple[str, Any], ...] = ()
    reference: bool = False

    @property
    def label(self) -> str:
        """`holov@64`, `holov(variant=official)@64`, `none`."""
        return self.series if self.keep is None else f"{self.series}@{self.keep}"

    @property
    def series(self) -> str:
        """The label without its budget: what a line in a plot is called."""
        options = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{self.method}({options})" if options else self.method

    @property
    def key(self) -> str:
        """Unique within a run folder."""
        return f"{self.model}|{self.task}|{self.label}"


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
            method, options, budgets = _read_method(entry, self.keep)
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
        entries = [_read_method(entry, self.keep) for entry in self.methods]
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


def check_method_name(method: str) -> None:
    """Raise UnknownName if a part of `method` is neither registered nor `none`; imports nothing heavy."""
    parts = split_outside(method, "+")
    known = [*METHODS.names(), *INTERVENTIONS.names()] + [NONE] * (len(parts) == 1)
    for part in parts:
        name = split_name(part)[0]
        if name not in known:
            raise UnknownName(
                f"There is no method called {name!r}.{near(name, known)} Known: {', '.join(sorted(known))}."
            )


def needs_budget(method: str) -> bool:
    """Whether `method`, as written, prunes and does not say itself how many tokens it keeps."""
    return method != NONE and any(split_name(part)[2] is None for part in pruner_parts(method))


def _positive(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")


def method_of_file(path: str) -> Mapping[str, Any]:
    """The mapping with the key 'method' in a YAML file, as `tokenprune tune` writes it.

    Raises:
        FileNotFoundError, ValueError: no such file, or it holds none.
    """
    import yaml

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no method file {path}.")
    loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(loaded, Mapping) or not isinstance(loaded.get("method"), str):
        raise ValueError(f"{path} must hold a mapping whose key 'method' names one method.")
    return loaded


def _read_method(entry: Any, budgets: list[Any]) -> tuple[str, tuple[tuple[str, Any], ...], list[Any]]:
    """Name, options and budgets of an entry; the budgets are [None] where nothing is left to be said."""
    if isinstance(entry, str) and entry.endswith((".yaml", ".yml")):
        entry = method_of_file(entry)
    if isinstance(entry, str):
        entry = {"method": entry}
    if not isinstance(entry, Mapping) or "method" not in entry:
        raise ValueError(f"An entry of methods is a name or a mapping with the key 'method', got {entry!r}.")
    rest = dict(entry)
    name, own = str(rest.pop("method")), rest.pop("keep", None)
    pruners = pruner_parts(name)
    if len(pruners) == 1 and pruners[0] == name:
        name, written, budget = split_name(name)
        rest = {**written, **rest}
        own = _one_budget(name, own, budget)
    elif len(pruners) == 1:  # the one budget beside interventions is the point's
        head, at, budget = pruners[0].rpartition("@")
        if at:
            own = _one_budget(head, own, budget)
            name = "+".join(head if part == pruners[0] else part for part in split_outside(name, "+"))
    elif own is None:
        own = [None]
    own = budgets if own is None else own
    return name, tuple(sorted(rest.items())), own if isinstance(own, list) else [own]


def _one_budget(name: str, own: Any, written: str | None) -> Any:
    if own is not None and written is not None:
        raise ValueError(f"Two budgets were given for {name!r}, @{written} and keep: {own}; give one.")
    return own if written is None else read_budget(written)


def _build(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be a mapping, got {data!r}.")
    known = [item.name for item in dataclasses.fields(cls)]
    for key in data:
        if key not in known:
            raise ValueError(f"{where} has an unknown key {key!r}.{near(str(key), known)} Known: {', '.join(known)}.")
    missing = [
        item.name
        for item in dataclasses.fields(cls)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING and item.name not in data
    ]
    if missing:
        raise ValueError(f"{where} lacks the key {missing[0]!r}.")
    return cls(**data)


def read_config(path: str | Path, **overrides: Any) -> RunConfig:
    """Read and check a sweep file.

    Args:
        path: a YAML file, or the name of a packaged one (`demo`, `configs/demo.yaml`).
        overrides: win over the file; None means "not given".

    Raises:
        ValueError: an unknown key (with near matches), a missing one, or a value that cannot work.
    """
    import yaml

    file = find_config(path)
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(data, Mapping):
        raise ValueError(f"{file} must hold a mapping of settings, got {type(data).__name__}.")
    data = {"name": file.stem, **data, **{key: value for key, value in overrides.items() if value is not None}}
    for key, cls in (("measure", Measure), ("overlays", Overlays)):
        if key in data and not isinstance(data[key], cls):
            data[key] = _build(cls, data[key], f"{key} in {file.name}")
    for key in ("tasks", "methods", "keep"):
        if key in data and not isinstance(data[key], list):
            data[key] = [data[key]]
    config = _build(RunConfig, data, file.name)
    config.check()
    return config


def packaged_configs() -> dict[str, Path]:
    """Sweep files that ship with the package, by name."""
    import tokenprune

    folders = [Path(folder) / "configs" for folder in tokenprune.__path__]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def find_config(path: str | Path) -> Path:
    """The sweep file at `path`, or the packaged one of that name.

    Raises:
        FileNotFoundError: neither is there; near matches are named.
    """
    if Path(path).is_file():
        return Path(path)
    packaged = packaged_configs()
    stem = Path(path).stem
    if str(path) in (stem, f"configs/{stem}.yaml") and stem in packaged:
        return packaged[stem]
    raise FileNotFoundError(
        f"There is no sweep file {path}.{near(stem, list(packaged))} Packaged: {', '.join(packaged)}."
    )


def digest(data: Any) -> str:
    """A short digest of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]
