"""A task of one's own as a YAML file: any dataset of pictures, questions and answers, on disk or on the hub.

    name: my_task                 # shown in tables
    data: questions.parquet       # parquet or jsonl, or a dataset folder, beside this file; or the id of a hub dataset
    subset: default               # of a hub dataset that has several
    split: test                   # of a folder or a hub dataset; a single file has neither
    columns: {image: image, question: question, answer: answer, choices: choices, context: hint, family: category,
              id: id, boxes: boxes}
    prompt: "{question}"          # what is asked; {choices} are lines such as "A. red", {context} ends in a line break
    match: exact                  # exact | contains | letter | vqa
    max_new_tokens: 16            # length of an answer, tokens

`columns` says what the dataset calls each; those that are left out have the name of their key (image, question, answer)
or are not used (the rest). `choices` is a column of lists, or a list of columns: `[A, B, C, D]`; empty ones are no
choice, and the others keep their letters. Then an answer is a letter, the text of a choice or its number, counted
from 0. Where all answers are numbers of choices, and one of them is no choice's text, they are numbers throughout: 1 is
the second of the choices 1, 2 and 3.

A sample without an answer is a failed one, and so is a question or, with match: letter, an answer that is none.

exact: the same text, in lower case, without articles and punctuation (but for the sign, the point and the percent sign
of numbers); with a list of answers any of them. contains: the answer stands in the prediction. letter: the prediction
begins with the letter of the answer. vqa: the VQA accuracy, the share of ten people's answers up to three that agree,
each person left out once.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tokenprune.evals.io.digest import digest, file_digest
from tokenprune.evals.tasks.task import Sample, Task
from tokenprune.plan.expression import read_yaml
from tokenprune.registry import near

_KEYS = ("name", "data", "subset", "split", "columns", "prompt", "match", "max_new_tokens")
_COLUMNS = ("image", "question", "answer", "choices", "context", "family", "id", "boxes")
_PLACES = ("question", "choices", "context")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# sign, point and percent sign of a number, as a group; or punctuation
_MARKS = re.compile(r"((?<!\w)-(?=\.?\d)|(?<!\w)\.(?=\d)|(?<=\d)\.(?=\d)|(?<=\d)%)|[^\w\s]")


def normalise(text: Any) -> str:
    """Lower case, without punctuation, articles and double spaces; sign, point and percent sign of a number stay.

    What is nothing but articles keeps them, and what is nothing but punctuation stays as it is: "A" may be the letter
    that was asked for, and "+" is not "-".
    """
    plain = " ".join(str(text).lower().replace("\u2212", "-").split()).replace(" %", "%")
    words = _MARKS.sub(lambda match: match.group(1) or " ", plain).split()
    return " ".join(word for word in words if word not in ("a", "an", "the")) or " ".join(words) or plain


def _several(answer: Any) -> list[Any]:
    return list(answer) if isinstance(answer, (list, tuple)) else [answer]


def _exact(prediction: str, answer: Any) -> float:
    return float(any(normalise(prediction) == normalise(item) for item in _several(answer)))


def _contains(prediction: str, answer: Any) -> float:
    return float(any(f" {normalise(item)} " in f" {normalise(prediction)} " for item in _several(answer)))


def _letter(prediction: str, answer: Any) -> float:
    if not re.fullmatch(r"[A-Za-z]", str(answer).strip()):
        raise ValueError(
            f"The answer {answer!r} is no letter, no choice's text and no number of a choice, counted from 0, so that "
            "nothing that a model says would be right."
        )
    letter = re.match(r"\W*([A-Z])\b", prediction) or re.fullmatch(r"\W*([a-z])\W*", prediction)
    return float(bool(letter) and letter.group(1).upper() == str(answer).strip().upper())


def _vqa(prediction: str, answer: Any) -> float:
    same = [normalise(item) == normalise(prediction) for item in _several(answer)]
    if len(same) == 1:
        return float(same[0])
    others = [sum(same) - alike for alike in same]
    return sum(min(1.0, count / 3) for count in others) / len(others)


_MATCHES: dict[str, Callable[[str, Any], float]] = {
    "exact": _exact, "contains": _contains, "letter": _letter, "vqa": _vqa,
}  # fmt: skip


def _mark(match: str, prediction: str, answer: Any) -> float:
    """The score of a prediction by one of `_MATCHES`.

    Raises:
        ValueError: there is no answer: a score would say something of the data, and nothing of the model.
    """
    if not [one for one in _several(answer) if one is not None]:
        raise ValueError("It has no answer to be marked by. Is the split one whose answers are not public?")
    return _MATCHES[match](prediction, answer)


def read_spec(path: Path) -> dict[str, Any]:
    """The settings in a task file; reads no data.

    Raises:
        FileNotFoundError, ValueError: no such file, an unknown key (with near matches) or a value that cannot work.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no task file {path}.")
    spec = read_yaml(path)
    if not isinstance(spec, dict) or "data" not in spec:
        raise ValueError(f"The task file {path} must hold a mapping with at least the key 'data'.")
    for key in spec:
        if key not in _KEYS:
            raise ValueError(f"The task file {path} has an unknown key {key!r}.{near(str(key), list(_KEYS))}")
    for key in ("data", "subset", "split", "prompt", "match"):
        # prompt: {question} without quotes is a mapping to YAML
        if key in spec and not isinstance(spec[key], str) and (spec[key] is not None or key in ("data", "match")):
            raise ValueError(f"{key} in {path} must be a text, got {spec[key]!r}; put it in quotes.")
    columns = spec.get("columns") or {}
    if not isinstance(columns, dict):
        raise ValueError(f"columns in {path} must be a mapping, got {columns!r}.")
    for key in columns:
        if key not in _COLUMNS:
            raise ValueError(f"The task file {path} has an unknown column {key!r}.{near(str(key), list(_COLUMNS))}")
        names = columns[key] if isinstance(columns[key], list) and key == "choices" else [columns[key]]
        if not names or not all(isinstance(name, str) for name in names):
            kinds = "the name of a column, or a list of names" if key == "choices" else "the name of a column"
            raise ValueError(f"{key} in columns of {path} must be {kinds}, got {columns[key]!r}.")
    for key in ("name", "prompt"):
        if key in spec and (spec[key] is None or not str(spec[key]).strip()):
            raise ValueError(f"{key} in {path} is empty; write something or leave the key out.")
    length = spec.get("max_new_tokens", 16)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"max_new_tokens in {path} must be an integer of at least 1, got {length!r}.")
    if os.path.isfile(path.parent / str(spec["data"])):
        for key in ("subset", "split"):
            if spec.get(key) is not None:
                raise ValueError(f"{key} in {path} is {spec[key]!r}, and a single file has none; leave {key} out.")
    match = spec.get("match", "exact")
    if match not in _MATCHES:
        raise ValueError(
            f"match in {path} must be one of {', '.join(_MATCHES)}, got {match!r}.{near(match, list(_MATCHES))}"
        )
    for place in re.findall(r"\{(\w+)\}", str(spec.get("prompt", ""))):
        if place not in _PLACES:
            raise ValueError(
                f"prompt in {path} has an unknown place {{{place}}}.{near(place, list(_PLACES))} "
                f"There are: {', '.join(_PLACES)}."
            )
        if place != "question" and place not in columns:
            raise ValueError(f"prompt in {path} has {{{place}}}, and columns do not say where {place} is.")
    if match == "letter" and "choices" not in columns:
        raise ValueError(f"match: letter in {path} needs the choices: name their column, or a list of columns.")
    return spec


