"""Every op of `tokenprune.kernels` against its reference and against the floor of the hardware.

    python -m tokenprune.evals.bench.kernels --out docs/bench/kernels-GPU-DATE.csv

The floor of a call is the longer of two times: its least bytes (each input read once, each output written once) at the
bandwidth, and the FLOPs of its definition at the matrix rate, both measured here and now with a copy and a product. On
a CPU only the reference runs. Kernel and reference take turns within a round; times are medians. A row whose kernel
disagrees with the reference says so in `error`, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenprune.evals.bench.table import Table
from tokenprune.kernels import (
    attention_received,
    attention_rows,
    compact_rows,
    greedy_coverage,
    greedy_diversity,
    merge,
    redistribute_attention,
    segmented_topk,
    token_transition,
)
from tokenprune.kernels.launch import runs_triton

COLUMNS = (
    "op", "tokens", "width", "batch", "keep", "dtype", "kernel_ms", "reference_ms", "floor_ms", "to_reference",
    "to_floor", "bound_by", "kernel_q25_ms", "kernel_q75_ms", "error", "gbytes", "gflops", "bandwidth_gb_s",
    "matrix_tflop_s", "rounds",
)  # fmt: skip

_HEAD = 64  # width of an attention head; a width of 4096 has 64 of them


@dataclass(frozen=True)
class Call:
    """One call of an op.

    Attributes:
        module: of the op.
        args: as its reference takes them.
        flops: multiply-adds of its definition, times two.
        memory: bytes that the reference needs at once, roughly.
    """

    module: Any
    args: tuple[Any, ...]
    flops: int = 0
    memory: int = 0


@dataclass(frozen=True)
class Shape:
    """N tokens of width D, B rows, k of them kept."""

    tokens: int
    width: int
    batch: int
    keep: int
    dtype: torch.dtype
    device: torch.device

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)

    def heads(self, tokens: int) -> Tensor:
        """`[B, H, tokens, 64]`, with the strides that models give it."""
        return self.new(self.batch, tokens, max(self.width // _HEAD, 1), _HEAD).transpose(1, 2)

    def flags(self, share: float) -> Tensor:
        return torch.rand(self.batch, self.tokens, device=self.device) < share


def _rows(s: Shape) -> Call:
    query, key = s.heads(1), s.heads(s.tokens)
    return Call(attention_rows, (query, key, 0.125, None), 2 * key.numel(), 4 * key.numel())


def _received(s: Shape) -> Call:
    query, key = s.heads(s.tokens), s.heads(s.tokens)
    chunk = s.batch * query.shape[1] * 128 * s.tokens
    return Call(attention_received, (query, key, 0.125, None), 2 * query.numel() * s.tokens, 12 * chunk)


def _greedy(s: Shape) -> Call:
    features = s.new(s.batch, s.tokens, s.width)
    first = torch.zeros(s.batch, dtype=torch.int64, device=s.device)
    pairs = s.batch * s.tokens**2
    return Call(greedy_diversity, (features, s.keep, "k_center", first, None), 2 * pairs * s.width, 4 * pairs)


def _coverage(s: Shape) -> Call:
    features, pairs = s.new(s.batch, s.tokens, s.width), s.batch * s.tokens**2
    weights = torch.rand(s.batch, s.tokens, device=s.device)
    return Call(greedy_coverage, (features, weights, s.keep, False), 2 * pairs * s.width, 12 * pairs)


def _topk(s: Shape) -> Call:
    sizes = [s.tokens // 4] * 4
    scores = s.new(s.batch, sum(sizes), dtype=torch.float32)
    quotas = torch.full((s.batch, 4), s.keep // 4, device=s.device)
    return Call(segmented_topk, (scores, sizes, quotas, s.keep // 4 * 4))


def _compact(s: Shape) -> Call:
    index = torch.rand(s.batch, s.tokens, device=s.device).argsort(dim=1)[:, : s.keep].sort(dim=1).values
    places = torch.arange(s.tokens, device=s.device).expand(s.batch, -1)
    return Call(compact_rows, (index, [s.new(s.batch, s.tokens, s.width), places, s.flags(0.5)]))


def _merge(s: Shape) -> Call:
    target = torch.randint(s.keep, (s.batch, s.tokens), device=s.device)
    features = s.new(s.batch, s.tokens, s.width)
    return Call(merge, (features, target, s.keep, s.flags(0.9).float()), 0, 8 * features.numel())


def _transition(s: Shape) -> Call:
    tensors = tuple(s.new(s.batch, s.tokens, s.width) for _ in range(4))
    return Call(token_transition, tensors, 0, 16 * tensors[0].numel())


def _redistribute(rows: int) -> Callable[[Shape], Call]:
    def make(s: Shape) -> Call:
        query, key, value = s.heads(rows), s.heads(s.tokens), s.heads(s.tokens)
        # four keys in five are visual, one of fifty in either kind is a sink
        groups = s.flags(0.8).to(torch.int8)
        groups = torch.where(s.flags(0.02), 3 - groups, groups)
        args = (query, key, value, groups, None, None, 0.6, 0.2, 0.2, 0.0, 0.125)
        weights = query.numel() // _HEAD * s.tokens
        return Call(redistribute_attention, args, 4 * query.numel() * s.tokens, 16 * weights)

    return make


CALLS: dict[str, Callable[[Shape], Call]] = {
    "attention_rows": _rows,
    "attention_received": _received,
    "greedy_coverage": _coverage,
    "greedy_diversity": _greedy,
    "segmented_topk": _topk,
    "compact_rows": _compact,
    "merge": _merge,
    "token_transition": _transition,
    "redistribute_attention, decode": _redistribute(1),
    "redistribute_attention, 64 rows": _redistribute(64),
}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def hardware(device: torch.device, dtype: torch.dtype, size: int) -> tuple[float, float]:
    """Bytes a second of a copy, read and written, and FLOPs a second of a square matrix product of `size`."""
    source = torch.empty(8 * size * size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left = torch.randn(size, size, device=device).to(dtype)
    copied = min(_seconds(lambda: target.copy_(source), device) for _ in range(8))
    multiplied = min(_seconds(lambda: left @ left, device) for _ in range(8))
    return 2 * source.numel() / copied, 2 * size**3 / multiplied


def _error(outputs: Any, expected: Any) -> float:
    """Largest difference, relative to the largest value; for indices the share of places that differ."""
    errors = [0.0]
    for output, other in zip(_tensors(outputs), _tensors(expected)):
        if output.dtype.is_floating_point:
            top = other.double().abs().max().clamp_min(1e-30)
            errors.append(float((output.double() - other.double()).abs().max() / top))
        else:
            errors.append(float((output != other).double().mean()))
    return max(errors)


def measure(op: str, shape: Shape, speeds: tuple[float, float], rounds: int, limit: int) -> dict[str, Any] | None:
    """One row, without where it came from; None where the call does not fit into `limit` bytes."""
    call = CALLS[op](shape)
    if 2 * _bytes(call.args) > limit:
        return None
    has_kernel, has_reference = runs_triton(next(_tensors(call.args))), call.memory <= limit
    if not has_kernel and not has_reference:
        return None
    runs: dict[str, Callable[[], Any]] = {}
    if has_kernel:
        runs["kernel"] = lambda: call.module.launch(*call.args)
    if has_reference:
        runs["reference"] = lambda: call.module._OP.direct(*call.args)
    with torch.no_grad():
        results = {name: run() for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(1e3 * _seconds(run, shape.device))
    moved = _bytes(call.args) + _bytes(next(iter(results.values())))
    if op == "compact_rows":  # rows that leave are not read
        moved = 2 * _bytes(next(iter(results.values()))) + _bytes(call.args[0])
    by_bytes, by_flops = 1e3 * moved / speeds[0], 1e3 * call.flops / speeds[1]
    floor = max(by_bytes, by_flops)
    at = {name: statistics.median(values) for name, values in times.items()}
    quarters = statistics.quantiles(times["kernel"], n=4) if has_kernel and rounds > 1 else None
    both = has_kernel and has_reference
    return {
        "kernel_ms": at.get("kernel"),
        "reference_ms": at.get("reference"),
        "floor_ms": floor,
        "to_reference": at["kernel"] / at["reference"] if both else None,
        "to_floor": at["kernel" if has_kernel else "reference"] / floor,
        "bound_by": "bytes" if by_bytes >= by_flops else "flops",
        "kernel_q25_ms": None if quarters is None else quarters[0],
        "kernel_q75_ms": None if quarters is None else quarters[2],
        "error": _error(results["kernel"], results["reference"]) if both else None,
        "gbytes": moved / 1e9,
        "gflops": call.flops / 1e9,
        "rounds": rounds,
    }


def _numbers(parser: argparse.ArgumentParser, name: str, default: Sequence[int], help: str) -> None:
    parser.add_argument(name, nargs="*", type=int, default=list(default), help=f"{help} (%(default)s)")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write the CSV."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="*", choices=list(CALLS), default=list(CALLS), help="all of them by default")
    _numbers(parser, "--tokens", (576, 2880, 16384) if on_gpu else (576,), "N")
    _numbers(parser, "--widths", (64, 1024, 4096) if on_gpu else (64, 1024), "D")
    _numbers(parser, "--batch", (1, 8, 32) if on_gpu else (1,), "B")
    parser.add_argument("--keep", type=int, default=128, help="tokens kept (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32", help="%(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (%(default)s)")
    parser.add_argument("--gib", type=float, default=24.0 if on_gpu else 1.0, help="largest call (%(default)s GiB)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/kernels.csv"), help="%(default)s")
    options = parser.parse_args(argv)
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), getattr(torch, options.dtype)
    speeds = hardware(device, dtype, 8192 if on_gpu else 512)
    measured = {"bandwidth_gb_s": speeds[0] / 1e9, "matrix_tflop_s": speeds[1] / 1e12}
    table = Table(options.out, COLUMNS)
    for op in options.ops:
        widths = [1] if op == "segmented_topk" else options.widths
        for tokens, width, batch in product(options.tokens, widths, options.batch):
            shape = Shape(tokens, width, batch, min(options.keep, tokens), dtype, device)
            times = measure(op, shape, speeds, options.rounds, int(options.gib * 2**30))
            if times is None:
                print(f"{op:>32} N={tokens} D={width} B={batch}: too large, left out", flush=True)
                continue
            row = {"op": op, "tokens": tokens, "width": width, "batch": batch, "keep": shape.keep}
            table.add(row | {"dtype": options.dtype} | times | measured)
            print(
                f"{op:>32} N={tokens} D={width} B={batch}: kernel {times['kernel_ms']}, reference "
                f"{times['reference_ms']}, floor {times['floor_ms']:.4g} ms",
                flush=True,
            )
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
