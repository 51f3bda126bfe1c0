"""Requests that run at the same time on one wrapped model know nothing of each other."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from _families import batch_of, family
from _tiny import IMAGE, prompts, tiny_llava

import tokenprune

VAR = "var(channels=[1, 2], tau=0.1)"
LAYOUTS = [(layout, seed) for layout in ("one_left", "ragged_left", "ragged_right") for seed in (1, 2, 3)]


def ask(model: Any, handle: Any, batch: dict[str, Any], **more: Any) -> tuple[Any, ...]:
    """Tokens, logits and kept indices of one request."""
    with handle.watch() as passes, torch.no_grad():
        output = model.generate(
            **batch, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True, **more
        )
    kept = [[tokens.tolist() for tokens in row] for row in passes[0].kept]
    return output.sequences.tolist(), torch.stack(output.logits), kept


def at_once(function: Any, jobs: list[Any], threads: int = 8) -> list[Any]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, jobs))


@pytest.mark.parametrize(
    ("name", "methods", "requests"),
    [
        pytest.param("llava", ["uniform@9", "fastv@9"], 200, marks=pytest.mark.slow),
        ("llava", ["vtc_cls@9", "flowcut@9", "transprune@9", "vflowopt@9", ["todre@12", VAR]], 48),
        pytest.param("qwen2_5_vl", ["fastv@9", "flowcut@9", "holov@9", ["random@12", VAR]], 48, marks=pytest.mark.slow),
        ("smolvlm", ["todre@9"], 48),
    ],
    ids=["llava-200", "llava", "qwen2_5_vl", "smolvlm"],
)
def test_concurrent_requests_equal_sequential_ones(name: str, methods: list[Any], requests: int) -> None:
    model = family(name)
    batches = [batch_of(name, layout, seed) for layout, seed in LAYOUTS]
    for method in methods:
        with tokenprune.applied(model, method) as handle:
            alone = [ask(model, handle, batch) for batch in batches]
            jobs = random.Random(0).choices(range(len(batches)), k=requests)
            for job, found in zip(jobs, at_once(lambda job, h=handle: ask(model, h, batches[job]), jobs)):
                assert found[0] == alone[job][0] and found[2] == alone[job][2], (method, LAYOUTS[job])
                assert torch.equal(found[1], alone[job][1]), (method, LAYOUTS[job])


def test_drafts_beams_and_failures_of_one_thread_are_not_anothers() -> None:
    model = tiny_llava()
    batches = [prompts([1], seed=seed) for seed in range(4)]
    # an image token in the answer is refused by the stock model where it has no cache
    ways = [{}, {"num_beams": 2}, {"use_cache": False, "suppress_tokens": [IMAGE]}]

    def request(job: int) -> Any:
        if job % 7 == 6:  # a malformed picture
            with pytest.raises(ValueError, match="image tokens"):
                model(**{**batches[0], "pixel_values": batches[0]["pixel_values"][:0]})
            return None
        output = model.generate(**batches[job % 4], max_new_tokens=4, do_sample=False, **ways[job % 3])
        return output.tolist()

    with tokenprune.applied(model, "fastv@9"), torch.no_grad():
        alone = [request(job) for job in range(42)]
        assert at_once(request, list(range(42))) == alone


def test_hints_are_the_threads_own_and_the_appliers_for_those_without() -> None:
    model, batch = tiny_llava(), prompts([1])
    boxes = [[[0.0, 0.0, 0.5, 0.5]], [[0.5, 0.5, 1.0, 1.0]]]
    with tokenprune.applied(model, "oracle@9") as handle:

        def kept(box: Any) -> list[int]:
            if box is not None:
                handle.set_hints(boxes=[box])
            barrier.wait(30)
            return ask(model, handle, batch)[2][0][0]

        barrier = threading.Barrier(1)
        alone = [kept(box) for box in boxes]
        handle.set_hints(boxes=[boxes[0]])
        barrier = threading.Barrier(3)
        assert at_once(kept, [*boxes, None], 3) == [*alone, alone[0]]


def test_an_intervention_that_still_learns_sees_prompts_one_by_one() -> None:
    model = tiny_llava()
    batches = [prompts([1], seed=seed) for seed in range(8)]
    with tokenprune.applied(model, "var(calibrate=6)") as handle:
        at_once(lambda batch: ask(model, handle, batch), batches)
        assert handle.method.wants_prompts == 0
        learned = handle.method.discovery
    assert learned is not None and learned.prompts == 6


def test_a_thread_sees_its_own_passes_and_the_handle_the_last_of_any() -> None:
    model = tiny_llava()
    with tokenprune.applied(model, "uniform@9") as handle:
        with handle.watch() as mine:
            ask(model, handle, prompts([1]))
            at_once(lambda count: ask(model, handle, prompts([count])), [3], 1)
        assert [len(view.kept[0]) for view in mine] == [1] and len(handle.kept[0]) == 3
        assert mine[0].report().visual_tokens == 36 and handle.report().visual_tokens == 108
        ask(model, handle, prompts([2]))
        seen = weakref.ref(mine)
        assert len(mine) == 1
        del mine
        gc.collect()
        assert seen() is None, "a list that no longer watches is held by nobody"


@pytest.mark.parametrize("token", [1, 3])
def test_a_method_is_not_removed_in_the_middle_of_a_call(token: int) -> None:
    """Half a prompt would be pruned, or its cache would go on as if it knew nothing of that, and no one would see."""
    model, batch, failed = tiny_llava(), prompts([1]), []
    inside, removing = threading.Event(), threading.Event()
    handle = tokenprune.apply(model, "uniform@9")
    calls: list[None] = []

    def hold(*_: Any) -> None:
        calls.append(None)
        if len(calls) == token:
            inside.set()
            removing.wait(10)
            time.sleep(0.3)  # in which a remove() that does not wait is done

    def run() -> None:
        try:
            model.generate(**batch, max_new_tokens=5, do_sample=False)
        except RuntimeError as error:
            failed.append(str(error))

    handle.adapter.layers[1].register_forward_pre_hook(hold)
    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(30)
    removing.set()
    handle.remove()
    thread.join(30)
    assert len(failed) == 1 and "holds a pruned prompt, and the model that goes on from it has no method" in failed[0]
    assert len(calls) == token  # that call came to its end, and no other began


def test_a_call_without_an_end_does_not_hold_a_remove_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenprune.handle._PATIENCE", 0.2)
    model, inside, go = tiny_llava(), threading.Event(), threading.Event()
    handle = tokenprune.apply(model, "uniform@9")

    def hold(*_: Any) -> None:
        inside.set()
        go.wait(30)

    hook = handle.adapter.layers[1].register_forward_pre_hook(hold)
    thread = threading.Thread(target=lambda: model(**prompts([1])))
    thread.start()
    assert inside.wait(30)
    with pytest.raises(RuntimeError, match=r"Another thread has been in one forward call .* call remove\(\) again"):
        handle.remove()
    go.set()
    thread.join(30)
    hook.remove()
    handle.remove()
    assert "removed" in repr(handle)
