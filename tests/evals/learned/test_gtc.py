"""What GTC learns from: the rollout, its labels, and the command that trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _families import batch_of, family
from _tiny import prompts, tiny_llava

import tokenprune
from tokenprune.api import adapter_for
from tokenprune.cli import main
from tokenprune.evals.learned import gtc
from tokenprune.evals.learned.gtc import Example, agreement, divergence, fit, overlap, padded
from tokenprune.evals.learned.replay import greedy_answer, replay
from tokenprune.evals.learned.rollout import (
    head_relevance,
    instruction_attention,
    relevance,
    rollout_row,
    soft_label,
)
from tokenprune.evals.learned.settings import TrainConfig
from tokenprune.interfaces.pruner import Pruner
from tokenprune.interfaces.selection import Selection
from tokenprune.interfaces.signals import INSTRUCTION_ATTENTION, Signal
from tokenprune.methods.gtc import WEIGHTS, new_student, student_scores


def full_matrix(layers: list[torch.Tensor]) -> torch.Tensor:
    """R of the card, from the identity up, layer after layer."""
    result = torch.eye(layers[0].shape[0], dtype=torch.float64)
    for layer in layers:
        result = result + layer.double() @ result
    return result


def test_the_row_form_is_the_full_matrix_on_random_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        size, depth = (int(torch.randint(1, high, (), generator=generator)) for high in (20, 8))
        layers = [torch.rand(size, size, generator=generator) / size for _ in range(depth)]
        place = int(torch.randint(size, (), generator=generator))
        torch.testing.assert_close(rollout_row(layers, place).double(), full_matrix(layers)[place], rtol=1e-5, atol=0)


def replayed_prompt(model: Any, batch: dict[str, torch.Tensor], tokens: int = 3) -> Any:
    answer = greedy_answer(model, batch, tokens)
    return replay(adapter_for(model), batch, answer, gradients=True)


def test_the_relevance_of_a_model_is_the_mean_of_full_rollouts() -> None:
    model = tiny_llava().requires_grad_(False)
    batch = prompts([2])
    done = replayed_prompt(model, batch)
    assert done.prompt_length == batch["input_ids"].shape[1] and len(done.answer) == 3
    expected = torch.zeros(done.logits.shape[0], dtype=torch.float64)
    for number, token in enumerate(done.answer.tolist()):
        place = done.prompt_length - 1 + number
        gradients = torch.autograd.grad(done.logits[place, token], done.attention, retain_graph=True)
        assert all(bool(gradient.abs().sum() > 0) for gradient in gradients), "each layer has a gradient"
        layers = [head_relevance(*pair) for pair in zip(done.attention, gradients)]
        for layer, (attention, gradient) in zip(layers, zip(done.attention, gradients)):
            by_head = [(attention[0, h] * gradient[0, h]).clamp_min(0) for h in range(attention.shape[1])]
            torch.testing.assert_close(layer, sum(by_head).detach() / len(by_head))
        expected += full_matrix(layers)[place] / 3
    found = relevance(done)
    for values, places in zip(found, done.visuals):
        assert values.shape == (36,) and bool((values >= 0).all()) and bool((values > 0).any())
        torch.testing.assert_close(values.double(), expected[places], rtol=1e-5, atol=1e-12)


def test_the_replay_predicts_the_answer_and_leaves_the_model_as_it_was() -> None:
    model, batch = tiny_llava().requires_grad_(False), prompts([1])
    with torch.no_grad():
        before = model(**batch).logits
    hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()]
    done = replayed_prompt(model, batch)
    last = done.prompt_length - 1
    assert done.logits[last : last + 3].argmax(dim=-1).tolist() == done.answer.tolist()
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()] == hooks
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_what_the_student_learns_from_is_what_it_is_given_later(name: str) -> None:
    model, batch = family(name), batch_of(name, "one_left")
    seen: list[torch.Tensor] = []

    class Probe(Pruner):
        name, adaptive, default_scope = "probe", True, "visual"

        def signals(self, tower: Any) -> tuple[Signal, ...]:
            return (Signal(INSTRUCTION_ATTENTION, 0),)

        def select(self, view: Any) -> Selection:
            seen.append(view.signal(INSTRUCTION_ATTENTION, 0)[0])
            return Selection(torch.arange(view.num_tokens)[None])

    with tokenprune.applied(model, Probe(), keep=1.0), torch.no_grad():
        model(**batch)
    done = replay(adapter_for(model), batch, torch.tensor([9, 12]), gradients=False)
    (rows,) = instruction_attention(done)
    torch.testing.assert_close(rows, seen[0], rtol=1e-4, atol=1e-8)


def test_without_positive_gradients_the_label_is_uniform() -> None:
    attention = torch.rand(1, 2, 5, 5)
    layers = [head_relevance(attention, -torch.rand(1, 2, 5, 5)) for _ in range(3)]
    row = rollout_row(layers, 4)
    assert row.tolist() == [0, 0, 0, 0, 1]
    assert soft_label(row[:4]).tolist() == [0.25] * 4


def test_a_label_sums_to_one_and_at_least_half_of_it_is_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in [1, 2, 3, 5, 8, 37, 576]:
        values = torch.rand(count, generator=generator)
        label = soft_label(values)
        assert float(label.sum()) == pytest.approx(1, abs=1e-5)
        zeros = int((label == 0).sum())
        assert count == 1 or zeros >= count / 2
        kept = label > 0
        assert values[kept].min() >= (values[~kept].max() if zeros else 0)
    assert soft_label(torch.tensor([1.0, 1, 1, 1])).tolist() == [0.5, 0.5, 0, 0]


def examples(number: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    sizes = [12 + 3 * (i % 4) for i in range(number)]
    inputs = [torch.rand(size, generator=generator) for size in sizes]
    return [Example(rows, (rows.roll(1) + rows.roll(-1)) ** 4) for rows in inputs]


def test_the_loss_is_the_divergence_over_real_places() -> None:
    some = examples(5)
    attention, target, real = padded(some, "cpu")
    weights = new_student(2)
    loss = divergence(student_scores(weights, attention, real), target)
    alone = []
    for one in some:
        predicted, label = student_scores(weights, one.attention[None])[0].softmax(0), soft_label(one.relevance)
        kept = label > 0
        alone.append(float((label[kept] * (label[kept] / predicted[kept]).log()).sum()))
    assert float(loss) == pytest.approx(sum(alone) / len(alone), rel=1e-5)


def config(folder: Path, **more: Any) -> TrainConfig:
    given = {"samples": 3, "held_out": 2, "epochs": 6, "batch_size": 4, **more}
    return TrainConfig("gtc", "pocket-llava", "pocket", str(folder), **given)


def test_a_student_learns_and_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    some, device = examples(8), torch.device("cpu")
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    lines: list[str] = []
    more = {"epochs": 20, "rate": 3e-3}
    whole = fit(config(tmp_path / "whole", **more), some, device, lines.append)
    losses = [float(line.rpartition(" ")[2]) for line in lines]
    assert losses[-1] < 0.8 * losses[0]
    assert agreement(some, lambda rows: student_scores(whole, rows[None])[0]) > agreement(some, lambda rows: rows)

    def kill(line: str) -> None:
        if line.startswith("epoch 5"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(config(tmp_path / "killed", **more), some, device, kill)
    rest: list[str] = []
    resumed = fit(config(tmp_path / "killed", **more), some, device, rest.append)
    assert len(rest) == 15
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_agreement_and_overlap() -> None:
    one = [Example(torch.arange(6.0), torch.tensor([0.0, 1, 2, 3, 5, 4]))]
    assert agreement(one, lambda rows: rows) == pytest.approx(1 - 6 * 2 / (6 * 35), abs=1e-4)
    assert agreement(one, torch.zeros_like) == 0
    assert overlap(one, lambda rows: rows, keep=1) == pytest.approx(0.8)
    assert overlap(one, lambda rows: -rows, keep=2) == pytest.approx(1 / 9, abs=1e-4)


def test_what_cannot_be_trained_is_a_sentence(tmp_path: Path, capsys: Any) -> None:
    for arguments, words in (
        (["gtd"], "nothing to train for 'gtd'. Did you mean 'gtc'"),
        (["gtc", "--samples", "0"], "--samples must be at least 1"),
        (["gtc", "--data", "pokcet"], "pokcet"),
        (["gtc", "--model", "poket-llava"], "no model called"),
    ):
        assert main(["train", *arguments, "--output", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.pocket
def test_the_command_trains_goes_on_and_refuses_another_run(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    words = ["train", "gtc", "--model", "pocket-llava", "--output", str(tmp_path), "--samples", "3", "--held-out", "2"]
    assert main([*words, "--epochs", "2"]) == 0
    assert "held-out rank correlation" in capsys.readouterr().out
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["model"] == "pocket-llava" and set(said["spearman"]) == {"student", "layer_0"}
    assert (tmp_path / WEIGHTS).stat().st_size < 1_000_000
    before = (tmp_path / WEIGHTS).read_bytes()
    # torn at the end, as a kill leaves it
    labels = tmp_path / "labels.jsonl"
    labels.write_text(labels.read_text()[:-40])
    made = []
    line = gtc._line
    monkeypatch.setattr(gtc, "_line", lambda *given: made.append(1) or line(*given))
    assert main([*words, "--epochs", "2"]) == 0
    assert len(made) == 1 and (tmp_path / WEIGHTS).read_bytes() == before
    assert main([*words, "--epochs", "2", "--seed", "5"]) == 2
    assert "labels of a run with another seed" in capsys.readouterr().err
    import tokenprune.evals.models.load as load

    loaded = load.load_model("pocket-llava")
    with tokenprune.applied(loaded.model, "gtc", keep=16, student=str(tmp_path)) as handle, torch.no_grad():
        loaded.model(**prompts_of(loaded))
        assert len(handle.kept[0][0]) == 16


def prompts_of(loaded: Any) -> Any:
    from tokenprune.evals.learned.data import draw_training

    (sample,), _, _ = draw_training("pocket", 1, 1, 0)
    return loaded.inputs([sample.question], [sample.image])


def test_training_questions_are_of_the_training_split_and_held_out_ones_of_other_scenes() -> None:
    from tokenprune.evals.learned.data import draw_training

    for data in ("pocket", "pocket:count", "pocket-mixed"):
        train, held, _ = draw_training(data, 9, 5, 3)
        again, _, _ = draw_training(data, 9, 5, 3)
        assert [one.sample_id for one in train] == [one.sample_id for one in again]
        assert len(train) == 9 and len(held) == 5
        assert all(one.sample_id.startswith("train-") for one in [*train, *held])
        scenes = [{one.sample_id.rpartition("-")[0] for one in part} for part in (train, held)]
        assert not scenes[0] & scenes[1]
    assert {one.family for one in draw_training("pocket:count", 4, 1, 0)[0]} == {"count"}
