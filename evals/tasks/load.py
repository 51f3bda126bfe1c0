"""What a model is asked: tasks by name, their samples, and when an answer is right.

A task is a `Task`. `pocket`, `pocket-mixed` (pictures of several sizes and short videos), `pocket-crowd` and
`pocket-mixed-crowd` (many objects, few of them asked for), `pocket-hallucination` and `pocket-mixed-hallucination`
(what is not there, and what a model names) and their families (`pocket:count`) are built in.
`lmms:NAME` is a task of lmms-eval (`lmms_task.py`), and the path of a YAML file is one's own (`yaml_task.py`).
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tokenprune.evals.pocket.catalog import FILES, SUITES, suite_file, suite_fingerprint
from tokenprune.evals.tasks.task import LMMS, Task
from tokenprune.registry import UnknownName, near

if TYPE_CHECKING:
    pass


def task_names() -> list[str]:
    """Names of the built-in tasks; imports nothing heavy."""
    return [name for suite, families in SUITES.items() for name in (suite, *(f"{suite}:{f}" for f in families))]


def default_task(model: str) -> str:
    """The suite that a pocket model was made for; "pocket" for any other model."""
    return "pocket-mixed" if model == "pocket-qwen" else "pocket"


def check_task(name: str) -> None:
    """Raise if `name` is neither a built-in task nor a readable task file; reads no data.

    Where lmms-eval is not installed its tasks pass, so that a plan can be made; `load_task` then says what to install.
    """
    if name.endswith((".yaml", ".yml")):
        from tokenprune.evals.tasks.yaml_task import read_spec

        read_spec(Path(name))
    elif name.startswith(LMMS):
        if find_spec("lmms_eval") is not None:
            from tokenprune.evals.tasks.lmms_task import check_lmms_task

            check_lmms_task(name)
    elif name not in task_names():
        raise UnknownName(
            f"There is no task called {name!r}.{near(name, task_names())} Known: {', '.join(task_names())}; "
            f"{LMMS}NAME is a task of lmms-eval; or pass the path of a task's YAML file."
        )


def load_task(name: str) -> Task:
    """The task called `name`, or described by the YAML file `name`."""
    check_task(name)
    if name.endswith((".yaml", ".yml")):
        from tokenprune.evals.tasks.yaml_task import file_task

        return cast(Task, file_task(Path(name)))
    if name.startswith(LMMS):
        from tokenprune.evals.tasks.lmms_task import load_lmms_task

        return cast(Task, load_lmms_task(name))
    from tokenprune.evals.tasks.pocket_task import pocket_task

    return cast(Task, pocket_task(name))


def cut_short(names: list[str], limit: int | None) -> bool:
    """Whether a run with `limit` leaves samples of any of these tasks out."""
    return limit is not None and any(load_task(name).size > limit for name in names)


def count_samples(name: str) -> int | None:
    """How many samples a task has, without reading its pictures; None where only its data would tell."""
    if name.startswith(LMMS):
        return None
    check_task(name)
    import pyarrow.parquet as pq

    suite, _, family = name.partition(":")
    if suite in FILES:
        file = suite_file(suite)
        families = pq.read_table(file, columns=["family"]).column("family").to_pylist()
        return sum(family in ("", family_of_sample) for family_of_sample in families)
    from tokenprune.evals.tasks.yaml_task import read_spec

    path = Path(name)
    source = path.parent / str(read_spec(path)["data"])
    if not os.path.isfile(source):
        return None
    if source.suffix == ".parquet":
        return pq.read_metadata(source).num_rows
    written = source.read_bytes().strip()
    if written.startswith(b"["):  # one array over all lines
        return len(json.loads(written))
    return sum(bool(line.strip()) for line in written.splitlines())


def display_name(name: str) -> str:
    """What tables call a task: the name that its file gives, or the name it was asked for by."""
    if not name.endswith((".yaml", ".yml")):
        return name
    from tokenprune.evals.tasks.yaml_task import read_spec

    return str(read_spec(Path(name)).get("name", Path(name).stem))


def task_fingerprint(name: str) -> str | None:
    """`Task.fingerprint` of a task, without reading its pictures; None where only its data would tell."""
    if name.startswith(LMMS):
        return None
    check_task(name)
    suite = name.partition(":")[0]
    if suite in FILES:
        return suite_fingerprint(suite)
    from tokenprune.evals.tasks.yaml_task import fingerprint_of, read_spec

    return fingerprint_of(Path(name), read_spec(Path(name)))


def task_needs(name: str) -> list[str]:
    """What a task needs that does not come with the package or its file: another harness, or data of the hub."""
    if name.startswith(LMMS):
        return ["lmms-eval"]
    if name.endswith((".yaml", ".yml")):
        from tokenprune.evals.tasks.yaml_task import read_spec

        data = str(read_spec(Path(name))["data"])
        return [] if os.path.isfile(Path(name).parent / data) else [f"hub data {data}"]
    return []
