"""`pytest --support docs/support.md` writes the tables of what works from the results of the tests that were run,
and `pytest tests/core/engine/test_pretend_device.py --reads docs/kernels.md` that of host reads."""

from __future__ import annotations

import platform
import re
import zlib
from collections import Counter, defaultdict
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any

import _files  # noqa: F401
import pytest

_CELL = re.compile(
    r"test_(?:families|any_model)\.py::test_(removal_equals_masking|what_a_(?:family_cannot_take|class_lacks)\w*)\[(.+)\]$"
)
_SAMPLED = re.compile(
    r"(test_families|test_masked_reference|test_pocket_masked_reference)\.py::(test_removal_equals_masking\w*)\[(.+)\]$"
)
_DEAR = (
    "test_pocket_masked_reference.py::test_keeping_everything",
    "test_loading.py::test_the_command_line_evaluates_a_checkpoint[",
    "test_built_once.py::test_an_eval_builds_each_point_once[",
    "test_compiled.py::test_a_model_that_ran_compiled_before[",
    "test_compiled.py::test_a_part_that_ran_compiled_before[",
    "test_trainer.py::test_",
    "test_wrappers.py::test_",
    "test_holitom.py::test_equals_the_card_on_more[",
    "test_zoo_processors.py::test_the_command_line_takes_it[",
    "test_whole_masks.py::test_",
)
"""Beginnings of tests that take seconds for each of their cases, or have many."""
_PACKAGES = ("torch", "transformers", "trl", "peft", "numpy")
SETS = {
    "lowest": "the floors of pyproject.toml, one cell of each family and method, `make test-lowest`",
    "constraints": "constraints.txt, without torchvision; all tests and all cells, `make test-all`",
    "newest": "what pip takes without constraints, cells likewise, `make test-newest`; fewer where nothing is newer",
}


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--support", type=Path, help="write the tables of families x methods and of versions to this file")
    parser.addoption("--reads", type=Path, help="write the table of host reads into this file")
    parser.addoption(
        "--sampled",
        action="store_true",
        help="one masked-model cell for each family and method, by name, a third of the pretend device's and of tests "
        "that take seconds for each of their cases",
    )
    parser.addoption("--versions", choices=list(SETS), help="the row of the table of versions that these tests are")


def pytest_configure(config: Any) -> None:
    if util.find_spec("hypothesis"):  # the environment of vLLM has none
        hypothesis = import_module("hypothesis")
        # on a busy machine an example may take any time
        slow = [hypothesis.HealthCheck.too_slow]
        hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=slow)
        hypothesis.settings.load_profile("untimed")
    sampled, versions = config.getoption("--sampled"), config.getoption("--versions")
    if sampled and config.getoption("--support") and versions in (None, "constraints"):
        raise pytest.UsageError(
            "The table of families and methods says every cell: leave out --sampled (make test-all)."
        )


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """With `--sampled`, of the masked-model cells of each family and method one, drawn by their names, and all of
    `random`: what a release breaks is a family, a layout or a site, not one method of thirty-six. Of tests that take
    seconds for each of their cases a third."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # none of these is the last that one waits for
    if not config.getoption("--sampled"):
        return
    drawn: dict[tuple[str, ...], list[Any]] = defaultdict(list)
    dear: dict[str, list[Any]] = defaultdict(list)
    for item in items:
        if any(f"/{name}" in item.nodeid for name in _DEAR) and hasattr(item, "callspec"):
            dear[item.nodeid.partition("[")[0]].append(item)
        match = _SAMPLED.search(item.nodeid)
        if match:
            names = match[3].split("-")[: 2 if match[1] == "test_families" else 1]
            if names[-1] != "random":
                drawn[(match[2], *names)].append(item)
    left = {id(item) for names, all_of_them in drawn.items() for item in _all_but_one(names, all_of_them)}
    left |= {id(item) for alike in dear.values() for item in _all_but_a_third(alike)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) in left])
    items[:] = [item for item in items if id(item) not in left]


def _all_but_one(names: tuple[str, ...], items: list[Any]) -> list[Any]:
    place = zlib.crc32("-".join(names).encode()) % len(items)
    return items[:place] + items[place + 1 :]


def _all_but_a_third(items: list[Any]) -> list[Any]:
    by_name = sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode()))
    return by_name[-(-len(by_name) // 3) :]


def pytest_report_header(config: Any) -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES[:2])


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            match = _CELL.search(report.nodeid) if report.when in ("call", "setup") else None
            if match and (report.when == "call" or outcome != "passed"):
                name, method = _names(match.group(2))
                kind = "refused" if match.group(1).startswith("what") and outcome == "passed" else outcome
                found[name, method].append(kind)
    read_off, everywhere = _read_off_the_model(found)
    found = {key: kinds for key, kinds in found.items() if key[0] not in read_off}
    cells = [kind for kinds in found.values() for kind in kinds if kind != "refused"]
    if cells:
        families = len({name for name, _ in found})
        terminalreporter.write_line(
            f"masked-model matrix: {len(cells)} cells of {families} families, {cells.count('passed')} green"
        )
    if read_off:
        kinds = [kind for key, each in everywhere.items() if key[0] in read_off for kind in each]
        counted = f"{len(kinds)} cells of {len(read_off)} classes"
        refused = f"{kinds.count('refused')} refused by name"
        terminalreporter.write_line(f"any model: {counted}, {kinds.count('passed')} green, {refused}")
    path, versions = config.getoption("--support"), config.getoption("--versions")
    if path is None:
        return
    from tokenprune.evals.report.readme import between

    text = path.read_text(encoding="utf-8")
    if versions in (None, "constraints"):
        if found:  # else classes of the zoo alone were run
            text = between(text, "cells", table(found, len(cells)))
        if read_off and found:
            from _capabilities import capabilities, elsewhere, outcomes_of, written

            text = written(text, capabilities({**elsewhere(), **outcomes_of(everywhere)}))
    if versions is not None:
        rows = re.search(r"<!-- versions:begin -->\n(.*?)<!-- versions:end -->", text, re.DOTALL)
        agree = f"{cells.count('passed')} of {len(cells)}"
        row = versions_row(versions, agree, terminalreporter.stats)
        text = between(text, "versions", versions_table(rows[1] if rows else "", versions, row))
    path.write_text(text, encoding="utf-8")


def _read_off_the_model(found: dict[tuple[str, str], list[str]]) -> tuple[set[str], dict[tuple[str, str], list[str]]]:
    """Which families among these cells have no file of their own, or a small one; and all cells."""
    if not found:
        return set(), {}
    from _zoo_all import FAMILIES

    return {name for name, _ in found if name in FAMILIES}, dict(found)


def _names(cell: str) -> tuple[str, str]:
    """Family and method of a cell's id: `llava-random-one_left-sdpa`."""
    name, method, *_ = cell.split("-")
    return name, method


