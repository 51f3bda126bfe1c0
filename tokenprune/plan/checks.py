"""Whether stages can run on a model, how many tokens they leave by layer, and what budget holds an average."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tokenprune.interfaces.pruner import ModelDepths, Stage
from tokenprune.interfaces.signals import VISION_SIGNALS
from tokenprune.interfaces.site import NUMBERED, PLACES, SITES, read_site

if TYPE_CHECKING:
    from tokenprune.interfaces.pruner import Pruner
    from tokenprune.interfaces.signals import Signal


def check_vision_signal(signal: Signal, stage: Stage, feature: int) -> None:
    """Raise ValueError if a stage inside the vision tower asks for what the tower computes after its cut; `feature` is
    the block that makes the visual tokens, before which the last cut can be."""
    if stage.place != "vision" or signal.name not in VISION_SIGNALS or signal.layer <= stage.depth:
        return
    instead = f"'vision:{signal.layer}' or later, or at " if signal.layer < feature else ""
    raise ValueError(
        f"{stage.pruner.name} reads block {signal.layer} of the vision tower, and {stage.site!r} comes before that has "
        f"run. Cut at {instead}'input'."
    )


def check_site(site: Any, numbered: bool = True) -> str:
    """Return `site` if it is one; with `numbered=False` also "vision" and "layer", of which a method knows the depths.

    Raises:
        ValueError: it is not; the message lists the sites.
    """
    place, depth = read_site(str(site))
    if numbered and place in NUMBERED and depth is None:
        raise ValueError(f"There is no site {site!r}; sites are {', '.join(SITES)}, with a number for L and K.")
    return str(site)


def check_plan(stages: Sequence[Stage], depths: ModelDepths) -> tuple[Stage, ...]:
    """Stages in the order in which they run.

    Raises:
        ValueError: two stages at one site, a depth that the model does not have, or "pixels" together with
            another cut of the picture.
    """
    if not stages:
        raise ValueError("A method needs at least one stage.")
    ordered = tuple(sorted(stages, key=lambda stage: (PLACES.index(stage.place), stage.depth)))
    for before, after in zip(ordered, ordered[1:]):
        if before.site == after.site:
            raise ValueError(f"Two stages act at {before.site!r}; give each its own site.")
    for stage in ordered:
        if (stage.place == "pixels") != (stage.pruner.site == "pixels"):
            raise ValueError(
                f"{stage.pruner.name} acts at {stage.pruner.site!r}, not at {stage.site!r}: what is done to pixels and "
                "to tokens are different things."
            )
        if stage.pruner.needs_grid and stage is not ordered[0]:
            raise ValueError(
                f"{stage.pruner.name} works on a whole grid of tokens, so nothing may leave before it, and "
                f"{ordered[0].pruner.name} cuts at {ordered[0].site!r}."
            )
        if (
            stage.pruner.is_merging
            and stage.place == "vision"
            and depths.feature is not None
            and not depths.merges_inside
        ):
            raise ValueError(
                f"{stage.pruner.name} merges tokens, and what it merges has no place at {stage.site!r}: a visual token "
                "is a group of patches there, with a state each. Cut at 'input'. This tower takes no merged states: "
                "its adapter says so."
            )
        if stage.place == "pixels" and stage.after_block is None and not depths.resizable:
            raise ValueError(
                f"{stage.pruner.name} gives the vision tower smaller pictures, and this family's tower takes pictures "
                "of one size only, or its crops follow from the size: its adapter says so."
            )
        if stage.after_block is not None:
            if depths.feature is None:
                where = "inside the vision tower" if stage.place == "vision" else "before the vision tower"
                raise ValueError(
                    f"{stage.pruner.name} cuts {where} (at {stage.site!r}), and this family's tower cannot be cut: its "
                    "adapter says so."
                )
            if stage.after_block >= depths.feature:
                raise ValueError(
                    f"{stage.site!r} would cut behind the block that makes the visual tokens; this tower can be cut "
                    f"after blocks 0 to {depths.feature - 1}."
                )
        if stage.place == "layer" and not depths.first_cut <= stage.depth < depths.decoder:
            raise ValueError(
                f"{stage.site!r} is not a place to cut in this model: K goes from {depths.first_cut} to "
                f"{depths.decoder - 1} (cut before the first layer with the site 'input'). {_why_not(stage, depths)}"
            )
    _check_one_policy(ordered)
    shrinks = ordered[0].place == "pixels" and ordered[0].after_block is None
    if shrinks and any(stage.place == "vision" for stage in ordered):
        raise ValueError("A picture that 'pixels' shrank cannot be cut again inside the vision tower.")
    return ordered


def _why_not(stage: Stage, depths: ModelDepths) -> str:
    """Why a stage cannot cut before its layer."""
    if stage.depth >= depths.decoder:
        return f"The decoder has {depths.decoder} layers."
    if stage.depth < 1:
        return "Before the first layer no layer has run that a stage at 'layer' could read."
    return (
        f"Layers before {depths.first_cut} get features of the vision tower added to their visual tokens, at places of "
        "the whole row, so none may leave between them."
    )


def _check_one_policy(stages: Sequence[Stage]) -> None:
    """Raise ValueError if two stages before the decoder's layers want different positions for what stays: what they
    drop leaves the prompt's rows in one cut."""
    cuts = [s for s in stages if s.place == "input" or (s.place != "layer" and s.after_block is not None)]
    told = [stage for stage in cuts if stage.pruner.positions is not None]
    other = next((stage for stage in told if stage.pruner.positions != told[0].pruner.positions), None)
    if other is not None:
        first, second = told[0].pruner, other.pruner
        raise ValueError(
            f"{first.name} has positions={first.positions!r} and {second.name} positions={second.positions!r}, and "
            f"what both drop before the decoder leaves the rows in one cut. Give both the same, like "
            f"{first.name}(positions={second.positions})."
        )


