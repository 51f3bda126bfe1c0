"""One pass through the decoder: rows are cut at its input and at the layers that stages name, and every layer is given
the masks and positions that fit the keys it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.engine.guards import check_padding_between
from tokenprune.engine.query_rows import along
from tokenprune.engine.whole_masks import RECURRENT, HeldKeys, WholeMasks, see_something
from tokenprune.interfaces.adapter import Adapter
from tokenprune.state.call_inputs import CallInputs
from tokenprune.state.compaction import Compaction
from tokenprune.state.kv_cache import PrunedPrompt, Segment


class DecoderPass:
    """Bookkeeping of one call of the decoder.

    "Base" is what the first layer gets. Later layers may hold fewer tokens: those of the pass itself (`index` says
    which of the base they are) and those of the cache (`before`).

    Args:
        adapter: the family.
        before: the map of the cache's keys, None where its prompt was not pruned.
        inputs: what the decoder was given.
        masks: masks for the whole rows of the call; None where the decoder makes its own for the shortened ones.
    """

    def __init__(
        self, adapter: Adapter, before: PrunedPrompt | None, inputs: CallInputs, masks: WholeMasks | None = None
    ) -> None:
        self.adapter, self.before, self._inputs, self._whole = adapter, before, inputs, masks
        self.past, self.length, self.batch_size = inputs.past, inputs.length, inputs.batch_size
        self.device: Any = None if inputs.embeds is None else inputs.embeds.device
        self.compaction: Compaction | None = None  # of the whole pass so far
        # [B, P] bool, None where there is no padding: False at padding that cuts of this pass made, and at any padding
        self.real: Tensor | None = None
        self.attended: Tensor | None = None
        self.index: Tensor | None = None  # [B, P] of the base, None: the base itself
        self.closed: Tensor | int = 0  # [B, P] what positions shrink by since the base
        self.shift: Tensor | None = None  # [B] what later positions shrink by, of this pass alone
        self.segments: list[Segment] = []
        # the layer before which rows were shortened, and how they stand to the full rows from then on
        self.moves: list[tuple[int, Compaction]] = []
        self._masks: dict[tuple[int, int, str, int, bool], Any] = {}
        self._rotations: dict[tuple[int, int, str, int, bool], Any] = {}
        self._cuts = 0
        self._moved = False
        self.beside: dict[str, Any] = {}  # arguments by which the decoder adds to visual tokens before later layers
        config = adapter.language_model.config
        self._flash = "flash" in str(getattr(config, "_attn_implementation", ""))

    # --- the base ---------------------------------------------------------------------------------------------------

    def begin(self, compaction: Compaction | None, policy: str, embeds: Tensor) -> dict[str, Any]:
        """Arguments for the decoder: shortened rows, and the mask and positions that fit them.

        Args:
            compaction: what shortens rows at the input; None where nothing leaves there.
            policy: "compact" or "keep", of positions there.
            embeds: `[B, S, D]`, with what a method merged.
        """
        past, length = self.past, self.length
        mask, positions = self._inputs.mask, self._inputs.positions
        if positions is None:
            positions = torch.arange(past, past + length, device=embeds.device)[None]  # [1, S]
        first = self.before.segments[0] if self.before else None
        if first is not None:
            old_mask = first.mask(mask, self.before.length, past)  # type: ignore[union-attr]
        else:
            old_mask = self._inputs.past_mask
        new_mask = self._inputs.new_mask  # [B, S]
        self.attended = None if new_mask is None else new_mask.to(torch.bool)
        if compaction is not None:
            check_padding_between(self.adapter.language_model.config, past, compaction.padded)
            positions = compaction.positions(positions, policy)  # [..., B, P]
            embeds = compaction.rows(embeds)  # [B, P, D]
            new_mask = compaction.real.to(torch.int64 if mask is None else mask.dtype) if compaction.padded else None
            self.real = self.attended = compaction.real if compaction.padded else None
            self.compaction = compaction
            self.moves.append((0, compaction))
            if policy == "compact":
                self.shift = compaction.removed
        if first is not None:
            positions = positions - first.shift.to(positions.device)[:, None]
        self._note(0)
        if self._whole is not None:
            return {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": self._masks_of_base()}
        # without mask and cache, transformers takes gaps in position ids for the ends of packed sequences
        gaps = compaction is not None and policy == "keep"
        if mask is None and old_mask is None and new_mask is None and not gaps:
            return {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": None}
        old_length = past - (self.before.hidden() if self.before else 0)
        kind = {"device": embeds.device, "dtype": torch.int64 if mask is None else mask.dtype}
        if old_mask is None:
            old_mask = torch.ones(self.batch_size, old_length, **kind)
        if new_mask is None:
            new_mask = torch.ones(self.batch_size, embeds.shape[1], **kind)
        full = torch.cat([old_mask, new_mask.to(old_mask.device)], dim=1)  # [B, keys held + P]
        return {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": full}

    def _note(self, layer: int) -> None:
        """Write down the segment that begins at `layer`."""
        if self.compaction is None:
            slots = torch.arange(self.past, self.past + self.length, device=self.device).expand(self.batch_size, -1)
            padded = False
        else:
            slots = self.compaction.index + self.past  # [B, P]
            padded = self.compaction.padded
            if padded:
                slots = slots.masked_fill(~self.compaction.real, -1)
        shift = (
            torch.zeros(self.batch_size, dtype=torch.int64, device=self.device) if self.shift is None else self.shift
        )
        self.segments.append(Segment(layer, slots, shift, padded, self._moved))

    # --- a layer ----------------------------------------------------------------------------------------------------

    def cut(self, layer: int, compaction: Compaction, policy: str) -> None:
        """Tokens leave before `layer`."""
        check_padding_between(self.adapter.language_model.config, self.past, compaction.padded)
        self._cuts += 1
        self.index = compaction.index if self.index is None else compaction.rows(self.index)  # [B, P]
        closed = self.closed if isinstance(self.closed, int) else compaction.rows(self.closed)
        if policy == "compact":
            closed = compaction.removed_before + closed
            self.shift = compaction.removed if self.shift is None else self.shift + compaction.removed
            self._moved = True
        self.closed = closed
        self.real = self.attended = compaction.real if compaction.padded else None
        self.compaction = compaction.after(self.compaction)
        self.moves.append((layer, self.compaction))
        self._note(layer)
        self._cut_beside(compaction)

    def _cut_beside(self, compaction: Compaction) -> None:
        """Shorten in place what the decoder, which is running, adds before layers to come."""
        if not self.beside:
            return
        for name, value in self.adapter.per_token_kwargs(self.beside, compaction.rows, compaction.real).items():
            there = self.beside[name]
            if isinstance(there, Tensor):
                there.data = value
            else:  # by layer
                there.update(value)

    @property
    def made_whole(self) -> bool:
        """Whether masks were made for whole rows, which may let a token see others than those before it."""
        return self._whole is not None

    def differs(self, layer: int) -> bool:
        """Whether this layer needs other arguments than the base."""
        return self._cuts > 0 or (self.before is not None and self.before.segment(layer).first_layer > 0)

    def seen(self, layer: int) -> Tensor | None:
        """`[B, K]` bool: which of the keys that a layer's cache held before this call are no padding; None: all."""
        mask, before = self._inputs.mask, self.before
        seen = self._inputs.past_mask
        if before is not None:
            seen = before.segment(layer).mask(mask, before.length, self.past)
        return None if seen is None else seen.to(torch.bool)

    def arguments(self, layer: int, hidden: Tensor, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a layer, from those that were made for the base."""
        first = self.before.segment(layer).first_layer if self.before else 0
        turned = kwargs.get("position_embeddings") is not None  # some layers of a kind may have no rotation
        key = (self._cuts, first, self.adapter.layer_kind(layer), hidden.shape[1], turned)
        changed = dict(kwargs)
        if "attention_mask" in kwargs:
            if key not in self._masks:
                self._masks[key] = self._fitted(layer, hidden, kwargs["attention_mask"])
            changed["attention_mask"] = _last_rows(self._masks[key], hidden.shape[1])
        if key not in self._rotations:
            self._rotations[key] = self._rotation(layer, hidden, kwargs)
        changed.update(self._rotations[key])
        return changed

    @property
    def _rows(self) -> int:
        """P."""
        return self.segments[-1].slots.shape[1]

    def _fitted(self, layer: int, hidden: Tensor, mask: Any) -> Any:
        kind = self.adapter.layer_kind(layer)
        if kind in RECURRENT:
            return mask if self.index is None else self._recurrent()
        if self._whole is not None:
            return self.of_whole(layer, kind)
        return (self._anew if self._made_short(layer) else self._mask)(layer, hidden, mask)

    # --- masks that were made for whole rows --------------------------------------------------------------------------

    def _masks_of_base(self) -> Any:
        """Masks for the rows that the decoder is given, by kind of layer, or one for all; each fits the first layer of
        its kind."""
        kinds = [self.adapter.layer_kind(layer) for layer in range(len(self.adapter.layers))]
        if self._whole.kinds is None:  # type: ignore[union-attr]
            return self.of_whole(0, kinds[0])
        return {
            kind: self._recurrent() if kind in RECURRENT else self.of_whole(kinds.index(kind), kind)
            for kind in dict.fromkeys(kinds)
        }

    def of_whole(self, layer: int, kind: str) -> Any:
        """The mask of a layer, of those that were made for whole rows."""
        if self.compaction is None and self.before is None:
            return self._whole.of(kind)  # type: ignore[union-attr]
        index = None if self.compaction is None else self.compaction.index
        start = torch.arange(self.length, device=self.device).expand(self.batch_size, -1) if index is None else index
        rows = start + self.past  # [B, P]
        return self._whole.fitted(kind, index, rows, self._held(self.adapter.key_layer(layer), rows))  # type: ignore[union-attr]

    def _held(self, layer: int, rows: Tensor) -> HeldKeys:
        """The keys that a layer attends to, those of `rows` `[B, P]` last."""
        old = torch.arange(self.past, device=self.device).expand(self.batch_size, -1)
        padded = False
        if self.before is not None:
            segment = self.before.segment(layer)
            old = torch.cat([segment.slots.to(self.device), old[:, self.before.length :]], dim=1)
            padded = segment.padded
        cached = self._inputs.cache.layers if self._inputs.cache is not None else ()
        if layer < len(cached) and getattr(cached[layer], "is_sliding", False):  # it holds the last ones only
            old = old[:, max(old.shape[1] - cached[layer].sliding_window + 1, 0) :]
        real = None
        if padded or (self.compaction is not None and self.compaction.padded):
            new = torch.ones_like(rows, dtype=torch.bool) if self.compaction is None else self.compaction.real
            real = torch.cat([old >= 0, new.to(old.device)], dim=1)
        return HeldKeys(torch.cat([old, rows.to(old.device)], dim=1), real, old.shape[1])

    def _recurrent(self) -> Tensor | None:
        """`[B, P]`, 0 at padding, for a layer that goes along the row; None: there is none, or one token alone runs."""
        if self.attended is None or self.attended.shape[1] == 1:
            return None
        return self.attended.to(torch.int64)

    # --- masks that the decoder made for the base ---------------------------------------------------------------------

    def _rotation(self, layer: int, hidden: Tensor, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = {}
        positions, rotation = kwargs.get("position_ids"), kwargs.get("position_embeddings")
        late: Tensor | None = None
        if self.before is not None and self.before.segment(layer).moved:
            late = self.before.segment(layer).shift - self.before.segments[0].shift
        moved = self._moved or late is not None
        if positions is not None:
            positions = self._take(positions, -1)
            if self._moved:
                positions = positions - self.closed
            if late is not None:
                positions = positions - late.to(positions.device)[:, None]
            changed["position_ids"] = positions
        if rotation is not None:
            alone = hidden.shape[1] < self._rows  # the last tokens, where layers reuse keys of others
            if moved:
                if positions is None:
                    raise ValueError(
                        "This model's decoder layers get no position ids, so positions cannot be closed up at a layer; "
                        "use positions='keep'."
                    )
                positions = positions[..., -hidden.shape[1] :]
                changed["position_embeddings"] = self.adapter.rotary(hidden, positions, layer)
            elif not alone:
                whole = isinstance(rotation, Tensor)  # complex numbers in one tensor (Llama 4)
                taken = [self._take(part, -2) for part in ([rotation] if whole else rotation)]
                changed["position_embeddings"] = taken[0] if whole else tuple(taken)
        return changed

    def _take(self, values: Tensor, dim: int) -> Tensor:
        """Of values by base place along `dim` (rows in the dimension before it), those of the tokens that are left."""
        return values if self.index is None else along(values, self.index, dim)

    def _mask(self, layer: int, hidden: Tensor, mask: Any) -> Any:
        columns, seen = self._columns(layer)  # [B, K] each
        queries = hidden.shape[1]
        past = columns.shape[1] - queries
        if mask is None:
            if seen is None or self._flash:
                return None if seen is None else seen.to(torch.int64)
            causal = torch.ones(queries, columns.shape[1], dtype=torch.bool, device=hidden.device).tril(past)
            return see_something((causal & seen[:, None])[:, None], past)
        if not isinstance(mask, Tensor):
            raise ValueError(
                f"A layer was given a {type(mask).__name__} for a mask; tokens can leave inside the decoder with SDPA, "
                "eager and flash attention only. Load the model with attn_implementation='sdpa'."
            )
        if mask.dim() == 2:  # flash attention
            taken = mask.gather(1, columns.to(mask.device))
            return taken if seen is None else taken * seen.to(mask.dtype)
        index = columns.to(mask.device)[:, None, None]
        if self.index is not None and mask.shape[2] == self.segments[0].slots.shape[1]:
            rows = self.index.to(mask.device)[:, None, :, None]
            mask = mask.expand(self.batch_size, *mask.shape[1:])
            mask = mask.gather(2, rows.expand(-1, mask.shape[1], -1, mask.shape[3]))  # [B, 1, P, base keys]
        mask = mask.expand(self.batch_size, *mask.shape[1:])
        mask = mask.gather(3, index.expand(-1, mask.shape[1], mask.shape[2], -1))  # [B, 1, P, K]
        if seen is None:
            return mask
        hidden_keys = ~seen.to(mask.device)[:, None, None]  # [B, 1, 1, K]
        if mask.dtype == torch.bool:
            return see_something(mask & ~hidden_keys, past)
        return mask.masked_fill(hidden_keys, torch.finfo(mask.dtype).min)

    def _made_short(self, layer: int) -> bool:
        """Whether the masks of this layer's kind were made for fewer keys than the base's: the first layer of the kind
        comes after a cut of an earlier call."""
        if self.before is None:
            return False
        kind = self.adapter.layer_kind(layer)
        first = next(other for other in range(layer + 1) if self.adapter.layer_kind(other) == kind)
        return self.before.segment(first).first_layer > 0

    def _anew(self, layer: int, hidden: Tensor, mask: Any) -> Tensor:
        """A causal mask over the keys that this layer holds, in the form of `mask`."""
        old = self.seen(layer)
        if old is None:
            held = self.past - (self.before.hidden(layer) if self.before else 0)
            old = torch.ones(self.batch_size, held, dtype=torch.bool, device=hidden.device)
        new = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if self.attended is not None:
            new = self.attended.to(hidden.device)
        seen = torch.cat([old.to(hidden.device), new], dim=1)  # [B, K]
        if self._flash or (isinstance(mask, Tensor) and mask.dim() == 2):
            return seen.to(torch.int64)
        past = old.shape[1]
        causal = torch.ones(hidden.shape[1], seen.shape[1], dtype=torch.bool, device=hidden.device).tril(past)
        allowed = see_something((causal & seen[:, None])[:, None], past)
        if not isinstance(mask, Tensor) or mask.dtype == torch.bool:
            return allowed
        return torch.zeros(allowed.shape, dtype=mask.dtype, device=mask.device).masked_fill(
            ~allowed, torch.finfo(mask.dtype).min
        )

    def _columns(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Which of the base's keys this layer holds, `[B, K]`, and which of them are real (None: all)."""
        rows, device = self.batch_size, self.device
        parts, seen = [], []
        held = 0
        if self.past:
            if self.before is None:
                parts.append(torch.arange(self.past, device=device).expand(rows, -1))
                held = self.past
                seen.append(torch.ones(rows, held, dtype=torch.bool, device=device))
            else:
                columns, real = self._cached_columns(layer, self.before)
                parts.append(columns)
                seen.append(real)
                held = self.past - self.before.hidden()
        if self.index is None:
            base = self.length if self.compaction is None else self.compaction.index.shape[1]
            parts.append(held + torch.arange(base, device=device).expand(rows, -1))
        else:
            parts.append(held + self.index)
        last = parts[-1]
        seen.append(torch.ones_like(last, dtype=torch.bool) if self.real is None else self.real.to(device))
        columns = torch.cat(parts, dim=1)  # [B, K]
        padded = self.real is not None or (self.before is not None and self.before.segment(layer).padded)
        return columns, torch.cat(seen, dim=1) if padded else None

    def _cached_columns(self, layer: int, before: PrunedPrompt) -> tuple[Tensor, Tensor]:
        base, segment = before.segments[0], before.segment(layer)
        width = base.slots.shape[1]
        place = torch.zeros(self.batch_size, before.length + 1, dtype=torch.int64, device=self.device)
        at = torch.arange(width, device=self.device).expand(self.batch_size, -1)
        slots = base.slots.to(self.device)
        place = place.scatter(1, torch.where(slots < 0, before.length, slots), at)
        mine = segment.slots.to(self.device)
        columns = place.gather(1, mine.clamp(min=0))
        later = self.past - before.length
        tail = width + torch.arange(later, device=self.device).expand(self.batch_size, -1)
        real = torch.cat([mine >= 0, torch.ones_like(tail, dtype=torch.bool)], dim=1)
        return torch.cat([columns, tail], dim=1), real

    # --- afterwards -------------------------------------------------------------------------------------------------

    def result(self) -> PrunedPrompt | None:
        """The map of the cache's keys after this pass, or None if nothing left in it and nothing had left before."""
        if self.compaction is None:
            return None
        before, past = self.before, self.past
        firsts = {segment.first_layer for segment in self.segments}
        if before is not None:
            firsts |= {segment.first_layer for segment in before.segments}
        merged = []
        for layer in sorted(firsts):
            new = next(segment for segment in reversed(self.segments) if segment.first_layer <= layer)
            begun, parts, shift, padded, moved = 0, [], new.shift, new.padded, new.moved
            if before is not None:
                old = before.segment(layer)
                parts.append(old.slots.to(self.device))
                begun, shift = before.length, shift + old.shift.to(self.device)
                padded, moved = padded or old.padded, moved or old.moved
            parts.append(torch.arange(begun, past, device=self.device).expand(self.batch_size, -1))
            slots = torch.cat([*parts, new.slots], dim=1)
            merged.append(replace(new, first_layer=layer, slots=slots, shift=shift, padded=padded, moved=moved))
        return PrunedPrompt(tuple(merged), past + self.length)


def _last_rows(mask: Any, rows: int) -> Any:
    """A layer's mask for its last `rows` tokens, where those alone run; else as it is."""
    return mask[:, :, -rows:] if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] > rows else mask
