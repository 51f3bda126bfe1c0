"""Calibration of zerotuning: entropies, the choice by hand, and end to end on a pocket model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenprune
from tokenprune.cli import main
from tokenprune.evals.models.load import load_model
from tokenprune.evals.tasks.unlabelled import draw_samples
from tokenprune.evals.tuning.first_key import GRID, entropy


def test_entropy_of_nothing_known_and_of_all_known() -> None:
    assert entropy(torch.zeros(50)) == pytest.approx(math.log(50))
    assert entropy(torch.nn.functional.one_hot(torch.tensor(3), 50) * 1e4) == pytest.approx(0, abs=1e-12)


@pytest.mark.pocket
@pytest.mark.parametrize("labels", [False, True])
def test_the_file_holds_the_best_of_the_grid_and_is_taken(labels: bool, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "zerotuning.json"
    asked = ["--model", "pocket-llava", "--data", "pocket", "--samples", "3", "--output", str(file)]
    assert main(["calibrate", "zerotuning", *asked, *(["--labels"] if labels else [])]) == 0
    assert f"in heads {', '.join(map(str, json.loads(file.read_text())['heads']))}" in capsys.readouterr().out
    said = json.loads(file.read_text(encoding="utf-8"))
    raised = [head for head, cost in enumerate(said["single_heads"]) if cost < said["stock"]]
    lowered = [head for head, cost in enumerate(said["single_heads"]) if cost > said["stock"]]
    everything = list(range(said["decoder"]["heads"]))
    assert said["heads"] == ((raised if len(raised) >= len(lowered) else lowered) or everything)
    tried = dict(map(tuple, said["grid"]))
    assert tuple(tried) == GRID and tried[said["gamma"]] == min(tried.values()) and tried[1.0] == said["stock"]
    loaded = load_model("pocket-llava")
    samples, _ = draw_samples("pocket", 3, 1, 0)
    tokenizer = loaded.processor.tokenizer
    costs = []
    for gamma in (1.0, 3.0):
        total = 0.0
        with (
            torch.no_grad(),
            tokenprune.applied(loaded.model, {"method": "zerotuning", "gamma": gamma, "heads": said["heads"]}),
        ):
            for one in samples:
                logits = loaded.model(**loaded.inputs([one.question], [one.image])).logits[0, -1].double()
                if labels:
                    begins = tokenizer.decode([int(logits.argmax())]).strip()
                    total += not (begins and str(one.answer).startswith(begins))
                else:
                    p = logits.softmax(-1)
                    total -= float((p * p.log()).sum())
        costs.append(total / 3)
    assert [tried[1.0], tried[3.0]] == pytest.approx(costs, rel=1e-4, abs=1e-7)
    with tokenprune.applied(loaded.model, {"method": "zerotuning", "calibration": str(file)}) as handle:
        (one,) = handle.interventions
        assert one.files == (file,)


def test_labels_are_of_zerotuning_alone(tmp_path: Path, capsys: Any) -> None:
    asked = ["--model", "pocket-llava", "--output", str(tmp_path / "x.json"), "--labels"]
    assert main(["calibrate", "shortv", *asked]) == 2
    assert "--labels is of zerotuning" in capsys.readouterr().err
