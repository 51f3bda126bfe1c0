"""vLLM's other model classes on tiny random weights against transformers with the same method: token ids, one engine a
class. `pytest tests/serving --classes docs/guides/serving_vllm.md` writes what was found into the guide."""

from __future__ import annotations

import pytest
from _vllm import ask, engine, furthest, hugging_face, needs_vllm, reference, runnable
from PIL import Image

needs_vllm()

from _served_classes import CLASSES, prompt, save  # noqa: E402

from tokenprune.vllm.families import FAMILIES  # noqa: E402

SIZES = [(300, 200), (90, 260), (224, 224), (180, 70)]
TRIED = ("uniform", "divprune", "vtc_cls", "holov", "pool")  # a stride, features, [CLS] or its stand-in, both, merging
CLOSE = 2e-4
KEEP = "0.3"


def picture(number: int) -> Image.Image:
    """A picture of coloured noise in large patches: another one for each number."""
    import numpy as np

    values = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(SIZES[number % len(SIZES)], Image.Resampling.BICUBIC)


def request(name, count=1, start=0, setting=None):
    made = {
        "prompt": prompt(name, count),
        "multi_modal_data": {"image": [picture(start + place) for place in range(count)]},
    }
    return made if setting is None else {**made, "mm_processor_kwargs": {"tokenprune": setting}}


@pytest.fixture(scope="module", params=list(CLASSES))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    found = tmp_path_factory.mktemp(name)
    save(name, found)
    return str(found)


@pytest.fixture(scope="module")
def methods(name, folder):
    found = runnable(folder, FAMILIES[CLASSES[name]], KEEP)
    return [text for text in found if text.partition("(")[0] in TRIED]


@pytest.fixture(scope="module")
def llm(name, folder, methods):
    counts = {"image": 3, "video": 2} if "video" in FAMILIES[CLASSES[name]].kinds else {"image": 3}
    made = engine(folder, " | ".join(f"{one}@{KEEP}" for one in methods), limit_mm_per_prompt=counts)
    yield made
    made.llm_engine.engine_core.shutdown()
    hugging_face.cache_clear()


def test_answers_of_every_class(name, folder, llm, methods, record_property):
    record_property("class", CLASSES[name])
    record_property("methods", ", ".join(runnable(folder, FAMILIES[CLASSES[name]], KEEP)))
    record_property("on", f"tiny random weights: {len(SIZES)} sizes of pictures each with {', '.join(methods)}")
    asked = [request(name, start=number) for number in range(len(SIZES))]
    asked += [request(name, 2, 3), request(name, 3, 1)]
    compare(folder, llm, asked, methods)
    assert {"uniform", "divprune"} <= {method.partition("(")[0] for method in methods}


def compare(folder, llm, asked, methods):
    """Whole and with each method, an engine's answers are those of transformers, and cut prompts are shorter."""
    whole = ask(llm, [{**one, "mm_processor_kwargs": {"tokenprune": "@1.0"}} for one in asked], ignore_eos=True)
    expected = reference(folder, asked, None)
    assert whole == expected and furthest(whole, expected) < CLOSE
    for method in methods:
        got = ask(llm, [{**one, "mm_processor_kwargs": {"tokenprune": method}} for one in asked], ignore_eos=True)
        expected = reference(folder, asked, f"{method}@{KEEP}")
        assert got == expected, method
        assert furthest(got, expected) < CLOSE, method
        assert all(cut < full for cut, full in zip(got.lengths, whole.lengths))


def video(number, side, frames, rate):
    """Frames of coloured noise and what vLLM is told of them, so many frames a second."""
    import numpy as np

    values = np.random.default_rng(number).integers(0, 255, (frames, 4, 4, 3), dtype=np.uint8)
    large = [np.asarray(Image.fromarray(one).resize(side, Image.Resampling.BICUBIC)) for one in values]
    facts = {
        "fps": rate, "duration": frames / rate, "total_num_frames": frames, "frames_indices": list(range(frames)),
        "video_backend": "opencv", "do_sample_frames": False,
    }  # fmt: skip
    return np.stack(large), facts


def test_videos_are_cut_as_in_transformers(name, folder, llm, methods, record_property):
    family = FAMILIES[CLASSES[name]]
    if "video" not in family.kinds:
        pytest.skip("no videos in this class")
    videos = [video(0, (64, 64), 4, 2.0), video(1, (96, 64), 6, 0.5), video(2, (64, 96), 4, 4.0)]
    record_property("class", CLASSES[name])
    record_property("videos", "yes")
    asked = [
        {"prompt": prompt(name, len(shown), "video"), "multi_modal_data": {"video": shown}}
        for shown in (videos[:1], videos[1:2], videos[1:])
    ]
    both = {"video": videos[:1], "image": [picture(1)]}
    asked.append({"prompt": prompt(name, 1, "video") + prompt(name, 1), "multi_modal_data": both})
    compare(folder, llm, asked, methods)


def test_videos_are_refused_with_a_sentence(name, llm):
    import numpy as np

    family = FAMILIES[CLASSES[name]]
    if not family.no_videos:
        pytest.skip("videos are cut, or none in this class")
    frames = np.zeros((4, 64, 64, 3), np.uint8)
    facts = {"fps": 2.0, "duration": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}
    video = (frames, {**facts, "video_backend": "opencv", "do_sample_frames": False}) if "qwen" in name else frames
    with pytest.raises(ValueError, match="takes no videos on this model: .* Ask one without it"):
        ask(llm, [{"prompt": prompt(name, 1, "video"), "multi_modal_data": {"video": [video]}}])
