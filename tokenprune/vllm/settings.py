"""What an engine and a request say: "divprune@64", "divprune@64 | uniform | vtc_cls@0.25", "uniform@32", "@32".

One line of text, because vLLM hashes all of `mm_processor_kwargs` with each picture. An engine names its methods, the
first is the default; a request picks one of them, a budget, or both, and "@1.0" keeps all tokens. Imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenprune.engine.batched_selection import exact_count
from tokenprune.interfaces.budget import Budget, read_budget
from tokenprune.interfaces.pruner import ModelDepths, Pruner, Stage
from tokenprune.interfaces.signals import PIXEL_SIGNALS, VISION_SIGNALS, TowerInfo
from tokenprune.interfaces.visual import Visual
from tokenprune.plan.checks import with_positions
from tokenprune.plan.expression import split_name, split_outside
from tokenprune.plan.parse import parse_method
from tokenprune.registry import near

KEY = "tokenprune"
"""The name among `mm_processor_kwargs`."""
WHOLE = "@1.0"
"""A request that keeps all tokens."""


@dataclass(frozen=True)
class ModelFacts:
    """What methods are held against.

    Attributes:
        tower: facts on the vision tower.
        signals: names of those that it gives.
        blocks: how many of its blocks run: vLLM builds none behind the one whose output is used.
        decoder: decoder layers.
        mrope: whether positions are 3-D ids, which kept tokens keep; else vLLM counts the tokens that are there.
        one_size: whether all pictures have one number of tokens.
    """

    tower: TowerInfo
    signals: tuple[str, ...]
    blocks: int
    decoder: int
    mrope: bool = False
    one_size: bool = True

    @property
    def depths(self) -> ModelDepths:
        """What stages are planned for: nothing is cut inside the tower or the decoder."""
        return ModelDepths(vision=self.tower.num_layers, feature=None, decoder=self.decoder, one_size=self.one_size)


@dataclass(frozen=True)
class Choice:
    """What holds for the pictures of one request.

    Attributes:
        method: number of the engine's method.
        keep: its budget.
    """

    method: int
    keep: int | float

    def tokens(self, visual: Visual) -> int:
        """How many of a visual's tokens the method is asked to keep."""
        return Budget(self.keep).tokens(visual.num_tokens)


@dataclass(frozen=True)
class Setting:
    """The methods of one engine, read and checked.

    Attributes:
        names: each as it was written, without its budget.
        keeps: the budget of each.
        stages: the one cut of each.
    """

    names: tuple[str, ...]
    keeps: tuple[int | float, ...]
    stages: tuple[Stage, ...]

    def choice(self, request: Any) -> Choice:
        """What a request asks for.

        Args:
            request: its text, or None for the engine's default.

        Raises:
            ValueError: it is no text, names another method, or its budget is none; the message is for its sender.
        """
        if request is None:
            return Choice(0, self.keeps[0])
        if not isinstance(request, str) or not request.strip():
            raise ValueError(
                f'{KEY} in a request is a text with a method, a budget or both, like "{self.names[-1]}@32" or "@32", '
                f"got {request!r}."
            )
        head, at, budget = request.strip().rpartition("@") if "@" in request else (request.strip(), "", "")
        number = self._number(head.strip()) if head.strip() else 0
        return Choice(number, _budget(budget, request) if at else self.keeps[number])

    def summary(self) -> str:
        """One line for the log of an engine: that it prunes, and by what."""
        first, *others = (self.text(Choice(number, keep)) for number, keep in enumerate(self.keeps))
        also = f", {', '.join(others)} on request" if others else ""
        return f"{KEY} prunes the pictures of this engine: {first} by default{also}."

    def text(self, choice: Choice) -> str:
        """One spelling of a choice: it is hashed, and hashes are shared by requests that mean the same."""
        return f"{self.names[choice.method]}@{choice.keep}"

    def length(self, choice: Choice, visual: Visual) -> int:
        """Placeholders that a visual gets: known before its picture is encoded, and exact."""
        kept = choice.tokens(visual)
        if kept >= visual.num_tokens:
            return visual.length
        return exact_count(self.stages[choice.method], visual.rasters, kept)

    def _number(self, name: str) -> int:
        if name in self.names:
            return self.names.index(name)
        bare = [split_name(one)[0] for one in self.names]
        if bare.count(name) == 1:
            return bare.index(name)
        known = ", ".join(self.names)
        if bare.count(name) > 1:
            raise ValueError(f"This engine has several methods called {name}: {known}. Write one of them in full.")
        raise ValueError(
            f"This engine was not started with the method {name!r}.{near(name, self.names)} It has {known}; others "
            f'need an engine of their own, and "{WHOLE}" keeps all tokens.'
        )


def engine_text(kwargs: Mapping[str, Any] | None) -> str | None:
    """The text among an engine's `mm_processor_kwargs`; None if there is none.

    Raises:
        ValueError: it is no text.
    """
    found = (kwargs or {}).get(KEY)
    if found is not None and (not isinstance(found, str) or not found.strip()):
        raise ValueError(f'{KEY} in mm_processor_kwargs is a text like "divprune@64", got {found!r}.')
    return found


