"""Two processes train a pruned model together: DDP, and FSDP2 with each decoder layer and the rest sharded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from _paths import ROOT, TESTS

METHODS = ("uniform@9", "vtc_cls@9", "fastv@9", "todre@9", "pyramiddrop@9", "transprune@9")


def run(wrapper: str, method: str, decoder: str = "qwen3", first: str = "shard") -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(TESTS / "_sharded.py"), wrapper, method, decoder, first],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_logits_and_gradients_are_those_of_one_process(wrapper: str, method: str) -> None:
    assert "equal" in run(wrapper, method)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["phi3", "llama"])
def test_a_model_that_is_sharded_after_apply(decoder: str) -> None:
    assert "equal" in run("fsdp2", "fastv@9", decoder, "apply")


@pytest.mark.slow
def test_layers_sharded_in_parts_cannot_be_tried_before_they_run() -> None:
    assert "equal" in run("fsdp2-parts", "fastv@9")
    assert "sharded where it reads them" in run("fsdp2-parts", "pyramiddrop@9")
