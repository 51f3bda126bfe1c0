"""What the caller knows of the pictures of a prompt (`Handle.set_hints`), by thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.pruner import Stage
from tokenprune.state.forward_call import Calls


class Hints:
    """Finds the hint of a visual.

    Args:
        adapter: the model's family.
        stages: whose methods ask for hints.
        calls: the calls at work.
    """

    def __init__(self, adapter: Adapter, stages: Sequence[Stage], calls: Calls) -> None:
        self._adapter, self._stages, self._calls = adapter, stages, calls
        self._of_all_threads: dict[str, list[Any]] = {}  # for threads that gave none of their own

    def set(self, values: dict[str, list[Any]], for_all_threads: bool) -> None:
        """Keep hints by name, one value a visual in batch order, for this thread or for all that set none."""
        self._calls.hints.update(values)
        if for_all_threads:
            self._of_all_threads.update(values)

    def clear(self) -> None:
        """Forget what this thread and those that set none were told."""
        self._calls.hints.clear()
        self._of_all_threads.clear()

    def of_visual(self, name: str, place: int) -> object:
        """The hint of the visual at `place` in the batch, row by row and left to right.

        Raises:
            ValueError: none was given, or too few.
        """
        values = self._given(name)
        if values is None:
            method = next((stage.pruner for stage in self._stages if name in stage.pruner.needed_hints), None)
            called, source = ("", "") if method is None else (method.name, method.hint_sources.get(name, ""))
            raise ValueError(
                f"Method {called!r} needs {name!r} of each image or video: call handle.set_hints({name}=[...]) first."
                f"{' ' if source else ''}{source}"
            )
        if place >= len(values):
            raise ValueError(f"set_hints({name}=...) gave {len(values)} value(s) for {place + 1} images or more.")
        return values[place]

    def of_tower(
        self, name: str, kind: str, place: int, count: int, pictures: Sequence[Sequence[int]] | None = None
    ) -> object:
        """The hint of a visual that the tower counts apart from those of other kinds: number `place` of `count`, or one
        of the tiles that make one of `pictures`.

        Raises:
            ValueError: as `of_visual`, or pictures and videos stand in one batch and cannot be told apart.
        """
        prompt = None if self._calls.now is None else self._calls.now.prompt
        if prompt is not None:
            layout = prompt.layout
            in_batch = dict.fromkeys((span.visual.kind, order) for span, order in zip(layout.spans, layout.order))
            return self.of_visual(name, list(in_batch).index((kind, layout.order_of(kind, place))))
        if pictures is not None:
            place = next(number for number, tiles in enumerate(pictures) if place in tiles)
            count = len(pictures)
        given = len(self._given(name) or ())
        if len(self._adapter.features) > 1 and given not in (0, count):
            raise ValueError(
                f"set_hints({name}=...) gave {given} values, and the vision tower runs on {count} visuals of kind "
                f"{kind!r} before the prompt is known, so it cannot tell whose they are. Put pictures and videos into "
                "different batches, or cut at 'input'."
            )
        return self.of_visual(name, place)

    def _given(self, name: str) -> list[Any] | None:
        return self._calls.hints.get(name, self._of_all_threads.get(name))
