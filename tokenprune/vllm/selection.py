"""The worker's side: signals of a run of the tower, and what the engine's methods keep of each picture."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenprune.engine.batched_selection import (
    Part,
    SelectionRequest,
    SelectionResult,
    choose,
    exact_count,
    join_parts,
    part_key,
    parts_of,
)
from tokenprune.engine.tower_pass import TowerPass
from tokenprune.interfaces.pruner import Stage
from tokenprune.interfaces.signals import ATTENTION_BY_HEAD, PIXEL_SIGNALS, TOWER_KEYS, TOWER_STATES, Signal, TowerInfo
from tokenprune.interfaces.vision_tower import VisionTower
from tokenprune.interfaces.visual import Visual
from tokenprune.state.tower_recording import Recording
from tokenprune.vllm.settings import Setting

LOGGER = logging.getLogger(__name__)


class Row(NamedTuple):
    """What the front end says of one visual, `[4]` int64 beside its pixels.

    Attributes:
        length: placeholders that it has in the prompt.
        budget: tokens that the method is asked to keep.
        method: number of the engine's method.
        whole: placeholders that it would have.
    """

    length: int
    budget: int
    method: int
    whole: int


class Kept(NamedTuple):
    """What stays of one visual.

    Attributes:
        embeddings: `[P, D]`, one for each of its placeholders.
        tokens: `[P]` int64, which of its tokens they are; None where it is whole.
    """

    embeddings: Tensor
    tokens: Tensor | None


@dataclass
class _Reader:
    """As much of an adapter as a run of the tower is read with."""

    vision: VisionTower
    behind_tower: bool = False


class Selector:
    """Asks the methods of an engine about the pictures of one worker.

    Args:
        setting: the engine's methods.
        tower: its vision tower.
    """

    def __init__(self, setting: Setting, tower: VisionTower) -> None:
        self.setting, self.tower = setting, tower
        wanted = [signal for stage in setting.stages for signal in stage.signals(tower.facts)]
        self._signals = tuple(dict.fromkeys(wanted))
        self._run: TowerPass | None = None
        of_blocks = [one for one in self._signals if one.name not in (*PIXEL_SIGNALS, TOWER_STATES)]
        for block in sorted({signal.layer for signal in of_blocks}):
            names = [signal for signal in of_blocks if signal.layer == block]
            tower.hook_attention(block, functools.partial(self._record, names))
        for signal in self._signals:
            if signal.name == TOWER_STATES:
                tower.hook_states(signal.layer, functools.partial(self._record_states, signal))

    def _record(self, signals: Sequence[Signal], read: Any) -> None:
        if self._run is not None:
            self._run.record(signals, read)

    def _record_states(self, signal: Signal, hidden: Tensor) -> None:
        if self._run is not None:
            self._run.record_states(signal, hidden)

    def watch(
        self, visuals: Sequence[Visual], pixels: Sequence[Tensor], run_tower: Callable[[], Any]
    ) -> tuple[Any, Recording]:
        """Run the tower over visuals, and what was read of it.

        Args:
            pixels: of each visual.
            run_tower: what makes their features.
        """
        recording = Recording(visuals, pixels[0], pixels)
        run = TowerPass(recording, _Reader(self.tower), None)  # type: ignore[arg-type]
        self._run = run if self._signals else None
        try:
            for signal in self._signals:
                if signal.name in PIXEL_SIGNALS:
                    run.read_pixels(signal, pixels)
            output = run_tower()
            if self._signals:
                run.finish()
        finally:
            self._run = None
        return output, recording

    def select(self, rows: Sequence[Row], features: Sequence[Tensor], recording: Recording, width: int) -> list[Kept]:
        """What stays of each visual.

        Args:
            features: `[P, D']` of each, at all of its placeholders; further columns behind the first `width` belong to
                a token and go where it goes.
        """
        found = [Kept(own, None) for own in features]
        for number, stage in enumerate(self.setting.stages):
            mine = [index for index, row in enumerate(rows) if row.method == number]
            for index, kept in self._select(stage, mine, rows, features, recording, width):
                found[index] = kept
        for index, (row, kept) in enumerate(zip(rows, found)):
            if kept.embeddings.shape[0] != row.length:
                LOGGER.error(
                    "%s kept %d tokens of a picture that has %d placeholders: it does not keep the number that it says "
                    "beforehand (exact_tokens). Evenly spread tokens of this picture stay in their place.",
                    self.setting.names[row.method], kept.embeddings.shape[0], row.length,
                )  # fmt: skip
                own = self._tokens(recording.visuals[index], features[index])
                tokens = spread(own.shape[0], row.length).to(own.device)
                found[index] = Kept(own[tokens], tokens)
        return found

    def try_all(self, features: Sequence[Tensor], recording: Recording, width: int) -> None:
        """Ask every method about visuals and drop its answers: while memory is measured, so that what methods need is
        in it, and so that one that fails on this device fails when the engine starts."""
        for number, stage in enumerate(self.setting.stages):
            # of a batch that is measured all are alike; as many at a time as requests may bring together
            counts = [visual.num_tokens for visual in recording.visuals]
            budgets = [min(stage.budget.tokens(count), max(1, count // 2)) for count in counts]
            rows = [Row(0, budget, number, 0) for budget in budgets]
            self._select(stage, range(len(rows)), rows, features, recording, width, choose_at_start)

    @staticmethod
    def _tokens(visual: Visual, features: Tensor) -> Tensor:
        """`[N, D']` of `[P, D']`: separators left out."""
        return features if visual.offsets is None else features[visual.offsets.to(features.device)]

    def _select(
        self,
        stage: Stage,
        mine: Sequence[int],
        rows: Sequence[Row],
        features: Sequence[Tensor],
        recording: Recording,
        width: int,
        ask: Callable[..., list[Any]] | None = None,
    ) -> list[tuple[int, Kept]]:
        tokens: dict[int, Tensor] = {}
        asked: list[SelectionRequest] = []
        for index in mine:
            visual = recording.visuals[index]
            if rows[index].budget >= visual.num_tokens:
                continue
            tokens[index] = self._tokens(visual, features[index])
            asked += self._ask(stage, index, rows[index].budget, tokens[index][:, :width], recording)
        answers = (ask or choose_always)(stage, self.tower.facts, asked)
        parts: dict[int, list[Any]] = {}
        for item, answer in zip(asked, answers):
            parts.setdefault(item.owner, []).append((item, answer))
        found = []
        for index, of_visual in parts.items():
            own = tokens[index]
            chosen = join_parts(stage, of_visual, {}, own.device)
            if chosen is None:
                continue
            kept = own[chosen.kept]
            if chosen.features is not None:
                kept = torch.cat([chosen.features.to(own.dtype), kept[:, width:]], dim=1)
            found.append((index, Kept(kept, chosen.kept)))
        return found

    @staticmethod
    def _ask(stage: Stage, index: int, budget: int, own: Tensor, recording: Recording) -> list[SelectionRequest]:
        visual = recording.visuals[index]

        def one(part: Part) -> SelectionRequest:
            begin, end = part.begin, part.begin + part.count
            return SelectionRequest(
                owner=index,
                rasters=part.rasters,
                count=part.count,
                budget=part.budget,
                tokens=None,
                features=lambda: own[begin:end],
                signal=lambda signal: recording.signal(signal, index)[begin:end],
                # a picture is encoded once for all places that it has in prompts, so it counts as the first
                key=lambda: part_key(recording.pixel_key(index), 0, begin),
                hint=_no_hint,
                carry={},
                first=begin,
                total=visual.num_tokens,
            )

        return [one(part) for part in parts_of(stage, visual.rasters, visual.num_tokens, budget, cut_before=False)]


def choose_at_start(stage: Stage, tower: TowerInfo, asked: Sequence[SelectionRequest]) -> list[Any]:
    """What a method answers; an error is one."""
    return choose(stage, tower, asked)[0]


def choose_always(stage: Stage, tower: TowerInfo, asked: Sequence[SelectionRequest]) -> list[Any]:
    """What a method answers. vLLM cannot refuse a request any more where its worker has begun, and an error there ends
    the engine for all others; so a picture that a method cannot choose in (features that are no finite numbers) keeps
    as many evenly spread tokens, and the log says so."""
    try:
        return choose(stage, tower, asked)[0]
    except ValueError as error:
        if len(asked) > 1:
            return [answer for item in asked for answer in choose_always(stage, tower, [item])]
        (item,) = asked
        LOGGER.error("%s: evenly spread tokens of one picture stay, because: %s", stage.pruner.name, error)
        count = stage.pruner.exact_tokens(item.rasters, item.budget)
        return [SelectionResult(spread(item.count, count).to(item.features().device), None, {})]


def spread(count: int, kept: int) -> Tensor:
    """`[kept]` int64 of `count`, at equal distances."""
    return torch.arange(kept) * count // kept


def _no_hint(name: str) -> Any:
    raise ValueError(f"A request to vLLM has no place for the hint {name!r}.")


def try_methods(setting: Setting, tower: TowerInfo, visual: Visual, width: int) -> None:
    """Ask each method about a made-up picture, so that one that keeps another number than it says is met when an engine
    starts and not when it serves.

    Raises:
        ValueError: a method fails, or keeps another number.
    """
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    count = visual.num_tokens
    more = {TOWER_STATES: (tower.hidden_size,), TOWER_KEYS: (tower.hidden_size,), ATTENTION_BY_HEAD: (tower.num_heads,)}
    recording = Recording([visual], values(1), [values(8)])
    for name, keep, stage in zip(setting.names, setting.keeps, setting.stages):
        recording.signals = {
            signal: [values(sum(r * c for r, c in visual.tower_grids), *more.get(signal.name, ()))]
            for signal in stage.signals(tower)
        }
        for budget in dict.fromkeys((stage.budget.tokens(count), max(1, count // 3), 1)):
            if budget >= count:
                continue
            asked = Selector._ask(stage, 0, budget, values(count, width), recording)
            answers, _ = choose(stage, tower, asked)
            chosen = join_parts(stage, list(zip(asked, answers)), {}, torch.device("cpu"))
            kept = count if chosen is None else chosen.kept.shape[0]
            if kept != exact_count(stage, visual.rasters, budget):
                raise ValueError(
                    f"{name}@{keep} kept {kept} of {count} tokens where it was asked for {budget}, and vLLM must know "
                    "the number before a picture is encoded. Use a method that keeps its budget."
                )
