"""What the page asks of the model, one request at a time."""

from __future__ import annotations

import base64
import hashlib
import io
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tokenprune.api import Prepared
from tokenprune.evals.config.points import NONE, check_method_name, needs_budget
from tokenprune.evals.evaluation.applied_method import visual_tokens
from tokenprune.evals.io.picture_reader import NARROWEST, read_extent, read_picture
from tokenprune.evals.models.chat_template import MARKER
from tokenprune.evals.models.load import LoadedModel
from tokenprune.evals.one_prompt.ask import ask, make_ready
from tokenprune.evals.one_prompt.samples import SIGNS, frames_note, own_picture_note
from tokenprune.evals.report.overlay import draw_places, seen_views
from tokenprune.evals.tasks.load import default_task, load_task
from tokenprune.evals.tasks.task import Sample, drawn_samples
from tokenprune.plan.parse import parse_method
from tokenprune.registry import INTERVENTIONS, METHODS

SHOWN = 16
"""Pictures of the suite that the page offers."""

HELD = 24
"""Pictures of one's own, and methods made ready, that are held in memory; the oldest leave."""

MOST_PIXELS = 40_000_000
MOST_QUESTION = 2000  # letters
START = ("random", "holov", "vtc_cls")
"""The methods that the page begins with."""


@dataclass(frozen=True)
class Asked:
    """One column of the page.

    Attributes:
        picture: "sample:4", or the id that `Desk.take` gave.
        method: as written; "none" for the unpruned model.
        keep: tokens of the picture, or their fraction; ignored where the method takes none or says its own.
    """

    picture: str
    question: str
    method: str
    keep: int | float | None


def read_asked(given: Any) -> Asked:
    """What a page sent, checked.

    Raises:
        ValueError: a field is missing, of another kind, or too long.
    """
    if not isinstance(given, dict):
        raise ValueError("A request is a mapping with picture, question, method and keep.")
    texts = {}
    for name, most in (("picture", 100), ("question", MOST_QUESTION), ("method", 400)):
        value = given.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"Give a {name}; it must be a text that is not empty.")
        if len(value) > most:
            raise ValueError(f"The {name} has {len(value)} letters; {most} are the most.")
        texts[name] = value.strip()
    if texts["method"].endswith((".yaml", ".yml")):
        raise ValueError("The page reads no files; write the method out, such as vtc_cls@64.")
    keep = given.get("keep")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, (int, float))):
        raise ValueError(f"keep is a number of tokens or a fraction, got {keep!r}.")
    return Asked(texts["picture"], texts["question"], texts["method"], keep)


