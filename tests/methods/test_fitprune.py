"""FitPrune: its schedules by hand, and its scores against the eager attention of running models."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest
import torch
from _tiny import prompts, tiny_llava
from masked_reference import relative_error

import tokenprune
from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths
from tokenprune.interfaces.view import View
from tokenprune.methods.fitprune import FitPrune, at_depth, ordered, shares

SIX = ModelDepths(vision=24, feature=22, decoder=6)


def counts(method: FitPrune, keep: Any, num_tokens: int, depths: ModelDepths = SIX) -> list[int]:
    """Visual tokens that enter each layer."""
    found = [num_tokens] * depths.decoder
    for stage in method.stages(Budget(keep), depths):
        found[stage.depth :] = [stage.budget.tokens(num_tokens)] * (depths.decoder - stage.depth)
    return found


def written(tmp_path: Any, tokens: int, *deletions: list[int]) -> str:
    file = tmp_path / "schedule.json"
    file.write_text(json.dumps({"tokens": tokens, "schedules": [{"deletions": one} for one in deletions]}))
    return str(file)


def test_a_schedule_is_what_was_calibrated_at_its_own_end(tmp_path):
    draw = random.Random(0)
    for _ in range(300):
        tokens = draw.randint(20, 600)
        deletions = [draw.randint(0, tokens // 6) for _ in range(6)]
        deletions[2] += sum(deletions[:-1]) == 0
        wanted = [tokens - sum(deletions[:layer]) for layer in range(6)]
        method = FitPrune(schedule=written(tmp_path, tokens, deletions))
        assert counts(method, wanted[-1], tokens) == wanted
        keep = draw.randint(1, tokens)
        left = counts(method, keep, tokens)
        assert left[-1] == keep and left == sorted(left, reverse=True) and left[0] == tokens
        total = sum(deletions[:-1])
        for layer in range(6):  # in proportion, to a token
            assert abs((tokens - left[layer]) * total - (tokens - keep) * sum(deletions[:layer])) <= 0.5001 * total


def test_two_schedules_are_interpolated_and_the_mean_rises_with_keep(tmp_path):
    few, many = [60, 20, 10, 5, 0, 9], [10, 20, 20, 10, 0, 0]
    method = FitPrune(schedule=written(tmp_path, 100, few, many))
    assert counts(method, 5, 100) == [100, 40, 20, 10, 5, 5]
    assert counts(method, 40, 100) == [100, 90, 70, 50, 40, 40]
    assert counts(method, 20, 100) == [100, 61, 41, 27, 20, 20]  # 3/7 of the way: 61.4, 41.4, 27.1
    means = [sum(counts(method, keep, 100)) for keep in range(1, 101)]
    assert means == sorted(means) and len(set(means)) == 100
    assert counts(method, 100, 100) == [100] * 6
    assert counts(method, 0.4, 200) == [200, 180, 140, 100, 80, 80]
    assert [stage.site for stage in method.stages(Budget(9), SIX)] == [f"layer:{k}" for k in (1, 2, 3, 4)]


def test_schedules_that_cannot_be_interpolated_are_left_out():
    a, b = (1.0, 0.5, 0.2), (1.0, 0.3, 0.3)
    assert ordered([b, a]) == (a,)  # ends higher, keeps fewer
    assert ordered([(1.0, 0.9, 0.2), a]) == (a,)
    assert shares([a], 0.2) == pytest.approx(a)


def test_other_depths_and_families_take_it_in_proportion():
    assert at_depth((1.0, 0.5, 0.0), 5) == pytest.approx((1.0, 0.75, 0.5, 0.25, 0.0))
    assert at_depth((1.0, 0.75, 0.5, 0.25, 0.0), 3) == pytest.approx((1.0, 0.5, 0.0))
    method = FitPrune(schedule=[10, 20, 20, 10, 0, 0])
    late = dataclasses.replace(SIX, first_cut=3)
    assert [stage.site for stage in method.stages(Budget(40), late)] == ["layer:3", "layer:4"]
    assert counts(method, 40, 100, late) == [100, 100, 100, 50, 40, 40]
    assert FitPrune(schedule=[0, 0, 5, 0]).stages(Budget(40), SIX)[0].site == "layer:4"


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        (None, "tokenprune calibrate fitprune --model MODEL"),
        ("nothing.json", "schedule='nothing.json' is neither a file nor a model whose schedule ships"),
        ([0, 0, 4], "some token must leave before the last layer"),
        ([1, -2, 4], "numbers from 0 on"),
        (["a", 1], "a list with a number of tokens for each decoder layer"),
    ],
)
def test_bad_schedules_are_refused(schedule, sentence):
    with pytest.raises(ValueError, match=sentence):
        FitPrune(schedule=schedule)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="holds no schedules of fitprune"):
        FitPrune(schedule=str(tmp_path / "x.json"))


@pytest.mark.parametrize("name", ["pocket-llava", "pocket-qwen"])
def test_schedules_that_ship(name):
    method = FitPrune(schedule=name)
    said = json.loads(method.files[0].read_text())
    assert said["model"] == name and len(method.curves()) >= 2
    for one in said["schedules"]:
        assert len(one["deletions"]) == said["layers"] and sum(one["deletions"]) < said["tokens"]


# --- inside a model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("images", [[1], [1, 2, 1]])
@pytest.mark.parametrize("depth", [1, 3])
def test_scores_equal_eager_attention(images, side, attention, depth):
    seen: list[View] = []

    @dataclasses.dataclass
    class Watched(FitPrune):
        def select(self, view):
            seen.append(view)
            return super().select(view)

    batch, eager = prompts(images, side), tiny_llava(attention="eager")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        masses = eager(**batch, position_ids=positions, output_attentions=True).attentions[depth - 1]
    model, method = tiny_llava(attention=attention), Watched(schedule=[1, 1, 1, 1])
    method.name = "fitprune"
    with tokenprune.applied(model, {"at": f"layer:{depth}", "prune": method, "keep": 9}) as handle, torch.no_grad():
        model(**batch, position_ids=positions)
        spans, kept = handle.last.layout.spans, handle.kept
    last = {span.sample: int(span.places[-1]) for span in spans}
    truths = []
    for span in spans:
        row, places = span.sample, span.places.tolist()
        text = [p for p in range(last[row] + 1, positions.shape[1]) if batch["attention_mask"][row, p]]
        largest = masses[row].double().amax(dim=0).tolist()
        own = [sum(largest[q][p] for q in places) / len(places) for p in places]
        cross = [sum(largest[q][p] for q in text) for p in places]
        truth = [a * b for a, b in zip(own, cross)]
        truths.append(truth)
        best = sorted(range(len(truth)), key=lambda i: (-truth[i], i))[:9]
        assert kept[row][span.image].tolist() == sorted(best)
    assert relative_error(method.score(seen[0]), torch.tensor(truths).float()) < 1e-4


def test_rows_come_in_blocks():
    """More rows than a block has give what one block gives."""
    from tokenprune.capture import largest_attention as module

    query, key = torch.randn(4, 300, 8), torch.randn(2, 310, 8)
    rows, columns = torch.arange(20, 290), torch.arange(10, 200)
    allowed = torch.arange(310)[None] <= torch.arange(300)[:, None] + 10
    found = module.largest_attention(query, key, 0.3, rows, columns, lambda at: allowed[at])
    keys = key.repeat_interleave(2, dim=0)
    mass = (query @ keys.transpose(1, 2) * 0.3).masked_fill(~allowed, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, mass[:, rows][:, :, columns].amax(0).sum(0))


def test_an_average_is_held_to_a_token():
    model, batch = tiny_llava(), prompts([1])
    with tokenprune.applied(model, "fitprune", average=24, schedule=[6, 9, 4, 2]) as handle, torch.no_grad():
        model(**batch)
        lengths = [36, *(int(cut.tokens[0].shape[0]) for cut in handle.last.cuts)]
    assert len(lengths) == 4 and abs(sum(lengths) / 4 - 24) <= 0.5


def test_fitprune_acts_nowhere_else():
    with pytest.raises(ValueError, match="'layer:K', not at 'input'"):
        tokenprune.apply(tiny_llava(), {"at": "input", "prune": FitPrune(schedule=[1, 1]), "keep": 9})
