"""From rows to results: accuracies with intervals, comparisons, costs, provenance, and the files of a run folder."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from tokenprune.cost import share
from tokenprune.evals.config.points import Point
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.io.atomic_files import replace_file, replaced, write_csv
from tokenprune.evals.io.rows import FLOPS_PARTS, Costs, SampleRow
from tokenprune.evals.profiling.hardware import hardware
from tokenprune.evals.results.equal_cost import compare_at_equal_cost, flat_equal_cost
from tokenprune.evals.results.records import Provenance, ResultRecord, TableRow
from tokenprune.evals.results.scores import References, answered, correct_for_many, of_family, scores_of

OVERALL = "overall"


def provenance(config: RunConfig, seconds: float | None = None) -> Provenance:
    """Where a result came from: settings, versions, hardware, seed, commit and date."""
    packages = ("torch", "transformers", "tokenprune-vlm", "datasets", "numpy", "scipy", "accelerate", "triton",
                "lmms_eval")  # fmt: skip
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "config": config.as_dict(),
        "versions": {"python": platform.python_version(), **versions},
        "hardware": hardware(),
        "seed": config.seed,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["tokenprune", *sys.argv[1:]]),
        "seconds": seconds,
    }


def _commit() -> str | None:
    """Commit of the checkout that the code runs from, `-dirty` with changes; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        run = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None


def summarise(
    points: Sequence[Point], rows: Mapping[str, Sequence[SampleRow]], measures: Mapping[str, Costs], seed: int
) -> list[ResultRecord]:
    """One record per point.

    Args:
        points: the grid, in the order of the tables.
        rows: finished sample rows by point key, the same samples in the same order for all points of a task.
        measures: `flops`, `kv` and `times` by point key.
        seed: of the bootstrap.

    Returns:
        Records without what the task says of itself and the provenance.
    """
    records: list[ResultRecord] = []
    for point in points:
        answers = rows[point.key]
        references = References.of(point, points, rows)
        families = dict.fromkeys(row["family"] for row in answered(answers))
        record: dict[str, Any] = {
            "point": point.key,
            **{name: value for name, value in asdict(point).items() if name != "options"},
            "options": dict(point.options),
            "label": point.label,
            "series": point.series,
            "overall": scores_of(answers, references, seed),
            "families": {
                family: scores_of(of_family(answers, family), references.only(family), seed) for family in families
            },
            "visual_tokens": _mean(row["visual_tokens"] for row in answered(answers)),
            "kept_tokens": _mean(row["kept_tokens"] for row in answered(answers)),
            **measures.get(point.key, {}),
        }
        records.append(cast(ResultRecord, record))
    correct_for_many(records)
    compare_at_equal_cost(records, rows, seed)
    return records


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def title_of(record: ResultRecord) -> str:
    """Model and task as tables, plots and pages call them."""
    return f"{Path(record['model']).name} on {task_name(record)}"


def task_name(record: ResultRecord) -> str:
    """What the task calls itself; records of older runs lack it, and have the file's name then."""
    named = record.get("task_name")
    return str(named or (Path(record["task"]).stem if "/" in record["task"] else record["task"]))


def table_rows(records: list[ResultRecord]) -> list[TableRow]:
    """Flat rows of summary.csv: for each point its families, then `overall`. Accuracies are fractions, times
    milliseconds, FLOPs in units of 1e9, KV bytes of one prompt; `metric:NAME` is what the task itself computes over all
    of its samples, in its own units."""
    rows = []
    names = metric_names(records)
    for record in records:
        shared = {name: record[name] for name in ("model", "task", "method", "keep", "seed")}
        shared["options"] = ",".join(f"{key}={value}" for key, value in record["options"].items())
        costs = {"failed": record.get("failed", 0), **flat_costs(record)}
        at_cost = flat_equal_cost(record)
        for family, scores in [*record["families"].items(), (OVERALL, record["overall"])]:
            metrics = {
                f"metric:{name}": (record.get("metrics") or {}).get(name) if family == OVERALL else None
                for name in names
            }
            of_all = at_cost if family == OVERALL else dict.fromkeys(at_cost)
            rows.append({**shared, "family": family, **scores, **costs, **of_all, **metrics})
    return rows


