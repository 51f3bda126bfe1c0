"""The sink channels of a decoder, and what speaks for them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from tokenprune.api import applied
from tokenprune.evals.diagnose.samples import model_inputs
from tokenprune.evals.evaluation.batching import read_batch
from tokenprune.evals.models.load import LoadedModel
from tokenprune.evals.tasks.task import Task
from tokenprune.interfaces.adapter import Adapter
from tokenprune.interfaces.intervention import DecoderInfo
from tokenprune.interventions.var import VAR, known_channels

CALIBRATE = 32
"""Prompts on which channels are looked for."""
TAU = 20.0


@dataclass(frozen=True)
class Channels:
    """Sink channels of a decoder.

    Attributes:
        numbers: () where none are known.
        tau: the threshold of phi.
        found: what discovery says of the model's own prompts.
        table: the row of the committed table that fits the sizes of the model; "" for none.
        used: "discovered", "table" or "none".
    """

    numbers: tuple[int, ...]
    tau: float
    found: str
    table: str
    used: str


def decoder_info(adapter: Adapter) -> DecoderInfo:
    """Sizes of a model's decoder."""
    config = adapter.language_model.config
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return DecoderInfo(adapter.name, config.model_type, config.hidden_size, len(adapter.layers), heads, key_heads)


def sink_channels(loaded: LoadedModel, task: Task, limit: int | None, batch_size: int) -> Channels:
    """What VAR's discovery finds on the first prompts of a task; where it finds nothing, the row of the table for the
    model's sizes, which says nothing about its weights."""
    known = known_channels(decoder_info(loaded.adapter))
    numbers, table = ((), "") if known is None else (known.channels, f"{known.model}; evidence: {known.evidence}")
    used = "none" if known is None else "table"
    try:
        discovery = _discovery(loaded, task, min(CALIBRATE, task.count(limit)), batch_size)
    except ValueError as error:  # no interventions on this model, or on its attention
        return Channels(numbers, TAU, f"not looked for: {error}", table, used)
    if discovery is None:
        return Channels(numbers, TAU, "not looked for: this decoder is too short for it", table, used)
    if discovery.channels and not discovery.reason:
        return Channels(discovery.channels, discovery.tau, str(discovery), table, "discovered")
    return Channels(numbers, TAU, str(discovery), table, used)


def _discovery(loaded: LoadedModel, task: Task, count: int, batch_size: int):
    with applied(loaded.model, VAR(channels="discover", calibrate=count)) as handle, torch.inference_mode():
        for start in range(0, count, batch_size):
            samples = read_batch(task, start, min(start + batch_size, count)).samples
            if samples:
                loaded.model(**model_inputs(loaded, samples), logits_to_keep=1)
        (searching,) = handle.interventions
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what discovery warns of is said on the page
            searching.settled()
        return searching.discovery if isinstance(searching, VAR) else None
