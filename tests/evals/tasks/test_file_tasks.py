"""Tasks as YAML files: those that are packaged, choices, and a dataset folder on disk."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml
from _paths import ROOT
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Picture

from tokenprune.cli import main
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.evaluation.applied_method import settings_digest
from tokenprune.evals.evaluation.scored import scored
from tokenprune.evals.models.load import LoadedModel
from tokenprune.evals.tasks.load import count_samples, load_task, task_fingerprint
from tokenprune.evals.tasks.task import Task
from tokenprune.evals.tasks.yaml_task import _answer, _choices, _exact, _letter, _vqa, read_spec

PACKAGED = sorted((ROOT / "configs" / "tasks").glob("*.yaml"))


@pytest.fixture(scope="module")
def science(tmp_path_factory) -> Path:
    """A folder laid out like the packaged ScienceQA task's dataset, its task file beside it."""
    folder = tmp_path_factory.mktemp("science")
    rows = [
        {
            "image": Picture.new("RGB", (42, 42), (40 * i, 0, 0)) if i != 2 else None,
            "question": ["what is this", "where {choices}", "who", "what"][i],
            "choices": [["one", "two"], ["red", "blue", "three"], ["yes", "no"], ["two", "one"]][i],
            "answer": [1, 2, 0, 1][i],
            "hint": ["", "this is red", None, "nan"][i],
        }
        for i in range(4)
    ]
    features = Features({"image": Image(), "question": Value("string"), "choices": List(Value("string")),
                         "answer": Value("int8"), "hint": Value("string")})  # fmt: skip
    data = Dataset.from_list(rows, features=features)
    (folder / "data").mkdir()
    data.to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    spec = yaml.safe_load(next(file for file in PACKAGED if file.stem == "scienceqa_img").read_text())
    (folder / "task.yaml").write_text(yaml.safe_dump({**spec, "data": "data", "subset": None, "max_new_tokens": 2}))
    return folder


@pytest.mark.parametrize("file", PACKAGED, ids=lambda file: file.stem)
def test_packaged_tasks_are_valid_and_every_line_is_explained(file):
    spec = read_spec(file)
    assert spec["name"] == file.stem and spec["split"] and "/" in spec["data"]
    assert all("#" in line for line in file.read_text().splitlines() if line.rstrip() != "columns:")
    assert "{question}" in spec["prompt"]
    assert main(["eval", "--tasks", str(file), "--method", "none", "--limit", "0"]) == 2  # valid but for the limit


def test_there_are_packaged_tasks():
    assert {file.stem for file in PACKAGED} >= {"pope", "textvqa", "scienceqa_img", "mmbench_en_dev"}


def test_choices_context_and_letters(science):
    task = load_task(str(science / "task.yaml"))
    samples = list(task.load(0, 4))
    ask = "Answer with the option's letter from the given choices directly."
    assert samples[0].question == f"what is this\nA. one\nB. two\n{ask}"
    assert samples[1].question == f"this is red\nwhere {{choices}}\nA. red\nB. blue\nC. three\n{ask}"
    assert [sample.answer for sample in samples] == ["B", "C", "A", "B"]
    assert samples[2].image == () and samples[3].question.startswith("what\nA. two")
    assert [task.mark(samples[0], said) for said in ("B", "B. two", "(B)", "b", "A", "Banana", "")] == [
        1, 1, 1, 1, 0, 0, 0,
    ]  # fmt: skip


def test_a_dataset_folder_is_evaluated(science, tiny_folder, tmp_path):
    command = ["eval", "--model", tiny_folder, "--tasks", str(science / "task.yaml"), "--method", "uniform", "--keep"]
    assert main([*command, "9", "--no-timing", "--no-references", "--output", str(tmp_path)]) == 0
    with (tmp_path / "summary.csv").open() as stream:
        last = list(csv.DictReader(stream))[-1]
    assert last["n"] == "4" and float(last["kept_tokens"]) == 9 * 3 / 4  # one question has no picture


