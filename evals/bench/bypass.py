r"""Prefill with layers that visual tokens pass by, against the stock model, in time and in FLOPs:

    python -m tokenprune.evals.bench.bypass --sizes llava-1.5-0.5b --rounds 5 --out docs/bench/bypass-cpu-DATE.csv

Weights are random and sizes those of `evals.bench.sizes`; stock and changed take turns within a round, and ratios are
taken within a round. `flops_share` is analytic, of the decoder alone, `time_share` of the whole prefill without the
tower, which runs once per round for both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    "model", "method", "visual_tokens", "text_tokens", "flops_share", "stock_ms", "changed_ms", "time_share",
    "time_share_q25", "time_share_q75", "tower_ms", "kv_mib", "rounds", "dtype",
)  # fmt: skip
METHODS = ("naavit", "naavit(variant=composite)", "naavit(variant=mask)", "naavit(layers={all})",
           "shortv(layers={most})")  # fmt: skip


def measure(sized: Any, method: str, rounds: int) -> dict[str, Any]:
    """One row."""
    import torch

    from tokenprune.api import applied
    from tokenprune.evals.bench.end_to_end import kv_mib, tower_seconds
    from tokenprune.evals.profiling.timing import prefill, timed
    from tokenprune.evals.statistics.bootstrap import median_iqr
    from tokenprune.seams import cache_in

    device, inputs = sized.model.device, sized.inputs()
    times: dict[str, list[float]] = {"stock": [], "changed": []}
    with torch.inference_mode():
        tower = tower_seconds(sized, inputs, 1)
        for number in range(rounds + 1):
            for name in ("stock", "changed") if number % 2 else ("changed", "stock"):
                if name == "stock":
                    times[name].append(timed(device, lambda: prefill(sized, inputs))[0])
                    continue
                with applied(sized.model, method) as handle:
                    seconds, output = timed(device, lambda: prefill(sized, inputs))
                    times[name].append(seconds)
                    report, cache = handle.report(), kv_mib(cache_in(output))
    shares = [(a - tower) / (b - tower) for a, b in zip(times["changed"][1:], times["stock"][1:])]
    spread = median_iqr(shares)
    whole, part = report.flops_unpruned.prefill, report.flops.prefill
    return {
        "model": sized.name, "method": method, "visual_tokens": report.visual_tokens,
        "text_tokens": report.prompt_tokens - report.visual_tokens,
        "flops_share": None if whole is None or part is None else part / whole,
        "stock_ms": 1e3 * median_iqr(times["stock"][1:])["median"],
        "changed_ms": 1e3 * median_iqr(times["changed"][1:])["median"],
        "time_share": spread["median"], "time_share_q25": spread["q25"], "time_share_q75": spread["q75"],
        "tower_ms": 1e3 * tower, "kv_mib": cache, "rounds": rounds, "dtype": str(sized.model.dtype).split(".")[-1],
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["tiny-llava-1.5"], help="model sizes (%(default)s)")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="what to apply (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="%(default)s")
    parser.add_argument("--device", default="cpu", help="%(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/bypass.csv"), help="%(default)s")
    options = parser.parse_args(argv)
    from tokenprune.evals.bench.sizes import SizedModel, build, find_size
    from tokenprune.evals.bench.table import Table

    for name in options.sizes:
        find_size(name)
    table = Table(options.out, COLUMNS)
    for name in options.sizes:
        sized = SizedModel(name, build(name, options.dtype, options.device))
        layers = list(range(len(sized.adapter.layers)))
        most = layers[len(layers) - round(0.6 * len(layers)) :]  # as many as shortv's default, without a calibration
        for method in options.methods:
            row = measure(sized, method.format(all=layers, most=most), options.rounds)
            print(f"{name} {row['method']}: {row['flops_share']:.3f} of the FLOPs, {row['time_share']:.3f} of the time")
            table.add(row)


if __name__ == "__main__":
    main()
