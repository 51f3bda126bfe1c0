"""Two processes train a pruned model together: DDP, and FSDP2 with each decoder layer and the rest sharded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from _once import once
from _paths import ROOT, TESTS

pytestmark = pytest.mark.slow

METHODS = ("uniform@9", "vtc_cls@9", "fastv@9", "todre@9", "pyramiddrop@9", "transprune@9")
AFTER_APPLY = ("phi3", "llama")
STARTS = {
    "ddp": [f"ddp,{method},qwen3,shard" for method in METHODS],
    "fsdp2": [
        *(f"fsdp2,{method},qwen3,shard" for method in METHODS),
        *(f"fsdp2,fastv@9,{decoder},apply" for decoder in AFTER_APPLY),
        "fsdp2-parts,fastv@9,qwen3,shard",
        "fsdp2-parts,pyramiddrop@9,qwen3,shard",
    ],
}
"""What one start of the two processes serves: wrapper, method, decoder, and whether `apply` came first."""


def start(cells: list[str]) -> tuple[dict[str, str], str]:
    """What came of each cell that was reached, and what went wrong beside it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            [*command, str(TESTS / "_sharded.py"), *cells],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return reached(error.stdout), "the processes hung"
    return reached(done.stdout), f"exit code {done.returncode}: {done.stderr[-6000:]}" if done.returncode else ""


def reached(printed: str | bytes | None) -> dict[str, str]:
    """Of what was printed, the lines of cells."""
    text = printed.decode() if isinstance(printed, bytes) else printed or ""
    return dict(json.loads(line) for line in text.splitlines() if line.startswith("["))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """What came of a cell. A cell that ends the processes fails alone: those behind it start anew."""

    def told(wrapper: str, method: str, decoder: str = "qwen3", first: str = "shard") -> str:
        name = wrapper.partition("-")[0]

        def make(file: Path) -> None:
            found: dict[str, str] = {}
            while left := [cell for cell in STARTS[name] if cell not in found]:
                lines, said = start(left)
                found |= lines
                if len(lines) < len(left) or said:
                    found[next((cell for cell in left if cell not in lines), left[-1])] = said or "no line came of it"
            file.write_text(json.dumps(found), encoding="utf-8")

        file = once(tmp_path_factory, f"sharded-{name}.json", make)
        return json.loads(file.read_text(encoding="utf-8"))[f"{wrapper},{method},{decoder},{first}"]

    return told


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_logits_and_gradients_are_those_of_one_process(wrapper: str, method: str, ran: Callable[..., str]) -> None:
    assert ran(wrapper, method) == "equal"


@pytest.mark.parametrize("decoder", AFTER_APPLY)
def test_a_model_that_is_sharded_after_apply(decoder: str, ran: Callable[..., str]) -> None:
    assert ran("fsdp2", "fastv@9", decoder, "apply") == "equal"


def test_layers_sharded_in_parts_cannot_be_tried_before_they_run(ran: Callable[..., str]) -> None:
    assert ran("fsdp2-parts", "fastv@9") == "equal"
    assert "sharded where it reads them" in ran("fsdp2-parts", "pyramiddrop@9")
