"""What is known of runs of a vision tower before any: arguments that the config sets, when signals are spent."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.pruner import Stage
from tokenprune.interfaces.signals import VECTOR_SIGNALS, Signal, TowerInfo

OF_ANY_CALL = {"return_dict", "output_attentions", "output_hidden_states", "use_cache"}
"""Arguments of features calls that say nothing of the features."""


def spent_signals(stages: Sequence[Stage], tower: TowerInfo) -> dict[int, list[Signal]]:
    """By depth of a stage inside the tower, the vectors by token that no stage reads after it: they take much room."""
    last: dict[Signal, Stage] = {signal: stage for stage in stages for signal in stage.signals(tower)}
    spent: dict[int, list[Signal]] = {}
    for signal, stage in last.items():
        if signal.name in VECTOR_SIGNALS and stage.place == "vision":
            spent.setdefault(stage.depth, []).append(signal)
    return spent


def arguments_in_config(adapter: Adapter) -> dict[str, Any]:
    """Arguments of the features calls that stand in the model's config too, with their values there."""
    config = adapter.model.config
    calls = [adapter.features_call(kind) for kind in adapter.features]
    methods = [getattr(type(owner), name) for owner, name in calls]
    names = {name for method in methods for name in inspect.signature(method).parameters} - OF_ANY_CALL
    return {name: getattr(config, name) for name in sorted(names) if hasattr(config, name)}
