"""From a YAML file, or the name of a packaged one, to a checked `RunConfig`.

`include` names a file, or a list of them, relative to the file that includes them. A later file wins over an earlier
one, and the file's own keys win over all that it includes. Mappings (`measure`, `overlays`) are joined key by key;
everything else, lists too, is replaced as a whole.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenprune.evals.config.measure import Measure, Overlays
from tokenprune.evals.config.run_config import ALIASES, RunConfig
from tokenprune.evals.config.targets import read_target
from tokenprune.plan.expression import read_yaml
from tokenprune.registry import near

INCLUDE = "include"
_SECTIONS: dict[str, type] = {"measure": Measure, "overlays": Overlays}
_LISTS = ("tasks", "methods", "keep", "seeds")


def known_keys() -> list[str]:
    """What a sweep file may hold, `include` left out."""
    return [ALIASES.get(item.name, item.name) for item in dataclasses.fields(RunConfig)]


def read_config(path: str | Path, **overrides: Any) -> RunConfig:
    """Read and check a sweep file.

    Args:
        path: a YAML file, or the name of a packaged one (`demo`, `configs/demo.yaml`).
        overrides: win over the file; None means "not given".

    Raises:
        ValueError: an unknown key (with near matches), a missing one, or a value that cannot work.
        FileNotFoundError: the file, or one that it includes, is not there.
    """
    file = find_config(path)
    data = {"name": file.stem, **read_settings(file)}
    data |= {key: value for key, value in overrides.items() if value is not None}
    for key in _LISTS:
        if key in data and not isinstance(data[key], list):
            data[key] = [data[key]]
    if "targets" in data:
        if not isinstance(data["targets"], list):
            raise ValueError(f"targets in {file.name} must be a list of mappings, got {data['targets']!r}.")
        data["targets"] = [read_target(number, entry) for number, entry in enumerate(data["targets"])]
    if data.get("points"):
        data = {"model": [], "tasks": [], "methods": [], **data}
    for key, cls in _SECTIONS.items():
        if key in data:
            data[key] = cls(**data[key])
    for item in dataclasses.fields(RunConfig):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in data:
            raise ValueError(f"{file.name} lacks the key {item.name!r}.")
    names = {alias: name for name, alias in ALIASES.items()}
    config = RunConfig(**{names.get(key, key): value for key, value in data.items()})
    config.check()
    return config


def read_settings(file: Path, includers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a sweep file and of what it includes, joined; every file's own keys are checked.

    Args:
        includers: the files that led here, to refuse a circle.

    Raises:
        ValueError, FileNotFoundError: see `read_config`; the message names the file at fault.
    """
    data = read_yaml(file)
    if not isinstance(data, Mapping):
        raise ValueError(f"{file} must hold a mapping of settings, got {type(data).__name__}.")
    data = dict(data)
    wanted = data.pop(INCLUDE, [])
    _check_keys(data, known_keys(), file.name, beside=[INCLUDE])
    for key, cls in _SECTIONS.items():
        if key in data:
            _check_keys(data[key], [item.name for item in dataclasses.fields(cls)], f"{key} in {file.name}")
    joined: dict[str, Any] = {}
    for name in [wanted] if isinstance(wanted, str) else wanted if isinstance(wanted, list) else [None]:
        if not isinstance(name, str):
            raise ValueError(f"include in {file.name} is a path or a list of paths, got {wanted!r}.")
        joined = _over(joined, read_settings(_included(file, name, includers), (*includers, file.resolve())))
    return _over(joined, data)


def _included(file: Path, name: str, includers: tuple[Path, ...]) -> Path:
    target = file.parent / name
    if not os.path.isfile(target):
        there = sorted(other.name for other in target.parent.glob("*.y*ml")) if os.path.isdir(target.parent) else []
        raise FileNotFoundError(
            f"{file.name} includes {name}, and there is no file {target}.{near(target.name, there)}"
        )
    chain = [*includers, file.resolve()]
    if target.resolve() in chain:
        circle = " -> ".join(one.name for one in [*chain[chain.index(target.resolve()) :], target.resolve()])
        raise ValueError(f"Files include each other in a circle: {circle}. Take one of these includes away.")
    return target


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`; the mappings of both are joined, everything else is replaced."""
    joined = dict(below)
    for key, value in above.items():
        old = joined.get(key)
        joined[key] = {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return joined


def _check_keys(data: Any, known: list[str], where: str, beside: list[str] | None = None) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be a mapping, got {data!r}.")
    for key in data:
        if key not in known:
            names = [*known, *(beside or [])]
            raise ValueError(f"{where} has an unknown key {key!r}.{near(str(key), names)} Known: {', '.join(names)}.")


def packaged_configs() -> dict[str, Path]:
    """Sweep files that ship with the package, by name (`demo`, `papers/llava_next_7b`)."""
    import tokenprune

    folders = [Path(folder) / "configs" for folder in tokenprune.__path__]
    found = {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}
    # files with an underscore are parts that others include
    papers = {f"papers/{file.stem}": file for folder in folders for file in sorted(folder.glob("papers/[!_]*.yaml"))}
    return {**found, **papers}


def find_config(path: str | Path) -> Path:
    """The sweep file at `path`, the packaged one of that name, or the settings of the run in the folder `path`.

    Raises:
        FileNotFoundError: none of them is there; near matches are named.
    """
    if os.path.isfile(path):
        return Path(path)
    written = Path(path) / "config.yaml"
    if os.path.isfile(written):
        return written
    packaged = packaged_configs()
    name = str(path).removeprefix("configs/").removesuffix(".yaml")
    if name in packaged:
        return packaged[name]
    raise FileNotFoundError(
        f"There is no sweep file {path}.{near(name, list(packaged))} Packaged: {', '.join(packaged)}."
    )
