"""vLLM's answers on the pocket models against transformers with the same method: token ids, one engine a model.

QUESTIONS=60 asks as many questions of each method on both models; below 60, a method that runs on both is asked on one
of them, drawn by its name.
"""

from __future__ import annotations

import os
import zlib

import numpy as np
import pytest
from _vllm import ask, engine, folder, furthest, needs_vllm, reference, request, rows, runnable

needs_vllm()

from tokenprune.vllm.families import LlavaFamily, QwenFamily  # noqa: E402

QUESTIONS = int(os.environ.get("QUESTIONS", "6"))
FAMILIES = {"llava": LlavaFamily(), "qwen": QwenFamily()}
CLASSES = {"llava": "LlavaForConditionalGeneration", "qwen": "Qwen2_5_VLForConditionalGeneration"}
KEEP = {"llava": "64", "qwen": "0.25"}
CLOSE = 2e-4  # of log-probabilities, in fp32
UNEVEN = ("random", "vispruner")  # what they keep hangs on last bits: see the tests of each


METHODS = {model: runnable(folder(model), family, KEEP[model]) for model, family in FAMILIES.items()}


def bare(method):
    return method.partition("(")[0]


def cells():
    """Each method on each model, as (model, method); below 60 questions a method that runs on both is asked on one: the
    two take turns in an order drawn by name."""
    known = {model: {bare(method) for method in methods} for model, methods in METHODS.items()}
    both = sorted(known["llava"] & known["qwen"], key=lambda name: zlib.crc32(name.encode()))
    left = {"llava": set(both[1::2]), "qwen": set(both[::2])} if QUESTIONS < 60 else {"llava": set(), "qwen": set()}
    return [(model, one) for model, methods in METHODS.items() for one in methods if bare(one) not in left[model]]


CELLS = cells()


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request):
    return request.param


@pytest.fixture(scope="module")
def data(model):
    return rows(model, max(QUESTIONS, 6))


@pytest.fixture(scope="module")
def llm(model):
    made = engine(folder(model), " | ".join(f"{one}@{KEEP[model]}" for one in METHODS[model]))
    yield made
    made.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def expected(model, data):
    """By method and number of pictures, what transformers answers."""
    known = {}

    def of(method, count, pictures=1):
        if (method, count, pictures) not in known:
            asked = [request(model, data, index, pictures=pictures) for index in range(count)]
            text = None if method is None else f"{method}@{KEEP[model]}"
            positions = "compact" if model == "llava" and method is not None and "(" not in method else None
            known[method, count, pictures] = reference(folder(model), asked, text, positions)
        return known[method, count, pictures]

    return of


def test_all_tokens(model, llm, data, expected, record_property):
    record_property("class", CLASSES[model])
    record_property("methods", ", ".join(METHODS[model]))
    asked = [bare(method) for of, method in CELLS if of == model and method not in UNEVEN]
    which = f"{', '.join(UNEVEN)} given the same choice, every other method" if QUESTIONS >= 60 else ", ".join(asked)
    record_property("on", f"a pocket model: {QUESTIONS} questions each with {which}")
    got = ask(llm, [request(model, data, index, "@1.0") for index in range(QUESTIONS)])
    assert got == expected(None, QUESTIONS)
    assert furthest(got, expected(None, QUESTIONS)) < CLOSE


@pytest.mark.parametrize("method", sorted({method for _, method in CELLS}))  # CELLS alone, see conftest
def test_every_method_answers_as_in_transformers(model, llm, data, expected, method, record_property):
    record_property("class", CLASSES[model])
    got = ask(llm, [request(model, data, index, method) for index in range(QUESTIONS)])
    if method not in UNEVEN:
        assert got == expected(method, QUESTIONS), method
        assert furthest(got, expected(method, QUESTIONS)) < CLOSE, method
    again = ask(llm, [request(model, data, index, method) for index in range(QUESTIONS)])
    assert again == got and sum(again.cached) > 0


@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_methods_differ_in_what_they_keep_and_in_nothing_else(
    model, llm, data, monkeypatch, name, record_property
):
    """`random` is seeded by the bits of the pixels, of which the last differ between the processors. `vispruner` drops
    the tokens that are most alike, pair by pair, and in flat parts of a picture many are alike to the last bit: the
    states of both towers differ by a millionth, and so another one of a pair leaves, and then others are compared.
    Given what vLLM's worker kept, transformers answers the same."""
    record_property("class", CLASSES[model])
    from tokenprune.registry import METHODS

    method, seen = METHODS.get(name), []
    stock = method.select

    def record(self, view):
        signals = [view.signal(one.name, one.layer, *one.settings) for one in self.signals(view.tower)]
        seen.append((stock(self, view), signals))
        return seen[-1][0]

    monkeypatch.setattr(method, "select", record)
    keep = "63" if model == "llava" else "0.24"  # of which nothing is cached
    asked = [request(model, data, index, f"{name}@{keep}") for index in range(QUESTIONS)]
    got, left = ask(llm, asked, one_by_one=True), iter(list(seen))

    def replay(self, view):
        kept, signals = next(left)
        for one, vllms in zip(self.signals(view.tower), signals):
            own = view.signal(one.name, one.layer, *one.settings)
            assert float((own - vllms).abs().max()) < 1e-5 * float(own.abs().max()), one.name
        return kept

    monkeypatch.setattr(method, "select", replay)
    expected = reference(folder(model), asked, f"{name}@{keep}")
    assert got == expected and furthest(got, expected) < CLOSE
    assert next(left, None) is None


