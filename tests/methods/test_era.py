"""ERA against loops written from its card, and the card's properties. Decisions closer than rounding are left out."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from _tiny import prompts, tiny_llava
from _views import TOWER, make_view
from masked_reference import relative_error

import tokenprune
from tokenprune.interfaces.signals import ATTENTION_BY_HEAD, Signal
from tokenprune.methods.era import ERA, head_entropy

SIGNAL = Signal(ATTENTION_BY_HEAD, TOWER.feature_layer)


def cosine(a: list[float], b: list[float]) -> float:
    lengths = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
    return sum(v * w for v, w in zip(a, b)) / lengths if lengths else 0.0


def unit(a: list[float]) -> list[float]:
    length = math.sqrt(sum(v * v for v in a))
    return [v / length for v in a] if length else list(a)


def by_hand(x: list[list[float]], a: list[list[float]], k: int, beta: float, lam: float, gamma: float | None) -> Any:
    """One image: anchors, cluster of each token, merged rows, b, and by how much the closest decision was won."""
    n, heads = len(x), len(a[0])
    gap = math.inf

    def first_largest(values: dict[int, float]) -> int:
        nonlocal gap
        order = sorted(values, key=lambda i: (-values[i], i))
        if len(order) > 1 and values[order[0]] != values[order[1]]:
            gap = min(gap, values[order[0]] - values[order[1]])
        return order[0]

    y = [[v / sum(row) for v in row] if sum(row) else [1 / heads] * heads for row in a]
    e = [-sum(v * math.log(v) for v in row if v > 0) / math.log(heads) if heads > 1 else 0.0 for row in y]
    f = [unit(x[i]) + [beta * v for v in unit(y[i])] for i in range(n)]
    far_apart = [[1 - cosine(f[i], f[j]) for j in range(n)] for i in range(n)]
    chosen = [first_largest({i: -e[i] for i in range(n)})]
    while len(chosen) < k:
        far = {i: min(far_apart[i][j] for j in chosen) - lam * e[i] for i in range(n) if i not in chosen}
        chosen.append(first_largest(far))
    kept = sorted(chosen)
    cluster = [
        kept.index(i) if i in kept else first_largest({s: cosine(x[i], x[kept[s]]) for s in range(k)}) for i in range(n)
    ]
    members = [[i for i in range(n) if cluster[i] == s] for s in range(k)]
    rows = [[sum(x[i][d] for i in of) / len(of) for d in range(len(x[0]))] for of in members]
    s = [0.0 if i in kept else 1 - e[i] for i in range(n)]
    if gamma is not None:
        if sum(s) == 0:
            s = [0.0 if i in kept else 1.0 for i in range(n)]
        s = [v * gamma * (n - k) / sum(s) for v in s]
    b = [1 + sum(s[i] for i in of) for of in members]
    return kept, cluster, rows, b, gap


def problem(seed: int, ties: bool) -> tuple[ERA, Any]:
    """Small images; with `ties` whole tokens come several times, in exact arithmetic."""
    generator = torch.Generator().manual_seed(seed)
    grid = (1 + seed % 4, 2 + seed % 6)
    count = grid[0] * grid[1]
    k = [1, count - 1, 1 + seed * 7 % (count - 1)][seed % 3] if count > 2 else 1
    options = [{}, {"beta": 0.0}, {"entropy_weight": 2.0}, {"gamma": 0.5}, {"beta": 2.0, "gamma": 1.0}][seed % 5]
    method, images = ERA(**options), 1 + seed % 3
    features = torch.randn(images, count, 4 + seed % 5, generator=generator)
    attention = torch.rand(images, count, 1 + seed % 4, generator=generator) / count
    attention[torch.rand(attention.shape, generator=generator) < 0.1] = 0
    if ties:  # rows of one entry: cosines are 0 and 1, entropies of even shares repeat
        features = torch.eye(features.shape[2])[torch.randint(features.shape[2], (images, count), generator=generator)]
        attention = torch.eye(4)[torch.randint(4, (images, count), generator=generator)]
    view = make_view(method, grid, k, features=features, signals={SIGNAL: attention})
    return method, view


@pytest.mark.parametrize("ties", [False, True], ids=["random", "ties"])
def test_equals_the_definition(ties: bool) -> None:
    compared = 0
    for seed in range(700 if ties else 900):
        method, view = problem(seed, ties)
        selection: Any = method.select(view)
        for image in range(view.num_images):
            kept, cluster, rows, b, gap = by_hand(
                view.features[image].double().tolist(), view.signals[SIGNAL][image].double().tolist(), view.budget,
                method.beta, method.entropy_weight, method.gamma,
            )  # fmt: skip
            if gap < 1e-5:
                continue
            compared += 1
            assert selection.indices[image].tolist() == kept, seed
            torch.testing.assert_close(selection.features[image], torch.tensor(rows), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(selection.sizes[image], torch.tensor(b), rtol=1e-5, atol=1e-5)
    assert compared > 1200


def clusters(view: Any, selection: Any) -> list[list[int]]:
    """Members of each anchor of the first image, by the largest cosine."""
    kept = selection.indices[0].tolist()
    x = view.features[0].double().tolist()
    of: list[list[int]] = [[i] for i in kept]
    for i in range(len(x)):
        if i not in kept:
            near = [cosine(x[i], x[s]) for s in kept]
            of[near.index(max(near))].append(i)
    return of


def test_clusters_partition_the_tokens_and_anchors_keep_their_own() -> None:
    for seed in range(20):
        view = make_view(ERA(), (6, 5), 1 + seed, images=1, seed=seed, features=torch.randn(1, 30, 8))
        selection: Any = ERA().select(view)
        of = clusters(view, selection)
        assert sum(map(len, of)) == 30 and [members[0] for members in of] == selection.indices[0].tolist()
        means = torch.stack([view.features[0, members].mean(0) for members in of])
        torch.testing.assert_close(selection.features[0], means, rtol=1e-5, atol=1e-6)
        assert int(selection.merged[0]) == 30 - view.budget


def test_entropy_lies_between_0_and_1_and_one_head_alone_gives_0() -> None:
    share, entropy = head_entropy(torch.tensor([[0.0, 0.3, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]]))
    assert entropy.tolist() == [0.0, 1.0, 1.0] and share[2].tolist() == [0.25] * 4
    rows = torch.rand(1000, 7).pow(8)
    entropy = head_entropy(rows)[1]
    assert float(entropy.min()) >= 0 and float(entropy.max()) <= 1
    assert head_entropy(torch.rand(5, 1))[1].tolist() == [0.0] * 5
    torch.testing.assert_close(head_entropy(rows.double() * 1e-30)[1], entropy)


def sizes_of(method: ERA, view: Any) -> Any:
    return method.select(view).sizes


def test_sizes() -> None:
    view = make_view(ERA(), (5, 6), 4)
    b = sizes_of(ERA(), view)
    assert b.shape == (3, 4) and float(b.min()) >= 1
    entropy = head_entropy(view.signals[SIGNAL])[1]
    kept = ERA().select(view).indices
    gained = (1 - entropy).sum(1) - (1 - entropy).gather(1, kept).sum(1)
    torch.testing.assert_close(b.sum(1), 4 + gained.float())
    torch.testing.assert_close(sizes_of(ERA(gamma=0.5), view).sum(1), torch.full((3,), 4 + 0.5 * 26))
    assert float(sizes_of(ERA(gamma=1.0, cap=2.5), view).max()) == 2.5
    even = dataclasses.replace(view, signals={SIGNAL: torch.ones(3, 30, 2)})
    torch.testing.assert_close(sizes_of(ERA(), even), torch.ones(3, 4))
    torch.testing.assert_close(sizes_of(ERA(gamma=1.0), even).sum(1), torch.full((3,), 30.0))
    lone = torch.eye(2)[torch.randint(2, (3, 30))]
    alone = sizes_of(ERA(), dataclasses.replace(view, signals={SIGNAL: lone}))
    assert alone.sum(1).tolist() == [30.0] * 3, "w = 1 for each: clusters count whole"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": -1}, "beta must be a weight of at least 0, got -1"),
        ({"entropy_weight": math.nan}, "entropy_weight must be"),
        ({"gamma": 0}, "gamma must be a number above 0, got 0"),
        ({"cap": 0.5}, "cap must be a size of at least 1, got 0.5"),
    ],
)
def test_options_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ERA(**options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_clusters_alike_that_weigh_what_they_are_give_the_unpruned_attention(attention: str) -> None:
    """A cluster of copies at one position: one layer over all of them gives the same text rows."""
    model, batch = tiny_llava(attention=attention, layers=1), prompts([1])
    few, features = torch.randn(5, 48), torch.arange(36) * 7 % 5
    merged, given = ERA(gamma=1.0, entropy_weight=0.0), few[features][None]
    view = make_view(merged, (6, 6), 5, images=1, features=given)
    lone = {SIGNAL: torch.eye(2)[torch.zeros(1, 36, dtype=torch.int64)]}  # w = 1 for each
    selection: Any = merged.select(dataclasses.replace(view, signals=lone))
    counts = torch.bincount(features)
    assert sorted(selection.sizes[0].tolist()) == sorted(counts.float().tolist())
    torch.testing.assert_close(selection.features[0], given[0, selection.indices[0]])
    text = model.get_input_embeddings()(batch["input_ids"][:, -4:])
    decoder = model.model.language_model
    with torch.no_grad():
        whole = torch.cat([given, text], 1)
        places = torch.cat([torch.zeros(36, dtype=torch.int64), torch.arange(1, 5)])[None]
        truth = decoder(inputs_embeds=whole, position_ids=places, attention_mask=torch.ones(1, 40)).last_hidden_state
        short = torch.cat([selection.features, text], 1)
        bias = torch.cat([selection.sizes.log(), torch.zeros(1, 4)], 1)
        mask = bias[:, None, None].expand(1, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -1e30)
        said = decoder(inputs_embeds=short, position_ids=places[:, -9:],
                       attention_mask=mask).last_hidden_state  # fmt: skip
    assert relative_error(said[:, -4:], truth[:, -4:]) < 1e-5
    plain = mask.masked_fill(mask > -1, 0.0)
    with torch.no_grad():
        said = decoder(inputs_embeds=short, position_ids=places[:, -9:], attention_mask=plain).last_hidden_state
    assert relative_error(said[:, -4:], truth[:, -4:]) > 1e-3


def test_on_a_model() -> None:
    model, batch = tiny_llava(), prompts([1, 2])
    with torch.no_grad(), tokenprune.applied(model, "era", keep=9) as handle:
        biased = model(**batch).logits[:, -1]
        report = handle.report()
        assert report.merged_tokens == 3 * 27 and report.kept_tokens == 27 and "reconstruction" in str(report)
    with torch.no_grad(), tokenprune.applied(model, ERA(key_bias=False), keep=9):
        assert relative_error(model(**batch).logits[:, -1], biased) > 1e-3
