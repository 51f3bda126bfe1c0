"""Time of a decode step with a method, against the stock model: `python -m tokenprune.evals.bench.decode`.

The two take turns step by step, each on another cache of the same prompt, so that what else the machine does hits both.
`--profile` prints where the difference comes from, operation by operation: counts do not depend on what else runs.
A step of a pocket model takes milliseconds and shows what a method costs at worst; `--models llava-1.5-0.5b`, or
another of `evals.bench.sizes`, has random weights and the steps of a model of that size.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("model", "method", "steps", "prompts", "kept_tokens", "stock_ms", "changed_ms", "ratio", "ratio_q25",
           "ratio_q75")  # fmt: skip
METHODS = ("var(channels=[47, 75, 250], tau=4.8)", "zerotuning(gamma=2.0)", "cmai", "act", "gift", "imbalance",
           "naavit", "a_vl", "holov@64")  # fmt: skip
WARM = 3  # steps of each prompt that are not timed


def _model(name: str) -> Any:
    """A pocket model, a folder, a hub id, or one of the sizes with random weights."""
    from tokenprune.evals.bench.sizes import SIZES, SizedModel, build
    from tokenprune.evals.models.load import load_model

    return SizedModel(name, build(name, "float32", "cpu")) if name in SIZES else load_model(name)


def _prompts(loaded: Any, count: int) -> list[dict[str, Any]]:
    """Inputs of `count` prompts of one row each."""
    from tokenprune.evals.tasks.load import load_task

    return [loaded.inputs([one.question], [one.image]) for one in load_task("pocket").load(0, count)]


def measure(model: str, method: str, steps: int, prompts: int) -> dict[str, Any]:
    """One row: medians of a decode step in milliseconds, and of their ratio step by step, with its quartiles."""
    import torch

    from tokenprune.api import apply
    from tokenprune.evals.profiling.timing import timed
    from tokenprune.evals.statistics.bootstrap import median_iqr
    from tokenprune.seams import cache_argument, cache_in

    plain, changed = _model(model), _model(model)
    device = plain.model.device
    handle = apply(changed.model, method)
    times: dict[str, list[float]] = {"stock": [], "changed": []}
    kept: list[int] = []
    with torch.inference_mode():
        for inputs in _prompts(plain, prompts):
            caches: dict[str, Any] = {}
            for name, loaded in (("stock", plain), ("changed", changed)):
                caches[name] = cache_in(loaded.model(**inputs, use_cache=True, logits_to_keep=1))
            kept.append(handle.report().kept_tokens)
            token = torch.tensor([[7]], device=device)
            for step in range(steps + WARM):
                order = [("stock", plain), ("changed", changed)]
                for name, loaded in order if step % 2 else reversed(order):
                    given = {"input_ids": token, **cache_argument(caches[name]), "use_cache": True}
                    seconds, _ = timed(device, lambda run=loaded.model, given=given: run(**given, logits_to_keep=1))
                    if step >= WARM:
                        times[name].append(seconds)
    spread = median_iqr([changed / stock for changed, stock in zip(times["changed"], times["stock"])])
    return {
        "model": model, "method": method, "steps": steps, "prompts": prompts,
        "kept_tokens": statistics.mean(kept), "stock_ms": 1e3 * statistics.median(times["stock"]),
        "changed_ms": 1e3 * statistics.median(times["changed"]), "ratio": spread["median"],
        "ratio_q25": spread["q25"], "ratio_q75": spread["q75"],
    }  # fmt: skip


def profile(model: str, method: str, steps: int = 10) -> list[tuple[str, float, float, float, float]]:
    """By operation, calls of a decode step and microseconds of its own, stock and with `method`; what takes most more
    time comes first."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from tokenprune.api import apply
    from tokenprune.seams import cache_argument, cache_in

    found: list[dict[str, tuple[float, float]]] = []
    for changed in (False, True):
        loaded = _model(model)
        handle = apply(loaded.model, method) if changed else None
        token = torch.tensor([[7]], device=loaded.model.device)
        with torch.inference_mode():
            cache = cache_in(loaded.model(**_prompts(loaded, 1)[0], use_cache=True, logits_to_keep=1))
            given = {"input_ids": token, **cache_argument(cache), "use_cache": True, "logits_to_keep": 1}
            for _ in range(WARM):
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["pocket-llava"], help="pocket name, size, folder or hub id")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="what to apply (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="timed decode steps per prompt (%(default)s)")
    parser.add_argument("--prompts", type=int, default=3, help="prompts (%(default)s)")
    parser.add_argument("--runs", type=int, default=1, help="how often, each with models loaded anew (%(default)s)")
    parser.add_argument("--profile", action="store_true", help="print operations of a step in place of its time")
    parser.add_argument("--out", type=Path, help="a CSV to write, with hardware, versions, commit and date")
    options = parser.parse_args(argv)
    from tokenprune.evals.bench.table import Table

    table = None if options.out is None or options.profile else Table(options.out, COLUMNS)
    for model, method in ((model, method) for model in options.models for method in options.methods):
        if options.profile:
            rows = profile(model, method)
            print(f"{model} {method}: operation, calls and microseconds a step: stock, changed")
            for name, calls, spent, more_calls, more_spent in rows[:20]:
                print(f"{name:48s} {calls:6.0f} {spent:8.0f} {more_calls:6.0f} {more_spent:8.0f}")
            print(f"{'all':48s} " + " ".join(f"{sum(float(row[at]) for row in rows):8.0f}" for at in range(1, 5)))
            continue
        for _ in range(options.runs):
            row = measure(model, method, options.steps, options.prompts)
            print(f"{model} {method}: stock {row['stock_ms']:.2f} ms, changed {row['changed_ms']:.2f} ms, ratio "
                  f"{row['ratio']:.3f} ({row['ratio_q25']:.3f} to {row['ratio_q75']:.3f})", flush=True)  # fmt: skip
            if table is not None:
                table.add(row)


if __name__ == "__main__":
    main()
