"""The properties that the cards name, and rows of an answer."""

from __future__ import annotations

import math

import pytest
import torch

import tokenprune
from tokenprune.evals.diagnose.diagnose import DiagnoseConfig, diagnose_model
from tokenprune.evals.diagnose.drawing import heat_map, line_chart, stacked_bars
from tokenprune.evals.diagnose.measures import (
    concentration,
    head_scores,
    outliers,
    rank_correlation,
    stage_layers,
    text_dominance,
    writing_rows,
)
from tokenprune.evals.diagnose.prompt_tokens import own_part


def _numbers(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def test_text_dominance_keeps_the_identities_of_its_card():
    even = text_dominance(*_numbers(0.3, 0.7, 3, 7))
    assert [float(value) for value in even] == pytest.approx([1, 1, 1])
    text, image, n_text, n_image = _numbers(0.62, 0.11, 40, 576)
    mdi, aei_text, aei_image = text_dominance(text, image, n_text, n_image)
    share = n_text / (n_text + n_image)
    assert float(mdi) == pytest.approx(float(aei_text / aei_image), rel=1e-9) == pytest.approx(0.62 / 40 / (0.11 / 576))
    assert float(share * aei_text + (1 - share) * aei_image) == pytest.approx(1, abs=1e-9)
    # scaled rows change nothing, swapped kinds invert MDI, each image token twice with half the attention doubles it
    for one, other in zip((mdi, aei_text, aei_image), text_dominance(5 * text, 5 * image, n_text, n_image)):
        assert float(one) == pytest.approx(float(other))
    assert float(text_dominance(image, text, n_image, n_text)[0]) == pytest.approx(1 / float(mdi))
    assert float(text_dominance(text, image, n_text, 2 * n_image)[0]) == pytest.approx(2 * float(mdi))


def test_concentration_is_0_for_even_attention_and_1_for_one_token():
    among = torch.tensor([True] * 4 + [False])
    weights = torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.6], [0, 0.2, 0, 0, 0.8], [0.1, 0.2, 0.3, 0.05, 0.35]])
    found = concentration(weights, among)
    assert found[:2].tolist() == pytest.approx([0, 1], abs=1e-6)
    assert float(found[2]) == pytest.approx(float(concentration(weights[2][[3, 1, 0, 2, 4]] * 7, among)), rel=1e-5)
    assert float(concentration(torch.zeros(5), among)) == 0
    assert float(concentration(weights[0], torch.tensor([True, False, False, False, False]))) == 0


def test_outliers_need_ten_times_the_mean_in_more_than_half_of_the_heads():
    received = torch.ones(4, 40)
    visual = torch.ones(40, dtype=torch.bool)
    visual[0] = False
    received[:, 0] = 1e6  # no image token: neither marked nor in the mean
    received[:3, 5], received[:2, 9] = 30.0, 30.0
    assert outliers(received, visual).nonzero().flatten().tolist() == [5]
    assert not outliers(torch.ones(4, 40), visual).any()


def test_a_planted_head_has_the_top_score():
    image = torch.full((6, 8), 0.2)
    focus = torch.full((6, 8), 0.3)
    image[4, 2], focus[4, 2] = 0.9, 0.8
    score, rank, visual = head_scores(image, focus)
    assert score.shape == rank.shape == (6, 8) and sorted(rank.flatten().tolist()) == list(range(1, 49))
    assert int(rank[4, 2]) == 1 and visual.sum() == 2 and bool(visual[4, 2]) and int(rank[0, 0]) == 2
    assert rank_correlation(score, score) == pytest.approx(1) and rank_correlation(score[0, :2], score[0, :2]) is None
    ordered = torch.arange(9.0)
    assert rank_correlation(ordered, -ordered) == pytest.approx(-1)


def test_stages_are_the_first_two_the_middle_two_and_the_last_two():
    assert stage_layers(32) == {"early": [0, 1], "middle": [15, 16], "late": [30, 31]}
    assert stage_layers(2) == {"early": [0, 1], "middle": [0, 1], "late": [0, 1]}
    assert stage_layers(1) == {"early": [0], "middle": [0], "late": [0]}


def test_which_rows_are_those_of_an_answer():
    end = {2, 0}
    assert writing_rows([9, 2, 0, 0], end) == (
        [1],
        [0],
    )  # one word: its row says the end, the prompt's last row wrote it
    assert writing_rows([9, 8, 7, 2], end) == ([1, 2, 3], [0, 1, 2])
    assert writing_rows([9, 8, 7], end) == ([1, 2], [0, 1, 2])  # cut off: the last token was never read
    assert writing_rows([2, 0, 0], end) == ([0], [0])
    assert writing_rows([9], end) == ([0], [0])


