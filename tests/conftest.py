"""`pytest --support docs/support.md` writes the table of what works from the results of the oracle matrix,
and `pytest tests/test_pretend_device.py --reads docs/kernels.md` that of host reads."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

_CELL = re.compile(r"test_families\.py::test_(removal_equals_masking|what_a_family_cannot_take\w*)\[(.+)\]$")


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--support", type=Path, help="write the table of families x methods to this file")
    parser.addoption("--reads", type=Path, help="write the table of host reads into this file")


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            match = _CELL.search(report.nodeid) if report.when in ("call", "setup") else None
            if match and (report.when == "call" or outcome != "passed"):
                name, method = _names(match.group(2))
                kind = "refused" if match.group(1).startswith("what") and outcome == "passed" else outcome
                found[name, method].append(kind)
    cells = [kind for kinds in found.values() for kind in kinds if kind != "refused"]
    if cells:
        families = len({name for name, _ in found})
        terminalreporter.write_line(
            f"oracle matrix: {len(cells)} cells of {families} families, {cells.count('passed')} green"
        )
    path = config.getoption("--support")
    if path is not None:
        path.write_text(table(found, len(cells)), encoding="utf-8")


def _names(cell: str) -> tuple[str, str]:
    """Family and method of a cell's id: `llava-random-one_left-sdpa`."""
    name, method, *_ = cell.split("-")
    return name, method


def table(found: dict[tuple[str, str], list[str]], count: int) -> str:
    """Markdown: a row a method, a column a family; cells that passed of those that were run."""
    families = sorted({name for name, _ in found})
    methods = sorted({method for _, method in found})
    lines = [
        "# What works on what",
        "",
        "Written by `pytest tests/test_families.py --support docs/support.md` from the results of its oracle cells",
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
    return "\n".join(lines) + "\n"
