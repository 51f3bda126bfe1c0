"""vLLM's answers on the pocket models against transformers with the same method: token ids, one engine a model.

QUESTIONS=60 asks as many questions of each method on both models; below 60, a method that runs on both is asked on one
of them, drawn by its name.
"""

from __future__ import annotations

import os
import zlib

import numpy as np
import pytest
import torch
from _vllm import ask, engine, folder, furthest, needs_vllm, reference, request, rows, runnable

needs_vllm()

from tokenprune.interfaces.selection import Selection  # noqa: E402
from tokenprune.registry import METHODS as METHODS_BY_NAME  # noqa: E402
from tokenprune.vllm.families import LlavaFamily, QwenFamily  # noqa: E402

QUESTIONS = int(os.environ.get("QUESTIONS", "6"))
FAMILIES = {"llava": LlavaFamily(), "qwen": QwenFamily()}
CLASSES = {"llava": "LlavaForConditionalGeneration", "qwen": "Qwen2_5_VLForConditionalGeneration"}
KEEP = {"llava": "64", "qwen": "0.25"}
CLOSE = 2e-4  # of log-probabilities, in fp32
UNEVEN = ("random", "vispruner")
"""What they keep hangs on last bits. `random` is seeded by the bits of the pixels, of which the last differ between the
processors. `vispruner` drops the tokens that are most alike, pair by pair: in flat parts of a picture many are alike to
the last bit, so another one of a pair leaves, and then others are compared."""


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
        text = None if method is None else f"{method}@{KEEP[model]}"
        positions = "compact" if model == "llava" and method is not None and "(" not in method else None
        if isinstance(count, list):  # requests, of which nothing is known beforehand
            return reference(folder(model), count, text, positions)
        if (method, count, pictures) not in known:
            asked = [request(model, data, index, pictures=pictures) for index in range(count)]
            known[method, count, pictures] = reference(folder(model), asked, text, positions)
        return known[method, count, pictures]

    return of


def test_all_tokens(model, llm, data, expected, record_property):
    record_property("class", CLASSES[model])
    record_property("methods", ", ".join(METHODS[model]))
    asked = [bare(method) for of, method in CELLS if of == model]
    which = "every method" if QUESTIONS >= 60 else ", ".join(asked)
    record_property("on", f"a pocket model: {QUESTIONS} questions each with {which}")
    got = ask(llm, [request(model, data, index, "@1.0") for index in range(QUESTIONS)])
    assert got == expected(None, QUESTIONS)
    assert furthest(got, expected(None, QUESTIONS)) < CLOSE


class Choices:
    """What a method was shown and chose inside vLLM, picture by picture, and the same choices in transformers."""

    def __init__(self, name, monkeypatch):
        self.method, self.patch = METHODS_BY_NAME.get(name), monkeypatch
        self.stock, self.seen, self.other = self.method.select, [], 0

    @staticmethod
    def shown(pruner, view, picture):
        signals = [view.signal(one.name, one.layer, *one.settings) for one in pruner.signals(view.tower)]
        return [values[picture] for values in (view.features, *signals)]

    def record(self):
        def select(pruner, view):
            found = self.stock(pruner, view)
            for place in range(view.num_images):
                parts = {name: value[place : place + 1] for name, value in vars(found).items() if value is not None}
                self.seen.append((self.shown(pruner, view, place), Selection(**parts)))
            return found

        self.patch.setattr(self.method, "select", select)

    def replay(self):
        """Transformers is asked about one picture at a time, which is known by what the method is shown of it."""

        def select(pruner, view):
            own = self.shown(pruner, view, 0)
            kept = next(kept for shown, kept in self.seen if all(map(alike, shown, own)))
            self.other += not torch.equal(kept.indices, self.stock(pruner, view).indices)
            return kept

        self.patch.setattr(self.method, "select", select)


def alike(one, other):
    return one.shape == other.shape and float((one - other).abs().max()) < 1e-5 * float(other.abs().max())


@pytest.mark.parametrize("method", sorted({method for _, method in CELLS}))  # CELLS alone, see conftest
def test_every_method_answers_as_in_transformers(model, llm, data, expected, method, monkeypatch, record_property):
    """The same token ids and log-probabilities. Where another token leaves for another one that is alike to the last
    bit, because the states of the two towers differ by a millionth, the ids are the same and log-probabilities are
    those of transformers given the same choice. Of the methods in UNEVEN no more than that is asked."""
    record_property("class", CLASSES[model])
    llm.reset_prefix_cache()
    llm.llm_engine.reset_encoder_cache()
    choices = Choices(bare(method), monkeypatch)
    choices.record()
    asked = [request(model, data, index, method) for index in range(QUESTIONS)]
    got = ask(llm, asked)
    again = ask(llm, asked)
    assert again == got and sum(again.cached) > 0
    odd = list(range(QUESTIONS))
    monkeypatch.undo()
    if method not in UNEVEN:
        own = expected(method, QUESTIONS)
        assert got == own, method
        odd = [index for index in odd if furthest(got.part([index]), own.part([index])) >= CLOSE]
    choices.replay()
    same = expected(method, [asked[index] for index in odd])
    assert same == got.part(odd) and (not odd or furthest(same, got.part(odd)) < CLOSE), method
    if method not in UNEVEN:
        assert choices.other == len(odd) <= max(1, QUESTIONS // 10), f"{odd} differ though the same tokens stay"
    if choices.other:
        record_property("given", f"{method} ({choices.other} of {QUESTIONS})")


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


@pytest.mark.parametrize("which, dtype", [("llava", "float16"), ("qwen", "bfloat16")])
def test_half_precision(which, dtype):
    """An engine in a model's own dtype starts with every method, which vLLM makes in that dtype by default; answers are
    held against float32, from which few differ."""
    data = rows(which, 6)
    setting = " | ".join(f"{one}@{KEEP[which]}" for one in METHODS[which])
    own = engine(folder(which), setting, dtype=dtype)
    try:
        for method in ("divprune", "uniform", "vtc_cls"):
            asked = [request(which, data, index, method) for index in range(6)]
            got = ask(own, asked)
            positions = "compact" if which == "llava" else None
            expected = reference(folder(which), asked, f"{method}@{KEEP[which]}", positions)
            assert sum(one == other for one, other in zip(got, expected)) >= 5, method
    finally:
        own.llm_engine.engine_core.shutdown()
