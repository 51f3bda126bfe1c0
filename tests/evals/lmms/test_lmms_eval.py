"""The plug-in and the tasks against the real lmms-eval, offline, on a local task folder over the pocket suite.

Skipped where lmms-eval is not installed: `pip install 'tokenprune-vlm[lmms]'`.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from _paths import ROOT

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install 'tokenprune-vlm[lmms]'")

from tokenprune.cli import main  # noqa: E402

FOLDER = "tests/evals/lmms_task"
TASK = f"lmms:{FOLDER}/pocket_lmms"
COUNT = 14


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    """The task's data has a path that starts there."""
    monkeypatch.chdir(ROOT)


def test_the_entry_point_is_found():
    from lmms_eval.models import get_model_manifest

    manifest = get_model_manifest("tokenprune")
    assert manifest.chat_class_path.endswith("model.Chat") and manifest.simple_class_path.endswith("model.Simple")


def ask_lmms_eval(folder: Path, wanted: dict[str, dict[str, Any]]) -> dict[str, tuple[dict, list[dict]]]:
    """Results and sample rows of `python -m lmms_eval`, one process for all of `wanted`."""
    shared = {
        "model": "tokenprune",
        "tasks": "pocket_lmms",
        "include_path": FOLDER,
        "limit": COUNT,
        "log_samples": True,
    }
    runs = [{**shared, "output_path": str(folder / name), **settings} for name, settings in wanted.items()]
    (folder / "runs.yaml").write_text(yaml.safe_dump(runs))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", "lmms_eval", "--config", str(folder / "runs.yaml")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {}
    for name in wanted:
        files = list((folder / name).rglob("*_results.json"))
        assert len(files) == 1, done.stdout[-3000:] + done.stderr[-3000:]
        samples = next(iter((folder / name).rglob("*samples_pocket_lmms.jsonl"))).read_text().splitlines()
        found[name] = json.loads(files[0].read_text()), [json.loads(line) for line in samples]
    return found


