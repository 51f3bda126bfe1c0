"""Our numbers beside published ones: difference, and whether theirs lies inside our interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from tokenprune.evals.config.points import NONE
from tokenprune.evals.config.targets import ACCURACY, Target, read_target
from tokenprune.evals.io.atomic_files import write_csv
from tokenprune.evals.results.records import ResultRecord, TableRow
from tokenprune.evals.results.run_folder import read_records
from tokenprune.evals.statistics.verdict import LEAST


@dataclass(frozen=True)
class Parity:
    """A published number and ours.

    Attributes:
        ours: in the target's unit; None where the run has no such point, or its task no such metric.
        low, high: of our 95 percent interval; None where the metric has none.
        ours_unpruned: of the same model on the same task.
        n: samples behind ours.
    """

    target: Target
    ours: float | None
    low: float | None
    high: float | None
    ours_unpruned: float | None
    n: int | None

    @property
    def difference(self) -> float | None:
        """Ours minus theirs."""
        return None if self.ours is None else self.ours - self.target.value

    @property
    def inside(self) -> bool | None:
        """Whether theirs lies inside our interval; None where there is none."""
        if self.low is None or self.high is None:
            return None
        return self.low <= self.target.value <= self.high

    @property
    def ours_relative(self) -> float | None:
        """What is left of our unpruned model's number, as a fraction."""
        return self.ours / self.ours_unpruned if self.ours is not None and self.ours_unpruned else None

    @property
    def theirs_relative(self) -> float | None:
        """What is left of the unpruned number in the target's source, as a fraction."""
        return self.target.value / self.target.unpruned if self.target.unpruned else None


def compare(records: Sequence[ResultRecord], targets: Sequence[Target]) -> list[Parity]:
    """Every target beside the point of a run that it is about, in the order of the targets.

    Args:
        records: see `summary.summarise`; of several seeds the first counts.
    """
    compared = []
    for target in targets:
        record = next((one for one in records if target.fits(one)), None)
        if record is None:
            compared.append(Parity(target, None, None, None, None, None))
            continue
        place = (record["model"], record["task"], NONE)
        plain = next((one for one in records if (one["model"], one["task"], one["method"]) == place), None)
        ours, low, high = _value(record, target)
        base = None if plain is None else _value(plain, target)[0]
        compared.append(Parity(target, ours, low, high, base, record["overall"]["n"]))
    return compared


def _value(record: ResultRecord, target: Target) -> tuple[float | None, float | None, float | None]:
    """Our number and its interval. A metric of the task that is the mean score of its samples has the interval of the
    accuracy; of others only the value is known."""
    overall, metrics = record["overall"], record.get("metrics") or {}
    scale = 100.0 if target.unit == "percent" else 1.0
    known = {**metrics, ACCURACY: overall["accuracy"]}
    values: list[float] = [known[name] for name in target.metrics if name in known]
    if len(values) < len(target.metrics):
        return None, None, None
    value = sum(values)
    if len(values) == 1 and abs(value - overall["accuracy"]) < 1e-9:
        return scale * value, scale * overall["ci_low"], scale * overall["ci_high"]
    return scale * value, None, None


def read_run(folder: str | Path) -> tuple[list[ResultRecord], list[Target]]:
    """The records of a finished run, and the targets that its sweep file names.

    Raises:
        FileNotFoundError, ValueError: the folder holds no results.jsonl, or an empty one.
    """
    records = read_records(Path(folder) / "results.jsonl")
    named = (records[0].get("provenance") or {}).get("config", {}).get("targets") or []
    return records, [read_target(number, entry) for number, entry in enumerate(named)]


def read_targets(path: str | Path) -> list[Target]:
    """The targets in a sweep file, or a packaged one, or a file that holds nothing else.

    Raises:
        FileNotFoundError, ValueError: no such file, or no targets in it.
    """
    from tokenprune.evals.config.sweep_file import find_config, read_settings

    file = find_config(path)
    named = read_settings(file).get("targets")
    if not isinstance(named, list) or not named:
        raise ValueError(f"{file} has no list 'targets' to compare with.")
    return [read_target(number, entry) for number, entry in enumerate(named)]


