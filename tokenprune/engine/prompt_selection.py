"""One stage at `input` or `layer:K`: what is asked about each visual, and what the answers do to the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.capture.decoder_attention import DecoderSignals
from tokenprune.capture.token_transition import Transitions
from tokenprune.engine.attention import AttentionInterventions
from tokenprune.engine.batched_selection import (
    Part,
    SelectionRequest,
    SelectionResult,
    choose,
    join_parts,
    part_key,
    parts_of,
)
from tokenprune.engine.hints import Hints
from tokenprune.interfaces.pruner import Stage
from tokenprune.interfaces.signals import (
    BRANCH_LOGITS,
    DECODER_SIGNALS,
    PROMPT_SIGNALS,
    RATER_ATTENTION,
    TEXT_PIVOT_COSINE,
    TRANSITION_SIGNALS,
    Signal,
    TowerInfo,
)
from tokenprune.state.prompt_state import CutBuilder, Prompt


class PromptSelector:
    """Lets stages choose among the visual tokens that stand in the decoder's rows.

    Args:
        tower: facts on the vision tower.
        transitions: signals of decoder layers that were read on the way.
        attending: interventions at work, which may keep tokens out of a ranking.
        hints: what the caller knows of pictures.
    """

    def __init__(
        self,
        tower: TowerInfo,
        transitions: Transitions,
        attending: AttentionInterventions,
        hints: Hints,
    ) -> None:
        self._tower, self._transitions, self._attending, self._hints = tower, transitions, attending, hints

    def choose(
        self,
        stage: Stage,
        prompt: Prompt,
        cutter: CutBuilder,
        hidden: Tensor,
        signals: dict[int, DecoderSignals] | None,
    ) -> Tensor:
        """Let a stage choose in every visual; note what leaves in `cutter`, and return hidden states with what a
        method merged."""
        kept_out = self._attending.kept_out(stage.depth) if stage.place == "layer" else None
        if kept_out is not None:
            return self._choose_beside(stage, prompt, cutter, hidden, signals, *kept_out)
        asked: list[SelectionRequest] = []
        for index in range(len(prompt.layout.spans)):
            asked += self._ask(stage, prompt, index, hidden, signals)
        answers, flops = choose(stage, self._tower, asked)
        prompt.flops += flops
        by_span: dict[int, list[tuple[SelectionRequest, SelectionResult | None]]] = {}
        for item, answer in zip(asked, answers):
            by_span.setdefault(item.owner, []).append((item, answer))
        for index, parts in by_span.items():
            alive = prompt.alive[index]
            chosen = join_parts(stage, parts, alive.carry, hidden.device)
            if chosen is None:
                continue
            if chosen.kept.shape[0] == alive.count and chosen.features is None:
                alive.carry = chosen.carry
                continue
            prompt.merged += chosen.merged
            places = cutter.keep(index, chosen.kept, chosen.carry, chosen.sizes)
            if chosen.features is not None:
                row = torch.full_like(places, prompt.layout.spans[index].sample)
                hidden = hidden.index_put((row, places), chosen.features.to(hidden.dtype))
        return hidden

    def _choose_beside(
        self,
        stage: Stage,
        prompt: Prompt,
        cutter: CutBuilder,
        hidden: Tensor,
        signals: dict[int, DecoderSignals] | None,
        out: Tensor,
        stay: bool,
    ) -> Tensor:
        """`_choose` where tokens at `out` `[B, S]` bool are not ranked: they stay beside the budget, or leave."""
        if stage.pruner.is_merging:
            raise ValueError(
                f"{stage.pruner.name} merges tokens, so an intervention cannot keep any out of its ranking."
            )
        asked, ranked = [], []
        spans = prompt.layout.spans
        beside = [out[span.sample, alive.places] for span, alive in zip(spans, prompt.alive)]
        on_host = torch.cat(beside).cpu().split([alive.count for alive in prompt.alive])  # one read for all
        for index, span in enumerate(spans):
            open_to = (~on_host[index]).nonzero()[:, 0].to(out.device)
            (whole,) = self._ask(stage, prompt, index, hidden, signals, together=True)
            asked.append(whole.only(open_to, stage.budget.tokens(span.num_tokens)))
            ranked.append(open_to)
        answers, flops = choose(stage, self._tower, asked)
        prompt.flops += flops
        for index, (answer, open_to) in enumerate(zip(answers, ranked)):
            alive = prompt.alive[index]
            left = torch.zeros(alive.count, dtype=torch.bool, device=open_to.device)
            if stay:
                left = ~left.index_fill(0, open_to, True)
            chosen = open_to if answer is None else open_to[answer.indices.to(open_to.device)]
            # those that stay are counted on the host already, and a stable sort leaves them in order
            count = chosen.shape[0] + (alive.count - open_to.shape[0] if stay else 0)
            left = left.index_fill(0, chosen, True).to(torch.int8)
            kept = left.argsort(descending=True, stable=True)[:count]
            given = {} if answer is None else answer.carry
            # tokens that were not ranked keep what they had, or get zeros
            wide = {}
            for name, values in given.items():
                had = alive.carry.get(name, values.new_zeros(alive.count))
                wide[name] = had.to(values.dtype).index_copy(0, open_to.to(had.device), values.to(had.device))
            carry = {**alive.carry, **wide}
            if kept.shape[0] < alive.count:
                cutter.keep(index, kept, carry)
            else:
                alive.carry = carry
        return hidden

    def _ask(
        self,
        stage: Stage,
        prompt: Prompt,
        index: int,
        hidden: Tensor,
        signals: dict[int, DecoderSignals] | None,
        together: bool = False,
    ) -> list[SelectionRequest]:
        """What is asked about one visual; with `together` all of its rasters at once, whatever the scope."""
        span, alive = prompt.layout.spans[index], prompt.alive[index]
        recording, row = prompt.sources[index]

        def one(part: Part) -> SelectionRequest:
            begin, count = part.begin, part.count
            places = alive.places[begin : begin + count]

            def signal(wanted: Signal) -> Tensor:
                if wanted.name in PROMPT_SIGNALS:
                    return instruction_embedding(prompt, hidden, span.sample)
                if wanted.name in DECODER_SIGNALS:
                    if signals is None:
                        raise ValueError(f"{wanted.name} of decoder layers was not read at {stage.site!r}.")
                    if wanted.name == BRANCH_LOGITS:
                        return signals[wanted.layer].branch_logits(wanted, index, places)
                    if wanted.name == RATER_ATTENTION:
                        return signals[wanted.layer].rater_attention(wanted, index, places)
                    if wanted.name == TEXT_PIVOT_COSINE:
                        return signals[wanted.layer].text_pivot_cosine(wanted, index, places)
                    return signals[wanted.layer].value(wanted.name, index, places)
                if wanted.name in TRANSITION_SIGNALS:
                    return self._transitions.value(wanted, span.sample, places)
                values = recording.signal(wanted, row)
                return values[begin : begin + count] if alive.tokens is None else values[alive.tokens.to(values.device)]

            return SelectionRequest(
                owner=index,
                rasters=part.rasters,
                count=count,
                budget=part.budget,
                tokens=alive.tokens,
                features=lambda: hidden[span.sample, places],
                signal=signal,
                key=lambda: part_key(recording.pixel_key(row), span.image, begin),
                hint=lambda name: self._hints.of_visual(name, prompt.place_of(index)),
                carry={name: values[begin : begin + count] for name, values in alive.carry.items()},
                first=begin,
                total=span.num_tokens,
            )

        budget = stage.budget.tokens(span.num_tokens)
        cut_before = alive.tokens is not None
        return [one(part) for part in parts_of(stage, span.visual.rasters, alive.count, budget, cut_before, together)]


def instruction_embedding(prompt: Prompt, hidden: Tensor, sample: int) -> Tensor:
    """`[D]` fp32, see `signals.INSTRUCTION_EMBEDDING`; `hidden` `[B, S, D]` is what the decoder is given."""
    text = torch.ones(prompt.layout.length, dtype=torch.bool)
    if prompt.attended is not None:
        text &= prompt.attended[sample].bool()
    if prompt.drafted:
        text[-prompt.drafted :] = False
    last = 0
    for span in prompt.layout.spans:
        if span.sample == sample:
            text[span.places.cpu()] = False
            last = max(last, int(span.places[-1]) + 1)
    after = text[last:].nonzero()[:, 0] + last
    places = after if len(after) else text.nonzero()[:, 0]
    if not len(places):
        return hidden.new_zeros(hidden.shape[-1], dtype=torch.float32)
    return hidden[sample, places.to(hidden.device)].float().mean(dim=0)
