"""Write the licences of everything that an install brings, as the packages themselves declare them:

    .venv/bin/python .ci/licences.py > docs/licences.md

Run it in an environment of constraints.txt (`make test` makes one); tests/packaging/test_release.py fails where the
list is not that of the constraints.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
UNDECLARED = "not declared in its metadata"
ELSEWHERE = "not installed where this list was written"
HEAD = """# Licences of the dependencies

tokenprune itself is under the Apache License 2.0. This is everything in [constraints.txt](../constraints.txt), with the
licence that each package declares and what needs it. What `dev` and `pocket` bring is for work on tokenprune and is not
needed to use it; `lmms` and `vllm` bring more than stands here. PyPI's torch for Linux also brings NVIDIA's CUDA
libraries, which are under NVIDIA's own terms. Written by `.ci/licences.py`.

| package | version | licence | needed by |
|---|---|---|---|
"""


def pins() -> dict[str, str]:
    """Versions by name, of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [re.match(r"([A-Za-z0-9._-]+)==([^;\s]+)", line) for line in lines]
    return {canonicalize_name(each[1]): each[2] for each in found if each}


def licence_of(name: str) -> str:
    """What a package declares: an SPDX expression, else its classifiers, else the first line of its text."""
    data = metadata.metadata(name)
    expression = data.get("License-Expression")
    if expression:
        return expression
    classified = [
        line.rpartition(" :: ")[2] for line in data.get_all("Classifier") or [] if line.startswith("License ::")
    ]
    classified = [each for each in classified if each != "OSI Approved"]
    if classified:
        return ", ".join(dict.fromkeys(classified))
    text = (data.get("License") or "").strip().split("\n")[0].strip()
    return text if text and len(text) <= 60 else UNDECLARED


def needed_by() -> dict[str, list[str]]:
    """By package, "every install" or the extras that bring it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"every install": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, list[str]] = {}
    for group, wanted in groups.items():
        for name in closure(wanted):
            found.setdefault(name, []).append(group)
    return {name: each[:1] if each[0] == "every install" else each for name, each in found.items()}


def closure(wanted: list[str]) -> set[str]:
    """Everything that requirements bring, as far as it is installed."""
    found: set[tuple[str, str]] = set()
    queue = [(Requirement(text), "") for text in wanted]
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker is not None and not _holds(requirement.marker, extra):
            continue
        for part in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), part)
            if key in found:
                continue
            try:
                needs = metadata.requires(requirement.name) or []
            except metadata.PackageNotFoundError:
                continue
            found.add(key)
            queue += [(Requirement(text), part) for text in needs]
    return {name for name, _ in found}


def _holds(marker: Marker, extra: str) -> bool:
    return marker.evaluate({"extra": extra})


def table() -> str:
    """The file."""
    users = needed_by()
    rows = []
    for name, version in sorted(pins().items()):
        try:
            licence = licence_of(name)
        except metadata.PackageNotFoundError:
            licence = ELSEWHERE
        escaped = licence.replace("|", "\\|")
        rows.append(f"| {name} | {version} | {escaped} | {', '.join(users.get(name, ['nothing of these']))} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    print(table(), end="")
