"""A task of lmms-eval as a task of ours: `lmms:pope`, or `lmms:FOLDER/NAME` for one in a task folder of one's own.

lmms-eval gives the documents, the prompt, what counts as right and its metrics; our driver asks, so that intervals,
paired differences and costs are those of every other task.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from tokenprune.evals.io.digest import file_digest
from tokenprune.evals.tasks.task import LMMS, Sample, Task
from tokenprune.registry import UnknownName, near

_THINKING = [["<think>", "</think>"], ["<analysis>", "</analysis>"]]  # what lmms-eval's command line strips by default
_MAX_NEW_TOKENS = 1024  # where a task does not say


def with_folder(name: str, folder: str) -> str:
    """`lmms:NAME` as `lmms:FOLDER/NAME`; any other name as it is."""
    own = name.removeprefix(LMMS)
    return f"{LMMS}{folder.rstrip('/')}/{own}" if name.startswith(LMMS) and "/" not in own else name


def check_lmms_task(name: str) -> None:
    """Raise if lmms-eval has no task `name`, or one that cannot be asked here; reads no data.

    Raises:
        FileNotFoundError: no such task folder.
        UnknownName: no such task; near matches are named.
        ValueError: lmms-eval is not installed, or the name is that of a group of tasks.
    """
    _manager(name)


@cache
def load_lmms_task(name: str) -> Task:
    """The task `name`, its data loaded as lmms-eval loads it.

    Raises:
        ValueError: it asks in a way that `tokenprune eval` cannot; the plug-in may.
    """
    manager, own = _manager(name)
    found = manager.load_task_or_group([own], task_type="chat")[own]
    kind = found.OUTPUT_TYPE
    if kind != "generate_until":
        raise ValueError(f"{name} is of the type {kind}; tokenprune eval answers by generation, one round.")
    from tokenprune.evals.tasks.lmms_generation import read_generation

    how = read_generation(found.config.generation_kwargs, _MAX_NEW_TOKENS)
    if not how.greedy:
        raise ValueError(
            f"{name} asks for sampling or beams ({how.settings}), and tokenprune eval answers greedily; run it through "
            "`lmms-eval --model tokenprune`."
        )
    return LmmsTask(
        name=name,
        size=len(found.eval_docs),
        load=lambda start, stop: _samples(found, start, stop),
        score=_no_score,
        max_new_tokens=how.settings["max_new_tokens"],
        source=found,
        fingerprint=_fingerprint(manager, own, found, how.settings),
    )


def _fingerprint(manager: Any, own: str, task: Any, settings: dict[str, Any]) -> str:
    """What answers depend on: lmms-eval, the files beside the task's YAML (includes, functions), its data."""
    hasher = hashlib.sha256(repr(sorted(settings.items())).encode())
    with suppress(metadata.PackageNotFoundError):  # a checkout on the path
        hasher.update(metadata.version("lmms_eval").encode())
    written = Path(str(manager.task_index[own].get("yaml_path")))
    for file in sorted(written.parent.iterdir()) if written.is_file() else ():
        if file.is_file() and file.suffix in ("", ".py", ".yaml", ".yml"):
            hasher.update(file.name.encode() + file_digest(file).encode())
    # not the fingerprint of `datasets`, which can be another one in each process once a task has filtered its documents
    info = getattr(task.eval_docs, "info", None)
    hasher.update(repr((len(task.eval_docs), getattr(info, "download_checksums", None))).encode())
    return hasher.hexdigest()[:16]


@cache
def _manager(name: str) -> tuple[Any, str]:
    """lmms-eval's index in which the task is, and its name there."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise ValueError(f"The task {name} needs lmms-eval: pip install 'tokenprune-vlm[lmms]'.")
    folder, _, own = name.removeprefix(LMMS).rpartition("/")
    if folder and not Path(folder).is_dir():
        raise FileNotFoundError(f"There is no task folder {folder}, which {name} names.")
    # the index of a folder is quick, that of all tasks that lmms-eval brings takes seconds
    ours = _index(folder).all_tasks if folder else []
    manager = _index(folder if own in ours else None)
    if own not in manager.all_tasks:
        raise UnknownName(
            f"lmms-eval has no task called {own!r}.{near(own, [*ours, *manager.all_tasks])} "
            "`lmms-eval tasks list` shows all; --include-path FOLDER adds a folder of your own."
        )
    if own not in manager.all_subtasks:
        members = ", ".join(LMMS + str(one) for one in _members(manager, own))
        raise ValueError(
            f"{own} is a group of lmms-eval's tasks; name those that you want: {members or 'see its YAML'}."
        )
    return manager, own


@cache
def _index(folder: str | None) -> Any:
    """lmms-eval's index of a task folder, or of the tasks that it brings."""
    import lmms_eval.models  # noqa: F401  # pyright: ignore[reportMissingImports]  # turns its logging down
    from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    # a task may word its questions for a model by name; ours gets the words for all others
    return TaskManager("WARNING", include_path=folder, include_defaults=folder is None, model_name="tokenprune")