def test_another_question_on_a_cached_picture(model, llm, data, expected):
    for index in range(3):
        ask(llm, [request(model, data, index, "divprune")])
        other = request(model, data, index, "divprune", question=data[index + 1]["question"])
        got = ask(llm, [other])
        assert got == reference(folder(model), [other], f"divprune@{KEEP[model]}")
        assert got.cached[0] > 0


def test_methods_budgets_and_texts_mixed_in_one_batch(model, llm, data, expected):
    kinds = ["divprune", None, "uniform", "text", "divprune"]
    asked, wanted = [], []
    for place, kind in enumerate(kinds):
        if kind == "text":
            asked.append({"prompt": "USER: what colour is the ring? ASSISTANT:"})
            continue
        asked.append(request(model, data, place, "@1.0" if kind is None else kind))
        wanted.append(expected(kind, QUESTIONS)[place] if place < QUESTIONS else None)
    asked.append(request(model, data, 0, "@16" if model == "llava" else "@0.1"))
    got = ask(llm, asked)
    pictured = [ids for ids, kind in zip(got, kinds) if kind != "text"]
    assert [ids for ids, known in zip(pictured, wanted) if known] == [known for known in wanted if known]
    assert got.lengths[-1] < got.lengths[0]


def test_budgets_share_no_cached_blocks(model, llm, data):
    fresh = request(model, data, 5, "divprune@31" if model == "llava" else "divprune@0.19")
    first = ask(llm, [fresh])
    assert first.cached[0] < first.lengths[0] // 2 and ask(llm, [fresh]) == first
    other = request(model, data, 5, "divprune@30" if model == "llava" else "divprune@0.18")
    assert ask(llm, [other]).cached[0] <= first.cached[0]


def test_three_pictures_in_a_prompt(model, llm, data, expected):
    asked = [request(model, data, index, "divprune", pictures=3) for index in range(3)]
    assert ask(llm, asked) == expected("divprune", 3, 3)


@pytest.mark.parametrize("method", ["divprune", "vtc_cls", "uniform"])
def test_videos(model, llm, data, method, record_property):
    if model == "llava":
        pytest.skip("LLaVA takes no videos")
    record_property("class", CLASSES[model])
    record_property("videos", "yes")
    asked = []
    for index in (0, 2):
        side = {"resample": 0, "size": (224, 224)}
        frames = np.stack([np.asarray(data[index + place]["picture"].resize(**side)) for place in range(4)])
        facts = {
            "fps": 2.0, "duration": 2.0, "total_num_frames": 4, "frames_indices": list(range(4)),
            "video_backend": "opencv", "do_sample_frames": False,
        }  # fmt: skip
        text = f"USER: <|vision_start|><|video_pad|><|vision_end|>{data[index]['question']} ASSISTANT:"
        asked.append({"prompt": text, "multi_modal_data": {"video": [(frames, facts)]}})
    whole = ask(llm, [{**one, "mm_processor_kwargs": {"tokenprune": "@1.0"}} for one in asked])
    assert whole == reference(folder(model), asked, None)
    cut = ask(llm, [{**one, "mm_processor_kwargs": {"tokenprune": method}} for one in asked])
    expected = reference(folder(model), asked, f"{method}@{KEEP[model]}")
    assert cut == expected and furthest(cut, expected) < CLOSE and max(cut.lengths) < min(whole.lengths)


@pytest.mark.parametrize(
    "setting, says",
    [("@0", "at least 1"), ("holv", "not started with the method"), (5, "is a text"), ("@many", "A budget is")],
)
def test_a_bad_request_is_refused_and_disturbs_no_other(model, llm, data, expected, setting, says):
    with pytest.raises(ValueError, match=says):
        ask(llm, [request(model, data, 0, setting)])
    assert ask(llm, [request(model, data, 0, "divprune")])[0] == expected("divprune", QUESTIONS)[0]


def test_prompts_that_leave_no_text_around_a_picture(model, llm, data):
    if model == "llava":
        pytest.skip("1-D positions need none")
    pad = "<|image_pad|>"
    shown = {"image": [data[0]["picture"], data[1]["picture"]]}
    with pytest.raises(ValueError, match="right behind another one"):
        ask(llm, [{"prompt": f"USER: {pad}{pad} what? ASSISTANT:", "multi_modal_data": shown}])
    with pytest.raises(ValueError, match="ends with a picture"):
        ask(llm, [{"prompt": f"USER: {pad}", "multi_modal_data": {"image": shown["image"][:1]}}])


@pytest.mark.parametrize("which", list(FAMILIES))
def test_chunks_shorter_than_a_picture(which):
    data = rows(which, 6)
    own = engine(
        folder(which), f"divprune@{KEEP[which]}", max_num_batched_tokens=40, max_num_seqs=4, enable_prefix_caching=False
    )
    asked = [request(which, data, index) for index in range(4)] + [request(which, data, 0, pictures=3)]
    got = ask(own, asked)
    positions = "compact" if which == "llava" else None
    assert got == reference(folder(which), asked, f"divprune@{KEEP[which]}", positions)
    own.llm_engine.engine_core.shutdown()