@pytest.mark.pocket
def test_the_command_line_of_lmms_eval_and_our_driver_agree_on_every_sample(tmp_path):
    asked = {
        "unpruned": {"model_args": "pretrained=pocket-llava", "batch_size": 4},
        "holov": {"model_args": "pretrained=pocket-llava,method=holov,keep=64", "batch_size": 5, "force_simple": True},
    }
    theirs = ask_lmms_eval(tmp_path, asked)
    command = ["eval", "--tasks", "lmms:pocket_lmms", "--include-path", FOLDER, "--method", "holov", "--keep", "64"]
    command += ["--limit", str(COUNT), "--no-timing", "--output", str(tmp_path / "ours")]
    assert main(command) == 0
    records = [json.loads(line) for line in (tmp_path / "ours" / "results.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (tmp_path / "ours" / "samples.jsonl").read_text().splitlines()]
    for name, series in (("unpruned", "none"), ("holov", "holov")):
        results, samples = theirs[name]
        record = next(record for record in records if record["series"] == series)
        own = {row["sample_id"]: row for row in rows if row["point"] == record["point"]}
        assert len(samples) == len(own) == COUNT
        for sample in samples:
            row = own[str(sample["doc_id"])]
            assert sample["filtered_resps"] == row["prediction"]
            assert sample["pocket_accuracy"] == row["correct"]
        metrics = results["results"]["pocket_lmms"]
        assert metrics["pocket_accuracy,none"] == pytest.approx(record["overall"]["accuracy"])
        assert record["metrics"] == pytest.approx(
            {key: metrics[f"{key},none"] for key in ("pocket_accuracy", "pocket_yes_ratio")}
        )
        assert results["throughput"]["avg_kept_tokens"] == record["kept_tokens"]
        assert results["throughput"]["avg_visual_tokens"] == 576
    accuracy = {record["series"]: record["overall"]["accuracy"] for record in records}
    assert accuracy["none"] != accuracy["holov"], "else equal numbers would say little"
    with (tmp_path / "ours" / "summary.csv").open() as stream:
        last = list(csv.DictReader(stream))[-1]
    assert float(last["metric:pocket_yes_ratio"]) == pytest.approx(records[-1]["metrics"]["pocket_yes_ratio"])
    assert float(last["gflops_total"]) > 0 and last["vs_random_low"]


def test_an_unknown_argument_fails_before_the_model_loads(monkeypatch):
    from lmms_eval.models import get_model

    monkeypatch.setattr("tokenprune.evals.lmms.model.load_model", None)
    with pytest.raises(KeyError, match="Did you mean 'method'"):
        get_model("tokenprune").create_from_arg_string("pretrained=pocket-llava,metod=holov,keep=64", {"batch_size": 1})


def test_unknown_tasks_folders_and_groups_are_refused(capsys):
    def said(*names):
        assert main(["eval", "--tasks", *names, "--method", "none"]) == 2
        return capsys.readouterr().err

    assert "Did you mean 'pocket_lmms'" in said(f"lmms:{FOLDER}/pocket_lms")
    assert "no task folder no/where" in said("lmms:pope", "--include-path", "no/where")
    assert "Did you mean 'pope'" in said("lmms:popee")
    group = said("lmms:mmbench")
    assert "is a group" in group and "lmms:mmbench_en_dev" in group


class FakeModel:
    """Answers of a tiny model through the plug-in's classes, without its command line."""

    def __init__(self, kind: str, docs: list[dict], **arguments: Any) -> None:
        from lmms_eval.models import get_model

        self.lm = get_model("tokenprune", force_simple=kind == "simple")(**arguments)
        self.lm.task_dict = {"toy": {"test": docs}}
        self.kind = kind

    def ask(self, docs: list[dict], settings: dict) -> list[Any]:
        from lmms_eval.api.instance import Instance

        requests = []
        for number in range(len(docs)):
            about = {"task": "toy", "doc_id": number, "repeats": 1}
            if self.kind == "chat":
                arguments = ("", _messages, settings, number, "toy", "test")
            else:
                arguments = (docs[number]["question"], settings, lambda doc: doc["images"], number, "toy", "test")
            requests.append(Instance("generate_until", arguments, 0, about))
        return self.lm.generate_until(requests)


def _messages(doc: dict) -> list[dict]:
    pictures = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": doc["question"]}]}]


@pytest.fixture(scope="module")
def docs() -> list[dict]:
    """Questions with no picture, one and two, the last two at marks."""
    from PIL import Image

    red, blue = (Image.new("RGB", (42, 42), colour) for colour in ("red", "blue"))
    return [
        {"question": "what is this", "images": [red]},
        {"question": "who <image> is <image>", "images": [red, blue]},
        {"question": "where is", "images": []},
        {"question": "what one two three", "images": [blue]},
    ]


def test_chat_and_simple_batches_and_several_pictures_give_the_same_answers(tiny_folder, docs):
    found = {}
    for kind in ("chat", "simple"):
        for size in (1, 3):
            model = FakeModel(
                kind, docs, pretrained=tiny_folder, method="uniform", keep=9, batch_size=str(size), dtype="float32"
            )
            answers = model.ask(docs, {"max_new_tokens": 4, "temperature": 0})
            found[kind, size] = [answer.text for answer in answers]
            assert [kept for _, kept in model.lm._tokens] == [9, 18, 0, 9]
            assert [answer.token_counts.output_tokens <= 4 for answer in answers] == [True] * 4
    assert len({tuple(texts) for texts in found.values()}) == 1 and len(set(found["chat", 1])) > 1
    plain = FakeModel("chat", docs, pretrained=tiny_folder)
    assert len(plain.ask(docs, {"max_new_tokens": 2})) == 4 and plain.lm._tokens[1] == (72, 72.0)


def test_what_it_cannot_do_is_a_sentence(tiny_folder, docs):
    model = FakeModel("simple", docs, pretrained=tiny_folder, method="uniform", keep=9)
    with pytest.raises(NotImplementedError, match="scores likelihoods"):
        model.lm.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one round"):
        model.lm.generate_until_multi_round([])
    with pytest.raises(ValueError, match="needs the boxes"):
        FakeModel("chat", docs, pretrained=tiny_folder, method="oracle", keep=9)


def test_a_task_that_samples_or_has_no_score_a_sample_is_refused(tmp_path, capsys):
    written = (ROOT / FOLDER / "pocket_lmms.yaml").read_text()
    (tmp_path / "utils.py").write_text((ROOT / FOLDER / "utils.py").read_text())
    (tmp_path / "hot.yaml").write_text(
        written.replace("task: pocket_lmms", "task: hot").replace("temperature: 0", "temperature: 0.7")
        .replace("do_sample: false", "do_sample: true")
    )  # fmt: skip
    head, _, rest = written.replace("task: pocket_lmms", "task: vague").partition("  - metric: pocket_accuracy")
    (tmp_path / "vague.yaml").write_text(head + "  - metric: pocket_yes_ratio" + rest.partition("pocket_yes_ratio")[2])
    tasks = f"lmms:{tmp_path}/hot"
    assert main(["eval", "--tasks", tasks, "--method", "none", "--output", str(tmp_path / "out")]) == 2
    assert "asks for sampling or beams" in capsys.readouterr().err
    from tokenprune.evals.tasks.load import load_task

    vague = load_task(f"lmms:{tmp_path}/vague")
    # one metric fails and one writes a file for a server: the others are there all the same
    broken = {**vague.source.aggregation(), "bad": lambda found: 1 / 0, "file": lambda found, args: 1.0}
    vague.source._aggregation_list = broken
    vague._marked["0", "yes"] = {"pocket_yes_ratio": {"said": "yes"}, "bad": 1, "file": 2}
    with pytest.warns(UserWarning, match="bad of .*vague failed: ZeroDivisionError"):
        assert vague.metrics([{"sample_id": "0", "prediction": "yes"}]) == {"pocket_yes_ratio": 1.0}
    with pytest.raises(ValueError, match="give no number for a single sample"):
        vague.mark(next(iter(vague.load(0, 1))), "no")
