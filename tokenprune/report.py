"""What the last batch of prompts cost, unpruned and pruned."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tokenprune import cost
from tokenprune.engine.attention import AttentionInterventions
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.pruner import Stage
from tokenprune.interfaces.site import first_layer
from tokenprune.interfaces.visual import TowerWork
from tokenprune.state.key_bias import biased_width
from tokenprune.state.prompt_state import Prompt


@dataclass(frozen=True)
class Report:
    """Totals over the last batch of prompts.

    Attributes:
        method: the method with its budget.
        positions: "compact" or "keep", of each stage that differs; "as laid out" where nothing prunes.
        interventions: one line each on what changes attention, in which layers, and what it did.
        notes: what a reader must know of the method on this model, for example a stand-in for a signal, and of how the
            prompts were read.
        samples: rows of the batch.
        images: images in all.
        visual_tokens: visual tokens that the processor laid out.
        kept_tokens: visual tokens that reached the decoder's last layer.
        merged_tokens: visual tokens that left because they were merged into kept ones, by methods that say how many;
            the others that left were dropped.
        prompt_tokens: text and visual tokens before pruning, padding not counted.
        kept_prompt_tokens: the same in the decoder's last layer.
        visual_by_layer: visual tokens in each decoder layer.
        tokens_by_layer: text and visual tokens in each decoder layer.
        equivalent_tokens: kept visual tokens averaged over the decoder's layers, over the whole batch.
        selection_seconds: time for signals and selection.
        flops: by part, analytic (2 per multiply-add, matrix products only, see `tokenprune.cost`), padding not counted;
            what interventions compute anew is part of the prefill. None for a part that is not modelled.
        flops_unpruned: the same without pruning.
        flops_by_layer: of the prefill, in each decoder layer; None where it is not modelled.
        kv_bytes: bytes of the prompt's KV cache after pruning, padding not counted: keys and values, of layers with a
            window those it holds, and states of linear attention. None if a layer is not modelled.
        kv_bytes_unpruned: the same without pruning.
    """

    method: str
    positions: str
    notes: tuple[str, ...]
    samples: int
    images: int
    visual_tokens: int
    kept_tokens: int
    prompt_tokens: int
    kept_prompt_tokens: int
    visual_by_layer: tuple[int, ...]
    tokens_by_layer: tuple[int, ...]
    equivalent_tokens: float
    selection_seconds: float
    flops: cost.Flops
    flops_unpruned: cost.Flops
    flops_by_layer: tuple[int | None, ...]
    kv_bytes: int | None
    kv_bytes_unpruned: int | None
    interventions: tuple[str, ...] = ()
    merged_tokens: int = 0

    def __str__(self) -> str:
        merged = f", {self.merged_tokens} merged into them" if self.merged_tokens else ""
        lines = [
            f"{self.method}: {self.kept_tokens} of {self.visual_tokens} visual tokens kept{merged} "
            f"({self.images} image(s), {self.samples} prompt(s), positions: {self.positions})",
            f"prompt tokens  {self.prompt_tokens} -> {self.kept_prompt_tokens}",
            *self._layers(),
            f"FLOPs to the first token  {_change(self.flops_unpruned.total, self.flops.total, share=True)}",
            "  of which  "
            + ", ".join(
                f"{part} {_change(getattr(self.flops_unpruned, part), getattr(self.flops, part))}"
                for part in ("vision", "projector", "selection", "prefill")
            ),
            f"KV cache  {_change(self.kv_bytes_unpruned, self.kv_bytes, 'B', share=True)}",
            f"selection  {self.selection_seconds * 1000:.2f} ms",
            *self.interventions,
            *(f"note  {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _layers(self) -> list[str]:
        if len(set(self.visual_by_layer)) == 1:
            return []
        runs = [f"{n} x {len(list(same))}" for n, same in itertools.groupby(self.visual_by_layer)]
        return [f"visual tokens by layer  {', '.join(runs)}: {self.equivalent_tokens:.1f} on average"]


def _change(before: float | None, after: float | None, unit: str = "", share: bool = False) -> str:
    """From one number to another, with the second's share of the first; both are numbers or none is."""
    if before is None or after is None:
        return cost.NOT_MODELLED
    ratio = cost.share(after, before)
    return f"{_si(before)}{unit} -> {_si(after)}{unit}" + (f" ({1.0 if ratio is None else ratio:.1%})" if share else "")


def _si(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 or unit == "T":
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g}"


