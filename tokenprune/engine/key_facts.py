"""Facts that interventions note on keys: those of one call, and joined with those that came with the cache."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenprune.engine.key_bias import BiasOfCall
from tokenprune.interfaces.intervention import Attended, Carried, Entering, Intervention, VisualTokens
from tokenprune.state.compaction import Compaction
from tokenprune.state.kv_cache import KeyAnnotations, LayerFacts
from tokenprune.state.prompt_layout import Layout
from tokenprune.state.prompt_state import Prompt

Rows = tuple[Tensor, Tensor]


@dataclass
class AttentionCall:
    """What interventions know of one call of the decoder.

    Attributes:
        before: facts on the cache's keys.
        prompt: None for a call without pictures.
        noting: whether facts are noted on the tokens of this call.
        seen: `[B]` bool, whether the cache holds visual tokens.
        rows: by intervention, `[B, R]` where the rows that it may change stand now, and `[B, R]` whether there is one;
            an intervention that is not here may change all rows.
        measured: the same for the rows that it measures.
        carried: by intervention, what it hands on from layer to layer.
        attended: `[B, S]` bool, None without padding.
        noted: by layer, facts on the tokens of this call.
        joined: by layer, facts on all keys.
        bias: the bias of keys.
    """

    before: KeyAnnotations | None
    prompt: Prompt | None
    noting: bool
    first: bool
    seen: Tensor
    attended: Tensor | None
    rows: dict[int, Rows] = field(default_factory=dict)
    measured: dict[int, Rows] = field(default_factory=dict)
    carried: dict[int, Carried] = field(default_factory=dict)
    visual: Tensor | None = None
    noted: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    joined: dict[int, LayerFacts] = field(default_factory=dict)
    bias: BiasOfCall = field(default_factory=BiasOfCall)

    def cut(self, compaction: Compaction, layer: int | None) -> None:
        """Tokens left: at the input, or before `layer`."""
        self.bias.moved()
        target, length = compaction.target, compaction.index.shape[1]
        for held in (self.rows, self.measured):
            for number, (rows, real) in held.items():
                held[number] = target.gather(1, rows).clamp(0, length - 1), real
        self.attended = compaction.real if compaction.padded else None
        self.visual = None
        for carried in self.carried.values():
            carried.update(_moved(compaction, carried))
        if layer is not None and layer in self.noted:
            self.noted[layer] = _moved(compaction, self.noted[layer])


class KeyFacts:
    """Notes and joins the facts of interventions.

    Args:
        interventions: of one model.
        owners: which of them acts in which decoder layer.
    """

    def __init__(self, interventions: Sequence[Intervention], owners: Mapping[int, int]) -> None:
        self._interventions, self._owners = interventions, owners

    def plan_rows(self, call: AttentionCall, visual: Tensor, attended: Tensor, before: Tensor) -> None:
        """Write down which rows of a prompt the interventions name; the arguments are those of `Intervention.rows`."""
        for number, one in enumerate(self._interventions):
            layers = [layer for layer, owner in self._owners.items() if owner == number]
            asked = [(one.rows, call.rows)]
            if any(one.measures(layer) for layer in layers):
                asked.append((one.measured_rows, call.measured))
            for ask, held in asked if layers else ():
                wanted = ask(visual, attended, before)
                if wanted is None:
                    continue
                if bool((wanted & visual).any()):
                    raise ValueError(
                        f"{one.name} names rows of visual tokens, some of which may leave. Name text alone, or return "
                        "None for all rows."
                    )
                if one.answers_only and held is call.rows:
                    # a row without a picture in a later turn is as if it were alone: added text
                    added = (~visual.any(1) & before)[:, None]
                    drafted = 0 if call.prompt is None else call.prompt.drafted
                    wanted = wanted & (added | _answering(attended, drafted))
                most = max(int(wanted.sum(1).max()), 1)
                index = wanted.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
                held[number] = index.to(call.seen.device), wanted.gather(1, index).to(call.seen.device)

    def enter(self, call: AttentionCall, layer: int, hidden: Tensor) -> None:
        """Let the intervention of a layer note facts on the tokens `[B, S, D]` that enter it."""
        if call.visual is None:
            call.visual = visual_rows(call.prompt, hidden)
        visual = call.visual.to(hidden.device)
        prompt = call.prompt or Prompt(Layout((), hidden.shape[0], hidden.shape[1]))
        carried = self.carried(call, layer, hidden.device)
        entering = Entering(
            layer, hidden.detach(), visual, call.attended, call.first, prompt.picture_keys,
            lambda: _visuals(prompt), carried,
        )  # fmt: skip
        with torch.no_grad():
            noted = self._interventions[self._owners[layer]].note(entering)
        call.noted[layer] = _of_new(call, noted)

    def carried(self, call: AttentionCall, layer: int, device: torch.device) -> Carried:
        """What the intervention of a layer handed on, on the device of that layer."""
        carried = call.carried.setdefault(self._owners[layer], {})
        for name, values in carried.items():
            carried[name] = values.to(device)
        return carried

    def measures(self, call: AttentionCall, layer: int) -> bool:
        """Whether the intervention of a layer measures its attention in this call."""
        one = self._interventions[self._owners[layer]]
        return call.noting and (call.prompt is not None or not one.visual_only) and one.measures(layer)

    def measure(self, call: AttentionCall, layer: int, given: Attended) -> None:
        """Let the intervention of a layer measure its attention."""
        with torch.no_grad():
            measured = self._interventions[self._owners[layer]].measure(given)
        call.noted[layer] = {**call.noted.get(layer, {}), **_of_new(call, measured)}
        call.joined.pop(layer, None)
        if call.prompt is not None:
            flops = call.prompt.attention_flops
            own = self._interventions[self._owners[layer]].measured_flops(given)
            flops[layer] = (flops.get(layer) or 0) + own

    def of_layer(self, call: AttentionCall, layer: int, held: int) -> LayerFacts | None:
        """Facts on the keys of a layer, of which `held` were there before the call."""
        before = None if call.before is None else call.before.layers.get(layer)
        noted = call.noted.get(layer)
        if not noted:
            return before
        if layer not in call.joined:
            values = {name: _join(before, name, new, held) for name, new in noted.items()}
            applies = self._interventions[self._owners[layer]].applies(values)
            some = next(iter(values.values()))
            everything = torch.ones(some.shape[0], dtype=torch.bool, device=some.device)
            call.joined[layer] = LayerFacts(values, everything if applies is None else applies, every=applies is None)
        return call.joined[layer]


def _answering(attended: Tensor, drafted: int) -> Tensor:
    """`[B, S]` bool: the last token of each prompt, and drafted ones."""
    place = torch.arange(attended.shape[1]).expand(attended.shape)
    prompt = attended & (place < attended.shape[1] - drafted)
    return attended & (place >= torch.where(prompt, place, 0).amax(1, keepdim=True))


def _of_new(call: AttentionCall, noted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Facts, zeros where none are kept. What a draft proposed is no part of the prompt, and a row that gets no picture
    in a later turn is as if it were alone."""
    prompt = call.prompt
    if prompt is None or not noted or (call.first and not prompt.drafted):
        return dict(noted)
    some = next(iter(noted.values()))
    rows = torch.ones(some.shape[0], 1, dtype=torch.bool)
    if not call.first:
        rows[:] = False
        rows[[span.sample for span in prompt.layout.spans]] = True
    new = rows.repeat(1, some.shape[1])
    new[:, some.shape[1] - prompt.drafted :] = False
    return {name: values.masked_fill(~_wide(new, values), 0) for name, values in noted.items()}


