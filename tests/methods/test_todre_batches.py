"""ToDRE on many random cases and in ragged batches: stage 1 against loops in fp64, stage 2 prompt by prompt."""

from __future__ import annotations

import dataclasses
import functools
import random
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from _families import BUILDERS, batch_of, family
from _forward import forward
from _tiny import IMAGE, prompts, tiny_llava
from _views import TOWER
from masked_reference import compare, run_pruned
from torch import Tensor

import tokenprune
from tokenprune.interfaces.signals import CLS_ATTENTION, TEXT_TO_VISUAL, VISUAL_TO_TEXT, Signal
from tokenprune.interfaces.view import View
from tokenprune.interfaces.visual import Raster
from tokenprune.methods.todre import DropAllStage, ToDRE
from tokenprune.seams import cache_in

# --- stage 1 ----------------------------------------------------------------------------------------------------------


def by_loops(features: list[list[float]], pivot: int, k: int, objective: str) -> tuple[list[int], float]:
    """The card's loop for one image, and the smallest gap that decided a choice (0: an exact tie, by index)."""
    unit = []
    for row in features:
        length = sum(v * v for v in row) ** 0.5
        unit.append([v / length for v in row])
    chosen, running, least = [pivot], [-float("inf") if objective == "k_center" else 0.0] * len(unit), 1.0
    while True:
        near = [sum(a * b for a, b in zip(row, unit[chosen[-1]])) for row in unit]
        running = [max(r, c) if objective == "k_center" else r + c for r, c in zip(running, near)]
        if len(chosen) == k:
            return sorted(chosen), least
        order = sorted((i for i in range(len(unit)) if i not in chosen), key=lambda i: (running[i], i))
        if len(order) > 1:
            gap = running[order[1]] - running[order[0]]
            least = min(least, gap) if gap else least
        chosen.append(order[0])


@pytest.mark.parametrize("objective", ["max_sum", "k_center"])
def test_selections_equal_loops_on_many_cases(objective):
    """Half of the cases are signed axes of random lengths, whose cosines are exact: choices there are among ties."""
    draw, compared, tied = random.Random(objective), 0, 0
    for case in range(1000):
        count, width = draw.randint(2, 24), draw.randint(1, 7)
        k = draw.choice([1, count, draw.randint(1, count)])
        if case % 2:
            rows = [[draw.gauss(0, 1) for _ in range(width)] for _ in range(count)]
        else:
            rows = [[0.0] * width for _ in range(count)]
            for row in rows:
                row[draw.randrange(width)] = draw.choice([-1, 1]) * 2.0 ** draw.randint(-3, 3)
        features = torch.tensor(rows)
        looks = [draw.randint(0, 3) / 8 for _ in range(count)]
        pivot = looks.index(max(looks))
        signals = {Signal(CLS_ATTENTION, TOWER.num_layers - 1): torch.tensor([looks])}
        view = View(features[None], (Raster((1, count)),), k, TOWER, signals)
        expected, gap = by_loops(features.double().tolist(), pivot, k, objective)
        if case % 2 == 0 or gap > 1e-5:
            compared, tied = compared + 1, tied + (case % 2 == 0)
            assert ToDRE(objective=objective).select(view).indices[0].tolist() == expected
    assert compared > 950 and tied == 500


# --- stage 2 ----------------------------------------------------------------------------------------------------------


def test_the_rule_of_stage_two_on_many_cases():
    """Both shares below the threshold, each prompt on its own, equality is not below."""
    draw = random.Random(3)
    for _ in range(2000):
        images, count, tau = draw.randint(1, 5), draw.randint(1, 9), draw.choice([0.0, 0.125, 0.5, 2.0])
        shares = [[draw.choice([0.0, 0.125, 0.25, 0.5, 1.0]) for _ in range(images)] for _ in range(2)]
        signals = {
            Signal(name, 2): torch.tensor(values) for name, values in zip((TEXT_TO_VISUAL, VISUAL_TO_TEXT), shares)
        }
        view = View(torch.zeros(images, count, 4), (Raster((1, count)),), count, TOWER, signals, site="layer:3")
        selection = DropAllStage(tau=tau).select(view).validate(images, count, least=0)
        assert selection.counts == [0 if a < tau and b < tau else count for a, b in zip(*shares)]


def watched(seen: dict[str, Tensor]) -> Any:
    """A stage 2 that never fires and writes down the shares of each visual, in the order of the spans."""

    @dataclasses.dataclass
    class Watched(DropAllStage):
        def select(self, view):
            for signal, values in view.signals.items():
                seen.setdefault(signal.name, []).append(values)  # type: ignore[arg-type]
            return super().select(view)

    return Watched(tau=0.0)


