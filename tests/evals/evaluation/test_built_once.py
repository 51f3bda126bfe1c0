"""A point is checked once and compiled once: what one `tokenprune eval` builds, counted."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import tokenprune
import tokenprune.api
import tokenprune.evals.evaluation.applied_method
from tokenprune.cli import main
from tokenprune.engine.engine import Engine
from tokenprune.evals.config import points
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.config.sweep_file import read_config
from tokenprune.interfaces.adapter import Adapter
from tokenprune.plan import parse


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many engines and adapters were made, and how many methods were read from what a user wrote."""
    counts: Counter[str] = Counter()
    monkeypatch.setattr(points, "_compiled", {})

    def counted(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not (args and isinstance(args[0], parse.Spec)):  # one that was read already is handed on
                counts[name] += 1
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(Engine, "__init__", counted("engines", Engine.__init__))
    monkeypatch.setattr(Adapter, "__init__", counted("adapters", Adapter.__init__))
    original = parse.parse_method
    for module in [module for name, module in sys.modules.items() if name.startswith("tokenprune")]:
        if getattr(module, "parse_method", None) is original:
            monkeypatch.setattr(module, "parse_method", counted("methods", original))
    return counts


@pytest.mark.parametrize("method", ["vtc_cls", "fastv", "flowcut"])
def test_an_eval_builds_each_point_once(built: Counter[str], tmp_path: Path, method: str) -> None:
    argv = ["eval", "--model", "pocket-llava", "--tasks", "pocket", "--keep", "64", "--limit", "16", "--no-timing"]
    assert main([*argv, "--method", method, "--output", str(tmp_path / "run")]) == 0
    # the method, `random` to compare with, and what keeps everything: for the shared tower, and for costs
    # the method and `random`, to compare with; and what keeps everything, once to share the tower and once for costs
    assert built == {"methods": 4, "adapters": 1, "engines": 4}


def test_an_applied_method_is_read_once(built: Counter[str]) -> None:
    from _tiny import tiny_llava

    with tokenprune.applied(tiny_llava(), "holov@9"):
        pass
    assert built == {"methods": 1, "adapters": 1, "engines": 1}


def test_settings_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[str] = []
    original = RunConfig._check
    monkeypatch.setattr(RunConfig, "_check", lambda self: times.append(self.name) or original(self))
    (tmp_path / "once.yaml").write_text("model: pocket-llava\ntasks: [pocket]\nmethods: [random]\nkeep: [9]\n")
    config = read_config(str(tmp_path / "once.yaml"))
    config.check()
    assert times == ["once"]
    config.keep = [9, 0]
    with pytest.raises(ValueError, match="keep"):
        config.check()
    assert times == ["once", "once"], "other settings are checked anew"
