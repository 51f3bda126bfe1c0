"""Finished run folders without a model: drawn answers, made costs, real files. For tests of what reads such folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokenprune.evals.config.points import NONE, Point
from tokenprune.evals.config.run_config import RunConfig
from tokenprune.evals.results.summary import provenance, summarise, write_results

FAMILIES = ("count", "read", "global")
SKILL = {NONE: 0.9, "random": 0.45, "uniform": 0.5, "downsample": 0.4, "holov": 0.75, "vtc_cls": 0.85, "oracle": 0.9,
         "vflowopt": 0.8}  # fmt: skip
ALL = (NONE, "random", "uniform", "downsample", "holov", "vtc_cls", "oracle")
GRID = 24


def fake_run(
    folder: Path,
    methods: tuple[str, ...] = ALL,
    keeps: tuple[Any, ...] = (192, 64),
    samples: int = 60,
    pictured: int = 6,
    model: str = "pocket-llava",
    task: str = "pocket",
    seed: int = 0,
    name: str | None = None,
    files: tuple[str, ...] = (),
) -> Path:
    """Write a run: `samples` questions, `pictured` of them with a picture of 24 x 24 tokens.

    Args:
        files: method files that run beside the methods.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked: list[Any] = [*(method for method in methods if method != NONE), *files]
    config = RunConfig(name or folder.name, model, [task], asked, list(keeps), limit=samples, output=str(folder))
    points = [replace(point, reference=False) for point in config.points() if point.method in methods or point.shown]
    difficulty = np.random.default_rng(99).random(samples)  # what is hard is hard for all of them
    rows = {point.key: _rows(point, difficulty, pictured, seed) for point in points}
    measures = {point.key: _measures(point) for point in points}
    records = summarise(points, rows, measures, 0)
    write_results(folder, records, rows, {**provenance(config, 1.0), "notes": []})
    _pictures(folder, model, task, pictured)
    return folder


def _rows(point: Point, difficulty: np.ndarray, pictured: int, seed: int) -> list[dict]:
    rng = np.random.default_rng([seed, *point.label.encode()])
    kept = _kept(point)
    skill = SKILL[point.method] * (1.0 if kept > 64 else 0.9)
    rows = []
    for i, hard in enumerate(difficulty):
        right = 0.6 * hard + 0.4 * rng.random() < skill
        indices = np.sort(rng.permutation(GRID * GRID)[:kept]).tolist()
        row = {
            "settings": "fake", "point": point.key, "sample_id": f"s{i}", "family": FAMILIES[i % len(FAMILIES)],
            "question": f"what is number {i}?", "answer": str(i % 7),
            "prediction": str(i % 7) if right else str((i + 1 + rng.integers(3)) % 9), "correct": float(right),
            "visual_tokens": GRID * GRID, "kept_tokens": float(kept),
            "kept": None if i >= pictured else [] if point.method == NONE else [indices],
        }  # fmt: skip
        rows.append(row)
    return rows


def _kept(point: Point) -> int:
    if isinstance(point.keep, float):
        return round(point.keep * GRID * GRID)
    return int(point.keep) if isinstance(point.keep, int) else GRID * GRID


def _measures(point: Point) -> dict:
    kept = _kept(point)
    tower = 4.7e9 * (kept / GRID**2 if point.method == "downsample" else 1.0)
    parts = {"vision": tower, "projector": 1.3e8, "selection": 1e6, "prefill": 1.1e7 * kept, "decode": 1.1e7}
    parts["total"] = parts["vision"] + parts["projector"] + parts["selection"] + parts["prefill"]
    whole = {**parts, "total": 4.83e9 + 1.1e7 * GRID**2}
    time = {"median": 1e-3 * kept, "q25": 0.9e-3 * kept, "q75": 1.1e-3 * kept, "n": 5}
    kv = 6144.0 * (kept + 12)
    return {
        "flops": {
            "analytic": parts, "measured": parts, "unpruned": whole, "paper": 5e9, "difference": {}, "agree": True,
        },
        "kv": {
            "measured": kv, "analytic": kv, "unpruned": 6144.0 * 588, "equivalent_tokens": float(kept),
            "per_layer": [kv / 6] * 6, "lengths": [kept + 12] * 6,
        },
        "times": {"prefill": time, "unpruned_prefill": time, "decode": time},
    }  # fmt: skip


def _pictures(folder: Path, model: str, task: str, count: int) -> None:
    target = folder / "pictures"
    target.mkdir(exist_ok=True)
    entries = []
    for i in range(count):
        across, down = np.meshgrid(np.linspace(80, 255, 336), np.linspace(80, 255, 336))
        pixels = np.stack([across, down, np.full_like(across, 80 + 20 * i)], axis=2)
        Image.fromarray(pixels.astype(np.uint8)).save(target / f"s{i}.jpg")
        view = {"file": f"s{i}.jpg", "rows": GRID, "cols": GRID, "start": 0, "kind": "image"}
        entries.append({"model": model, "task": task, "sample_id": f"s{i}", "views": [view]})
    (target / "index.json").write_text(json.dumps(entries))
