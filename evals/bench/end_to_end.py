r"""Prefill, decode and memory at the sizes of the published checkpoints, weights random:

    python -m tokenprune.evals.bench.end_to_end --out docs/bench/end-to-end-GPU-DATE.csv
    python -m tokenprune.evals.bench.end_to_end --sizes llava-1.5-0.5b qwen2.5-vl-0.5b --batch 1 --dtype bfloat16 \
        --methods vtc_cls divprune --out docs/bench/end-to-end-CPU-DATE.csv

Unpruned, pruned and ideal prefill take turns within a round, and ratios are taken within a round. The ideal is the same
model on a prompt of just the kept tokens. `selection_share` is of the time, `selection_flops_share` of the analytic
FLOPs of the matrix products: what selection would take if it ran as fast as the model.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tokenprune.cost import share
from tokenprune.evals.bench.sizes import SIZES, SizedModel, build, find_size
from tokenprune.evals.bench.table import Table
from tokenprune.evals.config.points import NONE, Point, check_method_name
from tokenprune.evals.evaluation.applied_method import pruned, visual_tokens
from tokenprune.evals.profiling.flops import cache_bytes
from tokenprune.evals.profiling.timing import decode_seconds, ideal_prefill, prefill, timed
from tokenprune.evals.statistics.bootstrap import median_iqr
from tokenprune.registry import METHODS
from tokenprune.seams import cache_in

COLUMNS = (
    "model", "method", "keep", "batch", "visual_tokens", "kept_tokens", "tower_ms", "selection_ms", "unpruned_ms",
    "pruned_ms", "ideal_ms", "speedup", "to_ideal", "to_ideal_q25", "to_ideal_q75", "selection_share",
    "selection_flops_share", "decode_ms",
    "unpruned_decode_ms", "peak_mib", "unpruned_peak_mib", "ideal_peak_mib", "kv_mib", "unpruned_kv_mib", "rounds",
    "dtype", "error",
)  # fmt: skip
LEFT_OUT = ("oracle",)  # needs boxes, which random pixels have none of


def peak_mib(model: torch.nn.Module, work: Callable[[], Any]) -> float:
    """Most memory that tensors hold while `work` runs, MiB, weights included.

    On a CPU the profiler reports what torch's allocator hands out and takes back, and the weights are added: the same
    notion as CUDA's counter, and the same number in every run. Scratch memory that a matrix library keeps for itself is
    in neither. A process's peak resident size would hold it, but also what the C library keeps of freed memory.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        weights = {tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())}
        return (sum(storage.nbytes() for storage in weights) + _most_allocated(work)) / 2**20
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