def parting(model: Any, batch: dict[str, Tensor]) -> float:
    """A threshold under which one prompt's pictures leave, once stage 1 has kept 9 of each, and the others' do not."""
    seen: dict[str, Tensor] = {}
    plan = [
        {"at": "input", "prune": ToDRE(fade=False), "keep": 9},
        {"at": "layer:3", "prune": watched(seen), "keep": 1.0},
    ]
    with tokenprune.applied(model, plan), torch.no_grad():
        model(**batch)
    both = torch.stack([torch.cat(list(seen[name])) for name in (TEXT_TO_VISUAL, VISUAL_TO_TEXT)]).amax(0)
    levels = sorted(set(both.tolist()))
    assert len(levels) >= 2, "prompts differ"
    return (levels[0] + levels[1]) / 2


@functools.cache
def eager() -> Any:
    return tiny_llava(attention="eager")


def shares_by_loops(batch: dict[str, Tensor], spans: Any) -> dict[int, tuple[float, float]]:
    """For each prompt with pictures, both shares by the card's sums over layer 2's full attention matrix."""
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        full = eager()(**batch, position_ids=positions, output_attentions=True).attentions[2].double().mean(1)
    found = {}
    for row in {span.sample for span in spans}:
        visual = sorted(int(place) for span in spans if span.sample == row for place in span.places)
        real = [i for i, seen in enumerate(batch["attention_mask"][row].tolist()) if seen]
        text = [i for i in real if i > visual[0] and i not in visual]
        matrix = full[row].tolist()
        to_visual = sum(matrix[i][j] for i in text for j in visual) / sum(matrix[i][j] for i in text for j in real)
        to_text = sum(matrix[i][j] for i in visual for j in text) / sum(matrix[i][j] for i in visual for j in real)
        found[row] = (to_visual, to_text)
    return found


@pytest.mark.parametrize("side", ["left", "right"])
def test_in_a_ragged_batch_each_prompt_decides_for_all_of_its_pictures(side):
    """Thresholds between the prompts' shares, from none to all of them firing; also a prompt without pictures."""
    batch, model, fired = prompts([1, 3, 0, 2, 1], side), tiny_llava(), set()
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with (
        tokenprune.applied(model, [{"at": "layer:3", "prune": DropAllStage(tau=0.0), "keep": 1.0}]) as handle,
        torch.no_grad(),
    ):
        model(**batch, position_ids=positions)
        spans = handle.last.layout.spans
    shares = shares_by_loops(batch, spans)
    largest = sorted(max(pair) for pair in shares.values())
    for tau in (0.0, *((a + b) / 2 for a, b in zip(largest, largest[1:])), 2.0):
        plan = [{"at": "layer:3", "prune": DropAllStage(tau=tau), "keep": 1.0}]
        with tokenprune.applied(model, plan) as handle, torch.no_grad():
            cache = cache_in(model(**batch, position_ids=positions))
            kept = handle.kept
        gone = {row for row, pair in shares.items() if max(pair) < tau}
        fired.add(len(gone))
        for row, pictures in enumerate(kept):
            assert [len(picture) for picture in pictures] == [0 if row in gone else 36] * len(pictures)
        # layers before the cut keep everything, the one behind it the longest row that is left
        lengths = batch["attention_mask"].sum(1).tolist()
        tails = [int(not seen) for seen in batch["attention_mask"][:, -1].tolist()]
        left = [n - 36 * len(kept[row]) * (row in gone) + tail for row, (n, tail) in enumerate(zip(lengths, tails))]
        whole = batch["input_ids"].shape[1]
        held = [layer.keys.shape[2] for layer in cache.layers]
        assert held == [whole] * 3 + [max(left) if gone else whole]
    assert fired == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("name", list(BUILDERS))
