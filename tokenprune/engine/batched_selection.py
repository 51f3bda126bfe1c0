"""From a stage and the tokens that are there to a selection: groups images of one shape, and asks the method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.interfaces.pruner import Stage
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
        selection = pruner.select(view).validate(len(items), view.num_tokens, least)
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
            for name in pruner.hints
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