def _most_allocated(work: Callable[[], Any]) -> int:
    """Most bytes that tensors made while `work` runs on a CPU hold at one time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()  # type: ignore[attr-defined]
        most = max(most, held)
    return most


def tower_seconds(sized: SizedModel, inputs: dict[str, Any], rounds: int) -> float:
    """Median seconds of the vision tower and the projector."""
    import inspect

    adapter = sized.adapter
    kind = next(kind for kind, name in adapter.pixels.items() if inputs.get(name) is not None)
    encode = getattr(*adapter.features_call(kind))
    given = {name: value for name, value in inputs.items() if name in inspect.signature(encode).parameters}
    times = [timed(sized.model.device, lambda: encode(**given, return_dict=True))[0] for _ in range(rounds + 1)]
    return median_iqr(times[1:])["median"]


def kv_mib(cache: Any) -> float:
    """MiB of the tensors in the layers of a cache."""
    return sum(cache_bytes(cache)) / 2**20


@torch.inference_mode()
def unpruned_row(sized: SizedModel, rounds: int, decode: int) -> dict[str, Any]:
    """What every method is compared with."""
    device, inputs = sized.model.device, sized.inputs()
    unpruned_mib = kv_mib(cache_in(prefill(sized, inputs)))  # type: ignore[arg-type]
    times = [timed(device, lambda: prefill(sized, inputs))[0] for _ in range(rounds + 1)][1:]  # type: ignore[arg-type]
    return {
        "visual_tokens": visual_tokens(sized, inputs)[0],  # type: ignore[arg-type]
        "unpruned_ms": 1e3 * median_iqr(times)["median"],
        "tower_ms": 1e3 * tower_seconds(sized, inputs, rounds),
        "unpruned_decode_ms": _decode_ms(sized, inputs, decode),
        "unpruned_peak_mib": peak_mib(sized.model, lambda: prefill(sized, inputs)),  # type: ignore[arg-type]
        "unpruned_kv_mib": unpruned_mib,
    }


def _decode_ms(sized: SizedModel, inputs: dict[str, Any], tokens: int) -> float:
    return 1e3 * median_iqr(decode_seconds(sized, inputs, tokens)[1:])["median"]  # type: ignore[arg-type]


@torch.inference_mode()
def method_row(sized: SizedModel, method: str, keep: int | float, rounds: int, decode: int) -> dict[str, Any]:
    """Times and memory of one method at one budget."""
    loaded: Any = sized
    device, inputs = sized.model.device, sized.inputs()
    point = Point(sized.name, "random pixels", method, keep)
    with pruned(loaded, point, 0, []) as handle:
        pruned_mib = kv_mib(cache_in(prefill(loaded, inputs)))
        stays, kept, report = handle.stays_by_layer, handle.visual_by_layer[0], handle.report()
    ideal = ideal_prefill(loaded, inputs, stays)
    logs: dict[str, list[float]] = {name: [] for name in ("unpruned", "pruned", "ideal", "selection")}

    def pruned_turn() -> None:
        with pruned(loaded, point, 0, []) as handle:
            logs["pruned"].append(timed(device, lambda: prefill(loaded, inputs))[0])
            logs["selection"].append(handle.report().selection_seconds)

    turns = [
        lambda: logs["unpruned"].append(timed(device, lambda: prefill(loaded, inputs))[0]),
        pruned_turn,
        lambda: logs["ideal"].append(timed(device, ideal)[0]),
    ]
    for number in range(rounds + 1):
        for i in range(3):
            turns[(i + number) % 3]()
    logs = {name: values[1:] for name, values in logs.items()}
    ratios = {
        "speedup": [a / b for a, b in zip(logs["unpruned"], logs["pruned"])],
        "to_ideal": [a / b for a, b in zip(logs["pruned"], logs["ideal"])],
        "selection_share": [a / b for a, b in zip(logs["selection"], logs["unpruned"])],
    }
    middle = {name: median_iqr(values) for name, values in ratios.items()}
    with pruned(loaded, point, 0, []):
        peak = peak_mib(sized.model, lambda: prefill(loaded, inputs))
        decode_ms = _decode_ms(sized, inputs, decode)
    return {
        "kept_tokens": sum(kept) / len(kept),
        **{f"{name}_ms": 1e3 * median_iqr(values)["median"] for name, values in logs.items()},
        **{name: value["median"] for name, value in middle.items()},
        "selection_flops_share": share(report.flops.selection, report.flops_unpruned.total),
        "to_ideal_q25": middle["to_ideal"]["q25"],
        "to_ideal_q75": middle["to_ideal"]["q75"],
        "decode_ms": decode_ms,
        "peak_mib": peak,
        "ideal_peak_mib": peak_mib(sized.model, ideal),
        "kv_mib": pruned_mib,
        "rounds": rounds,
    }


def parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """The arguments that the benches at true size share."""
    on_gpu = torch.cuda.is_available()
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--dtype", default="bfloat16" if on_gpu else "float32", help="%(default)s")
    made.add_argument("--device", default="cuda" if on_gpu else "cpu", help="%(default)s")
    made.add_argument("--rounds", type=int, default=7, help="timed rounds (%(default)s)")
    made.add_argument("--decode", type=int, default=16, help="decode steps (%(default)s)")
    made.add_argument("--out", type=Path, default=Path(out), help="%(default)s")
    return made


def default_sizes() -> list[str]:
    """The true sizes on a GPU, their small copies on a CPU."""
    wanted = (lambda name: name.endswith("-7b")) if torch.cuda.is_available() else (lambda name: name[:5] == "tiny-")
    return [name for name in SIZES if wanted(name)]


def main(argv: list[str] | None = None) -> None:
    """Measure and write the CSV."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory would report its own starts
    asked = parser(__doc__, "runs/bench/end_to_end.csv")
    asked.add_argument("--sizes", nargs="*", default=default_sizes(), help="model sizes (%(default)s)")
    asked.add_argument("--methods", nargs="*", default=[name for name in METHODS.names() if name not in LEFT_OUT])
    asked.add_argument("--batch", nargs="*", type=int, default=[1, 8], help="%(default)s")
    asked.add_argument("--picture", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="pixels, of the Qwen sizes")
    asked.add_argument("--budgets", nargs="*", type=float, help="in place of the size's own; from 1 on they are tokens")
    options = asked.parse_args(argv)
    for name in options.sizes:
        find_size(name)
    for name in options.methods:
        check_method_name(name)
    table = Table(options.out, COLUMNS)
    for name in options.sizes:
        model = build(name, options.dtype, options.device)
        budgets = options.budgets or find_size(name).budgets
        for batch in options.batch:
            sized = SizedModel(name, model, batch=batch, picture=tuple(options.picture) if options.picture else None)
            shared = {"model": name, "batch": batch, "dtype": options.dtype}
            plain = unpruned_row(sized, options.rounds, options.decode)
            table.add({**shared, "method": NONE, **plain})
            for keep in (int(keep) if keep >= 1 else keep for keep in budgets):
                for method in options.methods:
                    row = {**shared, **plain, "method": method, "keep": keep}
                    try:
                        row |= method_row(sized, method, keep, options.rounds, options.decode)
                    except (ValueError, torch.OutOfMemoryError) as error:  # a row that says why, and on with the rest
                        row["error"] = str(error).partition("\n")[0]
                    table.add(row)
                    print(_line(row), flush=True)
        del model
    print(f"written: {options.out}")


def _line(row: dict[str, Any]) -> str:
    head = f"{row['model']} x {row['batch']}  {row['method']:>12} @ {row['keep']:<6}"
    if row.get("error"):
        return f"{head} {row['error']}"
    return (
        f"{head} {row['speedup']:.2f} times as fast, {row['to_ideal']:.3f} of ideal, selection "
        f"{row['selection_share']:.1%} of the unpruned prefill"
    )


if __name__ == "__main__":
    main()
