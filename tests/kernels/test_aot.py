"""Kernels are compiled to machine code for GPUs that are not there, and what they take of one is on record."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from tokenprune.kernels import aot
from tokenprune.kernels.launch import Kernel

ROOT = Path(__file__).resolve().parents[2]
RECORD = sorted((ROOT / "docs/bench").glob("kernels-aot-*.csv"))[-1]
FIRST = {case.op: case for case in reversed(aot.CASES)}


def recorded() -> list[dict[str, str]]:
    with RECORD.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("op", list(FIRST))
def test_compiles_to_a_cubin_for_both_architectures(op: str) -> None:
    pytest.importorskip("triton")
    case = FIRST[op]
    dtype = torch.bfloat16 if torch.bfloat16 in case.dtypes else case.dtypes[0]
    for launch in aot.launches(case, dtype):
        for arch in aot.ARCHITECTURES:
            row = aot.compile_launch(launch, arch)
            assert row["cubin"] > 1000 and 0 < row["registers"] <= 255
            # of shared memory a program may have 163 KiB on sm_80 and 227 on sm_90
            assert row["spill_bytes"] == 0 and row["shared_bytes"] <= 163 * 1024


def test_the_record_holds_every_kernel_in_every_dtype_for_both_architectures() -> None:
    rows = {(row["op"], row["case"], row["kernel"], row["dtype"], row["arch"]) for row in recorded()}
    wanted = {
        (case.op, case.name, launch.kernel.function.__name__, str(dtype).removeprefix("torch."), f"sm_{arch}")
        for case in aot.CASES
        for dtype in case.dtypes
        for launch in aot.launches(case, dtype)
        for arch in aot.ARCHITECTURES
    }
    assert sorted(wanted - rows) == [], "run python -m tokenprune.kernels.aot --out docs/bench/kernels-aot-DATE.csv"


def test_little_spills_on_sm_90_and_docs_say_what() -> None:
    """A row of 16384 scores is 32 of them a thread, of gains four times that; text rows of seven heads keep four sums
    and three vectors each."""
    spilled = {
        (row["op"], row["case"]): int(row["spill_bytes"])
        for row in recorded()
        if row["arch"] == "sm_90" and row["spill_bytes"] != "0"
    }
    most = {
        ("segmented_topk", "one of 16384"): 24,
        ("redistribute_attention", "48 text rows, Qwen2-7B"): 24,
        ("greedy_coverage", "product, 16384"): 560,
    }
    assert set(spilled) <= set(most)
    assert all(count <= most[case] for case, count in spilled.items())


def test_every_kernel_is_among_the_cases() -> None:
    named = {launch.kernel for case in aot.CASES for launch in aot.launches(case, case.dtypes[0])}
    modules = [getattr(aot, name) for name in FIRST]
    kernels = {value for module in modules for value in vars(module).values() if isinstance(value, Kernel)}
    assert len(kernels) > 8 and kernels == named