def _members(manager: Any, group: str) -> list[str]:
    listed = manager.task_index[group]["task"]
    if listed == -1:
        listed = manager._get_config(group).get("task", [])
    return [one if isinstance(one, str) else str(one.get("task", one.get("group"))) for one in listed]


def _samples(task: Any, start: int, stop: int) -> Iterator[Sample]:
    from tokenprune.evals.tasks.lmms_media import document, naming_document

    docs, name = task.eval_docs, f"{LMMS}{task.task_name}"
    for number in range(start, stop):
        doc = document(docs, number, name)
        with naming_document(number, name):
            question, visuals = _asked(task, doc)
        target = task.doc_to_target(doc)
        target = target if isinstance(target, (str, int, float, list)) else str(target)
        image = visuals[0] if len(visuals) == 1 else tuple(visuals)
        yield Sample(str(number), "all", question, target, image)


def _asked(task: Any, doc: Any) -> tuple[str, list[Any]]:
    """The question, with `<image>` where pictures stand inside it, and its pictures and videos."""
    from tokenprune.evals.models.chat_template import MARKER
    from tokenprune.evals.tasks.lmms_media import Media

    if not hasattr(task, "doc_to_messages"):  # a task written as a class
        messages = Media().conversation(task.doc_to_text(doc), task.doc_to_visual(doc))
    else:
        messages = Media().messages(task.doc_to_messages(doc))
    if [message["role"] for message in messages] != ["user"]:
        raise ValueError(
            f"{LMMS}{task.task_name} asks with several messages, and tokenprune eval with one; run it through "
            "`lmms-eval --model tokenprune`."
        )
    parts = messages[0]["content"]
    visuals = [part[part["type"]] for part in parts if part["type"] != "text"]
    kinds = [part["type"] == "text" for part in parts]
    inside = True in kinds and False in kinds[kinds.index(True) :]
    words = [part["text"] if part["type"] == "text" else MARKER if inside else "" for part in parts]
    return "".join(words), visuals


def _no_score(prediction: str, answer: Any) -> float:
    raise TypeError("A task of lmms-eval marks an answer by its document; call mark(sample, prediction).")


@dataclass
class LmmsTask(Task):
    """A task that lmms-eval marks.

    Attributes:
        source: lmms-eval's task.
    """

    source: Any = field(default=None, repr=False)
    _marked: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict, repr=False)

    def mark(self, sample: Sample, prediction: str) -> float:
        """The number that the first of the task's metrics gives this sample.

        Raises:
            ValueError: none of its metrics has a number for a single sample.
        """
        values = self._values(sample.sample_id, prediction)
        for name in [name for name in self.source.aggregation() if name in values]:
            number = _number(values[name], self.source.config.score_key)
            if number is not None:
                return number
        raise ValueError(
            f"The metrics of {self.name} ({', '.join(self.source.aggregation())}) give no number for a single sample, "
            "so there is no interval and no paired difference; run it through `lmms-eval --model tokenprune`."
        )

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The task's own metrics over all of `rows`, by name.

        Left out are those that are no number and those that write a file for a server. One that fails, say because its
        judge cannot be reached, is left out with a warning: the answers are there, and another metric may be fine.
        """
        collected: dict[str, list[Any]] = {}
        for row in rows:
            for name, value in self._values(row["sample_id"], row["prediction"]).items():
                collected.setdefault(name, []).append(value)
        found = {}
        for name, aggregate in self.source.aggregation().items():
            if name not in collected or "args" in inspect.signature(aggregate).parameters:
                continue
            try:
                value = aggregate(collected[name])
            except Exception as error:
                warnings.warn(f"The metric {name} of {self.name} failed: {error!r}", stacklevel=2)
                continue
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found[name] = float(value)
        return found

    def _values(self, sample_id: str, prediction: str) -> dict[str, Any]:
        key = (sample_id, prediction)
        if key not in self._marked:
            self._marked[key] = self._process(int(sample_id), prediction)
        return self._marked[key]

    def _process(self, number: int, prediction: str) -> dict[str, Any]:
        from lmms_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
        from lmms_eval.api.reasoning import (  # pyright: ignore[reportMissingImports]
            parse_reasoning_tags_config,
            strip_reasoning_tags,
        )

        from tokenprune.evals.tasks.lmms_generation import read_generation

        task = self.source
        text = read_generation(task.config.generation_kwargs, _MAX_NEW_TOKENS).cut(prediction)
        about = {"task": task.task_name, "doc_id": number, "repeats": 1}
        asked = Instance("generate_until", (), 0, about, resps=[text])
        chain = task._filters[0]  # of several ways to read an answer the first counts
        chain.apply([asked], [task.eval_docs_no_media[number]])
        answer = asked.filtered_resps[chain.name]
        tags = parse_reasoning_tags_config(task_value=task.config.reasoning_tags or _THINKING)
        if tags and isinstance(answer, str):
            answer = strip_reasoning_tags(answer, tags)
        return task.process_results(task.eval_docs_no_media[number], [answer])


def _number(value: Any, score_key: str) -> float | None:
    """What a metric says of one sample: a number, or a mapping with its score."""
    if isinstance(value, dict):
        value = value.get(score_key)
    return float(value) if isinstance(value, (bool, int, float)) else None
