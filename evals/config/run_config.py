"""The settings of a run, checked before anything runs.

By hand, and not by pydantic. That was tried on these dataclasses (the sentences held by the tests all stood) and on the
task file. It finds every value of a wrong type, in words of its own ("Input should be greater than or equal to 1"); to
say what is said here, near matches included, took 52 lines more, most of them a table of its kinds of errors. To import
it and build a schema takes 0.25 s before the first typo is answered. Whether a method, a budget or a task can work is
for our code in any case.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tokenprune.evals.config.engines import TRANSFORMERS, VLLM, check_engine
from tokenprune.evals.config.grid import Listed, expand, read_point
from tokenprune.evals.config.measure import Measure, Overlays
from tokenprune.evals.config.points import NONE, MethodEntry, Point, check_method_name, compile_method, read_entry
from tokenprune.evals.config.targets import Target
from tokenprune.evals.models.load import check_dtype, model_source
from tokenprune.evals.tasks.load import check_task

ALIASES = {"listed": "points"}
"""Keys of a sweep file that are named otherwise in `RunConfig`."""


@dataclass
class RunConfig:
    """A run: everything in its folder follows from this and the code.

    Attributes:
        name: of the run; its folder is `runs/NAME` unless `output` says otherwise.
        model: pocket name, folder or hub id, or a list of them.
        tasks: task names or task files.
        methods: names, several joined by plus signs ("vtc_cls+var"), or mappings with `method`, optionally `keep`
            (its own budgets), `grid` (lists of values by option), `as` (its name in tables and plots) and the method's
            options, or the paths of YAML files with such a mapping, which are named by their files.
        keep: budgets: ints are tokens per image, floats are kept fractions.
        limit: samples per task, None for all.
        seed: of methods that draw, and of the bootstrap.
        batch_size: prompts generated together, see `prompts_together`; does not change what is measured.
        dtype: float32, bfloat16 or float16.
        device: torch device; None takes a GPU where there is one.
        max_new_tokens: length of an answer; None leaves it to the task.
        share_tower: compute the vision tower once per image for all methods that cut after it. Changes no answer, and
            times and FLOPs are measured without it.
        references: also run the unpruned model and `random` at every budget, if they are not among the methods.
        output: folder to write to.
        measure: see `Measure`.
        overlays: see `Overlays`.
        seeds: each method that draws is run once with each of these, in place of `seed`.
        listed: points beside the grid, or in its place, see `grid.read_point`. In a sweep file the key is `points`.
        targets: published numbers to compare with, see `parity`.
        engine: who answers: "transformers", or "vllm" (`evaluation.vllm_engine`).
        engine_options: arguments of `vllm.LLM`, such as `max_model_len`.
    """

    name: str
    model: str | list[str]
    tasks: list[str]
    methods: list[Any]
    keep: list[Any] = field(default_factory=list)
    limit: int | None = None
    seed: int = 0
    batch_size: int | None = None
    dtype: str = "float32"
    device: str | None = None
    max_new_tokens: int | None = None
    share_tower: bool = True
    references: bool = True
    output: str | None = None
    measure: Measure = field(default_factory=Measure)
    overlays: Overlays = field(default_factory=Overlays)
    seeds: list[int] = field(default_factory=list)
    listed: list[Any] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    engine: str = TRANSFORMERS
    engine_options: dict[str, Any] = field(default_factory=dict)

    @property
    def prompts_together(self) -> int:
        """How many prompts an engine is given at once: 8, and 256 of vLLM, which deals them out itself, where the
        settings do not say."""
        return self.batch_size or (256 if self.engine == VLLM else 8)

    @property
    def folder(self) -> Path:
        """Where results go."""
        return Path(self.output) if self.output else Path("runs") / self.name

    @property
    def models(self) -> list[str]:
        """Every model of the run, each once."""
        return list(dict.fromkeys([*self._own_models, *(model for one in self._listed() for model in one.models)]))

    @property
    def all_tasks(self) -> list[str]:
        """Every task of the run, each once: `tasks`, and those that only `listed` names."""
        return list(dict.fromkeys([*self.tasks, *(task for one in self._listed() for task in one.tasks)]))

    @property
    def _own_models(self) -> list[str]:
        return [self.model] if isinstance(self.model, str) else list(self.model)

    def _listed(self) -> list[Listed]:
        return [read_point(number, one, self._own_models, self.tasks) for number, one in enumerate(self.listed)]

    def _entries(self) -> list[MethodEntry]:
        return [one for entry in self.methods for one in read_entry(entry, self.keep)]

    def points(self) -> list[Point]:
        """The grid and the list, see `grid.expand`."""
        return expand(self._own_models, self.tasks, self._entries(), self._listed(), self.seeds, self.references)

    def check(self) -> None:
        """Refuse every name, option and number that would fail later. Imports the methods, loads no model or data. The
        same settings are checked once, however many hands they pass through.

        Raises:
            UnknownName, TypeError, ValueError, FileNotFoundError: with a sentence on what to write instead.
        """
        settings = repr(self.as_dict())
        if settings != vars(self).get("_checked"):
            self._check()
            vars(self)["_checked"] = settings

    def _check(self) -> None:
        for name, value in (("name", self.name), ("device", self.device), ("output", self.output)):
            if not isinstance(value, str) and (value is not None or name == "name"):
                raise ValueError(f"{name} must be a text, got {value!r}.")
        _check_name(self.name)
        for name, value in (("model", self.model), ("tasks", self.tasks)):
            for one in value if isinstance(value, list) else [value]:
                if not isinstance(one, str):
                    raise ValueError(f"{name} must be a text, or a list of texts, got {value!r}.")
        if not isinstance(self.listed, list):
            raise ValueError(f"points must be a list of mappings, got {self.listed!r}.")
        for name in ("model", "tasks", "methods"):
            if not getattr(self, name) and (self.methods or not self.listed):
                raise ValueError(f"{name} must name at least one entry, got {getattr(self, name)!r}.")
        for name in ("batch_size", "limit", "max_new_tokens"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        for name in ("samples", "repeats"):
            _positive(f"measure.{name}", getattr(self.measure, name))
        for name in ("warmup", "decode_tokens"):
            _positive(f"measure.{name}", getattr(self.measure, name), least=0)
        _positive("overlays.samples", self.overlays.samples, least=0)
        switches = {"references": self.references, "share_tower": self.share_tower}
        switches |= {"measure.times": self.measure.times, "measure.flops": self.measure.flops}
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r}.")
        check_seed(self.seed)
        _check_seeds(self.seeds)
        check_dtype(self.dtype)
        check_engine(self.engine, self.engine_options, self.device)
        for model in self.models:
            model_source(model)
        for task in self.all_tasks:
            check_task(task)
        # names and budgets first: they need no import of torch, so a typo is answered at once
        entries = [*self._entries(), *(one.entry for one in self._listed())]
        for one in entries:
            check_method_name(one.method)
            if one.method == NONE and one.options:
                raise ValueError(f"The unpruned model has no options, got {dict(one.options)}.")
            if one.method != NONE and not one.keeps:
                raise ValueError(f"Say how many visual tokens {one.method!r} keeps: keep: [192, 128, 64].")
        for one in entries:
            one.check_keys()
            for keep in one.keeps if one.method != NONE else ():
                compile_method(one.method, keep, one.options)
        budgets = list(dict.fromkeys(point.keep for point in self.points() if point.keep is not None))
        if self.overlays.keep is not None and self.overlays.keep not in budgets:
            there = ", ".join(map(str, budgets)) or "no budget"
            raise ValueError(f"overlays.keep must be a budget of the run, got {self.overlays.keep!r}; it has {there}.")
        for target in self.targets:
            if target.task not in self.all_tasks:
                check_task(target.task)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for result files; a sweep file of the same run may hold it."""
        data = dataclasses.asdict(self)
        return {ALIASES.get(key, key): value for key, value in data.items()}


def _check_name(name: str) -> None:
    """Raise ValueError unless `runs/NAME` is a folder below `runs`."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or ".." in parts or parts[0] == "/" or ":" in parts[0] or not name.isprintable():
        raise ValueError(
            f"name is the run's folder below runs/, so it cannot lead out of there, got {name!r}; where results go is "
            "said with output."
        )


def _positive(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")


def check_seed(seed: Any) -> None:
    """Raise ValueError unless every generator of random numbers takes this seed."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to {2**32 - 1}, got {seed!r}.")


def _check_seeds(seeds: Any) -> None:
    whole = isinstance(seeds, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    if not whole or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be a list of integers, each once, got {seeds!r}.")
    for seed in seeds:
        check_seed(seed)
