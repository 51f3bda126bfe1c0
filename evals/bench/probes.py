r"""What is tried at `apply` of a decoder that has no tests of its own, in time and against one prompt's prefill:

    python -m tokenprune.evals.bench.probes --size llava-1.5-7b --layers 2 4 --dtype bfloat16 --out FILE

The decoder has the widths of the size and as many layers as asked for, so that it fits where it runs; a trial passes
through each layer the same number of times, so its time grows with them. `of_prefill` is its time beside that of
one prompt of the size (641 tokens for LLaVA-1.5) through the same layers, `first_s` that of the first trial, which
touches weights that nobody touched before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("model", "layers", "parameters", "trial", "first_s", "seconds", "prefill_s", "of_prefill", "rounds", "dtype")


def _times(work: Callable[[], Any], rounds: int) -> list[float]:
    found = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return found


def measure(size: str, layers: int, dtype: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each trial."""
    import torch

    from tokenprune.engine.decoder_probe import removal_error
    from tokenprune.engine.layer_check import unread_layers
    from tokenprune.evals.bench.sizes import SizedModel, build
    from tokenprune.evals.profiling.timing import prefill
    from tokenprune.evals.statistics.bootstrap import median_iqr

    sized = SizedModel(size, build(size, dtype, device, decoder_layers=layers))
    adapter, inputs = sized.adapter, sized.inputs()
    loaded: Any = sized
    with torch.inference_mode():
        tower = median_iqr(_times(lambda: adapter.entry.get_image_features(inputs["pixel_values"]), rounds)[1:])
        whole = median_iqr(_times(lambda: prefill(loaded, inputs), rounds)[1:])
    alone = whole["median"] - tower["median"]
    trials = {
        "cuts at the input": lambda: removal_error(adapter),
        "cuts before one layer": lambda: removal_error(adapter, (1,)),
        "reading every layer": lambda: unread_layers(adapter),
    }
    rows = []
    for name, trial in trials.items():
        first, *others = _times(trial, rounds)
        seconds = median_iqr(others)["median"]
        parameters = sum(weight.numel() for weight in adapter.language_model.parameters())
        rows.append({
            "model": size, "layers": layers, "parameters": parameters, "trial": name, "first_s": first,
            "seconds": seconds, "prefill_s": alone, "of_prefill": seconds / alone, "rounds": rounds, "dtype": dtype,
        })  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny-llava-1.5", help="model size (%(default)s)")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4], help="of the decoder (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="%(default)s")
    parser.add_argument("--device", default="cpu", help="%(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/probes.csv"), help="%(default)s")
    options = parser.parse_args(argv)
    from tokenprune.evals.bench.sizes import find_size
    from tokenprune.evals.bench.table import Table

    find_size(options.size)
    table = Table(options.out, COLUMNS)
    for layers in options.layers:
        for row in measure(options.size, layers, options.dtype, options.device, options.rounds):
            print(
                f"{row['layers']} layers, {row['trial']}: {row['seconds']:.3f} s, {row['of_prefill']:.2f} of a prefill"
            )
            table.add(row)


if __name__ == "__main__":
    main()
