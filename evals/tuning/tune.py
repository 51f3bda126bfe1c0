"""Finds a method's options offline: those under which the pruned model changes least at the last token of its prompts.

The objective is VFlowOpt's (arXiv 2508.05211): the cosine between the decoder's last hidden state (after its final
norm) at the last prompt token with and without pruning, averaged over unlabelled samples. A method declares what may
be searched (`Pruner.search_space`) and how a setting keeps to a budget (`Pruner.tuned`). The paper's search is a
Gaussian process with expected improvement; here it is Optuna's TPE after as many random trials as in the code, which
needs no scipy. A study lives in an SQLite file, and a killed one goes on where it was.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from tokenprune.evals.config.points import NONE, check_method_name
from tokenprune.evals.errors import UserError, as_user_error
from tokenprune.evals.io.atomic_files import replace_file, write_csv
from tokenprune.evals.io.digest import digest
from tokenprune.evals.io.outputs import check_folder
from tokenprune.evals.io.progress import show_progress, waiting
from tokenprune.evals.models.load import LoadedModel, check_dtype, load_model, model_source
from tokenprune.evals.tasks.unlabelled import SelectionRequest, check_data, draw_samples
from tokenprune.evals.tuning.numbers import finite
from tokenprune.registry import METHODS


@dataclass
class TuneConfig:
    """What to tune, and on what.

    Attributes:
        data: "pocket", "pocket-mixed" or a family ("pocket:FAMILY"): scenes of the suite's validation split, drawn
            on the fly; nothing of its test split is looked at. Or the YAML file of a task, or a folder of pictures with
            a `questions.jsonl`.
        budget: visual tokens averaged over the decoder's layers, as a kept fraction in (0, 1].
        options: fixed options of the method; what is fixed is not searched.
        samples: samples of the objective.
        held_out: samples, of other pictures, on which the result is checked.
        trials: settings that are tried in all, earlier runs of the study counted.
        random_trials: how many of them are drawn at random before the search learns.
        seed: of the samples drawn and of the search.
        output: folder of the study and its results; `runs/tune-METHOD-MODEL-BUDGET` by default.
    """

    method: str
    model: str
    data: str
    budget: float
    options: dict[str, Any] = field(default_factory=dict)
    samples: int = 30
    held_out: int = 30
    trials: int = 50
    random_trials: int = 27
    seed: int = 42
    batch_size: int = 6
    dtype: str = "float32"
    device: str | None = None
    output: str | None = None

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        stem = self.model.rstrip("/").rpartition("/")[2]
        return Path(self.output) if self.output else Path("runs") / f"tune-{self.method}-{stem}-{self.budget}"

    def check(self) -> None:
        """Refuse what would fail later; loads no model and no data.

        Raises:
            UnknownName, ValueError, FileNotFoundError: with a sentence on what to write instead.
        """
        if self.method == NONE:
            raise ValueError("The unpruned model has nothing to tune.")
        check_method_name(self.method)
        if isinstance(self.budget, bool) or not isinstance(self.budget, (int, float)) or not 0 < self.budget <= 1:
            raise ValueError(
                f"--budget is the mean over the decoder's layers as a kept fraction in (0, 1], got {self.budget!r}."
            )
        for name in ("samples", "held_out", "trials", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        check_folder(self.folder)
        check_dtype(self.dtype)
        model_source(self.model)
        check_data(self.data)
        if importlib.util.find_spec("optuna") is None:
            raise ValueError("tokenprune tune needs Optuna: pip install 'tokenprune-vlm[tune]'.")


class Discrepancy:
    """The objective on some samples. What the unpruned model says of them is computed once.

    Args:
        loaded: the model; nothing may be applied to it.
        samples: what it is asked.
        batch_size: prompts a forward pass.
    """

    def __init__(self, loaded: LoadedModel, samples: Sequence[SelectionRequest], batch_size: int) -> None:

        self._model, self._decoder = loaded.model, loaded.adapter.language_model
        groups = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
        self._batches = [loaded.inputs([s.question for s in g], [s.image for s in g]) for g in groups]
        self._plain = [self._last(batch) for batch in self._batches]

    def _last(self, batch: Mapping[str, Any]) -> Any:
        """`[B, D]` fp32: the last prompt token's final hidden state (rows are padded on the left)."""
        import torch

        states: list[Any] = []
        hook = self._decoder.register_forward_hook(
            lambda module, args, output: states.append(output.last_hidden_state[:, -1].float())
        )
        try:
            with torch.inference_mode():
                self._model(**batch, logits_to_keep=1)
        finally:
            hook.remove()
        return finite(states[0])

    def __call__(self, method: Mapping[str, Any]) -> tuple[list[float], float]:
        """Cosine of each sample, and the kept fraction of the visual tokens averaged over layers and samples.

        Raises:
            ValueError: the model cannot take this method.
        """
        from torch.nn.functional import cosine_similarity

        from tokenprune.api import applied

        values: list[float] = []
        kept, before = 0.0, 0
        with applied(self._model, method) as handle:
            for batch, plain in zip(self._batches, self._plain):
                values += cosine_similarity(self._last(batch).double(), plain.double(), dim=1).tolist()
                report = handle.report()
                kept += report.equivalent_tokens
                before += report.visual_tokens
        return values, kept / before


