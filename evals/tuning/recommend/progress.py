"""How far a search is: one bar from the first cost to the last answer, and how long the rest will take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tokenprune.evals.config.points import spoken
from tokenprune.evals.io.progress import clock, heartbeat, in_words

COST_ANSWERS = 2
"""A setting's cost takes about as long as so many answers, until one was timed."""


def answers_at_most(settings: int, rungs: Sequence[int], before: int, finalists: int, held_out: int) -> int:
    """Answers that are still to come if no setting leaves early: half of the settings go through each rung, never fewer
    than `finalists`; then these and the unpruned model are tested.

    Args:
        settings: in the first of `rungs`.
        rungs: sample counts that are ahead.
        before: samples that these settings have answered.
        held_out: samples of the test.
    """
    total = 0
    for rung in rungs:
        total += (settings + 1) * (rung - before)  # and the unpruned model
        before, settings = rung, min(settings, max(math.ceil(settings / 2), finalists))
    return total + (min(settings, finalists) + 1) * held_out


class Pace:
    """Seconds a unit of work, learned from what was really done: what a killed run left behind takes no time."""

    def __init__(self) -> None:
        self.seconds, self.units = 0.0, 0

    def add(self, seconds: float, units: int) -> None:
        """`units` were done in so many seconds."""
        if units > 0:
            self.seconds += seconds
            self.units += units

    @property
    def each(self) -> float | None:
        """Seconds a unit; None before the first."""
        return self.seconds / self.units if self.units else None


class SearchProgress:
    """The bar of a whole search; without a terminal its line every few seconds, so that nothing is silent.

    Args:
        every: seconds between two lines without a terminal; the usual by default.
        now: the clock.
    """

    def __init__(self, console: Console, every: float | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._begin, self._last = now, now(), now()
        self._console = console
        self.answer_pace, self.cost_pace = Pace(), Pace()
        self._phase, self._label = "getting ready", ""
        self._costs, self._costs_done = 0, 0
        self._ahead = 0  # answers to come when the phase began, at most
        self._before = 0  # answers counted when the phase began
        self._covered: dict[str, int] = {}  # answers counted of each setting in this phase
        self._running: dict[str, int] = {}  # and in this round, with those that were counted before
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[words]}"), console=console,
        )  # fmt: skip
        self._task = self._bar.add_task("getting ready", total=1, words="")
        self._heart = heartbeat(console, self.line, every)

    def __enter__(self) -> SearchProgress:
        self._bar.start()
        self._heart.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heart.__exit__(kind, error, trace)
        self._bar.stop()

    def begin(self, phase: str, ahead: int, costs: int | None = None) -> None:
        """A new phase ("round 2 of 5, 38 settings").

        Args:
            ahead: answers still to come in all, at most.
            costs: how many costs are to be taken in all.
        """
        self._before += sum(self._covered.values())
        self._phase, self._ahead, self._covered, self._running = phase, ahead, {}, {}
        if costs is not None:
            self._costs = costs
        self._last = self._now()
        self._show("")

    def skip(self, label: str, answers: int) -> None:
        """A setting begins this phase with so many answers that were counted in an earlier one."""
        self._running[label] = -answers

    def say(self, sentence: str) -> None:
        """Print above the bar."""
        self._console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    def cost_of(self, label: str) -> None:
        """The cost of a setting is taken next."""
        self._last = self._now()
        self._show(label)

    def costs(self, done: int, fresh: bool) -> None:
        """`done` costs are known now; fresh: the last of them was taken, not read."""
        now = self._now()
        self.cost_pace.add(now - self._last, int(fresh))
        self._last, self._costs_done = now, done

    def answers(self, done: int, label: str, fresh: bool) -> None:
        """`done` more answers of a setting are there; fresh: they were given now."""
        now = self._now()
        self.answer_pace.add(now - self._last, done if fresh else 0)
        self._last = now
        self._running[label] = self._running.get(label, 0) + done
        self._covered[label] = max(self._covered.get(label, 0), self._running[label])
        self._show(label)

    def estimate(self) -> str:
        """What is ahead, as a sentence to print before the search."""
        each = self.answer_pace.each
        left = self.seconds_left
        time_said = "how long they take shows with the first that is new"
        if each is not None and left is not None:
            time_said = f"about {in_words(left)} at {each:.2g} s an answer of the unpruned model"
        return (
            f"Ahead: the costs of {self._costs} settings, then at most {self.answers_left} answers: {time_said}. "
            "Less where settings leave early or answer faster."
        )

    @property
    def answers_left(self) -> int:
        """At most."""
        return max(0, self._ahead - sum(self._covered.values()))

    @property
    def seconds_left(self) -> float | None:
        """None while nothing was timed."""
        each = self.answer_pace.each
        if each is None:
            return None
        cost = self.cost_pace.each
        costs = (self._costs - self._costs_done) * (COST_ANSWERS * each if cost is None else cost)
        return self.answers_left * each + costs

    def line(self) -> str:
        """Where the search is, in words."""
        at = f", at {spoken(self._label)}" if self._label else ""
        return f"{self._phase}{at}: {self._words()}, {clock(self._now() - self._begin)} passed"

    def _words(self) -> str:
        left = self.seconds_left
        said = "" if left is None else f", about {clock(left)} left"
        if self._costs_done < self._costs:
            return f"cost {self._costs_done} of {self._costs}, then at most {self.answers_left} answers{said}"
        return f"at most {self.answers_left} answers to go{said}"

    def _show(self, label: str) -> None:
        self._label = label
        done = self._before + sum(self._covered.values()) + COST_ANSWERS * self._costs_done
        ahead = self.answers_left + COST_ANSWERS * (self._costs - self._costs_done)
        self._bar.update(
            self._task, completed=done, total=max(1, done + ahead), description=self._phase, words=self._words()
        )
