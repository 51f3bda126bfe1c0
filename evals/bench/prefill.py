"""Pruned prefill against the unpruned and the ideal one, for every method: `make bench`.

The ideal is the same model on a prompt that holds just the kept tokens (`tokenprune.evals.timing`). Unpruned, pruned
and ideal take turns within one round, so that a noisy machine hits all three alike. The result is a CSV with hardware,
date, commit and versions in every row.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from tokenprune.registry import METHODS

COLUMNS = (
    "model", "method", "keep", "batch", "unpruned_ms", "pruned_ms", "ideal_ms", "selection_ms", "to_unpruned",
    "to_ideal", "to_ideal_q25", "to_ideal_q75", "selection_share", "decode_ms", "unpruned_decode_ms", "kv_bytes",
    "kv_bytes_unpruned", "rounds", "dtype", "cpu", "gpu", "threads", "torch", "transformers", "commit", "date",
)  # fmt: skip


def measure(model: str, methods: list[str], budgets: list[int], repeats: int, samples: int) -> list[dict[str, Any]]:
    """One row per method and budget; times are medians in milliseconds, ratios medians of the ratios within a round."""
    from tokenprune.evals.config import NONE, Measure, Point, RunConfig
    from tokenprune.evals.models import load_model
    from tokenprune.evals.results import provenance
    from tokenprune.evals.tasks import load_task
    from tokenprune.evals.timing import measure_times

    loaded = load_model(model)
    pictures = list(load_task("pocket").load(0, samples))
    origin = provenance(
        RunConfig(name="bench", model=model, tasks=["pocket"], methods=list(methods), keep=list(budgets))
    )
    settings = Measure(samples=samples, repeats=repeats, warmup=2, decode_tokens=4)
    plain = measure_times(loaded, Point(model, "pocket", NONE, None), pictures, settings)["times"]
    rows = []
    for keep in budgets:
        for method in methods:
            result = measure_times(loaded, Point(model, "pocket", method, keep), pictures, settings)
            times, kv = result["times"], result["kv"]
            at = {name: value["median"] for name, value in times.items()}
            rows.append(
                {
                    "model": model,
                    "method": method,
                    "keep": keep,
                    "batch": 1,
                    "unpruned_ms": 1e3 * at["unpruned_prefill"],
                    "pruned_ms": 1e3 * at["prefill"],
                    "ideal_ms": 1e3 * at["ideal_prefill"],
                    "selection_ms": 1e3 * at["selection"],
                    "to_unpruned": at["to_unpruned"],
                    "to_ideal": at["to_ideal"],
                    "to_ideal_q25": times["to_ideal"]["q25"],
                    "to_ideal_q75": times["to_ideal"]["q75"],
                    "selection_share": at["selection_share"],
                    "decode_ms": 1e3 * at["decode"],
                    "unpruned_decode_ms": 1e3 * plain["decode"]["median"],
                    "kv_bytes": kv["measured"],
                    "kv_bytes_unpruned": kv["unpruned"],
                    "rounds": repeats * samples,
                    "dtype": str(loaded.model.dtype).removeprefix("torch."),
                    "cpu": origin["hardware"]["cpu"],
                    "gpu": origin["hardware"]["gpu"] or "",
                    "threads": origin["hardware"]["threads"],
                    "torch": origin["versions"]["torch"],
                    "transformers": origin["versions"]["transformers"],
                    "commit": origin["commit"] or "",
                    "date": origin["date"],
                }
            )
            print(
                f"{method:>12} @ {keep:<4} pruned / unpruned {rows[-1]['to_unpruned']:.3f}   pruned / ideal "
                f"{rows[-1]['to_ideal']:.3f}   selection {rows[-1]['selection_share']:.1%} of the unpruned prefill",
                flush=True,
            )
    return rows


def main() -> None:
    """Measure and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pocket-llava", help="pocket name, folder or hub id (%(default)s)")
    parser.add_argument("--methods", nargs="*", default=METHODS.names(), help="all of them by default")
    parser.add_argument("--keep", nargs="*", type=int, default=[192, 128, 64], help="tokens per image")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds per picture (%(default)s)")
    parser.add_argument("--samples", type=int, default=2, help="pictures (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/prefill.csv"), help="%(default)s")
    options = parser.parse_args()
    rows = measure(options.model, options.methods, options.keep, options.repeats, options.samples)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as stream:
        writer: csv.DictWriter[str] = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows({key: f"{v:.5g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