def visual_lengths(stages: Sequence[Stage], num_tokens: int, layers: int) -> list[int]:
    """Visual tokens of one image in each decoder layer, if every stage keeps exactly its budget."""
    count, lengths = num_tokens, []
    cuts = {stage.depth: stage for stage in stages if stage.place == "layer"}
    for stage in stages:
        if stage.place != "layer":
            count = min(count, stage.pruner.kept_tokens(num_tokens, stage.budget))
    for layer in range(layers):
        if layer in cuts:
            count = min(count, cuts[layer].pruner.kept_tokens(num_tokens, cuts[layer].budget))
        lengths.append(count)
    return lengths


def solve_average(
    name: str, mean: Callable[[int], float], average: float, num_tokens: int, as_share: bool = False
) -> int:
    """The `keep` (tokens after the last cut) with which a method has `average` visual tokens on average over all
    layers.

    Takes the count whose mean over the decoder's layers is nearest to `average`; among equals the smaller.

    Args:
        name: of the method, for the message.
        mean: from keep to the mean over the layers; grows with keep.
        num_tokens: N.
        as_share: whether the user asked for a share of the tokens, for the message.

    Raises:
        ValueError: the method cannot reach it at its layers; the message says what it can.
    """
    least, most = mean(1), mean(num_tokens)
    if not least - 0.5 <= average <= most:
        wanted, reach = f"{average:g} tokens of {num_tokens}", f"from {least:.1f} to {most:.1f}"
        if as_share:  # then num_tokens is a scale of our own, which no picture has
            wanted = f"{average / num_tokens:.4g} of the visual tokens"
            reach = f"from {least / num_tokens:.3f} to {most / num_tokens:.3f} of them"
        raise ValueError(
            f"{name} cannot hold an average of {wanted}: with its layers the average over all layers goes {reach}. Cut "
            "at lower layers, or add a stage at 'input'."
        )
    low, high = 1, num_tokens
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if mean(middle) <= average else (low, middle)
    return min((low, high), key=lambda keep: (abs(mean(keep) - average), keep))


def with_positions(pruner: Pruner, positions: str) -> Pruner:
    """A copy of `pruner` under that position policy."""
    return dataclasses.replace(pruner, positions=positions)  # type: ignore[type-var]
