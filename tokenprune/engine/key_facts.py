"""Facts that interventions note on keys: those of one call, and joined with those that came with the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenprune.engine.key_bias import BiasOfCall
from tokenprune.interfaces.intervention import Entering, Intervention
from tokenprune.state.kv_cache import KeyAnnotations, LayerFacts
from tokenprune.state.prompt_layout import Layout
from tokenprune.state.prompt_state import Prompt


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
    rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    visual: Tensor | None = None
    noted: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    joined: dict[int, LayerFacts] = field(default_factory=dict)
    bias: BiasOfCall = field(default_factory=BiasOfCall)


class KeyFacts:
    """Notes and joins the facts of interventions.

    Args:
        interventions: of one model.
        owners: which of them acts in which decoder layer.
    """

    def __init__(self, interventions: Sequence[Intervention], owners: Mapping[int, int]) -> None:
        self._interventions, self._owners = interventions, owners

    def enter(self, call: AttentionCall, layer: int, hidden: Tensor) -> None:
        """Let the intervention of a layer note facts on the tokens `[B, S, D]` that enter it."""
        if call.visual is None:
            call.visual = visual_rows(call.prompt, hidden)
        visual = call.visual.to(hidden.device)
        prompt = call.prompt or Prompt(Layout((), hidden.shape[0], hidden.shape[1]))
        entering = Entering(layer, hidden.detach(), visual, call.attended, call.first, prompt.picture_keys)
        with torch.no_grad():
            noted = self._interventions[self._owners[layer]].note(entering)
        new = _new(call, hidden)
        call.noted[layer] = noted if new is None else {name: v.masked_fill(~new, 0) for name, v in noted.items()}

    def of_layer(self, call: AttentionCall, layer: int, held: int) -> LayerFacts | None:
        """Facts on the keys of a layer, of which `held` were there before the call."""
        before = None if call.before is None else call.before.layers.get(layer)
        noted = call.noted.get(layer)
        if not noted:
            return before
        if layer not in call.joined:
            values = {name: _join(before, name, new, held) for name, new in noted.items()}
            call.joined[layer] = LayerFacts(values, self._interventions[self._owners[layer]].applies(values))
        return call.joined[layer]


def _new(call: AttentionCall, hidden: Tensor) -> Tensor | None:
    """`[B, S]` bool: tokens on which facts are kept; None: all. What a draft proposed is no part of the prompt, and a
    row that gets no picture in a later turn is as if it were alone."""
    prompt = call.prompt
    if prompt is None or (call.first and not prompt.drafted):
        return None
    rows = torch.ones(hidden.shape[0], 1, dtype=torch.bool)
    if not call.first:
        rows[:] = False
        rows[[span.sample for span in prompt.layout.spans]] = True
    new = rows.repeat(1, hidden.shape[1])
    new[:, hidden.shape[1] - prompt.drafted :] = False
    return new.to(hidden.device)


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
    old = new.new_zeros(new.shape[0], held)
    known = None if before is None else before.values.get(name)
    if known is not None:
        old[:, : known.shape[1]] = known.to(new.device)
    return torch.cat([old, new], dim=1)
