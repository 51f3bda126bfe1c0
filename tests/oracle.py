"""The masked model: what every pruned run is compared with.

Slow, simple, written once. It is the unpruned, full-length model in which the dropped visual positions are hidden by an
attention mask, with the positions that the pruned run uses. It keeps no cache.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of the truth."""
    return float((value.double() - truth.double()).norm() / truth.double().norm())


@contextmanager
def decoder_inputs(handle: Any):
    """Collect what the decoder was given at each call, after pruning."""
    calls: list[dict[str, Any]] = []
    hook = handle.adapter.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


class MaskedModel:
    """The full-length model with hidden positions.

    Args:
        adapter: the model's adapter (for the seams only).
        batch: the inputs of the pruned run.
        kept: `handle.kept` of that run.
        policy: "compact" or "keep".
        merged: embeddings `[T, D]` that stand at the kept visual places, row by row, for methods that merge; None for
            methods that only drop.
    """

    def __init__(
        self,
        adapter: Any,
        batch: dict[str, Tensor],
        kept: list[list[Tensor]],
        policy: str,
        merged: Tensor | None = None,
    ) -> None:
        self.adapter, self.model = adapter, adapter.model
        ids, self.mask = batch["input_ids"], batch["attention_mask"].clone()
        visual = ids == adapter.image_token_id
        self.embeds = self.model.get_input_embeddings()(ids)
        if "pixel_values" in batch:
            features = self.model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output
            self.embeds = self.embeds.clone()
            self.embeds[visual] = torch.cat(list(features)).to(self.embeds.dtype)
        self.stays = torch.ones_like(ids, dtype=torch.bool)
        for row, images in enumerate(kept):
            places = visual[row].nonzero()[:, 0]
            self.stays[row, places] = False
            start = 0
            for indices in images:
                self.stays[row, places[start + indices]] = True
                # images of one size: what these tests use
                start += len(places) // len(images)
        if merged is not None:
            self.embeds[visual & self.stays] = merged
        self.visible = self.mask * self.stays
        self.policy = policy
        self.removed_before = (~self.stays).cumsum(1)

    def positions(self, position_ids: Tensor | None = None) -> Tensor:
        """Positions `[B, S]` of the pruned run, at every place of the full row."""
        if position_ids is None:  # what generate() counts from the mask
            position_ids = (self.mask.cumsum(1) - 1).masked_fill(self.mask == 0, 0)
        return position_ids - self.removed_before if self.policy == "compact" else position_ids

    @torch.no_grad()
    def logits(self, position_ids: Tensor | None = None) -> Tensor:
        """`[T, V]` at every attended token that stays, row by row."""
        hidden = self._decode(self.embeds, self.visible, self.positions(position_ids))
        return self.model.lm_head(hidden)[self.visible.bool()]

    @torch.no_grad()
    def continuation(self, tokens: Tensor) -> Tensor:
        """Logits `[B, T, V]` that predict each of `tokens` `[B, T]`, given the prompt and the tokens before it.

        Tokens are greedy exactly if each is the argmax here: by induction this is the same as choosing them one by
        one, and one pass instead of T. As `generate` does, rows go on after their last column, padding or not.
        """
        embeds = torch.cat([self.embeds, self.model.get_input_embeddings()(tokens)], dim=1)
        mask = torch.cat([self.visible, torch.ones_like(tokens)], dim=1)
        positions = self.positions()
        following = positions[:, -1:] + 1 + torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self._decode(embeds, mask, torch.cat([positions, following], dim=1))
        return self.model.lm_head(hidden[:, -tokens.shape[1] - 1 : -1])

    def _decode(self, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        # hooks of a method that is still applied must not act here
        decoder = self.adapter.language_model
        output = decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
        return output.last_hidden_state


def example_hints(method: Any, images: int) -> dict[str, list[Any]]:
    """A value for every hint that a method may want."""
    known = {
        "boxes": [
            [[0.1, 0.2, 0.3, 0.5]] if i % 2 == 0 else [[0.6, 0.1, 0.9, 0.2], [0.0, 0.8, 0.1, 1.0]]
            for i in range(images)
        ]
    }
    return {name: known[name] for name in method.hints}


def run_pruned(model: Any, method: Any, keep: Any, batch: dict[str, Tensor], **options: Any) -> dict[str, Any]:
    """Forward and 20 greedy tokens of the pruned model, and the masked model that they must equal."""
    import tokenprune

    images = batch["pixel_values"].shape[0] if "pixel_values" in batch else 0
    positions = (batch["attention_mask"].cumsum(1) - 1).masked_fill(batch["attention_mask"] == 0, 0)
    with tokenprune.applied(model, method, keep=keep, **options) as handle, torch.no_grad():
        if handle.method.hints:
            handle.set_hints(**example_hints(handle.method, images))
        with decoder_inputs(handle) as calls:
            output = model(**batch, position_ids=positions)
        kept, report = handle.kept, handle.report()
        generated = model.generate(
            **batch, max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        adapter, policy, merging = handle.adapter, handle.method.positions, handle.method.merges
    fed = calls[0]
    attended = (
        fed["attention_mask"].bool()
        if fed["attention_mask"] is not None
        else torch.ones(fed["inputs_embeds"].shape[:2]).bool()
    )
    return {
        "adapter": adapter,
        "policy": policy,
        "merges": merging,
        "kept": kept,
        "report": report,
        "fed": fed["inputs_embeds"],
        "attended": attended,
        "logits": output.logits[attended],
        "cache": output.past_key_values,
        "tokens": generated.sequences[:, batch["input_ids"].shape[1] :],
        "scores": torch.stack(generated.logits, 1),
    }


def compare(run: dict[str, Any], batch: dict[str, Tensor], tolerance: float) -> None:
    """Everything that `run_pruned` gave, against the masked model.

    Args:
        tolerance: relative error of logits.
    """
    visual = batch["input_ids"] == run["adapter"].image_token_id
    masked = MaskedModel(run["adapter"], batch, run["kept"], run["policy"])
    fed, expected = run["fed"][run["attended"]], masked.embeds[masked.visible.bool()]
    assert fed.shape == expected.shape
    if run["merges"]:
        merged = fed[visual[masked.visible.bool()]]
        masked = MaskedModel(run["adapter"], batch, run["kept"], run["policy"], merged)
    else:
        assert torch.equal(fed, expected), "kept tokens must go on bit for bit"
    assert relative_error(run["logits"], masked.logits()) < tolerance
    scores = masked.continuation(run["tokens"])
    assert torch.equal(run["tokens"], scores.argmax(-1)), "the greedy tokens differ"
    assert relative_error(run["scores"], scores) < tolerance
