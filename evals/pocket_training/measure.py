"""Is a pocket model good enough? ``python -m tokenprune.evals.pocket_training.measure`` measures four conditions.

1. It answers: at least 90 percent overall, each local family at least 80; with noise in place of the image it falls to
   within 5 points of always giving each family's commonest answer.
2. There is headroom: at 64 of 576 tokens (pocket-qwen: 11.1 percent of its tokens) random selection loses at least 15
   points over the local families and the oracle at most 3 on exist, attribute, relation and read and 8 on count; at 192
   (22.2 percent) random loses at least 4.
3. [CLS] attention means something: VTC-CLS beats random at 64 over exist, attribute and read, by a paired bootstrap.
   pocket-qwen has no [CLS]; the attention that patches receive stands in.
4. Rankings are stable: two halves of the test split rank the methods with Spearman correlation at least 0.8.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tokenprune.evals.config.points import NONE, Point
from tokenprune.evals.evaluation.applied_method import SharedTower, answer_batch
from tokenprune.evals.models.load import load_model
from tokenprune.evals.pocket.questions import LOCAL_FAMILIES
from tokenprune.evals.statistics.bootstrap import paired_difference
from tokenprune.evals.tasks.load import default_task, load_task
from tokenprune.evals.tasks.task import Sample

METHODS = ("random", "uniform", "pool", "vtc_cls", "todre", "divprune", "holov", "oracle")
DATA = Path(__file__).parents[1] / "pocket" / "data"
BUDGETS: dict[str, tuple[Any, Any]] = {"pocket-llava": (64, 192), "pocket-qwen": (0.111, 0.222)}  # tight and loose
Table = dict[str, np.ndarray]  # label of a point -> [n] 0 or 1, right or wrong


def noise_sample(sample: Sample, seed: int) -> Sample:
    """The same question with uniform noise for a picture, or for each frame of a video."""
    rng = np.random.default_rng(seed)

    def noise(picture: Image.Image) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (picture.height, picture.width, 3), dtype=np.uint8))

    noisy = [noise(frame) for frame in sample.frames]
    return replace(sample, image=noisy if isinstance(sample.image, list) else noisy[0])


def score_all(
    name: str, task_name: str, limit: int | None, batch: int, budgets: dict[Any, tuple[str, ...]]
) -> tuple[Table, list[Sample]]:
    """Right or wrong for every sample, unpruned ("none"), on noise ("noise") and for each method and budget."""
    loaded, task = load_model(name), load_task(task_name)
    points = [Point(name, task_name, NONE, None)]
    points += [Point(name, task_name, method, keep) for keep, methods in budgets.items() for method in methods]
    shared = SharedTower(loaded, points, 0)
    table: dict[str, list[float]] = {point.label: [] for point in points} | {"noise": []}
    seen: list[Sample] = []
    for start in range(0, task.count(limit), batch):
        samples = list(task.load(start, min(start + batch, task.count(limit))))
        questions = [sample.question for sample in samples]
        with torch.inference_mode():
            inputs = shared.encode(dict(loaded.inputs(questions, [sample.image for sample in samples])))
        for point in points:
            texts, _, _ = answer_batch(loaded, point, samples, inputs, 0, task.max_new_tokens)
            table[point.label] += [task.score(text, s.answer) for text, s in zip(texts, samples, strict=True)]
        noisy = [noise_sample(sample, start + i) for i, sample in enumerate(samples)]
        inputs = dict(loaded.inputs(questions, [sample.image for sample in noisy]))
        texts, _, _ = answer_batch(loaded, points[0], noisy, inputs, 0, task.max_new_tokens)
        table["noise"] += [task.score(text, s.answer) for text, s in zip(texts, samples, strict=True)]
        seen += samples
        print(f"{len(seen)} of {task.count(limit)} questions", flush=True)
    return {label: np.array(values) for label, values in table.items()}, seen


def conditions(table: Table, samples: list[Sample], tight: Any, loose: Any) -> dict[str, Any]:
    """The four conditions at two budgets, each with its numbers (percent, points) and whether it is met."""
    family = np.array([sample.family for sample in samples])
    local = np.isin(family, LOCAL_FAMILIES)
    families = list(dict.fromkeys(family.tolist()))

    def by_family(label: str) -> dict[str, float]:
        return {name: _percent(table[label][family == name]) for name in families}

    def loss(label: str, where: np.ndarray) -> float:
        return round(_percent(table["none"][where]) - _percent(table[label][where]), 2)

    full, noise = by_family("none"), by_family("noise")
    commonest = {n: Counter(s.answer for s in samples if s.family == n).most_common(1)[0][1] for n in families}
    base = {name: round(100 * commonest[name] / (family == name).sum(), 2) for name in families}
    expected = float(np.mean([base[name] for name in family]))
    first = {
        "overall": _percent(table["none"]), "by_family": full, "noise_overall": _percent(table["noise"]),
        "noise_by_family": noise, "prior_overall": round(expected, 2), "prior_by_family": base,
    }  # fmt: skip
    first["met"] = (
        first["overall"] >= 90
        and all(full[name] >= 80 for name in LOCAL_FAMILIES)
        and first["noise_overall"] <= expected + 5
    )
    oracle = {name: loss(f"oracle@{tight}", family == name) for name in LOCAL_FAMILIES}
    second = {
        f"random_{tight}_loss": loss(f"random@{tight}", local), f"random_{loose}_loss": loss(f"random@{loose}", local),
        f"oracle_{tight}_loss": oracle,
        f"oracle_{loose}_loss": {n: loss(f"oracle@{loose}", family == n) for n in LOCAL_FAMILIES},
    }  # fmt: skip
    second["met"] = (
        second[f"random_{tight}_loss"] >= 15
        and second[f"random_{loose}_loss"] >= 4
        and all(value <= (8 if name == "count" else 3) for name, value in oracle.items())
    )
    chosen = np.isin(family, ("exist", "attribute", "read"))
    gain = paired_difference(table[f"vtc_cls@{tight}"][chosen].tolist(), table[f"random@{tight}"][chosen].tolist())
    third: dict[str, Any] = {
        f"vtc_cls_{tight}": _percent(table[f"vtc_cls@{tight}"][chosen]),
        f"random_{tight}": _percent(table[f"random@{tight}"][chosen]),
        "difference": round(100 * gain.value, 2), "interval_95": [round(100 * gain.low, 2), round(100 * gain.high, 2)],
    }  # fmt: skip
    third["met"] = gain.low > 0
    # halves by picture, so that no picture is in both
    half = np.array([int(re.findall(r"\d+", sample.sample_id)[0]) % 2 for sample in samples])
    scores = [[table[f"{method}@{tight}"][half == part].mean() for method in METHODS] for part in (0, 1)]
    fourth: dict[str, Any] = {
        "spearman": round(spearman(scores[0], scores[1]), 3),
        "halves": [{m: round(100 * v, 2) for m, v in zip(METHODS, part, strict=True)} for part in scores],
    }  # fmt: skip
    fourth["met"] = fourth["spearman"] >= 0.8
    return {
        "questions": len(samples),
        "conditions": {"1_answers": first, "2_headroom": second, "3_cls": third, "4_stable": fourth},
        "accuracy": {
            label: {"overall": _percent(table[label]), "local": _percent(table[label][local]), **by_family(label)}
            for label in table
        },
    }  # fmt: skip


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation; equal values share their mean rank."""

    def ranks(values: list[float]) -> np.ndarray:
        v = np.asarray(values)
        return np.array([(v < x).sum() + ((v == x).sum() - 1) / 2 for x in v])

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def show(result: dict[str, Any]) -> str:
    """The accuracies as an aligned table, and a line for each condition."""
    columns = list(next(iter(result["accuracy"].values())))
    lines = ["point".ljust(14) + "".join(column.rjust(11) for column in columns)]
    for label, row in result["accuracy"].items():
        lines.append(label.ljust(14) + "".join(f"{row[column]:11.1f}" for column in columns))
    for name, found in result["conditions"].items():
        rest = {key: value for key, value in found.items() if key not in ("met", "halves")}
        lines.append(f"{name}: {'met' if found['met'] else 'NOT MET'} {json.dumps(rest)}")
    return "\n".join(lines)


def _percent(values: np.ndarray) -> float:
    return round(100 * float(values.mean()), 2) if len(values) else float("nan")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-llava", help="pocket name or folder")
    parser.add_argument("--limit", type=int, help="only the first questions of the test split")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="the JSON file to write (data/MODEL_conditions.json)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tight, loose = BUDGETS.get(args.model, BUDGETS["pocket-llava"])
    budgets = {tight: METHODS, loose: ("random", "oracle")}
    table, samples = score_all(args.model, default_task(args.model), args.limit, args.batch, budgets)
    result = conditions(table, samples, tight, loose)
    out = args.out or DATA / f"{args.model.replace('-', '_')}_conditions.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(show(result))


if __name__ == "__main__":
    main()
