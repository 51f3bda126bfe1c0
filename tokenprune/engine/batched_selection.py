"""From a stage and the tokens that are there to a selection: splits visuals into what a method ranks at a time, groups
images of one shape, asks the method, and puts its answers together by visual.

Knows no model and no engine: whoever has the tokens of visuals, their grids and their signals can ask (the hooks on
transformers' models do, and vLLM's workers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenprune.interfaces.budget import split_budget
from tokenprune.interfaces.pruner import Pruner, Stage
from tokenprune.interfaces.selection import Selection
from tokenprune.interfaces.signals import Signal, TowerInfo
from tokenprune.interfaces.view import View
from tokenprune.interfaces.visual import Raster


@dataclass
class SelectionRequest:
    """One image, video, crop or frame that a method shall choose in.

    Attributes:
        owner: whose it is (index into the caller's list), to put answers together.
        rasters: its grids.
        count: tokens that are there.
        budget: how many shall stay.
        tokens: `[count]` int64, which of its tokens are there; None for all.
        features: reads `[count, D]`.
        signal: reads a signal, `[count]` or, for those of a whole prompt, `[]`.
        key: reads the image's number for random methods, `[]` int64.
        hint: reads a hint by name.
        carry: name -> `[count]`.
        first: where, among the tokens of its visual before any cut, those of its rasters begin.
        total: how many tokens the visual had.
    """

    owner: int
    rasters: tuple[Raster, ...]
    count: int
    budget: int
    tokens: Tensor | None
    features: Callable[[], Tensor]
    signal: Callable[[Signal], Tensor]
    key: Callable[[], Tensor]
    hint: Callable[[str], Any]
    carry: Mapping[str, Tensor]
    first: int
    total: int

    def token_hint(self, name: str, device: torch.device) -> Tensor:
        """`[count]` fp32: of a hint with a number for each token of the visual, those of the tokens that are there."""
        values = torch.as_tensor(self.hint(name), dtype=torch.float32, device=device).flatten()
        if len(values) != self.total:
            raise ValueError(
                f"set_hints({name}=...) must give one number for each of a visual's {self.total} tokens, got "
                f"{len(values)}."
            )
        if self.tokens is None:
            return values[self.first : self.first + self.count]
        return values[self.first + self.tokens.to(device)]

    def only(self, places: Tensor, budget: int) -> SelectionRequest:
        """The same about some of its tokens, `places` `[n]` int64 among those that are there."""
        count = places.shape[0]

        def signal(wanted: Signal) -> Tensor:
            values = self.signal(wanted)
            return values if values.dim() == 0 else values[places.to(values.device)]

        return replace(
            self,
            count=count,
            budget=min(budget, count),
            tokens=places if self.tokens is None else self.tokens[places.to(self.tokens.device)],
            features=lambda: self.features()[places],
            signal=signal,
            carry={name: values[places.to(values.device)] for name, values in self.carry.items()},
        )


@dataclass
class SelectionResult:
    """What was chosen in one `SelectionRequest`.

    Attributes:
        indices: `[k]` int64, increasing, among the tokens that were there.
        features: `[k, D]` in place of the tokens' own, or None.
        carry: name -> `[count]`, values of all tokens that were there.
        sizes: `[k]` fp32, how many tokens each kept one stands for; None: itself alone, or the method does not say.
        merged: `[]`, how many tokens went into kept ones; None: none.
    """

    indices: Tensor
    features: Tensor | None
    carry: dict[str, Tensor]
    sizes: Tensor | None = None
    merged: Tensor | None = None


class Part(NamedTuple):
    """Tokens of one visual that a method ranks together.

    Attributes:
        rasters: their grids; `start` counts from the part's own first token where it is a single raster of several.
        begin: the first of them, among the tokens of the visual that are there.
        count: how many they are.
        budget: how many of them shall stay.
    """

    rasters: tuple[Raster, ...]
    begin: int
    count: int
    budget: int


@dataclass
class VisualSelection:
    """What was chosen in one visual, all its parts together.

    Attributes:
        kept: `[k]` int64, increasing, among the tokens that were there.
        features: `[k, D]` in place of the tokens' own, or None.
        carry: name -> `[count]`, values of all tokens that were there.
        sizes: `[k]` fp32, how many tokens each weighs as in attention; None where each stands for itself.
        merged: `[]` each, how many tokens went into kept ones, by part.
    """

    kept: Tensor
    features: Tensor | None
    carry: dict[str, Tensor]
    sizes: Tensor | None
    merged: list[Tensor]


def parts_of(
    stage: Stage, rasters: Sequence[Raster], count: int, budget: int, cut_before: bool, together: bool = False
) -> list[Part]:
    """What a stage's method ranks at a time of one visual, by its scope.

    Args:
        count: tokens that are there.
        budget: how many of the visual's tokens shall stay.
        cut_before: whether some have left: what is left is ranked together, whatever the scope.
        together: the same for another reason.

    Raises:
        ValueError: the method works on a grid and the tokens stand in none that is known.
    """
    check_placed(stage, rasters)
    scope = stage.pruner.scope or stage.pruner.default_scope
    if together or cut_before or scope == "visual" or len(rasters) == 1:
        return [Part(tuple(rasters), 0, count, min(budget, count))]
    budgets = split_budget(budget, [raster.num_tokens for raster in rasters])
    return [
        Part((Raster(raster.grid, 0, raster.kind),), raster.start, raster.num_tokens, min(share, raster.num_tokens))
        for raster, share in zip(rasters, budgets)
    ]


def exact_count(stage: Stage, rasters: Sequence[Raster], budget: int) -> int:
    """How many tokens of a visual that is whole stay, for a method that is not adaptive: at most `budget`, as some can
    keep no other numbers than those of a raster's cells."""
    count = sum(raster.num_tokens for raster in rasters)
    parts = parts_of(stage, rasters, count, budget, cut_before=False)
    return sum(
        part.budget if part.budget in (0, part.count) else stage.pruner.exact_tokens(part.rasters, part.budget)
        for part in parts
    )


def check_placed(stage: Stage, rasters: Sequence[Raster]) -> None:
    """Raise ValueError where a method works on a grid and the tokens stand in none that is known."""
    if stage.pruner.needs_grid and any(raster.kind == "unplaced" for raster in rasters):
        count = sum(raster.num_tokens for raster in rasters)
        raise ValueError(
            f"{stage.pruner.name} works on a grid of tokens, and the {count} tokens of this visual stand in none that "
            "is known: neither the call nor the pictures' sizes say rows and columns that make so many. Use a method "
            "that needs no grid (random, divprune)."
        )


def _checked(pruner: Pruner, selection: Any) -> Selection:
    """Raise TypeError unless a method returned what it has to: methods of users' own go through here."""
    if not isinstance(selection, Selection):
        raise TypeError(
            f"{type(pruner).__name__}.select must return a tokenprune.Selection, and it returned a "
            f"{type(selection).__name__}: write Selection(indices), indices being [images, k] int64, increasing."
        )
    return selection


def part_key(pixel_key: Tensor, image: int, begin: int) -> Tensor:
    """`[]` int64, a part's number for random methods: of its visual's pixels, of the visual's place among those of its
    prompt, and of where the part begins."""
    return pixel_key + (image * 0x9E3779B1 + begin)


def join_parts(
    stage: Stage,
    parts: Sequence[tuple[SelectionRequest, SelectionResult | None]],
    before: Mapping[str, Tensor],
    device: torch.device,
) -> VisualSelection | None:
    """Answers about the parts of one visual, together; None where all of it stays as it is.

    Args:
        before: what an earlier stage left with the visual's tokens.
    """
    if all(answer is None for _, answer in parts):
        return None
    chosen, features, start = [], [], 0
    merges = any(answer is not None and answer.features is not None for _, answer in parts)
    for item, answer in parts:
        indices = (torch.arange(item.count) if answer is None else answer.indices).to(device)
        chosen.append(start + indices)
        if merges:
            own = None if answer is None else answer.features
            features.append(item.features()[indices] if own is None else own)
        start += item.count
    return VisualSelection(
        kept=torch.cat(chosen),
        features=torch.cat(features) if merges else None,
        carry=joined_carry(before, [answer for _, answer in parts]),
        sizes=joined_sizes(stage, [(item.count, answer) for item, answer in parts]),
        merged=[answer.merged for _, answer in parts if answer is not None and answer.merged is not None],
    )


def choose(
    stage: Stage, tower: TowerInfo, asked: Sequence[SelectionRequest]
) -> tuple[list[SelectionResult | None], int]:
    """Ask the stage's method about each of `asked`, those of one shape together.

    Returns:
        An answer each, None where all stay; and the method's own matrix products.
    """
    pruner = stage.pruner
    answers: list[SelectionResult | None] = [None] * len(asked)
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, item in enumerate(asked):
        if item.budget >= item.count and not pruner.is_adaptive:
            continue
        if item.budget == 0 and not pruner.is_adaptive:
            answers[index] = SelectionResult(torch.empty(0, dtype=torch.int64), None, {})
            continue
        shape = tuple((raster.grid, raster.kind) for raster in item.rasters)
        key = (shape, item.count, item.budget, item.tokens is None, tuple(item.carry))
        groups.setdefault(key, []).append(index)
    flops = 0
    for members in groups.values():
        items = [asked[member] for member in members]
        view = make_view(stage, tower, items)
        least = 0 if stage.place == "layer" else 1
        selection = _checked(pruner, pruner.select(view)).validate(len(items), view.num_tokens, least)
        width = view.features.shape[-1]
        flops += pruner.flops(len(items), view.num_tokens, width, selection.indices.shape[1], tower)
        if pruner.biases_keys and selection.features is not None and selection.sizes is None:
            raise ValueError(
                f"{pruner.name} merged tokens and does not say how many each kept one stands for (Selection.sizes), so "
                "key_bias has nothing to weigh them by. Leave key_bias out."
            )
        for row, member in enumerate(members):
            answers[member] = _answer(selection, row, view.num_tokens)
    return answers, flops


def make_view(stage: Stage, tower: TowerInfo, items: Sequence[SelectionRequest]) -> View:
    """The view of items of one shape."""
    pruner, first = stage.pruner, items[0]
    parts = [item.features() for item in items]
    features = parts[0][None] if len(parts) == 1 else torch.stack(parts)  # [M, N, D]; copies already
    device = features.device
    return View(
        features=features,
        rasters=first.rasters,
        budget=first.budget,
        tower=tower,
        signals={
            signal: torch.stack([item.signal(signal) for item in items]).to(device) for signal in stage.signals(tower)
        },
        hints={
            name: [item.token_hint(name, device) if name in pruner.token_hints else item.hint(name) for item in items]
            for name in pruner.needed_hints
        },
        make_keys=lambda: torch.stack([item.key() for item in items]).to(device),
        site=stage.site,
        tokens=None if first.tokens is None else torch.stack([_present(item.tokens) for item in items]),
        carry={name: torch.stack([item.carry[name] for item in items]) for name in first.carry},
    )


def _present(tokens: Tensor | None) -> Tensor:
    if tokens is None:
        raise ValueError("Images of one group must have all been cut, or none of them.")
    return tokens


def _answer(selection: Selection, row: int, num_tokens: int) -> SelectionResult | None:
    count = selection.indices.shape[1] if selection.counts is None else selection.counts[row]
    carry = {name: values[row] for name, values in (selection.carry or {}).items()}
    if count == num_tokens and selection.features is None and not carry:
        return None
    features = None if selection.features is None else selection.features[row, :count]
    sizes = None if selection.sizes is None else selection.sizes[row, :count].float()
    if selection.merged is not None:
        merged = selection.merged[row]
    else:
        merged = None if sizes is None else sizes.sum() - count
    return SelectionResult(selection.indices[row, :count], features, carry, sizes, merged)


def joined_sizes(stage: Stage, answers: Sequence[tuple[int, SelectionResult | None]]) -> Tensor | None:
    """`[n]` fp32: how many tokens the kept ones of one visual, answered in parts, shall weigh as in attention; None
    where each stands for itself.

    Args:
        answers: for each part how many tokens were there, and the answer.
    """
    given = [answer.sizes for _, answer in answers if answer is not None and answer.sizes is not None]
    if not given or not stage.pruner.biases_keys:
        return None
    parts = []
    for count, answer in answers:
        if answer is not None and answer.sizes is not None:
            parts.append(answer.sizes)
        else:
            parts.append(given[0].new_ones(count if answer is None else answer.indices.shape[0]))
    return torch.cat(parts)


def joined_carry(before: Mapping[str, Tensor], answers: Sequence[SelectionResult | None]) -> dict[str, Tensor]:
    """What goes on with the tokens of one visual: what stood there before this stage, and what all its parts left."""
    given = [{} if answer is None else answer.carry for answer in answers]
    names = set(given[0]).intersection(*given)
    return {**before, **{name: torch.cat([carry[name] for carry in given]) for name in names}}
