"""Compiles every Triton kernel for GPUs that this machine need not have, and writes what each takes of one.

    python -m tokenprune.kernels.aot --out docs/bench/kernels-aot-DATE.csv
    python -m tokenprune.kernels.aot --out docs/bench/kernels-aot-DATE.csv --op merge

The launches are those that the ops themselves make, noted on tensors without storage; so block sizes, constants and
warps are the ones that run.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from tokenprune.kernels.launch import HAS_TRITON, Launch, noting

ARCHITECTURES = (80, 90)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
COLUMNS = (
    "op", "case", "kernel", "dtype", "arch", "registers", "spill_bytes", "shared_bytes", "warps", "stages",
    "constants", "triton",
)  # fmt: skip

_TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One use of an op: `make(dtype)` launches its kernels on tensors without storage."""

    op: str
    name: str
    make: Callable[[torch.dtype], object]
    dtypes: tuple[torch.dtype, ...] = DTYPES


def _new(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _heads(heads: int, key_heads: int, rows: int, count: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key and value in the layout of models: `[B, tokens, heads, width]`, transposed."""
    sizes = ((rows, heads), (count, key_heads), (count, key_heads))
    query, key, value = (_new(1, tokens, number, width, dtype=dtype).transpose(1, 2) for tokens, number in sizes)
    return query, key, value


def _rows(heads: int, key_heads: int, rows: int, count: int, width: int, masked: bool) -> Callable[..., object]:
    def make(dtype: torch.dtype) -> object:
        query, key, _ = _heads(heads, key_heads, rows, count, width, dtype)
        return attention_rows.launch(query, key, 0.1, _new(1, rows, count, dtype=torch.bool) if masked else None)

    return make


def _received(heads: int, count: int, width: int) -> Callable[..., object]:
    def make(dtype: torch.dtype) -> object:
        query, key, _ = _heads(heads, heads, count, count, width, dtype)
        return attention_received.launch(query, key, 0.1, None)

    return make


def _greedy(count: int, objective: str) -> Callable[..., object]:
    return lambda dtype: greedy_diversity.launch(_new(1, count, 4096, dtype=dtype), 64, objective, None, None)


def _coverage(count: int, add: bool) -> Callable[..., object]:
    def make(dtype: torch.dtype) -> object:
        weights = _new(1, count, dtype=torch.float32)
        return greedy_coverage.launch(_new(1, count, 1024, dtype=dtype), weights, 64, add)

    return make


def _topk(sizes: list[int], quotas: bool) -> Callable[..., object]:
    def make(dtype: torch.dtype) -> object:
        wanted = _new(1, len(sizes), dtype=torch.int64) if quotas else None
        return segmented_topk.launch(_new(1, sum(sizes), dtype=dtype), sizes, wanted, 64)

    return make


def _compact(dtype: torch.dtype) -> object:
    tensors = [_new(1, 704, 4096, dtype=dtype), _new(1, 704, dtype=torch.int64), _new(1, 704, dtype=torch.bool)]
    return compact_rows.launch(_new(1, 192, dtype=torch.int64), tensors)


def _merge(dtype: torch.dtype) -> object:
    target, weights = _new(1, 576, dtype=torch.int64), _new(1, 576, dtype=torch.float32)
    return merge.launch(_new(1, 576, 4096, dtype=dtype), target, 64, weights)


def _transition(dtype: torch.dtype) -> object:
    return token_transition.launch(*(_new(1, 640, 4096, dtype=dtype) for _ in range(4)))


def _redistribute(heads: int, key_heads: int, rows: int, count: int, width: int) -> Callable[..., object]:
    def make(dtype: torch.dtype) -> object:
        query, key, value = _heads(heads, key_heads, rows, count, width, dtype)
        groups = _new(1, 650, dtype=torch.int8)
        allowed = _new(1, rows, count, dtype=torch.bool) if rows > 1 else None
        gate = _new(1, rows, dtype=torch.bool) if rows > 1 else None
        return redistribute_attention.launch(query, key, value, groups, allowed, gate, 0.6, 0.2, 0.2, 1e-6, 0.1)

    return make


CASES = (
    Case("attention_rows", "[CLS], CLIP-L/14-336", _rows(16, 16, 1, 577, 64, False)),
    Case("attention_rows", "last token, Qwen2-7B", _rows(28, 4, 1, 3000, 128, True)),
    Case("attention_received", "CLIP-L/14-336", _received(16, 577, 64)),
    Case("attention_received", "width 72, SigLIP", _received(16, 729, 72)),
    Case("greedy_coverage", "product, 576", _coverage(576, False), (torch.float32,)),
    Case("greedy_coverage", "sum, 2880", _coverage(2880, True), (torch.float32,)),
    Case("greedy_coverage", "product, 16384", _coverage(16384, False), (torch.float32,)),
    Case("greedy_diversity", "max-sum, 576", _greedy(576, "max_sum"), (torch.float32,)),
    Case("greedy_diversity", "k-center, 2880", _greedy(2880, "k_center"), (torch.float32,)),
    Case("greedy_diversity", "k-center, 16384", _greedy(16384, "k_center"), (torch.float32,)),
    Case("segmented_topk", "one of 576", _topk([576], False)),
    Case("segmented_topk", "5 of 576", _topk([576] * 5, True)),
    Case("segmented_topk", "one of 16384", _topk([16384], False)),
    Case("compact_rows", "hidden 4096, positions, mask", _compact),
    Case("merge", "weighted, 4096 wide", _merge),
    Case("token_transition", "4096 wide", _transition),
    Case("redistribute_attention", "decode, Llama-7B", _redistribute(32, 32, 1, 700, 128)),
    Case("redistribute_attention", "48 text rows, Llama-7B", _redistribute(32, 32, 48, 700, 128)),
    Case("redistribute_attention", "decode, Qwen2-7B", _redistribute(28, 4, 1, 3000, 128)),
    Case("redistribute_attention", "48 text rows, Qwen2-7B", _redistribute(28, 4, 48, 3000, 128)),
)


def launches(case: Case, dtype: torch.dtype) -> list[Launch]:
    """What the op would launch."""
    with noting() as noted:
        case.make(dtype)
    return noted


def _typed(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Signature, constants and alignment of a launch, as Triton's JIT derives them from arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    parameters = inspect.signature(launch.kernel.function).parameters.values()
    for place, (parameter, value) in enumerate(zip(parameters, launch.args)):
        name = parameter.name
        if "constexpr" in str(parameter.annotation) or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], aligned[place,] = f"*{_TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0:
                aligned[place,] = [["tt.divisibility", 16]]
    return signature, constants, aligned


def compile_launch(launch: Launch, arch: int) -> dict[str, Any]:
    """Compile one kernel down to a cubin.

    Returns:
        `registers` a thread, `spill_bytes` a thread, `shared_bytes` a program, `cubin` in bytes, and
        the options and constants.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, aligned = _typed(launch)
    source = ASTSource(launch.kernel.compiled, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    registers, spilled = _resources(compiled.asm["cubin"])
    return {
        "kernel": launch.kernel.function.__name__,
        "arch": f"sm_{arch}",
        "registers": registers,
        "spill_bytes": spilled,
        "shared_bytes": compiled.metadata.shared,
        "cubin": len(compiled.asm["cubin"]),
        "warps": launch.options["num_warps"],
        "stages": launch.options["num_stages"],
        "constants": " ".join(f"{name}={value}" for name, value in constants.items() if name.isupper()),
        "triton": triton.__version__,
    }


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread, by Triton's own cuobjdump. Only spilled registers are on the stack."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resources = re.search(r"REG:(\d+) STACK:(\d+)", told)
    if resources is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {told}")
    return int(resources[1]), int(resources[2])


def compile_all(ops: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row for each kernel of each case, dtype and architecture."""
    for case in (case for case in CASES if case.op in ops):
        for dtype in case.dtypes:
            for launch in launches(case, dtype):
                for arch in ARCHITECTURES:
                    row = compile_launch(launch, arch)
                    yield {"op": case.op, "case": case.name, "dtype": str(dtype).removeprefix("torch."), **row}


def main() -> None:
    """Compile and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/kernels-aot.csv"), help="%(default)s")
    names = list(dict.fromkeys(case.op for case in CASES))
    parser.add_argument("--op", choices=names, help="compile this one only, and keep the other rows of the file")
    options = parser.parse_args()
    if not HAS_TRITON:
        raise SystemExit("Triton is not installed; on Linux: pip install triton.")
    rows = []
    for row in compile_all([options.op] if options.op else names):
        rows.append(row)
        print(
            f"{row['kernel']:>20} {row['dtype']:>9} {row['arch']}  {row['registers']:>3} registers, "
            f"{row['spill_bytes']} bytes spilled, {row['shared_bytes']} bytes shared  ({row['case']})",
            flush=True,
        )
    if options.op and options.out.exists():
        with options.out.open(newline="", encoding="utf-8") as stream:
            rows += [row for row in csv.DictReader(stream) if row["op"] != options.op]
    rows.sort(key=lambda row: names.index(row["op"]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="", encoding="utf-8") as stream:
        writer: csv.DictWriter[str] = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
