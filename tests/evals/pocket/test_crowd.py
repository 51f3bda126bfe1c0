"""The crowd suites: scenes with many objects, questions that name few of them, answers in equal shares."""

from __future__ import annotations

import io
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tokenprune.evals.learned.settings import TrainConfig
from tokenprune.evals.pocket import crowd, questions
from tokenprune.evals.pocket.catalog import suite_fingerprint
from tokenprune.evals.pocket.questions import FAMILIES, SIDES, ask, side_of
from tokenprune.evals.pocket.scenes import COLOURS, PATCH, SHAPES, SPLIT_SEED, make_scene
from tokenprune.evals.tasks.load import count_samples, default_task, load_task, task_fingerprint, task_names
from tokenprune.evals.tasks.unlabelled import check_data

SUITES = list(crowd.CROWDS)


@pytest.fixture(scope="module", params=SUITES)
def suite(request):
    return request.param


@pytest.fixture(scope="module")
def rows(suite):
    return crowd.load_rows(suite)


def _scene(suite, row):
    made, i = crowd.CROWDS[suite], int(row["scene_id"].rpartition("-")[2])
    cols, lines = made.sizes[i % len(made.sizes)]
    return make_scene(made.seed + i, (cols * PATCH, lines * PATCH), made.objects, free_repeats=True)


def test_the_committed_file_is_what_the_generator_draws(suite, rows):
    drawn = crowd.draw_rows(suite, scenes=6)
    for row, again in zip(rows, drawn):
        assert row["image"] == again["image"] or np.array_equal(*(_pixels(r["image"]) for r in (row, again)))
        assert row["boxes"] == [pytest.approx(box, abs=1e-6) for box in again["boxes"]]
        same = ("sample_id", "scene_id", "family", "question", "answer")
        assert [row[name] for name in same] == [again[name] for name in same]
    assert len(rows) == 2 * crowd.CROWDS[suite].scenes == count_samples(suite) >= 300


def _pixels(png):
    return np.array(Image.open(io.BytesIO(png)).convert("RGB"))


