"""What SD-RPN learns from: heads, labels and the loss; and the command that trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _tiny import prompts, tiny_llava

import tokenprune
from tokenprune.api import adapter_for
from tokenprune.cli import main
from tokenprune.evals.learned.region_labels import (
    IGNORE,
    answer_attention,
    box_of,
    choose_heads,
    region_loss,
    sinks,
    tri_state,
)
from tokenprune.evals.learned.replay import greedy_answer, replay


def cases(number: int = 400) -> Any:
    """Sparse maps, now and then with sinks, ties, or nothing but zeros."""
    draw = torch.Generator().manual_seed(0)
    for case in range(number):
        rows, cols = (int(torch.randint(1, 13, (), generator=draw)) for _ in range(2))
        raw = torch.rand(rows * cols, generator=draw) ** (1 + case % 9)
        if case % 5 == 0:
            raw = (raw * 8).round() / 8
        if case % 50 == 49:
            raw = torch.zeros(rows * cols)
        yield raw, torch.rand(rows * cols, generator=draw) < 0.1, (rows, cols)


def reference(raw: list[float], sink: list[bool], grid: tuple[int, int]) -> list[int]:
    """The rules of the card, cell by cell."""
    values = [0.0 if out else value for value, out in zip(raw, sink)]
    top = max(values)
    front = [i for i, value in enumerate(values) if value > np.float32(0.2) * np.float32(top)]
    where = [divmod(i, grid[1]) for i in (front or range(len(raw)))]
    low, high = min(r for r, _ in where), max(r for r, _ in where)
    left, right = min(c for _, c in where), max(c for _, c in where)
    if (high - low + 1) * (right - left + 1) >= 0.5 * len(raw):
        return [IGNORE] * len(raw)
    labels = []
    for i, value in enumerate(values):
        row, col = divmod(i, grid[1])
        inside = low <= row <= high and left <= col <= right
        below = value < np.float32(0.1) * np.float32(top)
        labels.append(1 if i in front else 0 if not inside and below else IGNORE)
    return labels


def test_labels_are_those_of_the_rules() -> None:
    found = set()
    for raw, sink, grid in cases():
        label = tri_state(raw, sink, grid)
        assert label.tolist() == reference(raw.tolist(), sink.tolist(), grid)
        found |= set(label.tolist())
        front = label == 1
        assert not bool((front & sink).any())
        if bool(front.any()):
            low, left, high, right = box_of(front.view(grid))
            assert not bool((label.view(grid)[low : high + 1, left : right + 1] == 0).any())
            assert (high - low + 1) * (right - left + 1) < 0.5 * len(raw)
        scaled = tri_state(raw * 4, sink, grid)
        assert torch.equal(label, scaled)
    assert found == {1, 0, IGNORE}


def test_padding_is_background_and_never_foreground() -> None:
    raw = torch.zeros(8, 8)
    raw[3, 3], raw[0, 0] = 1.0, 5.0
    padded = torch.zeros(8, 8, dtype=torch.bool)
    padded[0] = True
    label = tri_state(raw.flatten(), torch.zeros(64, dtype=torch.bool), (8, 8), padded.flatten()).view(8, 8)
    assert label[3, 3] == 1 and bool((label[0] == 0).all()) and int((label == 1).sum()) == 1


def test_a_rejected_picture_costs_nothing() -> None:
    label = tri_state(torch.ones(16), torch.zeros(16, dtype=torch.bool), (4, 4))
    assert label.tolist() == [IGNORE] * 16
    logits = torch.randn(16, requires_grad=True)
    loss = region_loss(logits, label)
    loss.backward()
    assert float(loss.detach()) == 0 and logits.grad is not None and not bool(logits.grad.any())
    some = torch.tensor([1, 0, IGNORE])
    values = torch.tensor([0.3, -0.2, 9.0])
    expected = -(values[0].sigmoid().log() + (1 - values[1].sigmoid()).log()) / 2
    assert float(region_loss(values, some)) == pytest.approx(float(expected), rel=1e-5)


def test_heads_that_look_at_little_of_the_picture_are_chosen() -> None:
    maps = []
    for shift in range(5):
        one = torch.full((6, 2, 40), 1 / 80)
        one[3, 1] = 0.0
        one[3, 1, 5 + shift] = 0.6  # looks at one place
        one[4, 0] = 0.0
        one[4, 0, :4] = 0.15  # at four
        one[1, 0, :] = 0.0
        one[5, 0, 7] = 0.9  # too late
        maps.append(one)
    assert choose_heads(maps, 2) == [(3, 1), (4, 0)]
    early = torch.full((4, 2, 30), 0.01)
    early[1, :, 4] = 0.9
    assert sinks(early).nonzero().flatten().tolist() == [4]


def test_where_an_answer_looks_are_the_rows_that_predict_it() -> None:
    model, batch = tiny_llava().requires_grad_(False), prompts([1])
    answer = greedy_answer(model, batch, 3)
    done = replay(adapter_for(model), batch, answer, gradients=False)
    maps = answer_attention(done)
    first = batch["input_ids"].shape[1] - 1
    for layer in range(4):
        for head in range(4):
            rows = [done.attention[layer][0, head, first + step][done.visuals[0]] for step in range(3)]
            torch.testing.assert_close(maps[layer, head], sum(rows) / 3)


@pytest.mark.slow
@pytest.mark.pocket
def test_the_command_trains_and_its_branch_prunes_and_zooms(tmp_path: Path, capsys: Any) -> None:
    words = ["train", "sd_rpn", "--model", "pocket-llava", "--output", str(tmp_path), "--samples", "6"]
    words += ["--held-out", "6", "--epochs", "1"]
    assert main(words) == 0
    assert "held-out foreground above background" in capsys.readouterr().out
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["layer"] == 3 and said["layers"] == 3 and len(said["heads"]) == 3
    from tokenprune.evals.learned.data import draw_training
    from tokenprune.evals.models.chat_template import one_turn, prompt_text
    from tokenprune.evals.models.load import load_model

    loaded = load_model("pocket-llava")
    (sample,), _, _ = draw_training("pocket", 1, 1, 0)
    inputs = loaded.inputs([sample.question], [sample.image])
    with tokenprune.applied(loaded.model, "sd_rpn", keep=16, branch=str(tmp_path)) as handle, torch.no_grad():
        plain = loaded.model(**inputs).logits
        assert len(handle.kept[0][0]) == 16
    text = prompt_text(loaded.processor, one_turn(sample.question, sample.image))
    with torch.no_grad():
        plain = loaded.model(**inputs).logits
        same, none = tokenprune.zoomed(loaded.model, loaded.processor, text, sample.image, str(tmp_path), tau=1.0)
        assert none == [] and torch.equal(loaded.model(**same).logits, plain)
        more, boxes = tokenprune.zoomed(
            loaded.model, loaded.processor, text, sample.image, str(tmp_path), tau=0.02, most=99
        )
        assert boxes and more["pixel_values"].shape[0] == 1 + len(boxes)
        assert loaded.model.generate(**more, max_new_tokens=2, do_sample=False).shape[0] == 1
    with pytest.raises(ValueError, match="placeholder of one picture"):
        tokenprune.zoomed(loaded.model, loaded.processor, "no picture", sample.image, str(tmp_path))
