"""What a sweep would do, without doing it: points, samples, what is done already, estimated FLOPs, what each needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from tokenprune.cost import NOT_MODELLED
from tokenprune.evals.config.engines import VLLM
from tokenprune.evals.config.points import NONE, Point
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.models.load import LoadedModel, model_source
from tokenprune.evals.tasks.load import count_samples, display_name, task_fingerprint, task_needs

if TYPE_CHECKING:
    from tokenprune.evals.profiling.estimate import Estimate, Outline

_HEADS = ("point", "cuts at", "samples", "done", "GFLOPs a prompt", "of unpruned %", "TFLOPs in all", "needs")


@dataclass(frozen=True)
class Planned:
    """One point of a plan.

    Attributes:
        samples: how many it answers; None where only the data would tell.
        done: how many of them the run folder has already.
        estimate: of one prompt; None where there is none.
        refused: why the point cannot run on its model; None where it can, or where that is not known.
        needs: what it needs in addition to the model's weights.
    """

    point: Point
    samples: int | None
    done: int
    estimate: Estimate | None
    refused: str | None
    needs: tuple[str, ...]

    @property
    def cuts(self) -> str:
        """The sites of its stages; many in the tower are shortened to the first and the last."""
        if self.estimate is None:
            return ""
        sites = [stage.site for stage in self.estimate.stages]
        return ", ".join(sites) if len(sites) <= 3 else f"{sites[0]} .. {sites[-1]} ({len(sites)})"

    @property
    def flops(self) -> float | None:
        """FLOPs to the first token of all its samples; None where a part is not modelled."""
        total = None if self.estimate is None else self.estimate.flops.total
        return None if total is None or self.samples is None else float(self.samples * total)


@dataclass(frozen=True)
class Plan:
    """A sweep, point by point.

    Attributes:
        notes: sentences: what could not be estimated and why, what is in the run folder.
    """

    config: RunConfig
    points: list[Planned]
    notes: list[str]

    @property
    def flops(self) -> float | None:
        """FLOPs to the first token of all points; None where that of a point is not known."""
        known = [planned.flops for planned in self.points]
        return None if None in known else sum(value for value in known if value is not None)

    @property
    def refused(self) -> list[Planned]:
        """Points that cannot run."""
        return [planned for planned in self.points if planned.refused]


def make_plan(config: RunConfig) -> Plan:
    """The plan of a checked run. Reads configs and processors, counts rows; loads no weights and no pictures."""
    from tokenprune.evals.evaluation.applied_method import settings_digest

    notes: list[str] = []
    rows, torn, broken = _finished(config.folder)
    models: dict[str, Outline | None] = {}
    settings: dict[str, str] = {}
    for name in config.models:
        models[name], problem = _outline(name)
        model = models[name]
        if model is None:
            notes.append(f"The FLOPs of {name} could not be estimated: {problem}.")
        else:
            settings[name] = settings_digest(config, LoadedModel(name, None, None, model.fingerprint), "")
    made_of = {task: task_fingerprint(task) for task in config.all_tasks}
    sizes = {task: count_samples(task) for task in config.all_tasks}
    planned, counted = [], 0
    for point in config.points():
        model, size = models[point.model], sizes[point.task]
        limit = size if config.limit is None or size is None else min(size, config.limit)
        cost, refused = _estimate(model, point, config.seed)
        refused = refused or (_refused_by_vllm(point, config.seed) if config.engine == VLLM else None)
        ids = _ids(rows, point, settings.get(point.model), made_of[point.task])
        counted += len(ids)
        done = len(ids) if limit is None else min(len(ids), limit)  # of an earlier run with a higher limit
        planned.append(Planned(point, limit, done, cost, refused, _needs(point, cost)))
    unread = [task for task, size in sizes.items() if size is None]
    if unread:
        notes.append(f"How many samples they have is known once their data is read: {', '.join(unread)}.")
    others = sum(map(len, rows.values())) - counted
    if others:
        notes.append(
            f"{others} rows of the run folder belong to other points, weights, code or settings; none counts here."
        )
    if torn:
        notes.append(f"{torn} lines in the run folder are torn at their end and would be written anew.")
    if broken:
        notes.append(f"{broken} lines in the run folder are no JSON rows; the run refuses them until they are removed.")
    return Plan(config, planned, notes)


def _ids(rows: dict[tuple[str, str], set[str]], point: Point, settings: str | None, task: str | None) -> set[str]:
    """Samples that the point has answered. `settings` is what its rows begin with, None where it is not known; so is
    the fingerprint of a task that only its data would tell: then those of any data count."""
    if settings is None:
        return set()
    if task is not None:
        return rows.get((settings + task, point.key), set())
    ids_by_data = [ids for (filed, key), ids in rows.items() if key == point.key and filed.startswith(settings)]
    return set().union(*ids_by_data)


def _outline(name: str) -> tuple[Outline | None, str]:
    from tokenprune.evals.profiling.estimate import outline

    try:
        return outline(name), ""
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        return None, reason


def _refused_by_vllm(point: Point, seed: int) -> str | None:
    """Why an engine of vLLM could not serve a point; None where it could, or where its model is not known here."""
    from transformers import AutoConfig

    from tokenprune.evals.evaluation.vllm_engine import engine_setting

    try:
        engine_setting(AutoConfig.from_pretrained(model_source(point.model), local_files_only=True), [point], seed)
    except OSError:
        return None
    except ValueError as error:
        return str(error)
    return None


def _estimate(model: Outline | None, point: Point, seed: int) -> tuple[Estimate | None, str | None]:
    from tokenprune.evals.profiling.estimate import estimate

    if model is None:
        return None, None
    try:
        return estimate(model, point, seed), None
    except ValueError as error:
        return None, str(error)


def _needs(point: Point, cost: Estimate | None) -> tuple[str, ...]:
    hints = dict.fromkeys(hint for stage in cost.stages for hint in stage.pruner.needed_hints) if cost else {}
    hub = [] if Path(model_source(point.model)).is_dir() else ["a hub model"]
    return (*hub, *task_needs(point.task), *hints)


def _finished(folder: Path) -> tuple[dict[tuple[str, str], set[str]], int, int]:
    """Ids of answered samples by settings and point, the number of torn last lines and that of others that are no rows;
    nothing is written or mended."""
    answered: dict[tuple[str, str], set[str]] = {}
    torn = broken = 0
    for path in sorted(folder.glob("samples*.jsonl")):
        *lines, last = path.read_bytes().split(b"\n")
        torn += bool(last)
        for line in lines:
            try:
                row: Any = json.loads(line)
                if not row.get("error"):
                    answered.setdefault((row["settings"], row["point"]), set()).add(row["sample_id"])
            except (ValueError, KeyError, AttributeError):
                broken += 1
    return answered, torn, broken


def plan_tables(plan: Plan) -> list[Table]:
    """One table for each model; tasks with the same points share it, their samples added up."""
    by_cell: dict[tuple[str, str], list[Planned]] = {}
    for planned in plan.points:
        by_cell.setdefault((planned.point.model, planned.point.task), []).append(planned)
    alike: dict[tuple[object, ...], list[str]] = {}
    for (model, task), cell in by_cell.items():
        same = tuple((each.point.label, each.estimate and each.estimate.flops, _needs_here(each)) for each in cell)
        alike.setdefault((model, same), []).append(task)
    tables = []
    for key, tasks in alike.items():
        model = str(key[0])
        title = f"{Path(model).name} on {', '.join(map(display_name, tasks))}"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for head in _HEADS:
            table.add_column(head, justify="left" if head in ("point", "cuts at", "needs") else "right", no_wrap=True)
        for same in zip(*(by_cell[model, task] for task in tasks)):
            table.add_row(*map(escape, _cells(same)), style="dim" if same[0].point.reference else None)
        tables.append(table)
    return tables


def _needs_here(planned: Planned) -> str:
    return "cannot run, see below" if planned.refused else ", ".join(planned.needs)


def _cells(same: Sequence[Planned]) -> list[str]:
    """The cells of one point on one task or several."""
    first = same[0]
    sizes = [each.samples for each in same if each.samples is not None]
    costs = ["", "", ""]
    if first.estimate is not None:
        mark = "<= " if first.estimate.at_most else ""
        total, whole = first.estimate.flops.total, first.estimate.unpruned.total
        in_all = [each.flops for each in same if each.flops is not None]
        costs = [NOT_MODELLED, "", ""]
        if total is not None and whole is not None:
            every = f"{sum(in_all) / 1e12:.4g}" if len(in_all) == len(same) else ""
            costs = [f"{mark}{total / 1e9:.4g}", f"{100 * total / whole:.1f}", every]
    samples = str(sum(sizes)) if len(sizes) == len(same) else "?"
    label = "unpruned" if first.point.method == NONE else first.point.label
    return [label, first.cuts, samples, str(sum(each.done for each in same)), *costs, _needs_here(first)]


def plan_lines(plan: Plan) -> list[str]:
    """The lines below the tables: totals, the assumptions, and what went wrong."""
    from tokenprune.evals.profiling.estimate import PICTURE

    known = [planned.samples for planned in plan.points if planned.samples is not None]
    done = sum(planned.done for planned in plan.points)
    unknown = "" if len(known) == len(plan.points) else " and those of tasks whose size is not known"
    lines = [f"{len(plan.points)} points, {sum(known)} answers{unknown}, {done} of them done: {plan.config.folder}"]
    if plan.flops is not None:
        lines.append(f"In all {plan.flops / 1e12:.4g} TFLOPs to the first tokens.")
    if any(planned.estimate for planned in plan.points):
        lines.append(
            f"Estimated from configs for a picture of {PICTURE[0]} x {PICTURE[1]} pixels and a short question, 2 FLOPs "
            "a multiply-add, to the first token. Left out: signals and selection, decoding, timing rounds, and what "
            "share_tower saves."
        )
    lines += plan.notes
    refused: dict[str, list[str]] = {}
    for planned in plan.refused:
        label = f"{planned.point.label} on {Path(planned.point.model).name}"
        refused.setdefault(planned.refused or "", []).append(label)
    lines += [f"Cannot run: {', '.join(dict.fromkeys(labels))}. {why}" for why, labels in refused.items()]
    return lines
