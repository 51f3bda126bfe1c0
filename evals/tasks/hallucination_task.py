"""The metrics of the hallucination suites: POPE's of questions with yes and no, CHAIR's of the things that a model
names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenprune.evals.tasks.task import Task

LISTING = "listing"
_YES, _NO = "yes", "no"


@dataclass
class HallucinationTask(Task):
    """A hallucination suite or one of its families.

    Attributes:
        truth: by sample id, the row of the suite: family, scene_id, question, answer, things.
    """

    truth: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)

    def metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """In percent. Of yes-no questions, "yes" being what is looked for: precision, recall, F1, the share of answers
        that are yes, and of those that are neither. Of the listing: CHAIR_i, CHAIR_s, recall. With several families
        each name begins with that of its family."""
        said: dict[str, list[tuple[Mapping[str, Any], str]]] = {}
        for row in rows:
            known = self.truth[str(row["sample_id"])]
            said.setdefault(known["family"], []).append((known, str(row["prediction"] or "")))
        found: dict[str, float] = {}
        for family in (name for name in self.families if name in said):
            made = chair(said[family], self._asked()) if family == LISTING else pope(said[family])
            prefix = f"{family} " if len(self.families) > 1 else ""
            found |= {f"{prefix}{name}": value for name, value in made.items()}
        return found

    def _asked(self) -> dict[str, int]:
        """Listing questions of each scene."""
        counts: dict[str, int] = {}
        for row in self.truth.values():
            if row["family"] == LISTING:
                counts[row["scene_id"]] = counts.get(row["scene_id"], 0) + 1
        return counts


def plain(text: str) -> str:
    """Lower case, without space around it and final punctuation."""
    return text.strip().rstrip(".!?").strip().lower()


def pope(said: Sequence[tuple[Mapping[str, Any], str]]) -> dict[str, float]:
    """Metrics of rows and answers; an answer that is neither yes nor no counts as no, and is counted."""
    answers = [(known["answer"] == _YES, plain(text)) for known, text in said]
    right = sum(wanted and text == _YES for wanted, text in answers)
    claimed = sum(text == _YES for _, text in answers)
    present = sum(wanted for wanted, _ in answers)
    made = {}
    if claimed:
        made["precision %"] = 100 * right / claimed
    if present:
        made["recall %"] = 100 * right / present
    if claimed + present:
        made["F1 %"] = 200 * right / (claimed + present)
    made["yes %"] = 100 * claimed / len(answers)
    made["neither %"] = 100 * sum(text not in (_YES, _NO) for _, text in answers) / len(answers)
    return made


def named_thing(question: str, prediction: str) -> str | None:
    """The thing that an answer to a listing question names, as "red circle"; None where the answer is no colour, or no
    shape."""
    from tokenprune.evals.pocket.scenes import COLOURS, SHAPES

    said, words = plain(prediction), plain(question.rstrip("?")).split()
    if words[1] == "shape":  # what shape is the red thing
        return f"{words[4]} {said}" if said in SHAPES else None
    return f"{said} {words[-1]}" if said in COLOURS else None  # what colour is the circle


def chair(said: Sequence[tuple[Mapping[str, Any], str]], asked: Mapping[str, int]) -> dict[str, float]:
    """CHAIR over the things named in each scene; a scene counts once all of its questions were answered.

    CHAIR_i: of the things named, each once a scene, those that are not there. CHAIR_s: of the scenes, those of which
    such a thing is named. recall: of the things there, those named. no thing: of the answers, those that name none.

    Args:
        asked: listing questions by scene.
    """
    scenes: dict[str, list[tuple[Mapping[str, Any], str]]] = {}
    for known, text in said:
        scenes.setdefault(known["scene_id"], []).append((known, text))
    whole = [rows for scene, rows in scenes.items() if len(rows) == asked[scene]]
    if not whole:
        return {}
    named = wrong = there = found = scenes_with_wrong = answers = silent = 0
    for rows in whole:
        mentions = [named_thing(known["question"], text) for known, text in rows]
        things, caption = set(rows[0][0]["things"]), {thing for thing in mentions if thing is not None}
        answers, silent = answers + len(rows), silent + mentions.count(None)
        named, wrong = named + len(caption), wrong + len(caption - things)
        there, found = there + len(things), found + len(caption & things)
        scenes_with_wrong += bool(caption - things)
    made = {"CHAIR_i %": 100 * wrong / named} if named else {}
    return {
        **made,
        "CHAIR_s %": 100 * scenes_with_wrong / len(whole),
        "things found %": 100 * found / there,
        "no thing %": 100 * silent / answers,
    }
