"""Fuzz cases by kind and number: the same number is the same case, on every machine.

Most start from something valid and change it once to four times, in the tree (a value, a key, a level) or in the text
(a letter, a cut, a piece of YAML syntax): what is far from valid is refused by the first check, and the others are
never reached.
"""

from __future__ import annotations

import copy
import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tokenprune.interfaces.pruner import ModelDepths
from tokenprune.registry import INTERVENTIONS, METHODS

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.0, -0.5, 0.25, 1.0, 1.5, 1e308, float("inf"), float("nan"),
    "", " ",
    "0", "64", "0.25", "avg64", "avg", "@", "none", "null", "holov", "hollov", "fastv@9", "var", "a/b", "../x", "~",
    "layer:9", "layer:-1", "layer:", "vision:2", "input", "pixels", "\u0000", "\ud83d\ude00", "x" * 3000, [], [[]],
    {}, [1, "a", None],
    {"a": 1}, {1: 2}, {None: None}, [{"method": "fastv"}], "!!python/name:os.system", "{question}", "{", "}", "<image>",
    "10" * 300, "1e999", "nan", "2020-01-01",
)  # fmt: skip
SYNTAX = (
    "!!python/object/apply:os.system ['touch /tmp/tokenprune-fuzz']", "!!python/name:os.system", "!!binary aaaa",
    "&a ", "*a",
    "<<: *a", "? ", ": ", "- ", "[", "]", "{", "}", "'", '"', "\t", "\x00", "\ufeff", "\u2028", "\r", "\n", "#", "|",
    ">", "%", "@",
    "`", "---\n", "...\n", "[" * 3000, "{a: " * 1000, "&a [*a]", "(" * 500, "=", ",", "+", "é", "\x1b[31m", "1_0",
    "0x1f", "0o7",
)  # fmt: skip
DEPTHS = (
    ModelDepths(8, 6, 12), ModelDepths(4, None, 1), ModelDepths(24, 22, 32, resizable=True, one_size=False),
)  # fmt: skip


def changed(draw: random.Random, tree: Any) -> Any:
    """The tree with one place of it made odd."""
    tree = copy.deepcopy(tree)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in list(items):
            places.append((node, key))
            walk(value)

    walk(tree)
    if not places:
        return draw.choice(ODD)
    node, key = draw.choice(places)
    act = draw.randrange(6)
    if act < 3:
        node[key] = copy.deepcopy(draw.choice(ODD))
    elif act == 3:
        del node[key]
    elif act == 4 and isinstance(node, dict):
        node[garbled(draw, str(key)) if draw.random() < 0.7 else draw.choice(("a", 1, None, ""))] = node.pop(key)
    else:
        node[key] = draw.choice(([node[key]], {"a": node[key]}, [node[key]] * 2))
    return tree


def garbled(draw: random.Random, text: str) -> str:
    """The text with one place of it made odd."""
    place = draw.randint(0, len(text))
    act = draw.randrange(5)
    if act == 0:
        return text[:place]
    if act == 1:
        return text[:place] + text[place + draw.randint(1, 4) :]
    if act == 2:
        other = draw.randint(0, len(text))
        return text[:place] + text[min(place, other) : max(place, other)] + text[place:]
    return text[:place] + draw.choice(SYNTAX) + text[place:]


def odd_file(draw: random.Random, path: Path, tree: Any) -> None:
    """Write a tree as YAML, changed in itself, in its text, or in its bytes."""
    for _ in range(draw.randint(0, 3)):
        tree = changed(draw, tree)
    try:
        text = yaml.safe_dump(tree, allow_unicode=True)
    except (yaml.YAMLError, TypeError):
        text = repr(tree)
    for _ in range(draw.choice((0, 0, 1, 2))):
        text = garbled(draw, text)
    data = text.encode("utf-8", "surrogatepass")
    if draw.random() < 0.05:
        place = draw.randint(0, len(data))
        data = data[:place] + draw.randbytes(draw.randint(1, 8)) + data[place:]
    path.write_bytes(data)


# --- methods ----------------------------------------------------------------------------------------------------------