def test_choices_in_columns_of_their_own(tmp_path):
    rows = [{"image": Picture.new("RGB", (9, 9)), "question": "q", "A": "x", "B": "y", "C": "nan", "answer": "B"}]
    features = Features({"image": Image(), **{name: Value("string") for name in ("question", "A", "B", "C", "answer")}})
    DatasetDict({"dev": Dataset.from_list(rows, features=features)})["dev"].to_parquet(tmp_path / "rows.parquet")
    spec = {"data": "rows.parquet", "columns": {"choices": ["A", "B", "C"]}, "match": "letter",
            "prompt": "{question} {choices}"}  # fmt: skip
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(spec))
    sample = next(load_task(str(tmp_path / "t.yaml")).load(0, 1))
    assert sample.question == "q A. x\nB. y" and sample.answer == "B"
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({**spec, "columns": {"choices": ["A", "BB"]}}))
    with pytest.raises(ValueError, match="no column 'BB'"):
        load_task(str(tmp_path / "t.yaml"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"promt": "x"}, "unknown key 'promt'. Did you mean 'prompt'"),
        ({"columns": {"choice": "x"}}, "unknown column 'choice'. Did you mean 'choices'"),
        ({"prompt": "{questoin}"}, "unknown place {questoin}. Did you mean 'question'"),
        ({"prompt": "{question} {choices}"}, "columns do not say where choices is"),
        ({"match": "letter"}, "needs the choices"),
        ({"match": "letters"}, "Did you mean 'letter'"),
        ({"prompt": None}, "prompt in"),
        ({"prompt": {"question": None}}, "must be a text, got {'question': None}; put it in quotes"),
        ({"split": 2017}, "must be a text, got 2017"),
        ({"data": ["a", "b"]}, "must be a text, got ['a', 'b']"),
        ({"match": ["exact"]}, "must be a text, got ['exact']"),
        ({"columns": 3}, "must be a mapping, got 3"),
        ({"columns": {1: "x"}}, "unknown column 1"),
        ({1: "x"}, "unknown key 1"),
        ({"columns": {"image": ["x"]}}, "image in columns of"),
        ({"columns": {"choices": ["A", 2]}}, "must be the name of a column, or a list of names, got ['A', 2]"),
        ({"name": " "}, "is empty; write something or leave the key out"),
        ({"max_new_tokens": 0}, "must be an integer of at least 1, got 0"),
        (
            {"data": "t.yaml", "split": "test"},
            "is 'test', and a single file has none; leave split out",
        ),
        ({"data": "t.yaml", "subset": "hard"}, "leave subset out"),
    ],
)
def test_a_wrong_file_is_refused_before_any_data(change, says, tmp_path):
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"data": "no/where", **change}))
    with pytest.raises(ValueError) as error:
        read_spec(tmp_path / "t.yaml")
    assert says in str(error.value)


def test_vqa_accuracy_leaves_each_person_out_once():
    answers = ["red"] * 2 + ["blue"] * 8
    assert _vqa("Red.", answers) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert _vqa("the blue", answers) == 1.0 and _vqa("green", answers) == 0.0
    assert _vqa("red", ["red"] * 4 + ["x"] * 6) == 1.0
    assert _letter("C) cat", "C") == 1.0 and _letter("Cat", "C") == 0.0


def test_answers_to_another_task_are_not_reused(tmp_path):
    """The digest under which answers are filed, and whether a plan knows it without loading the data."""
    file, data = tmp_path / "t.yaml", tmp_path / "rows.parquet"
    config, model = RunConfig("r", "m", [str(file)], ["none"]), LoadedModel("m", None, None, "weights")

    def filed(spec: dict, answers: str = "yn") -> str:
        rows = [{"image": Picture.new("RGB", (9, 9)), "question": "q", "answer": answer} for answer in answers]
        features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
        Dataset.from_list(rows, features=features).to_parquet(data)
        file.write_text(yaml.safe_dump({"data": "rows.parquet", **spec}))
        made_of = load_task(str(file)).fingerprint
        assert made_of and made_of == task_fingerprint(str(file))
        return settings_digest(config, model, made_of)

    plain = filed({})
    assert filed({}) == plain and filed({"name": "called otherwise"}) == plain
    changed = [{"prompt": "{question}?"}, {"match": "contains"}, {"max_new_tokens": 2}]
    assert len({plain, *map(filed, changed), filed({}, "nn")}) == 5


def test_a_dataset_folder_has_the_same_fingerprint_whenever_it_is_loaded(science):
    name = str(science / "task.yaml")
    assert task_fingerprint(name) is None  # only its data would tell
    made_of = load_task(name).fingerprint
    assert made_of and made_of == load_task(name).fingerprint
    assert load_task("pocket:count").fingerprint == task_fingerprint("pocket") != task_fingerprint("pocket-mixed")


@pytest.mark.parametrize(
    ("said", "right", "wrong"),
    [
        ("A", ("A", "a", "A.", "(A)"), ("", "the", "B", ".")),
        ("5", ("5", "5.", "the 5"), ("-5", "5%", "0.5", "\u22125", ".5")),
        ("-5", ("-5", "\u22125", "(-5)"), ("5", "5-")),
        ("5%", ("5 %", "5%."), ("5",)),
        ("3.5", ("3.5", "3.5."), ("35", "3 5", "3")),
        ("+", ("+", " + "), ("-", "", "*")),
        ("a red cat", ("Red cat!", "the red, cat"), ("red", "")),
        ("10-5", ("10 5", "10 - 5"), ("105",)),
    ],
)
def test_exact_tells_letters_numbers_and_signs_apart(said, right, wrong):
    assert [other for other in right if not _exact(other, said) or not _exact(said, other)] == []
    assert [other for other in wrong if _exact(other, said) or _exact(said, other)] == []


