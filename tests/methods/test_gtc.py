"""GTC: the student against plain numpy, what it is fed, and its files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from _files import student
from _tiny import prompts, tiny_llava
from _views import make_view
from scipy.special import erf

import tokenprune
from tokenprune.interfaces.signals import INSTRUCTION_ATTENTION, Signal
from tokenprune.methods import gtc
from tokenprune.methods.gtc import CHANNELS, Gtc, new_student, student_folder, student_scores


def reference(weights: dict[str, torch.Tensor], attention: list[float]) -> np.ndarray:
    """Scores of one visual in float64, position by position."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    total = sum(attention)
    hidden = [np.array([np.log(value / total * len(attention) + 0.01)]) for value in attention]
    for number in range(5):
        filters, shift = w[f"blocks.{number}.depthwise.weight"][:, 0], w[f"blocks.{number}.depthwise.bias"]
        mix, offset = w[f"blocks.{number}.pointwise.weight"][:, :, 0], w[f"blocks.{number}.pointwise.bias"]
        nothing = np.zeros_like(hidden[0])
        wide = [nothing, *hidden, nothing]
        after = []
        for at in range(len(hidden)):
            mixed = mix @ (sum(filters[:, tap] * wide[at + tap] for tap in range(3)) + shift) + offset
            after.append(0.5 * mixed * (1 + erf(mixed / np.sqrt(2))))
        hidden = after
    return np.array([float(w["head.weight"][0, :, 0] @ one + w["head.bias"][0]) for one in hidden])


def test_scores_are_those_of_plain_loops() -> None:
    draw = np.random.default_rng(0)
    for case in range(400):
        weights, count = new_student(case % 7), int(draw.integers(1, 25))
        attention = draw.random(count) * draw.choice([1e-6, 1.0]) + 1e-9
        mine = student_scores(weights, torch.tensor(attention, dtype=torch.float32)[None])[0]
        expected = reference(weights, attention.tolist())
        assert np.abs(mine.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_best_stay_and_ties_go_to_the_lower_index() -> None:
    method = Gtc(student=student())
    draw = np.random.default_rng(1)
    for case in range(300):
        rows, cols, images = (int(number) for number in draw.integers(1, 8, 3))
        count = rows * cols
        if count == 1:
            continue
        budget = int(draw.choice([1, count - 1, draw.integers(1, count)]))
        view = make_view(method, (rows, cols), budget, images, seed=case)
        if case % 3 == 0:  # all alike: scores differ near the ends only
            view.signals = {Signal(INSTRUCTION_ATTENTION, 0): torch.full((images, count), 0.25)}
        scores, kept = method.score(view).tolist(), method.select(view).indices.tolist()
        for row, chosen in zip(scores, kept):
            assert chosen == sorted(sorted(range(count), key=lambda at: (-row[at], at))[:budget])


def test_padding_changes_no_score() -> None:
    weights = new_student(3)
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(count)) for count in (9, 1, 30, 17)]
    attention = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7.0)
    real = torch.arange(30)[None] < torch.tensor([len(row) for row in rows])[:, None]
    together = student_scores(weights, attention, real)
    assert bool((together == -torch.inf).eq(~real).all())
    for row, scores in zip(rows, together):
        torch.testing.assert_close(scores[: len(row)], student_scores(weights, row[None])[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together.softmax(1).sum(1), torch.ones(4))


def test_scale_of_attention_does_not_matter_and_nothing_is_no_error() -> None:
    weights, attention = new_student(0), torch.rand(2, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(student_scores(weights, attention), student_scores(weights, attention * 1e-4))
    assert bool(student_scores(weights, torch.zeros(1, 20)).isfinite().all())


def test_a_student_is_small() -> None:
    assert sum(value.numel() for value in new_student(0).values()) * 4 < 1_000_000
    assert CHANNELS == (1, 32, 64, 128, 256, 512)
    assert (Path(student()) / gtc.WEIGHTS).stat().st_size < 1_000_000


def test_without_a_student_a_sentence_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenprune train gtc --model MODEL --data DATA --output FOLDER"):
        Gtc(student=None)
    with pytest.raises(ValueError, match="neither a folder with student.safetensors"):
        Gtc(student=str(tmp_path))
    (tmp_path / gtc.CONFIG).write_text("{}", encoding="utf-8")
    from safetensors.torch import save_file

    save_file({"other": torch.zeros(3)}, tmp_path / gtc.WEIGHTS)
    method = Gtc(student=str(tmp_path))
    with pytest.raises(ValueError, match="does not hold the weights of a student"):
        method.score(make_view(method))


def test_the_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    reads = []
    load = safetensors.torch.load_file
    monkeypatch.setattr(safetensors.torch, "load_file", lambda path: reads.append(path) or load(path))
    model = tiny_llava()
    with tokenprune.applied(model, "gtc", keep=9, student=student(1)), torch.no_grad():
        first = model(**prompts([1, 2])).logits
        assert torch.equal(model(**prompts([1, 2])).logits, first)
    assert len(reads) == 1


def test_keeping_all_changes_no_bit_and_the_words_change_what_stays() -> None:
    model, batch = tiny_llava(), prompts([1])
    with torch.no_grad():
        plain = model(**batch).logits
        with tokenprune.applied(model, "gtc", keep=1.0):
            assert torch.equal(model(**batch).logits, plain)
        other = {**batch, "input_ids": batch["input_ids"].clone()}
        other["input_ids"][0, -3:] = torch.tensor([9, 11, 40])
        with tokenprune.applied(model, "gtc", keep=9) as handle:
            kept = []
            for inputs in (batch, other):
                model(**inputs)
                kept.append(handle.kept[0][0])
    assert not torch.equal(*kept)


def test_it_acts_at_the_input_only() -> None:
    with pytest.raises(ValueError, match="acts at 'input', not at 'layer'"):
        tokenprune.apply(tiny_llava(), {"at": "layer:2", "prune": "gtc", "keep": 9})


@pytest.mark.parametrize("model", ["pocket-llava", "pocket-qwen"])
def test_shipped_students_say_what_they_are(model: str) -> None:
    said = Gtc(student=model).trained
    assert json.loads((student_folder(model) / gtc.CONFIG).read_text()) == said
    assert said["model"] == model and said["method"] == "gtc"
    assert said["spearman"]["student"] > said["spearman"]["layer_0"]
    assert (student_folder(model) / gtc.WEIGHTS).stat().st_size < 1_000_000