def read_setting(text: str, facts: ModelFacts) -> Setting:
    """The methods of an engine, for a model.

    Raises:
        ValueError: an unknown method or option, a budget that is none, or a method that cannot run inside vLLM; the
            message says why, and what to do.
    """
    names: list[str] = []
    keeps: list[int | float] = []
    stages: list[Stage] = []
    for part in split_outside(text, "|"):
        if len(split_outside(part, "+")) > 1:
            raise ValueError(
                f"{part!r} names several things at once; inside vLLM one method cuts before the decoder. Methods that "
                'requests choose from are separated by "|".'
            )
        name, at, budget = part.rpartition("@") if "@" in part else (part, "", "")
        name = name.strip()
        if not at and not keeps:
            raise ValueError(
                f"Say how many visual tokens {part or 'a method'} shall keep, like {part or 'divprune'}@64."
            )
        keep = _budget(budget, part) if at else keeps[0]
        if name in names:
            raise ValueError(f"{KEY} names the method {name} twice: {text!r}.")
        stages.append(_stage(name, keep, facts))
        names.append(name)
        keeps.append(keep)
    return Setting(tuple(names), tuple(keeps), tuple(stages))


def _budget(text: str, where: str) -> int | float:
    read = read_budget(text)
    if isinstance(read, str):
        raise ValueError(
            f"{where!r} asks for a mean over the decoder's layers, and vLLM's layers are not cut: give the number of "
            "tokens, like @64, or their fraction, like @0.25."
        )
    return Budget(read).keep


def _stage(name: str, keep: int | float, facts: ModelFacts) -> Stage:
    try:
        spec = parse_method(name, keep=keep)
    except (KeyError, TypeError) as error:
        # what a server answers with 400 is a ValueError
        raise ValueError(str(error)) from None
    if spec.interventions or len(spec.entries) != 1:
        raise ValueError(
            f"{name} is not one method that prunes: inside vLLM one method cuts before the decoder, and attention is "
            "not changed. Name one method, like divprune@64."
        )
    pruner = spec.entries[0].pruner
    stages = pruner.stages(Budget(keep), facts.depths)
    _check_place(pruner, stages)
    _check_method(pruner, stages[0])
    wanted = "keep" if facts.mrope else "compact"
    if facts.mrope and pruner.positions == "compact":
        raise ValueError(
            f"{name} renumbers what stays, and positions are 3-D ids in this model, which kept tokens keep. Leave "
            "positions out."
        )
    if not facts.mrope and (pruner.positions or pruner.own_positions) != wanted:
        raise ValueError(
            f"{pruner.name} leaves kept tokens their original positions, and vLLM numbers the tokens that are there. "
            f"Write {_with_option(name, 'positions=compact')} to have it without gaps."
        )
    stage = Stage("input", with_positions(pruner, wanted), stages[0].budget)
    _check_signals(stage, facts)
    return stage


def _check_place(pruner: Pruner, stages: tuple[Stage, ...]) -> None:
    sites = [stage.site for stage in stages]
    if sites == ["input"]:
        return
    if "pixels" in [stage.place for stage in stages]:
        shrinks = stages[0].after_block is None
        why = (
            "vLLM's processors resize pictures themselves and its towers take no other sizes. On the Qwen-VL classes "
            'ask for fewer pixels there, like {"max_pixels": 100352} in mm_processor_kwargs'
            if shrinks
            else "cells would leave before the tower's first block, and vLLM's towers take whole pictures. Use a "
            "method with one cut at 'input', such as divprune"
        )
        raise ValueError(f"{pruner.name} cuts at the pixels, before the vision tower: {why}.")
    where = {"layer": "inside the decoder", "vision": "inside the vision tower"}
    places = " and ".join(dict.fromkeys(where.get(stage.place, "before the decoder") for stage in stages))
    raise ValueError(
        f"{pruner.name} cuts {places} (at {', '.join(map(repr, sites))}); inside vLLM tokens leave once, between the "
        "tower and the decoder. Use a method with one cut at 'input', such as divprune, vtc_cls or holov."
    )


def _check_method(pruner: Pruner, stage: Stage) -> None:
    if pruner.is_adaptive:
        raise ValueError(
            f"{pruner.name} decides by picture how many tokens stay, and vLLM must know that before the picture is "
            "encoded. Use a method that keeps its budget."
        )
    if pruner.needed_hints:
        raise ValueError(
            f"{pruner.name} needs {', '.join(pruner.needed_hints)} from its caller, and a request to vLLM has no place "
            "for that."
        )
    if pruner.text_aware:
        raise ValueError(
            f"{pruner.name} chooses by the words of the prompt, and vLLM encodes a picture once for all prompts that "
            "show it. Use a method that looks at pictures alone."
        )
    if pruner.biases_keys:
        raise ValueError(
            f"{pruner.name} weighs merged tokens in the decoder's attention, which vLLM's kernels do not do. Write "
            f"{_with_option(pruner.name, 'key_bias=false')} to have it without."
        )


def _check_signals(stage: Stage, facts: ModelFacts) -> None:
    for signal in stage.signals(facts.tower):
        if signal.name not in VISION_SIGNALS:
            raise ValueError(
                f"{stage.pruner.name} reads {signal.name} of the prompt or the decoder, and inside vLLM a method sees "
                "pictures alone."
            )
        if signal.name not in facts.signals:
            raise ValueError(
                f"{stage.pruner.name} reads {signal.name} of the vision tower, and that of this model gives "
                f"{', '.join(facts.signals) or 'none'}."
            )
        if signal.name not in PIXEL_SIGNALS and not 0 <= signal.layer < facts.blocks:
            raise ValueError(
                f"{stage.pruner.name} reads block {signal.layer} of the vision tower, of which vLLM runs blocks 0 to "
                f"{facts.blocks - 1}."
            )


def _with_option(name: str, option: str) -> str:
    return f"{name[:-1]},{option})" if name.endswith(")") else f"{name}({option})"