def _moved(compaction: Compaction, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    moved = dict(zip(values, compaction.move(list(values.values()))))
    return {name: one.masked_fill(~_wide(compaction.real, one), 0) for name, one in moved.items()}


def _wide(mask: Tensor, values: Tensor) -> Tensor:
    """`[B, S]` with the dimensions of `[B, S, ...]`, on their device."""
    return mask.to(values.device).view(*mask.shape, *(1,) * (values.dim() - 2))


def _visuals(prompt: Prompt) -> list[VisualTokens]:
    def of(index: int) -> VisualTokens:
        span, alive, (recording, row) = prompt.layout.spans[index], prompt.alive[index], prompt.sources[index]
        signal = functools.partial(recording.signal, row=row)
        return VisualTokens(span.sample, span.visual.rasters, alive.places, alive.tokens, signal)

    return [of(index) for index in range(len(prompt.layout.spans))]


def visual_rows(prompt: Prompt | None, hidden: Tensor) -> Tensor:
    """`[B, S]` bool: where visual tokens stand among the rows `[B, S, D]`, separators of pictures included."""
    visual = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if prompt is not None:
        for span, alive in zip(prompt.layout.spans, prompt.alive):
            standing = alive.places if alive.placeholders is None else alive.placeholders
            visual[span.sample, standing.to(hidden.device)] = True
    return visual


def _join(before: LayerFacts | None, name: str, new: Tensor, held: int) -> Tensor:
    if not held:
        return new
    old = new.new_zeros(new.shape[0], held, *new.shape[2:])
    known = None if before is None else before.values.get(name)
    if known is not None:
        old[:, : known.shape[1]] = known.to(new.device)
    return torch.cat([old, new], dim=1)