class Desk:
    """One model, and what the page may ask of it. Every call may come from any thread; they take turns at the model, so
    that a method is at work for its own request only.

    Args:
        loaded: the model.
        max_new_tokens: length of an answer.
    """

    def __init__(self, loaded: LoadedModel, max_new_tokens: int = 32) -> None:
        self._loaded, self._length = loaded, max_new_tokens
        self._turn = threading.Lock()
        self._task = load_task(default_task(loaded.name))
        first = SIGNS[self._task.name]
        self._places = [first, *(place for place in drawn_samples(self._task, SHOWN, None) if place != first)]
        self._samples = {place: next(self._task.load(place, place + 1)) for place in self._places}
        tokenizer = loaded.processor.tokenizer
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._marks = sorted({MARKER, *tokenizer.all_special_tokens, *added})
        self._own: OrderedDict[str, Image.Image] = OrderedDict()
        self._ready: OrderedDict[tuple[str, Any], Prepared] = OrderedDict()

    def facts(self) -> dict[str, Any]:
        """What the page is made of: the model, the suite's pictures, the methods."""
        return {
            "model": self._loaded.name,
            "suite": self._task.name,
            "ownPicture": own_picture_note(self._loaded.name),
            "samples": [
                {
                    "id": f"sample:{place}", "question": one.question, "answer": str(one.answer), "family": one.family,
                    "frames": len(one.frames),
                }
                for place, one in self._samples.items()
            ],
            "methods": [{"name": name, "says": METHODS.describe(name), "budget": True} for name in METHODS.names()],
            "interventions": [
                {"name": name, "says": INTERVENTIONS.describe(name), "budget": False}
                for name in INTERVENTIONS.names()
            ],
            "start": [name for name in START if name in METHODS.names()],
        }  # fmt: skip

    def thumbnail(self, place: int) -> bytes | None:
        """The picture of a sample of the suite, or a video's first frame, as a PNG; None for one not offered."""
        sample = self._samples.get(place)
        return None if sample is None else _png(sample.frames[0])

    def take(self, content: bytes) -> dict[str, Any]:
        """Hold a picture of one's own.

        Raises:
            ValueError: it is no picture, or too large.
        """
        _check_size(content)
        picture = read_picture(content, "The picture")
        name = hashlib.sha256(content).hexdigest()[:32]
        with self._turn:
            self._own[name] = picture
            self._own.move_to_end(name)
            while len(self._own) > HELD:
                self._own.popitem(last=False)
        notes = [frames_note(content, "The picture"), own_picture_note(self._loaded.name)]
        return {"id": name, "width": picture.width, "height": picture.height, "notes": [n for n in notes if n]}

    def look(self, given: Any) -> dict[str, Any]:
        """How many visual tokens a picture has, and the picture as the model sees it."""
        asked = read_asked({"question": "what is this?", "method": NONE, **(given if isinstance(given, dict) else {})})
        with self._turn:
            sample, inputs = self._prompt(asked)
            views = seen_views(self._loaded, inputs, sample.visuals[0])
            return {"visual": visual_tokens(self._loaded, inputs)[0], "picture": _shown(draw_places(views, []))}

    def answer(self, given: Any) -> dict[str, Any]:
        """One column: what the model says at one method, and what it costs.

        Raises:
            ValueError, TypeError, KeyError: the method, its budget or the picture cannot be had; a sentence.
        """
        asked = read_asked(given)
        check_method_name(asked.method)
        with self._turn:
            sample, inputs = self._prompt(asked)
            prepared = self._prepared(asked)
            hints = {hint for stage in (prepared.stages if prepared else ()) for hint in stage.pruner.needed_hints}
            if "boxes" in hints and sample.boxes is None:
                raise ValueError(f"{asked.method} needs boxes of what suffices for the answer; pick one of the suite.")
            one = ask(self._loaded, prepared, sample, inputs, self._length)
            views = seen_views(self._loaded, inputs, sample.visuals[0])
            picture = draw_places(views, one.places, one.shrinks)
        right = None if sample.answer is None else bool(self._task.mark(sample, one.answer) == 1)
        return {
            "label": one.label, "answer": one.answer, "right": right, "visual": one.visual, "kept": one.kept,
            "average": round(one.average, 2), "flops": one.flops, "kv": one.kv_bytes, "firstToken": one.first_token,
            "seconds": one.seconds, "notes": list(one.notes), "picture": _shown(picture),
        }  # fmt: skip

    def _prompt(self, asked: Asked) -> tuple[Sample, dict[str, Any]]:
        """The sample that is asked about, and the processor's inputs; only whoever has the turn calls this."""
        mark = next((mark for mark in self._marks if mark in asked.question), None)
        if mark is not None:
            raise ValueError(f"The question holds {mark!r}, a token of the model's own and no text; leave it out.")
        kind, _, number = asked.picture.partition(":")
        if kind == "sample":
            known = self._samples.get(int(number)) if number.isdecimal() else None
            if known is None:
                raise ValueError(f"The page offers no picture {asked.picture!r}.")
            answer = known.answer if asked.question == known.question else None
            sample = Sample(known.sample_id, known.family, asked.question, answer, known.image, known.boxes)
        elif asked.picture in self._own:
            sample = Sample("own", "own", asked.question, None, self._own[asked.picture])
        else:
            raise ValueError("This picture is not held any more; choose it again.")
        return sample, dict(self._loaded.inputs([sample.question], [sample.image]))

    def _prepared(self, asked: Asked) -> Prepared | None:
        if asked.method == NONE:
            return None
        keep = asked.keep if needs_budget(asked.method) else None
        key = (asked.method, keep)
        if key not in self._ready:
            self._ready[key] = make_ready(self._loaded, parse_method(asked.method, keep), self._task)
        self._ready.move_to_end(key)
        while len(self._ready) > HELD:
            self._ready.popitem(last=False)
        return self._ready[key]


def _check_size(content: bytes) -> None:
    extent = read_extent(content)
    if extent is not None and extent.kind == "EPS":
        raise ValueError("The picture is a PostScript program, which would have to be run; give a PNG or a JPEG.")
    if extent is not None and extent.size[0] * extent.size[1] > MOST_PIXELS:
        width, height = extent.size
        raise ValueError(f"The picture has {width} x {height} pixels; {MOST_PIXELS:,} in all are the most.")
    if extent is not None and max(extent.size) > NARROWEST * min(extent.size):
        width, height = extent.size
        raise ValueError(
            f"The picture has {width} x {height} pixels and is too narrow; one side may be {NARROWEST} times as long "
            "as the other."
        )


def _png(picture: Image.Image) -> bytes:
    held = io.BytesIO()
    picture.save(held, format="PNG")
    return held.getvalue()


def _shown(picture: Image.Image) -> str:
    """A picture as a data URL."""
    return "data:image/png;base64," + base64.b64encode(_png(picture)).decode("ascii")
