"""The plug-in and the tasks of lmms-eval as far as they need no lmms-eval; the rest is in test_lmms_eval.py."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokenprune.cli import main
from tokenprune.evals.lmms.arguments import read_arguments
from tokenprune.evals.models.chat_template import Clip, one_turn
from tokenprune.evals.tasks.lmms_generation import read_generation
from tokenprune.evals.tasks.lmms_media import Media, frame_places
from tokenprune.evals.tasks.lmms_task import with_folder

RED, BLUE = (Image.new("RGB", (9, 9), colour) for colour in ("red", "blue"))


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({"pretraned": "pocket-llava"}, "Did you write 'pretraned' for it?"),
        ({"metod": "holov", "method": "holov", "keep": 64}, "no argument 'metod'. Did you mean 'method'"),
        ({"method": "holv", "keep": 64}, "Did you mean 'holov'"),
        ({"method": "todre", "keep": 64, "objectiv": "k_center"}, "Did you mean 'objective'"),
        ({"method": "todre", "keep": 64, "objective": "far"}, "objective"),
        ({"method": "holov"}, "how many visual tokens holov keeps"),
        ({"method": "holov", "keep": 1.5}, r"must be in \(0, 1\]"),
        ({"keep": 64}, "leave keep=64 out"),
        ({"variant": "paper"}, "none takes no options"),
        ({"method": "holov+var", "keep": 64, "variant": "paper"}, "takes no options beside it"),
        ({"batch_size": "auto"}, "batch_size must be an integer of at least 1, got 'auto'"),
        ({"dtype": "float8"}, "dtype must be one of"),
        ({"pretrained": "pocket-lava"}, "Did you mean 'pocket-llava'"),
        ({"method": "missing.yaml"}, "missing.yaml"),
        ({"max_frames": 0}, "max_frames must be an integer of at least 1"),
        ({"fps": 0}, "fps must be a number above 0"),
    ],
)
def test_a_wrong_argument_fails_before_anything_loads(given_, says, monkeypatch):
    monkeypatch.setattr("tokenprune.evals.models.load.load_model", None)
    whole = given_ if "pretraned" in given_ else {"pretrained": "pocket-llava", **given_}
    with pytest.raises((ValueError, TypeError, KeyError, OSError), match=says):
        read_arguments(whole)


def test_arguments_ask_for_what_they_say(tmp_path):
    def label(**given_):
        return read_arguments({"pretrained": "pocket-llava", **given_})[1].label

    assert read_arguments({"pretrained": "pocket-llava", "batch_size": "4"})[0].batch_size == 4
    assert read_arguments({"pretrained": "pocket-llava"})[1] is None
    assert label(method="holov", keep=64) == "holov@64" and label(method="holov", keep=0.25) == "holov@0.25"
    assert label(method="fastv", keep="avg400") == "fastv@avg400"
    assert label(method="'vtc_cls@64+var(p=0.4,layers=[0, 1])'") == "vtc_cls@64 + var(layers=[0, 1],p=0.4)"
    _, spec = read_arguments({"pretrained": "pocket-llava", "method": "todre", "keep": 64, "objective": "k_center"})
    assert spec.entries[0].pruner.objective == "k_center"
    _, spec = read_arguments({"pretrained": "pocket-llava", "method": "random", "keep": 64, "seed": 3})
    assert spec.entries[0].pruner.seed == 3
    file = tmp_path / "two.yaml"
    file.write_text("method:\n- {at: input, prune: uniform, keep: 300}\n- {at: 'layer:3', prune: fastv, keep: 64}\n")
    assert label(method=str(file)) == "uniform@300 at input + fastv@64 at layer:3"


def test_generation_settings():
    greedy = read_generation({"max_new_tokens": 16, "temperature": 0, "do_sample": True, "top_p": 1.0}, 99)
    assert greedy.greedy and greedy.settings == {"max_new_tokens": 16, "do_sample": False, "num_beams": 1}
    assert read_generation(None, 99).settings["max_new_tokens"] == 99
    hot = read_generation({"temperature": 0.7, "top_p": 0.9, "image_aspect_ratio": "original"}, 9)
    assert not hot.greedy and hot.settings["temperature"] == 0.7 and "image_aspect_ratio" not in hot.settings
    assert not read_generation({"num_beams": 3}, 9).greedy
    assert not read_generation({"repetition_penalty": 1.2}, 9).greedy
    stops = read_generation({"until": ["\n\n", "ASSISTANT:", "STOP"]}, 9)
    assert stops.cut("a\n\nb STOP c ASSISTANT: d") == "a\n\nb "
    assert stops.cut("nothing here") == "nothing here"
    with pytest.raises(ValueError, match="until in generation_kwargs"):
        read_generation({"until": 3}, 9)


def test_pictures_stand_where_the_text_says():
    media = Media()

    def shape(messages):
        parts = messages[0]["content"]
        return [part.get("text") or ("video" if part["type"] == "video" else part["image"].getpixel((0, 0))[0])
                for part in parts]  # fmt: skip

    assert shape(media.conversation("what", [RED])) == [255, "what"]
    assert shape(media.conversation("first <image> then <image> end", [RED, [BLUE]])) == [
        "first ", 255, " then ", 0, " end",
    ]  # fmt: skip
    assert shape(media.conversation("one <image> mark", [RED, BLUE])) == [255, 0, "one <image> mark"]
    assert shape(media.conversation("no picture", None)) == ["no picture"]
    said = [{"role": "user", "content": [{"type": "image", "url": RED}, {"type": "text", "text": "is <image> it"}]}]
    assert shape(media.messages(said)) == ["is ", 255, " it"]
    with pytest.raises(ValueError, match="takes no audio"):
        media.messages([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}])
    with pytest.raises(ValueError, match="is sound"):
        media.part("a.wav")
    with pytest.raises(ValueError, match=r"a mapping with \['array', 'type'\]"):
        media.part({"type": "audio", "array": [0.0]})


def test_frames_of_an_array_are_spread_over_the_video():
    frames = np.stack([np.full((4, 4, 3), shade, dtype=np.uint8) for shade in range(100)])
    part = Media(max_frames=5).part(frames)
    assert [frame.getpixel((0, 0))[0] for frame in part["video"]] == [0, 20, 40, 60, 80]
    assert len(Media(max_frames=500).part(frames)["video"]) == 100


@given(
    st.integers(1, 5000), st.floats(1, 60), st.floats(0.1, 10), st.integers(1, 64),
    st.none() | st.floats(0, 100), st.none() | st.floats(0, 100),
)  # fmt: skip
def test_frames_of_a_file_are_in_it_and_few_enough(total, rate, fps, most, start, end):
    places = frame_places(total, rate, fps, most, start, end)
    assert 1 <= len(places) <= most and places == sorted(set(places))
    assert places[0] >= 0 and places[-1] < total
    if start is not None and start * rate < total - 1:
        assert places[0] >= int(start * rate)
    if start is None and end is None and round(total / rate * fps) <= min(most, total):
        assert len(places) == max(1, round(total / rate * fps))


def test_a_video_file_is_read_at_two_frames_a_second(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for shade in range(0, 200, 5):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade, dtype=np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    clip = Media().part(str(path))["video"]
    assert isinstance(clip, Clip) and len(clip) == 8 and abs(clip.fps - 2.0) < 0.05  # four seconds
    shades = [frame.getpixel((16, 16))[0] for frame in clip]
    assert all(abs(shade - (5 * 5 * i + 12)) < 12 for i, shade in enumerate(shades)), shades
    part = Media(fps=5).part({"url": str(path), "video_start": 1, "video_end": 2})["video"]
    assert abs(part[0].getpixel((16, 16))[0] - 55) < 12
    with pytest.raises(FileNotFoundError, match="no video"):
        Media().part(str(tmp_path / "missing.mp4"))


def test_prompts_with_no_picture_and_with_several(tiny):
    def ids(question, image):
        return tiny.inputs([question], [image])["input_ids"][0]

    token = tiny.model.config.image_token_id
    per_picture = int((ids("what is", RED) == token).sum())
    assert per_picture == 36
    both = ids("what <image> is <image>", (RED, BLUE))
    assert int((both == token).sum()) == 72 and both[0] != token
    first = (both == token).nonzero()[0].item()
    assert first == 2 and both[first + 36] != token, "a word stands between the pictures"
    assert int((ids("what is", ()) == token).sum()) == 0
    mixed = tiny.inputs(["what", "is this", "one"], [RED, (RED, BLUE), ()])
    assert (mixed["input_ids"] == token).sum(1).tolist() == [36, 72, 0]
    assert one_turn("q", RED) == [{"role": "user", "content": [{"type": "image", "image": RED},
                                                                {"type": "text", "text": "q"}]}]  # fmt: skip


def test_the_driver_answers_prompts_of_none_one_and_two_pictures(tiny, tmp_path):
    from tokenprune.evals.config.points import Point
    from tokenprune.evals.config.run_config import RunConfig
    from tokenprune.evals.evaluation.evaluate import evaluate
    from tokenprune.evals.io.row_store import RowStore
    from tokenprune.evals.tasks.task import Sample, Task

    images = [RED, (RED, BLUE), (), (BLUE,)]
    samples = [Sample(str(i), "all", "what is this", "yes", image) for i, image in enumerate(images)]
    task = Task("mixed", 4, lambda start, stop: iter(samples[start:stop]), lambda said, _: float(bool(said)), 4)
    config = RunConfig("t", "tiny", ["mixed"], ["uniform"], [9], batch_size=3)
    points = [Point("tiny", "mixed", "none", None), Point("tiny", "mixed", "uniform", 9)]
    store = RowStore(tmp_path / "rows.jsonl", ("settings", "point", "sample_id"))
    evaluate(config, tiny, task, points, store)
    rows = list(store.rows())
    assert [r["kept_tokens"] for r in rows if "none" in r["point"]] == [36, 72, 0, 36]
    assert [r["kept_tokens"] for r in rows if "uniform" in r["point"]] == [9, 18, 0, 9]
    text = next(r for r in rows if r["sample_id"] == "2" and "none" in r["point"])["prediction"]
    assert text == next(r for r in rows if r["sample_id"] == "2" and "uniform" in r["point"])["prediction"]


def test_times_and_flops_of_a_prompt_with_two_pictures(tiny):
    from tokenprune.evals.config.measure import Measure
    from tokenprune.evals.config.points import Point
    from tokenprune.evals.profiling.flops import measure_flops
    from tokenprune.evals.profiling.timing import measure_times
    from tokenprune.evals.tasks.task import Sample

    sample = Sample("0", "all", "what <image> is <image>", "yes", (RED, BLUE))
    point = Point("tiny", "mixed", "uniform", 9)
    measured = measure_times(tiny, point, [sample], Measure(samples=1, repeats=1, warmup=0, decode_tokens=2), 0)
    assert measured["kv"]["measured"] == measured["kv"]["analytic"] and measured["kv"]["equivalent_tokens"] == 18
    assert measure_flops(tiny, point, [sample])["agree"]


def test_a_folder_goes_into_the_name():
    assert with_folder("lmms:pope", "my/tasks/") == "lmms:my/tasks/pope"
    assert with_folder("lmms:other/pope", "my/tasks") == "lmms:other/pope"
    assert with_folder("pocket", "my/tasks") == "pocket"


def test_without_lmms_eval_the_task_says_what_to_install(monkeypatch, tiny_folder, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lmms_eval" else find(name, *a))
    assert main(["eval", "--model", tiny_folder, "--tasks", "lmms:nothing", "--method", "none"]) == 2
    assert "pip install 'tokenprune-vlm[lmms]'" in capsys.readouterr().err


def test_answers_depend_on_the_files_and_data_of_a_task(tmp_path):
    from types import SimpleNamespace

    from tokenprune.evals.tasks.lmms_task import _fingerprint

    written = tmp_path / "toy.yaml"
    manager = SimpleNamespace(task_index={"toy": {"yaml_path": str(written)}})

    def made_of(text: str, helper: str, checksum: str, tokens: int = 4) -> str:
        written.write_text(text)
        (tmp_path / "utils.py").write_text(helper)
        docs = type("Docs", (list,), {"info": SimpleNamespace(download_checksums={checksum: 1})})([1, 2])
        return _fingerprint(manager, "toy", SimpleNamespace(eval_docs=docs), {"max_new_tokens": tokens})

    plain = made_of("a: 1", "x = 1", "commit")
    assert plain == made_of("a: 1", "x = 1", "commit")
    changed = [("a: 2", "x = 1", "commit"), ("a: 1", "x = 2", "commit"), ("a: 1", "x = 1", "other")]
    assert len({plain, made_of("a: 1", "x = 1", "commit", 8), *(made_of(*each) for each in changed)}) == 5
    assert _fingerprint(SimpleNamespace(task_index={"toy": {}}), "toy", SimpleNamespace(eval_docs=[1]), {})
