"""SparseVLM v1.0, which clusters what leaves, against loops written from its card; decisions closer than rounding are
left out."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from _tiny import prompts, tiny_llava
from _views import TOWER, make_view
from masked_reference import compare, relative_error, run_pruned

import tokenprune
from tokenprune.interfaces.budget import Budget
from tokenprune.interfaces.pruner import ModelDepths
from tokenprune.interfaces.view import View
from tokenprune.methods.sparsevlm import SparseVLM, ranked_and_clusters

LLAVA = ModelDepths(vision=24, feature=22, decoder=32)
RANKED = {113: (300, 200, 110), 39: (303, 110, 36), 27: (238, 48, 26), 18: (66, 30, 17)}


class Close(Exception):
    """Two candidates closer than rounding."""


def ranked(values: list[float], count: int, least: float = 1e-6) -> list[int]:
    """Places of the `count` largest, the earlier of equals first."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    for a, b in zip(order, order[1:]):
        if 0 < values[a] - values[b] < least:
            raise Close
    return order[:count]


def clusters_of(x: list[list[float]], c: int) -> tuple[list[int], list[int]]:
    """Centres in raster order, and the cluster of each row."""
    m, d = len(x), len(x[0])
    dist = [[math.dist(a, b) / math.sqrt(d) for b in x] for a in x]
    density = [math.exp(-sum(v * v for v in sorted(row)[:c]) / c) for row in dist]
    ranked(density, m, 1e-6)
    delta = []
    for i in range(m):
        denser = [dist[i][j] for j in range(m) if (density[j], -j) > (density[i], -i)]
        delta.append(min(denser) if denser else max(map(max, dist)))
    centres = sorted(ranked([density[i] * delta[i] for i in range(m)], c))
    cluster = []
    for i in range(m):
        nearest = ranked([-dist[i][centre] for centre in centres], 1)[0]
        cluster.append(centres.index(i) if i in centres else nearest)
    return centres, cluster


def by_hand(x: list[list[float]], scores: list[float], k: int, c: int) -> Any:
    """Places, rows and sizes of one image whose k best stay."""
    n, d = len(x), len(x[0])
    order = sorted(range(n), key=lambda i: (-scores[i], i))
    m = math.floor(0.3 * (n - k)) + 1
    loose = sorted(order[k : k + m])
    rows = [(i, x[i], 1.0) for i in order[:k]]
    if c:
        centres, cluster = clusters_of([x[i] for i in loose], c)
        for number, centre in enumerate(centres):
            members = [x[loose[i]] for i in range(m) if cluster[i] == number]
            mean = [sum(row[j] for row in members) / len(members) for j in range(d)]
            rows.append((loose[centre], mean, float(len(members))))
    rows.sort()
    return [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]


