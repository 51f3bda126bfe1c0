"""What `tokenprune recommend` is asked, checked before anything is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenprune.evals.io.outputs import check_folder
from tokenprune.evals.models.load import check_dtype, model_source
from tokenprune.evals.tasks.load import check_task
from tokenprune.interfaces.budget import Budget
from tokenprune.registry import METHODS, UnknownName, near

COSTS = {
    "flops": "FLOPs to the first token",
    "kv": "bytes of the prompt's KV cache",
    "latency": "seconds to the first token",
}
"""What a setting can be cheap in."""
SHARES = (1 / 2, 1 / 3, 2 / 9, 1 / 6, 1 / 9, 1 / 18)
"""Budgets that are tried by default, as fractions of an image's visual tokens."""


@dataclass
class RecommendConfig:
    """Which setting is looked for, and on what.

    Attributes:
        model: pocket name, folder or hub id.
        data: the name of a task, or its YAML file.
        max_drop: largest drop in accuracy against the unpruned model, as a fraction in [0, 1): 0.01 is one point.
        cost: a key of `COSTS`, taken as a share of the unpruned model's.
        methods: names of methods; None means all that run on the model and need no hints.
        budgets: tokens per image (int) or kept fractions (float); None means `SHARES`.
        limit: the first samples of the task; None means all.
        seed: of the halves, of methods that draw, of `trials` and of the bootstrap.
        trials: settings that are tried, drawn at random from all; None means all.
        minutes: no new round of the search begins later than this; the held-out half comes on top.
        finalists: most settings that are tested on the held-out half.
        output: folder; `runs/recommend-MODEL-DATA` by default.
    """

    model: str
    data: str
    max_drop: float
    cost: str = "flops"
    methods: Sequence[str] | None = None
    budgets: Sequence[int | float] | None = None
    limit: int | None = None
    seed: int = 0
    trials: int | None = None
    minutes: float | None = None
    finalists: int = 3
    batch_size: int = 14
    dtype: str = "float32"
    device: str | None = None
    output: str | None = None

    @property
    def folder(self) -> Path:
        """Where answers and costs go, which every bound and kind of cost shares."""
        stem = self.model.rstrip("/").rpartition("/")[2]
        return Path(self.output) if self.output else Path("runs") / f"recommend-{stem}-{Path(self.data).stem}"

    @property
    def results(self) -> Path:
        """Where the study and the recommendation of this bound and this kind of cost go."""
        return self.folder / f"{self.cost}-drop{self.max_drop:g}"

    def check(self) -> None:
        """Refuse what would fail later; loads no model and no data.

        Raises:
            UnknownName, ValueError, FileNotFoundError: with a sentence on what to write instead.
        """
        if not 0 <= self.max_drop < 1:
            raise ValueError(
                f"--max-drop is a fraction in [0, 1), 0.01 for one point of accuracy; got {self.max_drop!r}."
            )
        if self.cost not in COSTS:
            raise UnknownName(
                f"There is no cost called {self.cost!r}.{near(self.cost, list(COSTS))} Known: {', '.join(COSTS)}."
            )
        for method in self.methods or ():
            if method not in METHODS.names():
                raise UnknownName(
                    f"There is no method called {method!r}.{near(method, METHODS.names())} "
                    f"Known: {', '.join(METHODS.names())}."
                )
        for name in ("methods", "budgets"):
            given = getattr(self, name)
            if given is not None and (not given or len(set(given)) < len(given)):
                raise ValueError(f"--{name} must name at least one, and none twice; got {list(given)!r}.")
        for budget in self.budgets or ():
            Budget(budget)
        for name in ("limit", "trials", "minutes", "finalists", "batch_size"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {value}.")
        check_folder(self.folder)
        check_dtype(self.dtype)
        model_source(self.model)
        check_task(self.data)
        if importlib.util.find_spec("optuna") is None:
            raise ValueError("tokenprune recommend needs Optuna: pip install 'tokenprune-vlm[tune]'.")