@dataclass(frozen=True)
class Check:
    """One method on the samples of the study and on held-out ones.

    Attributes:
        method: as `apply` takes it.
        tuned_on, held_out: mean cosine.
        held_out_each: by sample.
        retention: visual tokens kept, averaged over layers and held-out samples, as a fraction.
    """

    method: dict[str, Any]
    tuned_on: float
    held_out: float
    held_out_each: list[float]
    retention: float


@dataclass(frozen=True)
class Tuned:
    """What a study found.

    Attributes:
        best: the best trial's method.
        shipped: the method as it comes, at the same budget.
        trials: how many trials the study has.
        files: what was written; the first is the YAML that `apply` takes.
    """

    best: Check
    shipped: Check
    trials: int
    files: list[Path]


def _search_space(config: TuneConfig, depths: Any) -> dict[str, Any]:
    cls = METHODS.get(config.method)
    space = {name: part for name, part in cls.search_space(config.budget, depths).items() if name not in config.options}
    if not space:
        able = [name for name, cls in METHODS.loaded().items() if cls.search_space(config.budget, depths)]
        raise ValueError(
            f"{config.method} declares nothing to search{' beside --set' if config.options else ''}. Methods that do: "
            f"{', '.join(able)}. To tune another, write its search_space()."
        )
    return space


def _suggest(trial: Any, space: Mapping[str, Any]) -> dict[str, Any]:
    from tokenprune.interfaces.search_space import Choice

    values = {}
    for name, part in space.items():
        if isinstance(part, Choice):
            values[name] = trial.suggest_categorical(name, part.values)
        elif isinstance(part.low, int):
            values[name] = trial.suggest_int(name, part.low, int(part.high))
        else:
            values[name] = trial.suggest_float(name, part.low, part.high)
    return values