TEXTS = (
    "holov@64", "holov(variant=official)@0.222", "fastv@avg128", "var(p=0.4)", "vtc_cls@64+var", "todre@288+random@64",
    "random(seed=3)@9", "pyramiddrop@0.25", "sparsevlm(version=v2)@192", "visionzip(merge=official)@64", "naavit",
    "fitprune(schedule=pocket-llava)@0.5", "downsample@144", "tome@0.5", "transprune(schedule=[0.5, 0.25])@64",
)  # fmt: skip
PLANS: tuple[Any, ...] = (
    {"method": "holov", "keep": 64}, {"method": "fastv", "keep": 0.25, "layer": 3},
    {"method": [{"method": "todre", "keep": 288}, {"prune": "random", "keep": 64, "at": "layer:9"}]},
    [{"at": "layer:9", "prune": "divprune", "keep": 64}, "var(p=0.4)"], {"name": "visionzip", "keep": 64,
    "merge": "official"},
    {"method": "pyramiddrop", "average": 0.4}, [{"prune": "vtc_cls", "keep": 128}, {"prune": "fastv", "keep": 64,
    "at": "layer:2"}],
)  # fmt: skip


def _read_plan(said: Any, depths: ModelDepths) -> None:
    from tokenprune.plan.parse import parse_method

    spec = parse_method(said)
    str(spec.label)
    spec.plan(depths, 576)


def plan(draw: random.Random, folder: Path) -> Callable[[], Any]:
    """A method as a text, or as a YAML file."""
    depths = draw.choice(DEPTHS)
    if draw.random() < 0.4:
        text = draw.choice((*TEXTS, f"{draw.choice(_names())}@{draw.choice(ODD)!s:.40}"))
        for _ in range(draw.randint(0, 2)):
            text = garbled(draw, text)
        return lambda: _read_plan(text.removesuffix(".yaml"), depths)
    path = folder / "plan.yaml"
    tree = draw.choice(PLANS) if draw.random() < 0.7 else _with_options(draw)
    odd_file(draw, path, tree)
    return lambda: _read_plan(str(path), depths)


@functools.cache
def _names() -> tuple[str, ...]:
    return (*METHODS.names(), *INTERVENTIONS.names())


def _with_options(draw: random.Random) -> Any:
    import dataclasses

    name = draw.choice(_names())
    cls = (METHODS if name in METHODS.names() else INTERVENTIONS).get(name)
    options = [field.name for field in dataclasses.fields(cls)]
    tree: dict[str, Any] = {"method": name} if name in INTERVENTIONS.names() else {"method": name, "keep": 64}
    for option in draw.sample(options, min(len(options), draw.randint(0, 2))):
        tree[option] = draw.choice(ODD)
    return tree


# --- files of settings ------------------------------------------------------------------------------------------------

TASK = {
    "name": "my_task", "data": "questions.jsonl", "columns": {"image": "image", "question": "question",
    "choices": ["A", "B"],
    "context": "hint", "id": "id"}, "prompt": "{question}\n{choices}", "match": "letter", "max_new_tokens": 16,
}  # fmt: skip
SWEEP = {
    "name": "mine", "model": "pocket-llava", "tasks": ["pocket", "pocket:count"], "keep": [192, 0.25, "avg64"],
    "methods": ["none", "holov", {"method": "fastv", "layer": 3, "keep": [64]}, {"method": "random",
    "grid": {"seed": [1, 2]}}],
    "limit": 10, "seed": 3, "batch_size": 4, "measure": {"samples": 1, "times": False}, "overlays": {"samples": 2,
    "keep": 192},
    "points": [{"method": "divprune", "keep": 9}], "seeds": [1, 2], "dtype": "float32",
    "targets": [{"task": "pocket", "method": "holov", "keep": 192, "value": 50.0, "source": "a paper"}],
}  # fmt: skip


def task_file(draw: random.Random, folder: Path) -> Callable[[], Any]:
    """A task file; one in fifty with its data."""
    from tokenprune.evals.tasks.yaml_task import read_spec

    path = folder / "task.yaml"
    odd_file(draw, path, TASK)
    return lambda: read_spec(path)


def sweep_file(draw: random.Random, folder: Path) -> Callable[[], Any]:
    """A sweep file, with what it includes."""
    from tokenprune.evals.config.sweep_file import read_config

    path = folder / "sweep.yaml"
    tree: Any = dict(SWEEP)
    for key in draw.sample(sorted(tree), draw.randint(0, 6)):
        if key not in ("model", "tasks", "methods"):
            del tree[key]
    if draw.random() < 0.1:
        odd_file(draw, folder / "part.yaml", {"keep": [64], "measure": {"samples": 2}})
        tree["include"] = "part.yaml"
    odd_file(draw, path, tree)
    return lambda: read_config(path)