def test_answers_come_in_equal_shares(rows):
    shares = Counter((row["family"], row["answer"]) for row in rows)
    assert {shares["exist", answer] for answer in ("yes", "no")} == {len(rows) // 4}
    assert {shares["relation", side] for side in SIDES} == {len(rows) // 8}
    assert len(shares) == 6
    # also in every prefix that goes once round the answers, and each with each of the other family
    assert Counter(row["answer"] for row in rows[:16]) == {"yes": 4, "no": 4, **dict.fromkeys(SIDES, 2)}
    pairs = Counter(zip((row["answer"] for row in rows[::2]), (row["answer"] for row in rows[1::2])))
    assert len(pairs) == 8 and len(set(pairs.values())) == 1


def test_scenes_hold_many_objects_and_questions_are_about_one_or_two(suite, rows):
    things, asked = [], 0
    for row in rows[:80]:
        scene = _scene(suite, row)
        things.append(len(scene.things))
        words = row["question"].rstrip("?").split()
        pairs = [pair for pair in zip(words[1:], words) if pair[0] in SHAPES and pair[1] in COLOURS]
        by_name = {(thing.shape, thing.colour): thing for thing in scene.things}
        assert len(by_name) == len(scene.things)
        edges = np.array([scene.width, scene.height] * 2)
        boxes = {tuple(np.round(np.array(box) * edges).astype(int)) for box in row["boxes"]}
        if row["family"] == "relation":
            other, one = (by_name[pair] for pair in pairs)
            assert side_of(one, other) == row["answer"] and boxes == {one.box, other.box}
        elif row["answer"] == "yes":
            assert boxes == {by_name[pairs[0]].box}
        else:
            ((shape, colour),) = pairs
            assert (shape, colour) not in by_name
            sharing = {t.box for t in scene.things if t.shape == shape or t.colour == colour}
            assert boxes == (sharing or {t.box for t in scene.things})
        asked += row["family"] == "relation"
    assert (min(things), max(things)) == (16, 20) and asked == 40


def test_small_budgets_cannot_hold_every_object(suite):
    """Tokens that objects touch: 64 of 576 hold fewer than all of them, 16 fewer than half."""
    made, touched = crowd.CROWDS[suite], []
    for i in range(12):
        cols, lines = made.sizes[i % len(made.sizes)]
        scene = make_scene(made.seed + i, (cols * PATCH, lines * PATCH), made.objects, free_repeats=True)
        owned = scene.owner[: lines * PATCH, : cols * PATCH].reshape(lines, PATCH, cols, PATCH)
        touched.append(int(((owned > 0) & (owned < 200)).any((1, 3)).sum()))
    assert min(touched) > 64


def test_no_other_suite_draws_these_scenes():
    ranges = [range(made.seed, made.seed + made.scenes) for made in crowd.CROWDS.values()]
    others = [range(0, 300), range(500_000_000, 500_000_200)]
    seeds = [seed for part in (*ranges, *others) for seed in part]
    assert len(set(seeds)) == len(seeds) and max(seeds) + SPLIT_SEED["test"] < SPLIT_SEED["val"]


def test_free_repeats_leave_the_other_scenes_as_they_were():
    limited, free = (make_scene(5, objects=(9, 9), free_repeats=free) for free in (False, True))
    assert max(Counter(t.shape for t in limited.things).values()) <= 5
    assert [t.box for t in limited.things] != [t.box for t in free.things]
    many = [make_scene(seed, objects=(20, 20), free_repeats=True) for seed in range(8)]
    assert any(max(Counter(t.shape for t in scene.things).values()) > 5 for scene in many)


@pytest.mark.parametrize("family", ["exist", "relation"])
def test_asking_for_an_answer_asks_what_the_suites_ask(family):
    """The families of the other suites are these questions, with a drawn answer."""
    seen = set()
    for seed in range(30):
        scene = make_scene(seed)
        question = ask(scene, family, random.Random(seed))
        rng = random.Random(seed)
        if family == "exist":
            again = questions.exist(scene, rng, rng.random() < 0.5)
        else:
            there = {side_of(a, b) for a in scene.things for b in scene.things if a is not b} - {None}
            again = questions.relation(scene, rng, rng.choice(sorted(there)))
        assert question == again
        seen.add(question.answer)
    assert seen == ({"yes", "no"} if family == "exist" else set(SIDES)) and family in FAMILIES


def test_a_side_on_which_nothing_stands_is_not_asked_about():
    scene = make_scene(0)
    del scene.things[1:]
    assert questions.relation(scene, random.Random(0), "left") is None
    with pytest.raises(ValueError, match="Scene 0 has no two things that stand left of each other"):
        crowd.ask_two(scene, 0, random.Random(0))


def test_they_are_tasks_of_their_own(suite, rows):
    assert {suite, f"{suite}:exist", f"{suite}:relation"} <= set(task_names())
    task, part = load_task(suite), load_task(f"{suite}:relation")
    assert (task.size, part.size, task.families) == (len(rows), len(rows) // 2, ("exist", "relation"))
    assert task.fingerprint == task_fingerprint(suite) == suite_fingerprint(suite) != suite_fingerprint("pocket")
    samples = list(task.load(0, 24))
    assert task.has_boxes and all(0 <= v <= 1 for s in samples for box in s.boxes for v in box)
    assert task.score("No", samples[8].answer) == 1 and samples[8].answer == "no"
    sizes = {sample.image.size for sample in samples}
    assert sizes == {(336, 336)} if suite == "pocket-crowd" else len(sizes) == 8
    assert default_task("pocket-llava") == "pocket" and default_task("pocket-qwen") == "pocket-mixed"


def test_nothing_is_trained_or_tuned_on_them(suite, tmp_path):
    with pytest.raises(ValueError, match=f"{suite} has a test split only.*use {suite.removesuffix('-crowd')} instead"):
        check_data(suite)
    with pytest.raises(ValueError, match=f"{suite}:exist has a test split only"):
        check_data(f"{suite}:exist")
    with pytest.raises(ValueError, match=f"{suite} has a test split only, so there is nothing to train on"):
        TrainConfig(method="gtc", model="pocket-llava", data=suite, output=str(tmp_path)).check()


@pytest.mark.pocket
@pytest.mark.parametrize(("model", "keep"), [("pocket-llava", "16"), ("pocket-qwen", "0.05")])
def test_the_shipped_models_answer_them_with_all_tokens_and_with_the_right_ones(model, keep, tmp_path):
    import pyarrow.parquet as pq

    from tokenprune.cli import main

    task = "pocket-crowd" if model == "pocket-llava" else "pocket-mixed-crowd"
    command = ["eval", "--model", model, "--tasks", task, "--method", "oracle", "--keep", keep, "--limit", "24"]
    assert main([*command, "--no-timing", "--output", str(tmp_path)]) in (0, None)
    samples = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    right = Counter(row["method"] for row in samples if row["correct"])
    assert right["none"] >= 23 and right["oracle"] >= 22 and right["random"] <= 17, right