def file_task(path: Path) -> Task:
    """The task that the file describes, its data loaded.

    Raises:
        ValueError: as `read_spec`, a column that the data do not have, or an id that they have twice.
    """
    from datasets import Features
    from datasets import Image as ImageFeature

    from tokenprune.evals.io.picture_reader import read_picture

    spec = read_spec(path)
    columns = {**{key: key for key in ("image", "question", "answer")}, **(spec.get("columns") or {})}
    data = _load(path, spec)
    made_of = str(data._fingerprint)  # before the cast below, which gives another one to each process
    missing = [one for column in columns.values() for one in _several(column) if one not in data.column_names]
    if missing:
        raise ValueError(
            f"The data of {path} has no column {missing[0]!r}.{near(missing[0], data.column_names)} "
            f"Its columns: {', '.join(data.column_names)}."
        )
    ids = Counter(map(str, data[columns["id"]]) if "id" in columns else ())
    twice = [one for one, times in ids.items() if times > 1]
    if twice:
        raise ValueError(
            f"The samples of {path} need ids of their own; the column {columns['id']!r} has {twice[0]!r} twice. "
            "Leave the column out to number them."
        )
    if not isinstance(data.features[columns["image"]], ImageFeature):
        data = _beside(data, columns["image"], path.parent / str(spec["data"]))
    numbered = "choices" in columns and _numbered(data, columns)
    # as stored: what decodes a picture is the one reader, which knows its bits and its name
    data = data.cast(Features({**data.features, columns["image"]: ImageFeature(decode=False)}))

    def load(start: int, stop: int) -> Iterator[Sample]:
        for index, row in enumerate(data.select(range(start, stop)), start=start):
            choices = _choices(row, columns.get("choices"))
            image, sample_id = row[columns["image"]], str(row[columns["id"]] if "id" in columns else index)
            yield Sample(
                sample_id=sample_id,
                family=str(row[columns["family"]]) if "family" in columns else "all",
                question=_question(str(spec.get("prompt", "{question}")), row, columns, choices),
                answer=_answer(row[columns["answer"]], choices, numbered),
                image=() if image is None else read_picture(image, _called(image, sample_id, path)),
                boxes=row[columns["boxes"]] if "boxes" in columns else None,
            )

    return Task(
        name=str(spec.get("name", path.stem)),
        size=len(data),
        load=load,
        score=partial(_mark, spec.get("match", "exact")),
        max_new_tokens=spec.get("max_new_tokens", 16),
        has_boxes="boxes" in columns,
        fingerprint=fingerprint_of(path, spec) or _fingerprint(spec, made_of),
    )


