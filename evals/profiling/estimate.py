"""What a prompt would cost at a point, from the sizes in a model's config: no weights are loaded, nothing runs.

The model is built on the meta device, so that its adapter can say how its parts are laid out; the processor lays out
one prompt of `PICTURE` and `QUESTION`. Counts follow `tokenprune.cost`. Left out, because they are known only once a
method has run: signals, the matrix products of methods, and what interventions compute anew (what they save is
counted). A method that decides itself how much leaves (flowcut, todre's second stage) is counted with what its budgets
leave at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenprune import cost
from tokenprune.api import adapter_for, plan_for
from tokenprune.engine.attention import decoder_info
from tokenprune.engine.bypass import skipped
from tokenprune.engine.prompt_reader import prompt_visuals
from tokenprune.evals.config.points import NONE, Point
from tokenprune.evals.evaluation.applied_method import method_of
from tokenprune.evals.models.load import (
    LoadedModel,
    auto_class,
    fingerprint,
    model_source,
    part_with_pictures,
    ready_processor,
)
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.bypass import Bypass
from tokenprune.interfaces.pruner import Stage
from tokenprune.interfaces.site import first_layer
from tokenprune.interfaces.visual import TowerWork, Visual
from tokenprune.plan.checks import visual_lengths
from tokenprune.report import biased_shape

PICTURE = (640, 480)
"""Width and height of the picture, pixels."""
QUESTION = "What is shown in the picture? Answer the question using a single word or phrase."


@dataclass(frozen=True)
class Outline:
    """A model without weights, and one prompt of it.

    Attributes:
        visual: how the picture is laid out.
        text: tokens of the prompt that belong to no picture.
        fingerprint: as of the loaded model.
    """

    adapter: Adapter
    visual: Visual
    text: int
    fingerprint: str = ""


@dataclass(frozen=True)
class Estimate:
    """One prompt at one point.

    Attributes:
        flops: by part; `selection` is 0.
        unpruned: the same without pruning.
        stages: where the method cuts, with which budgets.
        at_most: whether the method may keep fewer tokens than this counts.
    """

    flops: cost.Flops
    unpruned: cost.Flops
    stages: tuple[Stage, ...]
    at_most: bool


def outline(name: str) -> Outline:
    """The model called `name`, from its config and processor on this machine, and a prompt of it.

    Raises:
        OSError, TypeError, ValueError: see `unloaded` and `of_prompt`.
    """
    from PIL import Image

    asked, adapter = unloaded(name)
    inputs = dict(asked.inputs([QUESTION], [Image.new("RGB", PICTURE)]))
    return of_prompt(adapter, inputs, asked.fingerprint)


def unloaded(name: str) -> tuple[LoadedModel, Adapter]:
    """The model called `name` without weights: what makes its prompts, and how it is laid out.

    Raises:
        OSError: its config or processor is not on this machine: the hub is not asked.
        TypeError, ValueError: no adapter covers the model.
    """
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging
    from transformers.utils.hub import cached_file

    logging.disable_progress_bar()
    source = model_source(name)
    if not Path(source).is_dir():
        file = cached_file(source, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
        if file is None:
            raise OSError(f"the config of {source} is not in the local cache")
        commit = Path(file).parent
        source, made_of = str(commit), commit.name
    else:
        made_of = fingerprint(source)
    with torch.device("meta"):
        part = part_with_pictures(AutoConfig.from_pretrained(source))
        model = auto_class(part).from_config(part)
    adapter = adapter_for(model)
    real = SimpleNamespace(device="cpu", dtype=torch.float32)  # where the prompt goes: the model is on no device
    return LoadedModel(name, real, ready_processor(source), made_of), adapter


def of_prompt(adapter: Adapter, inputs: Mapping[str, Any], made_of: str = "") -> Outline:
    """The outline of a prompt with one picture, as the processor laid it out.

    Raises:
        ValueError: the family's pictures are laid out behind its tower, which does not run here.
    """
    if adapter.behind_tower:
        raise ValueError(
            "how its pictures are laid out is known once its tower has run, so that reports of a run say what it costs"
        )
    (visual,) = prompt_visuals(adapter, "image", inputs)
    return Outline(adapter, visual, inputs["input_ids"].shape[1] - visual.length, made_of)


def estimate(model: Outline, point: Point, seed: int = 0) -> Estimate:
    """The cost of the prompt at a point.

    Raises:
        ValueError: the method cannot work on this model, or cannot keep to the budget; the message says why.
    """
    spec = None if point.method == NONE else method_of(point, seed)
    stages = () if spec is None else plan_for(model.adapter, spec)
    bypasses = [] if spec is None else [one for one in spec.interventions if isinstance(one, Bypass)]
    # a raster of merged tokens has as many as fit in rows and columns
    at_most = any(stage.pruner.is_adaptive or stage.pruner.is_merging for stage in stages)
    return Estimate(_flops(model, stages, bypasses), _flops(model, ()), stages, at_most)


def _flops(model: Outline, stages: Sequence[Stage], bypasses: Sequence[Bypass] = ()) -> cost.Flops:
    adapter, visual = model.adapter, model.visual
    shape = adapter.cost_shape()
    biasing = [first_layer(stage.site) for stage in stages if stage.pruner.biases_keys]
    if biasing:
        shape = biased_shape(shape, min(biasing))
    kept = visual_lengths(stages, visual.num_tokens, shape.layers)
    # separators leave with the first cut
    lengths = [model.text + (visual.length if count == visual.num_tokens else count) for count in kept]
    work = _tower_work(adapter, visual, stages)
    saved = [
        skips and -skips.flops(model.text, lengths[layer] - model.text)
        for one in bypasses
        for layer in one.prepare(decoder_info(adapter))
        for skips in [skipped(adapter, layer, shape.layer_shapes()[layer], one.mode)]
    ]
    return cost.Flops(
        vision=adapter.vision.flops(shape, work),
        projector=cost.projector_flops(shape, work.left),
        selection=0,
        prefill=cost.total([cost.prefill_flops(shape, lengths), *saved]),
        decode=cost.decode_flops(shape, [length + 1 for length in lengths]),
    )


def _tower_work(adapter: Adapter, visual: Visual, stages: Sequence[Stage]) -> TowerWork:
    """What the vision tower has to do if every cut before the projector leaves exactly its budget."""
    vision, grids = adapter.vision, visual.tower_grids
    shrink = next((stage for stage in stages if stage.place == "pixels" and stage.after_block is None), None)
    if shrink is not None:
        rows, cols = visual.rasters[0].grid
        small = shrink.pruner.target_grid((rows, cols), shrink.budget.tokens(rows * cols))
        grids = (small,) * len(visual.rasters)
    cuts = {stage.after_block: stage for stage in stages if stage.after_block is not None}
    counts = [rows * cols for rows, cols in grids]
    if not cuts:
        return TowerWork(grids, left=sum(counts))
    first, blocks, run = min(cuts) + 1, [], vision.start(grids)
    for block in range(first, len(vision.blocks)):
        if block - 1 in cuts:
            shares = cuts[block - 1].budget.pictures(visual)
            counts = [min(count, max(share, 1)) for count, share in zip(counts, shares)]
        blocks.append(tuple(count * vision.patches_per_cell for count in vision.computed(run, counts)))
    return TowerWork(grids, tuple(blocks), first, sum(vision.computed(run, counts)))