def make_report(
    prompt: Prompt, label: str, stages: Sequence[Stage], adapter: Adapter, attending: AttentionInterventions
) -> Report:
    """Count one prompt batch. See `Report`."""
    plain_shape = adapter.cost_shape()
    shape = _shape_of(prompt, plain_shape, stages)
    layout = prompt.layout
    lengths = prompt.lengths or [layout.length] * layout.batch_size
    visual_tokens = sum(span.num_tokens for span in layout.spans)
    by_layer = _by_layer(prompt, lengths, shape.layers)
    plain = [TowerWork(work.plain or work.grids, left=work.whole, videos=work.videos) for work in prompt.tower]
    itemsize = adapter.model.dtype.itemsize
    kept = by_layer[-1][0]
    flops = _flops(adapter, shape, prompt.tower, [rows for _, rows in by_layer], prompt.flops)
    if prompt.held:
        flops = dataclasses.replace(flops, decode=_decode(shape, _stored(prompt, by_layer, 0)))
    by_depth = map(cost.total, zip(*(cost.layer_flops(shape, row) for row in _by_row(by_layer))))
    added = prompt.attention_flops  # by layer, what interventions compute anew or save
    return Report(
        method=label,
        positions=", ".join(dict.fromkeys(str(stage.pruner.positions) for stage in stages)) or "as laid out",
        notes=(
            *dict.fromkeys(note for stage in stages for note in stage.pruner.notes(adapter.tower)),
            *(layout.notes if stages else ()),
        ),
        samples=layout.batch_size,
        images=len(layout.spans),
        visual_tokens=visual_tokens,
        kept_tokens=kept,
        prompt_tokens=sum(lengths),
        kept_prompt_tokens=sum(by_layer[-1][1]),
        visual_by_layer=tuple(visual for visual, _ in by_layer),
        tokens_by_layer=tuple(sum(rows) for _, rows in by_layer),
        equivalent_tokens=cost.equivalent_tokens([visual for visual, _ in by_layer]),
        selection_seconds=prompt.timer.seconds,
        flops=dataclasses.replace(flops, prefill=cost.total([flops.prefill, *added.values()])),
        flops_unpruned=_flops(adapter, plain_shape, plain, [lengths] * shape.layers, 0),
        flops_by_layer=tuple(cost.total([flops, added.get(layer, 0)]) for layer, flops in enumerate(by_depth)),
        kv_bytes=_kv_bytes(shape, _stored(prompt, by_layer, 1), itemsize),
        kv_bytes_unpruned=_kv_bytes(shape, [lengths] * shape.layers, itemsize),
        interventions=attending.summaries(prompt),
        merged_tokens=round(sum(float(merged) for merged in prompt.merged)),
    )


def biased_shape(shape: cost.ModelShape, first: int) -> cost.ModelShape:
    """The sizes with the columns that carry the bias of merged tokens' keys from decoder layer `first` on; not modelled
    there is a layer whose scores do not follow from the heads' width."""
    plain, wide = 2 * shape.heads * shape.head_dim, 2 * shape.heads * biased_width(shape.head_dim)
    layers = list(shape.layer_shapes())
    for depth, layer in enumerate(layers[first:], start=first):
        if layer is not None:
            layers[depth] = dataclasses.replace(layer, scores=wide) if layer.scores == plain else None
    return dataclasses.replace(shape, by_layer=tuple(layers))


def _shape_of(prompt: Prompt, shape: cost.ModelShape, stages: Sequence[Stage]) -> cost.ModelShape:
    """The sizes at which the prompt ran."""
    biasing = [first_layer(stage.site) for stage in stages if stage.pruner.biases_keys]
    merging = [first_layer(cut.site) for cut in prompt.cuts if any(sizes is not None for sizes in cut.sizes)]
    return biased_shape(shape, max(min(biasing), min(merging))) if biasing and merging else shape


def visual_by_layer(prompt: Prompt, layers: int) -> list[list[int]]:
    """For each sample, its visual tokens in every decoder layer."""
    counts = [span.num_tokens for span in prompt.layout.spans]
    cuts = {first_layer(cut.site): cut.counts for cut in prompt.cuts}
    rows: list[list[int]] = [[] for _ in range(prompt.layout.batch_size)]
    for layer in range(layers):
        counts = cuts.get(layer, counts)
        for row, counts_of_sample in enumerate(rows):
            counts_of_sample.append(sum(n for n, span in zip(counts, prompt.layout.spans) if span.sample == row))
    return rows


def _by_layer(prompt: Prompt, lengths: list[int], layers: int) -> list[tuple[int, list[int]]]:
    """Visual tokens of the batch and attended tokens of each row, in every decoder layer."""
    by_layer: list[tuple[int, list[int]]] = []
    rows = list(lengths)
    cuts = {first_layer(cut.site): cut for cut in prompt.cuts}
    visual = visual_by_layer(prompt, layers)
    for layer in range(layers):
        if layer in cuts:
            rows = list(cuts[layer].lengths)
        by_layer.append((sum(counts_of_sample[layer] for counts_of_sample in visual), rows))
    return by_layer


def _stored(prompt: Prompt, by_layer: Sequence[tuple[int, list[int]]], which: int) -> list[list[int]]:
    """Keys of each row in every decoder layer behind the prompt: those that a step reads (0), or all that stay (1)."""
    return [prompt.held[layer][which] if layer in prompt.held else rows for layer, (_, rows) in enumerate(by_layer)]


def _decode(shape: cost.ModelShape, layers: Sequence[Sequence[int]]) -> int | None:
    samples = range(len(layers[0]))
    return cost.total(cost.decode_flops(shape, [rows[sample] + 1 for rows in layers]) for sample in samples)


def _by_row(by_layer: Sequence[tuple[int, list[int]]]) -> list[list[int]]:
    """For each row of the batch, its length in every layer."""
    return [list(lengths) for lengths in zip(*(rows for _, rows in by_layer))]


def _kv_bytes(shape: cost.ModelShape, layers: Sequence[Sequence[int]], itemsize: int) -> int | None:
    samples = len(layers[0])
    return cost.total(cost.kv_bytes(shape, [rows[sample] for rows in layers], itemsize) for sample in range(samples))


def _flops(
    adapter: Adapter,
    shape: cost.ModelShape,
    tower: Sequence[TowerWork],
    layers: Sequence[Sequence[int]],
    selection: int,
) -> cost.Flops:
    # the rows of a batch differ in length; the tower and the projector see all of its images at once
    samples = range(len(layers[0]))
    return cost.Flops(
        vision=cost.total(adapter.vision.flops(shape, work) for work in tower),
        projector=cost.total(cost.projector_flops(shape, work.left) for work in tower),
        selection=selection,
        prefill=cost.total(cost.prefill_flops(shape, [rows[sample] for rows in layers]) for sample in samples),
        decode=_decode(shape, layers),
    )
