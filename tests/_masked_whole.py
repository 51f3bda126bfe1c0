"""The masked model of any class: its own forward, whole, with pixels and without a cache, whose decoder layers are
hooked so that each hides the dropped places from the mask that it was given.

It knows less than `masked_reference.py`, which calls the decoder by itself: nothing of what a class hands its decoder,
and nothing of its masks but their form. So what a class does with a mask (windows, pictures that see themselves both
ways) stays the model's own. Positions are closed up by hand at the input and by the decoder's own rotary module later.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from _masked_cache import check_cache
from _masked_cells import masked_cells, patches_of_tokens
from masked_reference import decoder_inputs, relative_error
from torch import Tensor

from tokenprune.engine.whole_masks import RECURRENT

_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


class WholeMasked:
    """The full-length model of one run of `masked_reference.run_pruned`.

    Args:
        run: what that returned.
        batch: the inputs of the pruned run.
    """

    def __init__(self, run: dict[str, Any], batch: dict[str, Tensor]) -> None:
        self.adapter, self.model, self.batch = run["adapter"], run["adapter"].model, dict(batch)
        self.mask, self.tower = batch["attention_mask"], run["tower"]
        cut = any(work.cuts for _, work in self.tower)
        last = self.adapter.vision.blocks[self.adapter.tower.feature_layer] if cut else None
        kinds = dict.fromkeys(kind for kind, _ in self.tower)
        self.patches = {kind: patches_of_tokens(self.adapter, last, batch, kind) for kind in kinds} if cut else None
        stays, closed = torch.ones_like(self.mask, dtype=torch.bool), torch.zeros_like(self.mask)
        by_layer = {}
        for site, kept in run["cuts"]:
            before = stays.clone()
            for span, tokens in zip(run["layout"].spans, kept):
                offsets = span.visual.offsets
                places = span.places if offsets is None or tokens is None else span.places[offsets]
                stays[span.sample, span.places] = False
                stays[span.sample, places if tokens is None else places[tokens.cpu()]] = True
            stays = stays & before
            if run["policies"][site] == "compact":
                closed = closed + (before & ~stays).cumsum(1)
            by_layer[int(site.partition(":")[2]) if site.startswith("layer") else 0] = (stays.clone(), closed.clone())
        whole = (torch.ones_like(stays), torch.zeros_like(closed))
        found = [
            max((first for first in by_layer if first <= i), default=None) for i in range(len(self.adapter.layers))
        ]
        self.layers = [whole if first is None else by_layer[first] for first in found]
        self.after_input = self.layers[0][0]
        self.visible = self.mask.bool() & self.layers[-1][0]

    def logits(self) -> Tensor:
        """`[T, V]` at every attended token that stays, row by row."""
        return self._run()[self.visible]

    def continuation(self, tokens: Tensor) -> Tensor:
        """`[B, T, V]`, see `MaskedModel.continuation`."""
        count = tokens.shape[1]
        return self._run(tokens)[:, -count - 1 : -1]

    def _masked_tower(self) -> Any:
        if self.patches is None:
            return contextlib.nullcontext()
        return masked_cells(self.adapter, self.tower, self.patches)

    def inputs(self) -> Tensor:
        """`[B, S, D]` of the decoder, before anything leaves."""
        if self.adapter.entry is self.adapter.language_model:
            with torch.no_grad():
                return self._entering_layers()
        with self._masked_tower(), decoder_inputs(self.adapter) as calls, torch.no_grad():
            self.model(**self.batch, use_cache=False)
        return calls[0]["inputs_embeds"]

    def _entering_layers(self) -> Tensor:
        """`[B, S, D]`, what enters the first layer of a decoder that merges by itself."""
        found: list[Tensor] = []
        hook = self.adapter.layers[0].register_forward_pre_hook(lambda module, args: found.append(args[0]))
        try:
            self.model(**self.batch, use_cache=False)
        finally:
            hook.remove()
        return found[0]

    @torch.no_grad()
    def _run(self, tokens: Tensor | None = None) -> Tensor:
        more = 0 if tokens is None else tokens.shape[1]
        batch = dict(self.batch)
        if tokens is not None:
            batch["input_ids"] = torch.cat([batch["input_ids"], tokens], dim=1)
            batch["attention_mask"] = torch.cat([self.mask, torch.ones_like(tokens)], dim=1)
            for name in (name for name in _TYPES if name in batch):
                # where 0 is the prompt, which sees itself both ways, an answer is 1; where it is text, an answer is 0
                prefix = name == "token_type_ids" and not bool(batch[name].any())
                batch[name] = torch.cat([batch[name], torch.full_like(tokens, int(prefix))], dim=1)
        if not self.adapter.mrope:
            counted = (self.mask.cumsum(1) - 1).masked_fill(self.mask == 0, 0)
            counted = torch.cat([counted, counted[:, -1:] + 1 + torch.arange(more)], dim=1)
            batch["position_ids"] = counted - self._closed(0, more)
        along = [i for i in range(len(self.layers)) if self.adapter.layer_kind(i) in RECURRENT]
        handles = [
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, i=i: self._hide(i, batch, more, args, kwargs), with_kwargs=True
            )
            for i, layer in enumerate(self.adapter.layers)
            if i not in along
        ]
        for i in along:
            self.adapter.layers[i].forward = self._along(i, batch, self.adapter.layers[i].forward)
        try:
            with self._masked_tower():
                return self.model(**batch, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
            for i in along:
                del self.adapter.layers[i].forward

    def _seen(self, layer: int, batch: dict[str, Tensor]) -> Tensor:
        """`[B, S]` bool: the tokens that are there for a layer, padding not among them."""
        mask, stays = batch["attention_mask"].bool(), self.layers[layer][0]
        more = torch.ones(stays.shape[0], mask.shape[1] - stays.shape[1], dtype=torch.bool)
        return torch.cat([stays, more], dim=1) & mask

    def _along(self, layer: int, batch: dict[str, Tensor], forward: Any) -> Any:
        """A layer that goes along the row, run on what is there of each row alone: a hidden token would still move its
        state."""

        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            made = hidden_states.clone()
            for row, there in enumerate(self._seen(layer, batch)):
                given = {**kwargs, "attention_mask": None}
                made[row, there] = forward(hidden_states[row : row + 1, there], *args, **given)[0]
            return made

        return run

    def _closed(self, layer: int, more: int) -> Tensor:
        closed = self.layers[layer][1]
        return torch.cat([closed, closed[:, -1:].expand(-1, more)], dim=1)

    def _hide(self, layer: int, batch: dict[str, Tensor], more: int, args: Any, kwargs: dict[str, Any]) -> Any:
        mask, length = kwargs.get("attention_mask"), batch["input_ids"].shape[1]
        seen = self._seen(layer, batch)
        allowed = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if mask is not None:
            allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        allowed = allowed.expand(len(seen), -1, -1, -1) & seen[:, None, None]
        # a row that sees nothing sees itself
        allowed = allowed | (torch.eye(length, dtype=torch.bool) & ~allowed.any(-1, keepdim=True))
        if self.adapter.language_model.config._attn_implementation == "eager":
            low = torch.finfo(torch.float32).min
            allowed = torch.zeros(allowed.shape).masked_fill(~allowed, low)
        changed = {**kwargs, "attention_mask": allowed}
        closed, first = self._closed(layer, more), self._closed(0, more)
        if not torch.equal(closed, first):
            hidden = args[0] if args else kwargs["hidden_states"]
            positions = batch["position_ids"] + first - closed
            changed["position_ids"] = positions
            if kwargs.get("position_embeddings") is not None:  # None: a layer without rotation
                changed["position_embeddings"] = self.adapter.rotary(hidden, positions, layer)
        return args, changed


def _said(logits: Tensor) -> Tensor:
    """`[V]` bool: words that a class lets itself say; it gives others the lowest number, beside which none counts."""
    return (logits > torch.finfo(logits.dtype).min).any(0)


def compare_whole(run: dict[str, Any], batch: dict[str, Tensor], tolerance: float, silent: list[int]) -> None:
    """Everything that `run_pruned` gave, against the whole masked model.

    Args:
        tolerance: relative error of logits.
        silent: ids that were not to be generated.
    """
    masked = WholeMasked(run, batch)
    visible = masked.mask.bool() & masked.after_input
    fed, expected = run["fed"][run["attended"]], masked.inputs()[visible]
    if run["exact"]:
        assert torch.equal(fed, expected), "kept tokens must go on bit for bit"
    else:
        assert fed.shape == expected.shape and relative_error(fed, expected) < tolerance, "features of kept tokens"
    truth = masked.logits()
    assert run["logits"].shape == truth.shape
    said = _said(truth)
    assert torch.equal(said, _said(run["logits"]))
    assert relative_error(run["logits"][:, said], truth[:, said]) < tolerance
    scores = masked.continuation(run["tokens"])
    assert relative_error(run["scores"][..., said], scores[..., said]) < tolerance
    scores[..., [token for token in silent if token < scores.shape[-1]]] = float("-inf")
    assert torch.equal(run["tokens"], scores.argmax(-1)), "the greedy tokens differ"
    check_cache(run)