def metric_names(records: list[ResultRecord]) -> list[str]:
    """Metrics that any of the records has from its task, in the order of their first mention."""
    return list(dict.fromkeys(name for record in records for name in record.get("metrics") or {}))


def _giga(value: float | None) -> float | None:
    return None if value is None else value / 1e9


def flat_costs(record: ResultRecord) -> TableRow:
    """Tokens, FLOPs, bytes and times of a point, one number a column; None where not measured or not modelled."""
    flops, kv, times = record.get("flops"), record.get("kv"), record.get("times") or {}

    def at(name: str, statistic: str = "median", scale: float = 1.0) -> float | None:
        return times[name][statistic] * scale if name in times else None

    flat: TableRow = {
        "visual_tokens": record["visual_tokens"],
        "kept_tokens": record["kept_tokens"],
        "equivalent_tokens": kv["equivalent_tokens"] if kv else None,
    }
    for source in ("analytic", "measured"):
        counted = flops.get(source) if flops else None
        for part in ("total", *FLOPS_PARTS):
            name = f"gflops_{part}" if source == "analytic" else f"gflops_{part}_measured"
            flat[name] = _giga(counted.get(part)) if counted else None
    flat["flops_agree"] = flops["agree"] if flops and flops.get("measured") else None
    flat["flops_share"] = share(flops["analytic"]["total"], flops["unpruned"]["total"]) if flops else None
    flat["gflops_paper_formula"] = _giga(flops["paper"]) if flops else None
    flat["kv_bytes"] = kv["measured"] if kv else None
    flat["kv_bytes_analytic"] = kv["analytic"] if kv else None
    flat["kv_share"] = share(kv["analytic"], kv["unpruned"]) if kv else None
    for name in ("prefill", "unpruned_prefill", "ideal_prefill", "selection", "decode"):
        flat[f"{name}_ms"] = at(name, scale=1000)
        flat[f"{name}_ms_q25"] = at(name, "q25", 1000)
        flat[f"{name}_ms_q75"] = at(name, "q75", 1000)
    flat["prefill_to_ideal"] = at("to_ideal")
    flat["prefill_to_unpruned"] = at("to_unpruned")
    flat["selection_to_unpruned_prefill"] = at("selection_share")
    return flat


def write_results(
    folder: Path,
    records: list[ResultRecord],
    rows: Mapping[str, Sequence[SampleRow]],
    origin: Provenance,
    others: Mapping[str, Sequence[SampleRow]] | None = None,
) -> list[Path]:
    """Write results.jsonl, samples.parquet and summary.csv into `folder`; returns their paths.

    Args:
        rows: those that count, by point key.
        others: failed samples, and answers to samples that failed at another point; in samples.parquet only.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [json.dumps({**record, "provenance": origin}, ensure_ascii=False, default=str) for record in records]
    results = replace_file(folder / "results.jsonl", "\n".join(lines) + "\n")

    by_point = {record["point"]: record for record in records}
    flat = []
    for key, answers in rows.items():
        record = by_point[key]
        shared = {name: record[name] for name in ("model", "task", "method", "seed")}
        whole = [{**row, "counted": True, "error": None} for row in answers]
        whole += [{"error": None, **row, "counted": False} for row in (others or {}).get(key, [])]
        for row in whole:
            # a keep or an answer may be of several types, and a parquet column has one
            answer = row["answer"] if isinstance(row["answer"], str) else json.dumps(row["answer"], ensure_ascii=False)
            keep = None if record["keep"] is None else str(record["keep"])
            flat.append({**shared, "keep": keep, "options": json.dumps(record["options"]), **row, "answer": answer})
    samples = folder / "samples.parquet"
    with replaced(samples) as partial:
        pq.write_table(pa.Table.from_pylist(flat), partial, compression="zstd")

    summary = write_csv(folder / "summary.csv", table_rows(records))
    return [results, samples, summary]