def table(found: dict[tuple[str, str], list[str]], count: int) -> str:
    """Markdown: a row a method, a column a family; cells that passed of those that were run."""
    families = sorted({name for name, _ in found})
    methods = sorted({method for _, method in found})
    lines = [
        "Written by `make test-all SUPPORT=docs/support.md` from the cells of tests/adapters/test_families.py",
        f"({count} of them): the pruned model against the full-length model in which the dropped tokens are masked,",
        "logits and greedy tokens, on tiny models built from configs. A cell says how many of its layouts (ragged",
        "batches, padding on either side, videos; SDPA and eager) agree; `-` means that `apply` refuses the pair, with",
        "a sentence that says why.",
        "",
        "| method | " + " | ".join(families) + " |",
        "|---|" + "---:|" * len(families),
    ]
    for method in methods:
        row = []
        for name in families:
            kinds = found.get((name, method), [])
            run = [kind for kind in kinds if kind != "refused"]
            row.append(f"{run.count('passed')} of {len(run)}" if run else "-" if kinds else "")
        lines.append(f"| `{method}` | " + " | ".join(row) + " |")
    return "\n".join(lines)


def versions_row(name: str, agree: str, stats: dict[str, list[Any]]) -> str:
    """One set of versions and what its tests said, as a row of Markdown."""
    installed = ", ".join(f"{package} {metadata.version(package).partition('+')[0]}" for package in _PACKAGES)
    failed = len(stats.get("failed", [])) + len(stats.get("error", []))
    reasons = Counter(_reason(report) for report in stats.get("skipped", []))
    skipped = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    cells = [f"`{name}`: {SETS[name]}", f"Python {platform.python_version()}, {installed}", agree]
    return f"| {' | '.join([*cells, str(len(stats.get('passed', []))), str(failed), skipped])} |"


def _reason(report: Any) -> str:
    """Why a test was skipped, in so many words."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    where = re.compile(r" \(/[^)]*\)")  # an import that failed says in which file
    return where.sub("", text.removeprefix("Skipped: ").partition("\n")[0]).replace("|", "/")


def versions_table(before: str, name: str, row: str) -> str:
    """The table with this set's row in its place, and the rows of the others as they were."""
    rows = {other: line for other in SETS for line in before.splitlines() if line.startswith(f"| `{other}`")}
    rows[name] = row
    lines = [
        "Each row is written by the command in it, with `SUPPORT=docs/support.md` behind it.",
        "",
        "| set | versions | cells that agree | tests passed | failed | skipped, and why |",
        "|---|---|---:|---:|---:|---|",
        *(rows[other] for other in SETS if other in rows),
    ]
    return "\n".join(lines)
