"""From the arguments of a forward call to its prompts: where visual tokens are, what is padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.engine.guards import check_attended, check_cache, check_packed, check_repeated, warn_of_features
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.visual import Pictures, Visual, features_in
from tokenprune.state.call_inputs import CallInputs
from tokenprune.state.forward_call import ForwardCall
from tokenprune.state.prompt_layout import build_layout
from tokenprune.state.prompt_state import Prompt
from tokenprune.state.tower_recording import Recording, joined_sources, rows_of, sources_of

Tiles = tuple[tuple[int, ...], ...] | None


def prompt_visuals(adapter: Adapter, kind: str, call: Mapping[str, Any]) -> list[Visual]:
    """The pictures or videos of a call, by its arguments, as they stand in its prompts.

    Raises:
        ValueError: they do not fit the prompts.
    """
    ids = call["input_ids"].cpu()

    def pictures(kind: str, row: int, places: Sequence[Tensor]) -> Pictures | None:
        return adapter.pictures(kind, ids[row], places)

    there = {kind: placeholders_in(adapter, ids, call)[kind]}
    layout = build_layout(there, {kind: adapter.visuals(kind, call)}, pictures)
    return [span.visual for span in layout.spans]


def placeholders_in(adapter: Adapter, ids: Tensor, call: Mapping[str, Any]) -> dict[str, Tensor]:
    """By kind of visuals, `[B, S]` bool: where the placeholders of a call stand.

    Args:
        ids: `[B, S]`, its prompts.
        call: its arguments, by name.
    """
    placeholders = {kind: ids == number for kind, number in adapter.placeholder_ids.items() if kind in adapter.features}
    return _as_passed(placeholders, _kinds_brought(adapter, call))


class PromptReader:
    """Lays out the prompts of one model's calls.

    Args:
        adapter: the model's family.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def brings_pictures(self, inputs: CallInputs) -> bool:
        """Whether a call brings pictures, encoded or not.

        Raises:
            ValueError: its cache cannot hold a pruned prompt.
        """
        self._adapter.check_call(inputs.arguments)
        if inputs.ids is not None and not inputs.ids.numel():
            return False  # what is wrong with a prompt of no tokens the model itself says
        if not _kinds_brought(self._adapter, inputs.arguments):
            warn_of_features(inputs)
            return False
        check_cache(inputs)
        return True

    def read_alone(self, inputs: CallInputs) -> Prompt | None:
        """The prompts of a call that no model runs; None where it brings no pictures.

        Raises:
            ValueError: how pictures are laid out is known behind the tower only, or see `read`.
        """
        if not self.brings_pictures(inputs):
            return None
        if self._adapter.behind_tower:
            raise ValueError(
                f"How pictures stand in a prompt of {type(self._adapter.model).__name__} is known once its tower has "
                "run, so nothing can be learned from its prompts yet; a family with a file in adapters/ can."
            )
        return self.read(inputs, ForwardCall(self._adapter.entry))

    def read(self, inputs: CallInputs, now: ForwardCall) -> Prompt:
        """The prompts of a call that brings pictures.

        Args:
            inputs: what `Adapter.entry` was given.
            now: the call. It is told how pixels are laid out, so that sizes are read once; where that is known behind
                the tower only, it says what the tower made of them.

        Raises:
            ValueError: the prompts are of a kind that cannot be pruned right; the message says which.
        """
        adapter, call = self._adapter, inputs.arguments
        encoded = call.get("mm_encoder_outputs") or {}
        sources: dict[str, list[tuple[Recording, int]]] = {}
        visuals = {}
        ids, placeholders = self._placeholders(inputs)
        placeholders = _as_passed(placeholders, _kinds_brought(adapter, call))

        def pictures(kind: str, row: int, places: Sequence[Tensor]) -> Pictures | None:
            return adapter.pictures(kind, None if ids is None else ids[row], places)

        for kind in adapter.features:
            pixels = call.get(adapter.pixels[kind])
            if encoded.get(kind) is not None:
                sources[kind] = self._sources(encoded[kind], placeholders[kind])
            elif pixels is not None and adapter.behind_tower:
                sources[kind] = rows_of(now.recordings.get(kind, []))
            elif pixels is not None:
                visuals[kind] = adapter.visuals(kind, call)
                now.laid_out[kind] = pixels, visuals[kind]
            if kind in sources:
                visuals[kind] = [recording.visuals[row] for recording, row in sources[kind]]
        layout = build_layout(placeholders, visuals, pictures)
        prompt = Prompt(layout)
        if sources and len(sources) == len(visuals):
            whole = {kind: joined_sources(rows, layout.tiles.get(kind)) for kind, rows in sources.items()}
            prompt.sources = [whole[span.visual.kind][o] for span, o in zip(layout.spans, layout.order)]
            # a tensor for each picture says which it is; of rows of one tensor, those of equal pictures are alike
            listed = {kind for kind in encoded if not isinstance(features_in(encoded[kind]), Tensor)}
            check_repeated(prompt, listed)
        mask, positions = self._rows(inputs)
        prompt.lengths = [layout.length] * layout.batch_size
        if mask is not None:
            prompt.attended = mask.to(torch.bool)
            prompt.lengths = prompt.attended.sum(1).tolist()
            # padding on the right shows as a last column that is not all ones
            prompt.pad_left = bool(prompt.attended[:, -1].all())
        check_packed(call, prompt.attended, mask, positions)
        check_attended(layout, prompt.attended)
        return prompt

    def tiles(self, kind: str, visuals: Sequence[Visual], now: ForwardCall | None, ids: Tensor | None) -> Tiles:
        """Which of the visuals that the tower is about to see make each picture of the prompts.

        Args:
            now: the call at work; None before any.
            ids: `[B, S]`, the prompts of a call of `generate` that encodes its pictures before any forward call.

        Returns:
            None where each visual is a picture or a video.

        Raises:
            LookupError: the prompts are not known.
        """
        if type(self._adapter).pictures is Adapter.pictures:
            return None
        if now is not None and now.prompt is not None:
            return now.prompt.layout.tiles.get(kind)
        on_host: Tensor | None
        if now is not None and now.waiting is not None:
            on_host, placeholders = self._placeholders(now.waiting)
        elif ids is not None:
            on_host = ids.cpu()
            placeholders = {kind: on_host == self._adapter.placeholder_ids[kind]}
        else:
            raise LookupError("no prompt is known yet")

        def pictures(kind: str, row: int, places: Sequence[Tensor]) -> Pictures | None:
            return self._adapter.pictures(kind, None if on_host is None else on_host[row], places)

        return build_layout({kind: placeholders[kind]}, {kind: visuals}, pictures).tiles.get(kind)

    # --- what the arguments hold --------------------------------------------------------------------------------------

    def _placeholders(self, inputs: CallInputs) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Ids `[B, S]` on the CPU, None where embeddings came; and by kind, `[B, S]` bool on the CPU: where the
        placeholders of visual tokens stand."""
        ids = {kind: number for kind, number in self._adapter.placeholder_ids.items() if kind in self._adapter.features}
        if inputs.ids is not None:
            on_host = inputs.ids.cpu()
            return on_host, {kind: on_host == number for kind, number in ids.items()}
        embeds = inputs.arguments["inputs_embeds"]
        table = self._adapter.model.get_input_embeddings()
        # weights that accelerate brings when they are needed are on the meta device now
        device = embeds.device if table.weight.is_meta else table.weight.device
        wanted = torch.tensor(list(ids.values()), device=device)
        rows = table(wanted).to(embeds.device)  # [kinds, D]
        same = (embeds[None] == rows[:, None, None]).all(-1).cpu()
        return None, dict(zip(ids, same))

    @staticmethod
    def _rows(inputs: CallInputs) -> tuple[Tensor | None, Tensor | None]:
        """Mask and text positions `[B, S]` on the CPU, brought there in one move; None where the call has none."""
        mask, positions = inputs.new_mask, inputs.text_positions
        if mask is None or positions is None:
            return None if mask is None else mask.cpu(), None if positions is None else positions.cpu()
        both = torch.stack([mask.to(torch.int64), positions.to(device=mask.device, dtype=torch.int64)]).cpu()
        return both[0], both[1]

    @staticmethod
    def _sources(encoded: Any, placeholders: Tensor) -> list[tuple[Recording, int]]:
        sources = sources_of(encoded, placeholders.sum(1).tolist())
        if sources is None:
            raise ValueError(
                "mm_encoder_outputs holds image features that were computed before tokenprune was applied to the "
                "model, or that were cut up since (prefill_chunk_size does that). Compute them again, pass "
                "pixel_values, or leave the prompt in one piece."
            )
        return sources


def _kinds_brought(adapter: Adapter, call: Mapping[str, Any]) -> list[str]:
    """The kinds of visuals of which a call brings pixels, or features that a tower made before it."""
    encoded = call.get("mm_encoder_outputs") or {}
    return [k for k in adapter.features if encoded.get(k) is not None or call.get(adapter.pixels[k]) is not None]


def _as_passed(placeholders: dict[str, Tensor], passed: Sequence[str]) -> dict[str, Tensor]:
    """Placeholders of a call by what it brings: GLM-4V's frames of videos stand at the placeholders of pictures. Of a
    call that brings both, that model itself knows no more which are whose."""
    there = [kind for kind, mask in placeholders.items() if bool(mask.any())]
    if len(passed) != 1 or len(there) != 1 or there == [*passed]:
        return placeholders
    (own,), (other,) = passed, there
    return {**placeholders, own: placeholders[other], other: placeholders[own]}