def test_some_prompts_of_a_batch_lose_their_pictures_on_every_family(name):
    """Both stages, with a threshold between the shares of the batch's own prompts; and every row decides as alone."""
    batch, model = batch_of(name, "ragged_left"), family(name)
    given = {}
    if not name.startswith("qwen"):
        given["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    tau = parting(model, {**batch, **given})
    run = run_pruned(model, {"method": "todre", "keep": 9, "tau": tau}, None, batch, tokens=4)
    compare(run, batch, 1e-5)
    left = [{len(picture) for picture in pictures} for pictures in run["kept"] if pictures]
    assert left.count({0}) == 1 and left.count({9}) == len(left) - 1 >= 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_decides_alike_alone_and_in_any_batch(side):
    images = [1, 3, 0, 2]
    batch, model = prompts(images, side), tiny_llava()
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    between = parting(model, {**batch, "position_ids": positions})
    for tau, expected in ((0.0, 0), (between, 1), (2.0, 3)):
        with tokenprune.applied(model, ToDRE(tau=tau), keep=9) as handle, torch.no_grad():
            model(**batch, position_ids=positions)
            together, done = handle.kept, 0
            for row, count in enumerate(images):
                real = batch["attention_mask"][row].bool()
                alone = {
                    "input_ids": batch["input_ids"][row : row + 1, real],
                    "attention_mask": real[None, real].long(),
                }
                if count:
                    alone["pixel_values"] = batch["pixel_values"][done : done + count]
                    done += count
                model(**alone)
                assert all(torch.equal(a, b) for a, b in zip(handle.kept[0] if count else [], together[row]))
            sizes = [len(pictures[0]) for pictures in together if pictures]
            assert sizes.count(0) == expected and sizes.count(9) == 3 - expected


def test_todre_takes_its_pivot_from_the_thumbnail_behind_a_cut_too():
    model, pivots, spared = family("llava_next"), 0, 0

    @dataclass
    class Watched(ToDRE):
        name: ClassVar[str] = "todre"

        def first(self, view):
            nonlocal pivots, spared
            found = super().first(view)
            if view.rasters[0].kind == "thumbnail":
                (scores,) = view.signals.values()
                for row, tokens in enumerate(view.tokens):
                    inside = tokens < view.rasters[0].num_tokens
                    best = scores[row].masked_fill(~inside, -1).argmax()
                    pivots += 1
                    spared += int(scores[row].argmax() != best)
                    assert int(found[row]) == int(best)
            return found

    for seed in range(6):
        plan = [{"at": "vision:1", "prune": "random", "keep": 0.7}, {"at": "input", "prune": Watched(), "keep": 6}]
        forward(model, batch_of("llava_next", "ragged_left", seed), plan)
    assert pivots > 10 and spared > 3


@pytest.mark.parametrize("before", [False, True])
def test_todre_asks_the_last_token_where_no_text_follows_the_pictures(before):
    """Its attention to the picture is far above tau, so that nothing leaves; of no rows the share would be 0."""
    batch = prompts([2])
    end = int((batch["input_ids"] == IMAGE).nonzero()[-1, 1]) + 1
    batch = {**batch, "input_ids": batch["input_ids"][:, :end], "attention_mask": batch["attention_mask"][:, :end]}
    if not before:  # one picture, so that no text stands between pictures either
        batch = prompts([1])
        end = int((batch["input_ids"] == IMAGE).nonzero()[-1, 1]) + 1
        batch = {**batch, "input_ids": batch["input_ids"][:, :end], "attention_mask": batch["attention_mask"][:, :end]}
    handle, _ = forward(tiny_llava(), batch, "todre@9")
    assert {len(kept) for kept in handle.kept[0]} == {9}
    with torch.no_grad():
        matrix = tiny_llava(attention="eager")(**batch, output_attentions=True).attentions[2].mean(1)[0]
    visual = batch["input_ids"][0] == IMAGE
    seen: list[dict[str, float]] = []

    @dataclass
    class Watched(DropAllStage):
        def select(self, view):
            seen.append({signal.name: float(values[0]) for signal, values in view.signals.items()})
            return super().select(view)

    forward(tiny_llava(), batch, [{"at": "layer:3", "prune": Watched(tau=0.0), "keep": 1.0}])
    text = ~visual & (torch.arange(len(visual)) > int(visual.nonzero()[0]))
    rows = matrix[text] if bool(text.any()) else matrix[-1:]
    assert seen[0]["text_to_visual"] == pytest.approx(float(rows[:, visual].sum(1).mean()), rel=1e-5) and rows.numel()
    assert bool(text.any()) == before


def test_todre_keeps_everything_where_everything_shall_stay():
    model = tiny_llava(layers=8)
    ids = torch.cat([prompts([1])["input_ids"], torch.randint(8, 64, (1, 400))], 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": prompts([1])["pixel_values"]}
    with torch.no_grad():
        stock = model(**batch).logits
    _, own = forward(model, batch, {"method": "todre", "keep": 1.0, "tau": 9})
    assert torch.equal(own, stock)
