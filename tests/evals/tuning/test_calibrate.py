"""Schedules of fitprune: the search by hand on given masses, and end to end on a pocket model."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

import tokenprune
from tokenprune.cli import main
from tokenprune.evals.tuning.deletions import Mass, Widths, deletions_at, masses_of, may_leave, schedule_for
from tokenprune.interfaces.signals import TEXT_MAX_ATTENTION, VISUAL_MAX_ATTENTION
from tokenprune.methods.fitprune import FitPrune

WIDTHS = Widths(hidden=16, mlp=32, layers=5)


# --- the reference, from the card -------------------------------------------------------------------------------------


def prefix(mass: list[float], there: set[int], alpha: float) -> set[int]:
    gone = sum(mass[i] for i in range(len(mass)) if i not in there)
    taken: set[int] = set()
    for i in sorted(there, key=lambda i: (mass[i], i)):
        gone += mass[i]
        if gone > alpha * sum(mass) * (1 + 1e-12) + 1e-12:
            break
        taken.add(i)
    return taken


def flops(counts: list[int]) -> float:
    return sum(4 * n * 16 * 16 + 2 * n * n * 16 + 3 * n * 16 * 32 for n in counts)


def by_hand(samples: list[tuple[list[list[float]], list[list[float]]]], alpha: float, ratio: float):
    n = len(samples[0][0][0])
    there = [set(range(n)) for _ in samples]
    deletions, left = [0] * 5, n
    for layer in range(4):
        sizes = []
        for (own, text), alive in zip(samples, there):
            both = prefix(own[layer], alive, alpha) & prefix(text[layer], alive, alpha)
            sizes.append(len(both))
            alive -= both
        deletions[layer] = min(math.floor(sum(sizes) / len(sizes)), left - 1)
        left -= deletions[layer]
        counts = [n - sum(deletions[:k]) for k in range(layer + 2)]
        counts += counts[-1:] * (5 - len(counts))
        if flops(counts) <= (1 - ratio) * flops([n] * 5):
            return deletions, True
    return deletions, False


def drawn(draw: random.Random, count: int, n: int) -> list[tuple[list[list[float]], list[list[float]]]]:
    """Whole numbers, so that sums are exact and ties common."""
    return [
        tuple([[float(draw.choice([1, 1, 2, 4, 16])) for _ in range(n)] for _ in range(5)] for _ in range(2))
        for _ in range(count)
    ]


def masses(samples) -> list[Mass]:
    return [Mass(torch.tensor(own).double(), torch.tensor(text).double()) for own, text in samples]


def test_deletions_equal_the_reference():
    draw, reached_any = random.Random(0), set()
    for _ in range(400):
        samples = drawn(draw, draw.randint(1, 3), draw.randint(2, 24))
        alpha, ratio = draw.choice([0.0, 0.125, 0.25, 0.5, 0.75, 1.0]), draw.choice([0.1, 0.4, 0.7])
        found = deletions_at(alpha, masses(samples), WIDTHS, ratio)
        assert found == by_hand(samples, alpha, ratio)
        reached_any.add(found[1])
    assert reached_any == {True, False}


def test_nothing_leaves_without_room_and_all_may_with_all_of_it():
    mass, there = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([True, True, True])
    assert not may_leave(mass, there, 0.0).any()
    assert may_leave(mass, there, 1.0).all()
    assert may_leave(mass, there, 0.5).tolist() == [True, True, False]
    assert may_leave(mass, torch.tensor([False, True, True]), 0.5).tolist() == [False, True, False]


def test_the_smallest_alpha_that_gets_there_is_taken():
    draw = random.Random(1)
    for _ in range(40):
        samples = masses(drawn(draw, 2, 20))
        said = schedule_for(0.4, samples, WIDTHS)
        assert said["flops"] >= 0.4 and said["keep"] == 20 - sum(said["deletions"][:-1]) >= 1
        assert deletions_at(said["alpha"], samples, WIDTHS, 0.4) == (said["deletions"], True)
        assert not deletions_at(said["alpha"] - 0.0101, samples, WIDTHS, 0.4)[1]
    with pytest.raises(ValueError, match="cannot fall by 0.99"):
        schedule_for(0.99, samples, WIDTHS)


def test_samples_of_several_sizes_count_by_share():
    one, other = masses(drawn(random.Random(2), 1, 10) + drawn(random.Random(3), 1, 20))
    deletions, _ = deletions_at(0.5, [one, other], WIDTHS, 0.99)
    alone = [deletions_at(0.5, [each], WIDTHS, 0.99)[0] for each in (one, other)]
    assert deletions[0] == math.floor(15 * (alone[0][0] / 10 + alone[1][0] / 20) / 2 + 1e-9)


def test_masses_are_the_signals_of_the_unpruned_model():
    from _tiny import prompts, tiny_llava

    model, batch = tiny_llava(), prompts([2])
    found = masses_of(model, [batch, prompts([1])], 4, lambda line: None)
    assert [one.own.shape for one in found] == [(4, 36)] * 3
    assert all(bool((one.own[:3] > 0).all()) and not one.text[3].any() for one in found)
    seen = {}

    class Watched(FitPrune):
        def select(self, view):
            seen.update({name: view.signal(name, 2) for name in (VISUAL_MAX_ATTENTION, TEXT_MAX_ATTENTION)})
            return super().select(view)

    method = Watched(schedule=[1, 1, 1, 1])
    method.name = "fitprune"
    with tokenprune.applied(model, {"at": "layer:3", "prune": method, "keep": 9}), torch.no_grad():
        model(**batch)
    torch.testing.assert_close(torch.stack([one.own[2] for one in found[:2]]).float(), seen[VISUAL_MAX_ATTENTION])
    torch.testing.assert_close(torch.stack([one.text[2] for one in found[:2]]).float(), seen[TEXT_MAX_ATTENTION])


@pytest.mark.pocket
def test_the_command_writes_what_apply_takes(tmp_path, capsys):
    file = tmp_path / "out" / "fitprune.json"
    words = f"calibrate fitprune --model pocket-llava --data pocket --samples 3 --ratio 0.3 0.6 --output {file}"
    assert main(words.split()) == 0
    said = json.loads(file.read_text())
    assert [one["ratio"] for one in said["schedules"]] == [0.3, 0.6] and said["tokens"] == 576
    assert "ratio 0.6:" in capsys.readouterr().out
    for one in said["schedules"]:
        assert one["flops"] >= one["ratio"] and len(one["deletions"]) == said["layers"]
    assert len(FitPrune(schedule=str(file)).curves()) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("fitprun --output x.json", "nothing to calibrate for 'fitprun'"),
        ("fitprune --output x.json --ratio 1.5", "--ratio is the share of FLOPs that shall go, in (0, 1), got 1.5"),
        ("fitprune --output x.json --samples 0", "--samples must be at least 1, got 0"),
        ("fitprune --output x.yaml", "--output is a JSON file"),
        ("fitprune --output x.json --data nothing", "nothing"),
    ],
)
def test_bad_words_are_refused(words, sentence, capsys):
    assert main(["calibrate", *words.split()]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("method", ["shortv", "zerotuning"])
def test_nothing_is_found_from_nan(method, tiny_folder, tiny_task, tmp_path, capsys, monkeypatch):
    from tokenprune.evals.tuning import calibrate

    def broken(*given):
        loaded = load_model(*given)
        weight = loaded.adapter.layers[0].self_attn.q_proj.weight
        weight.data[0, 0] = math.nan
        return loaded

    load_model = calibrate.load_model
    monkeypatch.setattr(calibrate, "load_model", broken)
    file = tmp_path / "found.json"
    asked = ["--model", tiny_folder, "--data", tiny_task, "--samples", "2", "--output", str(file)]
    assert main(["calibrate", method, *asked]) == 2
    assert "NaN or infinity" in " ".join(capsys.readouterr().err.split()) and not file.exists()


def test_no_schedule_is_made_of_nan():
    from types import SimpleNamespace

    from tokenprune.evals.tuning.deletions import _Recorder

    view = SimpleNamespace(signal=lambda name, depth: torch.tensor([[0.5, math.nan]]), depth=1)
    with pytest.raises(ValueError, match="NaN or infinity"):
        _Recorder().select(view)


def test_a_token_that_is_ruled_out_adds_nothing():
    from tokenprune.evals.tuning.contributions import _divergence
    from tokenprune.evals.tuning.first_key import entropy

    one, other = torch.tensor([1.0, 2.0, -math.inf]), torch.tensor([2.0, 1.0, -math.inf])
    given = [logits.double().log_softmax(-1) for logits in (one, other)]
    assert 0 < _divergence(*given) == pytest.approx(_divergence(*(part[:2] for part in given)))
    assert 0 < entropy(one) == pytest.approx(entropy(one[:2]))
