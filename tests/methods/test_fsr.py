"""FSR against its card, in plain loops and float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from _views import TOWER, make_view
from masked_reference import relative_error

from tokenprune.interfaces.signals import CLS_ATTENTION, INSTRUCTION_EMBEDDING, Signal
from tokenprune.methods.fsr import Fsr

LAYER = TOWER.feature_layer
Vector = list[float]


def scaled(values: Vector) -> Vector:
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 1.0 for value in values]


def cosine(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))


def by_hand(
    v: list[Vector], s: Vector, r: Vector | None, k: int, alpha: float, beta: float, rho: float, kappa: float
) -> tuple[list[int], dict[int, Vector], dict[int, int], int, float]:
    """Card steps 1 to 6 for one picture: what is kept, its vectors, its sizes, K_F, and how far the sum of the focus
    stayed from the threshold."""
    n = len(v)
    phi = [a**beta for a in scaled(s)]
    if r is not None:
        phi = [p * a**alpha for p, a in zip(phi, scaled(r))]
    pi = sorted(range(n), key=lambda i: (-phi[i], i))
    total, mass, size, gap = sum(phi), 0.0, 0, 1.0
    while size < n:
        mass += phi[pi[size]]
        size += 1
        if size < k:
            gap = min(gap, abs(mass - rho * total))
        if mass >= rho * total:
            break
    focus = pi[: min(size, k)]
    anchors, scan = list(focus), []
    while len(anchors) < k:
        left = [i for i in range(n) if i not in anchors]
        scan.append(max(left, key=lambda i: (min(1 - cosine(v[i], v[j]) for j in anchors), -i)))
        anchors.append(scan[-1])
    rest = [i for i in range(n) if i not in anchors]
    vectors, sizes = {i: v[i] for i in anchors}, dict.fromkeys(anchors, 1)
    if scan:
        goal = {i: max(scan, key=lambda j: (cosine(v[i], v[j]), -j)) for i in rest}
        closest = sorted(rest, key=lambda i: (-cosine(v[i], v[goal[i]]), i))
        groups: dict[int, list[int]] = {}
        for i in closest[: min(int(kappa * len(scan)), len(rest))]:
            groups.setdefault(goal[i], [goal[i]]).append(i)
        for j, members in groups.items():
            weights = [phi[i] for i in members] if any(phi[i] for i in members) else [1.0] * len(members)
            whole = sum(weights)
            vectors[j] = [sum(w * v[i][d] for w, i in zip(weights, members)) / whole for d in range(len(v[0]))]
            sizes[j] = len(members)
    return sorted(anchors), vectors, sizes, len(focus), gap


def exact(images: int, count: int, draw: torch.Generator) -> torch.Tensor:
    """Rows of length 4 whose cosines are whole sixteenths: exact in fp32, and many are tied."""
    return 2.0 * torch.randint(0, 2, (images, count, 16), generator=draw) - 1


@pytest.mark.parametrize("source", ["none", "hint"])
@pytest.mark.parametrize(
    ("alpha", "beta", "rho", "kappa"), [(3, 1, 0.9, 1), (1, 2, 0.4, 2.5), (0, 1, 0.2, 0), (3, 1, 0, 9)]
)
def test_equals_the_card_ties_included(source: str, alpha: float, beta: float, rho: float, kappa: float) -> None:
    compared, focused, absorbed = 0, set(), 0
    for seed in range(130):
        draw = torch.Generator().manual_seed(seed)
        grid = (2 + seed % 4, 2 + seed % 5)
        n = grid[0] * grid[1]
        k = 1 + seed * 3 % (n - 1)
        features = exact(2, n, draw)
        # few values, so that many are tied; a range that is a power of two at times, a single value at others
        attention = torch.randint(0, 1 + seed % 6, (2, n), generator=draw) / 8
        hint = torch.randint(-2, 3, (2, n), generator=draw) / 4
        method = Fsr(relevance=source, alpha=alpha, beta=beta, rho=rho, kappa=kappa)
        view = make_view(
            method, grid, k, images=2, features=features, signals={Signal(CLS_ATTENTION, LAYER): attention},
            hints={"relevance": list(hint)},
        )  # fmt: skip
        found = method.select(view).validate(2, n)
        assert found.features is not None and found.sizes is not None
        for image in range(2):
            r = hint[image].tolist() if source == "hint" else None
            kept, vectors, sizes, in_focus, gap = by_hand(
                features[image].tolist(), attention[image].tolist(), r, k, alpha, beta, rho, kappa
            )
            if gap < 1e-5:
                continue
            compared += 1
            focused.add(in_focus)
            absorbed += sum(sizes.values()) - k
            assert found.indices[image].tolist() == kept, seed
            assert found.sizes[image].tolist() == [sizes[i] for i in kept], seed
            assert relative_error(found.features[image], torch.tensor([vectors[i] for i in kept])) < 1e-5
            alone = [place for place, i in enumerate(kept) if sizes[i] == 1]
            assert torch.equal(found.features[image, alone], features[image, [kept[place] for place in alone]])
    assert compared > 180 and (absorbed > 50 or not kappa)
    assert len(focused) > 3 or rho == 0


def test_by_the_embedding_of_the_instruction() -> None:
    """phi with drawn numbers: the cosine with the instruction, cubed, times attention."""
    draw = torch.Generator().manual_seed(4)
    features, text = torch.randn(2, 30, 16, generator=draw), torch.randn(2, 16, generator=draw)
    attention = torch.rand(2, 30, generator=draw)
    signals = {Signal(CLS_ATTENTION, LAYER): attention, Signal(INSTRUCTION_EMBEDDING, 0): text}
    method = Fsr()
    phi = method.phi(make_view(method, (5, 6), 9, images=2, features=features, signals=signals))
    for image in range(2):
        r = scaled([cosine(row, text[image].tolist()) for row in features[image].tolist()])
        truth = [a**3 * b for a, b in zip(r, scaled(attention[image].tolist()))]
        torch.testing.assert_close(phi[image], torch.tensor(truth), rtol=1e-4, atol=1e-6)


def test_the_focus_is_the_smallest_that_holds_its_share_and_is_untouched() -> None:
    attention = torch.tensor([[0.0, 8.0, 4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
    features = exact(1, 9, torch.Generator().manual_seed(0))
    method = Fsr(relevance="none", rho=0.75, kappa=9.0)
    view = make_view(method, (3, 3), 3, images=1, features=features, signals={Signal(CLS_ATTENTION, LAYER): attention})
    found = method.select(view)
    assert found.features is not None and found.sizes is not None
    # 8 + 4 of 16: two tokens are focus, and the one that is scanned absorbs all six that leave
    place = [index not in (1, 2) for index in found.indices[0].tolist()]
    assert sum(place) == 1 and {1, 2} < set(found.indices[0].tolist())
    assert found.sizes[0].tolist() == [7.0 if scanned else 1.0 for scanned in place]
    focus = [number for number, scanned in enumerate(place) if not scanned]
    assert torch.equal(found.features[0, focus], features[0, [1, 2]])


def test_ends_of_rho() -> None:
    """rho = 0: one token is focus, and the rest is farthest point first; rho = 1 and a small budget: the top of phi."""
    draw = torch.Generator().manual_seed(5)
    features, attention = torch.randn(1, 30, 8, generator=draw), torch.rand(1, 30, generator=draw)
    signals = {Signal(CLS_ATTENTION, LAYER): attention}
    kept = {}
    for rho in (0.0, 1.0):
        method = Fsr(relevance="none", rho=rho, kappa=0.0)
        kept[rho] = method.select(make_view(method, (5, 6), 7, images=1, features=features, signals=signals)).indices
    from tokenprune.kernels.greedy_diversity import greedy_diversity

    assert torch.equal(kept[0.0], greedy_diversity(features, 7, "k_center", attention.argmax(1)).sort(dim=1).values)
    assert torch.equal(kept[1.0], attention.topk(7).indices.sort(dim=1).values)


def test_moved_and_stretched_numbers_are_the_same_numbers() -> None:
    draw = torch.Generator().manual_seed(6)
    attention, hint = torch.randint(0, 9, (2, 2, 30), generator=draw) / 8
    method, kept = Fsr(relevance="hint"), []
    for stretch, shift in ((1, 0), (4, 2)):
        view = make_view(
            method, (5, 6), 11, images=2, signals={Signal(CLS_ATTENTION, LAYER): stretch * attention + shift},
            hints={"relevance": list(stretch * hint - shift)},
        )  # fmt: skip
        kept.append(method.select(view))
    assert torch.equal(kept[0].indices, kept[1].indices) and torch.equal(kept[0].features, kept[1].features)


def test_reports_say_what_stands_in() -> None:
    no_cls = dataclasses.replace(TOWER, has_cls=False)
    for source, notes in (("embedding", [1, 2]), ("hint", [0, 1]), ("none", [0, 1])):
        assert [len(Fsr(relevance=source).notes(tower)) for tower in (TOWER, no_cls)] == notes
    assert Fsr(relevance="hint").needed_hints == ("relevance",) and not Fsr().needed_hints


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": -1}, "alpha must be a number from 0 on, got -1"),
        ({"kappa": math.nan}, "kappa must be"),
        ({"rho": 1.5}, "rho must be a share of the sum of phi, from 0 to 1, got 1.5"),
        ({"relevance": "hints"}, "Did you mean"),
    ],
)
def test_options_are_checked(options: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Fsr(**options)  # type: ignore[arg-type]
