"""What the last batch of prompts cost, unpruned and pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenprune import cost
from tokenprune.adapters._base import Adapter
from tokenprune.base import Pruner
from tokenprune.engine import Prompt


@dataclass(frozen=True)
class Report:
    """Totals over the last batch of prompts.

    Attributes:
        method: name of the method.
        positions: "compact" or "keep".
        samples: rows of the batch.
        images: images in all.
        visual_tokens: visual tokens that the processor laid out.
        kept_tokens: visual tokens that reached the decoder.
        prompt_tokens: text and visual tokens before pruning, padding not counted.
        kept_prompt_tokens: the same after it.
        equivalent_tokens: kept visual tokens averaged over the decoder's layers, over the whole batch.
        selection_seconds: time for signals and selection.
        flops: by part, analytic (2 per multiply-add, matrix products only, see `tokenprune.cost`), padding not counted.
        flops_unpruned: the same without pruning.
        kv_bytes: bytes of the prompt's KV cache after pruning, padding not counted.
        kv_bytes_unpruned: the same without pruning.
    """

    method: str
    positions: str
    samples: int
    images: int
    visual_tokens: int
    kept_tokens: int
    prompt_tokens: int
    kept_prompt_tokens: int
    equivalent_tokens: float
    selection_seconds: float
    flops: cost.Flops
    flops_unpruned: cost.Flops
    kv_bytes: int
    kv_bytes_unpruned: int

    def __str__(self) -> str:
        ratio = self.flops.total / self.flops_unpruned.total if self.flops_unpruned.total else 1.0
        memory = self.kv_bytes / self.kv_bytes_unpruned if self.kv_bytes_unpruned else 1.0
        lines = [
            f"{self.method}: {self.kept_tokens} of {self.visual_tokens} visual tokens kept "
            f"({self.images} image(s), {self.samples} prompt(s), positions: {self.positions})",
            f"prompt tokens  {self.prompt_tokens} -> {self.kept_prompt_tokens}",
            f"FLOPs to the first token  {_si(self.flops_unpruned.total)} -> {_si(self.flops.total)} ({ratio:.1%})",
            "  of which  "
            + ", ".join(
                f"{part} {_si(getattr(self.flops_unpruned, part))} -> {_si(getattr(self.flops, part))}"
                for part in ("vision", "projector", "selection", "prefill")
            ),
            f"KV cache  {_si(self.kv_bytes_unpruned)}B -> {_si(self.kv_bytes)}B ({memory:.1%})",
            f"selection  {self.selection_seconds * 1000:.2f} ms",
        ]
        return "\n".join(lines)


def _si(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 or unit == "T":
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g}"


def make_report(prompt: Prompt, pruner: Pruner, adapter: Adapter, model: Any) -> Report:
    """Count one prompt batch. See `Report`."""
    shape: cost.ModelShape = adapter.cost_shape()
    layout = prompt.layout
    lengths = prompt.lengths or [layout.length] * layout.batch_size
    kept_lengths = prompt.lengths_kept or lengths
    kept = [span.num_tokens if k is None else k.shape[0] for span, k in zip(layout.spans, prompt.kept)]
    images = len(layout.spans)
    tower = None if prompt.tower_grid is None else prompt.tower_grid[0] * prompt.tower_grid[1]
    pruned = any(indices is not None for indices in prompt.kept)
    rows = len(pruner.signals(adapter.tower)) if images else 0
    selection = 0
    if pruned and pruner.site != "pixels":
        for grid, members in layout.groups().items():
            picked = prompt.kept[members[0]]
            if picked is not None:
                selection += pruner.flops(len(members), grid[0] * grid[1], shape.hidden, picked.shape[0], adapter.tower)
    itemsize = model.dtype.itemsize
    return Report(
        method=pruner.name,
        positions=pruner.positions,
        samples=layout.batch_size,
        images=images,
        visual_tokens=layout.visual_tokens,
        kept_tokens=sum(kept),
        prompt_tokens=sum(lengths),
        kept_prompt_tokens=sum(kept_lengths),
        equivalent_tokens=cost.equivalent_tokens([sum(kept)] * shape.layers),
        selection_seconds=prompt.watch.seconds,
        flops=_flops(shape, kept_lengths, images, tower, selection, rows),
        flops_unpruned=_flops(shape, lengths, images, None, 0, 0),
        kv_bytes=sum(cost.kv_bytes(shape, [n] * shape.layers, itemsize) for n in kept_lengths),
        kv_bytes_unpruned=sum(cost.kv_bytes(shape, [n] * shape.layers, itemsize) for n in lengths),
    )


def _flops(
    shape: cost.ModelShape, lengths: list[int], images: int, tower: int | None, selection: int, rows: int
) -> cost.Flops:
    # the rows of a batch differ in length; the tower and the projector see all of its images at once
    towers = cost.prompt_flops(
        shape, [1] * shape.layers, images=images, tower_patches=tower, selection=selection, signal_rows=rows
    )
    return cost.Flops(
        vision=towers.vision,
        projector=towers.projector,
        selection=towers.selection,
        prefill=sum(cost.prefill_flops(shape, [n] * shape.layers) for n in lengths),
        decode=sum(cost.decode_flops(shape, [n + 1] * shape.layers) for n in lengths),
    )
