"""What a task of lmms-eval asks of generation, in the words of transformers. Imports nothing of lmms-eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_ALWAYS = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "min_new_tokens")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_DEFAULT_STOP = "\n\n"


@dataclass(frozen=True)
class Generation:
    """How an answer is generated.

    Attributes:
        settings: arguments of `model.generate`.
        until: texts at which the answer ends; they do not belong to it.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    until: tuple[str, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the answer is the most likely token at each step, and nothing else."""
        changed = any(self.settings.get(name) for name in _ALWAYS if name != "num_beams")
        return not self.settings["do_sample"] and self.settings.get("num_beams", 1) == 1 and not changed

    def cut(self, text: str) -> str:
        """`text` up to the first of `until`."""
        ends = [text.find(stop) for stop in self.until if stop in text]
        return text[: min(ends)] if ends else text


def read_generation(given: Mapping[str, Any] | None, max_new_tokens: int) -> Generation:
    """From a task's `generation_kwargs`.

    A temperature of 0 means greedy, whatever `do_sample` says. `until` entries of a blank line are left out: lmms-eval
    writes one into every task that names none, and its own models ignore it. What transformers does not know, or what
    says how pictures are prepared, is left out too.

    Args:
        given: the task's settings.
        max_new_tokens: where the task does not say.

    Raises:
        ValueError: `until` is neither a text nor a list of them.
    """
    given = dict(given or {})
    until = given.get("until") or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, (list, tuple)) or not all(isinstance(stop, str) for stop in until):
        raise ValueError(f"until in generation_kwargs must be a text or a list of texts, got {until!r}.")
    temperature = given.get("temperature")
    sampled = bool(given.get("do_sample", temperature)) and temperature != 0
    settings: dict[str, Any] = {
        "max_new_tokens": int(given.get("max_new_tokens") or max_new_tokens),
        "do_sample": sampled,
        "num_beams": 1,
    }
    for name in (*_ALWAYS, *(_SAMPLING if sampled else ())):
        if given.get(name) is not None:
            settings[name] = given[name]
    return Generation(settings, tuple(stop for stop in until if stop and stop != _DEFAULT_STOP))