def _called(stored: dict[str, Any], sample_id: str, path: Path) -> str:
    """What an error calls a picture of a task file."""
    named = stored.get("path")
    return f"{named} (sample {sample_id} of {path})" if named else f"The picture of sample {sample_id} of {path}"


def fingerprint_of(path: Path, spec: dict[str, Any]) -> str | None:
    """What answers to the task depend on: its settings and the bytes of its data file. None where the data are no
    single file, so that only loading them would tell. Pictures that the file names by their paths are not looked at."""
    source = path.parent / str(spec["data"])
    return _fingerprint(spec, file_digest(source)) if os.path.isfile(source) else None


def _fingerprint(spec: dict[str, Any], data: str) -> str:
    # a task may be renamed and its file moved
    asked = {key: value for key, value in spec.items() if key not in ("name", "data")}
    return digest([asked, data])


def _load(path: Path, spec: dict[str, Any]) -> Any:
    from datasets import load_dataset

    source = path.parent / str(spec["data"])
    if os.path.isfile(source):
        kind = "parquet" if source.suffix == ".parquet" else "json"
        return load_dataset(kind, data_files=str(source), split="train")
    name = str(source) if os.path.isdir(source) else str(spec["data"])
    return load_dataset(name, spec.get("subset"), split=spec.get("split", "test"))


def _beside(data: Any, column: str, source: Path) -> Any:
    """`data` whose relative paths of pictures are looked for beside their data file first."""
    from datasets import Value

    if not os.path.isfile(source) or data.features[column] != Value("string"):
        return data

    def found(name: str | None) -> str | None:
        beside = source.parent / (name or "")
        return str(beside) if name and os.path.isfile(beside) else name

    names = [found(name) for name in data[column]]
    return data.remove_columns(column).add_column(column, names)


def _choices(row: dict[str, Any], where: Any) -> dict[str, str]:
    """By letter; an empty one has none, and the others keep theirs."""
    if where is None:
        return {}
    choices = [row[column] for column in where] if isinstance(where, list) else list(row[where] or [])
    lettered = zip(_LETTERS, choices)
    return {letter: str(one) for letter, one in lettered if one is not None and str(one).strip() not in ("", "nan")}


def _question(prompt: str, row: dict[str, Any], columns: dict[str, Any], choices: dict[str, str]) -> str:
    context = str(row[columns["context"]] or "").strip() if "context" in columns else ""
    if row[columns["question"]] is None and "{question}" in prompt:
        raise ValueError(f"It has no question: the column {columns['question']!r} is empty there.")
    texts = {
        "question": str(row[columns["question"]]),
        "choices": "\n".join(f"{letter}. {choice}" for letter, choice in choices.items()),
        "context": f"{context}\n" if context and context != "nan" else "",
    }
    return re.sub(r"\{(\w+)\}", lambda place: texts[place.group(1)], prompt)


def _numbered(data: Any, columns: dict[str, Any]) -> bool:
    """Whether answers are numbers of choices, also where a choice's text is a number: each is the number of one of its
    sample's choices, and one of them is no text of these."""
    found = False
    for row in data.select_columns([columns["answer"], *_several(columns["choices"])]):
        text, choices = str(row[columns["answer"]]).strip(), _choices(row, columns["choices"])
        if choices and (not text.isdecimal() or _LETTERS[int(text) : int(text) + 1] not in choices):
            return False
        found |= bool(choices) and text not in choices.values()
    return found


def _answer(answer: Any, choices: dict[str, str], numbered: bool = False) -> Any:
    """With choices the letter of the right one.

    Args:
        numbered: see `_numbered`.
    """
    text = str(answer).strip()
    named = None if numbered else next((letter for letter, choice in choices.items() if choice == text), None)
    if named is None and text.isdecimal() and _LETTERS[int(text) : int(text) + 1] in choices:
        return _LETTERS[int(text)]
    return answer if named is None else named
