"""From the arguments of a forward call to its prompts: where visual tokens are, what is padding, what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.visual import Visual
from tokenprune.seams import cache_of
from tokenprune.state.prompt_layout import Layout, build_layout
from tokenprune.state.prompt_state import Prompt
from tokenprune.state.tower_recording import Recording, sources_of

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")  # where samples of a packed row begin


class PromptReader:
    """Lays out the prompts of one model's calls.

    Args:
        adapter: the model's family.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def read(self, call: Mapping[str, Any], laid_out: dict[str, tuple[Tensor, list[Visual]]]) -> Prompt | None:
        """The prompts of a call, or None where it brings no pictures.

        Args:
            call: arguments of `Adapter.entry`, by name.
            laid_out: takes, by kind, the pixels and how they are laid out, so that sizes are read once.

        Raises:
            ValueError: the prompts are of a kind that cannot be pruned right; the message says which.
        """
        adapter = self._adapter
        encoded = call.get("mm_encoder_outputs") or {}
        given = {
            kind: encoded.get(kind) is not None or call.get(adapter.pixels[kind]) is not None
            for kind in adapter.features
        }
        if not any(given.values()):
            self._check_embeds(call)
            return None
        if getattr(cache_of(call), "is_compileable", False):
            raise ValueError(
                "A static cache has one fixed length for all layers and rows, so it cannot hold a pruned prompt, and "
                "its keys cannot be kept track of. Use the default dynamic cache (leave cache_implementation and the "
                "cache alone)."
            )
        sources: dict[str, list[tuple[Recording, int]]] = {}
        visuals = {}
        for kind in adapter.features:
            if encoded.get(kind) is not None:
                sources[kind] = self._sources(encoded[kind])
                visuals[kind] = [recording.visuals[row] for recording, row in sources[kind]]
            elif given[kind]:
                visuals[kind] = adapter.visuals(kind, call)
                laid_out[kind] = call[adapter.pixels[kind]], visuals[kind]
        layout = build_layout(self._placeholders(call), visuals)
        prompt = Prompt(layout)
        if sources:
            prompt.sources = [sources[span.visual.kind][o] for span, o in zip(layout.spans, layout.order)]
        mask, positions = self._rows(call, layout)
        prompt.lengths = [layout.length] * layout.batch_size
        if mask is not None:
            prompt.attended = mask.to(torch.bool)
            prompt.lengths = prompt.attended.sum(1).tolist()
            # padding on the right shows as a last column that is not all ones
            prompt.pad_left = bool(prompt.attended[:, -1].all())
        self._check_packed(call, prompt, mask, positions)
        self._check_attended(layout, prompt)
        return prompt

    # --- what the arguments hold --------------------------------------------------------------------------------------

    def _placeholders(self, call: Mapping[str, Any]) -> dict[str, Tensor]:
        """By kind, `[B, S]` bool on the CPU: where the placeholders of visual tokens stand."""
        ids = {kind: number for kind, number in self._adapter.placeholder_ids.items() if kind in self._adapter.features}
        input_ids = call.get("input_ids")
        if input_ids is not None:
            on_host = input_ids.cpu()
            return {kind: on_host == number for kind, number in ids.items()}
        embeds = call["inputs_embeds"]
        table = self._adapter.model.get_input_embeddings()
        # weights that accelerate brings when they are needed are on the meta device now
        device = embeds.device if table.weight.is_meta else table.weight.device
        wanted = torch.tensor(list(ids.values()), device=device)
        rows = table(wanted).to(embeds.device)  # [kinds, D]
        same = (embeds[None] == rows[:, None, None]).all(-1).cpu()
        return dict(zip(ids, same))

    @staticmethod
    def _rows(call: Mapping[str, Any], layout: Layout) -> tuple[Tensor | None, Tensor | None]:
        """Mask and text positions `[B, S]` on the CPU, brought there in one move; None where the call has none."""
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        shape = layout.batch_size, layout.length
        if isinstance(mask, Tensor):
            mask = mask[:, -layout.length :] if mask.dim() == 2 else None
        else:
            mask = None
        if isinstance(positions, Tensor):
            positions = positions if positions.dim() == 2 else positions[0]
            positions = positions.expand(shape[0], -1) if positions.shape[-1] == shape[1] else None
        else:
            positions = None
        if mask is None or positions is None:
            return None if mask is None else mask.cpu(), None if positions is None else positions.cpu()
        both = torch.stack([mask.to(torch.int64), positions.to(device=mask.device, dtype=torch.int64)]).cpu()
        return both[0], both[1]

    @staticmethod
    def _sources(encoded: Any) -> list[tuple[Recording, int]]:
        found = sources_of(encoded)
        if found is None:
            raise ValueError(
                "mm_encoder_outputs holds image features that were computed before tokenprune was applied to the "
                "model, or that were cut up since (prefill_chunk_size does that). Compute them again, pass "
                "pixel_values, or leave the prompt in one piece."
            )
        return found

    # --- what is refused ----------------------------------------------------------------------------------------------

    def _check_embeds(self, call: Mapping[str, Any]) -> None:
        """Warn where a prompt may hold pictures that nobody says are there."""
        embeds = call.get("inputs_embeds")
        if call.get("input_ids") is not None or embeds is None or embeds.shape[1] < 2:
            return
        cache = cache_of(call)
        if cache is None or cache.get_seq_length() == 0:
            warnings.warn(
                "This prompt came as inputs_embeds without pixels. If it holds visual features already, they run "
                "unpruned: which embeddings they are cannot be seen. Pass pixel_values (and input_ids, or "
                "inputs_embeds with the placeholders' own embeddings) and let the model put the features in.",
                stacklevel=2,
            )

    @staticmethod
    def _check_packed(call: Mapping[str, Any], prompt: Prompt, mask: Tensor | None, positions: Tensor | None) -> None:
        """Raise ValueError where one row holds several samples."""
        how = next((name for name in _PACKED if call.get(name) is not None), "")
        if not how and mask is not None and int(mask.max()) > 1:
            how = "an attention_mask that numbers samples"
        if not how and positions is not None:
            backwards = positions.diff(dim=1) < 0  # [B, S - 1]
            if prompt.attended is not None:
                backwards &= prompt.attended[:, 1:] & prompt.attended[:, :-1]
            how = "position_ids that go back" if bool(backwards.any()) else ""
        if how:
            raise ValueError(
                f"A row of this batch holds several samples ({how}): a method would rank the pictures of one by the "
                "text of another, and the boundaries would move. Give each sample its own row (packing=False, "
                "padding_free=False), or remove the method for packed training."
            )

    @staticmethod
    def _check_attended(layout: Layout, prompt: Prompt) -> None:
        if prompt.attended is None:
            return
        for span in layout.spans:
            hidden = int((~prompt.attended[span.sample, span.places]).sum())
            if hidden:
                raise ValueError(
                    f"The attention mask hides {hidden} of the {len(span.places)} visual tokens of a picture in row "
                    f"{span.sample}; a method would choose among tokens that nothing attends to. Mask padding only, or "
                    "leave the picture out of the prompt."
                )