def parity_rows(compared: Sequence[Parity]) -> list[TableRow]:
    """Flat rows of parity.csv; numbers in the unit of the target, shares as fractions."""
    return [
        {
            "method": one.target.method,
            "options": ",".join(f"{key}={value}" for key, value in one.target.options.items()),
            "keep": one.target.keep,
            "task": one.target.task,
            "metric": " + ".join(one.target.metrics),
            "unit": one.target.unit,
            "n": one.n,
            "ours": one.ours,
            "ci_low": one.low,
            "ci_high": one.high,
            "theirs": one.target.value,
            "difference": one.difference,
            "inside": one.inside,
            "ours_of_unpruned": one.ours_relative,
            "theirs_of_unpruned": one.theirs_relative,
            "ours_unpruned": one.ours_unpruned,
            "theirs_unpruned": one.target.unpruned,
            "family": one.target.family,
            "source": one.target.source,
            "evidence": one.target.evidence,
            "note": one.target.note,
        }
        for one in compared
    ]


def write_parity(path: Path, compared: Sequence[Parity]) -> Path:
    """Write parity.csv, every target a row, also those that the run has no point for."""
    return write_csv(path, parity_rows(compared))


def parity_table(compared: Sequence[Parity]) -> Table:
    """The targets that the run has a number for, for a terminal."""
    table = Table(title="Ours and theirs", title_justify="left", box=None, pad_edge=False)
    for head in ("method", "task", "metric", "n", "ours", "95 % interval", "theirs", "difference", "inside",
                 "of unpruned %, ours", "theirs", "family", "source"):  # fmt: skip
        left = head in ("method", "task", "metric", "inside", "family", "source")
        table.add_column(head, justify="left" if left else "right", no_wrap=head != "source")
    for one in compared:
        if one.ours is None:
            continue
        target = one.target
        options = ",".join(f"{key}={value}" for key, value in target.options.items())
        label = target.method + (f"({options})" if options else "")
        label += "" if target.keep is None else f"@{target.keep}"
        shares = [None if share is None else 100 * share for share in (one.ours_relative, one.theirs_relative)]
        cells = [
            label,
            target.task,
            " + ".join(target.metrics),
            "" if one.n is None else str(one.n),
            _number(one.ours),
            "" if one.low is None or one.high is None else f"{one.low:.1f} to {one.high:.1f}",
            _number(target.value),
            "" if one.difference is None else f"{one.difference:+.1f}",
            {True: "yes", False: "no", None: ""}[one.inside],
            *map(_number, shares),
            target.family,
            target.source + (f" ({target.evidence})" if target.evidence else ""),
        ]
        table.add_row(*map(escape, cells))
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def parity_lines(compared: Sequence[Parity]) -> list[str]:
    """What stands below the table: how many lie inside, and what could not be compared."""
    judged = [one for one in compared if one.inside is not None]
    there = [one for one in compared if one.ours is not None]
    lines = [f"{sum(bool(one.inside) for one in judged)} of {len(judged)} published numbers lie inside our intervals."]
    if len(there) > len(judged):
        lines.append(f"{len(there) - len(judged)} more have no interval here: their metric is no mean over samples.")
    if len(compared) > len(there):
        lines.append(f"{len(compared) - len(there)} of {len(compared)} targets have no number in this run.")
    unsure = sum(bool(one.target.evidence) for one in there)
    if unsure:
        lines.append(
            f"Numbers compared of which something is unsure in the source: {unsure}; see 'evidence' in parity.csv."
        )
    few = [one.n for one in judged if one.n is not None and one.n < LEAST]
    if few:
        least = str(min(few)) if min(few) == max(few) else f"{min(few)} to {max(few)}"
        lines.append(
            f"Published numbers held against few samples, {least} of ours: {len(few)}. Below {LEAST} an interval is so "
            "wide that it holds almost any number."
        )
    return lines