def test_an_empty_choice_moves_no_letter():
    row = {"A": "x", "B": None, "C": " ", "D": "y"}
    choices = _choices(row, list("ABCD"))
    assert choices == {"A": "x", "D": "y"} == _choices({"all": ["x", "", "nan", "y"]}, "all")
    assert [_answer(given, choices) for given in ("y", "D", 3, 1, "0", 40)] == ["D", "D", "D", 1, "A", 40]
    assert _answer("2", {"A": "2", "B": "1"}) == "A" and _answer(3, {}) == 3


def test_an_id_that_is_there_twice_is_refused_before_the_work(tmp_path):
    rows = [{"image": Picture.new("RGB", (9, 9)), "question": "q", "answer": "y", "key": key} for key in (3, 4, 3)]
    features = Features(
        {"image": Image(), **dict.fromkeys(("question", "answer"), Value("string")), "key": Value("int8")}
    )
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "t.yaml").write_text("data: rows.parquet\ncolumns: {id: key}\n")
    with pytest.raises(ValueError, match="the column 'key' has '3' twice"):
        load_task(str(tmp_path / "t.yaml"))


def test_pictures_are_looked_for_beside_their_data_file(tmp_path, monkeypatch):
    inside, here = tmp_path / "sub", tmp_path / "here"
    (inside / "pics").mkdir(parents=True)
    here.mkdir()
    Picture.new("RGB", (42, 42), "red").save(inside / "pics" / "a.png")
    Picture.new("RGB", (42, 42), "blue").save(here / "b.png")
    rows = [{"image": name, "question": "what", "answer": "red"} for name in ("pics/a.png", "b.png")]
    rows.append({"image": None, "question": "what", "answer": "red"})
    (inside / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (inside / "mine.yaml").write_text("data: d.jsonl\n")
    monkeypatch.chdir(here)
    found = list(load_task(str(inside / "mine.yaml")).load(0, 3))
    assert [sample.image.getpixel((0, 0)) if sample.visuals else None for sample in found] == [
        (255, 0, 0), (0, 0, 255), None,
    ]  # fmt: skip


def _own(folder: Path, rows: list[dict], settings: str) -> Task:
    """A task of `rows` with one picture."""
    Picture.new("RGB", (9, 9)).save(folder / "a.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"image": "a.png", **row}) + "\n" for row in rows))
    (folder / "own.yaml").write_text(f"data: rows.jsonl\n{settings}")
    return load_task(str(folder / "own.yaml"))


@pytest.mark.parametrize(
    ("answers", "letters"),
    [([1, 2], "BC"), (["1", "0"], "BA"), ([1, 9], "A?"), (["1", "cat"], "AA"), (["3", "1"], "CB")],
    ids=["numbers", "numbers as texts", "a number of none", "texts", "the text of a choice, no number of one"],
)
def test_numbers_of_choices_are_numbers_where_choices_are_numbers_too(answers, letters, tmp_path):
    rows = [
        {"question": "how many", "answer": answers[0], "choices": ["1", "2", "3"]},
        {"question": "who", "answer": answers[1], "choices": ["cat", "dog", "cow"]},
    ]
    task = _own(tmp_path, rows, "columns: {choices: choices}\nmatch: letter\n")
    found = [sample.answer for sample in task.load(0, 2)]
    assert "".join(one if one in ("A", "B", "C") else "?" for one in found) == letters


@pytest.mark.parametrize(
    ("row", "match", "says"),
    [
        ({"answer": None}, "exact", "no answer"),
        ({"answer": []}, "vqa", "no answer"),
        ({"answer": 4}, "letter", "The answer 4 is no letter"),
        ({"answer": "a cow"}, "letter", "no choice's text"),
    ],
)
def test_a_sample_that_cannot_be_right_is_a_failed_one(row, match, says, tmp_path):
    rows = [{"question": "q", "choices": ["cat", "dog"], **row}]
    task = _own(tmp_path, rows, f"columns: {{choices: choices}}\nmatch: {match}\n")
    (sample,) = task.load(0, 1)
    found = scored(task, sample, "None")
    assert found["correct"] is None and says in found["error"]


def test_a_sample_without_a_question_is_not_asked_none(tmp_path):
    task = _own(tmp_path, [{"question": None, "answer": "x"}], "")
    with pytest.raises(ValueError, match="no question"):
        list(task.load(0, 1))


def test_samples_of_an_array_are_counted(tmp_path):
    task = _own(tmp_path, [{"question": "q", "answer": "x"}], "")
    rows = [{"image": "a.png", "question": f"q{i}", "answer": "x"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows, indent=1))
    assert count_samples(str(tmp_path / "own.yaml")) == load_task(str(tmp_path / "own.yaml")).size == 3 != task.size
