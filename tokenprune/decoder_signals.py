"""Attention of a few rows in one decoder layer, from its own projections: what stages at "layer:K" may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.adapters._base import Adapter
from tokenprune.kernels.attention_rows import attention_rows
from tokenprune.prompt import Prompt
from tokenprune.signals import DECODER_SIGNALS, LAST_ATTENTION, TEXT_TO_VISUAL, Signal

_CHUNK = 128  # query rows at a time: memory stays O(rows x keys)


@dataclass
class LayerInput:
    """What enters a decoder layer.

    Attributes:
        module: the layer.
        hidden: `[B, P, D]`.
        rotation: cos and sin, `[1 or B, P, d]`.
        attended: `[B, P]` bool, False at padding; None: there is none.
        keys: `[B, Hk, K, d]` keys that the layer's cache held before this call, rotated; None if it held none.
        keys_seen: `[B, K]` bool, False at padding among them.
    """

    module: Any
    hidden: Tensor
    rotation: tuple[Tensor, Tensor]
    attended: Tensor | None
    keys: Tensor | None
    keys_seen: Tensor | None


def rotate(values: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of `[B, H, P, d]` by cos and sin `[1 or B, P, d]`: halves, as in Llama and its descendants."""
    cos, sin = (part[:, None].to(values.dtype) for part in rotation)
    first, second = values.chunk(2, dim=-1)
    return values * cos + torch.cat([-second, first], dim=-1) * sin


def check_decoder_signal(signal: Signal, site: str, depth: int) -> None:
    """Raise ValueError if a stage at "layer:K" cannot have this signal."""
    if signal.name in DECODER_SIGNALS and signal.layer not in (depth - 1, depth):
        raise ValueError(
            f"{signal.name} of decoder layer {signal.layer} was asked for at {site!r}; a stage there reads layers "
            f"{depth - 1} and {depth}."
        )


class DecoderSignals:
    """Computes signals of one layer for the prompts of a batch; what several signals share is computed once."""

    def __init__(self, adapter: Adapter, given: LayerInput, prompt: Prompt) -> None:
        self._adapter, self._given, self._prompt = adapter, given, prompt
        self._cache: dict[str, Tensor] = {}

    def value(self, name: str, span: int, places: Tensor) -> Tensor:
        """A signal for one span whose tokens stand at `places` of what entered the layer."""
        sample = self._prompt.layout.spans[span].sample
        if name == LAST_ATTENTION:
            return self._last()[sample, places]
        return self._shares(name)[sample]

    def _allowed(self, rows: Tensor) -> Tensor:
        """`[B, R, K + P]` bool: which keys the query rows `[B, R]` see."""
        given = self._given
        batch_size, length = given.hidden.shape[:2]
        at = torch.arange(length, device=rows.device)
        causal = at[None, None] <= rows[..., None]
        if given.attended is not None:
            own = at[None, None] == rows[..., None]
            causal = (causal & given.attended[:, None]) | own
        if given.keys is None:
            return causal
        past = torch.ones(batch_size, given.keys.shape[2], dtype=torch.bool, device=rows.device)
        past = past if given.keys_seen is None else given.keys_seen
        return torch.cat([past[:, None].expand(-1, rows.shape[1], -1), causal], dim=2)

    def _attention(self, rows: Tensor) -> Tensor:
        """`[B, R, P]` fp32: head-mean attention of the query rows `[B, R]` to the tokens of this call."""
        given = self._given
        hidden = given.hidden.detach()
        if "key" not in self._cache:
            query, key = self._adapter.query_key(given.module, hidden, rows)
            self._cache["key"] = rotate(key, given.rotation)
        else:  # the keys are there: only these rows are projected
            asked = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
            query, _ = self._adapter.query_key(given.module, asked, None)
        key = self._cache["key"]
        cos, sin = given.rotation
        picked = rows[..., None].expand(-1, -1, cos.shape[-1])
        turned = tuple(part.expand(rows.shape[0], -1, -1).gather(1, picked) for part in (cos, sin))
        query = rotate(query, turned)  # type: ignore[arg-type]
        if given.keys is not None:
            key = torch.cat([given.keys.to(key.dtype), key], dim=2)
        scale = float(getattr(given.module.self_attn, "scaling", key.shape[-1] ** -0.5))
        found = attention_rows(query, key, scale, self._allowed(rows))
        return found[..., -hidden.shape[1] :]

    @torch.no_grad()
    def _last(self) -> Tensor:
        if "last" not in self._cache:
            batch_size, length = self._given.hidden.shape[:2]
            device = self._given.hidden.device
            if self._given.attended is None:
                last = torch.full((batch_size, 1), length - 1, device=device)
            else:
                at = torch.arange(length, device=device)
                last = (at * self._given.attended).amax(dim=1, keepdim=True)
            self._cache["last"] = self._attention(last)[:, 0]
        return self._cache["last"]

    @torch.no_grad()
    def _shares(self, name: str) -> Tensor:
        if name in self._cache:
            return self._cache[name]
        batch_size, length = self._given.hidden.shape[:2]
        device = self._given.hidden.device
        visual = torch.zeros(batch_size, length, dtype=torch.bool, device=device)
        first = torch.full((batch_size,), length, device=device)
        for span, alive in zip(self._prompt.layout.spans, self._prompt.alive):
            standing = alive.places if alive.placeholders is None else alive.placeholders
            visual[span.sample, standing] = True
        at = torch.arange(length, device=device)
        first = torch.where(visual, at, length).amin(dim=1, keepdim=True)
        text = ~visual & (at > first)
        if self._given.attended is not None:
            text &= self._given.attended
        to_visual = torch.zeros(batch_size, device=device)
        to_text = torch.zeros(batch_size, device=device)
        for start in range(0, length, _CHUNK):
            rows = at[start : start + _CHUNK]
            mass = self._attention(rows.expand(batch_size, -1))
            on_visual = (mass * visual[:, None]).sum(dim=2)
            on_text = (mass * text[:, None]).sum(dim=2)
            to_visual += (on_visual * text[:, rows]).sum(dim=1)
            to_text += (on_text * visual[:, rows]).sum(dim=1)
        self._cache[TEXT_TO_VISUAL] = to_visual / text.sum(dim=1).clamp(min=1)
        self._cache["visual_to_text"] = to_text / visual.sum(dim=1).clamp(min=1)
        return self._cache[name]

    def flops(self, names: set[str]) -> int:
        """Matrix products of what was computed: projections and attention rows."""
        batch_size, length, width = self._given.hidden.shape
        attention = self._given.module.self_attn
        heads = attention.q_proj.out_features
        kv = attention.k_proj.out_features
        held = length + (0 if self._given.keys is None else self._given.keys.shape[2])
        total = 0
        if LAST_ATTENTION in names:
            total += 2 * batch_size * (length * width * kv + width * heads + held * heads)
        if names - {LAST_ATTENTION}:
            later = max(length - _CHUNK, 0)  # rows whose own keys are projected along with their queries
            total += 2 * batch_size * ((length + later) * width * kv + length * width * heads + length * held * heads)
        return total