@pytest.mark.parametrize("kind", ["random", "line", "copies"])
def test_equals_the_definition(kind: str) -> None:
    """On a line all distances are whole numbers, so ties are ties; copies lie on top of each other."""
    compared, merged = 0, 0
    method = SparseVLM(version="v1")
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        n = [2, 3, 5, 40, 70, 110, 150][seed % 7]
        k = max(1, [1, 2, n - 1, n // 3, n // 10, 1 + seed * 7 % (n - 1)][seed % 6])
        images = 1 + seed % 2
        if kind == "line":
            features = torch.randint(5, (images, n, 1), generator=generator).float().expand(-1, -1, 4).contiguous()
        elif kind == "copies":
            features = torch.randn(images, 6, 3, generator=generator)[:, torch.randint(6, (n,), generator=generator)]
        else:
            features = torch.randn(images, n, 3 + seed % 4, generator=generator)
        scores = torch.rand(images, n, generator=generator)
        if seed % 3 == 0:
            scores = torch.randint(4, (images, n), generator=generator) / 8
        (signal,) = make_view(method, (1, n), min(k, n - 1), features=features).signals
        view = make_view(method, (1, n), min(k, n - 1), features=features, signals={signal: scores})
        selection: Any = method.select(view).validate(images, n)
        own, clusters = ranked_and_clusters(n, view.budget)
        assert own + clusters == view.budget == selection.indices.shape[1]
        for image in range(images):
            try:
                places, rows, sizes = by_hand(
                    features[image].double().tolist(), scores[image].double().tolist(), own, clusters
                )
            except Close:
                continue
            compared, merged = compared + 1, merged + (max(sizes) > 1)
            assert selection.indices[image].tolist() == places, seed
            assert selection.sizes[image].tolist() == sizes, seed
            if selection.features is not None:
                torch.testing.assert_close(selection.features[image], torch.tensor(rows), rtol=1e-5, atol=1e-6)
            else:
                assert clusters == 0
    assert compared > 250 and merged > 90


def test_the_lists_of_the_card() -> None:
    for keep, wanted in RANKED.items():
        stages = SparseVLM(version="v1").stages(Budget(keep), LLAVA)
        assert [stage.site for stage in stages] == ["layer:3", "layer:7", "layer:16"]
        there = 576
        for stage, k in zip(stages, wanted):
            left = stage.budget.tokens(576)
            p = there - k
            c = math.floor((math.floor(0.3 * p) + 1) / 10) + 1
            assert left == k + c and ranked_and_clusters(there, left) == (k, c)
            there = left
        assert there == keep
    for n in (*range(2, 90), 576, 2880):
        for budget in {*range(1, min(n, 40)), n // 2, n - 1} - {0}:
            k, c = ranked_and_clusters(n, budget)
            full = (3 * (n - k) // 10 + 1) // 10 + 1
            assert k >= 1 and k + c == budget and (c == full or (k == 1 and c < full))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"version": "v3"}, "version must be one of v2, v1, got 'v3'"),
        ({"version": "v1", "heads": 3}, "All heads count in version='v1', got heads=3"),
        ({"key_bias": True}, "sparsevlm merges none"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SparseVLM(**options)


def test_nan_is_refused() -> None:
    view = make_view(SparseVLM(version="v1"), (6, 6), 9)
    features = view.features.clone()
    features[1, 4, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        SparseVLM(version="v1").select(dataclasses.replace(view, features=features))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_are_the_mean_over_all_heads_of_plain_attention(side: str, attention: str) -> None:
    seen: list[View] = []

    @dataclasses.dataclass
    class Watched(SparseVLM):
        def select(self, view: View) -> Any:
            seen.append(view)
            return super().select(view)

    batch, eager, entering = prompts([1, 2, 1], side), tiny_llava(attention="eager"), []
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    hook = eager.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    with torch.no_grad():
        masses = eager(**batch, position_ids=positions, output_attentions=True).attentions[1]
    hook.remove()
    model, method = tiny_llava(attention=attention), Watched(version="v1")
    method.name = "sparsevlm"
    with tokenprune.applied(model, {"at": "layer:2", "prune": method, "keep": 9}) as handle, torch.no_grad():
        model(**batch, position_ids=positions)
        spans = handle.last.layout.spans
    last = {span.sample: int(span.places[-1]) for span in spans}
    truths = []
    for span in spans:
        row, places = span.sample, span.places
        text = [p for p in range(last[row] + 1, positions.shape[1]) if batch["attention_mask"][row, p]]
        share = (entering[0][row, places].double() @ entering[0][row, text].double().T).softmax(1).mean(0)
        raters = [t for t, value in zip(text, share) if value > share.mean()]
        truths.append(masses[row][:, raters][:, :, places].double().mean(dim=(0, 1)).float())
    (signal,) = seen[0].signals
    assert relative_error(seen[0].signals[signal], torch.stack(truths)) < 1e-4


@pytest.mark.parametrize("positions", [None, "keep"])
@pytest.mark.parametrize("key_bias", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_removal_equals_masking(side: str, key_bias: bool, positions: str | None) -> None:
    batch, recorded = prompts([1, 3, 0, 2], side), {}

    @dataclasses.dataclass
    class Watched(SparseVLM):
        def select(self, view: View) -> Any:
            selection = super().select(view)
            return recorded.setdefault(view.site, selection)

    method = Watched(version="v1", key_bias=key_bias, positions=positions)
    run = run_pruned(tiny_llava(), method, 9, batch)
    assert run["merges"] and set(run["policies"].values()) == {positions or "compact"}
    assert all(kept.shape[0] == 9 for kept in run["cuts"][-1][1])
    assert any(float(selection.sizes.amax()) > 1 for selection in recorded.values())
    hooks = []
    for site, kept in run["cuts"]:
        rows = torch.cat([torch.full_like(tokens, span.sample) for span, tokens in zip(run["layout"].spans, kept)])
        places = torch.cat([span.places[tokens] for span, tokens in zip(run["layout"].spans, kept)])
        merged = recorded[site].features.flatten(0, 1)

        def stand(module: Any, args: Any, at: Any = (rows, places), merged: Any = merged) -> Any:
            return (args[0].index_put(at, merged), *args[1:])

        layer = run["adapter"].layers[int(site.partition(":")[2])]
        hooks.append(layer.register_forward_pre_hook(stand))
    compare(run, batch, 1e-5)
    for hook in hooks:
        hook.remove()
    with pytest.raises(AssertionError):
        compare(run, batch, 1e-5)  # without what was merged


def test_sizes_add_up_over_cuts() -> None:
    """The clusters of a first cut keep their sizes where a second one ranks or merges them."""
    method, n = SparseVLM(version="v1"), 120
    view = make_view(method, (10, 12), 60)
    first: Any = method.select(view)
    carry = {name: values.gather(1, first.indices) for name, values in first.carry.items()}
    assert torch.equal(carry["sparsevlm_sizes"], first.sizes)
    again = make_view(method, (6, 10), 12, features=first.features, carry=carry)
    second: Any = method.select(again)
    before, went = float(first.sizes[0].sum()), float(first.merged[0])
    k, c = ranked_and_clusters(n, 60)
    assert before == k + 3 * (n - k) // 10 + 1 and went == before - k - c
    score = method.score(again)[0]
    k, c = ranked_and_clusters(60, 12)
    order = score.argsort(descending=True, stable=True)[: k + 3 * (60 - k) // 10 + 1]
    assert float(second.sizes[0].sum()) == float(first.sizes[0, order].sum()) > len(order)


def test_the_signal_says_what_it_is() -> None:
    (first,) = SparseVLM(version="v1").signals_at(TOWER, "layer", 3)
    (second,) = SparseVLM().signals_at(TOWER, "layer", 3)
    assert (first.settings, second.settings) == ((-1, 0), (0, 1))
