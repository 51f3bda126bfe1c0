"""SparseVLM+ against an independent reference: plain loops, and eager attention of running models."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from _tiny import TEXT, prompts, tiny_llava
from masked_reference import relative_error

import tokenprune
from tokenprune.capture.raters import rated, text_raters
from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths
from tokenprune.interfaces.view import View
from tokenprune.methods.sparsevlm import ListBudget, SparseVLM

LLAVA = ModelDepths(vision=24, feature=22, decoder=32)


# --- the reference, from the card -------------------------------------------------------------------------------------


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def raters_of(visual: list[list[float]], text: list[list[float]]) -> list[int]:
    shares = [softmax([sum(a * b for a, b in zip(v, x)) for x in text]) for v in visual]
    means = [sum(share[j] for share in shares) / len(visual) for j in range(len(text))]
    found = [j for j, mean in enumerate(means) if mean > sum(means) / len(means)]
    return found or list(range(len(text)))


def score_of(mass: Any, bias: Any, raters: list[int], heads: int) -> list[float]:
    """From mass[head][row][column] of probabilities and bias[row][column]."""
    columns = range(len(bias[0]))
    divided = [[[head[r][c] / bias[r][c] for c in columns] for r in raters] for head in mass]
    sums = [sum(sum(row) for row in head) for head in divided]
    best = sorted(range(len(mass)), key=lambda h: (-sums[h], h))[:heads]
    return [
        sum(divided[h][r][c] for h in best for r in range(len(raters))) / (len(best) * len(raters)) for c in columns
    ]


# --- the parts --------------------------------------------------------------------------------------------------------


def test_raters_and_scores_equal_the_reference_on_random_cases():
    draw, all_rate = random.Random(0), 0
    for case in range(600):
        groups, key_heads, width = draw.choice([1, 2]), draw.choice([1, 2, 3]), 4
        count, text, before = draw.randint(1, 12), draw.choice([1, 2, 3, 9]), draw.randint(0, 3)
        generator = torch.Generator().manual_seed(case)

        def states(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randint(-4, 5, shape, generator=generator) / 4

        visual, words = states(count, 6), states(text, 6)
        if draw.random() < 0.1:
            words = words[:1].expand(text, -1).contiguous()  # all alike: none is above the mean
        shares = (visual.double() @ words.double().T).softmax(1).mean(0)
        if (
            (shares - shares.mean()).abs().min() < 1e-6
            and text > 1
            and not torch.equal(words, words[:1].expand(text, -1))
        ):
            continue  # rounding decides
        expected = raters_of(visual.tolist(), words.tolist())
        found = text_raters(visual, words)
        if text > 1 and len(set(map(tuple, words.tolist()))) > 1:
            assert found.nonzero()[:, 0].tolist() == expected
        else:
            all_rate += 1
        raters = found.nonzero()[:, 0].tolist()
        heads, keys = groups * key_heads, before + count + text
        query, key = states(heads, text, width), states(key_heads, keys, width)
        allowed = torch.arange(keys)[None] <= torch.arange(before + count, keys)[:, None]
        turned = states(text, count).abs() + 0.5
        turned[0, 0] *= -1
        wanted = draw.choice([1, heads, 14])
        columns = torch.arange(before, before + count)
        mass = [
            [
                softmax([
                    float(query[h, r] @ key[h // groups, k]) * 0.5 if allowed[r, k] else -1e9 for k in range(keys)
                ])[before : before + count]
                for r in range(text)
            ]
            for h in range(heads)
        ]  # fmt: skip
        truth = score_of(mass, turned.tolist(), raters, wanted)
        score = rated(query, key, 0.5, allowed, columns, turned, found, wanted)
        assert relative_error(score, torch.tensor(truth)) < 1e-5
    assert all_rate > 50


def test_one_word_rates_and_words_that_are_alike_all_do():
    assert text_raters(torch.randn(5, 4), torch.randn(1, 4)).tolist() == [True]
    assert text_raters(torch.randn(5, 4), torch.ones(4, 4)).tolist() == [True] * 4


def test_the_lists_of_the_card():
    for last, counts in ((118, [300, 200]), (60, [238, 108]), (28, [246, 54]), (20, [66, 34])):
        stages = SparseVLM().stages(Budget(last), LLAVA)
        assert [stage.site for stage in stages] == ["layer:3", "layer:7", "layer:16"]
        assert [stage.budget.tokens(576) for stage in stages] == [*counts, last]
        assert [stage.budget.tokens(1152) for stage in SparseVLM().stages(Budget(2 * last), LLAVA)] == [
            *(2 * count for count in counts), 2 * last,
        ]  # fmt: skip
    for num_tokens in (1, 5, 36, 576, 577, 2880):
        for last in {1, 2, num_tokens // 3 + 1, num_tokens}:
            counts = [ListBudget(last, step).tokens(num_tokens) for step in range(3)]
            assert counts[2] == min(last, num_tokens) and all(counts[2] <= count <= num_tokens for count in counts)
    shallow = SparseVLM().stages(Budget(9), dataclasses.replace(LLAVA, decoder=4))
    assert [stage.site for stage in shallow] == ["layer:1", "layer:2", "layer:3"]
    assert [stage.site for stage in SparseVLM().stages(Budget(9), dataclasses.replace(LLAVA, decoder=2))] == ["layer:1"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"heads": 0}, "heads must be a whole number from 1 on, got 0"),
        ({"layers": [3, 7]}, "layers must be 3 that increase"),
        ({"layers": [0, 1, 2]}, "layers must be decoder layers from 1 on"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SparseVLM(**options)


# --- inside a model ---------------------------------------------------------------------------------------------------


def rotation_alone(distance: int) -> float:
    """Product of two vectors of ones, rotated so far apart, over the root of a head's width."""
    width = TEXT["hidden_size"] // TEXT["num_attention_heads"]
    return sum(2 * math.cos(distance * 10000 ** (-2 * j / width)) for j in range(width // 2)) / math.sqrt(width)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("images", [[1], [1, 2, 1]])
@pytest.mark.parametrize(("depth", "heads"), [(1, None), (3, None), (3, 4)])
def test_scores_equal_eager_attention(images, side, attention, depth, heads):
    seen: list[View] = []

    @dataclasses.dataclass
    class Watched(SparseVLM):
        def select(self, view):
            seen.append(view)
            return super().select(view)

    batch, eager, entering = prompts(images, side), tiny_llava(attention="eager"), []
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    hook = eager.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    with torch.no_grad():
        masses = eager(**batch, position_ids=positions, output_attentions=True).attentions[depth - 1]
    hook.remove()
    model = tiny_llava(attention=attention)
    method = Watched(heads=heads)
    method.name = "sparsevlm"
    with tokenprune.applied(model, method, keep=9) as handle, torch.no_grad():
        if depth != 1:  # one cut alone, so that the layers before it are those of the whole model
            handle.remove()
            handle = tokenprune.apply(model, {"at": f"layer:{depth}", "prune": method, "keep": 9})
        model(**batch, position_ids=positions)
        spans = handle.last.layout.spans
        handle.remove()
    last = {span.sample: int(span.places[-1]) for span in spans}
    truths = []
    for span in spans:
        row, places = span.sample, span.places.tolist()
        text = [p for p in range(last[row] + 1, positions.shape[1]) if batch["attention_mask"][row, p]]
        raters = raters_of(entering[0][row, places].tolist(), entering[0][row, text].tolist())
        bias = [[rotation_alone(int(positions[row, t] - positions[row, p])) for p in places] for t in text]
        truths.append(score_of(masses[row][:, text][:, :, places].tolist(), bias, raters, heads or 2))
    view = seen[0]
    (signal,) = view.signals
    assert signal.layer == depth - 1
    assert relative_error(view.signals[signal], torch.tensor(truths)) < 1e-4
    for truth, kept in zip(truths, method.select(view).indices.tolist()):
        if depth == 3:
            assert kept == sorted(sorted(range(len(truth)), key=lambda i: (-truth[i], i))[:9])


def test_sparsevlm_acts_nowhere_else():
    with pytest.raises(ValueError, match="'layer:K', not at 'input'"):
        tokenprune.apply(tiny_llava(), {"at": "input", "prune": "sparsevlm", "keep": 9})