# --- requests ---------------------------------------------------------------------------------------------------------

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
REQUEST = {
    "model": "tiny", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 9, "temperature": 0.5,
    "top_p": 0.9,
    "seed": 3, "stop": ["a", "b"], "tokenprune": "holov@9", "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}, {"type": "text",
        "text": "what is this"}]},
        {"role": "assistant", "content": "red"}, {"role": "user", "content": "who"},
    ],
}  # fmt: skip


def request(draw: random.Random, folder: Path) -> Callable[[], Any]:
    """The body of a request to the server, and its method."""
    from tokenprune.server.chat_request import read_request
    from tokenprune.server.limits import Limits
    from tokenprune.server.methods import check_text

    tree: Any = REQUEST
    for _ in range(draw.randint(0, 3)):
        tree = changed(draw, tree)
    text = json.dumps(tree, default=str)
    for _ in range(draw.choice((0, 0, 1, 2))):
        text = garbled(draw, text)
    data = text.encode("utf-8", "surrogatepass")
    method = draw.choice(TEXTS)
    for _ in range(draw.randint(0, 2)):
        method = garbled(draw, method)

    def run() -> None:
        got = read_request(data, Limits())
        check_text(method if got.method == "holov@9" else got.method or method)

    return run


# --- run folders ------------------------------------------------------------------------------------------------------


@functools.cache
def _good_run(folder: Path) -> Path:
    from _fake_runs import fake_run

    from tokenprune.evals.results.run_folder import read_run

    good = fake_run(folder / "good", ("none", "random", "holov"), (64,), samples=6, pictured=2)
    read_run(good)  # or every case would be refused for something else than what was tampered with
    return good


def run_folder(draw: random.Random, folder: Path) -> Callable[[], Any]:
    """A finished run of which a file was tampered with; what reports, compares and goes on with it."""
    good, bad = _good_run(folder.parent), folder / "run"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(good, bad)
    files = [file for file in sorted(bad.rglob("*")) if file.suffix in (".jsonl", ".json", ".parquet", ".yaml")]
    file = draw.choice(files)
    if file.suffix == ".parquet" or draw.random() < 0.3:
        data = file.read_bytes()
        place = draw.randint(0, len(data))
        file.write_bytes(data[:place] + draw.randbytes(draw.randint(0, 8)) + data[place + draw.randint(0, 8) :])
    elif file.suffix == ".yaml":
        odd_file(draw, file, yaml.safe_load(file.read_text()))
    else:
        lines = file.read_text().splitlines()
        place = draw.randrange(len(lines))
        tree = json.loads(lines[place]) if file.suffix == ".jsonl" else json.loads(file.read_text())
        tree = changed(draw, tree)
        written = json.dumps(tree, default=str)
        written = garbled(draw, written) if draw.random() < 0.3 else written
        file.write_text(
            "\n".join([*lines[:place], written, *lines[place + 1 :]]) + "\n" if file.suffix == ".jsonl" else written
        )

    def run() -> None:
        from tokenprune.evals.io.row_store import folder_store
        from tokenprune.evals.report.markdown import write_markdown
        from tokenprune.evals.report.page import write_report
        from tokenprune.evals.results import parity
        from tokenprune.evals.results.compare import compare
        from tokenprune.evals.results.run_folder import read_run

        what = draw.randrange(5)
        if what == 0:
            write_markdown(folder / "report.md", [read_run(bad)])
        elif what == 1:
            compare(str(bad), f"{good}")
        elif what == 2:
            write_report(folder / "report.html", [read_run(bad)])
        elif what == 3:
            parity.read_run(bad)
        else:
            folder_store(bad, "samples", ("settings", "point", "sample_id"))
            read_run(bad)

    return run


KINDS: dict[str, Callable[[random.Random, Path], Callable[[], Any]]] = {
    "plan": plan, "task": task_file, "sweep": sweep_file, "request": request, "run": run_folder,
}  # fmt: skip


def case(kind: str, number: int, folder: Path) -> Callable[[], Any]:
    """Case `number` of a kind, ready to be run; files go to `folder`."""
    return KINDS[kind](random.Random(f"{kind} {number}"), folder)
