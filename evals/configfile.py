"""From a YAML file, or the name of a packaged one, to a checked `RunConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenprune.evals.config import Measure, Overlays, RunConfig
from tokenprune.registry import near


def _build(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must be a mapping, got {data!r}.")
    known = [item.name for item in dataclasses.fields(cls)]
    for key in data:
        if key not in known:
            raise ValueError(f"{where} has an unknown key {key!r}.{near(str(key), known)} Known: {', '.join(known)}.")
    missing = [
        item.name
        for item in dataclasses.fields(cls)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING and item.name not in data
    ]
    if missing:
        raise ValueError(f"{where} lacks the key {missing[0]!r}.")
    return cls(**data)


def read_config(path: str | Path, **overrides: Any) -> RunConfig:
    """Read and check a sweep file.

    Args:
        path: a YAML file, or the name of a packaged one (`demo`, `configs/demo.yaml`).
        overrides: win over the file; None means "not given".

    Raises:
        ValueError: an unknown key (with near matches), a missing one, or a value that cannot work.
    """
    import yaml

    file = find_config(path)
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(data, Mapping):
        raise ValueError(f"{file} must hold a mapping of settings, got {type(data).__name__}.")
    data = {"name": file.stem, **data, **{key: value for key, value in overrides.items() if value is not None}}
    for key, cls in (("measure", Measure), ("overlays", Overlays)):
        if key in data and not isinstance(data[key], cls):
            data[key] = _build(cls, data[key], f"{key} in {file.name}")
    for key in ("tasks", "methods", "keep"):
        if key in data and not isinstance(data[key], list):
            data[key] = [data[key]]
    config = _build(RunConfig, data, file.name)
    config.check()
    return config


def packaged_configs() -> dict[str, Path]:
    """Sweep files that ship with the package, by name."""
    import tokenprune

    folders = [Path(folder) / "configs" for folder in tokenprune.__path__]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def find_config(path: str | Path) -> Path:
    """The sweep file at `path`, or the packaged one of that name.

    Raises:
        FileNotFoundError: neither is there; near matches are named.
    """
    if Path(path).is_file():
        return Path(path)
    packaged = packaged_configs()
    stem = Path(path).stem
    if str(path) in (stem, f"configs/{stem}.yaml") and stem in packaged:
        return packaged[stem]
    raise FileNotFoundError(
        f"There is no sweep file {path}.{near(stem, list(packaged))} Packaged: {', '.join(packaged)}."
    )
