"""Time of a decode step with an intervention, against the stock model: `python -m tokenprune.evals.bench.decode`.

The two take turns step by step, each on another cache of the same prompt, so that what else the machine does hits both.
`--profile` prints where the difference comes from, operation by operation: counts do not depend on what else runs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("model", "method", "steps", "samples", "stock_ms", "changed_ms", "ratio")


def measure(model: str, method: str, steps: int, samples: int) -> dict[str, float]:
    """Median seconds of a decode step, stock and with `method`, and the median of their ratio step by step."""
    import torch

    from tokenprune.api import apply
    from tokenprune.evals.models.load import load_model
    from tokenprune.evals.profiling.timing import timed
    from tokenprune.evals.tasks.load import load_task
    from tokenprune.seams import cache_argument, cache_in

    plain, changed = load_model(model), load_model(model)
    device = plain.model.device
    handle = apply(changed.model, method)
    times: dict[str, list[float]] = {"stock": [], "changed": []}
    with torch.inference_mode():
        for sample in load_task("pocket").load(0, samples):
            caches: dict[str, Any] = {}
            for name, loaded in (("stock", plain), ("changed", changed)):
                inputs = loaded.inputs([sample.question], [sample.image])
                caches[name] = cache_in(loaded.model(**inputs, use_cache=True, logits_to_keep=1))
            token = torch.tensor([[7]], device=device)
            for step in range(steps + 3):
                order = [("stock", plain), ("changed", changed)]
                for name, loaded in order if step % 2 else reversed(order):
                    given = {"input_ids": token, **cache_argument(caches[name]), "use_cache": True}
                    seconds, _ = timed(device, lambda run=loaded.model, given=given: run(**given, logits_to_keep=1))
                    if step >= 3:
                        times[name].append(seconds)
    print(handle.report())
    ratios = [changed / stock for changed, stock in zip(times["changed"], times["stock"])]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**medians, "ratio": statistics.median(ratios)}


def profile(model: str, method: str, steps: int = 10) -> list[tuple[str, float, float, float, float]]:
    """By operation, calls of a decode step and microseconds of its own, stock and with `method`; what takes most more
    time comes first."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from tokenprune.api import apply
    from tokenprune.evals.models.load import load_model
    from tokenprune.evals.tasks.load import load_task
    from tokenprune.seams import cache_argument, cache_in

    sample = next(iter(load_task("pocket").load(0, 1)))
    found: list[dict[str, tuple[float, float]]] = []
    for changed in (False, True):
        loaded = load_model(model)
        handle = apply(loaded.model, method) if changed else None
        token = torch.tensor([[7]], device=loaded.model.device)
        with torch.inference_mode():
            inputs = loaded.inputs([sample.question], [sample.image])
            cache = cache_in(loaded.model(**inputs, use_cache=True, logits_to_keep=1))
            given = {"input_ids": token, **cache_argument(cache), "use_cache": True, "logits_to_keep": 1}
            for _ in range(3):
                loaded.model(**given)
            with profiler(activities=[ProfilerActivity.CPU]) as profiled:
                for _ in range(steps):
                    loaded.model(**given)
        found.append(
            {event.key: (event.count / steps, event.self_cpu_time_total / steps) for event in profiled.key_averages()}
        )
        if handle is not None:
            handle.remove()
    stock, more = found
    rows = [(name, *stock.get(name, (0.0, 0.0)), *more.get(name, (0.0, 0.0))) for name in {*stock, *more}]
    return sorted(rows, key=lambda row: row[2] - row[4])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and, where asked, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pocket-llava", help="pocket name, folder or hub id (%(default)s)")
    parser.add_argument("--method", default="var(channels=[47, 75, 250], tau=4.8)", help="what to apply (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="decode steps per prompt (%(default)s)")
    parser.add_argument("--samples", type=int, default=3, help="prompts (%(default)s)")
    parser.add_argument("--runs", type=int, default=1, help="how often, each with models loaded anew (%(default)s)")
    parser.add_argument("--profile", action="store_true", help="print operations of a step in place of its time")
    parser.add_argument("--out", type=Path, help="a CSV to write, with hardware, versions, commit and date")
    options = parser.parse_args(argv)
    from tokenprune.evals.bench.table import Table

    if options.profile:
        rows = profile(options.model, options.method)
        print("operation, calls and microseconds a step: stock, changed")
        for name, calls, spent, more_calls, more_spent in rows[:20]:
            print(f"{name:48s} {calls:6.0f} {spent:8.0f} {more_calls:6.0f} {more_spent:8.0f}")
        print(f"{'all':48s} " + " ".join(f"{sum(float(row[at]) for row in rows):8.0f}" for at in range(1, 5)))
        return
    table = None if options.out is None else Table(options.out, COLUMNS)
    asked = {name: getattr(options, name) for name in ("model", "method", "steps", "samples")}
    for _ in range(options.runs):
        seconds = measure(**asked)
        stock, changed = seconds["stock"] * 1e3, seconds["changed"] * 1e3
        print(f"stock {stock:.2f} ms, changed {changed:.2f} ms, ratio {seconds['ratio']:.3f}")
        if table is not None:
            table.add({**asked, "stock_ms": stock, "changed_ms": changed, "ratio": seconds["ratio"]})


if __name__ == "__main__":
    main()
