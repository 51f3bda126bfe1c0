"""The masked model: what every pruned run is compared with.

Slow, simple, written once, and it knows no family: it is the unpruned, full-length model in which the dropped visual
positions are hidden by an attention mask from their site on, in every layer, with the positions that the pruned run
uses there. It keeps no cache and shares no code with the engine but the layout of the prompt.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from _given import attended_rows, example_hints
from torch import Tensor

from tokenprune.seams import cache_in, cache_name, with_cache


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of the truth."""
    return float((value.double() - truth.double()).norm() / truth.double().norm())


@contextlib.contextmanager
def decoder_inputs(adapter: Any):
    """Collect what the decoder was given at each call, after hooks placed before this one."""
    calls: list[dict[str, Any]] = []
    hook = adapter.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


def _standing(span: Any, tokens: Tensor | None) -> Tensor:
    """Places in the row at which the tokens `tokens` of a span stand; all of its placeholders for None."""
    if tokens is None:
        return span.places
    places = span.places if span.visual.offsets is None else span.places[span.visual.offsets]
    return places[tokens.cpu()]


@contextlib.contextmanager
def tower_runs(adapter: Any, works: list[tuple[str, Any]]):
    """A list of the run of the tower that is at work, empty between them.

    Which one it is, is told by the kind of visuals that the model asks features of: models run pictures before videos
    or the other way round, whatever the prompt has first.
    """
    left = {kind: [work for own, work in works if own == kind] for kind in adapter.features}
    running: list[Any] = []
    own = {name: vars(adapter.entry)[name] for name in adapter.features.values() if name in vars(adapter.entry)}

    def told(kind: str, original: Any) -> Any:
        @functools.wraps(original)  # `generate` hands over what the signature names
        def features(*args: Any, **kwargs: Any) -> Any:
            if running:  # one features call may make use of the other
                return original(*args, **kwargs)
            assert left[kind], f"the tower runs over {kind}s that the pruned run did not have"
            running.append(left[kind].pop(0))
            try:
                return original(*args, **kwargs)
            finally:
                running.clear()

        return features

    for kind, name in adapter.features.items():
        setattr(adapter.entry, name, told(kind, getattr(adapter.entry, name)))
    try:
        yield running
        assert not any(left.values()), "a run of the tower did not come again"
    finally:
        for name in adapter.features.values():
            delattr(adapter.entry, name)
        for name, before in own.items():
            setattr(adapter.entry, name, before)


@contextlib.contextmanager
def masked_tower(adapter: Any, works: list[tuple[str, Any]]):
    """Hide the cells that left inside the vision tower: as keys, from the block after their cut on.

    For towers whose blocks take (hidden, attention_mask); `works` are the kind and the work of each run of one forward
    call, those of a kind in their order.
    """
    vision, handles = adapter.vision, []
    if not any(work.cuts for _, work in works):
        yield
        return
    if hasattr(vision.blocks[0], "attn"):
        with tower_runs(adapter, works) as running, masked_packed_tower(vision, running):
            yield
        return
    if vision.patches_per_cell > 1:  # tiles whose patches a pixel shuffle joins
        from _masked_cells import masked_cells

        pictures = max(len(work.grids) for _, work in works)
        run = vision.start(works[0][1].grids)
        length = vision.before + run.places[0].numel()
        rows = [(vision.before + run.places[0] + picture * length).tolist() for picture in range(pictures)]
        with masked_cells(adapter, works, [patches for own in rows for patches in own]):
            yield
        return

    def hook(block: int, module: Any, args: Any, kwargs: Any) -> Any:
        (work,), hidden = running, args[0]
        assert hidden.shape[0] == len(work.grids), "another run of the tower"
        cuts = [alive for after, alive in work.cuts if after < block]
        if not cuts:
            return None
        seen = torch.zeros(hidden.shape[:2], dtype=torch.bool)
        before = hidden.shape[1] - work.grids[0][0] * work.grids[0][1]
        seen[:, :before] = True
        for picture, alive in enumerate(cuts[-1]):
            seen[picture, before + (torch.arange(hidden.shape[1] - before) if alive is None else alive)] = True
        mask = torch.zeros(hidden.shape[0], 1, hidden.shape[1], hidden.shape[1])
        mask = mask.masked_fill(~seen[:, None, None], torch.finfo(hidden.dtype).min).to(hidden.dtype)
        return (hidden, mask, *args[2:]), kwargs

    try:
        for block, module in enumerate(vision.blocks):
            handles.append(
                module.register_forward_pre_hook(lambda m, a, k, b=block: hook(b, m, a, k), with_kwargs=True)
            )
        with tower_runs(adapter, works) as running:
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def masked_packed_tower(vision: Any, running: list[Any]):
    """The same for towers whose blocks take all patches in one row, cut into frames and windows: each block's attention
    is computed in the open, within its own part of the row and over the patches that are left."""
    before = [block.attn.forward for block in vision.blocks]

    def forward(block: int, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any, **rest: Any) -> Tensor:
        (work,), attn = running, vision.blocks[block].attn
        length, heads = hidden_states.shape[0], attn.num_heads
        group = vision.patches_per_cell
        assert length == group * sum(rows * cols for rows, cols in work.grids), "another run of the tower"
        seen = torch.ones(length, dtype=torch.bool)
        cuts = [alive for after, alive in work.cuts if after < block]
        if cuts:
            there, start = torch.zeros(length // group, dtype=torch.bool), 0
            for (rows, cols), alive in zip(work.grids, cuts[-1]):
                there[start + (torch.arange(rows * cols) if alive is None else alive)] = True
                start += rows * cols
            seen = there[vision.start(work.grids).order].repeat_interleave(group)
        query, key, value = attn.qkv(hidden_states).view(length, 3, heads, -1).unbind(1)
        cos, sin = (part[:, None] for part in position_embeddings)

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-second, first], dim=-1) * sin

        part = torch.bucketize(torch.arange(length), cu_seqlens, right=True)
        allowed = (part[:, None] == part[None]) & seen[None]
        allowed |= torch.eye(length, dtype=torch.bool)  # hidden patches have a softmax too
        scores = torch.einsum("qhd,khd->hqk", turned(query), turned(key)) * (query.shape[-1] ** -0.5)
        mixed = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value.transpose(0, 1)
        return attn.proj(mixed.transpose(0, 1).reshape(length, -1))

    try:
        for index, block in enumerate(vision.blocks):
            block.attn.forward = lambda *a, i=index, **k: forward(i, *a, **k)
        yield
    finally:
        for block, own in zip(vision.blocks, before):
            del block.attn.forward
            assert block.attn.forward == own


