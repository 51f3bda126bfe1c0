"""What a search says while it runs: one bar, an estimate before it, a line every few seconds without a terminal."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

pytest.importorskip("optuna")

from _answer_tables import LADDER, asked_for, drawn

from tokenprune.evals.io import progress
from tokenprune.evals.tuning.recommend.progress import SearchProgress, answers_at_most
from tokenprune.evals.tuning.recommend.search import recommend


def test_the_most_answers_are_those_of_a_search_in_which_nothing_is_refuted():
    # 8 settings and the unpruned model answer 10, 4 of them 10 more, 3 (the finalists) 20 more, then the test
    assert answers_at_most(8, [10, 20, 40], 0, 3, 40) == 9 * 10 + 5 * 10 + 4 * 20 + 4 * 40
    assert answers_at_most(4, [20, 40], 10, 3, 40) == 5 * 10 + 4 * 20 + 4 * 40
    assert answers_at_most(2, [10], 0, 3, 10) == 3 * 10 + 3 * 10


def test_time_left_comes_from_what_was_really_done_and_reaches_zero():
    now = [0.0]
    watch = SearchProgress(Console(quiet=True), now=lambda: now[0])
    watch.begin("timing the unpruned model", 100, costs=4)
    assert watch.seconds_left is None and "shows with the first that is new" in watch.estimate()
    now[0] += 0.01
    watch.answers(40, "none", fresh=False)  # of a run that was killed
    assert watch.answers_left == 60 and watch.seconds_left is None
    now[0] += 10
    watch.answers(20, "none", fresh=True)
    assert watch.seconds_left == pytest.approx(40 * 0.5 + 4 * 2 * 0.5)
    assert "the costs of 4 settings, then at most 40 answers: about 24 seconds" in watch.estimate()
    watch.begin("taking costs", 40)
    for done in range(4):
        watch.cost_of("holov@64")
        now[0] += 3
        watch.costs(done + 1, fresh=True)
    assert watch.seconds_left == pytest.approx(20)
    watch.begin("round 1 of 1", 40)
    watch.skip("none", 30)
    watch.skip("holov@64", 0)
    watch.answers(30, "none", fresh=False)
    assert watch.answers_left == 40, "answers that were counted before are not counted twice"
    now[0] += 20
    watch.answers(40, "holov@64", fresh=True)
    assert watch.answers_left == 0 and watch.seconds_left == 0
    assert watch.line() == "round 1 of 1, at holov@64: at most 0 answers to go, about 0:00:00 left, 0:00:42 passed"


def test_one_bar_with_round_answers_and_time_left(tmp_path, monkeypatch):
    shown: list[str] = []
    monkeypatch.setattr(SearchProgress, "_show", _remember(SearchProgress._show, shown))
    stream = io.StringIO()
    console = Console(file=stream, width=160)
    recommend(asked_for(tmp_path, 0.03), console, bench=drawn(0, 1200, LADDER), keep_study=False)
    left = [int(number) for line in shown for number in re.findall(r"at most (\d+) answers", line)]
    assert left == sorted(left, reverse=True) and left[-1] == 0, "what is left never grows, and ends at nothing"
    phases = list(dict.fromkeys(line.partition(":")[0].partition(", at")[0] for line in shown))
    assert phases[:3] == ["timing the unpruned model", "taking costs", "round 1 of 6"]
    assert phases[-1].startswith("testing ") and phases[-2] == "round 6 of 6"
    said = stream.getvalue()
    assert re.search(r"Ahead: the costs of 8 settings, then at most \d+ answers: about \d+ seconds", said)
    assert said.index("Ahead:") < said.index("testing ") and said.count("━") > 0
    assert sum("━" in line for line in said.splitlines()) == 1, "one bar for the whole search"


def test_nothing_is_silent_without_a_terminal(tmp_path):
    """A batch that takes long says nothing itself; the line comes all the same."""
    assert progress.QUIET < 10
    table = drawn(0, 400, LADDER)
    quick = table.scores

    def slow(settings, samples, on_answers):
        time.sleep(0.2)
        return quick(settings, samples, on_answers)

    table.scores = slow
    stream = io.StringIO()
    patched = pytest.MonkeyPatch()
    with patched.context() as patch:
        patch.setattr(progress, "QUIET", 0.05)
        recommend(asked_for(tmp_path, 0.05), Console(file=stream, width=160), bench=table, keep_study=False)
    lines = [line for line in stream.getvalue().splitlines() if " passed" in line]
    assert len(lines) >= 8 and any(line.startswith("round 2 of ") for line in lines), lines


def test_a_sweeps_bar_says_its_line_without_a_terminal(monkeypatch):
    monkeypatch.setattr(progress, "QUIET", 0.02)
    stream = io.StringIO()
    with progress.show_progress(Console(file=stream, width=160)) as bar:
        task = bar.add_task("answers  holov@64", total=40)
        bar.update(task, advance=10)
        time.sleep(0.2)
    assert "answers  holov@64: 10 of 40, 0:00:00 passed" in stream.getvalue()
    with progress.waiting(Console(file=stream, width=160), "Loading pocket-llava"):
        time.sleep(0.1)
    assert "Loading pocket-llava: 0:00:00 so far" in stream.getvalue()


def _remember(show, shown):
    def remembering(self, label):
        show(self, label)
        shown.append(self.line())

    return remembering
