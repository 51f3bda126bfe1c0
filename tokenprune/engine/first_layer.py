"""What is about to enter the decoder's first layer, for stages at `input` that read its attention."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.capture.decoder_attention import LayerInput
from tokenprune.engine.decoder_pass import DecoderPass
from tokenprune.engine.guards import check_cached_keys
from tokenprune.engine.whole_masks import WholeMasks, seen_by_row
from tokenprune.interfaces.adapter import Adapter
from tokenprune.state.call_inputs import CallInputs
from tokenprune.state.kv_cache import pruned_prompt


def entering(
    adapter: Adapter,
    inputs: CallInputs,
    embeds: Tensor,
    gone: Tensor | None,
    policy: str,
    masks: WholeMasks | None = None,
) -> LayerInput:
    """What layer 0 would be given if nothing more left: rows at full length, in which tokens that the tower took out
    are hidden, with the positions and keys of earlier turns that it would have.

    Args:
        adapter: the family.
        inputs: what the decoder was given.
        embeds: `[B, S, D]`.
        gone: `[B, S]` bool, tokens that left before; None if none did.
        policy: "compact" or "keep", of positions where they left.
        masks: those for the whole rows, where the decoder does not make its own.
    """
    before = pruned_prompt(inputs.cache)
    positions = inputs.positions
    if positions is None:
        positions = torch.arange(inputs.past, inputs.past + inputs.length, device=embeds.device)[None]
        positions = positions.expand(3, 1, -1) if adapter.mrope else positions
    elif adapter.mrope and positions.shape[0] == 4:  # the first are positions in the text, for masks
        positions = positions[1:]
    attended = inputs.attended(embeds.device)
    if gone is not None:
        attended = ~gone if attended is None else attended & ~gone
        if policy == "compact":
            positions = positions - gone.cumsum(1).to(positions.device)
    if before is not None:
        positions = positions - before.segments[0].shift.to(positions.device)[:, None]
    keys = seen = None
    current = DecoderPass(adapter, before, inputs, masks)
    sees = None if masks is None else seen_by_row(current.of_whole(0, adapter.layer_kind(0)))  # [B, S, K + S]
    if sees is not None and gone is not None:
        itself = torch.eye(inputs.length, dtype=torch.bool, device=sees.device)
        here = (sees[..., -inputs.length :] & ~gone.to(sees.device)[:, None]) | itself
        sees = torch.cat([sees[..., : -inputs.length], here], dim=2)
    if inputs.past:
        keys, seen = inputs.cache.layers[0].keys, current.seen(0)  # [B, Hk, K, d], [B, K]
        check_cached_keys(keys, inputs.past - (0 if before is None else before.hidden(0)), 0, inputs.cache)
    rotation = adapter.rotary(embeds, positions, 0)
    return LayerInput(adapter.layers[0], embeds, rotation, attended, keys, seen, sees=sees)
