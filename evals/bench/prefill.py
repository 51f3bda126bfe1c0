"""Pruned prefill against the unpruned and the ideal one, for every method: `make bench`.

The ideal is the same model on a prompt of just the kept tokens (`evals/profiling/timing.py`). Unpruned,
pruned and ideal take turns within one round, so that a noisy machine hits all three alike. The result
is a CSV with hardware, date, commit and versions in every row.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenprune.cost import share
from tokenprune.interfaces.budget import read_budget
from tokenprune.registry import METHODS

COLUMNS = (
    "model", "method", "keep", "batch", "unpruned_ms", "pruned_ms", "ideal_ms", "selection_ms", "to_unpruned",
    "to_ideal", "to_ideal_q25", "to_ideal_q75", "selection_share", "selection_flops_share", "decode_ms",
    "unpruned_decode_ms", "kv_bytes", "kv_bytes_unpruned", "rounds", "dtype", "error",
)  # fmt: skip


def measure(
    model: str, methods: list[str], budgets: list[int | float | str], repeats: int, samples: int
) -> Iterator[dict[str, Any]]:
    """A row per method and budget; times are medians in milliseconds, ratios medians of the ratios within a round. A
    method that raises ValueError gets a row with `error`."""
    from tokenprune.evals.config.measure import Measure
    from tokenprune.evals.config.points import NONE, Point
    from tokenprune.evals.models.load import load_model
    from tokenprune.evals.profiling.flops import measure_flops
    from tokenprune.evals.profiling.timing import measure_times
    from tokenprune.evals.tasks.load import default_task, load_task

    loaded, task = load_model(model), default_task(model)
    pictures = list(load_task(task).load(0, samples))
    settings = Measure(samples=samples, repeats=repeats, warmup=2, decode_tokens=4)
    plain = measure_times(loaded, Point(model, task, NONE, None), pictures, settings)["times"]
    for keep in budgets:
        for method in methods:
            point = Point(model, task, method, keep)
            try:
                result = measure_times(loaded, point, pictures, settings)
                flops = measure_flops(loaded, point, pictures, counting=False)
            except ValueError as error:  # needs weights or hints, or cannot act here: the row says so
                yield {"model": model, "method": method, "keep": keep, "error": str(error).partition("\n")[0]}
                continue
            times, kv = result["times"], result["kv"]
            at = {name: value["median"] for name, value in times.items()}
            yield {
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
                "selection_flops_share": share(flops["analytic"]["selection"], flops["unpruned"]["total"]),
                "decode_ms": 1e3 * at["decode"],
                "unpruned_decode_ms": 1e3 * plain["decode"]["median"],
                "kv_bytes": kv["measured"],
                "kv_bytes_unpruned": kv["unpruned"],
                "rounds": repeats * samples,
                "dtype": str(loaded.model.dtype).removeprefix("torch."),
            }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pocket-llava", help="pocket name, folder or hub id (%(default)s)")
    parser.add_argument("--methods", nargs="*", default=METHODS.names(), help="all of them by default")
    parser.add_argument(
        "--keep",
        nargs="*",
        type=read_budget,
        default=[192, 128, 64],
        help="tokens per image, or kept fractions below 1.0",
    )
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds per picture (%(default)s)")
    parser.add_argument("--samples", type=int, default=2, help="pictures (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/prefill.csv"), help="%(default)s")
    options = parser.parse_args(argv)
    from tokenprune.evals.bench.table import Table

    table = Table(options.output, COLUMNS)
    for row in measure(options.model, options.methods, options.keep, options.repeats, options.samples):
        table.add(row)
        if "error" in row:
            print(f"{row['method']:>12} @ {row['keep']:<5} {row['error']}", flush=True)
            continue
        print(
            f"{row['method']:>12} @ {row['keep']:<5} pruned / unpruned {row['to_unpruned']:.3f}   pruned / ideal "
            f"{row['to_ideal']:.3f}   selection {row['selection_share']:.1%} of the unpruned prefill",
            flush=True,
        )
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