class MaskedModel:
    """The full-length model with hidden positions.

    Args:
        adapter: the model's adapter (for the seams only).
        batch: the inputs of the pruned run.
        layout: where its visual tokens are.
        cuts: (site, tokens kept of each span or None), in the order in which they ran.
        policies: "compact" or "keep" for each site.
        merged: embeddings `[T, D]` that stand at the kept visual places, row by row, for methods that merge; None for
            methods that only drop.
        tower: the kind and the work of each run of the vision tower, those of a kind in their order.
        sizes: for each of `cuts` and span, how many keys each kept token counts for from there on; None for one each.
    """

    def __init__(
        self,
        adapter: Any,
        batch: dict[str, Tensor],
        layout: Any,
        cuts: list[tuple[str, list[Tensor | None]]],
        policies: dict[str, str],
        merged: Tensor | None = None,
        tower: list[tuple[str, Any]] | None = None,
        sizes: list[list[Tensor | None]] | None = None,
    ) -> None:
        self.adapter, self.model = adapter, adapter.model
        self.mask = batch["attention_mask"]
        with masked_tower(adapter, tower or []), decoder_inputs(adapter) as calls:
            self.model(**batch, use_cache=False, **self._positions_given(batch))
        self.given = {k: v for k, v in calls[0].items() if k not in (cache_name(), "use_cache")}
        self.embeds, self.base = self.given["inputs_embeds"], self.given["position_ids"]
        layers = len(adapter.layers)
        stays = torch.ones_like(self.mask, dtype=torch.bool)
        closed = torch.zeros_like(self.mask)
        by_layer: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        counts_for = torch.ones(self.mask.shape)
        visual = torch.zeros_like(stays)
        for span in layout.spans:
            visual[span.sample, span.places] = True
        for (site, kept), numbers in zip(cuts, sizes or [[None] * len(layout.spans)] * len(cuts), strict=True):
            for span, tokens, number in zip(layout.spans, kept, numbers, strict=True):
                if number is not None:
                    counts_for[span.sample, _standing(span, tokens)] = number.float()
            before = stays.clone()
            for span, tokens in zip(layout.spans, kept):
                stays[span.sample, span.places] = False
                stays[span.sample, _standing(span, tokens)] = True
            stays = stays & before
            if policies[site] == "compact":
                closed = closed + (before & ~stays).cumsum(1)
            first = int(site.partition(":")[2]) if site.startswith("layer") else 0
            by_layer[first] = (stays.clone(), closed.clone(), counts_for.clone())
        everything = (torch.ones_like(stays), torch.zeros_like(closed), torch.ones(self.mask.shape))
        found = [max((first for first in by_layer if first <= layer), default=None) for layer in range(layers)]
        self.layers = [everything if first is None else by_layer[first] for first in found]
        self.stays, self.after_input = self.layers[-1][0], self.layers[0][0]
        self.visible = self.mask.bool() & self.stays
        self.visual = visual
        if merged is not None:
            self.embeds = self.embeds.clone()
            self.embeds[visual & self.after_input & self.mask.bool()] = merged
        self.attention = getattr(adapter.language_model.config, "_attn_implementation", "sdpa")

    def _positions_given(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.adapter.mrope:
            return {}
        # what generate() counts from the mask
        mask = batch["attention_mask"]
        return {"position_ids": (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)}

    def hidden(self) -> Tensor:
        """Last hidden states `[B, S, D]` of the full row; with gradients, if there are any."""
        return self._decode(self.embeds, self.mask, self.base, 0)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """`[T, V]` at every attended token that stays, row by row."""
        return self.model.lm_head(self.hidden())[self.visible]

    @torch.no_grad()
    def continuation(self, tokens: Tensor) -> Tensor:
        """Logits `[B, T, V]` that predict each of `tokens` `[B, T]`, given the prompt and the tokens before it.

        Tokens are greedy exactly if each is the argmax here: by induction this is the same as choosing them one by
        one, and one pass instead of T. As `generate` does, rows go on after their last column, padding or not.
        """
        count = tokens.shape[1]
        embeds = torch.cat([self.embeds, self.model.get_input_embeddings()(tokens)], dim=1)
        mask = torch.cat([self.mask, torch.ones_like(tokens)], dim=1)
        following = self.base[..., -1:] + 1 + torch.arange(count, device=tokens.device)
        positions = torch.cat([self.base, following], dim=-1)
        hidden = self._decode(embeds, mask, positions, count)
        return self.model.lm_head(hidden[:, -count - 1 : -1])

    def _decode(self, embeds: Tensor, mask: Tensor, positions: Tensor, more: int) -> Tensor:
        layers = self.adapter.layers
        length = embeds.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        own = torch.eye(length, dtype=torch.bool)

        def closing(layer: int) -> Tensor:
            closed = self.layers[layer][1]
            return torch.cat([closed, closed[:, -1:].expand(-1, more)], dim=1)

        def hook(layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            stays, _, numbers = self.layers[layer]
            seen = torch.cat([stays, torch.ones(stays.shape[0], more, dtype=torch.bool)], dim=1) & mask.bool()
            allowed = (causal[None] & seen[:, None])[:, None]
            allowed = allowed | (own & ~allowed.any(-1, keepdim=True))  # a row that sees nothing sees itself
            if self.attention == "eager" or not torch.equal(numbers, torch.ones_like(numbers)):
                low = torch.finfo(embeds.dtype).min
                more_of_it = torch.cat([numbers.log(), torch.zeros(numbers.shape[0], more)], dim=1)[:, None, None]
                allowed = more_of_it.to(embeds.dtype).expand(allowed.shape).masked_fill(~allowed, low)
            changed = {**kwargs, "attention_mask": allowed}
            if not torch.equal(closing(layer), closing(0)):
                hidden = args[0] if args else kwargs["hidden_states"]
                changed["position_ids"] = positions - closing(layer)
                changed["position_embeddings"] = self.adapter.rotary(hidden, changed["position_ids"], layer)
            return args, changed

        handles = [
            module.register_forward_pre_hook(lambda m, a, k, i=i: hook(i, m, a, k), with_kwargs=True)
            for i, module in enumerate(layers)
        ]
        given = {k: v for k, v in self.given.items() if k not in ("inputs_embeds", "attention_mask", "position_ids")}
        if "visual_pos_masks" in given and more:
            masks = given["visual_pos_masks"]
            given["visual_pos_masks"] = torch.cat([masks, torch.zeros(masks.shape[0], more, dtype=torch.bool)], dim=1)
        try:
            output = self.adapter.language_model(
                **given, inputs_embeds=embeds, attention_mask=mask, position_ids=positions - closing(0), use_cache=False
            )
        finally:
            for handle in handles:
                handle.remove()
        return output.last_hidden_state


def kinds_of(prompt: Any) -> list[tuple[str, Any]]:
    """Kind and work of the runs of the tower behind a prompt, which writes them down in the order of its visuals."""
    kinds = list(dict.fromkeys(span.visual.kind for span in prompt.layout.spans))
    kinds = kinds * len(prompt.tower) if len(kinds) == 1 else kinds
    return list(zip(kinds, prompt.tower, strict=True))


def run_pruned(
    model: Any,
    method: Any,
    keep: Any,
    batch: dict[str, Tensor],
    tokens: int = 20,
    silent: list[int] | None = None,
    **options: Any,
) -> dict:
    """Forward and greedy tokens of the pruned model, none of them among `silent`, and all that the masked model needs
    to equal it."""
    import tokenprune

    with tokenprune.applied(model, method, keep=keep, **options) as handle, torch.no_grad():
        adapter = handle.adapter
        for stage in handle.stages:
            if stage.pruner.needed_hints:
                handle.set_hints(**example_hints(stage.pruner, 64))
        given = {}
        if not adapter.mrope:
            mask = batch["attention_mask"]
            given["position_ids"] = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
        with decoder_inputs(adapter) as calls:
            output = with_cache(functools.partial(model, **batch, **given), adapter.language_model.config)
        prompt, report = handle.last, handle.report()
        stays = handle.stays & batch["attention_mask"].bool()
        # full-length rows, or those of the tokens that stay, which end where the full ones end
        short = torch.arange(output.logits.shape[1]) >= output.logits.shape[1] - stays.sum(1, keepdim=True)
        real = stays if output.logits.shape[1] == stays.shape[1] else short
        cuts = [(cut.site, list(cut.tokens)) for cut in prompt.cuts]
        sizes = [list(cut.sizes) for cut in prompt.cuts]
        kept = handle.kept
        fed = calls[-1]
        generated = model.generate(
            **batch, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True,
            suppress_tokens=silent,
        )  # fmt: skip
    return {
        "adapter": adapter,
        "layout": prompt.layout,
        "policies": {stage.site: stage.pruner.positions for stage in handle.stages},
        "merges": any(stage.pruner.is_merging for stage in handle.stages),
        "exact": all(stage.after_block is None for stage in handle.stages),
        "cuts": cuts,
        "sizes": sizes,
        "full_mask": batch["attention_mask"],
        "tower": kinds_of(prompt),
        "kept": kept,
        "report": report,
        "fed": fed["inputs_embeds"],
        "beside": fed.get("deepstack_visual_embeds"),
        "attended": attended_rows(fed, prompt),
        "logits": output.logits[real],
        "cache": cache_in(output),
        "tokens": generated.sequences[:, batch["input_ids"].shape[1] :],
        "scores": torch.stack(generated.logits, 1),
    }


def masked_by(
    adapter: Any, batch: dict[str, Tensor], kept: list[list[Tensor]], policy: str, site: str = "input"
) -> MaskedModel:
    """The masked model of one cut, from `handle.kept`: by sample, by visual, in the order of the row."""
    import tokenprune

    with tokenprune.applied(adapter.model, "random", 1.0) as handle, torch.no_grad():
        adapter.model(**batch)
        layout = handle.last.layout
    tokens = [kept[span.sample][span.image] for span in layout.spans]
    whole = [None if len(t) == span.num_tokens else t for t, span in zip(tokens, layout.spans)]
    return MaskedModel(adapter, batch, layout, [(site, whole)], {site: policy})


def masked_of(run: dict[str, Any], batch: dict[str, Tensor], merged: Tensor | None = None) -> MaskedModel:
    """The masked model of a run."""
    return MaskedModel(
        run["adapter"], batch, run["layout"], run["cuts"], run["policies"], merged, run["tower"], run["sizes"]
    )


def compare(run: dict[str, Any], batch: dict[str, Tensor], tolerance: float) -> None:
    """Everything that `run_pruned` gave, against the masked model.

    Args:
        tolerance: relative error of logits.
    """
    masked = masked_of(run, batch)
    visible = masked.mask.bool() & masked.after_input
    fed, expected = run["fed"][run["attended"]], masked.embeds[visible]
    assert fed.shape == expected.shape
    if run["merges"]:
        masked = masked_of(run, batch, fed[masked.visual[visible]])
        for own, given in zip(run["beside"] or [], masked.given.get("deepstack_visual_embeds") or []):
            given[visible[masked.visual]] = own  # merged as well
    elif run["exact"]:
        assert torch.equal(fed, expected), "kept tokens must go on bit for bit"
    else:
        assert relative_error(fed, expected) < tolerance, "features of kept tokens"
    truth = masked.logits()
    assert run["logits"].shape == truth.shape
    assert relative_error(run["logits"], truth) < tolerance
    scores = masked.continuation(run["tokens"])
    assert relative_error(run["scores"], scores) < tolerance
    assert torch.equal(run["tokens"], scores.argmax(-1)), "the greedy tokens differ"
    check_cache(run)