def _open_study(config: TuneConfig, space: Mapping[str, Any], made_of: Mapping[str, Any]) -> Any:
    """The study in the folder, new or as it was left, ready to go on."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = config.folder / "study.db"
    study = optuna.create_study(
        storage=f"sqlite:///{path}", study_name=config.method, direction="maximize", load_if_exists=True
    )
    before = study.user_attrs.get("made_of", made_of)
    for name, value in made_of.items():
        if before.get(name) != value:
            raise ValueError(
                f"The study {path} was made with {name} = {before.get(name)!r}, not {value!r}; give another --output."
            )
    study.set_user_attr("made_of", made_of)
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # a killed run left it
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    # another seed for each part, or a study that goes on would draw its first trials again
    seed = config.seed + len(study.trials)
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=config.random_trials, seed=seed)
    start = {name: part.start for name, part in space.items() if part.start is not None}
    if start:
        study.enqueue_trial(start, skip_if_exists=True)
    return study


def tune(config: TuneConfig, console: Console | None = None) -> Tuned:
    """Run the study to its number of trials, check its best on held-out samples, and write everything down.

    Raises:
        UserError: something that was asked for cannot be done.
    """
    from transformers.utils import logging

    console = console or Console()
    with as_user_error():
        config.check()
    import optuna

    from tokenprune.evals.evaluation.fingerprint import code_fingerprint

    logging.disable_progress_bar()
    cls = METHODS.get(config.method)
    with as_user_error(), waiting(console, f"Loading {config.model} and the samples"):
        loaded = load_model(config.model, config.dtype, config.device)
        depths = loaded.adapter.depths
        space = _search_space(config, depths)
        fixed = {**_known_to_processor(cls, loaded.processor), **config.options}
        first, others = draw_samples(config.data, config.samples, config.held_out, config.seed)

    def method_of(values: Mapping[str, Any]) -> dict[str, Any] | None:
        # the budget is solved with what is fixed as well
        return cls.tuned({**fixed, **values}, config.budget, depths)

    start = {name: part.start for name, part in space.items()}
    shipped = None if any(value is None for value in start.values()) else method_of(start)
    shipped = shipped or {"method": config.method, "keep": f"avg{config.budget}", **fixed}
    made_of = {
        "model": loaded.fingerprint, "code": code_fingerprint(), "dtype": config.dtype, "budget": config.budget,
        "options": json.loads(json.dumps(fixed)), "samples": digest([[s.sample_id, s.question] for s in first]),
    }  # fmt: skip
    config.folder.mkdir(parents=True, exist_ok=True)
    with as_user_error(), waiting(console, "Reading what the unpruned model says"):
        study = _open_study(config, space, made_of)
        objective = Discrepancy(loaded, first, config.batch_size)
        objective(shipped)  # a method that this model cannot take is refused here
    begin = time.perf_counter()

    def score(trial: Any) -> float:
        method = method_of(_suggest(trial, space))
        if method is None:
            raise optuna.TrialPruned
        try:
            values, retention = objective(method)
        except ValueError as error:  # this setting cannot keep to the budget
            trial.set_user_attr("refused", str(error))
            raise optuna.TrialPruned from error
        trial.set_user_attr("method", json.dumps(method))
        trial.set_user_attr("retention", retention)
        return sum(values) / len(values)

    done = [trial for trial in study.trials if trial.state.is_finished() and trial.state.name != "FAIL"]
    left = max(config.trials - len(done), 0)
    with show_progress(console) as progress:
        bar = progress.add_task(config.method, total=config.trials, completed=len(done))

        def on_trial(study: Any, trial: Any) -> None:
            finished = [t.value for t in study.trials if t.value is not None]
            best = f", best {max(finished):.4f}" if finished else ""
            progress.update(bar, advance=1, description=f"{config.method}{best}")

        study.optimize(score, n_trials=left, callbacks=[on_trial])
    if not any(trial.value is not None for trial in study.trials):
        raise UserError(f"No trial of {config.method} could hold a mean of {config.budget} of the visual tokens.")
    with waiting(console, "Reading what the unpruned model says of the held-out samples"):
        held_out = Discrepancy(loaded, others, config.batch_size)

    def check(method: dict[str, Any]) -> Check:
        tuned_on, _ = objective(method)
        each, retention = held_out(method)
        return Check(method, sum(tuned_on) / len(tuned_on), sum(each) / len(each), each, retention)

    with waiting(console, "Checking the best setting and the shipped one on the held-out samples"):
        best, as_shipped = check(json.loads(study.best_trial.user_attrs["method"])), check(shipped)
    return _write(config, study, best, as_shipped, time.perf_counter() - begin)


def _known_to_processor(cls: Any, processor: Any) -> dict[str, Any]:
    """Options of the method that the image processor knows."""
    images = getattr(processor, "image_processor", None)
    normalisation = {option: getattr(images, name, None) for option, name in cls.processor_options.items()}
    return {option: list(value) for option, value in normalisation.items() if value is not None}


def _write(config: TuneConfig, study: Any, best: Check, shipped: Check, seconds: float) -> Tuned:
    import yaml

    folder = config.folder
    number = len(study.trials)
    options = "".join(f" --set {name}={value}" for name, value in config.options.items())
    lines = [
        f"{config.method} tuned for {config.model} at a mean retention of {config.budget}.",
        f"tokenprune tune {config.method} --model {config.model} --data {config.data} --budget {config.budget} "
        f"--samples {config.samples} --held-out {config.held_out} --trials {config.trials} --seed {config.seed}"
        f"{options}",
        f"Cosine of the last token, tuned / shipped: {best.tuned_on:.5f} / {shipped.tuned_on:.5f} on its "
        f"{config.samples} samples, {best.held_out:.5f} / {shipped.held_out:.5f} on {config.held_out} held-out ones.",
    ]
    text = "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(best.method, sort_keys=False)
    tuned = replace_file(folder / f"{config.method}.yaml", text)
    record = {"config": asdict(config), "trials": number, "seconds_of_this_run": round(seconds, 1)}
    record |= {"made_of": study.user_attrs["made_of"], "best": asdict(best), "shipped": asdict(shipped)}
    result = replace_file(folder / "result.json", json.dumps(record, indent=1) + "\n")
    names = sorted({name for trial in study.trials for name in trial.params})
    rows = []
    for trial in study.trials:
        values = {"objective": trial.value, "retention": trial.user_attrs.get("retention"), **trial.params}
        short = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values.items()}
        rows.append({"trial": trial.number, "state": trial.state.name.lower(), **short})
    trials = write_csv(folder / "trials.csv", rows, ["trial", "state", "objective", "retention", *names])
    return Tuned(best, shipped, number, [tuned, result, trials, folder / "study.db"])
