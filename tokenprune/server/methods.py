"""The field `tokenprune` of a request: which method, with which budget, made ready for the model once and kept."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import tokenprune
from tokenprune.api import Prepared, prepare
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.budget import read_budget
from tokenprune.plan.expression import pruner_parts, split_name, split_outside
from tokenprune.plan.parse import Spec, parse_method
from tokenprune.registry import INTERVENTIONS, METHODS, near
from tokenprune.server.refusals import Refused

NONE = "none"
"""What a request says that is not to be pruned."""
KEPT = 32
"""Methods that stay ready; the one that was used longest ago leaves."""
_LETTERS, _LENGTH, _DEPTH = re.compile(r"[\w\s@+().,=:\[\]{}'\"-]*", re.ASCII), 300, 8
_WORD = re.compile(r"[\w-]*", re.ASCII)


class Methods:
    """Methods of one model by what requests call them. Asked by the thread that owns the model alone.

    Args:
        model, adapter: what is pruned.
        default: what a request gets that does not say: "holov@64", "none", or the path of a YAML file.

    Raises:
        TypeError, ValueError, UnknownName: the default is no method, or cannot work on this model.
    """

    def __init__(self, model: Any, adapter: Adapter, default: str = NONE) -> None:
        self._model, self._adapter, self.default = model, adapter, default
        self._ready: OrderedDict[str, Prepared] = OrderedDict()
        self._default: Prepared | None = None
        if default != NONE:
            self._default = self._make(parse_method(default))

    def prepared(self, said: str | None) -> Prepared | None:
        """The method of a request; None for the model as it is.

        Raises:
            Refused: there is no such method, or it cannot work on this model.
        """
        text = self.default if said is None else said.strip()
        if said is None or text == self.default:
            return self._default
        if text == NONE:
            return None
        if text not in self._ready:
            try:
                self._ready[text] = self._prepare(text)
            except Refused:
                raise
            except (TypeError, ValueError, KeyError, OSError, NotImplementedError) as error:
                sentence = error.args[0] if isinstance(error, KeyError) and error.args else error
                raise Refused(f"tokenprune={text!r}: {sentence}", param="tokenprune", code="bad_method") from error
            if len(self._ready) > KEPT:
                self._ready.popitem(last=False)
        self._ready.move_to_end(text)
        return self._ready[text]

    def _prepare(self, text: str) -> Prepared:
        check_text(text)
        method, keep = self._whole(text)
        spec = parse_method(method, keep)
        _check_files(spec)
        return self._make(spec)

    def _make(self, spec: Spec) -> Prepared:
        """Raises ValueError where a method needs to be told, or to have seen, what no request brings."""
        for entry in spec.entries:
            if hints := entry.pruner.needed_hints:
                raise ValueError(f"{entry.pruner.name} needs hints ({', '.join(hints)}), which no request brings.")
        prepared = prepare(self._model, spec, adapter=self._adapter)
        with prepared.applied() as handle:
            waiting = [one for one in handle.interventions if one.wants_prompts]
        for one in waiting:
            raise ValueError(
                f"{one.name} learns from {one.wants_prompts} prompts with pictures before it acts on this model, so "
                "requests would answer for each other. Give it what it would learn as options."
            )
        return prepared

    def _whole(self, text: str) -> tuple[str, int | float | str | None]:
        """Method and budget, the default's where the request leaves one out."""
        yaml = self.default.endswith((".yaml", ".yml"))
        own = [] if yaml or self.default == NONE else pruner_parts(self.default)
        name, _, budget = own[0].rpartition("@") if len(own) == 1 and "@" in own[0] else (self.default, "", "")
        if text.startswith("@"):
            if yaml or self.default == NONE or len(split_outside(self.default, "+")) > 1 or not budget:
                raise Refused(
                    f"tokenprune={text!r} is a budget alone, and this server's own method, {self.default}, takes none. "
                    'Name the method: "holov@64".',
                    param="tokenprune", code="bad_budget",
                )  # fmt: skip
            return name, read_budget(text[1:])
        prunes = pruner_parts(text)
        open_parts = [part for part in prunes if "@" not in part]
        if not open_parts or len(prunes) > 1:
            return text, None
        if yaml or not budget:
            raise Refused(
                f"tokenprune={text!r} does not say how many visual tokens to keep; write {open_parts[0]}@64 or "
                f"{open_parts[0]}@0.25.",
                param="tokenprune", code="bad_budget",
            )  # fmt: skip
        return text, read_budget(budget)


def check_text(text: str) -> None:
    """Raise Refused unless a request's text is a method on one line, of names that exist and options that name no file.

    Imports no method and reads no YAML before its letters were looked at: aliases (`&`, `*`) could grow to anything.
    """
    if len(text) > _LENGTH or not _LETTERS.fullmatch(text):
        raise Refused(
            f"tokenprune must be a method on one line of up to {_LENGTH} letters, digits and the signs @+().,=[]{{}}, "
            'like "holov@64" or "holov(variant=official)@0.25".',
            param="tokenprune", code="bad_method",
        )  # fmt: skip
    depth = deepest = 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        deepest = max(deepest, depth)
    if deepest > _DEPTH:
        raise Refused(f"tokenprune={text!r} has brackets {deepest} deep.", param="tokenprune", code="bad_method")
    known = [*METHODS.names(), *INTERVENTIONS.names()]
    for part in split_outside(text, "+") if not text.startswith("@") else ():
        try:
            name, options, _ = split_name(part)
        except ValueError as error:
            raise Refused(f"tokenprune={text!r}: {error}", param="tokenprune", code="bad_method") from None
        if name not in known:
            raise Refused(
                f"There is no method called {name!r}.{near(name, known)} Known: {', '.join(sorted(known))} and {NONE}.",
                param="tokenprune", code="unknown_method",
            )  # fmt: skip
        for option, value in options.items():
            if isinstance(value, str) and not _WORD.fullmatch(value):
                raise Refused(
                    f"tokenprune={text!r}: {option}={value!r} is not a word. What names a file is the server's to "
                    "choose, with --method.",
                    param="tokenprune", code="files_refused",
                )  # fmt: skip


def _check_files(spec: Spec) -> None:
    """Raise Refused where a request would have a file read that does not come with the package."""
    own = [Path(place).resolve() for place in tokenprune.__path__]
    files = [file for entry in spec.entries for file in entry.pruner.files]
    files += [file for one in spec.interventions for file in one.files]
    for file in files:
        if not any(file.resolve().is_relative_to(place) for place in own):
            raise Refused(
                "tokenprune names a file that does not come with the package; that is the server's to choose, with "
                "--method.",
                param="tokenprune", code="files_refused",
            )  # fmt: skip
