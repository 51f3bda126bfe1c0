"""Time of a decode step with an intervention, against the stock model: `python -m tokenprune.evals.bench.decode`.

The two take turns step by step, each on another cache of the same prompt, so that what else the machine does hits both.
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


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and, where asked, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pocket-llava", help="pocket name, folder or hub id (%(default)s)")
    parser.add_argument("--method", default="var(channels=[47, 75, 250], tau=4.8)", help="what to apply (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="decode steps per prompt (%(default)s)")
    parser.add_argument("--samples", type=int, default=3, help="prompts (%(default)s)")
    parser.add_argument("--runs", type=int, default=1, help="how often, each with models loaded anew (%(default)s)")
    parser.add_argument("--out", type=Path, help="a CSV to write, with hardware, versions, commit and date")
    options = parser.parse_args(argv)
    from tokenprune.evals.bench.table import Table

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
