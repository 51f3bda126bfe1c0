"""Attention of a few rows in one decoder layer, from the layer's projections: what stages at "layer:K" may ask for, and
of layer 0 those at "input".

Layer K - 1 has run when a stage at "layer:K" chooses, so its keys and values are read from its KV cache where that has
them; those of layer K, which is yet to run, are projected here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.capture.branch import Branch
from tokenprune.capture.largest_attention import largest_attention
from tokenprune.capture.raters import rated, text_raters
from tokenprune.capture.text_pivots import TextPivots, final_states
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.signals import (
    DECODER_KEY_NORM,
    DECODER_VALUE_NORM,
    FINAL_STATES,
    INSTRUCTION_ATTENTION,
    LAST_ATTENTION,
    LAST_VALUE_SIMILARITY,
    LAST_VISUAL_ATTENTION,
    MAX_SIGNALS,
    RATER_ATTENTION,
    TEXT_TO_VISUAL,
    VISUAL_MAX_ATTENTION,
    VISUAL_TO_TEXT,
    Signal,
)
from tokenprune.kernels.attention_rows import attention_rows
from tokenprune.state.key_bias import biased_key, biased_query
from tokenprune.state.prompt_state import Prompt

_CHUNK = 128  # query rows at a time: memory stays O(rows x keys)


@dataclass
class LayerInput:
    """What enters a decoder layer.

    Attributes:
        module: the layer.
        hidden: `[B, P, D]`.
        rotation: cos and sin, `[1 or B, P, d]`.
        attended: `[B, P]` bool, False at padding; None: there is none.
        keys: `[B, Hk, K, d]` keys in the layer's cache before this call, rotated; None if it was empty.
        keys_seen: `[B, K]` bool, False at padding among them.
        left: keys, rotated, and values `[B, Hk, K + P, d]` that the layer left in its cache; None before it has run.
        cache: the KV cache that it runs with; None if there is none.
        bias: `[B, <= K + P]` fp32, added to the logits of the first keys, which stand for several tokens; None: no key.
        sees: `[B or 1, P, K + P]` bool, which keys each row sees where that is not all before it that is no padding.
    """

    module: Any
    hidden: Tensor
    rotation: tuple[Tensor, Tensor]
    attended: Tensor | None
    keys: Tensor | None
    keys_seen: Tensor | None
    left: tuple[Tensor, Tensor] | None = None
    cache: Any = None
    bias: Tensor | None = None
    sees: Tensor | None = None

    def after(self, layer: int) -> LayerInput:
        """The same once the layer's attention has run, with what it left in the cache if that has it whole and as it
        was: a quantized or offloaded cache has not."""
        if self.cache is None:
            return self
        length = self.hidden.shape[1] + (0 if self.keys is None else self.keys.shape[2])
        left = []
        for name in ("keys", "values"):
            part = getattr(self.cache.layers[layer], name, None)
            if not isinstance(part, Tensor) or part.dim() != 4 or part.shape[2] != length:
                return self
            if (part.dtype, part.device) != (self.hidden.dtype, self.hidden.device):
                return self
            left.append(part.detach())
        return replace(self, left=(left[0], left[1]))


class DecoderSignals:
    """Computes signals of one layer for the prompts of a batch; what several signals share is computed once.

    Args:
        adapter: the family.
        given: what enters the layer.
        prompt: the batch.
        branches: those that begin at this layer.
        before: signals of the layer before, where a stage asked for some.

    Attributes:
        flops: matrix products so far, projections and attention rows.
    """

    def __init__(
        self,
        adapter: Adapter,
        given: LayerInput,
        prompt: Prompt,
        branches: Mapping[Signal, Branch] | None = None,
        before: DecoderSignals | None = None,
    ) -> None:
        self.flops = 0
        self._before = before
        self._branches = branches or {}
        self._adapter, self._given, self._prompt = adapter, given, prompt
        self._reading = adapter.reading(given.module)
        self._cache: dict[str, Tensor] = {}
        self._pivots: TextPivots | None = None

    @torch.no_grad()
    def prepare(self, names: Sequence[str]) -> None:
        """Compute what signals of these names need of the layer's weights, which may be elsewhere (sharded, offloaded)
        once it has run."""
        for name in names:
            if name == LAST_ATTENTION:
                self._last()
            elif name == INSTRUCTION_ATTENTION:
                self._instruction()
            elif name == LAST_VISUAL_ATTENTION:
                self._last_query()
                self._keys()
            elif name in (LAST_VALUE_SIMILARITY, DECODER_VALUE_NORM):
                self._values()
            elif name == DECODER_KEY_NORM:
                self.key_norms()
            elif name == RATER_ATTENTION:
                self._text_query()
                self._keys()
            elif name in MAX_SIGNALS:
                self._every_query()
                self._keys()
            elif name == FINAL_STATES:
                continue  # reads no weights of the layer
            else:
                self._shares(name)

    def value(self, name: str, span: int, places: Tensor) -> Tensor:
        """A signal for one span whose tokens are at `places` of what entered the layer."""
        sample = self._prompt.layout.spans[span].sample
        if name == LAST_ATTENTION:
            return self._last()[sample, places]
        if name == INSTRUCTION_ATTENTION:
            return self._instruction()[sample, places]
        if name in (LAST_VISUAL_ATTENTION, LAST_VALUE_SIMILARITY, DECODER_VALUE_NORM):
            return self._within(name, sample, places)
        if name == DECODER_KEY_NORM:
            return self.key_norms()[sample, places]
        if name in MAX_SIGNALS:
            return self._largest(name, sample, places)
        if name == FINAL_STATES:
            return final_states(self._adapter.language_model, self._given.hidden[sample, places])
        return self._shares(name)[sample]

    def text_pivot_cosine(self, signal: Signal, span: int, places: Tensor) -> Tensor:
        """`TEXT_PIVOT_COSINE` for one span, as `value`."""
        if self._before is None:
            raise ValueError(f"{signal.name} needs {DECODER_KEY_NORM} of layer {signal.layer - 1}, which was not read.")
        if self._pivots is None:
            decoder, hidden = self._adapter.language_model, self._given.hidden
            texts, norms = self._prompt.text_after_visual(), self._before.key_norms()
            self._pivots = TextPivots(decoder, hidden, norms, self._ends(), texts, int(signal.settings[0]))
        return self._pivots.cosine(self._prompt.layout.spans[span].sample, places)

    def _texts(self) -> list[int]:
        """Rows of text of each prompt, one at least."""
        return [max(count, 1) for count in self._prompt.text_after_visual()]

    def _text_rows(self) -> Tensor:
        """`[B, T]` int64, where the text behind each prompt's last visual token stands; what is beyond a prompt's own
        count means nothing."""
        ends = self._ends()
        counts = torch.tensor(self._texts(), device=ends.device)[:, None]
        at = torch.arange(max(self._texts()), device=ends.device)[None]
        return (ends - counts + 1 + at).clamp(max=self._given.hidden.shape[1] - 1)

    @torch.no_grad()
    def _text_query(self) -> Tensor:
        """`[B, H, T, d]`, rotated."""
        if "text" not in self._cache:
            self._cache["text"] = self._query(self._text_rows())
        return self._cache["text"]

    @torch.no_grad()
    def _every_query(self) -> Tensor:
        """`[B, H, P, d]` of this call, rotated."""
        if "every" not in self._cache:
            batch_size, length = self._given.hidden.shape[:2]
            self._cache["every"] = self._query(torch.arange(length, device=self._ends().device).expand(batch_size, -1))
        return self._cache["every"]

    @torch.no_grad()
    def _largest(self, name: str, sample: int, places: Tensor) -> Tensor:
        """`[n]` fp32, see `signals.MAX_SIGNALS`."""
        query, key = self._biased(self._every_query(), self._keys())
        rows = places if name == VISUAL_MAX_ATTENTION else self._text_rows()[sample, : self._texts()[sample]]
        columns = places + (key.shape[2] - self._given.hidden.shape[1])
        self.flops += 2 * query.shape[1] * rows.shape[0] * query.shape[3] * key.shape[2]
        batch_size = query.shape[0]

        def allowed(asking: Tensor) -> Tensor:
            return self._allowed(asking.expand(batch_size, -1))[sample]

        total = largest_attention(query[sample], key[sample], self._reading.scale, rows, columns, allowed)
        return total / rows.shape[0] if name == VISUAL_MAX_ATTENTION else total

    @torch.no_grad()
    def note_raters(self) -> None:
        """Write down on the prompt who rates each visual; this is layer 0."""
        hidden, rows, counts = self._given.hidden.detach(), self._text_rows(), self._texts()
        self._prompt.raters = []
        for span, alive in zip(self._prompt.layout.spans, self._prompt.alive):
            text = hidden[span.sample, rows[span.sample, : counts[span.sample]]]
            self._prompt.raters.append(text_raters(hidden[span.sample, alive.places], text))
            self.flops += 2 * alive.count * text.numel()

    @torch.no_grad()
    def rater_attention(self, signal: Signal, span: int, places: Tensor) -> Tensor:
        """`RATER_ATTENTION` for one span, as `value`."""
        sample, length = self._prompt.layout.spans[span].sample, self._given.hidden.shape[1]
        count, rows = self._texts()[sample], self._text_rows()
        query, key = self._biased(self._text_query(), self._keys())
        heads, divided = (int(setting) for setting in signal.settings)
        turned = self._rotation_alone(sample, rows[sample, :count], places) if divided else None
        allowed, query = self._allowed(rows[:, :count])[sample], query[sample, :, :count]
        self.flops += 2 * query.numel() * key.shape[2]
        columns = places + (key.shape[2] - length)
        raters = self._prompt.raters[span].to(query.device)
        return rated(query, key[sample], self._reading.scale, allowed, columns, turned, raters, heads)

    def _rotation_alone(self, sample: int, rows: Tensor, places: Tensor) -> Tensor:
        """`[T, n]`: products of vectors of ones, rotated to rows and to places, over the root of their width."""
        cos, sin = (part[sample % len(part), None] for part in self._given.rotation)  # one row, or one for each
        ones = torch.ones(1, 1, cos.shape[1], self._reading.width, device=cos.device, dtype=torch.float32)
        plain = self._reading.rotate(ones, (cos.float(), sin.float()))[0, 0]  # [P, d]
        self.flops += 2 * rows.shape[0] * places.shape[0] * plain.shape[1]
        return plain[rows] @ plain[places].T * plain.shape[1] ** -0.5

    @torch.no_grad()
    def key_norms(self) -> Tensor:
        """`[B, P]` fp32, see `signals.DECODER_KEY_NORM`, of all tokens of this call."""
        if "key_norms" not in self._cache:
            keys = self._keys()[:, :, -self._given.hidden.shape[1] :]  # [B, Hk, P, d]
            self._cache["key_norms"] = keys.float().abs().sum(dim=-1).sum(dim=1)
        return self._cache["key_norms"]

    def branch_logits(self, signal: Signal, span: int, places: Tensor) -> Tensor:
        """`BRANCH_LOGITS` for one span, as `value`."""
        if signal.source not in self._cache:
            branch, given = self._branches[signal], self._given
            logits, flops = branch.logits(given.hidden.detach(), given.rotation, given.attended, self._ends()[:, 0])
            self._cache[signal.source] = logits
            self.flops += flops
        return self._cache[signal.source][self._prompt.layout.spans[span].sample, places]

    def _allowed(self, rows: Tensor) -> Tensor:
        """`[B, R, K + P]` bool: which keys the query rows `[B, R]` see."""
        given = self._given
        batch_size, length = given.hidden.shape[:2]
        if given.sees is not None:  # windows, and pictures that see themselves in both directions
            sees = given.sees.to(rows.device).expand(batch_size, -1, -1)
            return sees.gather(1, rows[..., None].expand(-1, -1, sees.shape[2]))
        at = torch.arange(length, device=rows.device)
        causal = at[None, None] <= rows[..., None]  # [B, R, P]
        if given.attended is not None:
            itself = at[None, None] == rows[..., None]
            causal = (causal & given.attended[:, None]) | itself
        if given.keys is None:
            return causal
        past = torch.ones(batch_size, given.keys.shape[2], dtype=torch.bool, device=rows.device)
        past = past if given.keys_seen is None else given.keys_seen  # [B, K]
        return torch.cat([past[:, None].expand(-1, rows.shape[1], -1), causal], dim=2)

    def _project(self, part: str, hidden: Tensor) -> Tensor:
        """Query, key or value `[B, H, S, d]` of hidden states `[B, S, D]`, counted."""
        absent = self._reading.absent()
        if absent is not None:
            raise ValueError(
                f"The weights of a decoder layer that a stage reads are {absent} where it reads them, outside of the "
                "layer's own forward. Methods that cut at 'input' read none of them; sharding or offloading whole "
                "layers goes with methods that read the layer before their cut (fastv, todre)."
            )
        made = self._adapter.heads(self._given.module, hidden, part)
        self.flops += 2 * made.numel() * hidden.shape[-1]
        return made

    def _query(self, rows: Tensor) -> Tensor:
        """`[B, H, R, d]` of the rows `[B, R]`, rotated."""
        hidden = self._given.hidden.detach()
        # normalisation and projections know no other row
        asked = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))  # [B, R, D]
        cos, sin = (part.expand(rows.shape[0], -1, -1) for part in self._given.rotation)
        picked = rows[..., None].expand(-1, -1, cos.shape[-1])
        return self._reading.rotate(self._project("q", asked), (cos.gather(1, picked), sin.gather(1, picked)))

    def _keys(self) -> Tensor:
        """`[B, Hk, K + P, d]` of the cache and of this call, rotated."""
        given = self._given
        if given.left is not None:
            return given.left[0]
        if "key" not in self._cache:
            key = self._reading.rotate(self._project("k", given.hidden.detach()), given.rotation)
            self._cache["key"] = key if given.keys is None else torch.cat([given.keys.to(key.dtype), key], dim=2)
        return self._cache["key"]

    def _values(self) -> Tensor:
        """`[B, Hk, P, d]` of this call."""
        given = self._given
        if given.left is not None:
            return given.left[1][:, :, -given.hidden.shape[1] :]
        if "value" not in self._cache:
            self._cache["value"] = self._project("v", given.hidden.detach())
        return self._cache["value"]

    def _attention(self, rows: Tensor) -> Tensor:
        """`[B, R, P]` fp32: head-mean attention of the query rows `[B, R]` to the tokens of this call."""
        query, key = self._biased(self._query(rows), self._keys())
        self.flops += 2 * query.numel() * key.shape[2]
        mass = attention_rows(query, key, self._reading.scale, self._allowed(rows))  # [B, R, K + P]
        return mass[..., -self._given.hidden.shape[1] :]

    def _biased(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Both with what the layer adds to the logits of keys `[B, Hk, K + P, d]` that stand for several tokens."""
        bias = self._given.bias
        if bias is None:
            return query, key
        return biased_query(query), biased_key(key, bias, self._reading.scale)

    def _ends(self) -> Tensor:
        """`[B, 1]` int64, the last token of each prompt."""
        batch_size = self._given.hidden.shape[0]
        device = self._given.hidden.device
        length = self._given.hidden.shape[1] - self._prompt.drafted  # drafted tokens come last, after any padding
        if self._given.attended is None:
            return torch.full((batch_size, 1), length - 1, device=device)
        return (torch.arange(length, device=device) * self._given.attended[:, :length]).amax(dim=1, keepdim=True)

    @torch.no_grad()
    def _last_query(self) -> Tensor:
        """`[B, H, 1, d]`."""
        if "row" not in self._cache:
            self._cache["row"] = self._query(self._ends())
        return self._cache["row"]

    @torch.no_grad()
    def _last(self) -> Tensor:
        if "last" not in self._cache:
            self._cache["last"] = self._attention(self._ends())[:, 0]
        return self._cache["last"]

    @torch.no_grad()
    def _instruction(self) -> Tensor:
        if "instruction" in self._cache:
            return self._cache["instruction"]
        ends = self._ends()
        counts = [max(count, 1) for count in self._prompt.text_after_visual()]
        rows_of_prompt = torch.tensor(counts, device=ends.device)[:, None]  # [B, 1]
        total = torch.zeros(self._given.hidden.shape[:2], device=ends.device)
        # text never leaves, so the rows are the last ones of each prompt; shorter prompts repeat their first, uncounted
        for start in range(0, max(counts), _CHUNK):
            back = torch.arange(start, min(start + _CHUNK, max(counts)), device=ends.device)[None]
            mass = self._attention((ends - back.minimum(rows_of_prompt - 1)).clamp(min=0))  # [B, chunk, P]
            total += (mass * (back < rows_of_prompt)[..., None]).sum(dim=1)
        self._cache["instruction"] = total / rows_of_prompt
        return self._cache["instruction"]

    @torch.no_grad()
    def _within(self, name: str, sample: int, places: Tensor) -> Tensor:
        """`[n]` fp32: how the tokens at `places` `[n]` of a row compare among each other, seen from its last token."""
        ends = self._ends()
        if name == LAST_VISUAL_ATTENTION:
            queries, keys = self._biased(self._last_query(), self._keys())
            query, key = queries[sample], keys[sample, :, -self._given.hidden.shape[1] :]
            scale = self._reading.scale
        else:
            key = self._values()[sample]
            if name == DECODER_VALUE_NORM:
                return key[:, places].float().mean(dim=0).abs().sum(dim=-1)
            query, scale = key[:, ends[sample]], key.shape[-1] ** -0.5
        self.flops += 2 * query.numel() * places.shape[0]
        return attention_rows(query[None], key[None, :, places], scale)[0, 0]

    @torch.no_grad()
    def _shares(self, name: str) -> Tensor:
        if name not in self._cache:
            visual = torch.zeros(self._given.hidden.shape[:2], dtype=torch.bool, device=self._given.hidden.device)
            for span, alive in zip(self._prompt.layout.spans, self._prompt.alive):
                standing = alive.places if alive.placeholders is None else alive.placeholders
                visual[span.sample, standing] = True
            if self._prompt.text_before_visual() or self._given.sees is not None:
                self._shares_of_all(visual)
            else:
                self._shares_of_tail(visual)
        return self._cache[name]

    def _shares_of_tail(self, visual: Tensor) -> None:
        """Where all text follows all visual tokens: the rows of the text are all that is needed, and visual rows see no
        text."""
        counts = [max(count, 1) for count in self._prompt.text_after_visual()]
        rows_of_prompt, most = torch.tensor(counts, device=visual.device)[:, None], max(counts)
        ends = self._ends()
        total = torch.zeros(visual.shape[0], device=visual.device)
        for start in range(0, most, _CHUNK):
            back = torch.arange(start, min(start + _CHUNK, most), device=visual.device)[None]
            mass = self._attention((ends - back).clamp(min=0))  # [B, chunk, P]
            total += ((mass * visual[:, None]).sum(dim=2) * (back < rows_of_prompt)).sum(dim=1)
        self._cache[TEXT_TO_VISUAL] = total / rows_of_prompt[:, 0]
        self._cache[VISUAL_TO_TEXT] = torch.zeros_like(total)

    def _shares_of_all(self, visual: Tensor) -> None:
        batch_size, length = visual.shape
        at = torch.arange(length, device=visual.device)
        first = torch.where(visual, at, length).amin(dim=1, keepdim=True)  # [B, 1]
        text = ~visual & (at > first) & (at < length - self._prompt.drafted)
        if self._given.attended is not None:
            text &= self._given.attended
        last = at == self._ends()
        asking = torch.where(text.any(dim=1, keepdim=True), text, last)  # [B, P]
        to_visual = torch.zeros(batch_size, device=visual.device)
        to_text = torch.zeros_like(to_visual)
        for start in range(0, length, _CHUNK):
            rows = at[start : start + _CHUNK].expand(batch_size, -1)
            mass = self._attention(rows)  # [B, chunk, P]
            to_visual += ((mass * visual[:, None]).sum(dim=2) * asking.gather(1, rows)).sum(dim=1)
            to_text += ((mass * text[:, None]).sum(dim=2) * visual.gather(1, rows)).sum(dim=1)
        self._cache[TEXT_TO_VISUAL] = to_visual / asking.sum(dim=1)
        self._cache[VISUAL_TO_TEXT] = to_text / visual.sum(dim=1).clamp(min=1)