def test_the_question_is_what_an_empty_one_does_not_have():
    assert own_part([1, 5, 5, 7, 8, 9, 4], [1, 5, 5, 4]) == (3, 6)
    assert own_part([1, 5, 4], [1, 5, 4]) == (3, 3)
    assert own_part([1, 4, 4, 4], [1, 4, 4]) == (3, 4)


def test_charts_hold_every_number_and_scale():
    drawn = heat_map([[0.0, 0.5], [1.0, 0.25]], marked=[(1, 0)])
    assert drawn.count("<title>") == 4 and "layer 1, head 0: 1" in drawn and drawn.count('class="frame"') == 1
    assert "opacity:1.000" in drawn and "opacity:0.250" in drawn
    lines = line_chart({"a": ("before", [0.1, 30.0, 1.0]), "b": ("after", [2.0, 0.0, 1.0])}, log=True)
    assert lines.count("<circle") == 6 and "nan" not in lines and "inf" not in lines
    assert line_chart({"a": ("before", [0.0, 0.0])}).count("<circle") == 2
    bars = stacked_bars([("0", {"image": 0.25, "text": 0.75})], {"image": "k-image", "text": "k-text"})
    wide = [float(part.split('"')[0]) for part in bars.split('width="')[1:]]
    assert wide[1] == pytest.approx(3 * wide[0], rel=1e-3) and not math.isnan(wide[0])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"limit": 0}, "--limit must be at least 1"),
        ({"prune": "var"}, "changes attention.*Name methods that prune only"),
        ({"prune": "holov@64+var"}, "changes attention"),
        ({"data": "pocket-crowds"}, "pocket-crowd"),
    ],
)
def test_what_cannot_be_diagnosed_is_refused(given, says, tmp_path):
    with pytest.raises((ValueError, KeyError), match=says):
        DiagnoseConfig(**{"model": "pocket-llava", "data": "pocket", "out": str(tmp_path), **given}).check()


@pytest.mark.parametrize("method", ["zerotuning(gamma=2.0)", "cmai", "naavit", "a_vl", "holov@9"])
def test_a_model_with_a_method_at_work_is_refused(method, tiny, tiny_task, tmp_path):
    """What an intervention does to attention comes behind what is read."""
    from tokenprune.evals.tasks.load import load_task

    config = DiagnoseConfig(tiny.name, tiny_task, str(tmp_path), limit=1)
    with tokenprune.applied(tiny.model, method), pytest.raises(ValueError, match="is at work on this model already"):
        diagnose_model(tiny, load_task(tiny_task), config)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("method", ["a_vl", "naavit", "zerotuning(gamma=2.0)", "holov@9+cmai"])
def test_the_command_takes_no_intervention(method, tiny_folder, tiny_task, tmp_path, capsys):
    from tokenprune.cli import main

    command = ["diagnose", "--model", tiny_folder, "--data", tiny_task, "--prune", method, "--out", str(tmp_path)]
    assert main(command) == 2
    assert "changes attention" in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_the_command_writes_numbers_heads_and_one_page(tiny_folder, tiny_task, tmp_path, capsys):
    import json

    from tokenprune.cli import main

    command = ["diagnose", "--model", tiny_folder, "--data", tiny_task, "--limit", "6", "--prune", "holov@9"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert "visual heads" in capsys.readouterr().out
    found = json.loads((tmp_path / "diagnosis.json").read_text())
    plain, pruned = found["runs"].values()
    assert plain["samples"] == 6 and plain["tokens"]["image"] == [36.0] * 4 and pruned["tokens"]["image"] == [9.0] * 4
    for run in (plain, pruned):
        for layer in range(4):
            row = [
                run["flow"]["question"][kind][layer] for kind in ("first", "template", "question", "image", "answer")
            ]
            assert sum(row) == pytest.approx(1, abs=1e-5)
            assert sum(run["rollout"]["writing"][kind][layer] for kind in run["rollout"]["writing"]) == pytest.approx(1)
    heads = json.loads((tmp_path / "visual_heads.json").read_text())
    assert [row["rank"] for row in heads["unpruned"]["writing"]] == list(range(1, 17))
    page = (tmp_path / "diagnosis.html").read_text()
    assert "@@" not in page and "src=" not in page and "http" not in page.replace("http-equiv", "")
    assert page.count("<svg") > 30 and "data:image/png" in page
