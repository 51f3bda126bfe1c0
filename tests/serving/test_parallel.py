"""A model that is dealt out over two processes answers as in one: each has half of the tower's heads, and they are
gathered before a method reads them."""

from __future__ import annotations

import pytest
from _vllm import ask, engine, folder, furthest, needs_vllm, request, rows

needs_vllm()

pytestmark = pytest.mark.slow

SETTINGS = {"llava": "vtc_cls@64 | uniform", "qwen": "vtc_cls@0.25 | uniform"}
CLOSE = 1e-5  # of log-probabilities: sums of two halves


def heads_of(llm):
    """Heads of the tower's first block in each process."""

    def heads(worker):  # in here, because it is sent to processes that cannot import this module
        model = worker.model_runner.get_model()
        if hasattr(model, "visual"):
            return model.visual.blocks[0].attn.attn.num_heads
        return model.vision_tower.vision_model.encoder.layers[0].self_attn.attn.num_heads

    return llm.collective_rpc(heads)


@pytest.mark.parametrize("model", list(SETTINGS))
def test_two_processes_answer_as_one(model, monkeypatch):
    data = rows(model, 6)
    asked = [request(model, data, index, setting) for setting in ("vtc_cls", "uniform", "@1.0") for index in range(6)]
    # by itself vLLM binds each process to the cores of a NUMA node of its own
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    found, shards = {}, {}
    for size, backend in ((1, "uni"), (2, "mp")):
        llm = engine(folder(model), SETTINGS[model], tensor_parallel_size=size, distributed_executor_backend=backend)
        try:
            shards[size] = heads_of(llm)
            found[size] = ask(llm, asked)
        finally:
            llm.llm_engine.engine_core.shutdown()
    (whole,) = shards[1]
    assert shards[2] == [whole // 2, whole // 2]
    assert found[2] == found[1] and furthest(found[2], found[1]) < CLOSE
    assert max(found[1].lengths[:12]) < min(found[1].lengths[12:])
