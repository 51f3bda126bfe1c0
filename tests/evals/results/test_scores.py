"""Scores of points from rows: what is paired with what, the discriminating subset, the headroom, Holm."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tokenprune.evals.config.points import NONE, Point
from tokenprune.evals.results.scores import paired
from tokenprune.evals.results.summary import summarise, table_rows
from tokenprune.evals.statistics.bootstrap import headroom_share
from tokenprune.evals.statistics.significance import holm, mcnemar

ANSWERS = {
    (NONE, None): [1, 1, 1, 1, 1, 1, 1, 0, 1, 1],
    ("random", 64): [1, 0, 0, 1, 0, 0, 0, 0, 1, 0],
    ("downsample", 64): [1, 0, 0, 0, 0, 1, 1, 1, 0, 0],
    ("holov", 64): [1, 1, 1, 1, 0, 0, 1, 0, 1, 0],
    ("oracle", 64): [1, 1, 1, 1, 1, 1, 1, 0, 1, 1],
    ("holov", 32): [0, 1, 0, 1, 0, 0, 1, 0, 1, 0],
}


def grid() -> tuple[list[Point], dict]:
    points = [Point("m", "t", method, keep) for method, keep in ANSWERS]
    rows = {
        point.key: [
            {"sample_id": f"s{i}", "family": "ab"[i % 2], "correct": score, "visual_tokens": 576, "kept_tokens": 64}
            for i, score in enumerate(ANSWERS[point.method, point.keep])
        ]
        for point in points
    }
    return points, rows


def by_label(records: list[dict]) -> dict[str, dict]:
    return {record["label"]: record for record in records}


def test_comparisons_are_with_the_same_budget():
    points, rows = grid()
    found = by_label(summarise(points, rows, {}, 0))
    holov = found["holov@64"]["overall"]
    assert (holov["vs_random_won"], holov["vs_random_lost"]) == (3, 0)
    assert holov["vs_random"] == pytest.approx(0.3) and holov["vs_random_p"] == mcnemar(3, 0)
    assert (holov["vs_unpruned_won"], holov["vs_unpruned_lost"]) == (0, 3)
    # random, downsample and oracle ran at 64 only
    small = found["holov@32"]["overall"]
    assert small["vs_random"] is small["discriminating"] is small["headroom_won"] is None
    assert small["vs_unpruned"] == pytest.approx(-0.5)
    assert found["random@64"]["overall"]["vs_random"] is None
    assert found["none"]["overall"]["vs_unpruned"] is None and found["none"]["overall"]["relative"] == 1.0


def test_discriminating_subset_is_what_downsample_gets_wrong():
    points, rows = grid()
    found = by_label(summarise(points, rows, {}, 0))
    wrong = [i for i, score in enumerate(ANSWERS["downsample", 64]) if not score]
    holov = found["holov@64"]["overall"]
    assert holov["discriminating_n"] == len(wrong) == 6
    assert holov["discriminating"] == pytest.approx(np.mean([ANSWERS["holov", 64][i] for i in wrong]))
    assert holov["discriminating_low"] <= holov["discriminating"] <= holov["discriminating_high"]
    assert found["downsample@64"]["overall"]["discriminating"] is None
    assert found["holov@64"]["families"]["a"]["discriminating_n"] == sum(i % 2 == 0 for i in wrong)


def test_holm_is_over_every_point_of_a_model_and_task():
    points, rows = grid()
    records = summarise(points, rows, {}, 0)
    for name, count in (("vs_unpruned", 5), ("vs_random", 3)):
        tested = [record["overall"] for record in records if record["overall"][f"{name}_p"] is not None]
        assert len(tested) == count
        assert [s[f"{name}_holm"] for s in tested] == holm([s[f"{name}_p"] for s in tested])
    assert all(scores[f"{name}_holm"] is None for r in records for scores in r["families"].values())
    assert {"vs_unpruned_holm", "discriminating_n", "headroom_won_low", "vs_random_needed"} <= set(
        table_rows(records)[0]
    )


def test_a_failed_sample_is_left_out_of_the_pair():
    points, rows = grid()
    key = Point("m", "t", "holov", 64).key
    rows[key][1] = {"sample_id": "s1", "family": "b", "error": "out of memory", "correct": None}
    rows[Point("m", "t", "random", 64).key][2]["counted"] = False  # s2: won by holov if it counted
    rows[key].reverse()  # pairs are made by the sample's name, not by its place
    holov = by_label(summarise(points, rows, {}, 0))["holov@64"]["overall"]
    assert holov["n"] == 9
    assert (holov["vs_random_won"], holov["vs_random_lost"]) == (1, 0)
    assert len(paired(rows[key], rows[Point("m", "t", "random", 64).key])[0]) == 8


def test_headroom_share_against_every_resample():
    scores, random, oracle = [1, 0, 1, 0.5, 1], [0, 0, 0, 0.5, 0], [1, 1, 1, 1, 1]
    found = headroom_share(scores, random, oracle, resamples=200_000)
    assert found is not None and found.value == pytest.approx(3 / 4.5)
    triples = np.stack([scores, random, oracle], 1)
    ratios = []
    for draw in itertools.product(range(5), repeat=5):
        method, chance, best = triples[list(draw)].sum(0)
        ratios.append((method - chance) / (best - chance))
    low, high = np.percentile(ratios, [2.5, 97.5])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


def test_no_share_of_a_headroom_that_is_not_there():
    random = [1] * 50 + [0] * 50
    assert headroom_share(random, random, random) is None
    assert headroom_share(random, random, [1] * 51 + [0] * 49) is None  # one point: below two
    assert headroom_share(random, random, [1] * 53 + [0] * 47) is None  # three points that many resamples do not show
    assert headroom_share(random, random, [1] * 80 + [0] * 20) is not None
    with pytest.raises(ValueError, match="three times, got 1, 2 and 1"):
        headroom_share([1], [1, 0], [1])
