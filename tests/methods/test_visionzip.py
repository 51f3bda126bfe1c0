"""VisionZip and FasterVLM against their cards, in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _views import TOWER, make_view
from masked_reference import relative_error

from tokenprune.interfaces.signals import CLS_ATTENTION, TOWER_KEYS, Signal
from tokenprune.methods.fastervlm import FasterVlm
from tokenprune.methods.visionzip import VisionZip

LAYER = TOWER.feature_layer


def by_hand(attention, keys, features, k, share, mean):
    """Kept places, their embeddings and how many tokens each stands for."""
    n = len(attention)
    c = 0 if k < 2 or not share else min(max(1, round(k * share)), k - 1)
    dominant = sorted(sorted(range(n), key=lambda i: (-attention[i], i))[: k - c])
    rest = [i for i in range(n) if i not in dominant]
    metric = keys.reshape(n, TOWER.num_heads, -1).mean(1)
    metric = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    targets = rest[:: max(1, len(rest) // c)][:c] if c else []
    members = {t: [] for t in targets}
    for i in rest:
        if c and i not in members:
            members[max(targets, key=lambda t: (round(float(metric[i] @ metric[t]), 9), -t))].append(i)
    rows = {i: (features[i], 1) for i in dominant}
    for t, going in members.items():
        if mean:
            value = features[[t, *going]].mean(0)
        else:
            value = features[t] + (features[going].mean(0) if going else 0)
        rows[t] = value, 1 + len(going)
    kept = sorted(rows)
    return kept, np.array([rows[i][0] for i in kept]), [rows[i][1] for i in kept]


@pytest.mark.parametrize("merge", ["official", "mean"])
@pytest.mark.parametrize("share", [10 / 64, 0.5, 0.0])
def test_equals_the_card(merge: str, share: float) -> None:
    for seed in range(150):
        draw = torch.Generator().manual_seed(seed)
        grid = (2 + seed % 6, 2 + seed % 7)
        n = grid[0] * grid[1]
        k = 1 + seed * 3 % (n - 1)
        attention = torch.randint(0, 9 if seed % 2 else 4000, (2, n), generator=draw) / 4096
        # both heads alike, of length 4: cosines of their mean are exact, and ties are many
        keys = (2.0 * torch.randint(0, 2, (2, n, 16), generator=draw) - 1).repeat(1, 1, 2)
        features = torch.randn(2, n, 6, generator=draw)
        method = VisionZip(contextual=share, merge=merge)
        signals = {Signal(CLS_ATTENTION, LAYER): attention, Signal(TOWER_KEYS, LAYER): keys}
        selection = method.select(make_view(method, grid, k, images=2, features=features, signals=signals))
        for image in range(2):
            given = (part[image].double().numpy() for part in (attention, keys, features))
            kept, rows, sizes = by_hand(*given, k, share, merge == "mean")
            assert selection.indices[image].tolist() == kept, seed
            if selection.features is None:
                assert sizes == [1] * k
                continue
            assert selection.sizes is not None
            assert relative_error(selection.features[image], torch.tensor(rows)) < 1e-5
            assert selection.sizes[image].tolist() == sizes
            assert sum(sizes) == n, "every token is kept or merged, once"


def test_shares_of_the_official_settings() -> None:
    assert [VisionZip().merged_count(k) for k in (64, 128, 192, 2, 1)] == [10, 20, 30, 1, 0]
    with pytest.raises(ValueError, match="contextual"):
        VisionZip(contextual=1.0)
    with pytest.raises(ValueError, match="Did you mean"):
        VisionZip(merge="meen")


def test_fastervlm_is_the_ranking_of_the_feature_layer() -> None:
    for seed in range(50):
        view = make_view(FasterVlm(), (5, 7), 1 + seed % 34, seed=seed)
        attention = view.signal(CLS_ATTENTION, LAYER)
        for row, kept in zip(attention.tolist(), FasterVlm().select(view).indices.tolist()):
            assert kept == sorted(sorted(range(35), key=lambda i: (-row[i], i))[: view.budget])
