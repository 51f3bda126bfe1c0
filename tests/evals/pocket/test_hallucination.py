"""The hallucination suites: POPE's splits as the card draws them, a listing whose right answers are known, and metrics
that find what was planted."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tokenprune.evals.pocket import crowd
from tokenprune.evals.pocket import hallucination as suite_of
from tokenprune.evals.pocket.catalog import refuse_test_only, suite_fingerprint
from tokenprune.evals.pocket.hallucination import DRAWINGS, KINDS, OR, absent_thing, statistics
from tokenprune.evals.pocket.scenes import PATCH, SPLIT_SEED, make_scene
from tokenprune.evals.tasks.hallucination_task import chair, named_thing, pope
from tokenprune.evals.tasks.load import count_samples, load_task, task_fingerprint, task_names

SPLITS = ("random", "popular", "adversarial")


@pytest.fixture(scope="module", params=list(DRAWINGS))
def suite(request):
    return request.param


@pytest.fixture(scope="module")
def rows(suite):
    return suite_of.load_rows(suite)


def _kind(question):
    colour, shape = question.rstrip("?").split()[-2:]
    return shape, colour


def test_the_committed_file_is_what_the_generator_draws(suite, rows):
    drawn = suite_of.draw_rows(suite, 4)
    for row, again in zip(rows, drawn):
        same = ("sample_id", "scene_id", "family", "question", "answer", "things", "image")
        assert [row[name] for name in same] == [again[name] for name in same]
        assert row["boxes"] == [pytest.approx(box, abs=1e-6) for box in again["boxes"]]
    assert len(rows) == count_samples(suite) == len({row["sample_id"] for row in rows})


def test_answers_and_splits_come_in_equal_shares_and_are_true(rows):
    shares = Counter((row["family"], row["answer"]) for row in rows if row["family"] != "listing")
    assert shares == {(split, answer): 150 for split in SPLITS for answer in ("yes", "no")}
    for row in rows:
        words = row["question"].rstrip("?").split()
        if row["family"] == "listing":
            for answer in row["answer"].split(OR):
                assert named_thing(row["question"], answer) in row["things"]
        else:
            assert (" ".join(words[-2:]) in row["things"]) == (row["answer"] == "yes")


def test_adversarial_things_have_more_company_and_popular_ones_are_among_the_most_frequent(rows):
    known = statistics()
    company = Counter()
    for row in rows:
        if row["answer"] == "no":
            present = {tuple(thing.split()[::-1]) for thing in row["things"]}
            kind = _kind(row["question"])
            company[row["family"]] += known.company(kind, present)
            absent = sorted((one for one in KINDS if one not in present), key=lambda one: -known.alone[one])
            assert row["family"] != "popular" or kind in absent[:10]
            best = sorted(absent, key=lambda one: -known.company(one, present))
            assert row["family"] != "adversarial" or kind in best[:3]
    # scenes repeat one shape or colour, no more, so company is not all that uneven: 15 percent more
    assert company["adversarial"] > 1.1 * max(company["random"], company["popular"])


def test_statistics_are_of_training_scenes():
    made = [make_scene(SPLIT_SEED["train"] + i) for i in range(12)]
    first = [suite_of.first_things(SPLIT_SEED["train"] + i) for i in range(12)]
    alike = sum([(t.shape, t.colour) for t in scene.things] == kinds for scene, kinds in zip(made, first))
    assert alike >= 11  # a scene whose things do not fit is drawn again
    known = statistics(200)
    pair = next(iter(known.together))
    assert known.together[pair] == known.together[pair[::-1]] <= min(known.alone[kind] for kind in pair)


def test_every_absent_thing_can_be_asked_about_in_the_random_split():
    present = {KINDS[0], KINDS[9]}
    drawn = {absent_thing("random", present, random.Random(seed)) for seed in range(400)}
    assert drawn == set(KINDS) - present


def test_no_other_suite_draws_these_scenes():
    ranges = [range(one.seed, one.seed + one.scenes) for one in (*DRAWINGS.values(), *crowd.CROWDS.values())]
    seeds = [seed for part in (*ranges, range(0, 300), range(500_000_000, 500_000_200)) for seed in part]
    assert len(set(seeds)) == len(seeds) and max(seeds) + SPLIT_SEED["test"] < SPLIT_SEED["val"]


def test_they_are_tasks_and_have_a_test_split_only(suite):
    assert {suite, f"{suite}:adversarial", f"{suite}:listing"} <= set(task_names())
    task, part = load_task(suite), load_task(f"{suite}:popular")
    assert task.families == (*SPLITS, "listing") and part.size == 300 and task.has_boxes
    assert task.fingerprint == task_fingerprint(suite) == suite_fingerprint(suite)
    samples = list(task.load(0, 16))
    assert all(side % PATCH == 0 for sample in samples for side in sample.image.size)
    several = next(sample for sample in samples if OR in sample.answer)
    assert [task.mark(several, answer) for answer in several.answer.split(OR)] == [1.0] * several.answer.count(OR) + [1]
    assert task.mark(several, "none") == 0
    other = "pocket-mixed" if "mixed" in suite else "pocket"
    with pytest.raises(ValueError, match=f"{suite} has a test split only.*use {other} instead"):
        refuse_test_only(suite, "to train on")


def test_pope_metrics_find_what_was_planted():
    said = [({"answer": answer}, text) for answer, text in (
        ("yes", "yes"), ("yes", "Yes."), ("yes", "no"), ("no", "yes"), ("no", "no"), ("no", "red"),
        ("no", "no"), ("no", "no"),
    )]  # fmt: skip
    found = pope(said)
    assert found["precision %"] == pytest.approx(200 / 3) == found["recall %"] == found["F1 %"]
    assert found["yes %"] == pytest.approx(300 / 8) and found["neither %"] == 12.5
    assert "precision %" not in pope([({"answer": "no"}, "no")])


def test_chair_counts_each_thing_once_and_whole_scenes_only():
    def row(scene, question, things=("red circle", "blue bar", "blue ring")):
        return {"scene_id": scene, "question": question, "things": list(things), "family": "listing"}

    said = [
        (row("a", "what shape is the red thing?"), "circle"),
        (row("a", "what colour is the circle?"), "red"),  # the same thing again
        (row("a", "what shape is the blue thing?"), "cross"),  # not there
        (row("a", "what colour is the bar?"), "yes"),  # no colour
        (row("b", "what shape is the red thing?", ["red circle"]), "circle"),
        (row("c", "what shape is the red thing?"), "pole"),  # its second question is missing
    ]
    found = chair(said, {"a": 4, "b": 1, "c": 2})
    assert found["CHAIR_i %"] == pytest.approx(100 / 3) and found["CHAIR_s %"] == 50
    assert found["things found %"] == 50 and found["no thing %"] == 20
    assert chair(said[-1:], {"c": 2}) == {}


def test_metrics_of_a_whole_suite_say_their_family(suite):
    task = load_task(suite)
    samples = list(task.load(0, 40))
    right = [{"sample_id": s.sample_id, "prediction": s.answer.split(OR)[0]} for s in samples]
    found = task.metrics(right)
    assert found["adversarial precision %"] == 100 and found["listing CHAIR_s %"] == 0
    yes = load_task(f"{suite}:random").metrics(
        [{**row, "prediction": "yes"} for row in right if "random" in row["sample_id"]]
    )
    assert yes["yes %"] == 100 and 45 <= yes["precision %"] <= 60
